"""The questions that a bundle is verified with, and which of them can't be asked."""

from __future__ import annotations

from collections.abc import Sequence

from keepsight.streams.errors import UsageError

__all__ = ["refuse_blank"]


def refuse_blank(questions: Sequence[str]) -> None:
    """Refuse questions without a word, for the command and for `verify` alike.

    Raises:
        UsageError: one is empty, or nothing but space.
    """
    if not all(text.strip() for text in questions):
        raise UsageError("A question is empty.", fix="Ask something, or leave the question out.")
