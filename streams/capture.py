"""A running pipeline: its pictures with their times, its errors, its watchdog."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from keepsight.streams.bicubic import scaled
from keepsight.streams.errors import KeepsightError, SourceUnreadableError
from keepsight.streams.faults import fault_of, lost, silence_of, truncation_of
from keepsight.streams.gst import BRANCH_PREFIX, is_inside, load_gst, pixel_aspect, sample_to_array
from keepsight.streams.losses import DecoderWatch, Ledger
from keepsight.streams.pipelines import DECODER, FRAMES, TAP, Branch, Delivery, build, recipe_for
from keepsight.streams.ring import FrameRing
from keepsight.streams.sampling import TimeSampler
from keepsight.streams.timing import PipelineTiming
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Arrivals", "Capture", "Picture", "Tap", "Timeouts"]

# On an error the sink gets no end of stream and a pull would last its whole time: pulls are short, and the bus is
# looked at between them.
_PULL_S = 0.05

# A camera's rate changes with the light, so only its last few frames say what it is now.
_INTERVALS = 16

# Containers round their duration, and a last frame's own length may be unknown.
_DURATION_SLACK_S = 1.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for the first frame, and for each frame after it."""

    first_frame_s: float = 10.0
    stall_s: float = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture and its times, both in seconds: `time_s` of the stream, `captured_at` of time.monotonic().

    `pts_ns` and `running_time_s` are its buffer's, if it had any; `replaced` is how many frames it replaced.
    """

    image: NDArray[np.uint8]
    time_s: float
    captured_at: float
    pts_ns: int | None = None
    running_time_s: float | None = None
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What came out of a decoder so far, whoever read it.

    Attributes:
        count: frames.
        last: when the last came, in seconds of time.monotonic(); None before the first.
        interval_s: the usual one between the last few, as they came or as they are stamped, whichever is longer; None before the
            second frame.
        stated_interval_s: what the stream says of its rate, if anything.
        size: (width, height) of the decoded frames; None before the first.
    """

    count: int
    last: float | None
    interval_s: float | None
    stated_interval_s: float | None
    size: tuple[int, int] | None


class Capture:
    """Reads one source, once.

    One thread calls `next`, which looks after the pipeline too. Or one thread calls `pull`, and another one `check` and
    `arrivals` every now and then. Any thread may call `close`.

    Args:
        uri: what to read: a file (not a directory), a camera, a test pattern.
        view: size and shape of the pictures.
        delivery: every frame, or the newest (see `pipelines.recipe_for`).
        timeouts: when to give up.
        sampler: which frames to keep; asked before a frame is scaled, so that the others cost only their decoding.
            Not for a newest-wins delivery, where the reader decides.
        branches: what hangs on the stream beside the frames.
        timing: times every picture; None = nobody asks, and no probe is there for it.

    Raises:
        KeepsightError: the source can't be opened; which one, see `faults`.
    """

    def __init__(
        self,
        uri: SourceURI,
        view: View,
        delivery: Delivery,
        timeouts: Timeouts,
        sampler: TimeSampler | None = None,
        branches: Sequence[Branch] = (),
        timing: PipelineTiming | None = None,
    ) -> None:
        self._gst = load_gst()
        self._uri, self._view, self._delivery, self._timeouts = uri, view, delivery, timeouts
        self._timing = timing
        self._live = delivery == "newest"
        self._closed = threading.Event()
        self._fault: KeepsightError | None = None
        self._duration_s: float | None = None
        self._warning: str | None = None
        self._pulled = 0
        self._serial = 0  # of the last frame read, as the tap counts them
        self.dropped = 0
        self.ring = FrameRing()
        self._branches, self._closing = tuple(branches), threading.Lock()
        self._pipeline = build(recipe_for(uri, view, delivery, branches))
        self._sink = self._pipeline.get_by_name(FRAMES)
        self._bus = self._pipeline.get_bus()
        self._decoders = DecoderWatch(self._pipeline)
        self._tap = Tap(self._gst, self._pipeline.get_by_name(TAP).get_static_pad("sink"), sampler)
        if timing is not None:
            timing.attach(self._pipeline)
        self._started = time.monotonic()
        if self._pipeline.set_state(self._gst.State.PLAYING) == self._gst.StateChangeReturn.FAILURE:
            self._listen()
            self.close()
            raise self._fault or SourceUnreadableError(f"{uri} can't be started.", fix="See GST_DEBUG=2 for why.")

    def next(self) -> Picture | None:
        """The next picture; None when the source has ended or was closed.

        Raises:
            KeepsightError: see `faults`. Frames that came before an error are given out first.
        """
        asked = time.monotonic()
        while not self._closed.is_set():
            picture = self.pull(_PULL_S)
            ended = picture is None and self._sink.get_property("eos")  # before listening: its cause comes first
            self._listen()
            if picture is not None:
                return picture
            if self._closed.is_set():
                break
            if self._fault is not None:
                raise self._fault
            if ended:
                self._judge_end()
                return None
            self._watch(asked)
        return None

    def pull(self, timeout_s: float) -> Picture | None:
        """The next picture if there is one within so many seconds. It never waits longer, and raises nothing of the source's."""
        sample = self._sink.try_pull_sample(int(timeout_s * self._gst.SECOND))
        return None if sample is None else self._picture(sample, perf_counter())

    def check(self) -> None:
        """Raise what has ended a live source, as soon as it has, even if its last frames have not been read.

        Raises:
            KeepsightError: see `faults`; SourceLostError at its end.
        """
        ended = self._tap.ended  # before listening: its cause comes first
        self._listen()
        if self._fault is not None:
            raise self._fault
        if ended and not self._closed.is_set():
            raise self._lost_by_end()

    @property
    def arrivals(self) -> Arrivals:
        """What has been decoded so far."""
        return self._tap.arrivals()

    @property
    def ledger(self) -> Ledger:
        """Which pictures the decoder has lost so far, whoever reads them."""
        return self._decoders.ledger

    @property
    def unread(self) -> int:
        """Frames that have been replaced by newer ones since the last one that was read."""
        return max(0, self._tap.arrived - self._serial - 1)

    def duration_s(self) -> float | None:
        """The length in seconds that the container states, or None. Known once a picture has come."""
        if self._duration_s is None and not self._closed.is_set():
            known, duration = self._pipeline.query_duration(self._gst.Format.TIME)
            self._duration_s = duration / self._gst.SECOND if known and duration > 0 else None
        return self._duration_s

    def close(self) -> None:
        """Stop; a `next` that waits in another thread returns None. Closing twice does nothing.

        A recorder has a second to write what it holds.
        """
        self._closed.set()
        with self._closing:  # whoever closes it a second time must not stop it while a branch still writes
            for branch in self._branches:
                if branch.finish is not None:
                    branch.finish(self._pipeline)
            self._tap.remove()
            self._pipeline.set_state(self._gst.State.NULL)

    def _listen(self) -> None:
        """Empty the bus, which would otherwise grow for as long as a stream plays, and keep its first error."""
        kinds = self._gst.MessageType
        while (message := self._bus.pop_filtered(kinds.ERROR | kinds.WARNING)) is not None:
            if is_inside(message.src, BRANCH_PREFIX):  # a branch's own affair
                continue
            if message.type == kinds.WARNING:
                self._warning = self._uri.redact(message.parse_warning()[0].message).rstrip(".")
            elif self._fault is None:  # those behind it ("Internal data stream error.") are its consequences
                self._fault = fault_of(self._uri, message, delivered=self._tap.arrived > 0, has_video=self._decodes_video())

    def _picture(self, sample: Any, taken: float) -> Picture | None:
        buffer = sample.get_buffer()
        if self._pulled == 0:
            self.duration_s()  # asked while it can be: a closed pipeline has forgotten it
        self._pulled += 1
        replaced = self._replaced_by(buffer.pts)
        self.dropped += replaced
        running_s = _running_time_s(self._gst, sample.get_segment(), buffer.pts)
        captured_at = time.monotonic()
        if self._delivery != "every" and running_s is not None:
            elapsed_s = self._elapsed_s()
            if elapsed_s is None:  # closed meanwhile: nobody can say any more how old this is
                return None
            captured_at -= max(0.0, elapsed_s - running_s)
        time_s = running_s
        if time_s is None:  # a picture file, or a raw stream without times
            time_s = captured_at - self._started if self._live else 0.0
        stored = sample_to_array(sample, self.ring)
        copied = perf_counter()
        image = scaled(stored, self._view, pixel_aspect(sample))
        pts_ns = None if buffer.pts == self._gst.CLOCK_TIME_NONE else int(buffer.pts)
        if self._timing is not None:
            self._timing.taken(pts_ns, taken, copied, perf_counter())
        return Picture(image, time_s, captured_at, pts_ns, running_s, replaced)

    def _replaced_by(self, pts: int) -> int:
        """How many frames came between the one read before and this one, and were let go for it."""
        if self._delivery == "every":  # nothing is: what is missing, the sampler left out
            return 0
        serial, before = self._tap.serial_of(pts), self._serial
        self._serial = max(before + 1, serial)
        return self._serial - before - 1

    def _elapsed_s(self) -> float | None:
        """The pipeline's running time now; None if it has no clock, because it was closed."""
        clock = self._pipeline.get_clock()
        if clock is None:
            return None if self._closed.is_set() else 0.0
        elapsed: float = (clock.get_time() - self._pipeline.get_base_time()) / self._gst.SECOND
        return elapsed

    def _lost_by_end(self) -> KeepsightError:
        return lost(self._uri, f"the stream ended ({self._warning})" if self._warning else "the stream ended")

    def _watch(self, asked: float) -> None:
        now = time.monotonic()
        if self._tap.last_arrival is None:
            if now - self._started > self._timeouts.first_frame_s:
                raise silence_of(self._uri, self._timeouts.first_frame_s)
            return
        # A file waits for its reader, so only the time spent asking counts; a camera goes on by itself.
        since = self._tap.last_arrival if self._live else max(asked, self._tap.last_arrival)
        if now - since <= self._timeouts.stall_s:
            return
        if self._uri.is_camera:
            raise lost(self._uri, f"no frame for {now - since:.1f} s")
        raise SourceUnreadableError(
            f"{self._uri} gave no frame for {now - since:.1f} s.", fix="Check the disk or the network it is on."
        )

    def _judge_end(self) -> None:
        """Tell a source that is over from one that broke off: GStreamer reports both as the end."""
        if self._live:
            raise self._lost_by_end()
        if self._uri.is_camera:
            return
        again = "Copy or download it again."
        missing_bytes, played = truncation_of(self._uri), self._played_short()
        if missing_bytes is not None:
            there = missing_bytes if played is None else f"{played} ({missing_bytes})"
            raise SourceUnreadableError(f"{self._uri} is truncated: {there} are there.", fix=again)
        ledger = self.ledger
        if ledger.lost and self._tap.arrived:
            how_many = f"{ledger.lost} of its {ledger.total} pictures can't be decoded"
            how_many += f"; {played} are there" if self._missing_s() > _DURATION_SLACK_S else ""
            raise SourceUnreadableError(f"{self._uri} is damaged: {how_many}.", fix=again)
        if played is not None and self._stream_count() == 1 and self._missing_s() > _DURATION_SLACK_S:
            # Sound may honestly outlast the pictures, so a short video says something only when it is alone.
            raise SourceUnreadableError(f"{self._uri} is truncated: {played} are there.", fix=again)
        if self._tap.arrived == 0:
            raise SourceUnreadableError(
                f"{self._uri} has no picture in it that can be decoded.",
                fix="It may be damaged: try to play it elsewhere.",
            )

    def _missing_s(self) -> float:
        duration = self.duration_s()
        return 0.0 if duration is None else duration - self._tap.end_s

    def _played_short(self) -> str | None:
        """How much of a file was played, if that is less than its container states."""
        return f"{self._tap.end_s:.1f} of {self.duration_s():.1f} s" if self._missing_s() > 0.05 else None

    def _stream_count(self) -> int:
        decoder = self._pipeline.get_by_name(DECODER)
        return 0 if decoder is None else decoder.numsrcpads

    def _decodes_video(self) -> bool | None:
        decoder = self._pipeline.get_by_name(DECODER)
        if decoder is None or decoder.numsrcpads == 0:
            return None
        names = [caps.to_string() for pad in decoder.srcpads if (caps := pad.get_current_caps()) is not None]
        return any(name.startswith("video/") for name in names)


class Tap:
    """Sees each decoded frame before it is scaled: counts it, times it, and lets a sampler refuse it.

    appsink does not say how many frames it replaced, and gaps between times don't either, since a camera's rate
    varies. Frames counted here and those read out, matched by their time, do: what lies between them was dropped.
    """

    def __init__(self, gst: Any, pad: Any, sampler: TimeSampler | None) -> None:
        self._gst, self._pad, self._sampler = gst, pad, sampler
        self.arrived = 0
        self.last_arrival: float | None = None
        self.end_s = 0.0
        # A frame read out is one of the last few: one in the queue, one being scaled, one in the sink.
        self._recent: deque[tuple[int, int]] = deque(maxlen=16)
        self._times: deque[tuple[float, float | None]] = deque(maxlen=_INTERVALS + 1)
        self.ended = False
        self._probe = pad.add_probe(gst.PadProbeType.BUFFER | gst.PadProbeType.EVENT_DOWNSTREAM, self._on_data)

    def serial_of(self, pts: int) -> int:
        """Which frame, counted from 1, had this time; 0 if it was too long ago to know."""
        return next((serial for serial, seen in reversed(self._recent.copy()) if seen == pts), 0)

    def remove(self) -> None:
        if self._probe:
            self._pad.remove_probe(self._probe)
            self._probe = 0

    def arrivals(self) -> Arrivals:
        stated, size = self._stated()
        return Arrivals(self.arrived, self.last_arrival, _interval_s(self._times.copy()), stated, size)

    def _stated(self) -> tuple[float | None, tuple[int, int] | None]:
        """Seconds between frames, and their size, as the caps have them."""
        caps = self._pad.get_current_caps()
        if caps is None:
            return None, None
        structure = caps.get_structure(0)
        _, width = structure.get_int("width")
        _, height = structure.get_int("height")
        known, numerator, denominator = structure.get_fraction("framerate")
        stated = denominator / numerator if known and numerator > 0 else None  # 0/1 is a rate that varies
        return stated, (width, height) if width and height else None

    def _on_data(self, pad: Any, info: Any) -> Any:
        if not info.type & self._gst.PadProbeType.BUFFER:
            self.ended = self.ended or info.get_event().type == self._gst.EventType.EOS
            return self._gst.PadProbeReturn.OK
        buffer = info.get_buffer()
        self.arrived += 1
        self.last_arrival = time.monotonic()
        self._recent.append((self.arrived, buffer.pts))
        time_s = self._time_s(pad, buffer.pts)
        self._times.append((self.last_arrival, time_s))
        if time_s is None:
            return self._gst.PadProbeReturn.OK
        length = buffer.duration
        self.end_s = max(self.end_s, time_s + (0 if length == self._gst.CLOCK_TIME_NONE else length / self._gst.SECOND))
        if self._sampler is not None and not self._sampler.take(time_s):
            return self._gst.PadProbeReturn.DROP
        return self._gst.PadProbeReturn.OK

    def _time_s(self, pad: Any, pts: int) -> float | None:
        event = pad.get_sticky_event(self._gst.EventType.SEGMENT, 0)
        return None if event is None else _running_time_s(self._gst, event.parse_segment(), pts)


def _interval_s(times: Sequence[tuple[float, float | None]]) -> float | None:
    """The usual interval of the last few. A burst comes faster than it was taken, and not every stream stamps its frames."""
    if len(times) < 2:
        return None
    came = median(later - sooner for (sooner, _), (later, _) in pairwise(times))
    stamps = [stamp for _, stamp in times if stamp is not None]
    stamped = median(later - sooner for sooner, later in pairwise(stamps)) if len(stamps) > 1 else 0.0
    return max(came, stamped)


def _running_time_s(gst: Any, segment: Any, pts: int) -> float | None:
    if pts == gst.CLOCK_TIME_NONE:
        return None
    running = segment.to_running_time(gst.Format.TIME, pts)
    return None if running == gst.CLOCK_TIME_NONE else running / gst.SECOND
