"""`keepsight run` with several cameras: a memory and files for each, and questions that begin with a camera's name."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer

from keepsight.runtime.live.cameras import CameraStatus, CameraWatcher
from keepsight.runtime.live.gate import FrameGate
from keepsight.runtime.live.watch import StateLines, reply, typed_line
from keepsight.runtime.moments import read_line
from keepsight.runtime.session import Session
from keepsight.runtime.storage.keep import kept
from keepsight.streams import Event
from keepsight.streams.branches import Branch
from keepsight.streams.errors import UsageError
from keepsight.streams.uri import SourceURI

__all__ = ["SNAPSHOT_SUFFIX", "addressed", "converse_with_cameras", "folders", "kept_each", "parse_cameras", "sessions_for"]

SNAPSHOT_SUFFIX = ".keepsight"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it becomes a file, a page and the beginning of a typed line
_ADDRESSED = re.compile(rf"({_NAME.pattern})\s*:(?:\s+(.*))?", re.DOTALL)
_SETTLE_S = 5.0  # that cameras have for their first frame, once one of them has something to ask about
_LOOK_S = 0.1


# -- what the command line says ------------------------------------------------------------------------------------------


def parse_cameras(spellings: Sequence[str], source: str | None) -> dict[str, str]:
    """Addresses by name, of `--camera NAME=URI` as often as it was given.

    Args:
        source: the argument SOURCE, which is for a single camera without a name.

    Raises:
        UsageError: neither of both is given, or both; what is no name, or is one twice; an address that makes no sense; a file.

    >>> parse_cameras(["door=rtsp://10.0.0.5/door", "yard=/dev/video1"], None)
    {'door': 'rtsp://10.0.0.5/door', 'yard': '/dev/video1'}
    """
    if not spellings:
        raise UsageError("There is nothing to watch.", fix="Name a SOURCE, or cameras: --camera NAME=URI --camera NAME=URI.")
    if source is not None:
        raise UsageError("A SOURCE and --camera exclude each other.", fix="Give it a name, too: --camera NAME=SOURCE.")
    uris: dict[str, str] = {}
    for spelling in spellings:
        name, equals, uri = spelling.partition("=")
        if not equals or _NAME.fullmatch(name) is None:
            # An address without a name may hold a password: it is not shown.
            shown = f"--camera {name}=..." if equals and _NAME.match(name) and "/" not in name else "--camera"
            raise UsageError(
                f"{shown} has no name.", fix="Write --camera NAME=URI, the name of letters, digits, '-' and '_'."
            )
        if name.casefold() in map(str.casefold, uris):
            raise UsageError(f"there are two cameras {name!r}.", fix="Give each a name of its own.")
        if not SourceURI.parse(uri).is_camera:
            raise UsageError(f"--camera {name} is a file, and not live.", fix="Play a file alone: keepsight run FILE.")
        uris[name] = uri
    return uris


def sessions_for(first: Session, names: Sequence[str]) -> dict[str, Session]:
    """A session for each camera, with a gate of its own if `first` has one; `first` is the first camera's.

    Raises:
        EngineError: as `Session.beside`.
    """
    sessions = {names[0]: first}
    for name in names[1:]:
        sessions[name] = first.beside(gate=None if first.gate is None else FrameGate())
    return sessions


def folders(option: str, folder: Path | None, names: Sequence[str], suffix: str = "") -> dict[str, Path]:
    """Where each camera's part of an option's folder is, which is made if only its last part is missing; {} without one.

    Raises:
        UsageError: a file, or a folder that can't be made.
    """
    if folder is None:
        return {}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} {folder} is a file, and each of the cameras needs its own.", fix="Name a folder.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder} can't be made: {error.strerror}.", fix="Name a folder of yours.") from error
    return {name: folder / f"{name}{suffix}" for name in names}


@contextmanager
def kept_each(
    sessions: Mapping[str, Session],
    uris: Mapping[str, str],
    *,
    snapshot: Path | None,
    log: Path | None,
    log_bytes: int,
    **options: Any,
) -> Iterator[dict[str, Path]]:
    """As `keep.kept`, for each camera in files of its own: `snapshot/NAME.keepsight`, and `log/NAME` for its feature log.

    Args:
        snapshot, log: folders, or None.
        log_bytes: room for all logs together.
        options: further arguments of `kept`.

    Yields:
        The folder of each camera's feature log; {} without any.

    Raises:
        SnapshotError, UsageError: as `kept`; a folder that is none.
    """
    names = list(sessions)
    snapshots, logs = folders("--snapshot", snapshot, names, SNAPSHOT_SUFFIX), folders("--feature-log", log, names)
    with ExitStack() as stack:
        for name, session in sessions.items():
            room = log_bytes // len(names)
            stack.enter_context(
                kept(session, uris[name], snapshot=snapshots.get(name), log=logs.get(name), log_bytes=room, **options)
            )
        yield logs


# -- talking ---------------------------------------------------------------------------------------------------------------


def converse_with_cameras(
    sessions: Mapping[str, Session],
    uris: Mapping[str, str],
    *,
    logs: Mapping[str, Path],
    branches: Mapping[str, Sequence[Branch]],
    status: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Watch all cameras and answer the lines of standard input, each for the camera that it names, until its end or Ctrl-C.

    Args:
        sessions: by the cameras' names.
        uris: by the same names.
        logs: folders of the feature logs that are being written, by name, which `/recall` asks.
        branches: what hangs on the streams beside the frames, by name.
        status: the lines that `/status` shows of the machine, if there is anything that watches it.

    Raises:
        KeepsightError: every camera was given up: why the last one was.
    """
    news = _News()
    lines = {name: StateLines(partial(news.tell, name)) for name in sessions}

    def on_event(name: str, event: Event) -> None:
        lines[name](event)

    left = set(sessions)

    def on_error(name: str, error: Exception) -> None:
        left.discard(name)
        if left:  # why the last one was given up ends the command
            news.tell(name, f"[given up] {error}")

    watcher = CameraWatcher(sessions, uris, branches=branches, on_event=on_event, on_error=on_error)
    try:
        _await_something(watcher)
        typer.echo(_greeting(watcher, recall=bool(logs)), err=True)
        while True:
            line = typed_line(_prompt(watcher))
            watcher.check()
            if line is None:
                break
            if status is not None and line.strip() == "/status":
                typer.echo("\n".join(status()), err=True)
            elif line.strip():
                with news.held():
                    _answer(line.strip(), sessions, watcher, logs)
    except KeyboardInterrupt:
        typer.echo(err=True)
    finally:
        watcher.close()


def addressed(line: str, names: Sequence[str]) -> tuple[str, str]:
    """The camera that a typed line is for, and the rest of the line: `door: who is there?` or `door: /since 2h who came?`.

    Case does not matter. With one camera no name is needed, and a word with a colon that is not its name belongs to the question.

    Raises:
        UsageError: none of several cameras is named, or one that is not there.

    >>> addressed("Door: who is there?", ["door", "yard"])
    ('door', 'who is there?')
    """
    found = _ADDRESSED.fullmatch(line.strip())
    by_folded = {name.casefold(): name for name in names}
    name = None if found is None else by_folded.get(found[1].casefold())
    if found is not None and name is not None:
        return name, (found[2] or "").strip()
    if len(names) == 1:
        return names[0], line.strip()
    if line.strip().startswith("/"):
        read_line(line)  # a word that is no command at all is refused as such
    if found is not None:
        raise UsageError(f"There is no camera {found[1]!r}.", fix=f"Cameras are {', '.join(names)}.")
    raise UsageError(
        f"Which camera? There are {', '.join(names)}.", fix=f"Begin with its name, as in {f'{names[0]}: {line.strip()}'!r}."
    )


def _answer(line: str, sessions: Mapping[str, Session], watcher: CameraWatcher, logs: Mapping[str, Path]) -> None:
    if line == "/cameras":
        _show(watcher.statuses())
        return
    try:
        name, rest = addressed(line, list(sessions))
    except UsageError as error:
        typer.echo(str(error), err=True)
        return
    status = watcher.status(name)
    if rest in ("", "/cameras"):
        _show([status])
    elif not status.frames_seen and not rest.startswith("/recall"):
        typer.echo(f"{name} has shown nothing yet: it is {status.state}. Ask another camera; /cameras lists them.", err=True)
    else:
        reply(sessions[name], rest, logs.get(name))


def _await_something(watcher: CameraWatcher) -> None:
    """Wait until there is something to ask about, and a little longer for cameras that have shown nothing and not failed."""
    until: float | None = None
    while until is None or time.monotonic() < until:
        statuses = watcher.statuses()
        if until is None and any(status.frames_seen for status in statuses):
            until = time.monotonic() + _SETTLE_S
        if until is not None and all(status.frames or status.state in ("stalled", "lost") for status in statuses):
            return
        watcher.check()
        time.sleep(_LOOK_S)


def _greeting(watcher: CameraWatcher, *, recall: bool) -> str:
    statuses = watcher.statuses()
    watched = ", ".join(f"{status.name} ({status.uri})" for status in statuses)
    words = "/at, /between, /recall" if recall else "/at, /between"
    example = f"{statuses[0].name}: QUESTION, or {statuses[0].name}: /since 2h QUESTION, {words}"
    return f"Watching {watched}.\nType {example}; /cameras lists them, /status tells how the machine is; Ctrl-D leaves."


def _prompt(watcher: CameraWatcher) -> str:
    away = [f"{status.name} {status.state}" for status in watcher.statuses() if status.state != "live"]
    return f"({', '.join(away)}) > " if away else "> "


class _News:
    """What happens to cameras, a line each on standard error; while an answer is being written, lines wait for its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[str] | None = None

    def tell(self, name: str, line: str) -> None:
        with self._lock:
            if self._waiting is None:
                typer.echo(f"{name}: {line}", err=True)
            else:
                self._waiting.append(f"{name}: {line}")

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            self._waiting = []
        try:
            yield
        finally:
            with self._lock:
                waited, self._waiting = self._waiting, None
                for line in waited or ():
                    typer.echo(line, err=True)


def _show(statuses: Sequence[CameraStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("camera", "state")
    for column in ("frames/s", "dropped", "remembered", "newest"):
        table.add_column(column, justify="right")
    table.add_column("address", overflow="fold")
    for status in statuses:
        state = status.state if status.error is None else "given up"
        rate = f"{status.fps:.1f}" if status.state == "live" else "-"
        table.add_row(
            status.name, state, rate, str(status.dropped), str(status.frames_seen), _age(status.age_ms), status.uri
        )
    Console(highlight=False, markup=False).print(table)
    for status in statuses:
        if status.error is not None:
            typer.echo(f"{status.name}: {status.error}")


def _age(age_ms: float | None) -> str:
    if age_ms is None:
        return "none"
    seconds = age_ms / 1000
    if seconds < 120:
        return f"{seconds:.1f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.1f} h ago"
