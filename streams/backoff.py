"""How long to wait before a lost source is tried again."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from keepsight.streams.errors import UsageError

__all__ = ["Backoff", "Reconnect"]

_JITTER = 0.6  # pauses are this much of their length or more: cameras that were lost together don't come back as one crowd


@dataclass(frozen=True, slots=True)
class Reconnect:
    """When to try again.

    The first try is made at once. The pauses between the following ones double from `first_s` up to `cap_s`. An outage that is
    still shorter than `eager_s` has pauses of at most `eager_pause_s`: a camera that restarts, or a cable that was moved,
    must not be found only after a pause as long as the outage itself. Where it can be told cheaply that a source is there
    again (a port that was closed and is open, a device that was gone and is back), the rest of a pause is left out.

    Attributes:
        at_start: `fail` raises what the very first try meets; `wait` keeps trying a camera that has never been there.
        first_s: the shortest pause.
        cap_s: the longest pause. One who was refused for a wrong password waits this long at once: cameras lock accounts.
        eager_s: seconds after the loss in which it is tried often.
        eager_pause_s: the longest pause in that time.
        give_up_after_s: raise once a source has been away for so long; None never does.
    """

    at_start: Literal["fail", "wait"] = "fail"
    first_s: float = 0.25
    cap_s: float = 5.0
    eager_s: float = 6.0
    eager_pause_s: float = 0.6
    give_up_after_s: float | None = None

    def __post_init__(self) -> None:
        if self.at_start not in ("fail", "wait"):
            raise UsageError(f"at_start={self.at_start!r} is not known.", fix="Use 'fail' or 'wait'.")
        for name in ("first_s", "cap_s", "eager_s", "eager_pause_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name}={value} is not a length of time.", fix="Give seconds, 0 or more.")


class Backoff:
    """Pauses of one source, growing from try to try.

    Args:
        policy: their lengths.
        rng: for the jitter.

    >>> backoff = Backoff(Reconnect(first_s=1.0, cap_s=4.0, eager_s=0.0))
    >>> backoff.pause_s(10.0), 0.6 <= backoff.pause_s(10.0) <= 1.0, backoff.pause_s(10.0, refused=True) <= 4.0
    (0.0, True, True)
    """

    def __init__(self, policy: Reconnect, rng: random.Random | None = None) -> None:
        self.policy = policy
        self._rng = random.Random() if rng is None else rng
        self._tries = 0

    def pause_s(self, outage_s: float, *, refused: bool = False) -> float:
        """The pause before the next try.

        Args:
            outage_s: for how long the source has been lost.
            refused: it is there, and wants another password.
        """
        tries, self._tries = self._tries, self._tries + 1
        if refused:
            return self.policy.cap_s
        if tries == 0:
            return 0.0
        # The exponent is bounded: a camera may be away for weeks.
        longest = min(self.policy.first_s * 2.0 ** min(tries - 1, 30), self.policy.cap_s)
        if outage_s < self.policy.eager_s:
            longest = min(longest, self.policy.eager_pause_s)
        return longest * self._rng.uniform(_JITTER, 1.0)

    def settle(self) -> None:
        """The source is back for good: the next loss is tried at once again."""
        self._tries = 0
