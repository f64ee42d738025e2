"""A bundle on this machine against a golden trace: a board against a PC, TensorRT against ONNX Runtime.

Two runs over the trace's own features: with its merges forced on both banks, where every soft prompt must agree, and left
alone, which shows how far decisions drift. The vision graph is compared where the trace's source is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation.parity import PROMPT_LIMITS, Drift, GraphParity, Report, difference, graph_difference, marks
from keepsight.runtime.graphs.backends import Engines
from keepsight.runtime.qformer import QFormer, StandingQuestion
from keepsight.streams import Frame
from keepsight.streams.errors import UsageError

__all__ = ["check_trace", "read_trace"]

_NAMES = {"times", "features", "query_output", "soft_prompt", "visual_merge", "query_merge", "text"}
Arrays = Mapping[str, NDArray[Any]]


def read_trace(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a golden trace.

    Raises:
        UsageError: no such file, or one that `keepsight trace` has not written.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable trace ({error}).", fix="Write one with `keepsight trace`.") from error
    absent = sorted(_NAMES - arrays.keys())
    if absent:
        raise UsageError(f"{path} has no {', '.join(absent)}.", fix="Write it again with this version of `keepsight trace`.")
    return arrays


def check_trace(
    bundle: Bundle,
    trace: Arrays,
    frames: Iterable[Frame] | None = None,
    *,
    against: str,
    engines: Engines | None = None,
) -> Report:
    """Compare a bundle with a trace.

    Args:
        trace: from :func:`read_trace`.
        frames: those that the trace was made of, for the vision graph.
        against: the trace's name, for the report.
        engines: the bundle's graphs on another backend than the CPU; closed when done.

    Raises:
        UsageError: the trace is of a bundle of other dimensions, or has another number of frames.
    """
    dims, count = bundle.manifest.dims, len(trace["times"])
    shapes = trace["features"].shape[1:], trace["soft_prompt"].shape[1:]
    if shapes != ((dims.tokens, dims.channels), (dims.queries, dims.n_embd)):
        raise UsageError(
            f"{against} is of features {list(shapes[0])} and soft prompts {list(shapes[1])}, not of {bundle.manifest.name}.",
            fix="Give the bundle that it was made with.",
        )
    limit = PROMPT_LIMITS[bundle.precision("step")]
    report = Report(bundle.manifest.name, against, f"{count} frames of the trace")
    qformer = QFormer(bundle, engines=engines)
    if frames is not None:
        report.graphs["vision"] = _vision(qformer, trace, frames)
    forced, _ = _run(qformer, trace, forced=True)
    free, merges = _run(qformer, trace, forced=False)
    for mark in marks(dims.memory_length, count):
        wanted = trace["soft_prompt"][:mark]
        report.drift.append(
            Drift(mark, difference(forced[:mark], wanted, limit), difference(free[:mark], wanted, limit))
        )
    for name, values in merges.items():
        real = trace[f"{name}_merge"][: len(values)] >= 0
        if real.any():
            report.merges[name] = float((values == trace[f"{name}_merge"][: len(values)])[real].mean())
    qformer.close()
    return report


def _vision(qformer: QFormer, trace: Arrays, frames: Iterable[Frame]) -> GraphParity:
    features = np.stack([np.asarray(qformer.encode(frame.image[None])[0]) for frame in frames])
    if len(features) != len(trace["features"]):
        raise UsageError(f"the source has {len(features)} frames, the trace {len(trace['features'])}.", fix="Give its source.")
    precision = qformer.bundle.precision("vision")
    return GraphParity({"features": graph_difference(features, trace["features"], precision)})


def _run(qformer: QFormer, trace: Arrays, *, forced: bool) -> tuple[NDArray[np.float32], dict[str, NDArray[np.int32]]]:
    """Soft prompts `[T, Q, n_embd]` over the trace's features, and what both banks merged after each frame but the last."""
    qformer.bank.reset()
    standing = qformer.stand(qformer.prompt(str(trace["text"])))
    rows, visual, query = [], [], []
    for index, (features, time_s) in enumerate(zip(trace["features"], trace["times"], strict=True)):
        if forced and index:
            _settle(qformer, standing, trace["visual_merge"][index - 1], trace["query_merge"][index - 1])
        qformer.remember(features, float(time_s))
        standing.step(float(time_s))
        rows.append(standing.answer().rows)
        if index:
            visual.append(qformer.bank.last_merge[0].copy())
            query.append(standing.bank.last_merge.copy())
    return np.stack(rows), {"visual": np.array(visual), "query": np.array(query)}


def _settle(qformer: QFormer, standing: StandingQuestion, visual: NDArray[np.int32], query: NDArray[np.int32]) -> None:
    """Make both banks merge what the trace's did, if they did."""
    if visual[0] >= 0:
        qformer.bank.settle(visual[None])
    if query[0, 0] >= 0:
        standing.bank.settle(query)
