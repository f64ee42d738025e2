"""What several tests of the export need."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as LLaMA's: BPE, byte fallback, split digits."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("vocabulary")
    rng = random.Random(0)
    words = ["circle", "triangle", "what", "shape", "was", "first", "the", "colour", "then", "and", "before"]
    words += ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(600)]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700,
        byte_fallback=True, split_digits=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "tokenizer.model"
