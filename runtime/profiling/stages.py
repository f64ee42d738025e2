"""From moments to stages: what a frame and an answer went through, link by link, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keepsight.runtime.answer import Answer, FrameCost
from keepsight.runtime.language.llm import Answer as Written
from keepsight.runtime.language.llm import Perf
from keepsight.runtime.profiling.graphs import DEVICE
from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES, Chain, Stage, Statistics
from keepsight.streams.timing import PictureTimes

__all__ = ["Sample", "frame_sample", "question_sample", "stages_of"]

# Graphs that do not run where their name says; `vision` and `step` are stages by themselves.
_INSIDE = {"visual_kv": "memory", "memory": "memory", "prompt": "qformer", "answer": "qformer", "replay": "qformer"}
_OWN_STAGE = ("vision", "step")
_SHOWN = {"answer": "answer_graph", "memory": "memory_graph"}  # those names are taken: by a whole, and by a link


@dataclass(frozen=True)
class Sample:
    """One frame's or question's milliseconds.

    Attributes:
        run: which of the repeated runs it is of, from 0.
        whole: from end to end.
        links: of the chain, without `other`.
        parts: what is inside a link, by name, with that link's name.
        beside: other times, such as the age of a frame.
        tokens: each token after the first.
    """

    run: int
    whole: float
    links: Mapping[str, float]
    parts: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[float, ...] = ()

    @property
    def other(self) -> float:
        return self.whole - sum(self.links.values())


def frame_sample(
    run: int,
    *,
    times: PictureTimes | None,
    asked: float,
    got: float,
    remembered: float,
    cost: FrameCost,
    graphs: Mapping[str, float],
    age_ms: float | None = None,
) -> Sample:
    """A frame's way, from the decoder's input to remembered.

    Args:
        times: in the pipeline; None for pictures that lay ready, which are read and scaled in one go: that counts as `decode`.
        asked, got, remembered: when the frame was asked for, when it came, and when the session was through with it, in seconds
            of `time.perf_counter()`.
        cost: what the session says.
        graphs: milliseconds by graph.
        age_ms: of a live frame when it came.
    """
    if times is None:
        entered, links = asked, {"decode": 1000 * (got - asked)}
    else:
        entered = times.entered
        links = {"decode": times.decode_ms, "scale": times.scale_ms, "copy": times.copy_ms, "wait": times.wait_ms}
    links |= {"vision": cost.vision_ms, "memory": cost.memory_ms, "step": cost.step_ms}
    parts = _parts(graphs)
    if "visual_kv" in graphs:
        parts["bank"] = ("memory", cost.memory_ms - graphs["visual_kv"])
    beside = {} if age_ms is None else {"capture_age": age_ms}
    return Sample(run, 1000 * (remembered - entered), links, parts, beside)


def question_sample(
    run: int, *, answer: Answer, written: Written, total_ms: float, graphs: Mapping[str, float], perf: Perf, live: bool = False
) -> Sample:
    """An answer's way, from the question to its last word.

    A beam search knows no token before its end: all of it is `first_token`. Only of a `live` source is a frame's age one.
    """
    trace, drawn = answer.trace, written.token_s
    first_s = drawn[0] if drawn else written.first_token_s - written.prefill_s
    links = {
        "qformer": trace.qformer_ms,
        "prefill": trace.prefill_ms,
        "first_token": 1000 * first_s,
        "tokens": 1000 * sum(drawn[1:]),
    }
    parts = _parts(graphs)
    parts["llama_prefill"] = ("prefill", perf.prompt_ms)
    parts["llama_tokens"] = ("tokens", perf.token_ms)
    beside = {"time_to_first_token": trace.first_token_ms}
    if live:
        beside["capture_age"] = trace.capture_age_ms
    return Sample(run, total_ms, links, parts, beside, tuple(1000 * seconds for seconds in drawn[1:]))


def stages_of(samples: Sequence[Sample], path: Chain) -> list[Stage]:
    """The stages of a path, in the order of its chain, end to end first. What not every sample has is 0 where it is missing."""
    if not samples:
        return []
    chain, whole = (FRAME_STAGES, "frame") if path == "frame" else (QUESTION_STAGES, "answer")
    stages = [_stage(whole, path, [sample.whole for sample in samples])]
    ran = {name for sample in samples for name in sample.links}
    for name in chain:
        if name == "other":
            stages.append(_stage(name, path, [sample.other for sample in samples]))
        elif name in ran:
            stages.append(_stage(name, path, [sample.links.get(name, 0.0) for sample in samples]))
    for name in _ordered(sample.beside for sample in samples):
        stages.append(_stage(name, path, [sample.beside[name] for sample in samples]))
    tokens = [ms for sample in samples for ms in sample.tokens]
    if tokens:
        stages.append(_stage("token", path, tokens))
    inside = {name: link for sample in samples for name, (link, _) in sample.parts.items()}
    for name in _ordered(sample.parts for sample in samples):
        values = [sample.parts[name][1] if name in sample.parts else 0.0 for sample in samples]
        stages.append(_stage(name, path, values, inside[name]))
    return stages


def _parts(graphs: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """Graphs as parts of the stage that they run in; one that is all of its stage is told only where a device timed it."""
    parts = {}
    for name, ms in graphs.items():
        graph = name.removesuffix(DEVICE)
        if name != graph or graph not in _OWN_STAGE:
            shown = _SHOWN.get(graph, graph) + name.removeprefix(graph)
            parts[shown] = (_INSIDE.get(graph, graph), ms)
    return parts


def _ordered(groups: object) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))  # type: ignore[attr-defined]


def _stage(name: str, path: Chain, samples: list[float], inside: str | None = None) -> Stage:
    return Stage(
        name=name, path=path, inside=inside, clock="device" if name.endswith(DEVICE) else "host", samples=tuple(samples),
        statistics=Statistics.of(samples),
    )  # fmt: skip
