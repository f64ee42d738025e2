"""Which frames to keep when fewer are wanted than a stream has."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from keepsight.streams.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ChangeSampler", "EverySampler", "PictureSampler", "Sampler", "TimeSampler", "sampler_for"]

# Containers round times: Matroska to 1 ms, so the frame of 1/3 s is stamped 0.333.
_ROUNDING_S = 0.001


class TimeSampler(Protocol):
    """Chooses frames by their times or their number, before they are scaled: the others cost only their decoding."""

    def take(self, time_s: float) -> bool:
        """Say whether the frame of this moment is kept. Call it once per frame, in order."""
        ...


class PictureSampler(Protocol):
    """Chooses frames by what is in them, when they have been scaled."""

    def take_picture(self, time_s: float, image: NDArray[np.uint8]) -> bool:
        """Say whether this frame, uint8 `[H, W, 3]`, is kept. Call it once per frame, in order."""
        ...


class Sampler:
    """Takes the first frame at or after each `k / fps` seconds, k = 0, 1, 2...

    The grid is fixed, so errors do not add up: a 29.97 fps file sampled at 1 fps gives 3,600 frames an hour. A stream
    slower than `fps` is taken whole, and after a gap one frame is taken, not the whole backlog.

    Args:
        fps: frames per second to keep, more than 0.

    Raises:
        UsageError: `fps` is not a positive number.

    >>> sampler = Sampler(2)
    >>> [time_s for time_s in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) if sampler.take(time_s)]
    [0.0, 0.6, 1.0]
    """

    def __init__(self, fps: float) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise UsageError(f"a sampling rate of {fps} frames/s makes no sense.", fix="Give a number above 0.")
        self.fps = fps
        self._next = 0  # the grid point that waits for its frame

    def take(self, time_s: float) -> bool:
        """Say whether the frame of this moment is kept. Call it once per frame, in order."""
        reached = math.floor((time_s + _ROUNDING_S) * self.fps)
        if reached < self._next:
            return False
        self._next = reached + 1
        return True


class EverySampler:
    """Takes the first frame and every n-th after it, whatever their times.

    Of a live source those are counted that are read: which of its frames come in between depends on the reader.

    Args:
        every: 1 or more.

    Raises:
        UsageError: `every` is not a whole number of 1 or more.

    >>> sampler = EverySampler(3)
    >>> [number for number in range(8) if sampler.take(number / 30)]
    [0, 3, 6]
    """

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UsageError(f"every={every!r} makes no sense.", fix="Give a whole number of 1 or more.")
        self.every = every
        self._seen = 0

    def take(self, time_s: float) -> bool:
        """Say whether this frame is kept. Call it once per frame."""
        self._seen += 1
        return (self._seen - 1) % self.every == 0


class ChangeSampler:
    """Takes frames that differ from the last one it took, and one every few seconds of a scene that stands still.

    Compared are thumbnails of the luma (ITU-R BT.601), each of whose pixels is the mean of a part of the picture: noise of
    single pixels and of the codec averages out, and a thing that moves in 1/64 of the picture still counts.

    Args:
        threshold: mean absolute difference of the thumbnails from which on a frame is kept, in levels of 0 to 255, above 0.
            2 to 4 shows a person who walks through the picture; a cut is 20 and more.
        floor_s: seconds after which a frame is kept even if nothing has changed; math.inf for never.

    Raises:
        UsageError: a threshold or a floor that makes no sense.
    """

    def __init__(self, threshold: float, *, floor_s: float = 10.0) -> None:
        if not (math.isfinite(threshold) and 0 < threshold <= 255):
            raise UsageError(f"change={threshold} is not a threshold.", fix="Give levels above 0 and up to 255, such as 3.")
        if not floor_s > 0:
            raise UsageError(f"change_floor_s={floor_s} makes no sense.", fix="Give seconds above 0, or math.inf for no floor.")
        self.threshold, self.floor_s = threshold, floor_s
        self.difference = 0.0  # of the last frame seen, from the last one kept
        self._kept: NDArray[np.float32] | None = None
        self._kept_s = 0.0

    def take_picture(self, time_s: float, image: NDArray[np.uint8]) -> bool:
        """Say whether this frame, uint8 `[H, W, 3]`, is kept. Call it once per frame, in order."""
        small = thumbnail(image)
        if self._kept is not None and self._kept.shape == small.shape:
            self.difference = float(np.abs(small - self._kept).mean())
            if self.difference < self.threshold and time_s - self._kept_s < self.floor_s - _ROUNDING_S:
                return False
        self._kept, self._kept_s = small, time_s
        return True


_THUMBNAIL = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SAMPLED = 256  # of so many rows and columns at most: a mean of more is the same for this purpose


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The luma of a picture, uint8 `[H, W, 3]`, in 16 by 16 parts, or as many as it has pixels: float32, 0 to 255."""
    height, width = image.shape[:2]
    thin = image[:: max(1, height // _SAMPLED), :: max(1, width // _SAMPLED)]
    luma = thin @ _LUMA
    rows, columns = (np.linspace(0, count, min(_THUMBNAIL, count) + 1).astype(int) for count in luma.shape)
    sums = np.add.reduceat(np.add.reduceat(luma, rows[:-1], axis=0), columns[:-1], axis=1)
    small: NDArray[np.float32] = (sums / np.outer(np.diff(rows), np.diff(columns))).astype(np.float32)
    return small


def sampler_for(
    fps: float | Fraction | None, every: int | None, change: float | None, change_floor_s: float | None = None
) -> Sampler | EverySampler | ChangeSampler | None:
    """The policy that one of `fps`, `every` and `change` asks for; None for every frame.

    Args:
        fps, every, change: as of `Source`.
        change_floor_s: of `ChangeSampler`; None for its own.

    Raises:
        UsageError: more than one of them, one that makes no sense, or a floor without `change`.
    """
    asked = [name for name, value in (("fps", fps), ("every", every), ("change", change)) if value is not None]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} can't both choose the frames.", fix="Give one of fps, every and change.")
    if change_floor_s is not None and change is None:
        raise UsageError("change_floor_s= is for frames chosen by change=.", fix="Give change=3, say, or leave it out.")
    if fps is not None:
        return Sampler(float(fps))
    if every is not None:
        return EverySampler(every)
    if change is None:
        return None
    return ChangeSampler(change) if change_floor_s is None else ChangeSampler(change, floor_s=change_floor_s)
