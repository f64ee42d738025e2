"""The far past on disk: float16 features every k seconds, in a folder that never outgrows its budget.

A memory bank keeps a bounded summary of everything; the log keeps every k-th second of the last hours or days as it was, so
that an exact bank of any interval in it can be built again. At full size (N=257, C=1408) a record is 723,752 bytes: 1 GB
(10^9 bytes) holds 1,381 records, which are 3.8 hours at one every 10 seconds; 24 hours take 6.3 GB.

The folder holds segments, `000000000000.features` and so on, which are only appended to; the oldest is deleted to make room.
`feature_segment` says what is in one.

What a crash costs. A record is handed to the operating system with one write, so a killed process (kill -9) loses at most the
record that it was writing. A power cut also loses what the system had not yet written: the log is synced when a segment is full
and every `sync_s` seconds. A record torn by either is cut off when the log is opened again; nothing else is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.storage.feature_segment import Layout, Logged, Segment
from keepsight.runtime.storage.sections import sync_folder
from keepsight.streams.errors import SnapshotError, UsageError

__all__ = ["FeatureLog", "Logged"]

Float16 = npt.NDArray[np.float16]

SEGMENTS = 16
"""How many segments the budget is split into: a sixteenth of the past goes at a time."""

_MOST_RECORDS = 64  # of a segment: what is deleted at a time stays small
_SUFFIX = ".features"
_ROUNDING_S = 0.001  # as streams.sampling: containers round times


class FeatureLog:
    """A bounded log of features in a folder. One process writes it; any number may read it meanwhile.

    Args:
        folder: made if it is not there.
        bundle: whose features these are.
        every_s: k, seconds from one record to the next: the first frame at or after each multiple of it.
        budget_bytes: that all files of the log together never exceed.
        sync_s: seconds after which what was written is synced.
        live: whether a camera is watched, so that wall times mean something; the seconds of a file are all it has.
        writable: False only reads, and leaves a torn tail as it is.

    Raises:
        UsageError: an interval that is not above 0, or a budget of less than two records and their headers.
        SnapshotError: the folder's log is of another bundle or interval, of a newer version, or damaged; it can't be written,
            or another process writes it.
    """

    def __init__(
        self,
        folder: str | Path,
        bundle: Bundle,
        *,
        every_s: float = 10.0,
        budget_bytes: int = 2 * 10**9,
        sync_s: float = 60.0,
        live: bool = True,
        writable: bool = True,
    ) -> None:
        if not (math.isfinite(every_s) and every_s > 0):
            raise UsageError(f"a record every {every_s:g} s makes no sense.", fix="Give seconds above 0.")
        self.folder, self.every_s, self.budget_bytes = Path(folder), float(every_s), int(budget_bytes)
        self._run = os.urandom(8).hex()
        self._layout = Layout(bundle, self.every_s, live=live, run=self._run)
        self._sync_s = sync_s
        self._per_segment = self._records_per_segment()
        self._file: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._synced = time.monotonic()
        try:
            if writable:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = self._only_writer()
            self._segments = self._open_segments(writable)
            self._newest = self._last_record()
        except OSError as error:
            self.close()
            raise self._failed("can't be opened", error) from error
        except SnapshotError:
            self.close()
            raise

    # -- what is in it ---------------------------------------------------------------------------------------------

    @property
    def record_bytes(self) -> int:
        """Of one record."""
        return self._layout.record_bytes

    @property
    def records(self) -> int:
        return sum(segment.records for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Of all files; never more than the budget."""
        return sum(self._layout.nbytes(segment) for segment in self._segments)

    @property
    def newest(self) -> Logged | None:
        """The newest record; None in an empty log."""
        return self._newest

    @property
    def covers_s(self) -> tuple[float, float] | None:
        """Stream time of the oldest and of the newest record; None in an empty log."""
        oldest = next(self.read(), None)
        return None if oldest is None or self._newest is None else (oldest.time_s, self._newest.time_s)

    def hours(self, budget_bytes: int | None = None) -> float:
        """Hours that a budget holds."""
        return (self.budget_bytes if budget_bytes is None else budget_bytes) / self.record_bytes * self.every_s / 3600

    def read(self, since_s: float = -math.inf, until_s: float = math.inf) -> Iterator[Logged]:
        """Records whose time lies within an interval (both ends included), oldest first, one in memory at a time.

        Raises:
            SnapshotError: a record that may be of the interval is damaged, or the log made room for new ones while it was read.
        """
        damaged: SnapshotError | None = None
        for record in self._records_from(since_s):
            if isinstance(record, SnapshotError):
                damaged = damaged or record
                continue
            if damaged is not None and record.time_s > since_s:
                raise damaged  # it lies before this record, and may lie in the interval
            damaged = None
            if record.time_s > until_s:
                return
            if record.time_s >= since_s:
                yield record
        if damaged is not None:
            raise damaged

    # -- writing ---------------------------------------------------------------------------------------------------

    def due(self, time_s: float) -> bool:
        """Whether a frame of this stream time is the first at or after a multiple of `every_s`, and newer than the log."""
        if self._newest is None:
            return True
        return self._tick(time_s) > self._tick(self._newest.time_s)

    def offer(self, features: Any, *, time_s: float, index: int, wall_s: float) -> bool:
        """Log a frame's features [N, C] if one is due; features that are not due are not even looked at.

        Raises:
            UsageError: features of another shape, or too large for float16.
            SnapshotError: the disk is full or gone. What was logged stays; a later frame may be offered again.
        """
        if not self.due(time_s):
            return False
        record = Logged(self._as_half(features), float(time_s), float(wall_s), int(index))
        try:
            self._append(record)
        except OSError as error:
            self._cut_torn()
            raise self._failed("can't be written", error) from error
        self._newest = record
        return True

    def close(self) -> None:
        """Sync and give the folder back; closing twice does nothing."""
        self._close_segment()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> FeatureLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tick(self, time_s: float) -> int:
        return math.floor((time_s + _ROUNDING_S) / self.every_s)

    def _as_half(self, features: Any) -> Float16:
        rows = np.asarray(features)
        if rows.shape != self._layout.shape:
            raise UsageError(f"features must be {list(self._layout.shape)}, got {list(rows.shape)}.")
        with np.errstate(over="ignore"):
            half = rows.astype("<f2")
        if not np.isfinite(half).all():
            raise UsageError(f"features up to {np.abs(rows).max():.3g} don't fit float16.", fix="Run without the feature log.")
        return half

    def _append(self, record: Logged) -> None:
        if self._lock is None:
            raise UsageError("this feature log is only read.", fix="Open it with writable=True.")
        if self._file is None or self._segments[-1].records >= self._per_segment:
            self._begin_segment()
        assert self._file is not None
        _write_all(self._file, self._layout.packed(record))
        last = self._segments[-1]
        self._segments[-1] = replace(last, records=last.records + 1)
        if time.monotonic() - self._synced >= self._sync_s:
            os.fdatasync(self._file.fileno())
            self._synced = time.monotonic()

    def _begin_segment(self) -> None:
        """Go on in the last segment if it is of this run and has room, else in a new one, for which the oldest ones make room."""
        self._close_segment()
        last = self._segments[-1] if self._segments else None
        if last is not None and last.run == self._run and last.records < self._per_segment:
            self._file = _opened(last.path, "ab")
            return
        full = len(self._layout.header) + self._per_segment * self.record_bytes
        while self._segments and self.nbytes + full > self.budget_bytes:
            self._segments[0].path.unlink()
            del self._segments[0]
        number = 1 + int(self._segments[-1].path.stem) if self._segments else 0
        path = self.folder / f"{number:012d}{_SUFFIX}"
        self._file = _opened(path, "xb")
        _write_all(self._file, self._layout.header)
        os.fdatasync(self._file.fileno())
        self._segments.append(Segment(path, len(self._layout.header), 0, self._run))
        sync_folder(self.folder)

    def _close_segment(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                os.fdatasync(file.fileno())
            self._synced = time.monotonic()

    def _cut_torn(self) -> None:
        """After a write that failed: back to whole records. If the disk is gone, the next write says so again."""
        with contextlib.suppress(OSError):
            self._close_segment()
        with contextlib.suppress(OSError):
            self._segments = self._open_segments(writable=True)

    def _records_per_segment(self) -> int:
        room = self.budget_bytes // 2 - len(self._layout.header)
        if room < self.record_bytes:
            needs = 2 * (self.record_bytes + len(self._layout.header))
            raise UsageError(f"a feature log of {self.budget_bytes} bytes is too small.", fix=f"It needs {needs} bytes at least.")
        wanted = min(_MOST_RECORDS, self.budget_bytes // SEGMENTS // self.record_bytes)
        return max(1, wanted)

    def _only_writer(self) -> BinaryIO:
        file = _opened(self.folder / "writer.lock", "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise SnapshotError(
                f"{self.folder} is being written by another process.", fix="Give each process a log of its own."
            ) from None
        return file

    # -- the folder ------------------------------------------------------------------------------------------------

    def _open_segments(self, writable: bool) -> list[Segment]:
        paths = sorted(path for path in self.folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())
        segments = []
        for path in paths:
            segment = self._layout.opened(path, newest=path == paths[-1])
            if segment is not None:
                segments.append(segment)
            if writable and path == paths[-1]:
                if segment is None:
                    path.unlink()
                else:
                    os.truncate(path, self._layout.nbytes(segment))
        return segments

    def _records_from(self, since_s: float) -> Iterator[Logged | SnapshotError]:
        """Every record of the segments that may hold something from this time on."""
        segments = list(self._segments)
        try:
            for segment, following in zip_longest(segments, segments[1:]):
                if following is None or not self._begins_before(following, since_s):
                    yield from self._layout.read(segment)
        except FileNotFoundError as error:
            raise SnapshotError(f"{error.filename} made room while the log was read.", fix="Ask again.") from error

    def _begins_before(self, segment: Segment, time_s: float) -> bool:
        first = self._layout.record(segment, 0) if segment.records else None
        return isinstance(first, Logged) and first.time_s < time_s

    def _last_record(self) -> Logged | None:
        """The newest whole record."""
        for segment in reversed(self._segments):
            for number in reversed(range(segment.records)):
                if isinstance(record := self._layout.record(segment, number), Logged):
                    return record
        return None

    def _failed(self, what: str, error: OSError) -> SnapshotError:
        return SnapshotError(
            f"the feature log {self.folder} {what} ({error.strerror or error}).", fix="Check the folder and its room."
        )


def _opened(path: Path, mode: Literal["ab", "xb"]) -> BinaryIO:
    """Unbuffered, so that a record is with the operating system once it is written. Held open from one record to the next."""
    return cast(BinaryIO, open(path, mode, buffering=0))


def _write_all(file: BinaryIO, content: bytes) -> None:
    """One write; a disk that takes only a part of it is full."""
    if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
