"""Time inside and outside: intervals of a stream's own seconds, and the map between those and wall time.

Inside the memory there is one time, the stream's seconds, which never go back. Wall time is what a clock on the wall says: a
board without a battery boots in 1970 and jumps by decades when the network tells it the time. So only pairs of both are kept,
and wall time is worked out when somebody asks for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bank import Bank
from keepsight.streams.errors import UsageError

__all__ = ["Clock", "Interval", "remembered", "seen_within", "wall_time_of"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A closed interval of a stream's seconds; `end_s` may be infinite: up to now.

    >>> Interval(10, 20).holds(20), Interval(10, 20).holds(20.5)
    (True, False)
    """

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and self.start_s <= self.end_s):
            raise UsageError(f"an interval from {self.start_s} s to {self.end_s} s ends before it starts.", fix="Swap them.")

    def holds(self, time_s: float) -> bool:
        """Whether a moment lies in it."""
        return self.start_s <= time_s <= self.end_s

    def overlaps(self, first_s: Float64, last_s: Float64) -> NDArray[np.bool_]:
        """Which spans share a moment with it; `nan` (a slot out of use) shares none."""
        return (first_s <= self.end_s) & (last_s >= self.start_s)


def seen_within(bank: Bank, interval: Interval) -> NDArray[np.bool_]:
    """Slots of a visual bank whose span overlaps an interval, `[S, N]`, each token by its own span."""
    return interval.overlaps(bank.first_s[0], bank.last_s[0])


def remembered(bank: Bank, gap_s: float) -> list[Interval]:
    """The time that a visual bank holds anything of, in order; spans no further apart than `gap_s` are one."""
    used = bank.visible[0]
    spans = sorted(zip(bank.first_s[0][used].tolist(), bank.last_s[0][used].tolist(), strict=True))
    found: list[Interval] = []
    for first_s, last_s in spans:
        if found and first_s <= found[-1].end_s + gap_s:
            found[-1] = Interval(found[-1].start_s, max(found[-1].end_s, last_s))
        else:
            found.append(Interval(first_s, last_s))
    return found


def wall_time_of(captured_at: float) -> float:
    """What the wall clock said at a moment of `time.monotonic()`, as it goes now: seconds since 1970, UTC."""
    return time.time() - (time.monotonic() - captured_at)


class Clock:
    """Stream seconds to wall time and back, by pairs of both that were read together (anchors).

    The rule for a jump: within one run of the process the later clock is taken as the right one. When wall time has moved
    `JUMP_S` or more against the stream's seconds since the last pair, all anchors of this run are moved by as much, so that what
    was seen before the jump gets the date that the corrected clock would have given it. What an earlier run saw (`restore`) keeps
    its dates: between two runs the stream's seconds say nothing about the length of the gap.

    Smaller differences are drift (a camera's clock against the machine's, a clock slewed by NTP): an anchor a minute
    follows it, and moments between two anchors are interpolated. At most `ANCHORS` are kept; when there are more, every second
    one goes. A machine that sleeps looks like a clock that jumps, so what it saw before is dated too late by the length of the
    sleep.
    """

    JUMP_S = 2.0
    SPACING_S = 60.0
    ANCHORS = 256

    def __init__(self) -> None:
        self._stream: list[float] = []
        self._wall: list[float] = []
        self._starts = [0]  # index of each run's first anchor; what it has seen last is the last anchor, and moves along
        self._spacing_s = self.SPACING_S
        self.jumps = 0

    def __repr__(self) -> str:
        return f"Clock({len(self._stream)} anchors, {len(self._starts)} runs, {self.jumps} jumps)"

    @property
    def dated(self) -> bool:
        """Whether wall time is known at all. For a file it is not: its seconds are all there is."""
        return bool(self._stream)

    def observe(self, stream_s: float, wall_s: float) -> bool:
        """Note what the wall clock said at a moment of the stream; returns whether it has jumped since the last one.

        Raises:
            UsageError: the stream's seconds went back, or one of both is not finite.
        """
        if not (math.isfinite(stream_s) and math.isfinite(wall_s)):
            raise UsageError(f"{stream_s} s of the stream at wall time {wall_s} is no moment.")
        if self._stream and stream_s < self._stream[-1]:
            raise UsageError(f"the stream's seconds went back from {self._stream[-1]:.3f} to {stream_s:.3f}.")
        start = self._starts[-1]
        if len(self._stream) == start:
            self._append(stream_s, wall_s)
            return False
        moved_s = (wall_s - stream_s) - (self._wall[-1] - self._stream[-1])
        jumped = abs(moved_s) >= self.JUMP_S
        if jumped:
            self._wall[start:] = [wall + moved_s for wall in self._wall[start:]]
            self.jumps += 1
        # The last anchor is the newest pair, and becomes a fixed one when it is far enough from the one before it.
        if len(self._stream) - start < 2 or self._stream[-1] - self._stream[-2] >= self._spacing_s:
            self._append(stream_s, wall_s)
        else:
            self._stream[-1], self._wall[-1] = stream_s, wall_s
        return jumped

    def begin_run(self) -> None:
        """What is observed from now on is another run: a jump of the clock does not move what was observed before."""
        if len(self._stream) > self._starts[-1]:
            self._starts.append(len(self._stream))

    def wall_s(self, stream_s: float) -> float | None:
        """Wall time of a moment of the stream, seconds since 1970; None if none is known."""
        if not self.dated:
            return None
        stream, wall = self._run_of(stream_s)
        return stream_s + float(np.interp(stream_s, stream, wall - stream))

    def stream_s(self, wall_s: float) -> float:
        """Moment of the stream at a wall time; before and after what was seen, seconds go on as they would have.

        Raises:
            UsageError: no wall time is known.
        """
        if not self.dated:
            raise UsageError("Nothing of this stream has a wall time.", fix="Give seconds of the stream.")
        runs = [self._anchors(index) for index, start in enumerate(self._starts) if start < len(self._stream)]
        distance = [max(wall[0] - wall_s, wall_s - wall[-1], 0.0) for _, wall in runs]
        # Of runs equally near, the later: the clock was the better one.
        stream, wall = runs[max(range(len(runs)), key=lambda index: (-distance[index], index))]
        return wall_s - float(np.interp(wall_s, wall, wall - stream))

    def after_gap(self, wall_s: float) -> float:
        """The stream second at which a new run that starts at this wall time begins: later by the gap, if the clock says so."""
        if not self.dated:
            return 0.0
        return self._stream[-1] + max(0.0, wall_s - self._wall[-1])

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def state(self) -> dict[str, NDArray[np.float64]]:
        """All of it, to be saved: `anchors` float64 `[anchors, 3]` (stream seconds, wall seconds, index of the run)."""
        runs = np.searchsorted(np.array(self._starts), np.arange(len(self._stream)), side="right") - 1
        return {
            "anchors": np.stack([np.array(self._stream), np.array(self._wall), runs.astype(np.float64)], axis=1),
            "settings": np.array([self._spacing_s, self.jumps], np.float64),
        }

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over what was saved; what is observed from now on is another run.

        Raises:
            UsageError: not the state of a clock.
        """
        anchors, settings = np.asarray(state["anchors"], np.float64), np.asarray(state["settings"], np.float64)
        if anchors.ndim != 2 or anchors.shape[1] != 3 or not np.isfinite(anchors).all() or settings.shape != (2,):
            raise UsageError(f"{list(anchors.shape)} anchors are not the state of a clock.")
        self._stream, self._wall = anchors[:, 0].tolist(), anchors[:, 1].tolist()
        starts = np.flatnonzero(np.diff(anchors[:, 2], prepend=-1.0))
        self._starts = [*starts.tolist(), len(anchors)] if len(anchors) else [0]
        self._spacing_s, self.jumps = float(settings[0]), int(settings[1])

    def _append(self, stream_s: float, wall_s: float) -> None:
        self._stream.append(stream_s)
        self._wall.append(wall_s)
        if len(self._stream) > self.ANCHORS:
            self._thin()

    def _thin(self) -> None:
        """Keep every second anchor, and the first and last of each run; where that is not enough, forget the oldest run."""
        bounds = [*self._starts, len(self._stream)]
        kept: list[int] = []
        starts = []
        for first, end in pairwise(bounds):
            run = [*range(first, end - 1, 2), end - 1] if end > first else []
            starts.append(len(kept))
            kept += run
        while len(kept) > self.ANCHORS - 1:
            drop = starts[1]
            kept, starts = kept[drop:], [start - drop for start in starts[1:]]
        self._stream, self._wall = ([values[index] for index in kept] for values in (self._stream, self._wall))
        self._starts = starts
        self._spacing_s *= 2

    def _anchors(self, run: int) -> tuple[Float64, Float64]:
        first = self._starts[run]
        end = self._starts[run + 1] if run + 1 < len(self._starts) else len(self._stream)
        return np.array(self._stream[first:end]), np.array(self._wall[first:end])

    def _run_of(self, stream_s: float) -> tuple[Float64, Float64]:
        """The run that was on at a moment; of the gap between two, the earlier."""
        begins = [self._stream[start] for start in self._starts if start < len(self._stream)]
        return self._anchors(max(0, int(np.searchsorted(begins, stream_s, side="right")) - 1))
