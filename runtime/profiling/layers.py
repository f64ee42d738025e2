"""Times of a TensorRT engine's layers, grouped by the block of the graph that they are of."""

from __future__ import annotations

from keepsight.runtime.profiling.load import Loaded
from keepsight.runtime.profiling.report import Layer

__all__ = ["layer_times"]


def layer_times(loaded: Loaded, address: str) -> list[Layer]:
    """Of each engine that a frame runs, on frames of the source; none where no engine is TensorRT's."""
    return []
