"""Evidence: the moments of a stream that an answer rests on, from where the Q-Former looked, and their key frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.keyframes import KeyFrame, KeyFrames
from keepsight.runtime.moments import Calendar
from keepsight.runtime.timeline import Interval

__all__ = ["Evidence", "Moment", "evidence_of", "moments_of"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """A stretch of time that was looked at more than its part.

    Attributes:
        start_s, end_s: from the first to the last frame, in seconds of the stream.
        share: of all attention, 0 to 1.
        part: what it would get if every slot of every token got the same, 0 to 1.
    """

    start_s: float
    end_s: float
    share: float
    part: float

    @property
    def interval(self) -> Interval:
        return Interval(self.start_s, self.end_s)

    def as_dict(self, calendar: Calendar) -> dict[str, Any]:
        """For `--json`."""
        return {**calendar.as_dict(self.interval), "share": round(self.share, 4), "part": round(self.part, 4)}


@dataclass(frozen=True)
class Evidence:
    """What an answer rests on.

    Attributes:
        moments: heaviest first.
        frames: key frames of those moments, of each the nearest to its middle, in the order of `moments`.
    """

    moments: tuple[Moment, ...]
    frames: tuple[KeyFrame, ...]

    def as_dict(self, calendar: Calendar) -> dict[str, Any]:
        """For `--json`: `spans` and `frames`, whose pictures are left out."""
        frames = [{"time_s": round(frame.time_s, 3), "time": calendar.iso(frame.time_s)} for frame in self.frames]
        return {"spans": [moment.as_dict(calendar) for moment in self.moments], "frames": frames}


def evidence_of(moments: Sequence[Moment], key_frames: KeyFrames, tolerance_s: float) -> Evidence:
    """Moments with a key frame of each, where one of it (to within `tolerance_s` at both ends) has been kept."""
    frames: list[KeyFrame] = []
    for moment in moments:
        middle = (moment.start_s + moment.end_s) / 2
        kept = key_frames.within(Interval(moment.start_s - tolerance_s, moment.end_s + tolerance_s))
        if kept:
            frames.append(min(kept, key=lambda frame: abs(frame.time_s - middle)))
    return Evidence(tuple(moments), tuple({id(frame): frame for frame in frames}.values()))


def moments_of(
    attention: NDArray[np.float32],
    first_s: Float64,
    last_s: Float64,
    *,
    frame_s: float,
    interval: Interval | None = None,
    count: int = 3,
) -> list[Moment]:
    """The moments that a Q-Former looked at most, heaviest first.

    Slots differ from token to token, so attention is laid out over time first: what a slot of a token gets, on average over the
    cross-attention layers, is spread evenly over the span that it covers (of which each end is half a frame wider, so that one
    frame has a width), cut to the interval asked about. Beside it lies what there would be if every slot that is read got the
    same. A moment is a stretch of time in which the first is above the second, from edge to edge of spans; its weight is by how
    much. Where a Q-Former looks at everything alike, all that it read is the one moment.

    Args:
        attention: float32 `[X, S, N]`, each layer sums to 1; 0 for a slot that is not read.
        first_s, last_s: `[S, N]`, what each slot covers; not looked at where it is not read.
        frame_s: seconds between two frames.
        interval: that was asked about.
        count: how many at most.
    """
    weight = attention.mean(axis=0, dtype=np.float64)
    read = weight > 0
    if not read.any():
        return []
    half = frame_s / 2
    start, end = first_s[read] - half, last_s[read] + half
    if interval is not None:
        start, end = np.maximum(start, interval.start_s - half), np.minimum(end, interval.end_s + half)
    edges, places = np.unique(np.concatenate([start, end]), return_inverse=True)
    share = _over_time(weight[read] / weight[read].sum(), start, end, edges, places)
    part = _over_time(np.full(len(start), 1 / len(start)), start, end, edges, places)
    found = []
    for first, after in _runs(share - part > 1e-9) or [(0, len(edges) - 1)]:
        mass, even = float(share[first:after].sum()), float(part[first:after].sum())
        from_s, to_s = float(edges[first]) + half, float(edges[after]) - half
        middle = (from_s + to_s) / 2
        found.append(Moment(min(from_s, middle), max(to_s, middle), mass, even))
    return sorted(found, key=lambda moment: moment.part - moment.share)[:count]


def _over_time(weight: Float64, start: Float64, end: Float64, edges: Float64, places: NDArray[np.intp]) -> Float64:
    """Weight in each stretch between two edges, `[edges - 1]`, of weights that are spread evenly from start to end."""
    density = weight / (end - start)
    change = np.zeros(len(edges))
    np.add.at(change, places, np.concatenate([density, -density]))
    return np.cumsum(change)[:-1] * np.diff(edges)


def _runs(above: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and one past the last index of each run of True."""
    change = np.diff(np.concatenate([[False], above, [False]]).astype(np.int8))
    return list(zip(np.flatnonzero(change > 0).tolist(), np.flatnonzero(change < 0).tolist(), strict=True))
