"""Frames that a program makes itself: pushed in from one thread, read like any source's from another."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.capture import Timeouts
from keepsight.streams.errors import UsageError
from keepsight.streams.frame import Frame, wall_time_of
from keepsight.streams.scale import PictureScaler
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import Aspect, Scaler, View

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PushSource"]


class PushSource(Iterator[Frame]):
    """A source that is fed: by a camera's own SDK, a simulator, a test.

    Any thread may push, end or close; one thread reads. At most `capacity` pictures wait.

    Args:
        name: what it is called in messages and in snapshots of a memory.
        size, aspect, scaler: of the frames that are read, as of `Source`; they are scaled when they are read.
        capacity: pictures that wait at most.
        newest: whether a picture that finds no room takes the place of the oldest one, which is counted; otherwise `push` waits
            for the reader.

    Raises:
        UsageError: a size, a scaler or a capacity that makes no sense.

    >>> source = PushSource(size=(4, 2))
    >>> source.push(np.zeros((2, 4, 3), np.uint8), time_s=1.5)
    True
    >>> source.end()
    >>> [(frame.time_s, frame.image.shape) for frame in source]
    [(1.5, (2, 4, 3))]
    """

    def __init__(
        self,
        name: str = "pushed",
        *,
        size: tuple[int, int] | None = None,
        aspect: Aspect = "stretch",
        scaler: Scaler = "bilinear",
        capacity: int = 4,
        newest: bool = False,
    ) -> None:
        if capacity < 1:
            raise UsageError(f"a capacity of {capacity} pictures makes no sense.", fix="Give it 1 or more.")
        self.uri = SourceURI("appsrc", name, redacted=f"appsrc://{name}")
        self._scaler = PictureScaler(View(size, aspect, scaler), Timeouts())
        self._capacity, self._newest = capacity, newest
        self._changed = threading.Condition()
        self._waiting: deque[tuple[NDArray[np.uint8], float | None, float]] = deque()
        self._ended = self._closed = False
        self._replaced = self._delivered = 0
        self._pushed_s: float | None = None  # time of the newest picture pushed
        self._epoch_s: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether pictures that nobody reads are replaced."""
        return self._newest

    @property
    def drops(self) -> Counter[str]:
        """Pictures that were pushed and not handed over, by cause."""
        return Counter({"replaced": self._replaced})

    @property
    def dropped(self) -> int:
        """The sum of `drops`."""
        return self._replaced

    @property
    def duration_s(self) -> None:
        """Not known."""

    def push(
        self,
        image: NDArray[np.uint8],
        *,
        time_s: float | None = None,
        captured_at: float | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Give a picture; it is copied.

        Args:
            image: uint8 `[H, W, 3]`, RGB, of any size; the size may change.
            time_s: seconds since the stream's start; by default, since the capture of the first one. It can't go back.
            captured_at: when it was captured, of `time.monotonic()`; now by default.
            timeout_s: seconds to wait for room; None waits as long as it takes.

        Returns:
            False if it was not taken: there was no room in time, or the source was closed.

        Raises:
            UsageError: no picture, a time before the one before, or one after `end`.
        """
        picture = _checked(image).copy()
        captured_at = time.monotonic() if captured_at is None else captured_at
        with self._changed:
            if self._ended and not self._closed:
                raise UsageError(f"{self.uri} has ended, and takes no more pictures.", fix="Push before end().")
            if time_s is not None and self._pushed_s is not None and time_s < self._pushed_s:
                raise UsageError(f"a picture of {time_s:g} s came after one of {self._pushed_s:g} s.", fix="Push them in order.")
            if self._newest:
                while len(self._waiting) >= self._capacity:
                    self._waiting.popleft()
                    self._replaced += 1
            elif not self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._capacity, timeout_s):
                return False
            if self._closed:
                return False
            self._pushed_s = self._pushed_s if time_s is None else time_s
            self._waiting.append((picture, time_s, captured_at))
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """No more pictures will come: what waits is still read, then the iteration ends."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __next__(self) -> Frame:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended or self._closed)
            if self._closed or not self._waiting:
                raise StopIteration
            stored, time_s, captured_at = self._waiting.popleft()
            self._changed.notify_all()
        image = self._scaler.scale(stored)
        if image is None:
            raise StopIteration
        if self._epoch_s is None:
            self._epoch_s = captured_at
        time_s = max(0.0, captured_at - self._epoch_s) if time_s is None else time_s
        index, self._delivered = self._delivered, self._delivered + 1
        return Frame(image, time_s, captured_at, index, wall_time=wall_time_of(captured_at))

    def close(self) -> None:
        """Stop: whoever waits to push or to read goes on. Closing twice does nothing."""
        with self._changed:
            self._closed = self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
        self._scaler.close()

    def __enter__(self) -> PushSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PushSource({self.uri.location!r})"


def _checked(image: Any) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f"what was pushed is {found}, not a picture.", fix="Push uint8 [H, W, 3], RGB.")
    return image
