"""Frames in a NumPy file: `.npy`, uint8 `[T, H, W, 3]` RGB."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.bicubic import scaled
from keepsight.streams.capture import Picture, Timeouts
from keepsight.streams.errors import SourceUnreadableError
from keepsight.streams.gst import array_to_buffer, first_error, load_gst, sample_to_array
from keepsight.streams.pipelines import FRAMES, ORIGIN, build, recipe_for_pictures
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
        self._lock = threading.Lock()
        self._closed = False
        self._scaler: _Scaler | None = None
        height, width = self._frames.shape[1:3]
        self._view = view if view.size not in (None, (width, height)) else None
        self._timeouts = timeouts

    def __len__(self) -> int:
        return len(self._frames)

    def picture(self, index: int) -> Picture | None:
        """Copy one frame out of the file, scaled if it has another size.

        Raises:
            MissingComponentError: it must be scaled, and GStreamer is not installed.
        """
        stored = np.array(self._frames[index], order="C")
        image = stored if self._view is None else self._scaled(stored, self._view)
        return None if image is None else Picture(image, 0.0, time.monotonic())

    def close(self) -> None:
        """Stop the scaler."""
        with self._lock:
            self._closed = True
            if self._scaler is not None:
                self._scaler.close()

    def _scaled(self, image: NDArray[np.uint8], view: View) -> NDArray[np.uint8] | None:
        if view.scales_in_software:
            return scaled(image, view)
        with self._lock:
            if self._closed:
                return None
            if self._scaler is None:
                self._scaler = _Scaler(image.shape, view, self._timeouts)
            scaler = self._scaler
        return scaler.scale(image)


class _Scaler:
    """GStreamer's scaler, one picture in, one out."""

    def __init__(self, shape: tuple[int, ...], view: View, timeouts: Timeouts) -> None:
        gst = load_gst()
        height, width = shape[:2]
        self._wait_ns = int(timeouts.first_frame_s * gst.SECOND)
        self._pipeline: Any = build(recipe_for_pictures(width, height, view))
        self._source, self._sink = (self._pipeline.get_by_name(name) for name in (ORIGIN, FRAMES))
        self._null = gst.State.NULL
        self._closed = False
        self._pipeline.set_state(gst.State.PLAYING)

    def scale(self, image: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The picture in the view's size; None once closed."""
        self._source.push_buffer(array_to_buffer(image))
        sample = self._sink.try_pull_sample(self._wait_ns)
        if sample is not None:
            return sample_to_array(sample)
        if self._closed:
            return None
        message = first_error(self._pipeline.get_bus())
        why = "nothing came out in time" if message is None else message.parse_error()[0].message.rstrip(".")
        height, width = image.shape[:2]
        raise SourceUnreadableError(
            f"GStreamer can't scale a frame of {width}x{height}: {why}.", fix="Save the frames in the wanted size."
        )

    def close(self) -> None:
        self._closed = True
        self._pipeline.set_state(self._null)


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
