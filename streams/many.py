"""Many cameras and one consumer: batches of the newest frames, shared fairly, where no camera waits for another."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Arrivals
from keepsight.streams.errors import KeepsightError, UsageError
from keepsight.streams.events import Event, State
from keepsight.streams.frame import Frame
from keepsight.streams.live import LiveSource

__all__ = ["Batch", "Budget", "Camera", "Cameras", "Feed", "jain_index"]

Batch = list[tuple[str, Frame]]

_PULL_S = 0.25  # how soon a reader that waits for a frame notices that it should stop
_CLOSE_S = 5.0


class Feed(Protocol):
    """What a camera is read from: a `LiveSource`, or something like it."""

    @property
    def state(self) -> State: ...

    @property
    def events(self) -> list[Event]: ...

    @property
    def drops(self) -> Counter[str]: ...

    @property
    def arrivals(self) -> Arrivals | None: ...

    def latest(self, timeout_s: float | None = None) -> Frame | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """What one camera may ask of the consumer.

    Attributes:
        fps: at most so many frames a second; None is every frame. What is beyond that is never copied out of GStreamer.
        weight: its share, when the consumer can't take everything: a camera of weight 2 gets twice the frames of one of weight 1.

    Raises:
        UsageError: a rate or a weight that is not above 0.
    """

    fps: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("fps", self.fps), ("weight", self.weight)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"a budget with {name}={value} makes no sense.", fix="Give a number above 0.")


class Camera:
    """One of `Cameras`: read by a thread of its own into a place for one frame, which a newer frame takes over.

    Nothing that this camera does (a slow name server, a driver that hangs, a server that says nothing) is waited for by anybody
    else than that thread.
    """

    def __init__(self, name: str, feed: Feed, budget: Budget, ready: _Ready) -> None:
        self.name, self.budget = name, budget
        self.served = 0
        self.error: KeepsightError | None = None
        self._feed, self._ready = feed, ready
        self._replaced = self._over_budget = 0
        self._frame: Frame | None = None
        self._tag = self._finish = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"keepsight-camera-{name}", daemon=True)

    @property
    def state(self) -> State:
        """`connecting`, `live`, `stalled` or `lost` (and with an `error`, for good)."""
        return "lost" if self.error is not None else self._feed.state

    @property
    def events(self) -> list[Event]:
        """What happened to it since its start, oldest first."""
        return self._feed.events

    @property
    def drops(self) -> Counter[str]:
        """Frames that came and were not handed over, by cause: `live.Drop`'s, and `over-budget`, beyond its `Budget.fps`."""
        drops = Counter(self._feed.drops)
        with self._ready.changed:
            # The feed can't know why it was not read: those that it counts from a pause are the budget's.
            drops["replaced"] += self._replaced - self._over_budget
            drops["over-budget"] = self._over_budget
        drops["replaced"] = max(0, drops["replaced"])
        return drops

    @property
    def arrivals(self) -> Arrivals | None:
        """Rate and size of what it sends; None before the first frame."""
        return self._feed.arrivals

    def __repr__(self) -> str:
        return f"Camera({self.name!r}, state={self.state!r}, served={self.served})"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop reading, within a few seconds whatever the camera does."""
        self._closing.set()
        self._feed.close()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    # -- the reader's thread ---------------------------------------------------------------------------------------

    def _read(self) -> None:
        pace = None if self.budget.fps is None else _Pace(self.budget.fps)
        try:
            while not self._closing.is_set():
                paused = pace is not None and self._closing.wait(pace.pause_s())
                if paused:
                    break
                before = self._feed.drops["replaced"] if pace is not None else 0
                frame = self._feed.latest(_PULL_S)
                if frame is None:
                    continue
                # The reader was waiting all the while, except for its pauses.
                left_out = self._feed.drops["replaced"] - before if pace is not None else 0
                self._put(frame, left_out)
                if pace is not None:
                    pace.took()
        except KeepsightError as error:
            with self._ready.changed:
                self.error = error
                self._ready.changed.notify_all()

    def _put(self, frame: Frame, left_out: int) -> None:
        with self._ready.changed:
            self._over_budget += left_out
            if self._frame is None:
                # A camera that had nothing to give for a while has no claim to what it did not use.
                self._tag = max(self._finish, self._ready.virtual_time)
            else:
                self._replaced += 1
            self._frame = frame
            self._ready.changed.notify_all()

    # -- the consumer's --------------------------------------------------------------------------------------------

    @property
    def turn(self) -> tuple[float, float] | None:
        """The smaller, the sooner it is served; None if it has nothing to give. Under the lock."""
        return None if self._frame is None else (self._tag, self._finish)

    def take(self) -> Frame:
        """Give its frame away. Under the lock."""
        frame, self._frame = self._frame, None
        assert frame is not None  # only a camera with a `turn` is asked
        self._finish = self._tag + 1 / self.budget.weight
        self._ready.virtual_time = max(self._ready.virtual_time, self._tag)
        self.served += 1
        return frame


class Cameras(Iterator[Batch]):
    """Several cameras for one consumer, such as an encoder: batches of their newest frames.

    Each camera is a `LiveSource` with a thread and a pipeline of its own. What comes is handed out by start-time fair queueing
    (Goyal, Vin, Cheng 1996) of frames: of the cameras that have a new frame, the one whose share is used least is served first,
    so that a camera of 1 frame/s is never behind more than one frame of each of the others, whatever their rates. Memory is
    bounded: one frame of each camera waits, and a newer one takes its place.

    The addresses are checked at once, the cameras are opened with the first batch asked for, or on entering a `with`. One thread
    takes batches; any thread may close.

    Args:
        uris: address of each camera, by name.
        size: (width, height) of the frames.
        batch: frames that a batch has at most, each of another camera.
        budgets: of some cameras, by name; the others may give every frame, with weight 1.
        gather_s: how long to wait for more cameras once the first frame is there, for an encoder that is better at full batches.
        on_event: called with the camera's name and each `Event` of it, on another thread; it must return soon.
        options: further arguments of each `LiveSource`; unless they say otherwise, a camera that is not there is waited for.
        own: further arguments of some cameras' `LiveSource` alone, by name, such as its branches.
        open_feed: makes what a camera is read from; by default a `LiveSource`.

    Raises:
        UsageError: an address, a name or an option that makes no sense; a file.
        KeepsightError: while reading, when every camera has been given up: why the first one was.

    >>> with Cameras({"door": "test://ball", "yard": "test://smpte"}, size=(64, 48)) as cameras:
    ...     batch = next(cameras)
    >>> {name for name, frame in batch} <= {"door", "yard"}
    True
    """

    def __init__(
        self,
        uris: Mapping[str, str],
        *,
        size: tuple[int, int] | None = None,
        batch: int = 8,
        budgets: Mapping[str, Budget] | None = None,
        gather_s: float = 0.0,
        on_event: Callable[[str, Event], None] | None = None,
        options: Mapping[str, Any] | None = None,
        own: Mapping[str, Mapping[str, Any]] | None = None,
        open_feed: Callable[..., Feed] = LiveSource,
    ) -> None:
        budgets = budgets or {}
        _check(uris, batch, budgets)
        self._ready = _Ready()
        self._batch, self._gather_s = batch, gather_s
        self._started = self._closed = False
        self._cameras: dict[str, Camera] = {}
        # One that is not there yet is no reason to fail: the others are.
        asked = {"reconnect": Reconnect(at_start="wait"), **(options or {})}
        for name, uri in uris.items():
            feed = open_feed(uri, size=size, on_event=_named(name, on_event), **{**asked, **(own or {}).get(name, {})})
            self._cameras[name] = Camera(name, feed, budgets.get(name, Budget()), self._ready)

    @property
    def cameras(self) -> Mapping[str, Camera]:
        """Each camera by its name: its state, events, drops, and why it was given up."""
        return MappingProxyType(self._cameras)

    def start(self) -> None:
        """Open all cameras; a second call does nothing."""
        with self._ready.changed:
            if self._started or self._closed:
                return
            self._started = True
        for camera in self._cameras.values():
            camera.start()

    def batch(self, timeout_s: float | None = None) -> Batch:
        """The next frames, the camera first whose turn it is.

        Args:
            timeout_s: seconds to wait for one; None waits as long as it takes.

        Returns:
            At most one frame of each camera; empty if there was none in time, or after `close`.

        Raises:
            KeepsightError: every camera has been given up.
        """
        self.start()
        with self._ready.changed:
            self._ready.changed.wait_for(lambda: self._closed or self._waiting() > 0 or self._given_up(), timeout_s)
            if self._gather_s > 0 and self._waiting():
                full = min(self._batch, sum(camera.error is None for camera in self._cameras.values()))
                self._ready.changed.wait_for(lambda: self._closed or self._waiting() >= full, self._gather_s)
            if self._closed:
                return []
            taken = self._take()
            if not taken and self._given_up():
                raise next(camera.error for camera in self._cameras.values() if camera.error is not None)
            return taken

    def __next__(self) -> Batch:
        batch = self.batch()
        if not batch:
            raise StopIteration
        return batch

    def close(self) -> None:
        """Close all cameras at once, within a few seconds whatever they do. Closing twice does nothing."""
        with self._ready.changed:
            self._closed = True
            self._ready.changed.notify_all()
        closers = [threading.Thread(target=camera.close, daemon=True) for camera in self._cameras.values()]
        for closer in closers:
            closer.start()
        until = time.monotonic() + _CLOSE_S
        for closer in closers:
            closer.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Cameras:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Cameras({list(self._cameras.values())})"

    def _waiting(self) -> int:
        return sum(camera.turn is not None for camera in self._cameras.values())

    def _given_up(self) -> bool:
        return all(camera.error is not None for camera in self._cameras.values())

    def _take(self) -> Batch:
        turns = [(turn, camera.name) for camera in self._cameras.values() if (turn := camera.turn) is not None]
        return [(name, self._cameras[name].take()) for _, name in sorted(turns)[: self._batch]]


def jain_index(shares: list[float]) -> float:
    """How equal shares are: 1 for all the same, 1/n for one that has everything (Jain, Chiu, Hawe 1984)."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


class _Ready:
    """What the cameras share: a lock, a word that a frame has come, and how far the fair queue has got."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.virtual_time = 0.0


class _Pace:
    """Moments 1 / fps apart, at or after each of which one frame is read; those that were missed are not made up for."""

    def __init__(self, fps: float) -> None:
        self._interval_s = 1 / fps
        self._due = -math.inf

    def pause_s(self) -> float:
        return max(0.0, self._due - time.monotonic())

    def took(self) -> None:
        now = time.monotonic()
        self._due = self._due + self._interval_s if now - self._due < self._interval_s else now + self._interval_s


def _check(uris: Mapping[str, str], batch: int, budgets: Mapping[str, Budget]) -> None:
    if not uris:
        raise UsageError("there is no camera.", fix="Name at least one.")
    if batch < 1:
        raise UsageError(f"a batch of {batch} frames makes no sense.", fix="Give 1 or more.")
    for name in uris:
        if not name or not name.isprintable() or any(character in name for character in ":/ "):
            raise UsageError(f"{name!r} is no name for a camera.", fix="Use letters, digits, '-' and '_'.")
    strangers = [name for name in budgets if name not in uris]
    if strangers:
        raise UsageError(f"there is a budget for {strangers[0]!r}, and no such camera.", fix=f"Cameras are {', '.join(uris)}.")


def _named(name: str, on_event: Callable[[str, Event], None] | None) -> Callable[[Event], None] | None:
    return None if on_event is None else lambda event: on_event(name, event)
