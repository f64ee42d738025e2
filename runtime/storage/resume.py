"""Time goes on: the frames of a source, dated so that they follow what a memory has already seen.

A source's own time starts at 0 whenever it is opened, and a memory's time never goes back. One rule serves a restart and a
camera that was lost and came back: the first new frame lies as many seconds after the newest remembered one as passed between
their captures, and from there on the source's own time is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from keepsight.streams import Frame, LiveSource, Source
from keepsight.streams.uri import SourceURI

__all__ = ["Resume", "after", "beyond", "source_name"]


def after(newest: Frame, frames: Iterable[Frame]) -> Iterator[Frame]:
    """Frames of a live source behind `newest`; a gap of less than nothing (a clock that went back) is none.

    Args:
        newest: the newest frame remembered, its `captured_at` on the clock of this process.
        frames: of the source, on their own time.
    """
    return map(_Behind(newest), frames)


class _Behind:
    """Dates frames one by one; see `after`."""

    def __init__(self, newest: Frame) -> None:
        self._newest = newest
        self._offset_s: float | None = None

    def __call__(self, frame: Frame) -> Frame:
        newest = self._newest
        if self._offset_s is None:
            gap_s = max(frame.captured_at - newest.captured_at, 0.0)
            self._offset_s = newest.time_s + gap_s - frame.time_s
        # Adding may round below the newest frame's time where there is no gap at all.
        return replace(frame, time_s=max(self._offset_s + frame.time_s, newest.time_s))


def beyond(time_s: float, frames: Iterable[Frame]) -> Iterator[Frame]:
    """Frames of a file that was seen up to `time_s`: those after it, on the file's own time."""
    return (frame for frame in frames if frame.time_s > time_s)


def source_name(uri: SourceURI) -> str:
    """What a source is called in a snapshot: its address without passwords, a file by its full path."""
    return uri.redacted if uri.is_camera else str(Path(uri.location).resolve())


class Resume:
    """Where a memory's stream stands, so that the next source that is watched goes on behind it.

    Attributes:
        source: name of what was watched last (`source_name`); None = nothing, or not known.
        follows: newest frame of a feature log that goes on.
    """

    def __init__(self) -> None:
        self.source: str | None = None
        self.follows: Frame | None = None
        self._position_s: float | None = None  # of a restored snapshot in its source, until a source is watched

    def restored(self, source: str | None, position_s: float) -> None:
        """Note where the snapshot that has been restored was taken."""
        self.source, self._position_s = source, position_s

    def frames(self, source: Source | LiveSource, newest: Frame | None) -> Iterator[Frame]:
        """Frames of a source in the memory's time; what the rule is, `Session.continued` says.

        Args:
            source: that is watched from here on.
            newest: the newest frame remembered.
        """
        name = source_name(source.uri)
        restored_s, self._position_s = self._position_s, None
        elsewhere = source.uri.is_camera or name != self.source
        self.source = name
        known = [frame for frame in (newest, self.follows) if frame is not None]
        if not known or (restored_s is None and not source.uri.is_camera):
            return iter(source)
        if elsewhere or restored_s is None:
            return after(max(known, key=lambda frame: frame.time_s), source)
        return beyond(restored_s, source)

    def dating(self, camera: SourceURI, newest: Frame | None) -> Callable[[Frame], Frame]:
        """As `frames`, for those of a camera that are handed over one by one."""
        self.source, self._position_s = source_name(camera), None
        known = [frame for frame in (newest, self.follows) if frame is not None]
        return _Behind(max(known, key=lambda frame: frame.time_s)) if known else lambda frame: frame
