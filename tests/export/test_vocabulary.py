"""The Q-Former's vocabulary knows what it was trained on, and refuses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from keepsight.export.questions import QuestionSet
from keepsight.export.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(QuestionSet().texts(), tmp_path_factory.mktemp("vocabulary") / "tokenizer.json")


def test_training_questions_are_whole_words_and_fit_the_smallest_bucket(tokenizer: Tokenizer) -> None:
    for question in set(QuestionSet().texts()):
        tokens = tokenizer.encode(question).tokens
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(tokens) <= 16
        assert "[UNK]" not in tokens and not any(token.startswith("##") for token in tokens)


def test_other_words_are_spelled(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Zebra?").tokens == ["[CLS]", "z", "##e", "##b", "##r", "##a", "?", "[SEP]"]


def test_the_same_questions_give_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file in files:
        build_tokenizer(["what is this?", "is there a red circle?"], file)
    assert files[0].read_bytes() == files[1].read_bytes()
