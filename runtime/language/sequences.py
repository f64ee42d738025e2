"""The sequences of one llama.cpp context: the prompt that is kept, and the branches that continue it.

Sequence 0 keeps the last prompt. A new one is compared with it block by block, by content, embeddings included, and
only what differs is decoded. Branches share its cells for the price of some bookkeeping (5 to 10 us), which makes an
answer, a beam or an option cheap to start and to drop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keepsight.runtime.language.llama import Llama
from keepsight.runtime.language.prompt import Block
from keepsight.streams.errors import LLMError

__all__ = ["SEQUENCES", "CancelledError", "Prefill", "Sequences"]

Float32 = npt.NDArray[np.float32]

SEQUENCES = 32  # 1 kept prompt, 2 x beams for a beam search, the rest for answers that are open at the same time
_KEPT = 0


class Prefill(NamedTuple):
    """What prefilling a prompt took: `rows` in all, of which `reused` were already there, in `seconds`."""

    rows: int
    reused: int
    seconds: float


class CancelledError(Exception):
    """Unwinds a prefill or a beam search that was told to stop; never leaves `LLM`."""


class Sequences:
    """Owns a `Llama` and the lock that its context needs: llama.cpp aborts if two threads enter one context."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        # Re-entrant: an answer that is garbage-collected drops its branch in whichever thread that happens.
        self.lock = threading.RLock()
        self._free = list(range(1, llama.n_sequences))
        self._kept: list[Block] = []
        self._kept_logits: Float32 | None = None
        self.newest: Prefill | None = None

    def close(self) -> None:
        """Frees the model, once no call is inside it."""
        with self.lock:
            self._llama.close()

    def check_open(self) -> None:
        """Raises LLMError after `close`."""
        if self._llama.closed:
            raise LLMError(f"The model {self._llama.path.name} is closed.", fix="Keep it open while answers are read.")

    def check_room(self, blocks: list[Block], extra: int, what: str) -> None:
        """Raises LLMError if a prompt and `extra` positions for `what` exceed the context."""
        rows = sum(len(block.rows) for block in blocks)
        if rows + extra > self._llama.n_ctx:
            raise LLMError(
                f"The prompt has {rows} rows, and with {what} it exceeds the context of {self._llama.n_ctx}.",
                fix="Raise n_ctx, shorten the prompt, or ask for fewer tokens.",
            )

    def prefill(self, blocks: list[Block], cancel: threading.Event | None = None) -> tuple[Float32, Prefill]:
        """Makes the kept prompt be exactly these blocks; returns the logits after them, float32 `[n_vocab]`.

        Raises:
            CancelledError: `cancel` was set before a block was decoded.
            LLMError: there is no room, or llama.cpp fails.
        """
        started = perf_counter()
        with self.lock:
            self.check_open()
            self.check_room(blocks, 0, "nothing else")
            shared = self._shared(blocks)
            self._keep(shared)
            for index, block in enumerate(blocks[shared:], shared):
                if cancel is not None and cancel.is_set():
                    raise CancelledError
                outputs = np.zeros(len(block.rows), np.bool_)
                outputs[-1] = index == len(blocks) - 1
                logits = self._append(block, outputs)
                self._kept_logits = logits[0] if len(logits) else None
            assert self._kept_logits is not None
            rows = [len(block.rows) for block in blocks]
            self.newest = Prefill(sum(rows), sum(rows[:shared]), perf_counter() - started)
            return self._kept_logits, self.newest

    def logits_everywhere(self, blocks: list[Block]) -> Float32:
        """Decodes a prompt anew and returns the logits after each of its rows, float32 `[rows, n_vocab]`."""
        with self.lock:
            self.check_open()
            self.check_room(blocks, 0, "nothing else")
            self._keep(0)
            return np.concatenate([self._append(block, np.ones(len(block.rows), np.bool_)) for block in blocks])

    def forget(self) -> None:
        """Drops the kept prompt."""
        with self.lock:
            self.check_open()
            self._keep(0)

    def resize(self, n_ctx: int) -> bool:
        """Opens a context of another size and drops the kept prompt; False, and nothing done, while an answer is open.

        Raises:
            LLMError: as `Llama.resize`.
        """
        with self.lock:
            self.check_open()
            if len(self._free) < self._llama.n_sequences - 1:
                return False
            self._keep(0)
            self._llama.resize(n_ctx)
            return True

    @contextmanager
    def branches(self, count: int) -> Iterator[list[int]]:
        """Sequences of one's own, empty at first and dropped at the end."""
        with self.lock:
            self.check_open()
            if count > len(self._free):
                raise LLMError(
                    f"{count} more branches, where {len(self._free)} of {SEQUENCES} are free.",
                    fix="Use fewer beams, or finish and close open answers.",
                )
            taken, self._free = self._free[:count], self._free[count:]
        try:
            yield taken
        finally:
            with self.lock:
                if not self._llama.closed:
                    self.drop(taken)
                self._free += taken

    def continue_kept(self, branches: Iterable[int]) -> None:
        """Makes each branch continue the kept prompt. The caller holds the lock since its prefill."""
        for branch in branches:
            self._llama.copy(_KEPT, branch)

    def move(self, source: int, target: int) -> None:
        """Makes one branch a copy of another."""
        with self.lock:
            self.check_open()
            self._llama.remove(target)
            self._llama.copy(source, target)

    def drop(self, branches: Iterable[int]) -> None:
        """Empties branches."""
        with self.lock:
            self.check_open()
            for branch in branches:
                self._llama.remove(branch)

    def decode(
        self,
        rows: npt.NDArray[np.int32] | Float32,
        positions: npt.NDArray[np.integer[Any]],
        sequences: npt.NDArray[np.integer[Any]],
        outputs: npt.NDArray[np.bool_] | None = None,
    ) -> Float32:
        """`Llama.decode` under the lock; without `outputs`, the logits of every row."""
        with self.lock:
            self.check_open()
            wanted = np.ones(len(rows), np.bool_) if outputs is None else outputs
            return self._llama.decode(rows, positions=positions, sequences=sequences, outputs=wanted)

    def _shared(self, blocks: list[Block]) -> int:
        """How many blocks at the beginning need not be decoded."""
        same = [mine.key == kept.key for mine, kept in zip(blocks, self._kept, strict=False)]
        shared = same.index(False) if False in same else len(same)
        if shared == len(blocks) and (len(self._kept) > shared or self._kept_logits is None):
            return shared - 1  # the last one again, for the logits after it
        return shared

    def _keep(self, count: int) -> None:
        if count < len(self._kept):
            self._llama.remove(_KEPT, sum(len(kept.rows) for kept in self._kept[:count]))
            del self._kept[count:]
            self._kept_logits = None

    def _append(self, block: Block, outputs: npt.NDArray[np.bool_]) -> Float32:
        start = sum(len(kept.rows) for kept in self._kept)
        count = len(block.rows)
        self._kept_logits = None
        try:
            logits = self.decode(block.rows, start + np.arange(count), np.full(count, _KEPT), outputs)
        except LLMError:
            self._llama.remove(_KEPT, start)  # a failed call may leave part of its rows behind
            raise
        self._kept.append(block)
        return logits
