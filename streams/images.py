"""Pictures on disk as a stream: one file, or a directory of them in the order of their names."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from keepsight.streams.capture import Capture, Picture, Timeouts
from keepsight.streams.errors import SourceUnreadableError
from keepsight.streams.pipelines import View
from keepsight.streams.uri import SourceURI

__all__ = ["ImageSequence", "image_paths"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def image_paths(path: Path) -> list[Path] | None:
    """The pictures at a path: itself, or a directory's in the order of their names; None for anything else.

    Raises:
        SourceUnreadableError: a directory without pictures.
    """
    if not path.is_dir():
        return [path] if path.suffix.lower() in SUFFIXES else None
    found = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
    if not found:
        raise SourceUnreadableError(
            f"{path} is a directory without pictures.",
            fix=f"Put some of {', '.join(sorted(SUFFIXES))} there, or name a file.",
        )
    return found


class ImageSequence:
    """Shows pictures one after the other, the k-th at `k / fps` seconds.

    Args:
        paths: the pictures, in order.
        view: size and shape.
        fps: pictures per second.
        realtime: show each when its time has come; one whose successor is due too is dropped, and counted.
        timeouts: how long one picture may take to decode.
    """

    def __init__(self, paths: Sequence[Path], view: View, *, fps: float, realtime: bool, timeouts: Timeouts) -> None:
        self._paths, self._view, self._fps, self._realtime, self._timeouts = paths, view, fps, realtime, timeouts
        self._position = 0
        self._started: float | None = None
        self._closed = threading.Event()
        self.dropped = 0

    def next(self) -> Picture | None:
        """The next picture, or None after the last one or when closed.

        Raises:
            SourceUnreadableError: a file is not a picture; it is named.
        """
        if self._realtime:
            self._keep_time()
        if self._closed.is_set() or self._position >= len(self._paths):
            return None
        path, time_s = self._paths[self._position], self._position / self._fps
        self._position += 1
        picture = self._decode(path)
        captured_at = picture.captured_at if self._started is None else self._started + time_s
        return Picture(picture.image, time_s, captured_at)

    def duration_s(self) -> float:
        """Seconds from the first picture to the end of the last."""
        return len(self._paths) / self._fps

    def close(self) -> None:
        self._closed.set()

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = now
        due = min(int((now - self._started) * self._fps), len(self._paths) - 1)
        if due > self._position:
            self.dropped += due - self._position
            self._position = due
        self._closed.wait(max(0.0, self._started + self._position / self._fps - now))

    def _decode(self, path: Path) -> Picture:
        capture = Capture(SourceURI.parse(path), self._view, "every", self._timeouts)
        try:
            picture = capture.next()
        finally:
            capture.close()
        if picture is None:
            raise SourceUnreadableError(f"{path} has no picture in it.", fix="Remove it, or save it again.")
        return picture
