"""What TensorRT says of an engine's layers: how long each took, by its profiler, and where in the graph each comes from."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine

__all__ = ["LayerTimes", "layer_origins", "layers_timed"]

LayerTimes = dict[str, list[float]]
"""Milliseconds by layer, one for each time that it ran."""


def layer_origins(graph: TensorRTEngine) -> dict[str, str]:
    """What the engine inspector says of where each layer comes from: its metadata, which names the ONNX nodes, or its own name.

    Engines have metadata only if they were built for detailed profiling; names alone mostly are those of the nodes, too.
    """
    return {name: metadata or name for name, metadata in map(_named, _information(graph)["Layers"])}


def _information(graph: TensorRTEngine) -> Any:
    engine, trt = graph.plan.engine, graph.plan.trt
    inspector = engine.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _named(layer: Any) -> tuple[str, str]:
    """A layer is its name alone, unless the engine holds more."""
    return (str(layer["Name"]), str(layer.get("Metadata", ""))) if isinstance(layer, dict) else (str(layer), "")


@contextmanager
def layers_timed(graph: TensorRTEngine) -> Iterator[LayerTimes]:
    """Time every layer of every run meanwhile. Runs wait for each layer, and none is launched as a CUDA graph: only the times of
    layers mean anything, not those of runs.
    """
    times: LayerTimes = defaultdict(list)
    with graph.profiled(_recorder(graph.plan.trt, times)):
        yield times


def _recorder(trt: Any, times: LayerTimes) -> Any:
    class Recorder(trt.IProfiler):  # type: ignore[misc]  # the module is known only now
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(ms)

    return Recorder()
