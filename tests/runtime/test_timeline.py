"""Wall time that survives jumps, restarts and drift; intervals that hold exactly the slots that share a moment with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.memory import MemoryBank
from keepsight.runtime.positions import ranks, step_mask
from keepsight.runtime.timeline import Clock, Interval, remembered, seen_within
from keepsight.streams.errors import UsageError

NOON = 1_790_000_000.0
BOOT = 12.0  # a board without a battery: seconds after 1970


def run_of(clock: Clock, begin: float, end: float, offset: float, step: float = 0.25) -> None:
    for stream_s in np.arange(begin, end, step):
        clock.observe(float(stream_s), float(stream_s) + offset)


def test_a_file_has_no_wall_time() -> None:
    clock = Clock()
    assert not clock.dated and clock.wall_s(3.0) is None
    with pytest.raises(UsageError, match="wall time"):
        clock.stream_s(NOON)


def test_what_was_seen_before_the_clock_jumped_at_boot_is_dated_by_the_later_clock() -> None:
    clock = Clock()
    run_of(clock, 0, 300, BOOT)
    assert clock.wall_s(10.0) == pytest.approx(BOOT + 10)
    run_of(clock, 300, 600, NOON)
    assert clock.jumps == 1
    for moment in (0.0, 10.0, 299.75, 300.0, 599.0):
        assert clock.wall_s(moment) == pytest.approx(NOON + moment)
        assert clock.stream_s(NOON + moment) == pytest.approx(moment)


@pytest.mark.parametrize("by", [-3600.0, 2.5])
def test_a_clock_that_is_set_back_or_on_moves_all_it_dated(by: float) -> None:
    clock = Clock()
    run_of(clock, 0, 100, NOON)
    run_of(clock, 100, 200, NOON + by)
    assert clock.jumps == 1 and clock.wall_s(0.0) == pytest.approx(NOON + by)


def test_drift_is_followed_and_does_not_redate_the_past() -> None:
    """A camera whose clock is half a per cent slow, for four hours: a minute and more."""
    clock = Clock()
    for stream_s in np.arange(0, 4 * 3600, 5.0):
        clock.observe(float(stream_s), NOON + 1.005 * float(stream_s))
    assert clock.jumps == 0
    for moment in (0.0, 1000.0, 7777.0, 14000.0):
        assert clock.wall_s(moment) == pytest.approx(NOON + 1.005 * moment, abs=0.5)
        assert clock.stream_s(NOON + 1.005 * moment) == pytest.approx(moment, abs=0.5)


def test_a_clock_does_not_grow_with_the_stream_and_stays_right() -> None:
    clock = Clock()
    for minute in range(20_000):  # two weeks
        clock.observe(60.0 * minute, NOON + 60.006 * minute)
    assert len(clock.state()["anchors"]) <= Clock.ANCHORS
    for minute in (0, 5_000, 12_345, 19_999):
        assert clock.wall_s(60.0 * minute) == pytest.approx(NOON + 60.006 * minute, abs=1.0)


def test_a_restart_keeps_the_dates_of_the_run_before_whatever_its_clock_does() -> None:
    first = Clock()
    run_of(first, 0, 100, NOON)
    clock = Clock()
    clock.restore(first.state())
    assert clock.wall_s(50.0) == pytest.approx(NOON + 50)
    begin = clock.after_gap(BOOT)  # booted in 1970 again: the gap is not known
    assert begin == pytest.approx(99.75)
    run_of(clock, begin, begin + 50, BOOT - begin)
    run_of(clock, begin + 50, begin + 100, NOON + 7200 - begin)  # and the network tells the time
    assert clock.wall_s(50.0) == pytest.approx(NOON + 50)
    assert clock.wall_s(begin + 10) == pytest.approx(NOON + 7210)
    assert clock.stream_s(NOON + 50) == pytest.approx(50)
    assert clock.stream_s(NOON + 7210) == pytest.approx(begin + 10)


def test_a_gap_that_the_clock_knows_passes_in_the_stream() -> None:
    clock = Clock()
    run_of(clock, 0, 100, NOON)
    again = Clock()
    again.restore(clock.state())
    assert again.after_gap(NOON + 1000) == pytest.approx(1000)


def test_a_saved_clock_is_the_same_clock() -> None:
    clock = Clock()
    run_of(clock, 0, 1000, NOON)
    again = Clock()
    again.restore(clock.state())
    assert [again.wall_s(t) for t in (0.0, 123.0, 999.0)] == [clock.wall_s(t) for t in (0.0, 123.0, 999.0)]
    with pytest.raises(UsageError, match="not the state"):
        again.restore({"anchors": np.zeros((3, 2)), "settings": np.zeros(2)})


def test_stream_seconds_never_go_back() -> None:
    clock = Clock()
    clock.observe(5.0, NOON)
    with pytest.raises(UsageError, match="went back"):
        clock.observe(4.0, NOON)


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (math.nan, 1.0), (math.inf, math.inf), (0.0, math.nan)])
def test_an_interval_that_is_none_is_refused(start: float, end: float) -> None:
    with pytest.raises(UsageError):
        Interval(start, end)


def test_what_is_remembered_has_gaps_where_nothing_was_seen() -> None:
    bank = MemoryBank(length=9, tokens=2, channels=3)
    rng = np.random.default_rng(0)
    for time_s in (0.0, 0.5, 1.0, 60.0, 60.5):
        bank.append(rng.standard_normal((2, 3)), time_s=time_s)
    assert remembered(bank, 1.0) == [Interval(0.0, 1.0), Interval(60.0, 60.5)]


# -- masks never attend outside the interval -------------------------------------------------------------------------


def bank_of(seed: int, length: int, tokens: int, frames: int) -> MemoryBank:
    rng = np.random.default_rng(seed)
    bank = MemoryBank(length=length, tokens=tokens, channels=4, riders={})
    scenes = rng.standard_normal((4, tokens, 4))
    for time_s in np.cumsum(rng.uniform(0.1, 2.0, frames)):
        bank.append(scenes[rng.integers(4)] + 0.5 * rng.standard_normal((tokens, 4)), time_s=float(time_s))
    return bank


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000), length=st.integers(1, 6), tokens=st.integers(1, 5), frames=st.integers(1, 25),
    start=st.floats(-2, 40), width=st.floats(0, 30),
)  # fmt: skip
def test_the_rank_of_a_slot_outside_the_interval_is_never_visible(
    seed: int, length: int, tokens: int, frames: int, start: float, width: float
) -> None:
    bank, interval = bank_of(seed, length, tokens, frames), Interval(start, start + width)
    rank = ranks(bank, seen_within(bank, interval))
    for slot in range(bank.slots):
        for token in range(tokens):
            first, last = bank.first_s[0, slot, token], bank.last_s[0, slot, token]
            shares = bank.sizes[0, slot, token] > 0 and not (last < interval.start_s or first > interval.end_s)
            assert (rank[slot, token] >= 0) == shares
    for token in range(tokens):  # right-aligned and in the order of time
        shown = np.flatnonzero(rank[:, token] >= 0)
        by_time = shown[np.argsort(bank.first_s[0, shown, token])]
        assert rank[by_time, token].tolist() == list(range(bank.slots - len(shown), bank.slots))
    assert step_mask(rank)[-1] == (rank >= 0).any()
