"""What is shown of a report, on a terminal and on a page: rows in order, words for the machine, layers by block."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES, Chain, Layer, Profile, Stage

__all__ = ["PATHS", "Block", "Row", "blocks", "figures", "makeup", "place", "rows", "throttled"]

_CHAINS: dict[Chain, tuple[str, tuple[str, ...]]] = {"frame": ("frame", FRAME_STAGES), "question": ("answer", QUESTION_STAGES)}


@dataclass(frozen=True)
class Row:
    """A stage with its place: `depth` 0 from end to end, 1 a link of the chain, 2 inside one, 3 another measure."""

    stage: Stage
    depth: int
    share: float | None


PATHS: tuple[tuple[Chain, str], ...] = (("frame", "a frame"), ("question", "a question"))
"""Both, with what to call one thing of theirs."""


def rows(profile: Profile, path: Chain) -> list[Row]:
    """A path's stages: the end-to-end time, the chain in order with what is inside, then other measures."""
    end, links = _CHAINS[path]
    own = [stage for stage in profile.stages if stage.path == path]
    whole = next((stage for stage in own if stage.name == end), None)
    total = sum(whole.samples) if whole is not None else 0.0
    found = [Row(whole, 0, None)] if whole is not None else []
    for name in links:
        for stage in own:
            if stage.name == name:
                same = whole is not None and len(stage.samples) == len(whole.samples) and total > 0
                found.append(Row(stage, 1, sum(stage.samples) / total if same else None))
        found += [Row(stage, 2, None) for stage in own if stage.inside == name and stage.name not in (end, *links)]
    shown = {id(row.stage) for row in found}
    return found + [Row(stage, 3, None) for stage in own if id(stage) not in shown]


def makeup(profile: Profile, path: Chain, percentile: float) -> list[tuple[str, float]]:
    """What the end-to-end time is made of at a percentile of it, milliseconds: stage by stage, adding up to it.

    Percentiles of stages don't add up to one of the whole: these are the means of each stage over the twentieth of the frames (or
    questions) that lie around the percentile. If stages have not one sample each for every frame, their own percentiles.
    """
    end, links = _CHAINS[path]
    stages = [stage for name in links if (stage := profile.stage(name, path)) is not None]
    whole = profile.stage(end, path)
    if whole is None or any(len(stage.samples) != len(whole.samples) for stage in stages):
        return [(stage.name, float(np.percentile(stage.samples, percentile))) for stage in stages]
    order = np.argsort(whole.samples, kind="stable")
    n = len(order)
    half = max(0, n // 40)
    middle = round((n - 1) * percentile / 100)
    near = order[max(0, middle - half) : middle + half + 1]
    return [(stage.name, float(np.mean(np.asarray(stage.samples)[near]))) for stage in stages]


@dataclass(frozen=True)
class Block:
    """Layers of one block of one engine, the slowest first."""

    engine: str
    name: str
    ms: float
    layers: tuple[Layer, ...]


def blocks(profile: Profile) -> list[Block]:
    """The layers by engine and block, in the order in which these come first."""
    found: dict[tuple[str, str], list[Layer]] = {}
    for layer in profile.layers:
        found.setdefault((layer.engine, layer.block), []).append(layer)
    return [
        Block(engine, name, sum(layer.ms for layer in layers), tuple(sorted(layers, key=lambda layer: -layer.ms)))
        for (engine, name), layers in found.items()
    ]


def throttled(profile: Profile) -> list[tuple[float, float, str]]:
    """When the machine was slowed down: start, end in seconds, and why. A span ends at the first moment that is free of it."""
    spans: list[tuple[float, float, str]] = []
    start, why = 0.0, ""
    for moment in profile.timeline:
        now = ", ".join(sorted(moment.throttled))
        if now != why:
            if why:
                spans.append((start, moment.t, why))
            start, why = moment.t, now
    if why:
        spans.append((start, profile.timeline[-1].t, why))
    return spans


def place(profile: Profile) -> list[tuple[str, str]]:
    """Where it was measured, in words: what is known of it."""
    machine = profile.machine
    locked = None if machine.clocks_locked is None else "locked" if machine.clocks_locked else "not locked"
    rows = (
        ("machine", machine.title),
        ("processor", f"{machine.processor}, {machine.cores} core{'' if machine.cores == 1 else 's'}"),
        ("GPU", machine.gpu),
        ("memory", f"{machine.memory / 1e9:.1f} GB"),
        ("system", machine.system),
        ("JetPack", " ".join(filter(None, (machine.jetpack, machine.l4t and f"(L4T {machine.l4t})"))) or None),
        ("power mode", machine.power_mode),
        ("clocks", locked),
    )
    return [(name, value) for name, value in rows if value]


def _work(profile: Profile, frame: Stage) -> float | None:
    """Milliseconds of a frame at the median without the time that its picture waits for the session; None if it hardly does.

    A file is read ahead, so that its end-to-end time says more of the queue between than of the work.
    """
    wait = profile.stage("wait")
    if wait is None or len(wait.samples) != len(frame.samples) or wait.statistics.p50 < frame.statistics.p50 / 10:
        return None
    return median(whole - waited for whole, waited in zip(frame.samples, wait.samples, strict=True))


def figures(profile: Profile) -> list[tuple[str, str]]:
    """The few numbers that one looks for first."""
    found = []
    if frame := profile.stage("frame"):
        work = _work(profile, frame)
        found.append(("a frame, median", f"{frame.statistics.p50:.4g} ms"))
        name, ms = ("a frame, p95", frame.statistics.p95) if work is None else ("of it no waiting", work)
        found.append((name, f"{ms:.4g} ms"))
    found.append(("throughput", f"{profile.fps:.3g} frames/s"))
    if first := profile.stage("time_to_first_token", "question"):
        found.append(("first token, median", f"{first.statistics.p50:.4g} ms"))
    if (token := profile.stage("token", "question")) and token.statistics.p50 > 0:
        found.append(("language model", f"{1000 / token.statistics.p50:.3g} tokens/s"))
    if profile.memory:
        most = max(profile.memory, key=lambda use: use.peak)
        found.append((f"memory, {most.component}, peak", f"{most.peak / 1e6:.4g} MB"))
    if profile.energy and profile.energy.per_frame is not None:
        found.append(("energy of a frame", f"{profile.energy.per_frame:.3g} J"))
    if profile.drops:
        found.append(("frames dropped", str(sum(profile.drops.values()))))
    return found
