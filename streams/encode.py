"""Pictures in, a video file out: H.264 in MP4, through GStreamer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.errors import KeepsightError, UsageError
from keepsight.streams.gst import array_to_buffer, has_element, launch, load_gst, require_elements

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["write_video"]

# Near-transparent quality: one level of RGB away on flat colour, and small pictures stay small files.
_X264 = "x264enc pass=quant quantizer={quantizer} speed-preset=veryfast key-int-max={gop} bframes=0"
_OPENH264 = (
    "openh264enc rate-control=off qp-min={quantizer} qp-max={quantizer} gop-size={gop} complexity=high "
    "enable-frame-skip=false"
)
_QUANTIZER = 10
_QUEUED_FRAMES = 8


def write_video(path: str | os.PathLike[str], frames: Iterable[NDArray[np.uint8]], *, fps: float | Fraction) -> None:
    """Encode frames to an H.264 MP4 file. Reading it back gives exactly as many frames.

    The file appears when it is complete: until then it is written beside it, as `NAME.part`.

    Args:
        path: where to; an existing file is replaced.
        frames: uint8 `[H, W, 3]` RGB each, all of one size, at least one. Sizes odd in width or height are stored
            without colour subsampling, which players know but few hardware decoders do.
        fps: frames per second, more than 0.

    Raises:
        UsageError: no frame, a wrong shape or dtype (naming the frame), a frame rate that makes no sense.
        MissingComponentError: no H.264 encoder is installed, or none that can do odd sizes.
        KeepsightError: writing failed, such as for a full disk or a folder that is not there.
    """
    rate = _frame_rate(fps)
    checked = _checked(frames)
    first = next(checked, None)
    if first is None:
        raise UsageError(f"there are no frames to write to {os.fspath(path)}.", fix="Give at least one.")
    partial = Path(f"{os.fspath(path)}.part")
    try:
        _encode(partial, chain([first], checked), _description(first.shape, rate), rate)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _frame_rate(fps: float | Fraction) -> Fraction:
    if not (math.isfinite(fps) and fps > 0):
        raise UsageError(f"fps={fps} is not a frame rate.", fix="Give a number above 0.")
    return fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)


def _checked(frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
            raise UsageError(
                f"frame {index} is {frame.dtype} {list(frame.shape)}, not uint8 [H, W, 3].",
                fix="Convert it to RGB bytes.",
            )
        if shape is not None and frame.shape != shape:
            raise UsageError(
                f"frame {index} is {list(frame.shape)} and those before it are {list(shape)}.", fix="Give one size."
            )
        shape = frame.shape
        yield frame


def _description(shape: tuple[int, ...], rate: Fraction) -> str:
    height, width = shape[:2]
    odd = bool(height % 2 or width % 2)
    # What GStreamer assumes of a YUV picture that does not say: a decoder that ignores the stream's own note, or an
    # encoder that does not write it, gets the colours right all the same.
    colorimetry = "bt709" if height > 576 else "bt601"
    picture = f"format={'Y444' if odd else 'I420'},colorimetry={colorimetry}"
    return (
        f"appsrc name=pictures format=time caps=video/x-raw,format=RGB,width={width},height={height},"
        f"framerate={rate.numerator}/{rate.denominator} "
        f"! videoconvert ! video/x-raw,{picture} ! {_encoder(odd, rate)} ! h264parse ! mp4mux ! filesink name=file"
    )


def _encoder(odd: bool, rate: Fraction) -> str:
    require_elements(("appsrc", "videoconvert", "h264parse", "mp4mux", "filesink"))
    gop = max(1, round(2 * rate))  # a key frame every two seconds
    # openh264enc would cut an odd row or column off, without a word.
    if not has_element("x264enc") and has_element("openh264enc") and not odd:
        return _OPENH264.format(quantizer=_QUANTIZER, gop=gop)
    require_elements(("x264enc",))
    return _X264.format(quantizer=_QUANTIZER, gop=gop)


def _encode(path: Path, frames: Iterable[NDArray[np.uint8]], description: str, rate: Fraction) -> None:
    gst = load_gst()
    pipeline = launch(description)
    pipeline.get_by_name("file").set_property("location", str(path))
    source, bus = pipeline.get_by_name("pictures"), pipeline.get_bus()
    try:
        pipeline.set_state(gst.State.PLAYING)
        for index, frame in enumerate(frames):
            _wait_for_room(source, bus, path, frame.nbytes * _QUEUED_FRAMES)
            source.push_buffer(_buffer(gst, frame, index, rate))
        source.end_of_stream()
        message = bus.timed_pop_filtered(gst.CLOCK_TIME_NONE, gst.MessageType.ERROR | gst.MessageType.EOS)
        if message.type == gst.MessageType.ERROR:
            raise _failure(path, message)
    finally:
        pipeline.set_state(gst.State.NULL)


def _wait_for_room(source: Any, bus: Any, path: Path, limit_bytes: int) -> None:
    """Wait until the encoder has caught up. (appsrc's own `block` would wait forever after an error.)"""
    gst = load_gst()
    wait_ns = 0
    while True:
        message = bus.timed_pop_filtered(wait_ns, gst.MessageType.ERROR)
        if message is not None:
            raise _failure(path, message)
        if source.get_property("current-level-bytes") < limit_bytes:
            return
        wait_ns = 2 * gst.MSECOND


def _buffer(gst: Any, frame: NDArray[np.uint8], index: int, rate: Fraction) -> Any:
    buffer = array_to_buffer(frame)
    # Each end is rounded by itself, so that rounding never adds up.
    begin, end = (round(count * gst.SECOND / rate) for count in (index, index + 1))
    buffer.pts, buffer.duration = begin, end - begin
    return buffer


def _failure(path: Path, message: Any) -> KeepsightError:
    error, _ = message.parse_error()
    return KeepsightError(
        f"{path} can't be written: {error.message.rstrip('.')}.", fix="Check the folder and the free disk space."
    )
