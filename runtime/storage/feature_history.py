"""A feature log as those who ask see it: what it holds, and when that was, from its headers and times alone.

It is only read. Nothing is locked and nothing changed, so another process may go on writing it: what it writes from here on is
not seen, and what it deletes to make room is told when it is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.moments import Calendar
from keepsight.runtime.storage.feature_segment import Header, Layout, Logged, Segment, is_segment, read_header
from keepsight.runtime.timeline import Clock, Interval
from keepsight.streams.errors import SnapshotError, UsageError
from keepsight.streams.images import SUFFIXES

__all__ = ["FeatureHistory", "Stretch", "is_feature_log"]

Float64 = npt.NDArray[np.float64]


def is_feature_log(path: str | Path) -> bool:
    """Whether a path is a folder that a feature log is written to, by what is in it.

    Raises:
        UsageError: there are pictures beside the log, so that either may be meant.
    """
    folder = Path(path)
    if not folder.is_dir():
        return False
    files = [item for item in folder.iterdir() if item.is_file()]
    if not any(map(_is_part, files)) and {item.name for item in files} != {"writer.lock"}:
        return False
    if any(item.suffix.lower() in SUFFIXES for item in files):
        raise UsageError(f"{folder} has both pictures and a feature log.", fix="Move one of them to a folder of its own.")
    return True


def _is_part(path: Path) -> bool:
    try:
        return path.suffix == ".features" and path.stem.isdigit() and is_segment(path)
    except FileNotFoundError:  # the oldest made room
        return False


@dataclass(frozen=True)
class Stretch:
    """A time of which a log holds every record that was due, and how many these are."""

    interval: Interval
    records: int


@dataclass(frozen=True)
class _Entry:
    """One record, or in its place what is wrong with it."""

    segment: Segment
    number: int
    live: bool
    time_s: float = math.nan
    wall_s: float = math.nan
    damage: SnapshotError | None = None


class _Unbounded(Clock):
    """A clock that forgets no run: the log itself is the bound."""

    ANCHORS = 1 << 62


class FeatureHistory:
    """What a feature log holds; opened by its folder alone.

    Times are read without the features beside them, and so without the checksum over both; where they make no sense (a time that
    does not rise, a wall clock that jumps) the whole record is read and checked. A record that is read to be asked always is.

    Args:
        folder: the log's.
        bundle: whose features they must be.

    Attributes:
        every_s: seconds from one record to the next.
        nbytes: of all its segments.
        clock: wall time of its seconds, each process that wrote it a run; a clock that jumped within a run dates what was before
            by the corrected clock. Of a file's log it knows no wall time.
        runs: how many processes wrote it.
        damaged: what can't be read, each naming its file.

    Raises:
        UsageError: nothing has been logged yet.
        SnapshotError: the log is of another bundle or a newer version, or can't be read at all.
    """

    def __init__(self, folder: str | Path, bundle: Bundle) -> None:
        self.folder = Path(folder)
        try:
            self._entries = self._opened(bundle)
        except OSError as error:
            raise SnapshotError(
                f"the feature log {self.folder} can't be read ({error.strerror or error}).", fix="Check the folder."
            ) from error
        self.damaged = [entry.damage for entry in self._entries if entry.damage is not None]
        self._times = np.array([entry.time_s for entry in self._entries])
        if not np.isfinite(self._times).any():
            if self.damaged:
                raise self.damaged[0]
            raise UsageError(f"the feature log {self.folder} is empty.", fix="Ask when something has been logged.")
        self._gap_s = max(1.5 * self.every_s, self.every_s + 1 / bundle.manifest.sample_fps)
        self.clock, self.runs = self._dated()

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        """That have a time; one whose features are damaged is not known until they are read."""
        return int(np.isfinite(self._times).sum())

    @property
    def covers_s(self) -> tuple[float, float]:
        """Stream time of the oldest and of the newest record."""
        return float(np.nanmin(self._times)), float(np.nanmax(self._times))

    @property
    def calendar(self) -> Calendar:
        """Reads and writes times of this log, as of now: of a camera's this moment, of a file's its newest record."""
        now_s = self.covers_s[1]
        wall_s = self.clock.wall_s(now_s)
        if wall_s is not None:
            now_s += max(0.0, time.time() - wall_s)
        return Calendar(self.clock, now_s, self.every_s)

    def stretches(self) -> list[Stretch]:
        """What there is without a gap, in order. Records lie one interval and at most one frame apart; more is a gap."""
        times = self._times[np.isfinite(self._times)]
        cuts = np.flatnonzero(np.diff(times) > self._gap_s) + 1
        return [Stretch(Interval(part[0], part[-1]), len(part)) for part in map(np.ndarray.tolist, np.split(times, cuts))]

    def count(self, interval: Interval) -> int:
        """How many records lie in an interval."""
        return int(((self._times >= interval.start_s) & (self._times <= interval.end_s)).sum())

    def read(self, since_s: float = -math.inf, until_s: float = math.inf) -> Iterator[Logged]:
        """Records of an interval (both ends included), oldest first, one in memory at a time, their wall times by `clock`.

        Raises:
            SnapshotError: a record that may be of the interval is damaged, or the log made room for new ones while it was read.
        """
        self._refuse_damaged(since_s, until_s)
        for entry in self._entries:
            if not since_s <= entry.time_s <= until_s:
                continue
            record = self._record(entry)
            if isinstance(record, SnapshotError):
                raise record
            wall_s = self.clock.wall_s(record.time_s)
            yield record if wall_s is None else replace(record, wall_s=wall_s)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _opened(self, bundle: Bundle) -> list[_Entry]:
        paths = sorted(path for path in self.folder.glob("*.features") if path.stem.isdigit())
        headers = {path: header for path in paths if (header := _header_of(path)) is not None}
        self.every_s = next((header.every_s for header in headers.values()), 1.0)
        self._layout = Layout(bundle, self.every_s)
        self.nbytes = 0
        entries: list[_Entry] = []
        for path in paths:
            try:
                entries += self._entries_of(path, headers.get(path), newest=path == paths[-1])
            except FileNotFoundError:  # the oldest made room
                continue
        return self._without_nonsense(entries)

    def _entries_of(self, path: Path, header: Header | None, *, newest: bool) -> list[_Entry]:
        try:
            segment = self._layout.opened(path, newest=newest)
        except SnapshotError as error:
            if header is not None:  # it is whole, and not ours
                raise
            return [_Entry(Segment(path, 0, 0), 0, live=False, damage=error)]
        if segment is None:
            return []
        self.nbytes += self._layout.nbytes(segment)
        live = header is None or header.live
        moments = self._layout.moments(segment).tolist()
        return [_Entry(segment, number, live, *moment) for number, moment in enumerate(moments)]

    def _without_nonsense(self, entries: list[_Entry]) -> list[_Entry]:
        """Entries with the damage of those that are not whole, which is looked for where times make no sense."""
        times = np.array([entry.time_s for entry in entries])
        walls = np.array([entry.wall_s if entry.live else entry.time_s for entry in entries])
        odd = ~(np.isfinite(times) & np.isfinite(walls))
        step = ~((np.diff(times) > 0) & (np.abs(np.diff(walls - times)) < Clock.JUMP_S))
        odd[1:] |= step
        odd[:-1] |= step
        for index in np.flatnonzero(odd):
            entry = entries[index]
            record = entry.damage or self._record(entry)
            if isinstance(record, SnapshotError):
                entries[index] = replace(entry, time_s=math.nan, wall_s=math.nan, damage=record)
        return entries

    def _dated(self) -> tuple[Clock, int]:
        clock = _Unbounded()
        known = [entry for entry in self._entries if entry.damage is None]
        runs = 1
        for before, entry in pairwise([known[0], *known]):
            if entry.segment.run != before.segment.run:
                clock.begin_run()
                runs += 1
            if entry.live:
                clock.observe(entry.time_s, entry.wall_s)
        return clock, runs

    # -- reading -----------------------------------------------------------------------------------------------------

    def _record(self, entry: _Entry) -> Logged | SnapshotError:
        try:
            return self._layout.record(entry.segment, entry.number)
        except FileNotFoundError as error:
            raise SnapshotError(f"{error.filename} made room while the log was read.", fix="Ask again.") from error

    def _refuse_damaged(self, since_s: float, until_s: float) -> None:
        """What is damaged has no time; it lies between its neighbours that have one."""
        for index, entry in enumerate(self._entries):
            if entry.damage is None:
                continue
            before = self._times[:index][np.isfinite(self._times[:index])]
            after = self._times[index:][np.isfinite(self._times[index:])]
            if (not len(before) or before[-1] < until_s) and (not len(after) or after[0] > since_s):
                raise entry.damage


def _header_of(path: Path) -> Header | None:
    try:
        return read_header(path)
    except FileNotFoundError:  # the oldest made room
        return None
