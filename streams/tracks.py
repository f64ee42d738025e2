"""Pictures and sound of one source: one pipeline, one demuxer, one clock, two sinks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Arrivals, Tap, Timeouts
from keepsight.streams.errors import KeepsightError, SourceLostError, SourceUnreadableError, UsageError
from keepsight.streams.events import EventLog
from keepsight.streams.faults import fault_of, truncation_of
from keepsight.streams.gst import launch, load_gst, require_elements, state_colorimetry
from keepsight.streams.losses import DecoderWatch, Ledger
from keepsight.streams.microphone import Microphone
from keepsight.streams.padprobes import add_probe
from keepsight.streams.pipelines import COLOURS, DECODER, FRAMES, ORIGIN, TAP, Piece, recipe_for
from keepsight.streams.presence import check_presence
from keepsight.streams.sampleline import TOLERANCE_S
from keepsight.streams.supervisor import Supervisor
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import View
from keepsight.streams.watchdog import Watchdog

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Chunk", "LiveTracks", "Shot", "Track", "Tracks", "supervisor_of"]

Track = Literal["video", "audio"]

# Names of the elements that are looked up, beside those of `pipelines`.
PICTURES_IN, SOUND_IN, SAMPLES, RESAMPLER = "pictures-in", "sound-in", "samples", "resampler"

# What waits in a sink. A live source whose reader is away loses the oldest; a file waits.
_FRAMES_WAITING, _CHUNKS_WAITING = 8, 256
_TEST_TICK_HZ = 100

_CONTAINERS = ("quicktime", "x-matroska", "webm", "x-msvideo", "mpegts", "x-flv", "x-ms-asf", "ogg")


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """A frame as it comes: its running time, when it is over if its buffer says so, and GStreamer's sample."""

    time_s: float
    end_s: float | None
    sample: Any


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Sound as it comes: float32 `[n]`, its running time, and whether the stream says that it does not go on from the last."""

    samples: NDArray[np.float32]
    time_s: float
    restart: bool


class Tracks:
    """Reads the pictures, the sound, or both of one source, once.

    One thread pulls; any thread may close. Times are running times of the pipeline: those of a file count from its beginning,
    and a track that starts late has a first time above 0.

    Args:
        uri: what to read; None for a microphone alone.
        view: size and shape of the pictures; None leaves them unread, and undecoded.
        rate: samples per second of the sound; None leaves it unread.
        microphone: where sound comes from, if not from `uri`.
        live: the newest wins and old ones are let go, instead of being waited for.

    Raises:
        KeepsightError: the source can't be opened; which one, see `faults`.
    """

    def __init__(
        self,
        uri: SourceURI | None,
        *,
        view: View | None,
        rate: int | None,
        microphone: Microphone | None = None,
        live: bool,
    ) -> None:
        self._gst = load_gst()
        self._uri, self._microphone, self._live = uri, microphone, live
        self._closed = threading.Event()
        self._fault: KeepsightError | None = None
        self._delivered = False
        self._undecoded: dict[Track, str] = {}  # a track that is there and has no decoder
        self._seen: set[str] = set()  # what the container holds
        self._listed = threading.Event()  # the container has named all its streams
        self._linked: set[Track] = set()
        self._heard: list[tuple[Any, int]] = []  # what calls back: elements and handlers
        self._coming: set[Track] = set()  # an RTP stream whose decoder is not ready yet
        plan = _plan(uri, view, rate, microphone, live=live)
        require_elements(plan.elements)
        self._pipeline = launch(plan.launch)
        self._bus = self._pipeline.get_bus()
        for name, properties in plan.properties.items():
            element = self._pipeline.get_by_name(name)
            for key, value in properties.items():
                element.set_property(key, value)
        self._sinks: dict[Track, Any] = {}
        if view is not None:
            state_colorimetry(self._pipeline.get_by_name(COLOURS), view.colorimetry)
            self._sinks["video"] = self._sink(FRAMES, _FRAMES_WAITING)
            if live:
                self._pipeline.get_by_name(TAP).set_property("max-size-buffers", _FRAMES_WAITING)
        if rate is not None:
            self._sinks["audio"] = self._sink(SAMPLES, _CHUNKS_WAITING)
            add_probe(self._pipeline.get_by_name(RESAMPLER).get_static_pad("sink"), _Marker().on_data)
        self._connect(plan)
        if self._pipeline.set_state(self._gst.State.PLAYING) == self._gst.StateChangeReturn.FAILURE:
            self._listen()
            self.close()
            raise self._fault or SourceUnreadableError(f"{self} can't be started.", fix="See GST_DEBUG=2 for why.")

    def pull_shot(self, timeout_s: float) -> Shot | None:
        """The next frame if one comes within so many seconds."""
        while (sample := self._pull("video", timeout_s)) is not None:
            begin, end = self._times(sample)
            if begin is not None:  # None: outside of what is to be shown, or without a time
                return Shot(begin, end, sample)
        return None

    def pull_chunk(self, timeout_s: float) -> Chunk | None:
        """The next sound if some comes within so many seconds. Channels are mixed to their mean (`librosa.to_mono`)."""
        while (sample := self._pull("audio", timeout_s)) is not None:
            begin, _ = self._times(sample)
            if begin is not None:
                restart = bool(sample.get_buffer().get_flags() & self._gst.BufferFlags.DISCONT)
                return Chunk(_mono(self._gst, sample), begin, restart)
        return None

    def has(self, track: Track) -> bool | None:
        """Whether the source has such a track; None while that is not known."""
        if track in self._linked:
            return True
        if track not in self._sinks:
            return False
        return False if self._listed.is_set() and track not in self._coming else None

    def ended(self, track: Track) -> bool:
        """Whether nothing more comes of a track, because it is over or was never there."""
        return self.has(track) is False or bool(self._sinks[track].get_property("eos"))

    def check(self) -> None:
        """Raise what has gone wrong, if something has.

        Raises:
            KeepsightError: see `faults`.
        """
        self._listen()
        if self._fault is not None:
            raise self._fault
        for track in self._sinks:
            if track in self._undecoded and track not in self._linked and self._listed.is_set():
                raise SourceUnreadableError(
                    f"{self} can't be decoded here: no decoder for its {track} ({self._undecoded[track]}) is installed.",
                    fix="apt-get install gstreamer1.0-libav gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly.",
                )

    def missing(self) -> str | None:
        """How much of a file is not there, by its container's own account; None if it is whole or does not say."""
        return truncation_of(self._uri) if self._uri is not None and self._uri.kind == "file" else None

    def elapsed_s(self) -> float | None:
        """The running time now; None before the pipeline plays, or when it is closed."""
        clock = self._pipeline.get_clock()
        if clock is None or self._closed.is_set():
            return None
        elapsed: float = (clock.get_time() - self._pipeline.get_base_time()) / self._gst.SECOND
        return elapsed

    def close(self) -> None:
        """Stop. Closing twice does nothing."""
        self._closed.set()
        self._pipeline.set_state(self._gst.State.NULL)
        # What is called back holds this object, which holds the pipeline: neither would ever be freed, nor its sockets closed.
        while self._heard:
            element, handler = self._heard.pop()
            element.disconnect(handler)

    def __str__(self) -> str:
        return str(self._microphone if self._uri is None else self._uri)

    def _sink(self, name: str, waiting: int) -> Any:
        sink = self._pipeline.get_by_name(name)
        # Without `async` a sink whose track does not exist would keep the other one from starting.
        for key, value in (("async", False), ("sync", False), ("max-buffers", waiting), ("drop", self._live)):
            sink.set_property(key, value)
        return sink

    def _pull(self, track: Track, timeout_s: float) -> Any:
        sample = self._sinks[track].try_pull_sample(int(timeout_s * self._gst.SECOND))
        self._delivered = self._delivered or sample is not None
        return sample

    def _times(self, sample: Any) -> tuple[float | None, float | None]:
        buffer, segment = sample.get_buffer(), sample.get_segment()
        if buffer.pts == self._gst.CLOCK_TIME_NONE:
            return None, None
        begin = segment.to_running_time(self._gst.Format.TIME, buffer.pts)
        if begin == self._gst.CLOCK_TIME_NONE:
            return None, None
        known = buffer.duration not in (0, self._gst.CLOCK_TIME_NONE)
        return begin / self._gst.SECOND, (begin + buffer.duration) / self._gst.SECOND if known else None

    def _listen(self) -> None:
        kinds = self._gst.MessageType
        while (message := self._bus.pop_filtered(kinds.ERROR | kinds.WARNING)) is not None:
            if message.type == kinds.ERROR and self._fault is None:  # those behind it are its consequences
                self._fault = self._translated(message)

    def _translated(self, message: Any) -> KeepsightError:
        of_microphone = self._microphone is not None and message.src.get_name() == "microphone"
        if self._microphone is not None and (of_microphone or self._uri is None):
            return self._microphone.fault(message.parse_error()[0].message.rstrip("."), delivered=self._delivered)
        assert self._uri is not None
        absent = self._seen and not any(name.startswith(f"{track}/") for track in self._sinks for name in self._seen)
        if absent and not self._delivered:  # decodebin asks for a decoder of what was not wanted
            what = "sound" if "audio" in self._sinks else "video"
            return SourceUnreadableError(f"{self} has no {what} in it.", fix="Give one that has.")
        return fault_of(self._uri, message, delivered=self._delivered)

    def _connect(self, plan: _Plan) -> None:
        """Let streams that show up find their place; those nobody asked for stay unlinked."""
        for track in plan.fixed:
            self._linked.add(track)
        if plan.joint is None:
            self._listed.set()
            return
        joint = self._pipeline.get_by_name(plan.joint)
        if plan.joint == DECODER:
            self._follow(joint)
        else:
            self._hear(joint, "pad-added", self._on_rtp)
        self._hear(joint, "no-more-pads", self._on_listed)

    def _follow(self, decoder: Any) -> None:
        self._hear(decoder, "pad-added", self._on_pad)
        self._hear(decoder, "unknown-type", self._on_unknown)
        self._hear(decoder, "autoplug-continue", self._on_stream)

    def _hear(self, element: Any, signal: str, callback: Callable[..., Any]) -> None:
        self._heard.append((element, element.connect(signal, callback)))

    def _on_listed(self, element: Any) -> None:
        self._listed.set()

    def _on_stream(self, decoder: Any, pad: Any, caps: Any) -> bool:
        name = caps.get_structure(0).get_name()
        # A container's own type is video/ too, as a rule: it is no stream of pictures.
        if name.startswith(("audio/", "video/")) and not name.endswith(_CONTAINERS):
            self._seen.add(name)
        return True

    def _on_unknown(self, decoder: Any, pad: Any, caps: Any) -> None:
        name = caps.get_structure(0).get_name()
        track: Track = "audio" if name.startswith("audio/") else "video"
        self._undecoded[track] = name

    def _on_pad(self, element: Any, pad: Any) -> None:
        name = (pad.get_current_caps() or pad.query_caps(None)).get_structure(0).get_name()
        track: Track = "audio" if name.startswith("audio/") else "video"
        if not name.startswith(("audio/", "video/", "image/")) or track not in self._sinks or track in self._linked:
            return
        entry = self._pipeline.get_by_name(SOUND_IN if track == "audio" else PICTURES_IN)
        if pad.link(entry.get_static_pad("sink")) == self._gst.PadLinkReturn.OK:
            self._linked.add(track)

    def _on_rtp(self, element: Any, pad: Any) -> None:
        media = (pad.get_current_caps() or pad.query_caps(None)).get_structure(0).get_string("media")
        if media not in self._sinks or media in self._linked:
            return
        self._coming.add(media)
        decoder = self._gst.ElementFactory.make("decodebin")
        self._follow(decoder)
        self._pipeline.add(decoder)
        pad.link(decoder.get_static_pad("sink"))
        decoder.sync_state_with_parent()


class LiveTracks(Tracks):
    """The tracks of a live source as a connection for a `Supervisor`: what came when, and that it is lost at its end.

    Pictures, where there are any, say whether it lives: a camera whose pictures stop does not because its microphone does.
    """

    def __init__(
        self, uri: SourceURI | None, *, view: View | None, rate: int | None, microphone: Microphone | None = None
    ) -> None:
        super().__init__(uri, view=view, rate=rate, microphone=microphone, live=True)
        self._decoders = DecoderWatch(self._pipeline)
        self._taps = {track: Tap(self._gst, sink.get_static_pad("sink"), None) for track, sink in self._sinks.items()}

    @property
    def arrivals(self) -> Arrivals:
        """What has come so far, of its pictures or of its sound."""
        seen = "video" in self._taps and self.has("video") is not False
        return self._taps["video" if seen else "audio"].arrivals()

    @property
    def ledger(self) -> Ledger:
        """Which pictures the decoder has lost."""
        return self._decoders.ledger

    @property
    def unread(self) -> int:
        """Not known."""
        return 0

    def check(self) -> None:
        """Raise what has gone wrong, or that a track has ended that was there."""
        ended = any(tap.ended for tap in self._taps.values())  # before listening: its cause comes first
        super().check()
        if ended and not self._closed.is_set():
            raise SourceLostError(f"{self} is lost: the stream ended.", fix="Start again.")


def supervisor_of(
    uri: SourceURI | None,
    *,
    view: View | None,
    rate: int,
    microphone: Microphone | None,
    timeouts: Timeouts,
    reconnect: Reconnect,
    log: EventLog,
) -> Supervisor[LiveTracks]:
    """What keeps the tracks of a live source up, as it does the frames of a `LiveSource`; it is not started."""

    def connect() -> LiveTracks:
        if uri is not None:
            check_presence(uri)
        return LiveTracks(uri, view=view, rate=rate, microphone=microphone)

    address = uri if uri is not None else SourceURI("appsrc", "", redacted=str(microphone))
    watchdog = Watchdog(timeouts.stall_s, unknown_s=timeouts.first_frame_s)
    return Supervisor(address, connect, log, reconnect=reconnect, watchdog=watchdog, first_frame_s=timeouts.first_frame_s)


class _Marker:
    """Marks sound that does not go on where the last one ended, before it is resampled.

    audioresample stamps its output by counting samples, and takes its input's time again only at a buffer that says DISCONT, or
    after a gap of some tens of milliseconds: drift and lost packets below that would shift all that follows.
    """

    def __init__(self) -> None:
        self._gst = load_gst()
        self._next_s: float | None = None
        self._bytes_per_s: int | None = None

    def on_data(self, buffer: Any, event: Any) -> bool:
        """See what comes to the resampler; all of it passes on."""
        if buffer is not None:
            self._see(buffer.whole)
        elif event.type == self._gst.EventType.CAPS:
            sound = event.parse_caps().get_structure(0)
            self._bytes_per_s = 4 * sound.get_int("channels")[1] * sound.get_int("rate")[1]
        return True

    def _see(self, buffer: Any) -> None:
        if self._bytes_per_s is None or buffer.pts == self._gst.CLOCK_TIME_NONE:
            return
        begin_s = buffer.pts / self._gst.SECOND
        marked = bool(buffer.get_flags() & self._gst.BufferFlags.DISCONT)
        off = self._next_s is None or abs(begin_s - self._next_s) > TOLERANCE_S
        if off and not marked:
            buffer.set_flags(self._gst.BufferFlags.DISCONT)
        origin = begin_s if off or marked or self._next_s is None else self._next_s
        self._next_s = origin + buffer.get_size() / self._bytes_per_s


@dataclass(frozen=True, slots=True)
class _Plan:
    """A pipeline: its text, what it needs, what to set, which tracks are linked in it, and which element finds the others."""

    launch: str
    elements: tuple[str, ...]
    properties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: tuple[Track, ...] = ()
    joint: str | None = None


def _plan(
    uri: SourceURI | None, view: View | None, rate: int | None, microphone: Microphone | None, *, live: bool
) -> _Plan:
    if uri is None and microphone is None:
        raise UsageError("there is nothing to read.", fix="Name a source.")
    sound, sound_elements = _sound(rate) if rate is not None else ("", ())
    chains: list[str] = []
    elements = list(sound_elements)
    properties: dict[str, Mapping[str, Any]] = {}
    fixed: list[Track] = []
    joint = None
    own_sound = sound
    if microphone is not None and rate is not None:
        chains.append(f"{microphone.element} name=microphone ! {sound}")
        elements.append(microphone.element)
        properties["microphone"] = microphone.properties
        fixed.append("audio")
        own_sound = ""
    if uri is not None:
        recipe = recipe_for(uri, view or View(), "newest" if live else "every")
        stages = {piece.stage: piece for piece in recipe.pieces}
        behind = [piece for piece in recipe.pieces if piece.stage in ("to-host", "tail")]
        if "decode" in stages and (uri.kind == "rtsp" or "parse" not in stages):
            # What a board has behind decodebin comes with the pictures.
            extra = stages["decode"].launch.partition(" ! ")[2]
            properties[ORIGIN] = recipe.origin
            joint = ORIGIN if uri.kind == "rtsp" else DECODER
            chains.append(_head(stages["origin"], view, own_sound, joint))
            elements += [*stages["origin"].elements, *stages["decode"].elements]
            if own_sound:
                chains.append(own_sound)
            if view is not None:
                parts = [f"identity name={PICTURES_IN} silent=true", *filter(None, [extra]), *(piece.launch for piece in behind)]
                chains.append(" ! ".join(parts))
        else:
            if view is not None:
                chains.append(" ! ".join(piece.launch for piece in recipe.pieces))
                properties[ORIGIN] = recipe.origin
                elements += [name for piece in recipe.pieces for name in piece.elements]
                fixed.append("video")
            if uri.kind == "test" and own_sound:
                chains.append(f"{_test_sound(uri, live=live)} ! {own_sound}")
                elements.append("audiotestsrc")
                fixed.append("audio")
            elif own_sound:
                chains.append(own_sound)  # of a track that such a source never has
        if view is not None:
            elements += [name for piece in behind for name in piece.elements]
    return _Plan("  ".join(chains), tuple(dict.fromkeys(elements)), properties, tuple(fixed), joint)


def _head(origin: Piece, view: View | None, sound: str, joint: str) -> str:
    if joint == ORIGIN:  # rtspsrc alone: the filter behind it lets only pictures through
        return origin.launch.split(" ! ")[0]
    wanted = ""
    if view is None or not sound:  # what is not asked for is not decoded
        wanted = f" expose-all-streams=false caps={'audio/x-raw' if view is None else 'video/x-raw(ANY);image/x-raw'}"
    return f"{origin.launch} ! decodebin name={DECODER}{wanted}"


def _sound(rate: int | None) -> tuple[str, tuple[str, ...]]:
    # Channels are mixed in `_mono`: audioconvert weighs those of 5.1 by a table that its versions do not share.
    launch = (
        f"audioconvert name={SOUND_IN} ! audio/x-raw,format=F32LE,layout=interleaved ! audioresample name={RESAMPLER} "
        f"! audio/x-raw,format=F32LE,layout=interleaved,rate={rate} ! appsink name={SAMPLES}"
    )
    return launch, ("audioconvert", "audioresample", "appsink")


def _test_sound(uri: SourceURI, *, live: bool) -> str:
    """One tick a second, as long as the pictures."""
    frames, fps = uri.options.get("frames"), Fraction(uri.options.get("fps", 30))
    count = -1 if frames is None else int(Fraction(frames) / fps * _TEST_TICK_HZ)
    return (
        f"audiotestsrc is-live={'true' if live else 'false'} wave=ticks samplesperbuffer={48000 // _TEST_TICK_HZ} "
        f"num-buffers={count} ! audio/x-raw,rate=48000,channels=2"
    )


def _mono(gst: Any, sample: Any) -> NDArray[np.float32]:
    channels: int = sample.get_caps().get_structure(0).get_int("channels")[1]
    buffer = sample.get_buffer()
    mapped, memory = buffer.map(gst.MapFlags.READ)
    if not mapped:
        raise MemoryError("GStreamer could not map an audio buffer into memory")
    try:
        sound = np.frombuffer(memory.data, np.float32).reshape(-1, channels)
        # A copy in any case: GStreamer reuses the memory as soon as it is unmapped.
        return sound[:, 0].copy() if channels == 1 else sound.mean(axis=1, dtype=np.float32)
    finally:
        buffer.unmap(memory)


