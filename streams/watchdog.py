"""How long a live source may be silent before it counts as stalled, and then as lost."""

from __future__ import annotations

from keepsight.streams.capture import Arrivals

__all__ = ["Watchdog"]

# A source of 1 frame/s or more is found out within 2.5 s, one missing frame forgiven; the rest is for looking every 0.1 s.
_SHORTEST_S = 2.2
_ABOUT_1_S = 1.1
# A slower one within three of its own intervals.
_INTERVALS = 2.9
_GRACE_S = 1.0
_FEW = 4
_LONGEST_S = 120.0


class Watchdog:
    """Knows how often a source gives frames, from its own frames, over all its connections.

    Args:
        stall_s: a fixed limit instead of the one that follows from the rate.
        unknown_s: how long to wait after a single frame when nothing says how often frames come.
    """

    def __init__(self, stall_s: float | None = None, unknown_s: float = 10.0) -> None:
        self._fixed_s, self._unknown_s = stall_s, unknown_s
        self._interval_s: float | None = None  # as the connection before had it
        self._lonely = 0  # connections in a row that gave one frame and stalled

    def interval_s(self, arrivals: Arrivals) -> float | None:
        """Seconds between frames, as well as it is known."""
        measured, stated = arrivals.interval_s, arrivals.stated_interval_s
        if measured is None:
            known = [interval for interval in (self._interval_s, stated) if interval is not None]
            return max(known, default=None)
        # In the dark a camera exposes longer than it says. But its first intervals are odd, so few of them prove little.
        if arrivals.count <= _FEW and stated is not None and measured < _INTERVALS * stated:
            return stated
        return measured

    def limit_s(self, arrivals: Arrivals) -> float:
        """The longest silence after a frame that is no stall."""
        if self._fixed_s is not None:
            return self._fixed_s
        interval = self.interval_s(arrivals)
        if interval is None:
            return self._unknown_s
        limit = _SHORTEST_S if interval <= _ABOUT_1_S else _INTERVALS * interval
        # What gives one frame for each connection is slower than it says.
        return min(limit * 2.0 ** min(self._lonely, 10), _LONGEST_S)

    def grace_s(self, arrivals: Arrivals) -> float:
        """How much longer a stalled connection is kept, in case it goes on by itself."""
        return max(_GRACE_S, self.interval_s(arrivals) or 0.0) if self._fixed_s is None else 0.0

    def learn(self, arrivals: Arrivals, *, stalled: bool) -> None:
        """Keep what a connection that is over has shown."""
        if arrivals.count > 1:
            self._interval_s, self._lonely = self.interval_s(arrivals), 0
        elif arrivals.count == 1 and stalled:
            self._lonely += 1
