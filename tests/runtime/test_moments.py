"""What users type for times: the most recent such time, seconds of a file, and one clear error for anything else."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from keepsight.runtime.moments import Calendar, TypedInterval, read_line, typed_interval
from keepsight.runtime.timeline import Clock, Interval
from keepsight.streams.errors import UsageError

BERLIN = ZoneInfo("Europe/Berlin")
BEGIN = datetime(2026, 11, 22, 14, 30, tzinfo=BERLIN)  # of the stream
NOW = datetime(2026, 11, 24, 14, 30, tzinfo=BERLIN)


def camera(now: datetime = NOW, begin: datetime = BEGIN) -> Calendar:
    clock = Clock()
    clock.observe(0.0, begin.timestamp())
    now_s = now.timestamp() - begin.timestamp()
    clock.observe(now_s, now.timestamp())
    return Calendar(clock, now_s, 0.25, BERLIN)


def file(now_s: float = 200.0) -> Calendar:
    return Calendar(Clock(), now_s, 0.25)


def local(calendar: Calendar, moment_s: float) -> str:
    return f"{datetime.fromtimestamp(calendar.clock.wall_s(moment_s), BERLIN):%d. %H:%M:%S}"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("14:05", "24. 14:05:00"),
        ("14:30", "24. 14:30:00"),
        ("14:31", "23. 14:31:00"),  # has not come yet today
        ("0:10", "24. 00:10:00"),
        ("14:05:30", "24. 14:05:30"),
        ("2026-11-23T09:15", "23. 09:15:00"),
        ("2026-11-23 09:15:10", "23. 09:15:10"),
        ("2026-11-23T09:15Z", "23. 10:15:00"),
        ("2026-11-23T09:15+03:00", "23. 07:15:00"),
    ],
)
def test_a_time_of_day_is_the_most_recent_one(typed: str, meant: str) -> None:
    calendar = camera()
    interval = calendar.interval(TypedInterval(at=typed))
    middle = (interval.start_s + interval.end_s) / 2
    assert local(calendar, middle) == meant
    assert interval.end_s - interval.start_s == pytest.approx(0.5)  # a sampling interval to each side


@pytest.mark.parametrize(
    ("now", "typed", "meant"),
    [
        (NOW, ("14:00", "14:05"), ("24. 14:00:00", "24. 14:05:00")),
        (NOW, ("14:20", "14:40"), ("24. 14:20:00", "24. 14:40:00")),  # has begun
        (NOW, ("15:00", "15:05"), ("23. 15:00:00", "23. 15:05:00")),
        (NOW, ("23:50", "0:10"), ("23. 23:50:00", "24. 00:10:00")),  # over midnight
        (NOW, ("2026-11-23T08:00", "09:00"), ("23. 08:00:00", "23. 09:00:00")),
        (NOW, ("2026-11-23T08:00", "2026-11-24T09:00"), ("23. 08:00:00", "24. 09:00:00")),
    ],
)
def test_between_begins_at_the_most_recent_start(now: datetime, typed: tuple[str, str], meant: tuple[str, str]) -> None:
    calendar = camera(now)
    interval = calendar.interval(TypedInterval(between=typed))
    assert (local(calendar, interval.start_s), local(calendar, interval.end_s)) == meant


@pytest.mark.parametrize(
    ("typed", "ago_s"),
    [("2h", 7200), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1d", 86400), ("0.5h", 1800), ("14:00", 1800)],
)
def test_since_is_up_to_now(typed: str, ago_s: float) -> None:
    calendar = camera()
    interval = calendar.interval(TypedInterval(since=typed))
    assert interval.start_s == pytest.approx(calendar.now_s - ago_s) and interval.end_s == math.inf


def test_an_hour_that_comes_twice_is_the_later_one_that_has_been() -> None:
    """Clocks are put back on 25 October 2026 at 03:00; nothing inside notices."""
    begin = datetime(2026, 10, 24, 20, 0, tzinfo=BERLIN)
    after = begin.astimezone(timezone.utc) + timedelta(hours=7)  # 02:00 for the second time
    calendar = camera(after + timedelta(minutes=20), begin)
    moment = calendar.interval(TypedInterval(at="2:10"))
    assert (moment.start_s + moment.end_s) / 2 == pytest.approx(7 * 3600 + 600)
    earlier = camera(after - timedelta(minutes=20), begin)
    moment = earlier.interval(TypedInterval(at="2:10"))
    assert (moment.start_s + moment.end_s) / 2 == pytest.approx(6 * 3600 + 600)


def test_a_moment_is_found_after_the_clock_has_jumped() -> None:
    clock = Clock()
    clock.observe(0.0, 30.0)  # 1970
    clock.observe(100.0, 130.0)
    clock.observe(101.0, NOW.timestamp())
    calendar = Calendar(clock, 101.0, 0.25, BERLIN)
    assert calendar.interval(TypedInterval(at="14:29")).holds(101.0 - 60)
    assert calendar.written(41.0) == "14:29:00"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (TypedInterval(at="95"), Interval(94.75, 95.25)),
        (TypedInterval(at="1:35"), Interval(94.75, 95.25)),
        (TypedInterval(at="0:01:35.5"), Interval(95.25, 95.75)),
        (TypedInterval(between=("60", "2:00")), Interval(60, 120)),
        (TypedInterval(between=("60", "1000")), Interval(60, 1000)),
        (TypedInterval(since="30s"), Interval(170, math.inf)),
        (TypedInterval(since="1m"), Interval(140, math.inf)),
        (TypedInterval(since="95"), Interval(95, math.inf)),
    ],
)
def test_times_of_a_file_are_its_own_seconds(typed: TypedInterval, meant: Interval) -> None:
    assert file().interval(typed) == meant


@pytest.mark.parametrize(
    ("calendar", "typed", "says"),
    [
        (file(), TypedInterval(at="soon"), "--at 'soon' is no time of a file"),
        (file(), TypedInterval(at=""), "--at '' is no time of a file"),
        (file(), TypedInterval(since=""), "--since '' is no time"),
        (file(), TypedInterval(at="2026-11-24T14:05"), "no wall time"),
        (file(), TypedInterval(at="1:75"), "more than 59"),
        (file(), TypedInterval(at="-3"), "no time of a file"),
        (file(), TypedInterval(at="300"), "seen to"),
        (file(), TypedInterval(between=("20", "10")), "ends before it starts"),
        (file(), TypedInterval(since="2x"), "or a length of time"),
        (camera(), TypedInterval(at="25:00"), "no time of a day"),
        (camera(), TypedInterval(at="95"), "--at '95' is no time"),
        (camera(), TypedInterval(at="2026-11-25T14:05"), "in the future"),
        (camera(), TypedInterval(at="2026-13-01T14:05"), "is no time"),
        (camera(), TypedInterval(between=("2026-11-24T14:05", "2026-11-24T14:00")), "ends before it starts"),
        (camera(), TypedInterval(since="yesterday"), "or a length of time"),
    ],
)
def test_anything_else_is_one_clear_error(calendar: Calendar, typed: TypedInterval, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        calendar.interval(typed)
    assert "\n" not in str(caught.value) and caught.value.fix


def test_two_options_exclude_each_other() -> None:
    assert typed_interval(None, None, None) is None
    with pytest.raises(UsageError, match="exclude"):
        typed_interval("2h", "14:05", None)


@pytest.mark.parametrize(
    ("line", "typed", "question"),
    [
        ("who came?", None, "who came?"),
        ("/since 2h who  came?", TypedInterval(since="2h"), "who came?"),
        ("/at 14:05 who came?", TypedInterval(at="14:05"), "who came?"),
        ("/BETWEEN 14:00 14:05 who came?", TypedInterval(between=("14:00", "14:05")), "who came?"),
        ("/recall 14:00 14:05 who came?", TypedInterval(between=("14:00", "14:05"), logged=True), "who came?"),
    ],
)
def test_a_typed_line_may_begin_with_an_interval(line: str, typed: TypedInterval | None, question: str) -> None:
    assert read_line(line) == (typed, question)


@pytest.mark.parametrize("line", ["/sine 2h who?", "/since", "/since 2h", "/between 14:00 14:05", "/recall 14:00 who?"])
def test_a_line_that_is_neither_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        read_line(line)


def test_times_are_written_for_people_and_for_programs() -> None:
    calendar = camera()
    day = 86400.0
    assert calendar.written(2 * day - 60) == "14:29:00" and calendar.written(0.0) == "2026-11-22 14:30:00"
    assert calendar.iso(0.0) == "2026-11-22T14:30:00.000+01:00"
    assert file().written(95.25) in ("1:35.2", "1:35.3") and file().iso(3.0) is None
    assert file().written(119.99) == "2:00.0"
    assert file().written_interval(Interval(60, math.inf)) == "1:00.0 to 3:20.0"
