"""A memory drawn: time to the right, visual tokens downwards, each slot a bar over the time that it covers, key frames above."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bank import Bank
from keepsight.runtime.moments import Calendar
from keepsight.runtime.session import Session
from keepsight.streams.errors import MissingComponentError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["draw_memory", "save_picture", "slot_at"]

_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 60, 110, 40
_THUMB, _GAP, _AXIS = 96, 14, 46
_INK, _PAPER, _EDGE, _EMPTY = (40, 40, 40), (255, 255, 255), (255, 255, 255), (225, 225, 225)
_FRAME = (170, 170, 170)
# From few frames to many: dark blue, teal, green, yellow (viridis, Smith and van der Walt, 2015).
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)


def save_picture(session: Session, path: Path) -> None:
    """Draw a session's memory into a PNG file.

    Raises:
        UsageError: the file can't be written.
        MissingComponentError: Pillow is not installed.
    """
    picture = draw_memory(session)
    try:
        picture.save(path, "PNG")
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}.", fix="Name a file in your folder.") from error


def slot_at(bank: Bank, times_s: NDArray[np.float64], half_s: float) -> NDArray[np.int64]:
    """Slot of each token that covers each moment, `[N, T]`; -1 = none. Each end of a span is `half_s` wider; the newer wins."""
    found = np.full((bank.tokens, len(times_s)), -1, np.int64)
    tokens = np.arange(bank.tokens)
    for slots in bank.order[0]:
        first, last = bank.first_s[0][slots, tokens], bank.last_s[0][slots, tokens]
        covers = (first[:, None] - half_s <= times_s) & (times_s <= last[:, None] + half_s)
        found[covers] = np.broadcast_to(slots[:, None], found.shape)[covers]
    return found


def draw_memory(session: Session) -> Image:
    """The memory of a session that has seen a frame, as a picture 1200 pixels wide.

    Raises:
        MissingComponentError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingComponentError(f"Pillow can't be used: {error}.", fix="Install it with `pip install pillow`.") from error
    bank, calendar = session.qformer.bank, session.calendar
    half_s = calendar.tolerance_s / 2
    start_s, end_s = float(np.nanmin(bank.first_s)) - half_s, float(np.nanmax(bank.last_s)) + half_s
    columns = _WIDTH - _LEFT - _RIGHT
    row = max(2, 392 // bank.tokens)
    top = _TOP + _THUMB + _GAP
    height = bank.tokens * row
    image = Image.new("RGB", (_WIDTH, top + height + _AXIS), _PAPER)
    times = start_s + (np.arange(columns) + 0.5) / columns * (end_s - start_s)
    bars = _coloured(bank, slot_at(bank, times, half_s), row)
    image.paste(Image.fromarray(bars), (_LEFT, top))
    draw = ImageDraw.Draw(image)
    title = f"{session.frames_seen} frames in {bank.used} slots of {bank.tokens} visual tokens"
    draw.text((_LEFT, 10), title, fill=_INK, font_size=18)

    def x_of(time_s: float) -> float:
        return _LEFT + (time_s - start_s) / (end_s - start_s) * columns

    _thumbnails(image, draw, session, x_of, top)
    _time_axis(draw, calendar, start_s, end_s, x_of, top + height)
    draw.text((_LEFT - 8, top), "token 0", fill=_INK, anchor="ra", font_size=12)
    draw.text((_LEFT - 8, top + height), str(bank.tokens - 1), fill=_INK, anchor="rd", font_size=12)
    _legend(image, draw, int(bank.sizes.max()), top, height)
    return image


def _coloured(bank: Bank, slots: NDArray[np.int64], row: int) -> NDArray[np.uint8]:
    """Colours `[N row, T, 3]` by the logarithm of the frames in a slot; a white line where one ends."""
    sizes = np.take_along_axis(bank.sizes[0].T, np.maximum(slots, 0), axis=1)
    scale = math.log(max(2.0, float(bank.sizes.max())))
    colours = _colour(np.log(np.maximum(sizes, 1)) / scale)
    colours[slots < 0] = _EMPTY
    colours[:, 1:][slots[:, 1:] != slots[:, :-1]] = _EDGE
    return colours.repeat(row, axis=0)


def _colour(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(share, places, _COLOURS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


def _thumbnails(image: Image, draw: ImageDraw, session: Session, x_of: Any, top: int) -> None:
    """As many key frames as there is room for, each above its moment, with a line down to it; of those in the way, none."""
    from PIL import Image as Images

    free_from, end = _LEFT, _WIDTH - _RIGHT
    frames = session.key_frames.frames
    for frame in frames:
        x = x_of(frame.time_s)
        left = round(min(max(_LEFT, x - _THUMB / 2), end - _THUMB))
        until = end if frame is frames[-1] else end - _THUMB - 4  # the newest has its place
        if left < free_from or left + _THUMB > until:
            continue
        with Images.open(io.BytesIO(frame.jpeg)) as picture:
            image.paste(picture.convert("RGB").resize((_THUMB, _THUMB)), (left, _TOP))
        draw.rectangle([left, _TOP, left + _THUMB - 1, _TOP + _THUMB - 1], outline=_FRAME)
        draw.line([(left + _THUMB / 2, _TOP + _THUMB), (x, top - 1)], fill=_INK)
        free_from = left + _THUMB + 4


def _time_axis(draw: ImageDraw, calendar: Calendar, start_s: float, end_s: float, x_of: Any, bottom: int) -> None:
    draw.line([(_LEFT, bottom), (_WIDTH - _RIGHT, bottom)], fill=_INK)
    for time_s in np.linspace(start_s + calendar.tolerance_s / 2, end_s - calendar.tolerance_s / 2, 7):
        x = x_of(float(time_s))
        draw.line([(x, bottom), (x, bottom + 5)], fill=_INK)
        draw.text((x, bottom + 8), calendar.written(float(time_s)), fill=_INK, anchor="ma", font_size=13)


def _legend(image: Image, draw: ImageDraw, most: int, top: int, height: int) -> None:
    from PIL import Image as Images

    left, length = _WIDTH - _RIGHT + 24, min(height, 200)
    column = _colour(np.linspace(1, 0, length)[:, None].repeat(16, axis=1))
    image.paste(Images.fromarray(column), (left, top + 24))
    draw.text((left, top), "frames", fill=_INK, font_size=13)
    draw.text((left + 22, top + 24), str(most), fill=_INK, font_size=12)
    draw.text((left + 22, top + 24 + length), "1", fill=_INK, anchor="ld", font_size=12)
