"""Watching a source for the command line: until a moment, or live with questions typed meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import typer

from keepsight.runtime.answer import AnswerStream
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.moments import TypedInterval, read_line
from keepsight.runtime.session import Session, Watcher
from keepsight.runtime.show import notes
from keepsight.runtime.storage.far_past import ask_far_past
from keepsight.runtime.storage.feature_history import FeatureHistory
from keepsight.runtime.timeline import wall_time_of
from keepsight.streams import Event, Frame, LiveSource, Reconnect, Source, SourceURI
from keepsight.streams.branches import Branch
from keepsight.streams.errors import NoFrameError, SnapshotError, UsageError
from keepsight.streams.events import State


def watch_until(session: Session, source: Source, until_s: float | None) -> None:
    """See every frame up to a stream time (None: to the end).

    Raises:
        UsageError: the stream ends before it has shown anything at all.
        KeepsightError: what the source raises.
    """
    for frame in source:
        if until_s is not None and frame.time_s > until_s and session.frames_seen:
            break
        session.see(frame, wall_s=wall_time_of(frame.captured_at) if source.is_live and source.uri.is_camera else None)
    if not session.frames_seen:
        raise UsageError(f"{source!r} has no frame to ask about.")


def converse(
    session: Session,
    uri: str,
    *,
    log: Path | None = None,
    branches: Sequence[Branch] = (),
    status: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Watch `uri` and answer the lines of standard input, until its end or Ctrl-C. A lost camera is tried again.

    Args:
        log: folder of the feature log that is being written, which `/recall` asks.
        branches: what hangs on the stream beside the frames.
        status: the lines that `/status` shows; None where there is no governor.
    """
    camera = Camera(session, uri, branches=branches)
    camera.wait()
    words = "/at, /between, /status" if log is None else "/at, /between, /recall, /status"
    typer.echo(f"Watching {camera.source.uri}. Type a question, or /since 2h QUESTION, {words}; Ctrl-D leaves.", err=True)
    try:
        while True:
            line = typed_line("> " if camera.state == "live" else f"({camera.state}) > ")
            camera.check()
            if line is None:
                break
            if line.strip() == "/status":
                typer.echo("\n".join(["no governor: start without --governor off"] if status is None else status()), err=True)
            elif line.strip():
                reply(session, line.strip(), log)
    except KeyboardInterrupt:
        typer.echo(err=True)
    finally:
        camera.close()


def typed_line(prompt: str) -> str | None:
    """The next line of standard input, None at its end. The prompt is for a terminal."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input(prompt)
    except EOFError:
        return None


def reply(session: Session, question: str, log: Path | None) -> None:
    """Answer a typed line on standard output, or say on standard error why not; `log` as of `converse`."""
    try:
        typed, question = read_line(question)
        answers = _asked(session, question, typed, log)
        for piece in answers:
            typer.echo(piece, nl=False)
        typer.echo()
        for line in notes(answers.result):
            typer.echo(f"  [{line}]", err=True)
    except (UsageError, SnapshotError) as error:
        typer.echo(str(error), err=True)


def _asked(session: Session, question: str, typed: TypedInterval | None, log: Path | None) -> AnswerStream:
    if typed is None or not typed.logged:
        return session.ask(question, interval=None if typed is None else session.calendar.interval(typed))
    if log is None:
        raise UsageError("No feature log is being written to /recall from.", fix="Start with --feature-log, or use /between.")
    return ask_far_past(session, FeatureHistory(log, session.bundle), question, typed)


class Camera:
    """A source that is watched by a session: a camera is kept up however often it is lost; a file plays once, in real time.

    What happens to a camera is told on standard error, a line for each change of its state.

    Args:
        on_frame: called on the capture thread after each frame that the session has seen.
        branches: what hangs on the stream beside the frames.
    """

    def __init__(
        self,
        session: Session,
        uri: str,
        *,
        on_frame: Callable[[Frame], None] | None = None,
        branches: Sequence[Branch] = (),
    ) -> None:
        self.source: Source | LiveSource
        if SourceURI.parse(uri).is_camera:
            self.source = live_source(session.bundle, uri, on_event=StateLines(partial(typer.echo, err=True)), branches=branches)
        else:
            self.source = session.source(uri, realtime=True, branches=branches)
        self._watcher: Watcher = session.watch(self.source, on_frame=on_frame)

    def wait(self) -> None:
        """Wait for the first frame; a camera that is not there yet is tried until it is.

        Raises:
            KeepsightError: a file that can't be played; an address that makes no sense; something that is not installed.
        """
        while True:
            try:
                self._watcher.wait(timeout_s=15.0)
                return
            except NoFrameError:
                if not (self.source.uri.is_camera and self._watcher.running):
                    raise

    def check(self) -> None:
        """Raise what stopped the source, if it is not to be tried again.

        Raises:
            KeepsightError: what stopped a file, other than its end; what no camera mends.
        """
        self._watcher.check()

    @property
    def ended(self) -> bool:
        """Whether a file has been played to its end."""
        return self._watcher.ended

    @property
    def state(self) -> State:
        """Of a camera: `connecting`, `live`, `stalled` or `lost`. A file is always `live`."""
        return self.source.state if isinstance(self.source, LiveSource) else "live"

    @property
    def dropped(self) -> int:
        """Frames that a newer one replaced before they were seen."""
        return self.source.dropped

    def close(self) -> None:
        self._watcher.close()


class StateLines:
    """Tells what happens to a camera, one line for each change; the same failure over and over is one line.

    Args:
        tell: called with each line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._told = tell, ("live", "")

    def __call__(self, event: Event) -> None:
        # The first connection and each further try say nothing that the loss did not.
        what = (event.state, event.reason.split(" Next try in ")[0].removesuffix(" Trying again at once."))
        if what == self._told or (event.state == "connecting" and not event.reason.startswith("no frame")):
            return
        if event.state == "live" and event.reason.startswith("first frame") and self._told == ("live", ""):
            return
        self._told = what
        self._tell(f"[{event.state}] {event.reason}")


def live_source(
    bundle: Bundle, uri: str, *, on_event: Callable[[Event], None], branches: Sequence[Branch] = ()
) -> LiveSource:
    """A camera as `Bundle.source` opens it, kept up: waited for at the start, and opened again when it is lost."""
    wanted = bundle.manifest.preprocessing
    return LiveSource(
        uri,
        size=(wanted.width, wanted.height),
        aspect=wanted.aspect,
        scaler=wanted.scaler,
        colorimetry=wanted.colorimetry,
        fps=bundle.manifest.sample_fps,
        reconnect=Reconnect(at_start="wait"),
        on_event=on_event,
        branches=branches,
    )
