"""What a source that is kept up went through: its states, each with the moment and the reason."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Event", "EventLog", "State"]

State = Literal["connecting", "live", "stalled", "lost"]
"""Of a source that is kept up:

- connecting: opened, and no frame yet;
- live: frames come;
- stalled: it should have given a frame by now, and may still;
- lost: it was given up, and is tried again after a pause.
"""

_log = logging.getLogger("keepsight.streams")


@dataclass(frozen=True, slots=True)
class Event:
    """A source came into a state, or failed once more in it.

    Attributes:
        t: seconds since the source was started.
        state: the one it came into.
        reason: why, without passwords.
    """

    t: float
    state: State
    reason: str


class EventLog:
    """The newest events, and the state they led to.

    Args:
        kept: how many are kept; older ones are forgotten.
        on_event: called with each, on the thread that found it, which waits. What it raises is logged, and changes nothing.
    """

    def __init__(self, kept: int = 256, on_event: Callable[[Event], None] | None = None) -> None:
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=kept)
        self._on_event = on_event

    @property
    def state(self) -> State:
        """The newest event's; connecting before the first."""
        with self._lock:
            return self._events[-1].state if self._events else "connecting"

    @property
    def events(self) -> list[Event]:
        """Oldest first."""
        with self._lock:
            return list(self._events)

    def start(self) -> None:
        """Count time from now."""
        self.started = time.monotonic()

    def add(self, state: State, reason: str) -> None:
        """Note that this happened now."""
        event = Event(time.monotonic() - self.started, state, reason)
        with self._lock:
            self._events.append(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # a fault in what only looks on must not take the camera down
            _log.exception("on_event failed for %s", event)
