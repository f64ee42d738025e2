"""An engine that is listened in on: what it was fed last, and what it said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.graphs.engine import Engine, Tensor, TensorSpec

__all__ = ["Tap"]

Arrays = Mapping[str, npt.NDArray[Any]]


class Tap:
    """Another engine that keeps the feeds and outputs of its newest run. See :class:`~keepsight.runtime.graphs.engine.Engine`.

    Attributes:
        newest: both, on the host, in the graph's order; None before the first run.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.newest: tuple[Arrays, Arrays] | None = None

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._engine.outputs

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
        results = self._engine.run(feeds)
        self.newest = self._copied(feeds), results
        return results

    def enqueue(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        results = self._engine.enqueue(feeds)
        self.newest = self._copied(feeds), {name: np.array(value) for name, value in results.items()}
        return results

    def place(self, name: str, value: npt.NDArray[Any]) -> Tensor:
        return self._engine.place(name, value)

    def close(self) -> None:
        self._engine.close()

    def _copied(self, feeds: Mapping[str, Tensor]) -> Arrays:
        return {name: np.array(feeds[name]) for name in self._engine.inputs}
