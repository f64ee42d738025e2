"""A governor at work: a thread that reads the sensors and the sessions, and turns down what is too much for the machine."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from keepsight.runtime.governor.governor import CAUSES, Governor, Limits
from keepsight.runtime.governor.pressure import Gauge, Load
from keepsight.runtime.governor.steps import Knobs, Turn, parse_steps
from keepsight.runtime.graphs.engine import Tensor
from keepsight.runtime.language.llm import Prefill
from keepsight.runtime.sensors.reading import Reading
from keepsight.runtime.session import Session
from keepsight.streams import Frame, LiveSource
from keepsight.streams.errors import KeepsightError
from keepsight.streams.many import Camera

__all__ = ["CoreUse", "LiveGovernor", "SensorsLike", "governed"]

_log = logging.getLogger("keepsight.governor")

_FEW = 5  # frames whose middle cost counts: one of them alone may have waited for anything
_PROMPT_ROWS = 8  # a shorter prefill says more of llama.cpp's fixed costs than of the cores


class SensorsLike(Protocol):
    """What reads the sensors: `keepsight.runtime.sensors.Sensors`, or a double of it."""

    def read(self) -> Reading: ...


class CoreUse:
    """How many of the cores that this process may use are kept busy by other processes, whatever their priority.

    Args:
        root: where /proc is.
        window_s: seconds that the figure is of.
    """

    def __init__(self, root: Path = Path("/"), window_s: float = 3.0) -> None:
        self._stat, self._window_s = root / "proc/stat", window_s
        self._cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        self._past: deque[tuple[float, float, float]] = deque()
        self.others()

    @property
    def cores(self) -> int:
        return len(self._cores)

    def others(self) -> float | None:
        """Cores that others kept busy over the window, or since the first call: 0 to `cores`; None where it is not known."""
        now = self._ticks()
        if now is None:
            return None
        self._past.append(now)
        while len(self._past) > 2 and now[0] - self._past[1][0] >= self._window_s:
            self._past.popleft()
        elapsed_s, busy_s, own_s = (after - before for after, before in zip(now, self._past[0], strict=True))
        if elapsed_s < 0.5:
            return None
        return min(max(0.0, (busy_s - own_s) / elapsed_s), float(self.cores))

    def _ticks(self) -> tuple[float, float, float] | None:
        """Seconds: now; that these cores have been busy; that this process has computed."""
        try:
            lines = self._stat.read_text().splitlines()
        except OSError:
            return None
        ticks = 0
        for line in lines:
            name, *counts = line.split()
            if name in self._cores:  # user, nice, system, idle, iowait, irq, softirq, steal
                ticks += sum(int(counts[column]) for column in (0, 1, 2, 5, 6, 7))
        own = os.times()
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


class _Frames:
    """What remembering frames costs a session, noted on the thread that does it."""

    def __init__(self, session: Session, clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        self._costs: deque[float] = deque(maxlen=_FEW)
        self._newest: tuple[float, float] | None = None  # when one had been remembered, and its age then
        self._dropped = 0
        session.observe(self._note)

    def _note(self, _features: Tensor, frame: Frame) -> None:
        cost = self._session.cost
        self._costs.append((cost.vision_ms + cost.memory_ms + cost.step_ms) / 1000)
        self._newest = self._clock(), time.monotonic() - frame.captured_at

    def late(self, interval_s: float) -> tuple[float | None, float | None]:
        """Seconds that a frame takes, and its age when it was remembered; None where none has been for a while."""
        newest, costs = self._newest, list(self._costs)
        if newest is None or not costs or self._clock() - newest[0] > max(5.0, 3 * interval_s):
            return None, None
        # Of a file that is read as fast as it comes, no frame is late.
        feed = self._session.feed
        live = feed is not None and (isinstance(feed, Camera) or feed.is_live)
        return median(costs), newest[1] if live else None

    def dropped(self) -> int:
        """Frames that were wanted and replaced, since the last call. A file's that plays as a camera are not told apart."""
        feed = self._session.feed
        if not isinstance(feed, LiveSource | Camera):
            return 0
        before, self._dropped = self._dropped, feed.drops["replaced"]
        return max(0, self._dropped - before)

    def usual_s(self) -> float:
        """From one frame to the next without any step: as the bundle asks, or as the source gives them if that is slower."""
        wanted = 1 / self._session.bundle.manifest.sample_fps
        feed = self._session.feed
        arrivals = None if feed is None else feed.arrivals
        return max(wanted, (arrivals.interval_s or 0.0) if arrivals is not None else 0.0)


class LiveGovernor:
    """Looks at the machine and at live sessions every so often, and turns their knobs. A context manager; at its end all is full.

    Args:
        sessions: that share this machine, and perhaps a language model.
        steps: as declared; those that can't be taken here are left out, and `refused` says why.
        sensors: what reads them.
        limits: see there.
        every_s: seconds from one look to the next.
        tell: called with a line for each change, on the governor's thread.
        clock: seconds, for tests.

    Attributes:
        refused: steps that can't be taken on this machine, each with why.
        blind: whether no temperature, or throttling, can be read: memory, backlog and CPU cores are then all that is watched.
    """

    def __init__(
        self,
        sessions: Session | Sequence[Session],
        steps: Sequence[Turn],
        sensors: SensorsLike,
        *,
        limits: Limits | None = None,
        every_s: float = 1.0,
        tell: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sessions = (sessions,) if isinstance(sessions, Session) else tuple(sessions)
        self._knobs = Knobs(self.sessions)
        usable, self.refused, idle = self._knobs.sorted_out(steps)
        self._turns = {step.name: step for step in usable}
        self._tell = tell
        self.governor = Governor(usable, limits, clock, None if tell is None else lambda transition: tell(str(transition)))
        self._gauge, self._sensors = Gauge(limits), sensors
        self._cores = CoreUse()
        self._frames = [_Frames(session, clock) for session in self.sessions]
        self._usual_s = [one.usual_s() for one in self._frames]
        self._prefill: list[Prefill | None] = [model.newest_prefill for model in self._knobs.models]
        self._pending = False
        self._every_s, self._stop = every_s, threading.Event()
        self._thread: threading.Thread | None = None
        self.reading = sensors.read()
        self.blind = not self.reading.throttled and all(zone.throttles_at is None for zone in self.reading.temperatures)
        for step in idle:
            _log.info("%s changes nothing here, and is left out.", step)
        for step, why in self.refused.items():
            self._say(f"[governor] without {step}: {why}")
        if usable and self.blind:
            self._say("[governor] no sensor here tells when the machine is too hot: memory, backlog and CPU cores are watched")

    def look(self) -> int:
        """Look once, and act on it; the level from now on.

        A knob that can't be turned is told, logged and tried again at the next look.
        """
        self.reading = self._sensors.read()
        before = self.governor.level
        level = self.governor.observe(self._gauge.pressure(self.reading, self.load()))
        if level != before or self._pending:
            self._turn()
        return level

    def load(self) -> Load:
        """What the sessions say of themselves since the last look. They share an encoder: a frame of each must fit in."""
        now, milder = self._factors()
        if now == 1:  # while frames are left out, nothing says how many there would be
            self._usual_s = [frames.usual_s() for frames in self._frames]
        shares, ages, dropped = [], [], 0
        for frames, usual_s in zip(self._frames, self._usual_s, strict=True):
            frame_s, age_s = frames.late(usual_s * now)
            dropped += frames.dropped()
            if frame_s is not None:
                shares.append(frame_s / usual_s)
            if age_s is not None:
                ages.append(age_s)
        usual_s = min(self._usual_s)
        need_bytes, full_bytes = self._needs()
        return Load(
            sum(shares) * usual_s if shares else None, usual_s * now, usual_s * milder, dropped if now == 1 else 0,
            max(ages, default=None), need_bytes, full_bytes, self._cores.cores, self._cores.others(),
            max((model.n_threads for model in self._knobs.models), default=0), max(self._knobs.full_threads, default=0),
            self._prefill_row_s(),
        )  # fmt: skip

    def metrics(self) -> dict[str, Any]:
        """Counters for a monitor: see `Governor.metrics`."""
        return self.governor.metrics()

    def status(self) -> list[str]:
        """Level, causes, since when, and what the sensors say: lines for the screen."""
        governor = self.governor
        lines = [f"level {governor.level} of {len(governor.steps)}, for {governor.since_s:.0f} s"]
        lines += [f"  {step}, {cause}: {why}" for step, cause, why in governor.on]
        pressure = governor.pressure
        lines += [f"  {cause} presses: {pressure.over[cause]}" for cause in CAUSES if cause in pressure.over]
        lines += [f"  without {step}: {why}" for step, why in self.refused.items()]
        return [*lines, *_sensed(self.reading)]

    def start(self) -> None:
        """Look every so often, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="keepsight-governor", daemon=True)
        self._thread.start()

    def close(self, *, restore: bool = True) -> None:
        """Stop, and turn every knob to full. Closing twice does nothing.

        Args:
            restore: False leaves the knobs as they are, where the sessions end anyway: a full context would need memory again.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if restore and self.governor.level:
            self._knobs.turn((), self._usual_s)

    def __enter__(self) -> LiveGovernor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()

    def _say(self, line: str, level: int = logging.INFO) -> None:
        _log.log(level if self._tell is None else logging.INFO, "%s", line)
        if self._tell is not None:
            self._tell(line)

    def _turn(self) -> None:
        on = [(self._turns[step.name], cause) for step, cause, _ in self.governor.on]
        try:
            self._pending = not self._knobs.turn(on, self._usual_s)
        except KeepsightError as error:
            if not self._pending:
                self._say(f"[governor] {error}", logging.ERROR)
            self._pending = True

    def _factors(self) -> tuple[float, float]:
        """By how much frames are further apart than usual, now and with one step against it less."""
        on = [self._turns[step.name] for step, _, _ in self.governor.on]
        factors = [1.0, 1.0, *(float(1 / step.to) for step in on if step.knob == "rate")]
        return factors[-1], factors[-2]

    def _needs(self) -> tuple[int, int]:
        """Bytes that the sessions may still take, as things are and at full: of their banks, and of contexts made smaller."""
        now, models = 0, zip(self._knobs.models, self._knobs.full_ctx, strict=True)
        full = sum(model.position_bytes * (positions - model.n_ctx) for model, positions in models)
        for session in self.sessions:
            visual = [session.qformer.bank] if session.qformer.bank_on == "host" else []  # a device's is all there from the start
            for bank in (*visual, *(one.carried.bank for one in session.standing)):
                by_slot = bank.nbytes // bank.slots
                full += by_slot * (bank.slots - bank.used)
                now += by_slot * max(0, min(session.qformer.limit + 1, bank.slots) - bank.used)
        return now, full

    def _prefill_row_s(self) -> float | None:
        """Seconds a row of a prompt that has been read since the last look: the slowest."""
        newest = [model.newest_prefill for model in self._knobs.models]
        fresh = [now for now, before in zip(newest, self._prefill, strict=True) if now is not None and now is not before]
        self._prefill = newest
        rows = [one.seconds / (one.rows - one.reused) for one in fresh if one.rows - one.reused >= _PROMPT_ROWS]
        return max(rows, default=None)


def _sensed(reading: Reading) -> Iterator[str]:
    for zone in reading.temperatures:
        limit = "" if zone.throttles_at is None else f", throttles at {zone.throttles_at:.0f} C"
        yield f"  {zone.zone} {zone.celsius:.1f} C{limit}"
    if reading.watts is not None:
        yield f"  {reading.watts:.1f} W"
    if reading.memory_available is not None and reading.memory_total:
        yield f"  memory {reading.memory_available / 1e9:.1f} of {reading.memory_total / 1e9:.1f} GB available"
    if reading.swap_total and reading.swap_free is not None:
        yield f"  swap {(reading.swap_total - reading.swap_free) / 1e9:.2f} of {reading.swap_total / 1e9:.1f} GB used"
    if reading.throttled:
        yield f"  throttled: {', '.join(reading.throttled)}"


@contextmanager
def governed(
    sessions: Session | Sequence[Session], spelling: str, tell: Callable[[str], None], sensors: SensorsLike | None = None
) -> Iterator[LiveGovernor | None]:
    """A governor of live sessions as the command line asks for it; None for `off`.

    Raises:
        UsageError: steps that are misspelled.
    """
    steps = parse_steps(spelling)
    if not steps:
        yield None
        return
    if sensors is None:
        from keepsight.runtime.sensors import Sensors

        sensors = Sensors()
    governor = LiveGovernor(sessions, steps, sensors, tell=tell)
    governor.start()
    try:
        yield governor
    finally:
        governor.close(restore=False)
