"""Work that may never come back, done where nobody has to wait for it: a driver can block in opening or closing a camera."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Errand"]

T = TypeVar("T")


class Errand(Generic[T]):
    """A piece of work on a thread of its own.

    Args:
        work: what to do.
        discard: what to do with its result if nobody waits for it any more.

    >>> Errand(lambda: 6 * 7).result(5.0)
    42
    """

    def __init__(self, work: Callable[[], T], discard: Callable[[T], None] = lambda result: None) -> None:
        self._work, self._discard = work, discard
        self._lock, self._done = threading.Lock(), threading.Event()
        self._value: tuple[T] | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        threading.Thread(target=self._run, name="keepsight-errand", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is done within so many seconds."""
        return self._done.wait(timeout_s)

    def result(self, timeout_s: float) -> T:
        """What the work returned, or raises what it raised.

        Raises:
            TimeoutError: it is not done in time; its result will be discarded.
        """
        if not self.wait(timeout_s) and self.abandon():
            raise TimeoutError(f"not done within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value[0]

    def abandon(self) -> bool:
        """Stop waiting; False if it is done after all."""
        with self._lock:
            self._abandoned = not self._done.is_set()
            return self._abandoned

    def _run(self) -> None:
        try:
            self._value = (self._work(),)
        except BaseException as error:
            self._error = error
        with self._lock:
            self._done.set()
            late = self._abandoned
        if late and self._value is not None:
            self._discard(self._value[0])
