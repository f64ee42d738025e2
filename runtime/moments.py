"""What a user types for a moment or an interval (`14:05`, `1:35`, `2h`, an ISO date), and how moments are written for a user.

A stream from a camera has wall time, and what is typed is local time:

====================== ===========================================================================================
`14:05`, `14:05:30`     the most recent such time before now (today's, or yesterday's)
`2026-11-24T14:05`      that moment; local time, unless it ends in `Z` or `+01:00`
`2h`, `1h30m`, `90s`    with `--since`: so long before now (`d`, `h`, `m`, `s`)
====================== ===========================================================================================

A file has none. Its times are its own seconds: `95`, `1:35`, `1:02:35`, and `30s` with `--since` are the last 30.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta, timezone, tzinfo
from typing import Any

from keepsight.runtime.timeline import Clock, Interval
from keepsight.streams.errors import UsageError

__all__ = ["Calendar", "TypedInterval", "read_line", "typed_interval"]

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.IGNORECASE)
_UNITS_S = (86400.0, 3600.0, 60.0, 1.0)
_TIME_OF_DAY = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?")
_FILE_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")
_DATED = "Give a time as 14:05, 14:05:30 or 2026-11-24T14:05"
_SECONDS = "Give seconds of the file, as 95 or 1:35"
_WORDS = {"/since": 1, "/at": 1, "/between": 2, "/recall": 2}
_EXAMPLES = {"/since": "2h", "/at": "14:05", "/between": "14:00 14:05", "/recall": "14:00 14:05"}


@dataclass(frozen=True)
class TypedInterval:
    """An interval as it was typed; exactly one of the three is given. With `logged` the feature log is asked, not the memory."""

    since: str | None = None
    at: str | None = None
    between: tuple[str, str] | None = None
    logged: bool = False


def typed_interval(since: str | None, at: str | None, between: tuple[str, str] | None) -> TypedInterval | None:
    """What was typed, or None if nothing was.

    Raises:
        UsageError: more than one of them.
    """
    given = [value for value in (since, at, between) if value is not None]
    if len(given) > 1:
        raise UsageError("--since, --at and --between exclude each other.", fix="Give one of them.")
    return TypedInterval(since, at, between) if given else None


def read_line(line: str) -> tuple[TypedInterval | None, str]:
    """An interval and the question, of a typed line such as `/since 2h who came?` or `/between 14:00 14:05 who came?`.

    `/recall 14:00 14:05 who came?` means the same interval of the feature log.

    Raises:
        UsageError: another word after the slash, or too few after that.
    """
    words = line.split()
    if not words or not words[0].startswith("/"):
        return None, line.strip()
    name = words[0].lower()
    if name not in _WORDS:
        raise UsageError(f"{words[0]} is no command.", fix="There are /since 2h, /at 14:05, /between 14:00 14:05 and /recall.")
    times = words[1 : 1 + _WORDS[name]]
    question = " ".join(words[1 + len(times) :])
    if len(times) < _WORDS[name] or not question:
        raise UsageError(f"{line.strip()!r} has no question.", fix=f"Type {name} {_EXAMPLES[name]} and then the question.")
    if _WORDS[name] == 2:
        return TypedInterval(between=(times[0], times[1]), logged=name == "/recall"), question
    return (TypedInterval(since=times[0]) if name == "/since" else TypedInterval(at=times[0])), question


@dataclass(frozen=True)
class Calendar:
    """Reads and writes moments of one stream.

    Attributes:
        clock: the stream's; one that knows no wall time is a file's.
        now_s: now, in seconds of the stream: for a file its newest frame.
        tolerance_s: how far a moment may lie from the nearest frame: the sampling interval.
        zone: of local time; None = this machine's.
    """

    clock: Clock
    now_s: float
    tolerance_s: float
    zone: tzinfo | None = None

    # -- reading -----------------------------------------------------------------------------------------------------

    def interval(self, typed: TypedInterval) -> Interval:
        """The interval that was meant. A moment (`--at`) is an interval of one sampling interval to each side.

        Raises:
            UsageError: what was typed is no time, ends before it starts, or begins in the future.
        """
        if typed.since is not None:
            start_s = self._since("--since", typed.since)
            return Interval(self._past("--since", typed.since, start_s), math.inf)
        if typed.at is not None:
            moment_s = self._past("--at", typed.at, self._moment("--at", typed.at))
            return Interval(moment_s - self.tolerance_s, moment_s + self.tolerance_s)
        assert typed.between is not None
        return self._between(*typed.between)

    def _since(self, option: str, text: str) -> float:
        duration = _DURATION.fullmatch(text.strip())
        if text.strip() and duration is not None:
            amounts = (float(amount or 0) for amount in duration.groups())
            return self.now_s - sum(amount * unit for amount, unit in zip(amounts, _UNITS_S, strict=True))
        return self._moment(option, text, also=", or a length of time as 2h, 30m or 90s")

    def _between(self, start: str, end: str) -> Interval:
        """The end is the first such time after the start, so that `23:50 00:10` crosses midnight."""
        option, shown = "--between", f"{start} {end}"
        start_s = self._past(option, start, self._moment(option, start))
        if self.clock.dated and _TIME_OF_DAY.fullmatch(end.strip()):
            wall = self._wall(start_s)
            end_s = self.clock.stream_s(min(at for at in self._times_of_day(option, end, wall) if at >= wall))
        else:
            end_s = self._moment(option, end)
        if end_s < start_s:
            raise UsageError(f"{option} {shown} ends before it starts.", fix="Swap the two.")
        return Interval(start_s, end_s)

    def _moment(self, option: str, text: str, also: str = "") -> float:
        return self._of_wall(option, text, also) if self.clock.dated else self._of_file(option, text, also)

    def _of_file(self, option: str, text: str, also: str) -> float:
        match = _FILE_TIME.fullmatch(text.strip())
        if match is None:
            why = " A file has no wall time." if _as_date(text) is not None else ""
            raise UsageError(f"{option} {text!r} is no time of a file.{why}", fix=f"{_SECONDS}{also}.")
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        if (match[2] and seconds >= 60) or (match[1] and minutes >= 60):
            raise UsageError(f"{option} {text!r} has more than 59 minutes or seconds.", fix=f"{_SECONDS}{also}.")
        return hours * 3600 + minutes * 60 + seconds

    def _of_wall(self, option: str, text: str, also: str) -> float:
        if _TIME_OF_DAY.fullmatch(text.strip()):
            now = self._wall(self.now_s)
            return self.clock.stream_s(max(at for at in self._times_of_day(option, text, now) if at <= now))
        date = _as_date(text)
        if date is None:
            raise UsageError(f"{option} {text!r} is no time.", fix=f"{_DATED}{also}.")
        return self.clock.stream_s(self._stamp(date))

    def _times_of_day(self, option: str, text: str, around: float) -> list[float]:
        """That time of day on the days around a wall time. When clocks are put back, an hour comes twice."""
        match = _TIME_OF_DAY.fullmatch(text.strip())
        assert match is not None
        hour, minute, second = int(match[1]), int(match[2]), float(match[3] or 0)
        if hour > 23 or minute > 59 or second >= 60:
            raise UsageError(f"{option} {text!r} is no time of a day.", fix=f"{_DATED}.")
        at = time(hour, minute, int(second), round(1e6 * (second % 1)) % 1_000_000)
        today = self._local(around).date()
        days = [today + timedelta(days=days) for days in (-1, 0, 1)]
        return [self._stamp(datetime.combine(day, at.replace(fold=fold))) for day in days for fold in (0, 1)]

    def _past(self, option: str, text: str, moment_s: float) -> float:
        if moment_s > self.now_s + self.tolerance_s:
            what = "in the future" if self.clock.dated else f"after {self.written(self.now_s)}, where the file has been seen to"
            raise UsageError(f"{option} {text!r} is {what}.", fix="Ask about what has been seen.")
        return moment_s

    def _stamp(self, date: datetime) -> float:
        if date.tzinfo is None and self.zone is not None:
            date = date.replace(tzinfo=self.zone)
        return date.timestamp()

    def _wall(self, moment_s: float) -> float:
        wall = self.clock.wall_s(moment_s)
        assert wall is not None
        return wall

    # -- writing -----------------------------------------------------------------------------------------------------

    def written(self, moment_s: float) -> str:
        """A moment for people: `14:05:30` (with the date, if it is another day's than now), or a file's `1:35.0`."""
        if not self.clock.dated:
            tenths = round(10 * moment_s)
            return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
        local, today = self._local(self._wall(moment_s)), self._local(self._wall(self.now_s)).date()
        return f"{local:%H:%M:%S}" if local.date() == today else f"{local:%Y-%m-%d %H:%M:%S}"

    def written_interval(self, interval: Interval) -> str:
        """An interval for people; a moment is one time."""
        start, end = self.written(interval.start_s), self.written(self._end_s(interval))
        return start if start == end else f"{start} to {end}"

    def iso(self, moment_s: float) -> str | None:
        """Wall time as ISO 8601 with the zone's offset, to the millisecond; None if there is none."""
        if not self.clock.dated:
            return None
        return self._local(self._wall(moment_s)).isoformat(timespec="milliseconds")

    def as_dict(self, interval: Interval) -> dict[str, Any]:
        """For `--json`: seconds of the stream, and wall time where it is known."""
        end_s = self._end_s(interval)
        return {
            "start_s": round(interval.start_s, 3), "end_s": round(end_s, 3),
            "start": self.iso(interval.start_s), "end": self.iso(end_s),
        }  # fmt: skip

    def _end_s(self, interval: Interval) -> float:
        return interval.end_s if math.isfinite(interval.end_s) else max(self.now_s, interval.start_s)

    def _local(self, wall_s: float) -> datetime:
        return datetime.fromtimestamp(wall_s, timezone.utc).astimezone(self.zone)


def _as_date(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text.strip()))  # Python 3.10 does not know the Z
    except ValueError:
        return None
