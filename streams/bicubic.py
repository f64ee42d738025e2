"""Bicubic scaling of 4 by 4 pixels without antialiasing, as PyTorch's `interpolate` and OpenCV's `INTER_CUBIC` have it.

MA-LMM scales its frames so (`transforms_video.py`, `functional_video.py`: `interpolate(..., mode="bicubic",
align_corners=False)`, then `.to(torch.uint8)`). GStreamer has no such scaler: each of its cubic ones antialiases.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.view import View

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bicubic", "scaled"]

_A = np.float32(-0.75)  # Keys' parameter; 0.5 in his paper, 0.75 in PyTorch and OpenCV
_TAPS = 4


def bicubic(image: NDArray[np.uint8], size: tuple[int, int], *, wrap: bool = False) -> NDArray[np.uint8]:
    """Scale a picture, in float32, and cut the fractions off.

    The cubic overshoots at hard edges, below 0 and above 255.

    Args:
        image: uint8 `[H, W, 3]`.
        size: (width, height) to scale to.
        wrap: let what overshoots wrap around, as a conversion to uint8 does that keeps the low 8 bits: -3 becomes 253, and
            260 becomes 4. Otherwise it is cut off at 0 and 255.

    Returns:
        uint8 `[height, width, 3]`. Equal to PyTorch's on x86, but for few pixels of the first row and column that lie within a
        rounding error of a whole number: those may be a level off. Where PyTorch rounds otherwise, any such pixel may.
    """
    across, down = _taps(image.shape[1], size[0]), _taps(image.shape[0], size[1])
    values = _down(_across(image, *across), *down).reshape(size[1], size[0], 3)
    if not wrap:
        np.clip(values, 0, 255, out=values)
    # By way of int32: what C makes of a float beyond uint8 differs from machine to machine.
    return values.astype(np.int32).astype(np.uint8)


def scaled(image: NDArray[np.uint8], view: View, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """A picture in full size as a view wants it, if the view's scaler is one of this module's; else the picture itself.

    Args:
        image: uint8 `[H, W, 3]`.
        view: how it is wanted.
        pixel_aspect: width of a stored pixel over its height. Filling the size ignores it; borders do not.
    """
    if view.size is None or not view.scales_in_software:
        return image
    wrap = view.scaler == "bicubic-wrap"
    inner = view.size if view.aspect == "stretch" else _fitted(image.shape, view.size, pixel_aspect)
    picture = bicubic(image, inner, wrap=wrap)
    if inner == view.size:
        return picture
    (width, height), canvas = view.size, np.zeros((view.size[1], view.size[0], 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = picture
    return canvas


def _fitted(shape: tuple[int, ...], size: tuple[int, int], pixel_aspect: float) -> tuple[int, int]:
    """The largest (width, height) of the picture's shape on a screen that fits a size."""
    seen = shape[1] * pixel_aspect / shape[0]
    if seen >= size[0] / size[1]:
        return size[0], max(1, round(size[0] / seen))
    return max(1, round(size[1] * seen)), size[1]


@lru_cache(maxsize=16)
def _taps(stored: int, wanted: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which pixels of a row each wanted pixel is made of `[4, wanted]`, and their weights; beyond the ends, the last counts."""
    scale = np.float32(stored / wanted)
    place = _fused(np.arange(wanted) + 0.5, scale, np.float32(-0.5))
    first = np.floor(place)
    t = place - first
    one = np.float32(1)
    weights = np.stack([_far(t + one), _near(t), _near(one - t), _far(one - t + one)])
    pixels = first.astype(np.intp) + np.arange(-1, _TAPS - 1)[:, None]
    return pixels.clip(0, stored - 1), weights


def _near(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cubic kernel up to a distance of 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _far(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cubic kernel at distances of 1 to 2."""
    return _fused(_A * x - 5 * _A, x, 8 * _A) * x - 4 * _A


def _across(image: NDArray[np.uint8], pixels: NDArray[np.intp], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale the rows: `[H, W, 3]` to `[H, 3 * wanted]`."""
    rows = image.reshape(len(image), -1)
    columns = (3 * pixels[..., None] + np.arange(3)).reshape(_TAPS, -1)  # numpy is quick where the last axis is long
    return _weighted([rows.take(column, axis=1) for column in columns], weights.repeat(3, axis=1))


def _down(rows: NDArray[np.float32], pixels: NDArray[np.intp], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale the columns: `[H, K]` to `[wanted, K]`."""
    return _weighted([rows[row] for row in pixels], weights[..., None])


def _weighted(taps: list[NDArray[Any]], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sum of four arrays, each with its weight, rounded where PyTorch's compiled kernel rounds.

    It matters where a picture is flat: the value is a whole number, and the fraction that rounding leaves below it or above
    it decides about the level.
    """
    total: NDArray[np.float32] = taps[1] * weights[1]
    for tap in (0, 2, 3):
        total = _fused(taps[tap], weights[tap], total)
    return total


def _fused(a: NDArray[Any], b: NDArray[np.float32] | np.float32, c: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """a * b + c with one rounding: the product of two float32 is exact in float64."""
    return (a * b.astype(np.float64) + c).astype(np.float32)
