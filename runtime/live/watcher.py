"""The capture thread: a source is read into a session while others ask it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from keepsight.runtime.timeline import wall_time_of
from keepsight.streams import Frame, LiveSource, Source
from keepsight.streams.errors import NoFrameError

if TYPE_CHECKING:
    from keepsight.runtime.session import Session

__all__ = ["Watcher"]


class Watcher:
    """The capture thread: reads a source into a session. An error in it is raised where somebody waits for frames."""

    def __init__(self, session: Session, source: Source | LiveSource, on_frame: Callable[[Frame], None] | None) -> None:
        self.source = source
        self._session, self._on_frame = session, on_frame
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="keepsight-capture", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether the source has come to its end without an error."""
        return not self.running and self._error is None

    def wait(self, frames: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until the session has seen so many frames.

        Raises:
            NoFrameError: not in time, or the source ended before.
            KeepsightError: what stopped the capture.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._session.frames_seen >= frames or not self._alive(), timeout_s)
        self.check()
        if not done or self._session.frames_seen < frames:
            raise NoFrameError(
                f"{self.source!r}: {self._session.frames_seen} of {frames} frames after {timeout_s:g} s.",
                fix="Look at the source with: gst-play-1.0 URI",
            )

    def wait_until(self, time_s: float, timeout_s: float = 60.0) -> None:
        """Wait until the newest frame's stream time is `time_s` or later, or the source has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._session.time_s >= time_s or not self._alive(), timeout_s)
        self.check()

    def check(self) -> None:
        """Raise what stopped the capture, if an error did."""
        if self._error is not None:
            raise self._error

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the source, then `check`."""
        self._thread.join(timeout_s)
        self.check()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; an error that this causes in the source is not reported."""
        self._closing = True
        self.source.close()
        self._thread.join(10.0)

    def _alive(self) -> bool:
        return not self._ended

    def _run(self) -> None:
        try:
            with self.source:
                for frame in self._session.continued(self.source):
                    self._session.see(frame, wall_s=wall_time_of(frame.captured_at) if self.source.uri.is_camera else None)
                    if self._on_frame is not None:
                        self._on_frame(frame)
                    with self._changed:
                        self._changed.notify_all()
        except Exception as error:
            if not self._closing:
                self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
