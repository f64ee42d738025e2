"""Frames in a NumPy file: `.npy`, uint8 `[T, H, W, 3]` RGB."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.capture import Picture, Timeouts
from keepsight.streams.errors import SourceUnreadableError
from keepsight.streams.scale import PictureScaler
from keepsight.streams.view import View

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ArrayFile", "is_array_file"]

_HOW_TO_SAVE = "Save it with numpy.save(path, frames), frames being uint8 [T, H, W, 3]."


def is_array_file(path: Path) -> bool:
    """Whether a path names a NumPy file."""
    return path.suffix.lower() == ".npy" and path.is_file()


class ArrayFile:
    """The frames of a `.npy` file as `Stills`.

    The file is mapped, not loaded: a long one takes no memory. Frames that have the wanted size already are given as
    they are; others go through the scaler that every source goes through.

    Args:
        path: the file.
        view: size and shape.
        timeouts: how long scaling one frame may take.

    Raises:
        SourceUnreadableError: no NumPy file, or what is in it are not frames.
    """

    def __init__(self, path: Path, view: View, timeouts: Timeouts) -> None:
        self._frames = _checked(path, _mapped(path))
        self._scaler = PictureScaler(view, timeouts)

    def __len__(self) -> int:
        return len(self._frames)

    def picture(self, index: int) -> Picture | None:
        """Copy one frame out of the file, scaled if it has another size.

        Raises:
            MissingComponentError: it must be scaled, and GStreamer is not installed.
        """
        image = self._scaler.scale(np.array(self._frames[index], order="C"))
        return None if image is None else Picture(image, 0.0, time.monotonic())

    def close(self) -> None:
        """Stop the scaler."""
        self._scaler.close()


def _mapped(path: Path) -> NDArray[Any]:
    try:
        # Never unpickled: a file of objects could run anything.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise SourceUnreadableError(f"{path} is not an array that can be read: {error}.", fix=_HOW_TO_SAVE) from error
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise SourceUnreadableError(f"{path} is an archive of arrays (.npz), not one array.", fix=_HOW_TO_SAVE)
    return loaded


def _checked(path: Path, frames: NDArray[Any]) -> NDArray[np.uint8]:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise SourceUnreadableError(
            f"{path} holds {frames.dtype} {list(frames.shape)}, not frames of uint8 [T, H, W, 3].", fix=_HOW_TO_SAVE
        )
    if frames.size == 0:
        raise SourceUnreadableError(f"{path} holds no frames: its shape is {list(frames.shape)}.", fix=_HOW_TO_SAVE)
    return frames
