"""Energy: the integral of the meter's readings, against a sum over thousands of narrow slices."""

from __future__ import annotations

import numpy as np
import pytest

from keepsight.runtime.profiling.energy import energy_of, joules
from keepsight.runtime.profiling.report import Moment

READINGS = [(0.0, 5.0), (0.5, 7.0), (1.2, 20.0), (1.7, 18.0), (3.0, 6.0)]


def sliced(readings: list[tuple[float, float]], start: float, end: float, slices: int = 200_000) -> float:
    """The plain sum: power in the middle of each slice, by numpy's own interpolation, which holds the ends."""
    edges = np.linspace(start, end, slices + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    times, watts = zip(*readings, strict=True)
    return float(np.interp(middles, times, watts).sum() * (end - start) / slices)


@pytest.mark.parametrize("span", [(0.0, 3.0), (0.2, 0.3), (0.4, 1.9), (-1.0, 0.7), (2.5, 4.5), (-2.0, 5.0), (3.5, 4.0)])
def test_it_is_the_plain_sum(span: tuple[float, float]) -> None:
    assert joules(READINGS, span) == pytest.approx(sliced(READINGS, *span), rel=1e-6)


def test_one_reading_is_held_and_an_empty_span_is_nothing() -> None:
    assert joules([(1.0, 4.0)], (0.0, 2.0)) == pytest.approx(8.0)
    assert joules(READINGS, (1.0, 1.0)) == 0


def moments(watts: float | None = None) -> list[Moment]:
    return [Moment(t=t, resident=1, watts=found if watts is None else watts) for t, found in READINGS]


def test_a_frame_has_its_share_of_the_spans_and_less_what_idling_takes() -> None:
    found = energy_of(
        moments(), 4.0, meter="VDD_IN", frames=10, frame_spans=[(0.0, 1.0), (1.5, 2.0)], answers=2, answer_spans=[(2.0, 3.0)]
    )
    assert found is not None and found.meter == "VDD_IN" and found.idle_watts == 4.0
    whole = sliced(READINGS, 0.0, 1.0) + sliced(READINGS, 1.5, 2.0)
    assert found.per_frame == pytest.approx(whole / 10, rel=1e-6)
    assert found.marginal_per_frame == pytest.approx((whole - 4.0 * 1.5) / 10, rel=1e-6)
    assert found.per_answer == pytest.approx(sliced(READINGS, 2.0, 3.0) / 2, rel=1e-6)
    assert found.marginal_per_answer == pytest.approx((sliced(READINGS, 2.0, 3.0) - 4.0) / 2, rel=1e-6)


def test_without_answers_there_is_none_for_them_and_without_a_meter_there_is_nothing() -> None:
    found = energy_of(moments(10.0), 4.0, meter="m", frames=2, frame_spans=[(0.0, 1.0)], answers=0, answer_spans=[])
    assert found is not None and found.per_frame == pytest.approx(5.0)
    assert found.per_answer is None and found.marginal_per_answer is None
    silent = [Moment(t=0.0, resident=1)]
    for readings, idle in ((silent, 4.0), (moments(), None)):
        assert energy_of(readings, idle, meter="", frames=2, frame_spans=[(0.0, 1.0)], answers=0, answer_spans=[]) is None
