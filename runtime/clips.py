"""Frames to compare two computations on, where no video is at hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["synthetic_clip"]


def synthetic_clip(count: int, size: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Frames uint8 `[count, size, size, 3]`: coarse random scenes of 5 frames each, with noise."""
    rng = np.random.default_rng(seed)
    cells = 7
    places = np.arange(size) * cells // size
    scenes = rng.integers(20, 236, (-(-count // 5), cells, cells, 3))[:, places][:, :, places]
    noise = rng.integers(-15, 16, (count, size, size, 3))
    return (scenes[np.arange(count) // 5] + noise).astype(np.uint8)
