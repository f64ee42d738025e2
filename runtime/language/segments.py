"""What a prompt is made of: template text, user text, token ids and rows of embeddings, in order.

User text and template text are different types on purpose. `Special` may spell control tokens such as `<|im_end|>`; a
`Text` never becomes one, so a question cannot close its own turn and speak for the assistant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import LLMError, UsageError

__all__ = ["Embeds", "Segment", "Special", "Text", "Tokens", "render", "verbatim"]

_PLACEHOLDER = re.compile(r"(\{video\}|\{question\})")


@dataclass(frozen=True, slots=True)
class Text:
    """Text of the user: read as plain text, whatever it contains."""

    text: str


@dataclass(frozen=True, slots=True)
class Special:
    """Text of a template: control tokens that it spells are read as control tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, fed as they are."""

    ids: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Embeds:
    """Rows that stand where token embeddings would: a soft prompt.

    Args:
        rows: float32 `[n, n_embd]`, n >= 1, finite, in the scale the model's own embeddings have at its first layer.

    Raises:
        LLMError: `rows` has another dtype or rank, is empty, or holds NaN or infinity. Its width is checked against
            the model when it is fed.
    """

    rows: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        rows = self.rows
        if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.ndim != 2 or not len(rows):
            found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise LLMError(f"Soft-prompt rows are {found}.", fix="Pass a float32 array [n, n_embd] with n >= 1.")
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise LLMError(
                f"Soft-prompt row {int(bad.argmax())} of {len(rows)} holds NaN or infinity.",
                fix="Look for the first bad output upstream: llama.cpp would answer from it without an error.",
            )


Segment = Text | Special | Tokens | Embeds


def render(template: str, *, video: npt.NDArray[np.float32], question: str) -> list[Segment]:
    """Fills a template: `{video}` becomes the rows, `{question}` the user's text, the rest is template text.

    >>> rows = np.zeros((1, 4), np.float32)
    >>> [type(s).__name__ for s in render("<s>{video}Q: {question}</s>", video=rows, question="{video}?")]
    ['Special', 'Embeds', 'Special', 'Text', 'Special']

    Args:
        template: has `{video}` once and `{question}` at most once; other braces are ordinary text.
        video: float32 `[n, n_embd]`.
        question: never parsed, neither for placeholders nor for control tokens.

    Raises:
        UsageError: a placeholder is missing or repeated.
    """
    if template.count("{video}") != 1 or template.count("{question}") > 1:
        raise UsageError(
            f"The prompt template {template!r} has {template.count('{video}')} x {{video}} and "
            f"{template.count('{question}')} x {{question}}.",
            fix="Write {video} once and {question} at most once.",
        )
    filled: dict[str, Segment] = {"{video}": Embeds(video), "{question}": Text(question)}
    return [filled.get(part, Special(part)) for part in _PLACEHOLDER.split(template) if part]


def verbatim(prompt: str, *, video: npt.NDArray[np.float32]) -> list[Segment]:
    """The rows, then the user's own words and nothing else: what MA-LMM feeds for a given `prompt`."""
    return [Embeds(video), Text(prompt)]
