"""What `keepsight run` keeps on disk while it watches, and what it says of it; and asking what was kept."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import typer

from keepsight.runtime.answer import Mode
from keepsight.runtime.session import Session, Standing
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.resume import source_name
from keepsight.runtime.storage.saver import Saver
from keepsight.runtime.storage.snapshot import Snapshot, bytes_per_day, is_snapshot, snapshot_bytes
from keepsight.streams.errors import KeepsightError, SnapshotError, UsageError
from keepsight.streams.uri import SourceURI

__all__ = ["ask_saved", "kept", "parse_bytes"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@contextmanager
def kept(
    session: Session,
    uri: str,
    *,
    snapshot: Path | None = None,
    save_every_s: float = 300.0,
    kv: bool = False,
    log: Path | None = None,
    log_every_s: float = 10.0,
    log_bytes: int = 2 * 10**9,
) -> Iterator[None]:
    """Restore a session from a snapshot if there is one; inside, save it at intervals and log features; save at the end.

    A clean end is Ctrl-C, SIGTERM (which becomes the same), or any error. Of two folders or files, None leaves one out.

    Raises:
        SnapshotError: the snapshot or the log is damaged or of another bundle, or the last save failed.
        UsageError: an interval or a budget that makes no sense; a log of another stream than a file that begins anew.
    """
    with ExitStack() as stack:
        if snapshot is not None or log is not None:
            stack.enter_context(_sigterm_as_interrupt())
        if snapshot is not None:
            _restore_if_there(session, snapshot, uri)
        if log is not None:
            stack.enter_context(_logging(session, uri, log, log_every_s, log_bytes))
        if snapshot is not None:
            stack.enter_context(_saving(session, snapshot, save_every_s, kv))
        yield


def ask_saved(session: Session, saved: Snapshot, question: str, *, prompt: str | None, mode: Mode) -> str | Standing:
    """Restore a snapshot, say from when it is, and return what to ask `session`.

    In the mode `standing` that is the standing question of these words, if the snapshot carries one; else the words.
    """
    session.restore(saved)
    typer.echo(_described(saved), err=True)
    carried = [one for one in session.standing if (one.prompt if prompt is not None else one.question) == question]
    return carried[0] if carried and mode == "standing" else question


def parse_bytes(text: str) -> int:
    """`2G`, `500M`, `1.5T` or a plain number, in powers of 1000.

    Raises:
        UsageError: something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no number of bytes.", fix="Write 2G, 500M or 2000000000.")
    return round(float(found[1]) * _UNITS[found[2]])


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _restore_if_there(session: Session, path: Path, uri: str) -> None:
    if not path.exists():
        if not path.parent.is_dir():
            raise SnapshotError(f"there is no folder {path.parent} to save {path.name} in.", fix="Make it first.")
        return
    if not is_snapshot(path):
        raise SnapshotError(f"{path} is no snapshot, and would be overwritten.", fix="Name another file.")
    saved = session.restore(path)
    address = SourceURI.parse(uri)
    same_file = not address.is_camera and saved.source == source_name(address)
    then = "It goes on there." if same_file else _gap(saved)
    typer.echo(f"{path}: {_described(saved)} {then}", err=True)


@contextmanager
def _saving(session: Session, path: Path, every_s: float, kv: bool) -> Iterator[None]:
    dims = session.bundle.manifest.dims
    rows = [len(one.carried.prompt.state) for one in session.standing]
    nbytes = snapshot_bytes(dims, question_rows=rows, kv=kv) + session.key_frames.budget_bytes
    daily = bytes_per_day(nbytes, every_s)
    typer.echo(f"Saving to {path} every {every_s:g} s: up to {_size(nbytes)} a time, {_size(daily)} a day.", err=True)
    saver = Saver(session, path, every_s=every_s, kv=kv, on_error=_say)
    try:
        yield
    finally:
        saver.close()
        skipped = f", {saver.skipped} skipped" if saver.skipped else ""
        failed = f", {saver.failed} failed" if saver.failed else ""
        typer.echo(f"Saved {saver.saved} times{skipped}{failed}; {path} has {session.frames_seen} frames.", err=True)


@contextmanager
def _logging(session: Session, uri: str, folder: Path, every_s: float, budget: int) -> Iterator[None]:
    live = SourceURI.parse(uri).is_camera
    with FeatureLog(folder, session.bundle, every_s=every_s, budget_bytes=budget, live=live) as log:
        if not live and log.newest is not None and not session.frames_seen:
            raise UsageError(
                f"{folder} has a stream up to {log.newest.time_s:.1f} s, and {uri} begins at 0.",
                fix="Use another folder, or --snapshot to go on.",
            )
        typer.echo(f"Logging features to {folder}: {_size(budget)} hold {log.hours():.1f} h.", err=True)
        session.log_features(log, on_error=_say)
        yield


def _say(error: KeepsightError) -> None:
    typer.echo(str(error), err=True)


def _described(saved: Snapshot) -> str:
    when = datetime.fromtimestamp(saved.saved_at).strftime("%Y-%m-%d %H:%M:%S")
    old = f"{_duration(saved.age_s)} ago" if saved.age_s >= 0 else "in the future by this machine's clock"
    of = f" of {saved.source}" if saved.source else ""
    return f"{saved.frames_seen} frames{of} up to {saved.time_s:.1f} s, saved {when} ({old})."


def _gap(saved: Snapshot) -> str:
    if saved.newest is None:
        return "Nothing had been seen."
    gap_s = saved.newest.as_frame().age_ms / 1000
    unknown = saved.age_s < 0
    return "How long nothing was seen is unknown." if unknown else f"Nothing was seen for {_duration(gap_s)}."


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole / 3600:.1f} h"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
