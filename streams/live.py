"""A camera that stays up: `Source` for one connection, this for as many as it takes."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Arrivals, Capture, Picture, Timeouts
from keepsight.streams.errors import KeepsightError, UsageError
from keepsight.streams.events import Event, EventLog, State
from keepsight.streams.frame import Frame, wall_time_of
from keepsight.streams.pipelines import Branch
from keepsight.streams.presence import check_presence
from keepsight.streams.sampling import ChangeSampler, Sampler, sampler_for
from keepsight.streams.supervisor import Supervisor
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import Aspect, Colorimetry, Conversion, Scaler, View
from keepsight.streams.watchdog import Watchdog

__all__ = ["Drop", "LiveSource"]

Drop = Literal["replaced", "stale", "damaged"]
"""Why a frame of a live source was not handed over:

- replaced: a newer one was there before anybody asked;
- stale: it was older than the staleness budget when it would have been handed over;
- damaged: it came, but the decoder gave nothing for it, as after packets that were lost (see `losses.Ledger`).

What `fps` leaves out was not wanted, and what was never received in an outage is a gap: neither is a drop.
"""

_PULL_S = 0.05  # how soon a waiting reader notices that the connection it waits at is gone


class LiveSource(Iterator[Frame]):
    """Frames of a live source, the newest first, over any number of connections.

    A thread of its own opens the source, sees when it ends, hangs or goes away, and opens it again from scratch. The reader gets
    the newest frame that it has not had, or waits. Time goes on over the gaps: `time_s` counts from the first frame of all, by
    the captures' own moments, and `generation` tells the connections apart. Frames keep the size that was asked for, whatever
    the camera switches to; with `size=None` they have the camera's.

    The address is checked at once; the source is opened with the first frame asked for, or on entering a `with`. One thread
    reads; any thread may close, or look at `state`, `events` and `drops`.

    Args:
        uri: of a camera or a test pattern, as `Source` takes it. Files are not live.
        size, aspect, scaler, colorimetry, conversion, hardware_scaling: as of `Source`.
        fps: frames wanted per second by the iterator, the first at or after each `k / fps`; None is every frame.
        every, change: as of `Source`, of the frames that are read.
        reconnect: when to try again, and whether to wait for a camera that is not there at the start.
        stale_after_s: frames older than this are not handed over; None hands over any.
        first_frame_timeout_s: seconds that each connection has for its first frame.
        stall_timeout_s: seconds without a frame that are a stall. None goes by the source's own rate: 2.2 s for 1 frame/s and
            more, 2.9 intervals for slower ones. A connection is given up 1 s (or an interval) later.
        on_event: called with each `Event` as it happens, on another thread; it must return soon.
        on_loss: called likewise with the error of each connection that was lost or could not be made.
        branches: what hangs on the stream beside the frames, of each connection anew.

    Raises:
        UsageError: an address or an option that makes no sense; a file.
        KeepsightError: while reading, with `reconnect.at_start="fail"`: why the very first connection failed; what would have
            raised from `Source`. Later: only when it was given up (`reconnect.give_up_after_s`).

    >>> with LiveSource("test://ball?fps=30", size=(64, 48)) as source:
    ...     frame = next(source)
    >>> frame.image.shape, frame.generation, source.state
    ((48, 64, 3), 0, 'live')
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        size: tuple[int, int] | None = None,
        aspect: Aspect = "stretch",
        scaler: Scaler = "bilinear",
        colorimetry: Colorimetry | None = None,
        conversion: Conversion = "exact",
        fps: float | None = None,
        every: int | None = None,
        change: float | None = None,
        hardware_scaling: bool = False,
        reconnect: Reconnect | None = None,
        stale_after_s: float | None = None,
        first_frame_timeout_s: float = 10.0,
        stall_timeout_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_loss: Callable[[KeepsightError], None] | None = None,
        branches: Sequence[Branch] = (),
    ) -> None:
        self.uri = SourceURI.parse(uri)
        if not self.uri.is_camera:
            raise UsageError(f"{self.uri} is not live.", fix="Read it with Source, which can play it in real time.")
        if stale_after_s is not None and not stale_after_s > 0:
            raise UsageError(f"stale_after_s={stale_after_s} makes no sense.", fix="Give seconds above 0, or None.")
        self._view = View(size, aspect, scaler, colorimetry, conversion, hardware_scaling)
        self._sampler = sampler_for(fps, every, change)
        self._fps, self._stale_after_s = fps, stale_after_s
        self._log = EventLog(on_event=on_event)
        self._supervisor = Supervisor(
            self.uri,
            _connector(self.uri, self._view, Timeouts(first_frame_timeout_s), branches),
            self._log,
            reconnect=reconnect or Reconnect(),
            watchdog=Watchdog(stall_timeout_s, unknown_s=first_frame_timeout_s),
            first_frame_s=first_frame_timeout_s,
            on_loss=on_loss,
        )
        self._drops: Counter[Drop] = Counter()
        self._epoch_s: float | None = None
        self._time_s = 0.0
        self._delivered = 0
        self._generation = -1  # of the newest frame
        self._unseen = 0  # frames replaced since the sampler took one
        self._moment: tuple[int, int] | None = None  # generation, and which k / fps of the sampler's it was
        # Its thread would go on for ever if nobody closed it. The supervisor knows nothing of this object, so it can be.
        self._end = weakref.finalize(self, self._supervisor.close)

    @property
    def is_live(self) -> bool:
        """Always."""
        return True

    @property
    def state(self) -> State:
        """`connecting`, `live`, `stalled` or `lost`."""
        return self._log.state

    @property
    def events(self) -> list[Event]:
        """What happened since the start, oldest first; the newest 256."""
        return self._log.events

    @property
    def drops(self) -> Counter[str]:
        """Frames that arrived and were not handed over, by cause (see `Drop`)."""
        unread = 0 if isinstance(self._sampler, Sampler) else self._supervisor.unread
        replaced = self._drops["replaced"] + unread
        return Counter({"replaced": replaced, "stale": self._drops["stale"], "damaged": self._supervisor.damaged})

    @property
    def dropped(self) -> int:
        """The sum of `drops`."""
        return self.drops.total()

    @property
    def corrupted(self) -> int:
        """Frames that came through although the decoder had marked them as damaged; few decoders do either."""
        return self._supervisor.corrupted

    @property
    def generation(self) -> int:
        """Earlier connections that had delivered frames."""
        return self._supervisor.generations

    @property
    def arrivals(self) -> Arrivals | None:
        """Rate and size of what the newest connection decodes; None before the first frame."""
        return self._supervisor.arrivals

    @property
    def stuck_teardowns(self) -> int:
        """Connections whose driver did not let go of them in time; they were left behind."""
        return self._supervisor.stuck_teardowns

    def latest(self, timeout_s: float | None = None) -> Frame | None:
        """The newest frame that has not been handed over yet, whatever `fps`, `every` and `change` say.

        Args:
            timeout_s: seconds to wait for one; None waits as long as it takes, through outages too.

        Returns:
            None if there was none in time, or the source was closed.

        Raises:
            KeepsightError: the source was given up (see the class).
        """
        return self._next(timeout_s, sampled=False)

    def __next__(self) -> Frame:
        frame = self._next(None, sampled=True)
        if frame is None:
            raise StopIteration
        return frame

    def close(self) -> None:
        """Stop and give everything back, within a few seconds whatever the camera does. Closing twice does nothing."""
        self._end()

    def __enter__(self) -> LiveSource:
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LiveSource({self.uri.redacted!r}, size={self._view.size}, fps={self._fps}, state={self.state!r})"

    def _next(self, timeout_s: float | None, *, sampled: bool) -> Frame | None:
        self._supervisor.start()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._supervisor.closed:
            left = _PULL_S if until is None else until - time.monotonic()
            frame = self._pulled(max(0.0, min(left, _PULL_S)), sampled=sampled)
            if frame is not None:
                return frame
            if until is not None and time.monotonic() >= until:
                return None
        return None

    def _pulled(self, timeout_s: float, *, sampled: bool) -> Frame | None:
        """The newest frame, if it comes in time and is wanted."""
        current = self._supervisor.current(timeout_s)
        if current is None:
            return None
        generation, capture = current
        asked = time.monotonic()
        picture = capture.pull(timeout_s)
        if picture is None:
            # At the end of a stream a pull returns at once, a little before the supervisor has seen it.
            if time.monotonic() - asked < timeout_s / 2:
                self._supervisor.pause(timeout_s / 2)
            return None
        if generation != self._generation:
            self._generation = generation
            self._supervisor.delivered()
        return self._judged(picture, generation, sampled=sampled)

    def _judged(self, picture: Picture, generation: int, *, sampled: bool) -> Frame | None:
        if not (sampled and isinstance(self._sampler, Sampler)):
            self._drops["replaced"] += picture.replaced
        if self._stale_after_s is not None and time.monotonic() - picture.captured_at > self._stale_after_s:
            self._drops["stale"] += 1
            return None
        if self._epoch_s is None:
            self._epoch_s = picture.captured_at
        time_s = max(self._time_s, picture.captured_at - self._epoch_s)
        if sampled and not self._wanted(picture, generation, time_s):
            return None
        self._time_s = time_s
        index, self._delivered = self._delivered, self._delivered + 1
        return Frame(
            picture.image, time_s, picture.captured_at, index, picture.pts_ns, picture.running_time_s,
            wall_time_of(picture.captured_at), generation,
        )  # fmt: skip

    def _wanted(self, picture: Picture, generation: int, time_s: float) -> bool:
        sampler = self._sampler
        if isinstance(sampler, ChangeSampler):
            return sampler.take_picture(time_s, picture.image)
        if isinstance(sampler, Sampler):
            return self._due(sampler, picture, generation, time_s)
        return sampler is None or sampler.take(time_s)

    def _due(self, sampler: Sampler, picture: Picture, generation: int, time_s: float) -> bool:
        """Whether a frame is wanted by its time. Of those replaced since the last one, as many were drops as were wanted."""
        self._unseen += picture.replaced
        if not sampler.take(time_s):
            return False
        # As the sampler has it: the moments k / fps, with times rounded to 1 ms.
        moment = int((time_s + 0.001) * sampler.fps)
        if self._moment is not None and self._moment[0] == generation:
            self._drops["replaced"] += min(self._unseen, moment - self._moment[1] - 1)
        self._moment, self._unseen = (generation, moment), 0
        return True


def _connector(uri: SourceURI, view: View, timeouts: Timeouts, branches: Sequence[Branch]) -> Callable[[], Capture]:
    def connect() -> Capture:
        check_presence(uri)
        return Capture(uri, view, "newest", timeouts, branches=branches)

    return connect
