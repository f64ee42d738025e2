"""The passes of a profile: the first frame and answer, then a source watched and questions asked, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from keepsight.runtime.profiling.load import Loaded
from keepsight.runtime.profiling.questions import WARM_UP, Put
from keepsight.runtime.profiling.report import Phase, Question
from keepsight.runtime.profiling.stages import Sample, frame_sample, question_sample
from keepsight.runtime.session import Standing
from keepsight.runtime.timeline import wall_time_of
from keepsight.streams import Source
from keepsight.streams.errors import UsageError
from keepsight.streams.timing import PipelineTiming

if TYPE_CHECKING:
    from keepsight.runtime.profiling.run import Measured

__all__ = ["ask_all", "stand_all", "start_cold", "watch"]

Asked = str | Standing


def start_cold(loaded: Loaded, address: str) -> list[Phase]:
    """The first frame, from opening the source until it is remembered, and the first answer; both are then forgotten.

    Raises:
        UsageError: there is no frame.
        KeepsightError: what the source raises.
    """
    session, began = loaded.session, perf_counter()
    with loaded.bundle.source(address) as source:
        frame = next(source, None)
        if frame is None:
            raise UsageError(f"{source!r} has no frame to profile.", fix="Give a source that has pictures.")
        session.see(frame)
    phases = [Phase(name="first frame", ms=1000 * (perf_counter() - began))]
    if loaded.llm is not None:
        began = perf_counter()
        session.ask(WARM_UP).result  # noqa: B018
        phases.append(Phase(name="first answer", ms=1000 * (perf_counter() - began)))
    session.forget()
    return phases


def stand_all(loaded: Loaded, questions: Sequence[Put]) -> list[Asked]:
    """What to ask with: standing questions are put to the empty memory now, the others when they are asked."""
    return [loaded.session.stand(put.text) if put.mode == "standing" else put.text for put in questions]


def watch(
    loaded: Loaded, address: str, into: Measured, run: int, warmup: int, count: int, step: Callable[[], None]
) -> int:
    """See frames, those of the warm-up first; returns the bytes of the slots that they lay in.

    Raises:
        UsageError: the source ended before a frame was counted.
        KeepsightError: what the source raises.
    """
    timing = PipelineTiming()
    with loaded.bundle.source(address, timing=timing) as source:
        into.live = source.is_live
        dropped = 0
        began = perf_counter()
        for index in range(warmup + count):
            if index == warmup:
                if run == 0 and warmup:
                    into.phases.append(Phase(name="warm-up", ms=1000 * (perf_counter() - began)))
                began, dropped = perf_counter(), source.dropped
            sample = _see_next(loaded, source, timing, run)
            if sample is None:
                break
            step()
            if index >= warmup:
                into.seen += 1
                into.frames += sample
        else:
            index = warmup + count
        if index <= warmup:
            raise UsageError(
                f"{source!r} ended after {index} frames, and {warmup} are to warm up.",
                fix="Give a longer source, or a smaller --warmup.",
            )
        into.frame_spans.append((began, perf_counter()))
        into.dropped += source.dropped - dropped
        into.unmatched += timing.unmatched
        return source.slot_bytes


def _see_next(loaded: Loaded, source: Source, timing: PipelineTiming, run: int) -> list[Sample] | None:
    """A frame's sample, none where a point of the pipeline missed it; None at the source's end."""
    asked = perf_counter()
    frame = next(source, None)
    if frame is None:
        return None
    got = perf_counter()
    age_ms = frame.age_ms if source.is_live else None
    cost = loaded.session.see(frame, wall_s=wall_time_of(frame.captured_at) if source.uri.is_camera else None)
    remembered = perf_counter()
    graphs = {} if loaded.times is None else loaded.times.take()
    times = timing.of(frame.pts_ns)
    if times is None and timing.attached:
        return []
    return [
        frame_sample(
            run, times=times, asked=asked, got=got, remembered=remembered, cost=cost, graphs=graphs, age_ms=age_ms,
        )
    ]  # fmt: skip


def ask_all(
    loaded: Loaded, questions: Sequence[Put], asked: Sequence[Asked], into: Measured, run: int, step: Callable[[], None]
) -> None:
    """Ask everything of what is remembered now. Without a language model nothing is asked."""
    if loaded.llm is None or not questions:
        return
    loaded.session.ask(WARM_UP).result  # noqa: B018
    began = perf_counter()
    for put, question in zip(questions, asked, strict=True):
        _ask(loaded, put, question, into, run)
        step()
    into.answer_spans.append((began, perf_counter()))


def _ask(loaded: Loaded, put: Put, question: Asked, into: Measured, run: int) -> None:
    assert loaded.llm is not None
    loaded.llm.perf()
    if loaded.times is not None:
        loaded.times.take()
    asked = perf_counter()
    stream = loaded.session.ask(question)
    answer = stream.result
    total_ms = 1000 * (perf_counter() - asked)
    written = stream.written
    graphs = {} if loaded.times is None else loaded.times.take()
    sample = question_sample(
        run, answer=answer, written=written, total_ms=total_ms, graphs=graphs, perf=loaded.llm.perf(), live=into.live
    )
    into.answers.append(sample)
    first = answer.trace.first_token_ms
    prefill = first - 1000 * written.first_token_s
    began = {"qformer": 0.0, "prefill": prefill, "first_token": prefill + answer.trace.prefill_ms, "tokens": first}
    into.questions.append(
        Question(
            text=put.text, answer=answer.text, mode=answer.mode, tokens=1 + len(sample.tokens),
            stages=tuple((name, start, sample.links[name]) for name, start in began.items()),
        )
    )  # fmt: skip
