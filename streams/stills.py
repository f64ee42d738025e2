"""Pictures that lie ready as a stream: shown one after the other at a rate, or as a camera would show them."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from keepsight.streams.capture import Picture

__all__ = ["StillSequence", "Stills"]


class Stills(Protocol):
    """A numbered set of pictures."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Picture | None:
        """Read picture `index`, whose `time_s` is not looked at; None once closed."""
        ...

    def close(self) -> None:
        """Give back what reading needs."""
        ...


class StillSequence:
    """Shows pictures one after the other, the k-th at `k / fps` seconds.

    Args:
        stills: the pictures, in order.
        fps: pictures per second.
        realtime: show each when its time has come; one whose successor is due too is dropped, and counted.
    """

    def __init__(self, stills: Stills, *, fps: float, realtime: bool) -> None:
        self._stills, self._fps, self._realtime = stills, fps, realtime
        self._position = 0
        self._started: float | None = None
        self._closed = threading.Event()
        self.dropped = 0

    def next(self) -> Picture | None:
        """The next picture, or None after the last one or when closed.

        Raises:
            SourceUnreadableError: there is no picture where one should be; it is named.
        """
        if self._realtime:
            self._keep_time()
        if self._closed.is_set() or self._position >= len(self._stills):
            return None
        index, time_s = self._position, self._position / self._fps
        self._position += 1
        picture = self._stills.picture(index)
        if picture is None:
            return None
        captured_at = picture.captured_at if self._started is None else self._started + time_s
        return Picture(picture.image, time_s, captured_at)

    def duration_s(self) -> float:
        """Seconds from the first picture to the end of the last."""
        return len(self._stills) / self._fps

    def close(self) -> None:
        self._closed.set()
        self._stills.close()

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = now
        due = min(int((now - self._started) * self._fps), len(self._stills) - 1)
        if due > self._position:
            self.dropped += due - self._position
            self._position = due
        self._closed.wait(max(0.0, self._started + self._position / self._fps - now))
