"""One picture of a stream, with its time: the only thing that streams hand to the rest of Keepsight."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Frame", "wall_time_of"]


# eq=False: two frames are the same only if they are the same object; comparing their pixels would give an array.
@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture.

    Attributes:
        image: uint8 `[H, W, 3]`, RGB, C-contiguous, in memory of its own: keep it as long as you like.
        time_s: seconds since the stream's start, never less than the frame before. A file's is its presentation time;
            a live source's first frame is 0.
        captured_at: when it was captured, in seconds of `time.monotonic()`. For a live source: when it entered this
            machine. For a file played in real time: when it was due. For a file read as fast as possible: when it
            was decoded.
        index: how many frames this source had delivered before it.
        pts_ns: the presentation time that its buffer carried, in ns; what it counts from is up to the source.
        running_time_s: the same in seconds since its pipeline started: what sound and pictures of one pipeline share.
        wall_time: time.time() of the capture; None where nothing was captured (a file read as fast as possible, pictures).
        generation: how many earlier connections to the source had delivered frames. A `LiveSource` counts them up; between
            two generations frames are missing, for as long as their times say.
    """

    image: NDArray[np.uint8]
    time_s: float
    captured_at: float
    index: int
    pts_ns: int | None = None
    running_time_s: float | None = None
    wall_time: float | None = None
    generation: int = 0

    @property
    def age_ms(self) -> float:
        """Milliseconds since the capture, at this moment."""
        return (time.monotonic() - self.captured_at) * 1000

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Frame({width}x{height}, time_s={self.time_s:.3f}, index={self.index})"


def wall_time_of(captured_at: float) -> float:
    """What time.time() said at a moment of time.monotonic(), as the clock goes now."""
    return time.time() - (time.monotonic() - captured_at)
