"""Times every run of every graph, by standing in front of the engines; what is not profiled has no such thing in its way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from time import perf_counter

import numpy as np

from keepsight.runtime.graphs.backends import Engines
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.graphs.engine import Array, Engine, Tensor, TensorSpec
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine
from keepsight.runtime.profiling.device_clock import DeviceClock

__all__ = ["DEVICE", "GraphTimes", "TimedEngine", "timed"]

DEVICE = "_device"
"""What a graph's name gets behind it where CUDA events timed it."""


class GraphTimes:
    """Milliseconds that graphs ran, since the last `take`, each run of one added to the others."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = defaultdict(float)

    def note(self, name: str, ms: float) -> None:
        self._ms[name] += ms

    def take(self) -> dict[str, float]:
        """By graph, and begin anew."""
        taken, self._ms = dict(self._ms), defaultdict(float)
        return taken


class TimedEngine:
    """An engine whose runs are timed: on the host, and on a device between CUDA events around its kernels."""

    def __init__(self, name: str, engine: Engine, times: GraphTimes) -> None:
        self.name, self.engine, self._times = name, engine, times
        self._clock: DeviceClock | None = None
        if isinstance(engine, TensorRTEngine):
            self._clock = engine.clock = DeviceClock(engine.stream)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.engine.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.engine.outputs

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See :meth:`Engine.run`."""
        began = perf_counter()
        results = self.engine.run(feeds)
        self._note(began)
        return results

    def enqueue(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See :meth:`Engine.enqueue`."""
        began = perf_counter()
        results = self.engine.enqueue(feeds)
        self._note(began)
        return results

    def place(self, name: str, value: np.ndarray) -> Tensor:
        """See :meth:`Engine.place`."""
        return self.engine.place(name, value)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        if self._clock is not None:
            self._clock.close()
        self.engine.close()

    def _note(self, began: float) -> None:
        self._times.note(self.name, 1000 * (perf_counter() - began))
        if self._clock is not None:
            self._times.note(self.name + DEVICE, self._clock.read_ms())


def timed(engines: Engines, times: GraphTimes) -> Engines:
    """The same engines, each behind a clock. Close what is returned; it closes them."""
    memory = [TimedEngine(MEMORY, engine, times) for engine in engines.memory]
    graphs = {
        name: memory[0] if memory and name == MEMORY else TimedEngine(name, engine, times) for name, engine in engines.items()
    }
    return Engines(graphs, engines.shared, memory=memory)
