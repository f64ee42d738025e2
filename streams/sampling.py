"""Which frames to keep when fewer are wanted than a stream has."""

from __future__ import annotations

import math

from keepsight.streams.errors import UsageError

__all__ = ["Sampler"]

# Containers round times: Matroska to 1 ms, so the frame of 1/3 s is stamped 0.333.
_ROUNDING_S = 0.001


class Sampler:
    """Takes the first frame at or after each `k / fps` seconds, k = 0, 1, 2...

    The grid is fixed, so errors do not add up: a 29.97 fps file sampled at 1 fps gives 3,600 frames an hour. A stream
    slower than `fps` is taken whole, and after a gap one frame is taken, not the whole backlog.

    Args:
        fps: frames per second to keep, more than 0.

    Raises:
        UsageError: `fps` is not a positive number.

    >>> sampler = Sampler(2)
    >>> [time_s for time_s in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) if sampler.take(time_s)]
    [0.0, 0.6, 1.0]
    """

    def __init__(self, fps: float) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise UsageError(f"a sampling rate of {fps} frames/s makes no sense.", fix="Give a number above 0.")
        self.fps = fps
        self._next = 0  # the grid point that waits for its frame

    def take(self, time_s: float) -> bool:
        """Say whether the frame of this moment is kept. Call it once per frame, in order."""
        reached = math.floor((time_s + _ROUNDING_S) * self.fps)
        if reached < self._next:
            return False
        self._next = reached + 1
        return True
