"""Turns the segments of a prompt into the rows that llama.cpp decodes, call by call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keepsight.runtime.language.llama import Llama
from keepsight.runtime.language.segments import Embeds, Segment, Special, Text, Tokens
from keepsight.streams.errors import LLMError, UsageError

__all__ = ["Block", "blocks_of", "tokenise"]

Rows = npt.NDArray[np.int32] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows that are always decoded in one call, so that a prompt's logits never depend on what was cached.

    Args:
        rows: token ids int32 `[n]`, or embeddings float32 `[n, n_embd]`.
        key: a hash of their content.
    """

    rows: Rows
    key: bytes


def blocks_of(llama: Llama, segments: Sequence[Segment]) -> list[Block]:
    """The prompt as the calls that will decode it: split where the kind of rows changes, and every n_batch rows.

    Raises:
        UsageError: the prompt has no rows.
        LLMError: embedding rows have another width than the model's, or user text would become a control token.
    """
    blocks = [
        Block(part, hashlib.blake2b(str(part.dtype).encode() + part.tobytes()).digest())
        for rows in _runs(llama, segments)
        for part in (rows[at : at + llama.n_batch] for at in range(0, len(rows), llama.n_batch))
    ]
    if not blocks:
        raise UsageError("The prompt is empty.", fix="Give it at least one token or row.")
    return blocks


def tokenise(llama: Llama, segments: Iterable[Text | Special | Tokens]) -> list[int]:
    """Token ids of segments without embeddings.

    Neighbouring text is tokenised as one string, as a tokeniser of the whole prompt would. Only control tokens that a
    `Special` spells become control tokens: its text is split at them, and nothing else is ever parsed for any.
    """
    ids: list[int] = []
    plain = ""
    for part in _parts(llama, segments):
        if isinstance(part, str):
            plain += part
        else:
            ids += _plain_ids(llama, plain)
            ids += part
            plain = ""
    return ids + _plain_ids(llama, plain)


def _runs(llama: Llama, segments: Sequence[Segment]) -> Iterator[Rows]:
    text: list[Text | Special | Tokens] = []
    for segment in segments:
        if isinstance(segment, Embeds):
            yield np.array(tokenise(llama, text), np.int32)
            yield _checked(llama, segment)
            text = []
        else:
            text.append(segment)
    yield np.array(tokenise(llama, text), np.int32)


def _checked(llama: Llama, segment: Embeds) -> npt.NDArray[np.float32]:
    width = segment.rows.shape[1]
    if width != llama.n_embd:
        raise LLMError(
            f"Soft-prompt rows are {width} wide, where {llama.path.name} takes {llama.n_embd}.",
            fix="Use the language model that the soft prompt was trained for.",
        )
    return segment.rows.copy()  # the caller may write into its array before these rows are decoded


def _parts(llama: Llama, segments: Iterable[Text | Special | Tokens]) -> Iterator[str | list[int]]:
    """Plain text, and token ids that stand as they are, in order."""
    for segment in segments:
        if isinstance(segment, Text):
            yield segment.text
        elif isinstance(segment, Special):
            yield from _split_at_control_tokens(llama, segment.text)
        else:
            yield list(segment.ids)


def _split_at_control_tokens(llama: Llama, text: str) -> Iterator[str | list[int]]:
    at = 0
    for token in llama.tokenise(text, special=True):
        spelling = llama.control_spelling(token)
        if spelling is not None:
            found = text.index(spelling, at)
            yield text[at:found]
            yield [token]
            at = found + len(spelling)
    yield text[at:]


def _plain_ids(llama: Llama, text: str) -> list[int]:
    ids = llama.tokenise(text, special=False) if text else []
    if any(llama.is_control(token) for token in ids):
        raise LLMError(
            f"{llama.path.name} reads a control token in plain text: {text[:80]!r}.",
            fix="Rephrase it; if it is an ordinary question, the model's vocabulary is unsafe to use.",
        )
    return ids
