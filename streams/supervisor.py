"""Keeps one live source up: opens it, watches it, gives it up, waits, opens it again, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from keepsight.streams.backoff import Backoff, Reconnect
from keepsight.streams.capture import Arrivals, Capture
from keepsight.streams.errors import KeepsightError, MissingComponentError, NoFrameError, UsageError
from keepsight.streams.events import EventLog
from keepsight.streams.faults import RefusedError, lost, silence_of
from keepsight.streams.patience import Errand
from keepsight.streams.presence import is_reachable
from keepsight.streams.uri import SourceURI
from keepsight.streams.watchdog import Watchdog

__all__ = ["Supervisor"]

_LOOK_S = 0.05  # how often a connection is looked at
_PROBE_S = 0.7  # between two looks at a port or a device that is not there
_UNANSWERED_S = 1.0  # a first frame is usually there by then: after that it is worth asking whether the port is open
_SAID_AFTER_S = 2.4  # whoever looks on should not have to wait for the end of a connection's time
_SETTLED_S = 2.0  # a connection that lasted so long ends the growth of the pauses
_TEARDOWN_S = 2.0
_TOLD_EVERY_S = 10.0  # pictures that can't be decoded may come by the hundred
_ANSWERS = {None: "", True: ": it accepts connections, and says nothing", False: ": it can't be reached"}


class Supervisor:
    """Owns the connections of one source, one after the other. The reader takes frames from the `current` one itself.

    So a slow reader delays nothing here, and a frame that nobody asks for is never copied out of GStreamer.

    Args:
        uri: the source.
        connect: opens it: checks that it is there, builds a pipeline from scratch, and starts it.
        log: where states and reasons go.
        reconnect: when to try again.
        watchdog: when a silence is a stall.
        first_frame_s: seconds that a connection has for its first frame.
        on_loss: called with what each connection was lost to.
    """

    def __init__(
        self,
        uri: SourceURI,
        connect: Callable[[], Capture],
        log: EventLog,
        *,
        reconnect: Reconnect,
        watchdog: Watchdog,
        first_frame_s: float,
        on_loss: Callable[[KeepsightError], None] | None = None,
    ) -> None:
        self._uri, self._connect, self._log, self._on_loss = uri, connect, log, on_loss
        self._reconnect, self._watchdog, self._first_frame_s = reconnect, watchdog, first_frame_s
        self._backoff = Backoff(reconnect)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._look = threading.Event()  # there is something to see before the next look is due
        self._thread: threading.Thread | None = None
        self._current: tuple[int, Capture] | None = None
        self._failure: BaseException | None = None
        self._over = False
        self._lost_at: float | None = None  # when the outage began that is going on
        self._last_frame: float | None = None
        self._damaged = self._corrupted = 0  # of connections that are over
        self.arrivals: Arrivals | None = None  # as the newest connection that gave frames has them
        self.generations = 0  # connections that have delivered frames and are over
        self.attempts = 0
        self.unread = 0  # frames that were replaced on connections that were lost before anybody read on
        self.stuck_teardowns = 0

    def start(self) -> None:
        """Begin; a second call does nothing."""
        with self._changed:
            if self._thread is not None or self._closing.is_set():
                return
            self._thread = threading.Thread(target=self._run, name="keepsight-supervisor", daemon=True)
        self._log.start()
        self._thread.start()

    def close(self) -> None:
        """Stop, within a few seconds whatever the source does. Closing twice does nothing."""
        self._closing.set()
        self._look.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_TEARDOWN_S + 1.0)

    @property
    def closed(self) -> bool:
        return self._closing.is_set()

    @property
    def damaged(self) -> int:
        """Pictures that came and could not be decoded, of all connections."""
        with self._changed:
            return self._damaged + (0 if self._current is None else self._current[1].ledger.lost)

    @property
    def corrupted(self) -> int:
        """Pictures that the decoder gave and marked as damaged, of all connections."""
        with self._changed:
            return self._corrupted + (0 if self._current is None else self._current[1].ledger.corrupted)

    def current(self, timeout_s: float) -> tuple[int, Capture] | None:
        """The connection that frames come from, with its generation; None if there is none within so many seconds.

        Raises:
            KeepsightError: the source was given up.
        """
        with self._changed:
            if self._current is None:
                self._changed.wait_for(lambda: self._current is not None or self._over or self.closed, timeout_s)
            if self._failure is not None:
                raise self._failure
            return self._current

    def pause(self, timeout_s: float) -> None:
        """Wait for so long, or until there is another connection or none any more."""
        with self._changed:
            self._changed.wait(timeout_s)

    def delivered(self) -> None:
        """Tell that the first frame of a connection has been read; on return the state says so too."""
        self._look.set()
        with self._changed:
            self._changed.wait_for(lambda: self._log.state == "live" or self._current is None, 2 * _LOOK_S)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.closed:
                error = self._one_connection()
                if error is None or not self._waited(error):
                    break
        except BaseException as error:  # whatever it is, the reader must hear of it: here nobody would
            self._failure = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _one_connection(self) -> KeepsightError | None:
        """Open the source and see to it until it is lost; what it was lost to, or None when closed."""
        self.attempts += 1
        self._log.add("connecting", "started" if self.attempts == 1 else f"attempt {self.attempts}")
        try:
            capture = self._opened()
        except KeepsightError as error:
            return _bare(error)
        if capture is None:
            return None
        with self._changed:
            self._current = (self.generations, capture)
            self._changed.notify_all()
        try:
            return self._attended(capture)
        finally:
            self._retire(capture)

    def _opened(self) -> Capture | None:
        errand = Errand(self._connect, discard=Capture.close)
        until = time.monotonic() + self._first_frame_s
        while not errand.wait(_LOOK_S):
            if (self.closed or time.monotonic() > until) and errand.abandon():
                if self.closed:
                    return None
                raise NoFrameError(
                    f"{self._uri} could not be opened within {self._first_frame_s:g} s: its driver hangs.",
                    fix="Plug it in again, or restart the machine if that does not help.",
                )
        return errand.result(0.0)

    def _attended(self, capture: Capture) -> KeepsightError | None:
        """Look at a connection until it is lost."""
        began = time.monotonic()
        edge, damage = _Edge(self._uri), _Damage(capture)
        stalled_at: float | None = None
        told = False
        while not self._due():
            arrivals, now = capture.arrivals, time.monotonic()
            if arrivals.last is not None:
                self.arrivals = arrivals
                silent = now - arrivals.last
                # Before it is asked what ended it: a connection that gave a single frame was live.
                if silent <= self._watchdog.limit_s(arrivals) and (stalled_at is not None or self._log.state != "live"):
                    self._went_live(arrivals, began)
                    stalled_at = None
            try:
                capture.check()
            except KeepsightError as error:
                return _bare(error)
            if arrivals.last is None:
                if now - began > self._first_frame_s:
                    return silence_of(self._uri, self._first_frame_s)
                if now - began > _UNANSWERED_S and edge.rose(now):
                    return lost(self._uri, "it can be reached only now")
                if now - began > _SAID_AFTER_S and not told:
                    told = True
                    self._log.add("connecting", f"no frame yet after {now - began:.1f} s{_ANSWERS[edge.here]}")
                continue
            if (damaged := damage.news(now)) is not None:
                self._log.add(self._log.state, damaged)
            if now - began > _SETTLED_S:
                self._backoff.settle()
            if silent <= self._watchdog.limit_s(arrivals):
                continue
            if stalled_at is None:
                stalled_at = now
                self._log.add("stalled", f"no frame for {silent:.1f} s{_usual(self._watchdog.interval_s(arrivals))}")
            if now - stalled_at >= self._watchdog.grace_s(arrivals):
                return lost(self._uri, f"no frame for {silent:.1f} s")
        return None

    def _due(self) -> bool:
        """Wait until it is time to look again; whether that is never."""
        self._look.wait(_LOOK_S)
        self._look.clear()
        return self.closed

    def _went_live(self, arrivals: Arrivals, began: float) -> None:
        assert arrivals.last is not None
        size = "" if arrivals.size is None else f" of {arrivals.size[0]}x{arrivals.size[1]}"
        if self._last_frame is None:
            self._log.add("live", f"first frame{size} after {arrivals.last - began:.2f} s")
        else:
            self._log.add("live", f"frames{size} again, {arrivals.last - self._last_frame:.1f} s after the last one")
        self._lost_at = None
        with self._changed:
            self._changed.notify_all()

    def _retire(self, capture: Capture) -> None:
        """Take a connection down, from a thread that may hang in it."""
        with self._changed:
            self._damaged += capture.ledger.lost
            self._corrupted += capture.ledger.corrupted
            self._current = None
            self._changed.notify_all()
        arrivals = capture.arrivals
        if arrivals.count:
            self.generations += 1
            self._last_frame = arrivals.last
            self.unread += capture.unread
        self._watchdog.learn(arrivals, stalled=self._log.state == "stalled")
        if not Errand(capture.close).wait(_TEARDOWN_S):
            self.stuck_teardowns += 1
            self._log.add(
                self._log.state,
                f"the connection has not closed within {_TEARDOWN_S:g} s and is left behind ({self.stuck_teardowns} so far)",
            )

    def _waited(self, error: KeepsightError) -> bool:
        """Say what was lost, and wait for the next try; False if there is to be none."""
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        outage_s = now - self._lost_at
        if self.closed:
            return False
        if self._on_loss is not None:
            self._on_loss(error)
        if self._is_final(error, outage_s):
            self._log.add("lost", error.message)
            self._failure = error
            return False
        pause_s = self._backoff.pause_s(outage_s, refused=isinstance(error, RefusedError))
        self._log.add("lost", f"{error.message} {_plan(error, pause_s)}")
        edge = _Edge(self._uri)
        until = now + pause_s
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(_LOOK_S, left)):
            if left > _LOOK_S and edge.rose(time.monotonic()):
                break
        return not self.closed

    def _is_final(self, error: KeepsightError, outage_s: float) -> bool:
        if isinstance(error, (UsageError, MissingComponentError)):  # no camera mends these
            return True
        if self.generations == 0 and self._reconnect.at_start == "fail":
            return True
        patience = self._reconnect.give_up_after_s
        return patience is not None and outage_s >= patience


class _Edge:
    """Finds the moment at which a source that could not be reached can be reached."""

    def __init__(self, uri: SourceURI) -> None:
        self._uri = uri
        self._next = 0.0
        self._was_away = self._knows_all = False
        self.here: bool | None = None  # at the last look

    def rose(self, now: float) -> bool:
        """Whether it came back since the last look. Looks are taken `_PROBE_S` apart, and only while it is away."""
        if self._knows_all or now < self._next:
            return False
        self._next = now + _PROBE_S
        here = self.here = is_reachable(self._uri)
        self._knows_all = here is not False  # open from the start, or nothing to look at: the reason is another one
        back, self._was_away = bool(here) and self._was_away, here is False
        return back


class _Damage:
    """Says when a decoder has lost pictures, now and then."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._told = 0
        self._next = 0.0

    def news(self, now: float) -> str | None:
        ledger = self._capture.ledger
        lost = ledger.lost
        if lost == self._told or now < self._next:
            return None
        self._told, self._next = lost, now + _TOLD_EVERY_S
        return f"{lost} of {ledger.total} pictures of this connection could not be decoded"


def _bare(error: KeepsightError) -> KeepsightError:
    """Without its traceback, whose frames hold the connection: its sockets would stay until Python looks for cycles."""
    return error.with_traceback(None)


def _usual(interval_s: float | None) -> str:
    return "" if interval_s is None else f", where one came every {interval_s:.2g} s"


def _plan(error: KeepsightError, pause_s: float) -> str:
    if isinstance(error, RefusedError):
        return f"Next try in {pause_s:.1f} s: cameras lock accounts that are tried too often."
    return "Trying again at once." if pause_s == 0 else f"Next try in {pause_s:.1f} s."
