"""The Q-Former's text tokenizer: text in, ids and mask out, padded to a size that the graphs are built for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import BundleError, UsageError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """A `tokenizer.json` in the `tokenizers` format. Special tokens are added as its own post-processor says.

    Its settings for truncation and padding are switched off: text is never cut in silence, and padding is to buckets.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a tokenizer.

        Raises:
            BundleError: the file is missing or is no tokenizer.
        """
        from tokenizers import Tokenizer

        self.path = Path(path)
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises nothing more precise
            raise BundleError(
                f"{self.path} is not a tokenizer: {error}.", fix="Restore or export the bundle again."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Padding is masked, so any row of the embedding table will do where there is no token for it.
        self._pad_id: int = self._tokenizer.token_to_id("[PAD]") or 0

    def __repr__(self) -> str:
        return f"TextTokenizer({str(self.path)!r})"

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, buckets: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and mask of a text, padded to the smallest bucket that holds it.

        Args:
            text: what the Q-Former is to read.
            buckets: text lengths L that the graphs are built for; (0,) for a Q-Former without text, which reads none.

        Returns:
            ids: [L] int64.
            mask: [L] float32, 1 = text, 0 = padding.

        Raises:
            UsageError: the text is longer than the largest bucket.
        """
        if tuple(buckets) == (0,):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        tokens = self._tokenizer.encode(text).ids
        fitting = [bucket for bucket in buckets if bucket >= len(tokens)]
        if not fitting:
            raise UsageError(
                f"the question is {len(tokens)} tokens long for the Q-Former, which reads {max(buckets)} at most.",
                fix="Ask a shorter question.",
            )
        ids = np.full(min(fitting), self._pad_id, dtype=np.int64)
        ids[: len(tokens)] = tokens
        mask = np.zeros(len(ids), dtype=np.float32)
        mask[: len(tokens)] = 1
        return ids, mask
