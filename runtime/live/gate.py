"""The gate in front of the memory: frames that show nothing (grey, green or black all over) are left out of it, and counted.

A decoder that waits for its next key frame gives one level of grey or green, a camera that reconnects a black picture.
MA-LMM's merging keeps what is unlike its neighbours, so each such frame would take a slot and hold it.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLACK_LEVEL", "FLAT_LEVELS", "Cause", "FrameGate"]

Cause = Literal["black", "uniform"]
"""Why a frame was left out: one level all over, dark (a lost signal) or any other (a decoder's grey or green)."""

FLAT_LEVELS = 2.0
"""Standard deviation, on 0..255, under which a channel is flat. A sensor's own noise in the dark is above it."""

BLACK_LEVEL = 32.0
"""Mean level, on 0..255, under which a flat frame is called black. Video's black is 16 where its range was taken for full."""

_STRIDE = 4  # every fourth row and column will do: flat is flat


class FrameGate:
    """Lets a frame into the memory unless it is flat, and counts the ones it left out.

    It looks at pixels alone and at one frame alone: no delay, and no frame of a scene that holds anything is lost. What it
    does not see: frames that are grey in part, and whatever has a picture in it, such as an infrared switch.

    Attributes:
        dropped: frames left out so far, by cause.
    """

    def __init__(self) -> None:
        self.dropped: Counter[Cause] = Counter()

    def admits(self, image: NDArray[np.uint8]) -> bool:
        """Whether a frame uint8 `[H, W, 3]` goes into the memory."""
        cause = flat(image)
        if cause is not None:
            self.dropped[cause] += 1
        return cause is None

    def __str__(self) -> str:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.dropped.items()))
        return f"{self.dropped.total()} frames left out of the memory{f' ({causes})' if causes else ''}"


def flat(image: NDArray[np.uint8]) -> Cause | None:
    """Why a frame uint8 `[H, W, 3]` shows nothing, None if it shows something."""
    seen = image[::_STRIDE, ::_STRIDE].reshape(-1, image.shape[-1])
    if (seen.std(axis=0) >= FLAT_LEVELS).any():
        return None
    return "black" if seen.mean() < BLACK_LEVEL else "uniform"
