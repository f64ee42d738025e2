"""Energy of a frame and of an answer: the board's own meter, integrated over the time that they took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from keepsight.runtime.profiling.report import Energy, Moment

__all__ = ["Span", "energy_of", "joules"]

Span = tuple[float, float]
"""From when to when, in seconds of the run's own clock."""


def joules(readings: Sequence[tuple[float, float]], span: Span) -> float:
    """The integral of power over a span: straight lines between readings, and the nearest one's power before and after them.

    Args:
        readings: (seconds, watts), in order; at least one.
        span: from when to when.
    """
    start, end = span
    first, last = readings[0], readings[-1]
    line = [(min(start, first[0]), first[1]), *readings, (max(end, last[0]), last[1])]
    return sum(_trapezoid(before, after, start, end) for before, after in pairwise(line))


def _trapezoid(before: tuple[float, float], after: tuple[float, float], start: float, end: float) -> float:
    (t0, w0), (t1, w1) = before, after
    a, b = max(t0, start), min(t1, end)
    if b <= a or t1 == t0:
        return 0.0
    slope = (w1 - w0) / (t1 - t0)
    return (b - a) * (w0 + slope * ((a + b) / 2 - t0))


def energy_of(
    moments: Sequence[Moment],
    idle_watts: float | None,
    *,
    meter: str,
    frames: int,
    frame_spans: Sequence[Span],
    answers: int,
    answer_spans: Sequence[Span],
) -> Energy | None:
    """Joules a frame and an answer; None without a meter.

    Args:
        moments: the timeline, with the whole board's watts.
        idle_watts: the mean before anything was loaded.
        meter: what it is called.
        frames, answers: how many of them the spans cover, warm-up included if the spans include it.
        frame_spans, answer_spans: when frames were watched, and when questions were answered.
    """
    readings = [(moment.t, moment.watts) for moment in moments if moment.watts is not None]
    if not readings or idle_watts is None:
        return None
    whole = [_each(readings, spans, count) for spans, count in ((frame_spans, frames), (answer_spans, answers))]
    above = [(t, watts - idle_watts) for t, watts in readings]
    marginal = [_each(above, spans, count) for spans, count in ((frame_spans, frames), (answer_spans, answers))]
    return Energy(
        meter=meter, idle_watts=idle_watts, per_frame=whole[0], per_answer=whole[1], marginal_per_frame=marginal[0],
        marginal_per_answer=marginal[1],
    )  # fmt: skip


def _each(readings: Sequence[tuple[float, float]], spans: Sequence[Span], count: int) -> float | None:
    return sum(joules(readings, span) for span in spans) / count if count else None
