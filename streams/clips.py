"""Cuts a clip out of recorded segments: the coded pictures as they are, in another container."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from keepsight.streams.errors import KeepsightError, SourceUnreadableError, UsageError
from keepsight.streams.gst import first_error, launch, load_gst, require_elements
from keepsight.streams.recorded import Segment, segments_in

__all__ = ["Clip", "clip", "moment_text", "parse_moment"]

_MUXERS = {".mp4": "mp4mux", ".mkv": "matroskamux"}
_DEMUXERS = {".ts": "tsdemux", ".mkv": "matroskademux"}
_PARSERS = {"video/x-h264": "h264parse", "video/x-h265": "h265parse"}
_IN_MP4 = (*_PARSERS, "image/jpeg")

_GAP_S = 2.0  # a longer time without a picture is told
_OVERLAP_S = 1.0  # segments follow each other this closely; what begins earlier than that had its clock set back
_MOST_REORDERED = 16  # pictures that are decoded before one that is shown before them: what H.264 and H.265 allow
_ROOM_BYTES = 8 << 20
_PULL_S = 0.05


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip that was written.

    Attributes:
        path: where it is.
        start_s, end_s: when its first picture was captured and its last one ended, in seconds since 1970. A clip begins with a
            key frame, so it may begin before it was asked to; where pictures are sent out of order it may end some pictures
            later, with the one that the last are decoded from.
        frames: pictures in it.
        gaps: times of more than 2 s within it of which nothing was recorded, as (start, end).
    """

    path: Path
    start_s: float
    end_s: float
    frames: int
    gaps: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class _Picture:
    """A coded picture: when it was captured, when it is to be decoded, both in seconds since 1970."""

    at_s: float
    decoded_at_s: float
    length_s: float
    is_key: bool
    buffer: Any
    caps: str


@dataclass
class _Written:
    """What has gone into a clip so far."""

    start_s: float = 0.0
    origin_s: float = 0.0  # of its time
    end_s: float = 0.0
    decoded_s: float = -math.inf
    frames: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)


def clip(folder: str | os.PathLike[str], start_s: float, end_s: float, out: str | os.PathLike[str]) -> Clip:
    """Write what was recorded from one moment to another, without encoding it again.

    It may be called while the folder is being recorded to. The file appears when it is complete.

    Args:
        folder: of a `Recorder`.
        start_s, end_s: seconds since 1970. The clip begins with the last key frame at or before the start, if there is one.
        out: an .mp4 or .mkv file; an existing one is replaced.

    Raises:
        UsageError: times that make no sense, or nothing recorded between them; another kind of file.
        SourceNotFoundError: no such folder.
        SourceUnreadableError: the camera changed its format in between.
        KeepsightError: it can't be written.
    """
    path = Path(out)
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s < end_s):
        raise UsageError(f"from {moment_text(start_s)} to {moment_text(end_s)} is no time.", fix="Give the earlier moment first.")
    if path.suffix.lower() not in _MUXERS:
        raise UsageError(f"{path} is no kind of clip.", fix="Name an .mp4 or .mkv file.")
    segments = segments_in(Path(folder))
    pictures = _between(_pictures(_chosen(segments, start_s, end_s)), start_s, end_s)
    first = next(pictures, None)
    if first is None:
        raise UsageError(
            f"nothing is recorded in {folder} from {moment_text(start_s)} to {moment_text(end_s)}.",
            fix=_covers(Path(folder), segments),
        )
    partial = path.with_name(f"{path.name}.part")
    try:
        written = _write(partial, path, first, pictures)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Clip(path, written.start_s, written.end_s, written.frames, tuple(written.gaps))


def parse_moment(text: str, now_s: float | None = None) -> float:
    """Read `14:05`, `14:05:30` (the last time this clock showed that), or an ISO date and time, local unless it says otherwise.

    Raises:
        UsageError: anything else.
    """
    now = datetime.fromtimestamp(time.time() if now_s is None else now_s)
    for pattern in ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f"):
        with contextlib.suppress(ValueError):
            clock = datetime.strptime(text, pattern).time()
            moment = datetime.combine(now.date(), clock)
            return (moment if moment <= now else moment - timedelta(days=1)).timestamp()
    try:
        # Python 3.10 does not read the Z.
        return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text).timestamp()
    except ValueError:
        raise UsageError(f"{text!r} is no time.", fix="Write 14:05, 14:05:30 or 2026-11-24T14:05:30.") from None


def moment_text(moment_s: float) -> str:
    """A moment, in seconds since 1970, as the clock on the wall shows it."""
    try:
        return datetime.fromtimestamp(moment_s).astimezone().isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError):
        return f"{moment_s:g}"


def _chosen(segments: Sequence[Segment], start_s: float, end_s: float) -> list[Segment]:
    """Those that can hold pictures of that time: the name tells the beginning, and the next name that it was over."""
    chosen = []
    for index, segment in enumerate(segments):
        following = segments[index + 1] if index + 1 < len(segments) else None
        is_over = following is not None and segment.start_s <= following.start_s <= start_s
        if segment.start_s < end_s and not is_over:
            chosen.append(segment)
    return chosen


def _pictures(segments: Sequence[Segment]) -> Iterator[_Picture]:
    """Their pictures in the order of decoding, dated; time never goes back from one segment to the next."""
    last_s = -math.inf
    for segment in segments:
        if segment.start_s < last_s - _OVERLAP_S:
            continue
        shift_s, first = 0.0, True
        for picture in _read(segment):
            if first:  # what a name says is rounded, and so is a stream's clock
                shift_s, first = max(0.0, last_s - picture.at_s), False
            last_s = max(last_s, picture.at_s + shift_s + picture.length_s)
            yield replace(picture, at_s=picture.at_s + shift_s, decoded_at_s=picture.decoded_at_s + shift_s)


def _between(pictures: Iterator[_Picture], start_s: float, end_s: float) -> Iterator[_Picture]:
    """The pictures of a clip, in the order of decoding: none is missing among those it shows, and each can be decoded."""
    return _decodable(_since(_until(pictures, end_s), start_s))


def _until(pictures: Iterator[_Picture], end_s: float) -> Iterator[_Picture]:
    """Those shown before the end, the later ones that they are decoded from, and what is shown before those."""
    last_s = -math.inf
    held: list[_Picture] = []  # needed if one that is needed comes after them
    for picture in pictures:
        held.append(picture)
        if picture.at_s < max(end_s, last_s):
            last_s = max(last_s, *(one.at_s for one in held))
            yield from held
            held.clear()
        elif len(held) > _MOST_REORDERED:
            return


def _since(pictures: Iterator[_Picture], start_s: float) -> Iterator[_Picture]:
    """From the last key frame at or before the start on; of what is before, one group of pictures is held at most."""
    group: list[_Picture] | None = []
    for picture in pictures:
        if group is None:
            yield picture
            continue
        last_s = group[-1].at_s if group else -math.inf
        if picture.is_key and (picture.at_s <= start_s or picture.at_s - last_s > _GAP_S):
            group.clear()  # the one before is over before the start
        if picture.is_key or group:
            group.append(picture)
        if group and picture.at_s >= start_s:
            yield from group
            group = None
    if group and max(picture.at_s + picture.length_s for picture in group) > start_s:
        yield from group


def _decodable(pictures: Iterator[_Picture]) -> Iterator[_Picture]:
    """Without those that refer to what is missing: shown before the key frame that they follow, where nothing was before it.

    Such are the leading pictures of an open group (ITU-T H.265, 3.79; H.264 has them behind a recovery point).
    """
    key_s = last_s = -math.inf
    for picture in pictures:
        if picture.is_key and picture.at_s - last_s > _GAP_S:
            key_s = picture.at_s
        if picture.at_s >= key_s:
            last_s = max(last_s, picture.at_s + picture.length_s)
            yield picture


def _read(segment: Segment) -> Iterator[_Picture]:
    """The pictures of a segment, as far as it goes: one that broke off ends with its last whole picture."""
    gst = load_gst()
    demuxer = _DEMUXERS[segment.path.suffix]
    require_elements((demuxer, "filesrc", "appsink", *_PARSERS.values()))
    pipeline = launch(f"filesrc name=file ! {demuxer} name=demuxer")
    pipeline.get_by_name("file").set_property("location", str(segment.path))
    pipeline.get_by_name("demuxer").connect("pad-added", _on_pad)
    pipeline.set_state(gst.State.PLAYING)
    try:
        bus, origin, previous = pipeline.get_bus(), None, None
        while True:
            sink = pipeline.get_by_name("pictures")
            sample = None if sink is None else sink.try_pull_sample(int(_PULL_S * gst.SECOND))
            if sample is not None:
                buffer = sample.get_buffer()
                if buffer.pts == gst.CLOCK_TIME_NONE:
                    # More slices of the same picture: payloaders that put headers before each slice tear it apart.
                    if previous is not None:
                        previous = replace(previous, buffer=previous.buffer.copy().append(_slices(gst, buffer, previous.caps)))
                    continue
                origin = buffer.pts if origin is None else origin
                if previous is not None:
                    yield previous
                previous = _picture(gst, sample, segment.start_s, origin)
                continue
            # A damaged end is an error, too: what came before it counts.
            ended = bus.timed_pop_filtered(
                0 if sink is not None else int(_PULL_S * gst.SECOND), gst.MessageType.EOS | gst.MessageType.ERROR
            )
            if ended is not None or (sink is not None and sink.get_property("eos")):
                break
        if previous is not None:
            yield previous
    finally:
        pipeline.set_state(gst.State.NULL)


def _on_pad(demuxer: Any, pad: Any) -> None:
    """Put what makes whole pictures of a stream behind its pad."""
    gst, pipeline = load_gst(), demuxer.get_parent()
    caps = pad.get_current_caps() or pad.query_caps(None)
    media = caps.get_structure(0).get_name()
    if pipeline.get_by_name("pictures") is not None or not media.startswith(("video/", "image/")):
        return
    sink = gst.ElementFactory.make("appsink", "pictures")
    sink.set_property("sync", False)
    sink.set_property("max-buffers", 16)
    chain = [sink]
    if media in _PARSERS:
        whole = gst.ElementFactory.make("capsfilter")
        whole.set_property("caps", gst.Caps.from_string(f"{media},stream-format=byte-stream,alignment=au"))
        chain = [gst.ElementFactory.make(_PARSERS[media]), whole, sink]
    for element in reversed(chain):
        pipeline.add(element)
    for element, following in pairwise(chain):
        element.link(following)
    for element in reversed(chain):
        element.sync_state_with_parent()
    pad.link(chain[0].get_static_pad("sink"))


def _picture(gst: Any, sample: Any, start_s: float, origin: int) -> _Picture:
    buffer = sample.get_buffer()
    none = gst.CLOCK_TIME_NONE
    at_s = start_s + (buffer.pts - origin) / gst.SECOND
    decoded_at_s = at_s if buffer.dts == none else start_s + (buffer.dts - origin) / gst.SECOND
    length_s = 0.0 if buffer.duration == none else buffer.duration / gst.SECOND
    is_key = not buffer.has_flags(gst.BufferFlags.DELTA_UNIT)
    return _Picture(at_s, decoded_at_s, length_s, is_key, buffer, _format(sample.get_caps()))


def _slices(gst: Any, buffer: Any, form: str) -> Any:
    """A piece of a picture from its first slice on: headers in the middle of a picture would make a parser begin another one."""
    data = buffer.extract_dup(0, buffer.get_size())
    for start in re.finditer(rb"\x00\x00\x01", data):
        kind = data[start.end()] if start.end() < len(data) else 0
        is_slice = kind & 31 in range(1, 6) if form.startswith("video/x-h264") else (kind >> 1 & 63) < 32
        if is_slice:
            return gst.Buffer.new_wrapped(data[start.start() :])
    return gst.Buffer.new()


def _format(caps: Any) -> str:
    """What must stay the same in one file: the codec and the size."""
    structure = caps.get_structure(0)
    return f"{structure.get_name()} {structure.get_value('width')}x{structure.get_value('height')}"


def _write(partial: Path, path: Path, first: _Picture, others: Iterator[_Picture]) -> _Written:
    gst = load_gst()
    media = first.caps.split()[0]
    if path.suffix.lower() == ".mp4" and media not in _IN_MP4:
        raise UsageError(f"{media} can't be put into an .mp4 file.", fix="Name an .mkv file.")
    parser, muxer = _PARSERS.get(media, "identity"), _MUXERS[path.suffix.lower()]
    require_elements(("appsrc", parser, muxer, "filesink"))
    pipeline = launch(f"appsrc name=pictures format=time ! {parser} ! {muxer} ! filesink name=file")
    pipeline.get_by_name("file").set_property("location", str(partial))
    source, bus = pipeline.get_by_name("pictures"), pipeline.get_bus()
    form = f"{media},stream-format=byte-stream,alignment=au" if media in _PARSERS else media
    width, height = first.caps.split()[1].split("x")
    source.set_property("caps", gst.Caps.from_string(f"{form},width={width},height={height}"))
    written = _Written(first.at_s, min(first.at_s, first.decoded_at_s), first.at_s)
    try:
        pipeline.set_state(gst.State.PLAYING)
        for picture in _chained(first, others):
            if picture.caps != first.caps:
                raise SourceUnreadableError(
                    f"the camera changed from {first.caps} to {picture.caps} at {moment_text(picture.at_s)}.",
                    fix="Cut a clip before that moment, and one after it.",
                )
            _wait_for_room(gst, source, bus, path)
            source.push_buffer(_dated(gst, picture, written))
        source.end_of_stream()
        message = bus.timed_pop_filtered(gst.CLOCK_TIME_NONE, gst.MessageType.ERROR | gst.MessageType.EOS)
        if message.type == gst.MessageType.ERROR:
            raise _failure(path, message)
    finally:
        pipeline.set_state(gst.State.NULL)
    return written


def _chained(first: _Picture, others: Iterator[_Picture]) -> Iterator[_Picture]:
    yield first
    yield from others


def _dated(gst: Any, picture: _Picture, written: _Written) -> Any:
    """A picture's buffer, with the time of the clip; and the note that it is in it."""
    buffer = picture.buffer.copy()
    decoded_s = max(picture.decoded_at_s, written.decoded_s + 1e-6)  # a muxer takes no two pictures at one time
    buffer.pts = round(max(picture.at_s, decoded_s) * gst.SECOND) - round(written.origin_s * gst.SECOND)
    buffer.dts = round(decoded_s * gst.SECOND) - round(written.origin_s * gst.SECOND)
    if picture.at_s - written.end_s > _GAP_S:
        written.gaps.append((written.end_s, picture.at_s))
    written.end_s = max(written.end_s, picture.at_s + picture.length_s)
    written.decoded_s, written.frames = decoded_s, written.frames + 1
    return buffer


def _wait_for_room(gst: Any, source: Any, bus: Any, path: Path) -> None:
    while True:
        message = first_error(bus)
        if message is not None:
            raise _failure(path, message)
        if source.get_property("current-level-bytes") < _ROOM_BYTES:
            return
        time.sleep(0.002)


def _failure(path: Path, message: Any) -> KeepsightError:
    reason = message.parse_error()[0].message.rstrip(".")
    return KeepsightError(f"{path} can't be written: {reason}.", fix="Check the folder and the free disk space.")


def _covers(folder: Path, segments: Sequence[Segment]) -> str:
    if not segments:
        return f"{folder} has no segment yet."
    first, last = moment_text(segments[0].start_s), moment_text(segments[-1].start_s)
    return f"What is recorded begins at {first}; its newest segment, at {last}."
