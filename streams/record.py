"""A rolling window of a source's coded video on disk: what a camera sent is kept as it came, up to so many bytes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.streams.branches import SHIELD, Branch
from keepsight.streams.errors import KeepsightError, UsageError
from keepsight.streams.gst import load_gst
from keepsight.streams.padprobes import add_probe
from keepsight.streams.patience import Errand
from keepsight.streams.recorded import Segment, segment_name, segments_in

__all__ = ["RecordEvent", "Recorder"]

RecordState = Literal["waiting", "recording", "stopped"]

# Of which a limit must hold some: a segment is the least that can be deleted.
_SEGMENTS_IN_LIMIT = 8
_LEAST_BYTES = 100_000
_ENTRY, _PARSER, _SPLITTER = "record", "record-parser", "record-splitter"
_FINISH_S = 1.0
_LONGEST_RETRY_S = 300.0

# MPEG-TS needs no index and no end: a file that breaks off plays up to there, and pictures that are shown in another order than
# they are sent keep both times. It has H.264 and H.265; anything else (MJPEG, VP8...) goes into Matroska, which may break off,
# too, and keeps one time, enough for pictures that are never reordered. Fragmented MP4 lost the whole open segment at kill -9
# (GStreamer 1.22).
_PARSERS = {"video/x-h264": "h264parse", "video/x-h265": "h265parse"}

_log = logging.getLogger("keepsight.streams")


@dataclass(frozen=True, slots=True)
class RecordEvent:
    """A recorder began or stopped.

    Attributes:
        wall_time: when, in seconds since 1970.
        state: `recording` or `stopped`.
        reason: why, without passwords.
    """

    wall_time: float
    state: RecordState
    reason: str


class Recorder:
    """Writes segments of a source's coded video into a folder, and deletes the oldest before there are too many bytes.

    Nothing is encoded again where the source is H.264, H.265, MJPEG or another coded video; what comes raw (csi, v4l2, test) is
    encoded once, to H.264. Every connection to a camera starts a new segment, and each begins with a key frame.

    A killed process loses its last group of pictures (from one key frame to the next): splitmuxsink writes a group at its end.
    A source that ends, hangs or is closed loses nothing: closing it waits for the last group to be written, for a second at most
    (a disk that takes longer loses it).

    When it can't write (a full disk, a folder that was deleted), it stops, says so once, and tries again with the next
    connection to the source, and after `retry_s`, after twice as long each time that fails, up to 5 minutes. The frames go on.

    Args:
        folder: where to, made if need be. Only one recorder may write there.
        limit_bytes: of all segments together; those of earlier runs count.
        segment_s: seconds of a segment; it ends with the first key frame after that, or when it has an eighth of the limit.
        on_event: called with each `RecordEvent`, on a thread of GStreamer's; it must return soon.
        retry_s: seconds after which it first tries again to write.

    Raises:
        UsageError: a limit or a time that makes no sense; another recorder writes there.
        KeepsightError: the folder can't be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        limit_bytes: int,
        *,
        segment_s: float = 10.0,
        on_event: Callable[[RecordEvent], None] | None = None,
        retry_s: float = 10.0,
    ) -> None:
        if limit_bytes < _LEAST_BYTES:
            raise UsageError(f"{limit_bytes} bytes are too few for a recording.", fix="Give some MB at least, such as 2GB.")
        if not (math.isfinite(segment_s) and segment_s > 0):
            raise UsageError(f"segments of {segment_s} s make no sense.", fix="Give seconds above 0.")
        if not (math.isfinite(retry_s) and retry_s > 0):
            raise UsageError(f"retry_s={retry_s} makes no sense.", fix="Give seconds above 0.")
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._segment_s, self._on_event = segment_s, on_event
        self._lock_file = _locked(self.folder)
        self._lock = threading.Lock()
        self._state: RecordState = "waiting"
        self._next_number = max((segment.number for segment in segments_in(self.folder)), default=-1) + 1
        self._open: Path | None = None
        self._first_retry_s = self._retry_s = retry_s
        self._retry_at = 0.0  # of time.monotonic()
        self._writers: dict[str, _Writer] = {}  # of the pipelines that play, by their names
        self.failures = 0
        self.deleted = 0

    @property
    def state(self) -> RecordState:
        """`waiting` for the first picture, `recording`, or `stopped` because it can't write."""
        return self._state

    @property
    def segments(self) -> list[Segment]:
        """What there is, oldest first; the newest may be being written."""
        return segments_in(self.folder)

    @property
    def branch(self) -> Branch:
        """What to give to a `Source` or a `LiveSource`."""
        elements = ("identity", "splitmuxsink", "filesink", "mpegtsmux", "h264parse")
        # The second shield is for the queue between the two: what fails behind it would stop it for ever.
        launch = f"{SHIELD} ! identity name={_ENTRY} silent=true"
        return Branch("coded", launch, elements, self._attach, self._failed, self._finish)

    def close(self) -> None:
        """Let another recorder write here. The source must be closed before."""
        self._state = "stopped"
        os.close(self._lock_file)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Recorder({str(self.folder)!r}, {self.limit_bytes}, state={self._state!r})"

    def _attach(self, pipeline: Any) -> None:
        # Nothing that is called back may hold the pipeline: it would never be freed.
        entry = pipeline.get_by_name(_ENTRY)
        self._state = "waiting" if self._state != "stopped" else self._state
        writer = _Writer(self, entry)
        with self._lock:
            self._writers[pipeline.get_name()] = writer
        # Of a sink that is over, a bin tells its own bin, which else says nothing until all its sinks are.
        entry.get_parent().set_property("message-forward", True)
        bus = pipeline.get_bus()
        bus.enable_sync_message_emission()
        bus.connect("sync-message::element", writer.on_message)
        add_probe(entry.get_static_pad("sink"), writer.on_data)

    def _finish(self, pipeline: Any) -> None:
        """Let what is recorded of a pipeline be written to its end."""
        with self._lock:
            writer = self._writers.pop(pipeline.get_name(), None)
        if writer is not None:
            writer.finish(pipeline.get_by_name(_ENTRY))

    def _begin(self, start_s: float, suffix: str) -> Path:
        """The path of the next segment."""
        with self._lock:
            previous, self._open = self._open, self.folder / segment_name(self._next_number, start_s, suffix)
            self._next_number += 1
            path = self._open
        self._trim(0)
        if previous is not None:
            _sync(previous)
        if self._state == "recording":
            self._retry_s = self._first_retry_s  # a whole segment has been written
        elif self._state == "waiting":  # after a failure only when there is something in it
            self._tell("recording", f"writing to {self.folder}")
        return path

    def _confirm(self) -> None:
        """Say that it records again, if it has stopped and something has been written since."""
        if self._state != "stopped" or self._open is None:
            return
        with contextlib.suppress(OSError):
            if self._open.stat().st_size:
                self._tell("recording", f"writing to {self.folder} again")

    def _trim(self, coming_bytes: int) -> None:
        """Delete the oldest until so many bytes more have room."""
        with self._lock:
            segments = self.segments
            total = sum(segment.size for segment in segments) + coming_bytes
            for segment in segments:
                if total <= self.limit_bytes or segment.path == self._open:
                    return
                with contextlib.suppress(FileNotFoundError):  # somebody else deleted it
                    segment.path.unlink()
                total -= segment.size
                self.deleted += 1

    def _failed(self, reason: str) -> None:
        self.failures += 1
        self._retry_at = time.monotonic() + self._retry_s
        if self._state != "stopped":
            self._tell("stopped", reason.rstrip("."))

    def _tell(self, state: RecordState, reason: str) -> None:
        self._state = state
        if self._on_event is None:
            return
        try:
            self._on_event(RecordEvent(time.time(), state, reason))
        except Exception:  # a fault in what only looks on must not end the recording
            _log.exception("on_event failed for %s: %s", state, reason)


class _Writer:
    """Sees the coded pictures of one connection: builds what writes them when it knows what they are."""

    def __init__(self, recorder: Recorder, entry: Any) -> None:
        self._recorder, self._side = recorder, entry.get_parent().get_name()
        self._entry = entry.weak_ref()
        self._gst = load_gst()
        self._media = ""  # what is written, once that is known
        self._failures = recorder.failures  # that were not its own
        self._broken = True  # until a key frame has come
        self._passed = False  # whether there is anything to write
        self._over = threading.Event()
        self._group_bytes = self._largest_group = 0

    def on_data(self, buffer: Any, event: Any) -> bool:
        """See what comes to be written; whether it is."""
        try:
            if buffer is None:
                if event.type == self._gst.EventType.CAPS and not self._media:
                    self._media = event.parse_caps().get_structure(0).get_name()
                    self._build(self._entry())
                return True
            if self._failures != self._recorder.failures and not self._renewed():
                return False
            self._passed = self._wanted(buffer.whole) or self._passed
            return not self._broken
        except (OSError, KeepsightError) as error:  # of the folder: it was deleted, or can't be read
            self._recorder._failed(str(error))
            return False

    def on_message(self, bus: Any, message: Any) -> None:
        """Hear that all has been written."""
        structure = message.get_structure()
        if structure is None or structure.get_name() != "GstBinForwarded" or message.src.get_name() != self._side:
            return
        if structure.get_value("message").type == self._gst.MessageType.EOS:
            self._over.set()

    def finish(self, entry: Any) -> None:
        """End what is written, and wait for it: a group of pictures is written at its end."""
        if not self._passed or self._failures != self._recorder.failures:
            return
        # What is in the queue before it is written, too. A source that has ended has sent its own.
        side = entry.get_parent()
        Errand(lambda: side.get_static_pad("sink").send_event(self._gst.Event.new_eos()))
        self._over.wait(_FINISH_S)

    def _renewed(self) -> bool:
        """After a failure: put new elements in the place of those that failed, if it is time to."""
        if time.monotonic() < self._recorder._retry_at:
            return False
        self._recorder._retry_s = min(2 * self._recorder._retry_s, _LONGEST_RETRY_S)
        self._failures, self._broken, self._passed = self._recorder.failures, True, False
        entry = self._entry()
        for name in (_PARSER, _SPLITTER):  # this is their own streaming thread: nothing comes while they are taken away
            element = entry.get_parent().get_by_name(name)
            if element is not None:
                element.set_state(self._gst.State.NULL)
                entry.get_parent().remove(element)
        self._build(entry)
        return True

    def _wanted(self, buffer: Any) -> bool:
        if buffer.has_flags(self._gst.BufferFlags.DISCONT):  # pictures are missing before it
            self._broken = True
        if not buffer.has_flags(self._gst.BufferFlags.DELTA_UNIT):
            self._broken = False
            self._largest_group = max(self._largest_group, self._group_bytes)
            self._group_bytes = 0
            # The group that has just ended is written now, with what the container adds to it.
            self._recorder._trim(2 * self._largest_group)
            self._recorder._confirm()
        self._group_bytes += buffer.get_size()
        return not self._broken

    def _build(self, entry: Any) -> None:
        """Put the writing elements behind the entry."""
        make, side = self._gst.ElementFactory.make, entry.get_parent()
        for pad in list(side.srcpads):  # the bin offered the entry's open end to the outside
            pad.set_target(None)
            side.remove_pad(pad)
        # splitmuxsink waits for its first group of pictures; the pipeline, and its other sinks, must not.
        side.set_property("async-handling", True)
        parser = _PARSERS.get(self._media)
        sink = make("filesink")
        sink.set_property("buffer-mode", 2)  # none: what a killed process had in its own buffers would be lost
        sink.set_property("async", False)
        splitter = make("splitmuxsink", _SPLITTER)
        splitter.set_property("muxer", make("matroskamux" if parser is None else "mpegtsmux"))
        splitter.set_property("sink", sink)
        splitter.set_property("max-size-time", int(self._recorder._segment_s * self._gst.SECOND))
        splitter.set_property("max-size-bytes", self._recorder.limit_bytes // _SEGMENTS_IN_LIMIT)
        splitter.set_property("send-keyframe-requests", False)
        suffix = ".mkv" if parser is None else ".ts"
        splitter.connect("format-location-full", self._location, suffix)
        side.add(splitter)
        first, pad_name = splitter, "video"
        if parser is not None:
            first, pad_name = make(parser, _PARSER), "sink"
            first.set_property("config-interval", -1)  # what a decoder must know is in front of every key frame
            side.add(first)
            first.link_pads("src", splitter, "video")
            first.sync_state_with_parent()
        splitter.sync_state_with_parent()
        entry.link_pads("src", first, pad_name)

    def _location(self, splitter: Any, number: int, sample: Any, suffix: str) -> str:
        start_s = time.time()
        buffer = sample.get_buffer()
        running = sample.get_segment().to_running_time(self._gst.Format.TIME, buffer.pts)
        pipeline = splitter  # its own base time comes later, with its state
        while pipeline.get_parent() is not None:
            pipeline = pipeline.get_parent()
        clock, is_playing = pipeline.get_clock(), pipeline.get_state(0)[1] == self._gst.State.PLAYING
        if clock is not None and is_playing and running != self._gst.CLOCK_TIME_NONE:
            # As old as the picture: splitmuxsink names a file only when its first group is complete.
            start_s -= max(0.0, (clock.get_time() - pipeline.get_base_time() - running) / self._gst.SECOND)
        return str(self._recorder._begin(start_s, suffix))


def _locked(folder: Path) -> int:
    """Make the folder, and keep others from writing there for as long as the descriptor is open."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise KeepsightError(f"{folder} can't be written to: {error.strerror}.", fix="Name another folder.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UsageError(f"another recorder writes to {folder}.", fix="Give each camera a folder of its own.") from error
    return lock


def _sync(path: Path) -> None:
    """Bring a finished segment to the disk: a power cut then loses the open one at most."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
