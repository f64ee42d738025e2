"""What presses on a live session: a sensor reading and the session's own backlog, held against limits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from keepsight.runtime.governor.governor import Cause, Limits, Pressure
from keepsight.runtime.sensors.reading import Reading

__all__ = ["Gauge", "Load"]

_PLACEHOLDER_C = 40.0  # some firmware states trips like 0 or 30 C, which mean nothing
_USUAL_OF, _ENOUGH = 16, 3  # prefills that say what is usual, and from how many on
_RECENT_S = 10.0  # how long one slow prefill counts


@dataclass(frozen=True)
class Load:
    """What a session says of itself, since it was last asked.

    Attributes:
        frame_s: seconds that a frame takes now (the middle one of the last few), of all cameras together; None before the first.
        interval_s: from one remembered frame to the next, as things are; `milder_s` with one step less against a backlog.
        dropped: frames that were wanted, and replaced by a newer one because nobody was ready.
        age_s: age of the newest frame at the moment when it had been remembered; None before the first.
        need_bytes: memory that the session may still take, as things are; `full_bytes` if all steps were turned off.
        cores: CPU cores that this process may use; `others` of them are busy for other processes. None: not known.
        threads: of the language model, now; `full_threads` if all steps were turned off. 0: there is none.
        prefill_row_s: seconds a row of a prompt that was read since; None: none was.
    """

    frame_s: float | None = None
    interval_s: float = 1.0
    milder_s: float = 1.0
    dropped: int = 0
    age_s: float | None = None
    need_bytes: int = 0
    full_bytes: int = 0
    cores: int | None = None
    others: float | None = None
    threads: int = 0
    full_threads: int = 0
    prefill_row_s: float | None = None


class Gauge:
    """Turns readings and loads into pressures. It remembers swap for some seconds, and how long a prefill usually takes."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._swap: deque[tuple[float, int]] = deque()
        self._usual: deque[float] = deque(maxlen=_USUAL_OF)
        self._slow: tuple[float, str] | None = None

    def pressure(self, reading: Reading, load: Load) -> Pressure:
        """What presses now. What a reading does not have presses never."""
        over: dict[Cause, str] = {}
        near: dict[Cause, str] = {}
        for cause, (hard, soft) in {
            "heat": self._heat(reading),
            "memory": self._memory(reading, load),
            "backlog": self._backlog(load),
            "cpu": self._cpu(reading.time_s, load),
        }.items():
            name: Cause = cause  # type: ignore[assignment]
            if hard is not None:
                over[name] = hard
            elif soft is not None:
                near[name] = soft
        return Pressure(over, near)

    def _heat(self, reading: Reading) -> tuple[str | None, str | None]:
        if reading.throttled:
            return f"throttled ({', '.join(reading.throttled)})", None
        zones = [
            (zone.throttles_at - zone.celsius, zone)
            for zone in reading.temperatures
            if zone.throttles_at is not None and zone.throttles_at > _PLACEHOLDER_C
        ]
        if not zones:
            return None, None
        left, zone = min(zones, key=lambda entry: entry[0])
        why = f"{zone.zone} at {zone.celsius:.0f} C, throttles at {zone.throttles_at:.0f} C"
        return _told(left <= self.limits.heat_over_k, left <= self.limits.heat_near_k, why)

    def _memory(self, reading: Reading, load: Load) -> tuple[str | None, str | None]:
        grown = self._swap_growth(reading)
        if grown >= self.limits.swap_growth:
            return f"swap grew by {_mb(grown)} in {self.limits.swap_window_s:g} s", None
        if reading.memory_available is None:
            return None, None
        floor = self.limits.memory_floor
        if floor is None:
            floor = min(max((reading.memory_total or 0) // 25, 256 << 20), 1 << 30)
        left = reading.memory_available - load.need_bytes
        needed = f", of which {_mb(load.need_bytes)} may be needed" if load.need_bytes else ""
        why = f"{_mb(reading.memory_available)} available{needed}; the floor is {_mb(floor)}"
        close = reading.memory_available - load.full_bytes < self.limits.memory_near * floor
        return _told(left < floor, close or grown > self.limits.swap_growth // 4, why)

    def _swap_growth(self, reading: Reading) -> int:
        """Bytes by which the swap in use has grown over the window."""
        if reading.swap_total is None or reading.swap_free is None:
            return 0
        used = reading.swap_total - reading.swap_free
        self._swap.append((reading.time_s, used))
        while reading.time_s - self._swap[0][0] > self.limits.swap_window_s:
            self._swap.popleft()
        return used - min(before for _, before in self._swap)

    def _backlog(self, load: Load) -> tuple[str | None, str | None]:
        if load.frame_s is None:
            return None, None
        late = load.age_s is not None and load.age_s > 2 * load.interval_s + self.limits.age_s
        slow = load.frame_s > self.limits.late_over * load.interval_s
        if late:
            why = f"a frame was {load.age_s:.1f} s old when remembered, with {load.interval_s:g} s between frames"
        elif load.dropped and not slow:
            why = f"{load.dropped} frames dropped"
        else:
            why = f"a frame takes {load.frame_s:.2f} s, with {load.interval_s:g} s between frames"
        return _told(late or slow or load.dropped > 0, load.frame_s > self.limits.late_near * load.milder_s, why)

    def _cpu(self, now: float, load: Load) -> tuple[str | None, str | None]:
        self._note_prefill(now, load)
        if self._slow is not None:
            return self._slow[1], None
        if load.cores is None or load.others is None or not load.threads:
            return None, None
        why = f"other processes keep {load.others:.1f} of {load.cores} cores busy, the language model wants {load.threads}"
        # Threads that its user gave it beyond the cores are its user's affair.
        now, full = (min(threads, load.cores) + load.others - load.cores for threads in (load.threads, load.full_threads))
        return _told(load.threads > 1 and now > self.limits.crowding_over, full > self.limits.crowding_near, why)

    def _note_prefill(self, now: float, load: Load) -> None:
        """A prefill that took many times its usual time counts for a while."""
        if self._slow is not None and (now - self._slow[0] > _RECENT_S or load.threads <= 1):
            self._slow = None
        if load.prefill_row_s is None:
            return
        if len(self._usual) >= _ENOUGH and load.threads > 1:
            times = load.prefill_row_s / median(self._usual)
            if times > self.limits.prefill_over:
                self._slow = now, f"reading a prompt took {times:.0f} times its usual time"
        self._usual.append(load.prefill_row_s)


def _told(over: bool, near: bool, why: str) -> tuple[str | None, str | None]:
    return (why, None) if over else (None, why if near else None)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if abs(nbytes) >= 1e9 else f"{nbytes / 1e6:.0f} MB"
