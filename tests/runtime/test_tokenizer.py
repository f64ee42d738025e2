"""Text is padded to the buckets of the graphs and never cut."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from keepsight.runtime.tokenizer import TextTokenizer
from keepsight.streams.errors import BundleError, UsageError

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "what", "colour", "is", "it"]


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # What a file from elsewhere may bring along, and must not have an effect.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_id=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_pads_to_the_smallest_bucket_that_fits(tokenizer_file):
    ids, mask = TextTokenizer(tokenizer_file).encode("what colour is it", [4, 8, 16])
    assert ids.tolist() == [2, 4, 5, 6, 7, 3, 1, 1]
    assert mask.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert (ids.dtype, mask.dtype) == (np.int64, np.float32)


def test_a_text_as_long_as_a_bucket_is_not_padded(tokenizer_file):
    ids, mask = TextTokenizer(tokenizer_file).encode("is it", [4, 8])
    assert ids.tolist() == [2, 6, 7, 3]
    assert mask.all()


def test_a_text_too_long_for_every_bucket_is_an_error_with_both_lengths(tokenizer_file):
    with pytest.raises(UsageError, match="the question is 9 tokens long for the Q-Former, which reads 8 at most"):
        TextTokenizer(tokenizer_file).encode("is it " * 3 + "what", [4, 8])


def test_a_qformer_without_text_reads_none(tokenizer_file):
    ids, mask = TextTokenizer(tokenizer_file).encode("what", [0])
    assert ids.shape == mask.shape == (0,)


def test_vocabulary_counts_every_token(tokenizer_file):
    assert TextTokenizer(tokenizer_file).vocabulary == len(WORDS)


def test_a_file_that_is_missing_or_no_tokenizer_is_a_bundle_error(tmp_path):
    with pytest.raises(BundleError, match=r"none.json is not a tokenizer"):
        TextTokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BundleError, match=r"bad.json is not a tokenizer"):
        TextTokenizer(tmp_path / "bad.json")
