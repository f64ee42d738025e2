"""Memory for frames, laid out once and used again when nobody holds the picture any more."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FrameRing"]


class _Hold:
    """What an array over a slot is based on: it lives as long as the array or any view of it."""

    __slots__ = ("__array_interface__", "__weakref__")

    def __init__(self, slot: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3, "typestr": "|u1", "shape": shape, "data": (slot.ctypes.data, False), "strides": None,
        }  # fmt: skip


class FrameRing:
    """A bounded number of slots for pictures of one shape.

    A slot is used again when the array that was made of it and all views of that are gone, never before: who keeps a frame keeps
    its pixels. If all slots are held, a frame gets memory of its own; that is counted, and is no error.

    One thread takes; arrays may be let go in any thread. After a change of shape the slots are laid out anew.

    Args:
        slots: how many there are at most; they are laid out when they are first needed.

    Raises:
        UsageError: no slots.

    >>> ring = FrameRing(1)
    >>> first = ring.take((2, 2, 3)); row = first[0]; del first
    >>> second = ring.take((2, 2, 3))       # `row` still holds the only slot
    >>> ring.exhausted
    1
    """

    def __init__(self, slots: int = 8) -> None:
        if slots < 1:
            raise UsageError(f"a ring of {slots} slots holds nothing.", fix="Give it 1 or more.")
        self.slots = slots
        self.exhausted = 0
        self.taken = 0
        self._shape: tuple[int, ...] | None = None
        # Slots come back while the garbage collector runs, which may be in the middle of `take`: so there is no lock to wait for.
        # Appending to a deque and taking from it are each one step.
        self._free: deque[NDArray[np.uint8]] = deque()
        self._made = 0
        self._taking = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that are laid out."""
        return 0 if self._shape is None else self._made * int(np.prod(self._shape, dtype=np.int64))

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array uint8 of this shape, C-contiguous and writable. What is in it is left over from before."""
        with self._taking:
            self.taken += 1
            if shape != self._shape:
                self._shape, self._free, self._made = shape, deque(), 0
            try:
                slot = self._free.popleft()
            except IndexError:
                if self._made == self.slots:
                    self.exhausted += 1
                    return np.empty(shape, np.uint8)
                slot = np.empty(shape, np.uint8)
                self._made += 1
            hold = _Hold(slot, shape)
            # The call back keeps the slot's memory alive. It goes to the list of its own shape: after a change, to nobody's.
            weakref.finalize(hold, self._free.append, slot).atexit = False
            return np.asarray(hold)

    def __repr__(self) -> str:
        return f"FrameRing(slots={self.slots}, taken={self.taken}, exhausted={self.exhausted})"
