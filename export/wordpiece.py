"""The Q-Former's BERT tokenizer as the one file that a bundle holds."""

from __future__ import annotations

from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer

from keepsight.streams.errors import CheckpointError

__all__ = ["text_tokenizer", "write_text_tokenizer"]


def write_text_tokenizer(source: Path, target: Path, *, rows: int) -> None:
    """Write `target` from what `text_tokenizer` reads.

    Raises:
        CheckpointError: as `text_tokenizer`.
    """
    text_tokenizer(source, rows=rows).save(str(target))


def text_tokenizer(source: Path, *, rows: int) -> Tokenizer:
    """Read a folder, a `tokenizer.json` or a BERT `vocab.txt` (lower-cased, `[CLS] text [SEP]`).

    LAVIS adds a token `[DEC]` to bert-base-uncased, which no question contains; the embedding may have more rows than the
    tokenizer has tokens.

    Raises:
        CheckpointError: no tokenizer there, or one with more tokens than the Q-Former's embedding has rows.
    """
    tokenizer = _load(_file(source))
    if tokenizer.get_vocab_size() > rows:
        raise CheckpointError(
            f"{source} has {tokenizer.get_vocab_size()} tokens, the Q-Former's embedding {rows} rows.",
            fix="Give the tokenizer that the Q-Former was trained with.",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in ("tokenizer.json", "vocab.txt"):
        if (source / name).is_file():
            return source / name
    raise CheckpointError(f"{source} holds neither tokenizer.json nor vocab.txt.")


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer at {path}.", fix="Check the path.")
    try:
        if path.suffix == ".json":
            return Tokenizer.from_file(str(path))
        return Tokenizer.from_str(BertWordPieceTokenizer(str(path), lowercase=True).to_str())
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{path} is not a tokenizer ({error}).") from error
