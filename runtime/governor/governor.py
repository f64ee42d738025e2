"""When a live session does less, and when it does all of it again: a state machine, without sensors or a session of its own.

It takes what presses at a moment (`Pressure`) and turns declared steps (`Step`) on and off, one at a time. A step is turned on
soon: when something that it helps against has pressed for some seconds. It is turned off late: when nothing that it helps against
has even been near its limit for much longer; and if the pressure then comes back, the next time later still. Between "over" and
"calm" lies "near", where nothing changes, so a reading that trembles around a limit moves nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from keepsight.streams.errors import UsageError

__all__ = ["CAUSES", "Cause", "Governor", "Limits", "Pressure", "Step", "Transition"]

Cause = Literal["heat", "memory", "backlog", "cpu"]
"""What may press: thermal throttling; too little memory; frames that come faster than they are remembered; busy CPU cores."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

_log = logging.getLogger("keepsight.governor")


@dataclass(frozen=True)
class Step:
    """One declared way to do less.

    Attributes:
        name: its spelling, `rate=1/2`, which tells it from all others.
        against: what it helps against.
    """

    name: str
    against: frozenset[Cause]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pressure:
    """What presses at one moment, each with the reason in words.

    Attributes:
        over: what is past its limit.
        near: what is not, but would be soon if more were done again.
    """

    over: Mapping[Cause, str] = field(default_factory=dict)
    near: Mapping[Cause, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Where pressure begins, and how patient the governor is.

    Attributes:
        heat_over_k, heat_near_k: degrees below the temperature at which the kernel slows the machine down.
        memory_floor: bytes that must stay available beside what the session may still need; None: 4 % of all, 256 MiB to 1 GiB.
        memory_near: of that floor, what is near.
        swap_growth: bytes of swap that fill within `swap_window_s`.
        late_over, late_near: time that a frame takes, as a share of the time from one remembered frame to the next.
        age_s: a frame is late if it is this much older than two such intervals when it has been remembered.
        crowding_over, crowding_near: CPU cores by which the language model's threads and other processes exceed what there is.
        prefill_over: how many times its usual time a row of a prompt takes.
        degrade_after_s: how long something must press before a step is turned on.
        dwell_s: the shortest time between two changes.
        recover_after_s: how long all must be calm before a step is turned off.
        patience: the most that `recover_after_s` is multiplied by for a step that is turned on again and again.
    """

    heat_over_k: float = 2.0
    heat_near_k: float = 7.0
    memory_floor: int | None = None
    memory_near: float = 1.5
    swap_growth: int = 32 << 20
    swap_window_s: float = 10.0
    late_over: float = 0.9
    late_near: float = 0.7
    age_s: float = 1.0
    crowding_over: float = 0.4
    crowding_near: float = 0.2
    prefill_over: float = 5.0
    degrade_after_s: float = 3.0
    dwell_s: float = 5.0
    recover_after_s: float = 30.0
    patience: int = 16


@dataclass(frozen=True)
class Transition:
    """A change, or that nothing is left to change.

    Attributes:
        kind: `degraded`, `recovered`, or `exhausted`: something presses, and no step that helps against it is left.
        level: steps that are on now.
        step: that was turned on or off; None for `exhausted`.
        cause: what pressed, or no longer does.
        why: in words.
        time_s: by the governor's clock.
    """

    kind: Literal["degraded", "recovered", "exhausted"]
    level: int
    step: Step | None
    cause: Cause
    why: str
    time_s: float

    def __str__(self) -> str:
        """A line for the screen and the log."""
        what = {"degraded": f"{self.step} on", "recovered": f"{self.step} off", "exhausted": "nothing left to leave out"}
        return f"[governor {self.level}] {what[self.kind]}, {self.cause}: {self.why}"


class Governor:
    """Decides which steps are on. Not thread-safe: one thread observes; any may read what it said.

    Args:
        steps: in the order in which they are turned on; off they go in the opposite one.
        limits: see there.
        clock: seconds, never going back.
        tell: called with each transition. All are logged by `keepsight.governor`, too; as warnings, if nobody is told.

    Raises:
        UsageError: a step twice, one that helps against nothing, or times that make no sense.

    >>> governor = Governor([Step("rate=1/2", frozenset({"heat"}))], Limits(degrade_after_s=0), lambda: 0.0)
    >>> governor.observe(Pressure({"heat": "gpu-thermal has 96 C"}))
    1
    """

    def __init__(
        self,
        steps: Sequence[Step],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[Transition], None] | None = None,
    ) -> None:
        self.steps, self.limits = tuple(steps), limits or Limits()
        if len({step.name for step in steps}) < len(steps) or not all(step.against for step in steps):
            raise UsageError("A step of the governor is there twice, or helps against nothing.", fix="Name each once.")
        if min(self.limits.degrade_after_s, self.limits.dwell_s, self.limits.recover_after_s) < 0 or self.limits.patience < 1:
            raise UsageError(f"{self.limits} make no sense.", fix="Give times from 0 on, and a patience from 1 on.")
        self._clock, self._tell = clock, tell
        self._on: list[tuple[Step, Cause, str]] = []
        self._over_since: dict[Cause, float] = {}
        self._calm_since: dict[Cause, float] = {}
        self._exhausted: set[Cause] = set()
        self._off_at: dict[Step, float] = {}
        self._patience: Counter[Step] = Counter()
        self._changed_at = self._looked_at = clock()
        self._taken: Counter[Cause] = Counter()
        self._recovered = 0
        self._seconds = [0.0] * (len(self.steps) + 1)
        self.transitions: deque[Transition] = deque(maxlen=64)
        self.pressure = Pressure()

    @property
    def level(self) -> int:
        """How many steps are on, from 0 to all."""
        return len(self._on)

    @property
    def on(self) -> tuple[tuple[Step, Cause, str], ...]:
        """The steps that are on, in the order in which they came, each with its cause and why."""
        return tuple(self._on)

    @property
    def since_s(self) -> float:
        """Seconds since the last change, or since the start."""
        return self._clock() - self._changed_at

    def observe(self, pressure: Pressure) -> int:
        """Take in what presses now, and change at most one step; the level from now on."""
        now = self._clock()
        self._seconds[self.level] += now - self._looked_at
        self._looked_at, self.pressure = now, pressure
        self._note_since(pressure, now)
        rested = now - self._changed_at >= self.limits.dwell_s or not self._taken
        if rested and not self._degrade(pressure, now):
            self._recover(now)
        return self.level

    def metrics(self) -> dict[str, Any]:
        """Counters for a monitor: the level now and at most, steps turned on by cause and off, seconds spent at each level."""
        return {
            "level": self.level,
            "levels": len(self.steps),
            "on": [step.name for step, _, _ in self._on],
            "degraded": {cause: self._taken[cause] for cause in CAUSES},
            "recovered": self._recovered,
            "seconds_at_level": [round(seconds, 3) for seconds in self._seconds],
        }

    def _note_since(self, pressure: Pressure, now: float) -> None:
        """How long each cause has been over its limit, or calm, without a break."""
        for cause in CAUSES:
            over = cause in pressure.over
            since, other = (self._over_since, self._calm_since) if over else (self._calm_since, self._over_since)
            other.pop(cause, None)
            if not over:
                self._exhausted.discard(cause)
            if not over and cause in pressure.near:
                since.pop(cause, None)
            else:
                since.setdefault(cause, now)

    def _degrade(self, pressure: Pressure, now: float) -> bool:
        """Turn on the first step that helps against what has pressed long enough."""
        pressing = [cause for cause, since in self._over_since.items() if now - since >= self.limits.degrade_after_s]
        on = {step for step, _, _ in self._on}
        for step in self.steps:
            cause = next((cause for cause in pressing if cause in step.against), None)
            if cause is not None and step not in on:
                self._turn_on(step, cause, pressure.over[cause], now)
                return True
        for cause in pressing:
            if cause not in self._exhausted:
                self._exhausted.add(cause)
                self._say(Transition("exhausted", self.level, None, cause, pressure.over[cause], now))
        return False

    def _turn_on(self, step: Step, cause: Cause, why: str, now: float) -> None:
        again = now - self._off_at.get(step, -float("inf")) <= 2 * self._wait_s(step)
        self._patience[step] = min(2 * max(1, self._patience[step]), self.limits.patience) if again else 1
        self._on.append((step, cause, why))
        self._taken[cause] += 1
        self._changed_at = now
        self._say(Transition("degraded", self.level, step, cause, why, now))

    def _recover(self, now: float) -> None:
        """Turn off the last step that came of those against which nothing has pressed for long enough."""
        for index in reversed(range(len(self._on))):
            step, cause, _ = self._on[index]
            if not all(other in self._calm_since for other in step.against):
                continue
            calm_s = now - max(self._changed_at, *(self._calm_since[other] for other in step.against))
            if calm_s >= self._wait_s(step):
                del self._on[index]
                self._off_at[step] = self._changed_at = now
                self._recovered += 1
                self._say(Transition("recovered", self.level, step, cause, f"calm for {calm_s:.0f} s", now))
                return

    def _wait_s(self, step: Step) -> float:
        return self.limits.recover_after_s * max(1, self._patience[step])

    def _say(self, transition: Transition) -> None:
        self.transitions.append(transition)
        # Warnings go to the screen where nobody has set up logging: not twice.
        quiet = self._tell is not None or transition.kind == "recovered"
        _log.log(logging.INFO if quiet else logging.WARNING, "%s", transition)
        if self._tell is not None:
            self._tell(transition)
