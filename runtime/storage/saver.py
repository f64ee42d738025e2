"""Saving a session's memory every so often, on a thread of its own, while frames go on coming."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter

from keepsight.runtime.session import Session
from keepsight.streams.errors import SnapshotError, UsageError

__all__ = ["Saver"]


class Saver:
    """Keeps one file at most `every_s` and the time of one write behind a session's memory.

    The memory is locked while it is copied, not while the copy is written. One copy exists at a time: a moment to save that
    comes while the last one is still being written is skipped and counted. Nothing is written where no frame has come since.
    A write that fails is reported and tried again at the next moment; the file keeps what it had.

    Args:
        session: what is saved.
        path: the file.
        every_s: seconds from one save to the next.
        kv: with the visual bank's keys and values, see `Session.snapshot`.
        on_error: called on the saving thread with an error of a save; the one of the last save, in `close`, is raised.

    Attributes:
        saved, skipped, failed: how many saves were done, left out because the last one was not done yet, and failed.
        nbytes: of the last save.
        copy_ms, write_ms: what the last save took: with the memory locked, and after.

    Raises:
        UsageError: an interval that is not above 0.
    """

    def __init__(
        self,
        session: Session,
        path: str | Path,
        *,
        every_s: float = 300.0,
        kv: bool = False,
        on_error: Callable[[SnapshotError], None] | None = None,
    ) -> None:
        if not every_s > 0:
            raise UsageError(f"saving every {every_s:g} s makes no sense.", fix="Give seconds above 0.")
        self.path = Path(path)
        self.saved = self.skipped = self.failed = self.nbytes = 0
        self.copy_ms = self.write_ms = 0.0
        self._session, self._every_s, self._kv = session, every_s, kv
        self._on_error = on_error
        self._frames_saved = session.frames_seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keepsight-saver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, wait for a save that is being written, and save once more. Closing twice does nothing.

        Raises:
            SnapshotError: the last save failed.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._save()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        due = monotonic() + self._every_s
        while not self._stop.wait(max(due - monotonic(), 0.0)):
            try:
                self._save()
            except SnapshotError as error:
                self.failed += 1
                if self._on_error is not None:
                    self._on_error(error)
            missed = int(max(monotonic() - due, 0.0) // self._every_s)
            self.skipped += missed
            due += self._every_s * (missed + 1)

    def _save(self) -> None:
        if self._session.frames_seen == self._frames_saved:
            return
        start = perf_counter()
        snapshot = self._session.snapshot(kv=self._kv)
        copied = perf_counter()
        self.nbytes = snapshot.write(self.path)
        self.copy_ms, self.write_ms = 1000 * (copied - start), 1000 * (perf_counter() - copied)
        self._frames_saved = snapshot.frames_seen
        self.saved += 1
