"""Pictures that are in Python already, scaled as those of every source are: through an appsrc and the same elements."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from keepsight.streams.bicubic import scaled
from keepsight.streams.capture import Timeouts
from keepsight.streams.errors import SourceUnreadableError
from keepsight.streams.gst import array_to_buffer, first_error, load_gst, sample_to_array
from keepsight.streams.pipelines import FRAMES, ORIGIN, build, recipe_for_pictures
from keepsight.streams.view import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PictureScaler"]


class PictureScaler:
    """One picture in, one out. What has the wanted size already is given back as it is.

    One thread scales; any may close.

    Args:
        view: size and shape.
        timeouts: how long scaling one picture may take.
    """

    def __init__(self, view: View, timeouts: Timeouts) -> None:
        self._view, self._timeouts = view, timeouts
        self._lock = threading.Lock()
        self._closed = False
        self._pipeline: _Pipeline | None = None

    def scale(self, image: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The picture, uint8 `[H, W, 3]`, in the view's size; None once closed.

        Raises:
            MissingComponentError: it must be scaled, and GStreamer is not installed.
            SourceUnreadableError: GStreamer can't.
        """
        height, width = image.shape[:2]
        if self._view.size in (None, (width, height)):
            return image
        if self._view.scales_in_software:
            return scaled(image, self._view)
        pipeline = self._pipeline_for(width, height)
        return None if pipeline is None else pipeline.scale(image)

    def close(self) -> None:
        """Stop; a `scale` that waits in another thread returns None. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            if self._pipeline is not None:
                self._pipeline.close()

    def _pipeline_for(self, width: int, height: int) -> _Pipeline | None:
        with self._lock:
            if self._closed:
                return None
            if self._pipeline is not None and self._pipeline.size != (width, height):
                self._pipeline.close()
                self._pipeline = None
            if self._pipeline is None:
                self._pipeline = _Pipeline((width, height), self._view, self._timeouts)
            return self._pipeline


class _Pipeline:
    """GStreamer's scaler for pictures of one size."""

    def __init__(self, size: tuple[int, int], view: View, timeouts: Timeouts) -> None:
        gst = load_gst()
        self.size = size
        self._wait_ns = int(timeouts.first_frame_s * gst.SECOND)
        self._pipeline: Any = build(recipe_for_pictures(*size, view))
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
        width, height = self.size
        raise SourceUnreadableError(
            f"GStreamer can't scale a frame of {width}x{height}: {why}.", fix="Save the frames in the wanted size."
        )

    def close(self) -> None:
        self._closed = True
        self._pipeline.set_state(self._null)
