"""One `keepsight build` at a time into one folder of engines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keepsight.streams.errors import EngineError

__all__ = ["LOCK", "only_builder"]

LOCK = ".build.lock"


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold a folder of engines, which is made if it is not there, for as long as they are built.

    The kernel gives the lock back when the process ends, killed or not; its empty file stays. A folder that can't be written
    needs none: nothing is built into it, and what tries says so.

    Raises:
        EngineError: another process builds into it.
    """
    lock = _opened(folder)
    if lock is None:
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineError(
                f"another process is building engines into {folder}.", fix="Wait until it is done; then nothing is left to build."
            ) from None
        yield
    finally:
        os.close(lock)


def _opened(folder: Path) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
