"""Watching a source for the command line: until a moment, or live with questions typed meanwhile."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import typer

from keepsight.runtime.answer import AnswerStream
from keepsight.runtime.far_past import ask_far_past
from keepsight.runtime.feature_history import FeatureHistory
from keepsight.runtime.moments import TypedInterval, read_line
from keepsight.runtime.session import Session, Watcher
from keepsight.runtime.show import notes
from keepsight.runtime.timeline import wall_time_of
from keepsight.streams import Frame, Source
from keepsight.streams.errors import KeepsightError, NoFrameError, SnapshotError, SourceLostError, SourceNotFoundError, UsageError

RETRY_S = (0.5, 10.0)  # first and longest pause before a camera is tried again


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


def converse(session: Session, uri: str, *, log: Path | None = None) -> None:
    """Watch `uri` and answer the lines of standard input, until its end or Ctrl-C. A lost camera is tried again.

    Args:
        log: folder of the feature log that is being written, which `/recall` asks.
    """
    interactive = sys.stdin.isatty()
    camera = Camera(session, uri)
    camera.wait()
    words = "/at, /between" if log is None else "/at, /between, /recall"
    typer.echo(f"Watching {camera.source.uri}. Type a question, or /since 2h QUESTION, {words}; Ctrl-D leaves.", err=True)
    try:
        while True:
            line = _read_line(interactive)
            camera.check()
            if line is None:
                break
            if line.strip():
                _reply(session, line.strip(), log)
    except KeyboardInterrupt:
        typer.echo(err=True)
    finally:
        camera.close()


def _read_line(interactive: bool) -> str | None:
    if interactive:
        try:
            return input("> ")
        except EOFError:
            return None
    return sys.stdin.readline() or None


def _reply(session: Session, question: str, log: Path | None) -> None:
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
    """A source that is watched by a session and opened again whenever it is lost; a file plays once, in real time.

    Args:
        on_frame: called on the capture thread after each frame that the session has seen.
    """

    def __init__(self, session: Session, uri: str, *, on_frame: Callable[[Frame], None] | None = None) -> None:
        self._session, self._uri, self._on_frame = session, uri, on_frame
        self._dropped_before = 0
        self._pause_s = RETRY_S[0]
        self._watcher: Watcher | None = None
        self.source = self._open()

    def wait(self) -> None:
        """Wait for the first frame; a camera that is not there yet is tried until it is.

        Raises:
            KeepsightError: a file that can't be played; an address that makes no sense.
        """
        while True:
            assert self._watcher is not None
            try:
                self._watcher.wait(timeout_s=15.0)
                return
            except (SourceNotFoundError, NoFrameError, SourceLostError) as error:
                self._again(error)

    def check(self) -> None:
        """Open the source again if it was lost; the memory is kept.

        Raises:
            KeepsightError: what stopped a file, other than its end.
        """
        assert self._watcher is not None
        try:
            self._watcher.check()
        except (SourceNotFoundError, NoFrameError, SourceLostError) as error:
            self._again(error)

    @property
    def ended(self) -> bool:
        """Whether a file has been played to its end."""
        return self._watcher is not None and self._watcher.ended

    @property
    def dropped(self) -> int:
        """Frames that a newer one replaced before they were seen."""
        return self._dropped_before + self.source.dropped

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()

    def _open(self) -> Source:
        source = self._session.source(self._uri, realtime=True)
        self._watcher = self._session.watch(source, on_frame=self._on_frame)
        return source

    def _again(self, error: KeepsightError) -> None:
        """Open the source anew, after a pause; a camera that is unplugged is waited for."""
        while self.source.uri.is_camera:
            typer.echo(f"{error} Trying again in {self._pause_s:.1f} s.", err=True)
            self.close()
            time.sleep(self._pause_s * random.uniform(0.8, 1.2))
            self._pause_s = min(2 * self._pause_s, RETRY_S[1])
            dropped = self.dropped
            try:
                self.source = self._open()
            except SourceNotFoundError as absent:
                error = absent
                continue
            self._dropped_before = dropped
            return
        raise error
