from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepsight.streams import Sampler, UsageError


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200), st.floats(0.2, 30))
def test_the_first_frame_at_or_after_each_grid_point_is_taken(gaps: list[float], fps: float) -> None:
    times, now = [0.0], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    sampler = Sampler(fps)
    taken = [time_s for time_s in times if sampler.take(time_s)]
    # the slow reference: grid point by grid point, with the same allowance of 1 ms for rounded times
    wanted = {next((t for t in times if t + 0.001 >= k / fps), None) for k in range(math.ceil(now * fps) + 2)} - {None}
    near_a_grid_point = any(abs((t + 0.001) * fps - round((t + 0.001) * fps)) < 1e-6 for t in times)
    assert near_a_grid_point or taken == sorted(wanted)  # type: ignore[type-var]


RATES = [
    # frames/s of the stream, frames/s wanted, seconds, frames taken
    (30, 1, 60, 60),
    (30000 / 1001, 1, 3600, 3600),  # no drift in an hour
    (25, 2, 10, 20),
    (30, 30, 10, 300),  # the same rate: all
    (10, 30, 10, 100),  # a slower stream: all
    (30, 0.1, 60, 6),
]


@pytest.mark.parametrize(("rate", "fps", "seconds", "count"), RATES)
def test_a_rate_is_kept_without_drift(rate: float, fps: float, seconds: int, count: int) -> None:
    sampler = Sampler(fps)
    assert sum(sampler.take(index / rate) for index in range(round(rate * seconds))) == count


def test_times_rounded_to_milliseconds_are_still_on_the_grid() -> None:
    sampler = Sampler(3)
    assert [sampler.take(time_s) for time_s in (0.0, 0.333, 0.667, 1.0)] == [True] * 4


def test_after_a_gap_one_frame_is_taken_not_the_backlog() -> None:
    sampler = Sampler(1)
    assert [sampler.take(time_s) for time_s in (0.0, 10.2, 10.3, 10.9, 11.0)] == [True, True, False, False, True]


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_that_makes_no_sense_is_refused(fps: float) -> None:
    with pytest.raises(UsageError, match="sampling rate"):
        Sampler(fps)
