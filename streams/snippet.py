"""Snippets of pictures and sound that belong together, for audio-visual models such as Mirasol3B."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from keepsight.streams.audio import parse_source, refuse_absent, refuse_files
from keepsight.streams.backoff import Reconnect
from keepsight.streams.bicubic import scaled
from keepsight.streams.capture import Timeouts
from keepsight.streams.errors import KeepsightError, SourceLostError, SourceUnreadableError, UsageError
from keepsight.streams.events import Event, EventLog, State
from keepsight.streams.faults import silence_of
from keepsight.streams.gst import pixel_aspect, sample_to_array
from keepsight.streams.microphone import Microphone
from keepsight.streams.sampleline import SampleLine
from keepsight.streams.supervisor import Supervisor
from keepsight.streams.tracks import LiveTracks, Shot, Track, Tracks, supervisor_of
from keepsight.streams.view import Aspect, Colorimetry, Conversion, Scaler, View

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Snippet", "Snippets"]

T = TypeVar("T")
Absent = Literal["error", "pad"]
Pace = Literal["auto", "offline"]

_PULL_S = 0.02
# Containers round times: Matroska to 1 ms, so the frame of 1/3 s may be stamped 0.334.
_ROUNDING_S = 0.001
# What reaches less far than this into a snippet, such as the padding that ends an AAC track, does not make one.
_RAGGED_S = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Snippet:
    """What was seen and heard in one span of time.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB: at each of the snippet's sampling times the newest frame at or before it; zeros where
            there was none.
        frame_times: float64 `[T]`, when those frames were taken, in seconds of the stream; NaN where there was none. The frame of
            the first sampling time may be older than `start`.
        samples: float32 `[n]`, mono, the `i`-th at `start + i / rate`, to half a sample; zeros where there was no sound.
        start: seconds of the stream: of a file since its beginning, of a live source since its first frame or sound.
        end: `start` plus the length asked for.
        frame_mask: bool `[T]`, true where there was a frame.
        sample_mask: bool `[n]`, true where there was sound.
        index: which snippet of the stream; where numbers are missing, snippets were dropped, or fell into an outage.
        generation: how many earlier connections had given anything. No snippet is of two of them.
    """

    frames: NDArray[np.uint8]
    frame_times: NDArray[np.float64]
    samples: NDArray[np.float32]
    start: float
    end: float
    frame_mask: NDArray[np.bool_]
    sample_mask: NDArray[np.bool_]
    index: int
    generation: int = 0

    @property
    def padded_frames(self) -> int:
        """How many frames are padding."""
        return int((~self.frame_mask).sum())

    @property
    def padded_samples(self) -> int:
        """How many samples are padding."""
        return int((~self.sample_mask).sum())

    def __repr__(self) -> str:
        return (
            f"Snippet({self.start:.3f} to {self.end:.3f} s, {len(self.frames)} frames ({self.padded_frames} padded), "
            f"{len(self.samples)} samples ({self.padded_samples} padded))"
        )


class Snippets(Iterator[Snippet]):
    """Snippets of one source: frames and sound, aligned by their times, never by their numbers.

    Both come from one pipeline with one clock. A track that starts late or ends early is padded, and the snippet's masks say
    where. A frame stands until the next one, the last one for its own length. Sound keeps within 5 ms of its time stamps (see
    `SampleLine`).

    A file gives every snippet, always the same ones; its last may be padded. A live source gives its newest snippet: those that
    were complete while nobody asked are dropped and counted. There a snippet is complete when both tracks have passed its end, or
    `wait_s` after it, with padding for what had not come. It is lost when a track that was there ends, or its pictures stall.
    With `reconnect` it is then opened again, by the supervisor of `LiveSource`: time goes on over the gap, snippets that begin
    before it are over are left out, and the following ones have another generation. Without it, a loss raises.

    Args:
        uri: a file, an RTSP camera, `test://ball` (which ticks once a second), ... (see `Source`).
        length_s: seconds in a snippet.
        hop_s: seconds from the start of one to the start of the next; the length unless said otherwise.
        frames: how many per snippet, sampled at `start + k * length_s / frames`; or those times in the snippet, in seconds from
            its start, ascending.
        size: (width, height) of the frames.
        aspect, scaler, colorimetry, conversion: see `Source`.
        rate: samples per second.
        microphone: `mic://`, `alsa://hw:1,0` or `pulse://NAME`: sound from there instead of from the source, such as for a USB or
            CSI camera; it runs in the same pipeline, with the same clock.
        absent: what if there is no sound, or no picture, in the source: an `error`, or `pad` every snippet.
        pace: `offline` reads a test pattern as a file.
        sound_late_s: how much later the sound comes than it should, which is taken off its times: what an encoder or a microphone
            delays it by and its container does not tell.
        wait_s: how long after its end a live snippet waits for its late track.
        timeouts: seconds to wait for the first data, and for any more.
        reconnect: when to try again; None for one connection. Only for what is live.
        on_event: called with each `Event`, as of `LiveSource`.

    Raises:
        UsageError, SourceNotFoundError, SourceUnreadableError, MissingComponentError: at once, as for `Source`.
        SourceUnreadableError: while iterating: no sound or no picture in it; truncated (after the snippets that are there).
        NoFrameError, SourceLostError: while iterating: a live source gave nothing in time, ended or stalled.

    >>> with Snippets("test://ball?frames=60", length_s=1, frames=4, size=(64, 48), pace="offline") as snippets:
    ...     [(snippet.frames.shape, snippet.samples.shape) for snippet in snippets]
    [((4, 48, 64, 3), (16000,)), ((4, 48, 64, 3), (16000,))]
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        length_s: float,
        hop_s: float | None = None,
        frames: int | Sequence[float],
        size: tuple[int, int] = (224, 224),
        aspect: Aspect = "stretch",
        scaler: Scaler = "bilinear",
        colorimetry: Colorimetry | None = None,
        conversion: Conversion = "exact",
        rate: int = 16000,
        microphone: str | None = None,
        absent: Absent = "error",
        pace: Pace = "auto",
        sound_late_s: float = 0.0,
        wait_s: float = 1.0,
        timeouts: Timeouts | None = None,
        reconnect: Reconnect | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._grid = _Grid(length_s, length_s if hop_s is None else hop_s, _offsets(frames, length_s))
        if absent not in ("error", "pad"):
            raise UsageError(f"absent={absent!r} is not known.", fix="Use 'error' or 'pad'.")
        self.uri, self.is_live = parse_source(uri, pace)
        self._view = View(size, aspect, scaler, colorimetry, conversion)
        self._microphone = None if microphone is None else Microphone.parse(microphone)
        if self._microphone is not None and not self.is_live:
            raise UsageError(f"{self.uri} is not live, and a microphone is.", fix="Leave microphone= out.")
        if not np.isfinite(sound_late_s):
            raise UsageError(f"sound_late_s={sound_late_s} makes no sense.", fix="Give seconds.")
        self._absent, self._wait_s, self._sound_late_s = absent, wait_s, sound_late_s
        self._timeouts = timeouts or Timeouts()
        self._line_rate = rate
        SampleLine(rate)  # refuses a rate that makes no sense
        self._log = EventLog(on_event=on_event)
        self._supervisor: Supervisor[LiveTracks] | None = None
        if reconnect is not None:
            refuse_files(self.uri, live=self.is_live)
            self._supervisor = supervisor_of(
                self.uri, view=self._view, rate=rate, microphone=self._microphone,
                timeouts=self._timeouts, reconnect=reconnect, log=self._log,
            )  # fmt: skip
        self.dropped = 0  # live snippets that a newer one replaced before they were read
        self.late = 0  # live snippets that were given without waiting any longer for a track
        self._condition = threading.Condition()
        self._closed = False
        self._gatherer: _Gatherer | None = None
        self._newest: Snippet | None = None
        self._fault: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> State:
        """`connecting`, `live`, `stalled` (only with `reconnect`) or `lost`."""
        return self._log.state

    @property
    def events(self) -> list[Event]:
        """What happened since the start, oldest first; the newest 256."""
        return self._log.events

    def __next__(self) -> Snippet:
        self._open()
        if self._closed:
            raise StopIteration
        try:
            if self.is_live or self._gatherer is None:
                snippet = self._wait()
            else:
                snippet = self._gather(self._gatherer)
            if snippet is not None and self._supervisor is None and self._log.state != "live":
                self._log.add("live", "first snippet")
        except BaseException as error:
            if self._supervisor is None and isinstance(error, KeepsightError):
                self._log.add("lost", error.message)
            self.close()
            raise
        if snippet is None:
            self.close()
            raise StopIteration
        return snippet

    def close(self) -> None:
        """Stop and give everything back. An iteration in another thread ends; closing twice does nothing."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            gatherer, thread = self._gatherer, self._thread
        if self._supervisor is not None:
            self._supervisor.close()
        elif gatherer is not None:
            gatherer.tracks.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    def __enter__(self) -> Snippets:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        grid = self._grid
        return f"Snippets({str(self.uri)!r}, length_s={grid.length_s:g}, hop_s={grid.hop_s:g}, frames={len(grid.offsets_s)})"

    def _open(self) -> None:
        with self._condition:
            if self._gatherer is not None or self._thread is not None or self._closed:
                return
            if self._supervisor is not None:
                self._supervisor.start()
                self._watch_over(self._carry, self._supervisor)
                return
            tracks = Tracks(self.uri, view=self._view, rate=self._line_rate, microphone=self._microphone, live=self.is_live)
            line = SampleLine(self._line_rate)
            self._gatherer = _Gatherer(tracks, self._view, line, self._sound_late_s, self._grid, live=self.is_live)
            if self.is_live:
                self._watch_over(self._collect_from, self._gatherer)

    def _watch_over(self, work: Callable[[T], None], what: T) -> None:
        """See what comes while the reader is busy: only wanted frames, of one snippet at a time, are kept."""
        self._thread = threading.Thread(target=self._collect, args=(work, what), name="keepsight-snippets", daemon=True)
        self._thread.start()

    def _gather(self, gatherer: _Gatherer) -> Snippet | None:
        """The next snippet of a file."""
        silent_since = time.monotonic()
        while not self._closed:
            if gatherer.step():
                silent_since = time.monotonic()
            gatherer.tracks.check()
            if self._absent == "error":
                refuse_absent(gatherer.tracks, ("video", "audio"))
            over = gatherer.is_over()  # asked first: the end may come between the two questions, with snippets left to give
            if gatherer.is_ready():
                return gatherer.cut()
            if over:
                self._judge_end(gatherer)
                return None
            limit = self._timeouts.stall_s if gatherer.origin_s is not None else self._timeouts.first_frame_s
            if time.monotonic() - silent_since > limit:
                raise SourceUnreadableError(
                    f"{self.uri} gave nothing for {limit:g} s.", fix="Check the disk or the network it is on."
                )
        return None

    def _judge_end(self, gatherer: _Gatherer) -> None:
        missing = gatherer.tracks.missing()
        if missing is not None:
            raise SourceUnreadableError(f"{self.uri} is truncated: {missing} are there.", fix="Copy or download it again.")
        if gatherer.origin_s is None:
            raise SourceUnreadableError(
                f"{self.uri} has neither a picture nor a sound in it that can be decoded.",
                fix="It may be damaged: try to play it elsewhere.",
            )

    def _wait(self) -> Snippet | None:
        """The newest snippet of a live source, as soon as there is one."""
        with self._condition:
            while self._newest is None and self._fault is None and not self._closed:
                self._condition.wait(0.5)
            snippet, self._newest = self._newest, None
            if snippet is None and self._fault is not None and not self._closed:
                raise self._fault
            return snippet

    def _collect(self, work: Callable[[T], None], what: T) -> None:
        try:
            work(what)
        except BaseException as error:
            with self._condition:
                self._fault = error
                self._condition.notify_all()

    def _carry(self, supervisor: Supervisor[LiveTracks]) -> None:
        """Snippets of one connection after the other; whether one lives is the supervisor's to see."""
        clock = _Clock()
        gatherer: _Gatherer | None = None
        while not self._closed:
            current = supervisor.current(_PULL_S)
            if current is None:
                continue
            generation, tracks = current
            # Not by its generation: connections that gave nothing have that of the one after them.
            if gatherer is None or gatherer.tracks is not tracks:
                line = SampleLine(self._line_rate)
                gatherer = _Gatherer(
                    tracks, self._view, line, self._sound_late_s, self._grid, live=True, clock=clock, generation=generation
                )
            if not gatherer.step():
                supervisor.pause(_PULL_S / 2)  # at its end a pull returns at once
            elif gatherer.begun():
                supervisor.delivered()
            if self._absent == "error":
                refuse_absent(gatherer.tracks, ("video", "audio"))
            ready = gatherer.is_ready()
            if ready or gatherer.is_overdue(self._wait_s):
                snippet = gatherer.cut()
                if snippet.frame_mask.any() or snippet.sample_mask.any():  # a new connection's first times may leap
                    self.late += not ready
                    self._offer(snippet)

    def _collect_from(self, gatherer: _Gatherer) -> None:
        started = last = time.monotonic()
        while not self._closed:
            now = time.monotonic()
            gatherer.step()
            last = max(last, gatherer.alive_at)
            gatherer.tracks.check()
            if self._absent == "error":
                refuse_absent(gatherer.tracks, ("video", "audio"))
            if gatherer.origin_s is None:
                if now - started > self._timeouts.first_frame_s:
                    raise silence_of(self.uri, self._timeouts.first_frame_s)
            elif now - last > self._timeouts.stall_s:
                raise SourceLostError(f"{self.uri} is lost: nothing for {now - last:.1f} s.", fix="Start again.")
            elif gatherer.has_lost_a_track():
                raise SourceLostError(f"{self.uri} is lost: the stream ended.", fix="Start again.")
            ready = gatherer.is_ready()
            if ready or gatherer.is_overdue(self._wait_s):
                self.late += not ready
                self._offer(gatherer.cut())

    def _offer(self, snippet: Snippet) -> None:
        with self._condition:
            self.dropped += self._newest is not None
            self._newest = snippet
            self._condition.notify_all()


@dataclass(frozen=True)
class _Grid:
    """Where snippets begin, how long they are, and when in them frames are sampled: all in seconds."""

    length_s: float
    hop_s: float
    offsets_s: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name, value in (("length_s", self.length_s), ("hop_s", self.hop_s)):
            if not (np.isfinite(value) and value > 0):
                raise UsageError(f"{name}={value} makes no sense.", fix="Give seconds, more than 0.")

    def start_s(self, index: int) -> float:
        return index * self.hop_s

    def wants(self, begin_s: float, end_s: float) -> bool:
        """Whether a frame that stands from one moment to another is the newest one at a sampling time."""
        first = np.maximum(0, np.ceil((begin_s - _ROUNDING_S - self.offsets_s) / self.hop_s))
        return bool(np.any(first * self.hop_s + self.offsets_s < end_s - _ROUNDING_S))


def _offsets(frames: int | Sequence[float], length_s: float) -> NDArray[np.float64]:
    if isinstance(frames, int):
        if frames < 1:
            raise UsageError(f"{frames} frames in a snippet make no sense.", fix="Give 1 or more.")
        return np.arange(frames, dtype=np.float64) * (length_s / frames)
    offsets = np.asarray(frames, np.float64)
    ascending = offsets.ndim == 1 and offsets.size > 0 and bool(np.all(np.diff(offsets) >= 0))
    if not (ascending and offsets[0] >= 0 and offsets[-1] < length_s):
        raise UsageError(f"frames={frames!r} are not times in a snippet of {length_s:g} s.", fix="Give them ascending, from 0.")
    return offsets


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A frame that a snippet wants, and how long it stands, in seconds of the stream."""

    begin_s: float
    end_s: float
    image: NDArray[np.uint8]


class _Clock:
    """Stream time over several connections: it goes on while there is none.

    Attributes:
        epoch_s: of time.monotonic(), when the stream began; None before.
    """

    def __init__(self) -> None:
        self.epoch_s: float | None = None

    def stream_s(self, captured_at: float) -> float:
        self.epoch_s = captured_at if self.epoch_s is None else self.epoch_s
        return max(0.0, captured_at - self.epoch_s)


class _Gatherer:
    """Collects the tracks up to the end of a snippet, and cuts it out.

    Holds what the next snippet needs, and no more: the frames that it wants, and its samples.
    """

    def __init__(
        self,
        tracks: Tracks,
        view: View,
        line: SampleLine,
        sound_late_s: float,
        grid: _Grid,
        *,
        live: bool,
        clock: _Clock | None = None,
        generation: int = 0,
    ) -> None:
        assert view.size is not None
        self.tracks = tracks
        self._view, self._grid, self._live = view, grid, live
        self._line, self._sound_late_s = line, sound_late_s
        self._clock, self._generation, self._told = clock, generation, False
        self._kept: list[_Kept] = []
        self._last: Shot | None = None  # how long it stands shows when the next one comes
        self._interval_s = 0.0
        self._index = 0
        self.origin_s: float | None = None  # running time at which the stream starts
        # When a frame came, in seconds of time.monotonic(); of sound alone, when that came. A camera whose pictures stop is not
        # alive because its microphone is; one that sends no sound while it is quiet, is.
        self.alive_at = 0.0
        self._video_s = 0.0  # up to where frames are known, in seconds of the stream
        self._end_s = 0.0  # where what came ends

    def step(self) -> bool:
        """Take in what there is; whether there was any. Waits a little for the track that is behind."""
        behind, ahead = self._order()
        if self._take(behind, _PULL_S):
            return True
        # Its container may have it only after much more of the other one, which waits in its sink.
        return ahead is not None and self._take(ahead, 0.0)

    def begun(self) -> bool:
        """Whether the first data have come; true once."""
        first, self._told = not self._told and self.origin_s is not None, self._told or self.origin_s is not None
        return first

    def is_ready(self) -> bool:
        """Whether all of the next snippet has come."""
        if not self._starts_a_snippet():
            return False
        end_s = self._grid.start_s(self._index) + self._grid.length_s
        return self._passed("video", end_s) and self._passed("audio", end_s)

    def is_overdue(self, wait_s: float) -> bool:
        """Whether the end of the next snippet was so long ago, by the pipeline's clock."""
        elapsed_s = self.tracks.elapsed_s()
        if self.origin_s is None or elapsed_s is None:
            return False
        return elapsed_s - self.origin_s > self._grid.start_s(self._index) + self._grid.length_s + wait_s

    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self._ended("video") and self._ended("audio")

    def has_lost_a_track(self) -> bool:
        """Whether a track that was there has ended, which for a live source means that it is gone."""
        tracks: tuple[Track, ...] = ("video", "audio")
        return any(self.tracks.has(track) is True and self._ended(track) for track in tracks)

    def cut(self) -> Snippet:
        """The next snippet, as far as it has come."""
        grid, line = self._grid, self._line
        start_s = grid.start_s(self._index)
        frames, times = self._sampled(start_s + grid.offsets_s)
        begin, length = round(start_s * line.rate), round(grid.length_s * line.rate)
        samples, heard = line.read(begin, length)
        end_s, seen = start_s + grid.length_s, ~np.isnan(times)
        snippet = Snippet(frames, times, samples, start_s, end_s, seen, heard, self._index, self._generation)
        self._index += 1
        next_s = grid.start_s(self._index)
        line.forget(round(next_s * line.rate))
        self._kept = [kept for kept in self._kept if kept.end_s > next_s]
        return snippet

    def _starts_a_snippet(self) -> bool:
        """Whether there is anything of the next snippet, once everything has come."""
        if self._live or not self.is_over():
            return self.origin_s is not None
        self._settle()
        return self._end_s > self._grid.start_s(self._index) + min(_RAGGED_S, self._grid.length_s / 2)

    def _order(self) -> tuple[Track, Track | None]:
        if self._ended("video"):
            return "audio", None
        if self._ended("audio"):
            return "video", None
        heard_s = (self._line.end or 0) / self._line.rate
        return ("video", "audio") if self._video_s <= heard_s else ("audio", "video")

    def _ended(self, track: Track) -> bool:
        return self.tracks.ended(track)

    def _passed(self, track: Track, moment_s: float) -> bool:
        if track == "video":
            return self._video_s >= moment_s or self._ended(track)
        return (self._line.end or 0) >= round(moment_s * self._line.rate) or self._ended(track)

    def _take(self, track: Track, timeout_s: float) -> bool:
        if track == "video":
            shot = self.tracks.pull_shot(timeout_s)
            if shot is not None:
                self.alive_at = time.monotonic()
                self._see(shot)
            return shot is not None
        chunk = self.tracks.pull_chunk(timeout_s)
        if chunk is not None:
            if self.tracks.has("video") is False:
                self.alive_at = time.monotonic()
            time_s = self._stream_s(chunk.time_s) - self._sound_late_s
            self._line.add(chunk.samples, time_s, restart=chunk.restart)
            self._end_s = max(self._end_s, (self._line.end or 0) / self._line.rate)
        return chunk is not None

    def _see(self, shot: Shot) -> None:
        time_s = self._stream_s(shot.time_s)
        if self._last is not None:
            begin_s = self._stream_s(self._last.time_s)
            if time_s > begin_s:
                self._interval_s = time_s - begin_s
            self._keep(self._last, begin_s, time_s)
        self._last, self._video_s = shot, max(self._video_s, time_s)

    def _settle(self) -> None:
        """The last frame of all stands for its own length, or as long as the one before it if it has none."""
        if self._last is not None:
            begin_s, end_s = self._last_span()
            self._keep(self._last, begin_s, end_s)
            self._end_s, self._last = max(self._end_s, end_s), None

    def _last_span(self) -> tuple[float, float]:
        assert self._last is not None
        begin_s = self._stream_s(self._last.time_s)
        own = self._last.end_s
        return begin_s, begin_s + self._interval_s if own is None else self._stream_s(own)

    def _keep(self, shot: Shot, begin_s: float, end_s: float) -> None:
        if end_s > self._grid.start_s(self._index) and self._grid.wants(begin_s, end_s):
            self._kept.append(_Kept(begin_s, end_s, self._image(shot)))

    def _image(self, shot: Shot) -> NDArray[np.uint8]:
        return scaled(sample_to_array(shot.sample), self._view, pixel_aspect(shot.sample))

    def _sampled(self, moments_s: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """The frames that stand at these moments, and their times."""
        assert self._view.size is not None
        width, height = self._view.size
        frames = np.zeros((len(moments_s), height, width, 3), np.uint8)
        times = np.full(len(moments_s), np.nan)
        standing = list(self._kept)
        if self._last is not None:  # of a live source, whose next frame is late
            begin_s, end_s = self._last_span()
            if np.any((moments_s >= begin_s - _ROUNDING_S) & (moments_s < end_s - _ROUNDING_S)):
                standing.append(_Kept(begin_s, end_s, self._image(self._last)))
        for position, moment_s in enumerate(moments_s):
            at = [kept for kept in standing if kept.begin_s <= moment_s + _ROUNDING_S and moment_s < kept.end_s - _ROUNDING_S]
            if at:
                frames[position], times[position] = at[-1].image, at[-1].begin_s
        return frames, times

    def _resumed_s(self, running_s: float) -> float:
        """The time of the stream at which this connection's first data were captured; snippets begin behind it."""
        if self._clock is None:
            return 0.0
        age_s = max(0.0, (self.tracks.elapsed_s() or running_s) - running_s)
        resumed_s = self._clock.stream_s(time.monotonic() - age_s)
        self._index = int(np.ceil(resumed_s / self._grid.hop_s))
        return resumed_s

    def _stream_s(self, running_s: float) -> float:
        if self.origin_s is None:
            # A file's tracks keep their distance from its beginning; what is live starts with what comes first.
            self.origin_s = running_s - self._resumed_s(running_s) if self._live else 0.0
        return running_s - self.origin_s
