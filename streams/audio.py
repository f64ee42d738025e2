"""The sound of a source: mono float32 at one rate, every sample at its time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Timeouts
from keepsight.streams.errors import KeepsightError, NoFrameError, SourceLostError, SourceUnreadableError, UsageError
from keepsight.streams.events import Event, EventLog, State
from keepsight.streams.microphone import Microphone, is_microphone
from keepsight.streams.presence import check_presence
from keepsight.streams.sampleline import SampleLine
from keepsight.streams.supervisor import Supervisor
from keepsight.streams.tracks import Chunk, LiveTracks, Track, Tracks, supervisor_of
from keepsight.streams.uri import SourceURI

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Audio", "Sound", "parse_source", "refuse_absent"]

_PULL_S = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A piece of sound.

    Attributes:
        samples: float32 `[n]`, mono, in memory of its own; full scale is -1 to 1.
        start_s: time of the first, in seconds: of a file since its beginning, of a live source since its first sound.
        mask: bool `[n]`, false where there was no sound: silence put in for what was lost.
        generation: how many earlier connections had given sound. Between two generations sound is missing, for as long as their
            times say.
    """

    samples: NDArray[np.float32]
    start_s: float
    mask: NDArray[np.bool_]
    generation: int = 0


class Audio(Iterator[Sound]):
    """The sound of a file, a camera or a microphone, piece by piece; each begins where the one before it ended.

    With `reconnect` a live source is opened again whenever it is lost, by the supervisor of `LiveSource`: time goes on over the
    gap, and the next piece has another generation. Without it, a loss raises.

    Several channels are mixed to their mean (`librosa.to_mono`), after resampling by GStreamer's audioresample, whose delay is
    below a tenth of a sample.
    Sound keeps within 5 ms of its time stamps; a lost packet is silence of the right length (see `SampleLine`). An encoder's own
    delay (AAC's priming) is taken off only where the container tells of it. A live source whose reader is away for
    long loses the oldest; that is silence, too.

    Args:
        uri: a file, an RTSP camera, `mic://`, `alsa://hw:1,0`, `pulse://NAME`, or `test://ball` (a tick each second).
        rate: samples per second.
        pace: `offline` reads a test pattern as a file.
        timeouts: seconds to wait for the first sound, and for any more.
        reconnect: when to try again; None for one connection. Only for what is live.
        on_event: called with each `Event`, as of `LiveSource`.

    Raises:
        UsageError, SourceNotFoundError, SourceUnreadableError, MissingComponentError: at once, as for `Source`.
        SourceUnreadableError: while iterating: no sound in it; truncated (after all that is there).
        NoFrameError, SourceLostError: while iterating: a live source gave nothing in time, ended or stalled.

    >>> samples, start_s = Audio("test://ball?frames=30", pace="offline").read()
    >>> samples.shape, start_s
    ((16000,), 0.0)
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        rate: int = 16000,
        pace: Literal["auto", "offline"] = "auto",
        timeouts: Timeouts | None = None,
        reconnect: Reconnect | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._line = SampleLine(rate)
        self._timeouts = timeouts or Timeouts()
        self._closed = threading.Event()
        self._tracks: Tracks | None = None
        self._origin_s: float | None = None
        self._uri: SourceURI | None = None
        self._microphone: Microphone | None = None
        if is_microphone(uri):
            self._microphone, self.is_live = Microphone.parse(str(uri)), True
        else:
            self._uri, self.is_live = parse_source(uri, pace)
        self._log = EventLog(on_event=on_event)
        self._supervisor: Supervisor[LiveTracks] | None = None
        self._generation, self._gone = 0, (0, 0)  # silence and cut of earlier connections
        self._epoch_s: float | None = None  # of time.monotonic(), when the stream began
        if reconnect is not None:
            refuse_files(self._microphone or self._uri, live=self.is_live)
            self._supervisor = supervisor_of(
                self._uri, view=None, rate=rate, microphone=self._microphone,
                timeouts=self._timeouts, reconnect=reconnect, log=self._log,
            )  # fmt: skip
            self._finalizer = weakref.finalize(self, self._supervisor.close)

    @property
    def state(self) -> State:
        """`connecting`, `live`, `stalled` (only with `reconnect`) or `lost`."""
        return self._log.state

    @property
    def events(self) -> list[Event]:
        """What happened since the start, oldest first; the newest 256."""
        return self._log.events

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self._line.rate

    @property
    def silence(self) -> int:
        """Samples of silence put in so far, for sound that was missing."""
        return self._gone[0] + self._line.silence

    @property
    def cut(self) -> int:
        """Samples left out so far, because their time was over."""
        return self._gone[1] + self._line.cut

    def __next__(self) -> Sound:
        asked = time.monotonic()
        try:
            while not self._closed.is_set():
                if self._supervisor is not None:
                    sound = self._carried(self._supervisor)
                else:
                    sound = self._pull(self._open())
                    self._watch(sound, time.monotonic() - asked)
                if sound is not None:
                    return sound
        except BaseException as error:
            if self._supervisor is None and isinstance(error, KeepsightError):
                self._log.add("lost", error.message)
            self.close()
            raise
        raise StopIteration

    def read(self) -> tuple[NDArray[np.float32], float]:
        """All that is left of a source that ends: float32 `[n]`, and the time of the first sample."""
        sounds = list(self)
        if not sounds:
            return np.zeros(0, np.float32), 0.0
        return np.concatenate([sound.samples for sound in sounds]), sounds[0].start_s

    def close(self) -> None:
        """Stop and give everything back. Closing twice does nothing."""
        self._closed.set()
        if self._supervisor is not None:
            self._supervisor.close()
        if self._tracks is not None:
            self._tracks.close()

    def __enter__(self) -> Audio:
        if self._supervisor is not None:
            self._supervisor.start()
        else:
            self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Audio({str(self._microphone or self._uri)!r}, rate={self.rate})"

    def _open(self) -> Tracks:
        if self._tracks is None:
            self._tracks = Tracks(
                self._uri, view=None, rate=self.rate, microphone=self._microphone, live=self.is_live
            )
        return self._tracks

    def _pull(self, tracks: Tracks) -> Sound | None:
        ended = tracks.ended("audio")  # before pulling: what came before the end is given first
        chunk = tracks.pull_chunk(_PULL_S)
        if chunk is None:
            tracks.check()
            refuse_absent(tracks, ("audio",))
            if ended:
                self._end(tracks)
            return None
        if self._origin_s is None:
            self._origin_s = chunk.time_s if self.is_live else 0.0
        return self._sound(chunk, self._origin_s)

    def _carried(self, supervisor: Supervisor[LiveTracks]) -> Sound | None:
        """Sound of the connection that there is just now, if any comes."""
        supervisor.start()
        current = supervisor.current(_PULL_S)
        if current is None:
            return None
        generation, tracks = current
        chunk = tracks.pull_chunk(_PULL_S)
        if chunk is None:
            refuse_absent(tracks, ("audio",))
            supervisor.pause(_PULL_S / 5)  # at its end a pull returns at once
            return None
        if self._epoch_s is None or self._origin_s is None or generation != self._generation:
            age_s = max(0.0, (tracks.elapsed_s() or chunk.time_s) - chunk.time_s)
            captured_at = time.monotonic() - age_s
            self._epoch_s = captured_at if self._epoch_s is None else self._epoch_s
            # Never before the end of what was given.
            start_s = max(captured_at - self._epoch_s, (self._line.end or 0) / self.rate)
            self._gone = (self.silence, self.cut)
            self._line, self._generation, self._origin_s = SampleLine(self.rate), generation, chunk.time_s - start_s
            supervisor.delivered()
        return self._sound(chunk, self._origin_s)

    def _sound(self, chunk: Chunk, origin_s: float) -> Sound | None:
        """A chunk as it follows the ones before it."""
        before = self._line.end
        self._line.add(chunk.samples, chunk.time_s - origin_s, restart=chunk.restart)
        if self._line.end == before or self._line.end is None:
            return None  # all of it was over
        begin = before if before is not None else max(0, round((chunk.time_s - origin_s) * self.rate))
        samples, heard = self._line.read(begin, self._line.end - begin)
        self._line.forget(self._line.end)
        return Sound(samples, begin / self.rate, heard, self._generation)

    def _end(self, tracks: Tracks) -> None:
        if self.is_live:
            raise SourceLostError(f"{tracks} is lost: the stream ended.", fix="Start again.")
        missing = tracks.missing()
        if missing is not None:
            raise SourceUnreadableError(f"{tracks} is truncated: {missing} are there.", fix="Copy or download it again.")
        if self._line.end is None:
            raise SourceUnreadableError(f"{tracks} has no sound in it that can be decoded.", fix="Try to play it elsewhere.")
        self.close()

    def _watch(self, sound: Sound | None, waited_s: float) -> None:
        if sound is not None:
            if self._log.state != "live":
                self._log.add("live", "first sound")
        elif self._line.end is None:
            if waited_s > self._timeouts.first_frame_s:
                raise NoFrameError(f"{self._tracks} gave no sound within {waited_s:.0f} s.", fix="Check that it is playing.")
        elif waited_s > self._timeouts.stall_s:
            kind: type[KeepsightError] = SourceLostError if self.is_live else SourceUnreadableError
            raise kind(f"{self._tracks} gave no sound for {waited_s:.1f} s.", fix="Check the source, then start again.")


def parse_source(uri: str | Path, pace: str) -> tuple[SourceURI, bool]:
    """Read a source's address and say whether it is live.

    Raises:
        UsageError: an address or a pace that makes no sense.
        SourceNotFoundError, SourceUnreadableError: there is no such file or device, or it can't be read.
    """
    if pace not in ("auto", "offline"):
        raise UsageError(f"pace={pace!r} is not known here.", fix="Use 'auto' or 'offline'.")
    parsed = SourceURI.parse(uri)
    if pace == "offline" and parsed.is_camera and parsed.kind != "test":
        raise UsageError(f"{parsed} is live and can't be read offline.", fix="Leave pace='auto'.")
    if parsed.kind == "file" and Path(parsed.location).is_dir():
        raise UsageError(f"{parsed} is a directory, and pictures have no sound.", fix="Give a video file, or use `Source`.")
    check_presence(parsed)
    return parsed, parsed.is_camera and pace != "offline"


def refuse_files(source: object, *, live: bool) -> None:
    """Raise UsageError if a source that is to be opened again when it is lost can't be lost."""
    if not live:
        raise UsageError(f"{source} is not live, and reconnect= is for what can be lost.", fix="Leave it out.")


def refuse_absent(tracks: Tracks, wanted: Sequence[Track]) -> None:
    """Raise SourceUnreadableError if a track is known not to be there."""
    for track in wanted:
        if tracks.has(track) is False:
            what = "sound" if track == "audio" else "video"
            fix = "Give one that has." if len(wanted) == 1 else "absent='pad' gives zeros instead."
            raise SourceUnreadableError(f"{tracks} has no {what} in it.", fix=fix)
