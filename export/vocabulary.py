"""The Q-Former's own small text vocabulary: the words of the training questions, and single characters for all others."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def build_tokenizer(questions: Iterable[str], path: Path) -> Tokenizer:
    """WordPiece over whole words, falling back to characters; `[CLS] question [SEP]` as BERT frames it. Written to `path`.

    A word outside the vocabulary is spelled letter by letter, so that no question is refused; only a character outside
    printable ASCII becomes `[UNK]`.
    """
    words = sorted({word for question in questions for word in re.findall(r"\w+|[^\w\s]", question.lower())})
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    pieces = [*SPECIALS, *characters, *(f"##{c}" for c in characters), *(word for word in words if len(word) > 1)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer.save(str(path))
    return tokenizer
