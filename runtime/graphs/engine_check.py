"""A bundle's engines against its own ONNX files on the CPU, on the machine that runs them: graph by graph, then over a stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation.parity import GraphParity, Report, graph_difference
from keepsight.runtime.evaluation.trace import record
from keepsight.runtime.evaluation.trace_check import check_trace
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.graphs.device_bank import MEMORY, visual_bank
from keepsight.runtime.graphs.tap import Arrays, Tap
from keepsight.runtime.qformer import QFormer
from keepsight.streams import Frame

__all__ = ["check_engines"]


def check_engines(
    bundle: Bundle, engines: Engines, frames: Sequence[Frame], question: str, *, clip: str, backend: str
) -> Report:
    """Compare the bundle on another backend with the same graphs on ONNX Runtime's CPU provider.

    Args:
        engines: the bundle's graphs on that backend; closed when done.
        frames: of the size that the vision graph takes.
        question: standing, over the frames.
        clip, backend: their names, for the report.

    Raises:
        NoFrameError: no frames.
        EngineError: a graph that fails on either side.
    """
    taps = {name: Tap(engine) for name, engine in open_engines(bundle).items()}
    reference = QFormer(bundle, engines=Engines(taps))
    trace = record(reference, frames, question)
    reference.replay(reference.prompt(str(trace["text"])))
    if MEMORY in taps:
        _update_memory(bundle, taps[MEMORY], taps["visual_kv"], trace["features"])
    graphs = {name: _compare(bundle, engines, name, tap) for name, tap in taps.items()}
    reference.close()
    report = check_trace(bundle, trace, against=f"ONNX Runtime, {bundle.variant}", engines=engines)
    report.bundle, report.clip, report.graphs = f"{report.bundle} on {backend}", clip, graphs
    return report


def _compare(bundle: Bundle, engines: Engines, name: str, tap: Tap) -> GraphParity:
    feeds, wanted = _newest(tap)
    outputs = engines[name].run(feeds)
    precision = bundle.precision(name)
    return GraphParity({output: graph_difference(value, wanted[output], precision) for output, value in outputs.items()})


def _update_memory(bundle: Bundle, memory: Tap, visual_kv: Tap, features: NDArray[np.float32]) -> None:
    """Run the graph of a device's bank, which the CPU's does without, through its first merge.

    The last run merges what it is told to: where two pairs are as good as equal, a device may choose the other by itself.
    """
    bank = visual_bank(bundle.manifest.dims, (memory,))
    for index in range(bank.slots + 1):
        rows = features[index % len(features)]
        bank.append(rows, time_s=float(index), riders=visual_kv.run({"features": rows}))
    feeds, outputs = _newest(memory)
    memory.run({**feeds, "pair": outputs["merged"]})


def _newest(tap: Tap) -> tuple[Arrays, Arrays]:
    assert tap.newest is not None  # every graph runs once in a trace and a replay
    return tap.newest
