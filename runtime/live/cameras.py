"""Several cameras in one process: one thread feeds what each of them sees into the memory of its own session."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepsight.runtime.session import Session
from keepsight.runtime.timeline import wall_time_of
from keepsight.streams import Event, Frame, LiveSource
from keepsight.streams.branches import Branch
from keepsight.streams.errors import KeepsightError, NoFrameError, UsageError
from keepsight.streams.events import State
from keepsight.streams.many import Budget, Cameras, Feed
from keepsight.streams.uri import SourceURI

__all__ = ["CameraStatus", "CameraWatcher"]

_LOOK_S = 0.25  # how soon it is noticed that a camera was given up, or that the watch is over
_RATE_S = 10.0  # over which frames/s are told
_JOIN_S = 10.0


@dataclass(frozen=True)
class CameraStatus:
    """How a camera is doing.

    Attributes:
        name, uri: of the camera; the address without passwords.
        state: `connecting`, `live`, `stalled` or `lost`.
        error: why it was given up, None while it is not.
        fps: frames that were remembered a second, over the newest 10 s.
        dropped: frames that a newer one replaced, or that were too old, before the encoder took them. What is beyond the
            bundle's sampling rate was not wanted, and does not count.
        frames: that were remembered in this watch.
        frames_seen: in the memory's history, with those from before a restart.
        age_ms: of the newest frame remembered; None before the first.
    """

    name: str
    uri: str
    state: State
    error: Exception | None
    fps: float
    dropped: int
    frames: int
    frames_seen: int
    age_ms: float | None


class CameraWatcher:
    """The capture thread of several cameras: frames go into the memory of each camera's session while others ask them.

    A camera is kept up however often it is lost, as `LiveSource` does it, and none waits for another (`streams.many.Cameras`).
    When the encoder can't take all frames, cameras share it fairly, each with its newest frame. They are encoded one by one:
    several at once take no less time a frame on a CPU (scripts/batch-cost), TensorRT's engines are built for one, and a frame
    that waits for others gets old. A camera whose memory refuses a frame is given up alone, and the others go on.

    Args:
        sessions: one for each camera, by name: a `Session`, and others from its `beside`.
        uris: address of each camera, by the same names.
        on_frame: called on the capture thread with the camera's name and each frame that its session has seen.
        on_event: called with the camera's name and each change of its state, on another thread; it must return soon.
        on_error: called once with the name of a camera that was given up, and why.
        branches: what hangs on cameras' streams beside the frames, by name.
        open_feed: as of `Cameras`.

    Raises:
        UsageError: other names than sessions; an address or a name that makes no sense; a file, or one session twice.

    >>> with Session(Bundle.open("tiny")) as door:                                        # doctest: +SKIP
    ...     sessions = {"door": door, "yard": door.beside()}
    ...     with CameraWatcher(sessions, {"door": "rtsp://10.0.0.5/door", "yard": "/dev/video1"}) as watcher:
    ...         watcher.wait()
    ...         for status in watcher.statuses():
    ...             print(status.name, status.state, sessions[status.name].ask("what color is the shape?").result.text)
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        uris: Mapping[str, str],
        *,
        on_frame: Callable[[str, Frame], None] | None = None,
        on_event: Callable[[str, Event], None] | None = None,
        on_error: Callable[[str, Exception], None] | None = None,
        branches: Mapping[str, Sequence[Branch]] | None = None,
        open_feed: Callable[..., Feed] = LiveSource,
    ) -> None:
        if sessions.keys() != uris.keys():
            raise UsageError(f"there are sessions for {', '.join(sessions)}, and cameras {', '.join(uris)}.")
        if len({id(session) for session in sessions.values()}) < len(sessions):
            raise UsageError("two cameras can't share a session.", fix="Make one for each with Session.beside.")
        self._on_frame, self._on_error = on_frame, on_error
        self._cameras = _cameras(sessions, uris, on_event, branches or {}, open_feed)
        for name, session in sessions.items():
            session.feed = self._cameras.cameras[name]
        self._watched = {name: _Watched(session, SourceURI.parse(uris[name])) for name, session in sessions.items()}
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._newest_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="keepsight-cameras", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether frames may still come: not after `close`, nor once every camera has been given up."""
        return self._thread.is_alive()

    def status(self, name: str) -> CameraStatus:
        """How one camera is doing now."""
        watched, camera = self._watched[name], self._cameras.cameras[name]
        newest, drops = watched.session.newest, camera.drops
        return CameraStatus(
            name, watched.uri.redacted, "lost" if watched.error else camera.state, watched.error, watched.fps(),
            drops["replaced"] + drops["stale"], watched.frames, watched.session.frames_seen,
            None if newest is None else newest.age_ms,
        )  # fmt: skip

    def statuses(self) -> list[CameraStatus]:
        """How each camera is doing now, in the order they were given."""
        return [self.status(name) for name in self._watched]

    def wait(self, frames: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until every camera has so many frames in its memory's history.

        Raises:
            NoFrameError: one has not, in time; which ones, and in what state.
            KeepsightError: why one was given up that has not.
        """

        def done() -> bool:
            return all(one.session.frames_seen >= frames or one.error is not None for one in self._watched.values())

        with self._changed:
            self._changed.wait_for(lambda: done() or self._ended, timeout_s)
        late = [status for status in self.statuses() if status.frames_seen < frames]
        for status in late:
            if status.error is not None:
                raise status.error
        if late:
            listed = ", ".join(f"{status.name} ({status.state}) {status.frames_seen}" for status in late)
            raise NoFrameError(
                f"not {frames} frames of each camera after {timeout_s:g} s: {listed}.",
                fix="Look at such a camera with: keepsight stream probe URI",
            )

    def check(self) -> None:
        """Once every camera has been given up, raise why the last one was.

        Raises:
            KeepsightError: as said.
        """
        if self._newest_error is not None and self._all_given_up():
            raise self._newest_error

    def close(self) -> None:
        """Stop watching, within a few seconds whatever the cameras do; the sessions stay open. Closing twice does nothing."""
        self._closing = True
        self._cameras.close()
        self._thread.join(_JOIN_S)

    def __enter__(self) -> CameraWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CameraWatcher({', '.join(f'{status.name}: {status.state}' for status in self.statuses())})"

    # -- the capture thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._cameras:
                while not self._closing:
                    for name, frame in self._next():
                        self._see(name, frame)
                    if self._all_given_up():
                        break
        except Exception as error:  # of none of them, so of all
            for name in self._watched:
                self._give_up(name, error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next(self) -> list[tuple[str, Frame]]:
        """The frame whose turn it is, if one comes soon. What became of the cameras is noted on the way."""
        try:
            return self._cameras.batch(_LOOK_S)
        except KeepsightError:
            return []  # every camera has been given up
        finally:
            for name, camera in self._cameras.cameras.items():
                if camera.error is not None:
                    self._give_up(name, camera.error)

    def _see(self, name: str, frame: Frame) -> None:
        watched = self._watched[name]
        if watched.error is not None:
            return
        try:
            dated = watched.dated(frame)
            watched.session.see(dated, wall_s=wall_time_of(frame.captured_at))
            watched.count()
            if self._on_frame is not None:
                self._on_frame(name, dated)
        except Exception as error:  # whatever it is, it is this camera's: the others go on
            self._give_up(name, error)
            # Its reader would go on for nobody. Closing waits for it, which is not for this thread.
            threading.Thread(target=self._cameras.cameras[name].close, daemon=True).start()
        with self._changed:
            self._changed.notify_all()

    def _all_given_up(self) -> bool:
        return all(watched.error is not None for watched in self._watched.values())

    def _give_up(self, name: str, error: Exception) -> None:
        watched = self._watched[name]
        if watched.error is not None or self._closing:
            return
        watched.error = self._newest_error = error
        with self._changed:
            self._changed.notify_all()
        if self._on_error is not None:
            self._on_error(name, error)


class _Watched:
    """A camera's session, and what was counted of it."""

    def __init__(self, session: Session, uri: SourceURI) -> None:
        self.session, self.uri = session, uri
        self.dated = session.dating(uri)
        self.error: Exception | None = None
        self.frames = 0
        self._moments: deque[float] = deque(maxlen=1024)

    def count(self) -> None:
        self.frames += 1
        self._moments.append(time.monotonic())

    def fps(self) -> float:
        now = time.monotonic()
        moments = [moment for moment in tuple(self._moments) if moment > now - _RATE_S]
        if len(moments) < 2:
            return 0.0
        spacing_s = (moments[-1] - moments[0]) / (len(moments) - 1)
        # Of a camera whose next frame is overdue, the rate falls with every moment.
        overdue_s = max(0.0, now - moments[-1] - 2 * spacing_s)
        return (len(moments) - 1) / max(moments[-1] - moments[0] + overdue_s, 1e-6)


def _cameras(
    sessions: Mapping[str, Session],
    uris: Mapping[str, str],
    on_event: Callable[[str, Event], None] | None,
    branches: Mapping[str, Sequence[Branch]],
    open_feed: Callable[..., Feed],
) -> Cameras:
    """The cameras, scaled and sampled as the bundle says; of frames that wait, the newest is taken when the encoder is free."""
    bundles = {id(session.bundle): session.bundle for session in sessions.values()}
    if len(bundles) != 1:
        raise UsageError(f"the cameras' sessions are of {len(bundles)} bundles.", fix="Make them with Session.beside.")
    (bundle,) = bundles.values()
    wanted = bundle.manifest.preprocessing
    options: dict[str, Any] = {"aspect": wanted.aspect, "scaler": wanted.scaler, "colorimetry": wanted.colorimetry}
    return Cameras(
        uris,
        size=(wanted.width, wanted.height),
        batch=1,
        budgets={name: Budget(fps=bundle.manifest.sample_fps) for name in uris},
        on_event=on_event,
        options=options,
        own={name: {"branches": hung} for name, hung in branches.items()},
        open_feed=open_feed,
    )
