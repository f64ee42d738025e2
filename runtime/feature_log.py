"""The far past on disk: float16 features every k seconds, in a folder that never outgrows its budget.

A memory bank keeps a bounded summary of everything; the log keeps every k-th second of the last hours or days as it was, so
that an exact bank of any interval in it can be built again. At full size (N=257, C=1408) a record is 723,752 bytes: 1 GB
(10^9 bytes) holds 1,381 records, which are 3.8 hours at one every 10 seconds; 24 hours take 6.3 GB.

The folder holds segments, `000000000000.features` and so on, which are only appended to; the oldest is deleted to make room.

```
segment:  16 magic | 4 version | 4 bytes of header | header: JSON | 16 checksum of all before
          then records, all of one size
record:    8 time_s float64 | 8 wall time float64 | 8 index int64 | N*C float16 | 16 checksum of all before
```

Numbers are little-endian; checksums are BLAKE2b of 16 bytes; a segment's header keeps its form in every version.

What a crash costs. A record is handed to the operating system with one write, so a killed process (kill -9) loses at most the
record that it was writing. A power cut also loses what the system had not yet written: the log is synced when a segment is full
and every `sync_s` seconds. A record torn by either is cut off when the log is opened again; nothing else is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.sections import checksum, sync_folder
from keepsight.runtime.snapshot import fingerprint
from keepsight.streams.errors import SnapshotError, UsageError

__all__ = ["FeatureLog", "Logged"]

Float16 = npt.NDArray[np.float16]

MAGIC = b"\x89keepsight-flog\n"
VERSION = 1
SEGMENTS = 16
"""How many segments the budget is split into: a sixteenth of the past goes at a time."""

_START = struct.Struct("<16sII")
_HEAD = struct.Struct("<ddq")
_CHECKSUM_BYTES = 16
_MOST_RECORDS = 64  # of a segment: what must be read to find a torn tail stays small
_SUFFIX = ".features"
_ROUNDING_S = 0.001  # as streams.sampling: containers round times


@dataclass(frozen=True, eq=False)
class Logged:
    """One record.

    Attributes:
        features: float16 [N, C].
        time_s: stream time.
        wall_s: when it was captured, seconds since 1970.
        index: of the frame in its source.
    """

    features: Float16
    time_s: float
    wall_s: float
    index: int


@dataclass(frozen=True)
class _Segment:
    path: Path
    start: int  # bytes before the first record
    records: int


class FeatureLog:
    """A bounded log of features in a folder. One process writes it; any number may read it meanwhile.

    Args:
        folder: made if it is not there.
        bundle: whose features these are.
        every_s: k, seconds from one record to the next: the first frame at or after each multiple of it.
        budget_bytes: that all files of the log together never exceed.
        sync_s: seconds after which what was written is synced.
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
        writable: bool = True,
    ) -> None:
        if not (math.isfinite(every_s) and every_s > 0):
            raise UsageError(f"a record every {every_s:g} s makes no sense.", fix="Give seconds above 0.")
        dims = bundle.manifest.dims
        self.folder, self.every_s, self.budget_bytes = Path(folder), float(every_s), int(budget_bytes)
        self._shape = (dims.tokens, dims.channels)
        self._sync_s = sync_s
        self._header = self._make_header(bundle)
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
        return _HEAD.size + 2 * math.prod(self._shape) + _CHECKSUM_BYTES

    @property
    def records(self) -> int:
        return sum(segment.records for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Of all files; never more than the budget."""
        return sum(self._size(segment) for segment in self._segments)

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
        if rows.shape != self._shape:
            raise UsageError(f"features must be {list(self._shape)}, got {list(rows.shape)}.")
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
        content = _HEAD.pack(record.time_s, record.wall_s, record.index) + record.features.tobytes()
        _write_all(self._file, content + checksum(content))
        last = self._segments[-1]
        self._segments[-1] = _Segment(last.path, last.start, last.records + 1)
        if time.monotonic() - self._synced >= self._sync_s:
            os.fdatasync(self._file.fileno())
            self._synced = time.monotonic()

    def _begin_segment(self) -> None:
        """Go on in the last segment if it has room, else in a new one, for which the oldest ones make room."""
        self._close_segment()
        if self._segments and self._segments[-1].records < self._per_segment:
            self._file = _opened(self._segments[-1].path, "ab")
            return
        full = len(self._header) + self._per_segment * self.record_bytes
        while self._segments and self.nbytes + full > self.budget_bytes:
            self._segments[0].path.unlink()
            del self._segments[0]
        number = 1 + int(self._segments[-1].path.stem) if self._segments else 0
        path = self.folder / f"{number:012d}{_SUFFIX}"
        self._file = _opened(path, "xb")
        _write_all(self._file, self._header)
        self._segments.append(_Segment(path, len(self._header), 0))
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
        room = self.budget_bytes // 2 - len(self._header)
        if room < self.record_bytes:
            needs = 2 * (self.record_bytes + len(self._header))
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

    # -- opening ---------------------------------------------------------------------------------------------------

    def _make_header(self, bundle: Bundle) -> bytes:
        own = {
            "bundle": bundle.manifest.name, "fingerprint": fingerprint(bundle), "variant": bundle.variant,
            "shape": list(self._shape), "every_s": self.every_s,
        }  # fmt: skip
        text = json.dumps(own).encode()
        start = _START.pack(MAGIC, VERSION, len(text)) + text
        return start + checksum(start)

    def _open_segments(self, writable: bool) -> list[_Segment]:
        paths = sorted(path for path in self.folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())
        segments = []
        for path in paths:
            last = path == paths[-1]
            start = self._check_header(path, may_be_torn=last)
            if start is None:
                if writable:
                    path.unlink()  # killed before its header was whole: it holds nothing
                continue
            records = (path.stat().st_size - start) // self.record_bytes
            if last:
                records = self._whole_records(path, start, records)
                if writable:
                    os.truncate(path, start + records * self.record_bytes)
            segments.append(_Segment(path, start, records))
        return segments

    def _check_header(self, path: Path, *, may_be_torn: bool) -> int | None:
        """Bytes before the first record; None where a crash left less than a header."""
        with open(path, "rb") as file:
            start = file.read(_START.size)
            if len(start) == _START.size:
                magic, version, length = _START.unpack(start)
                # Read before it is checked: a damaged length must not ask for gigabytes.
                text = file.read(min(length, 1 << 16))
                if magic == MAGIC and file.read(_CHECKSUM_BYTES) == checksum(start + text):
                    self._check_belongs_here(path, version, text)
                    return len(start) + len(text) + _CHECKSUM_BYTES
        if may_be_torn and path.stat().st_size < len(self._header) + self.record_bytes:
            return None
        raise SnapshotError(
            f"{path} is damaged: the checksum of its header is wrong.", fix="Delete this one file; the others stay."
        )

    def _check_belongs_here(self, path: Path, version: int, text: bytes) -> None:
        if version > VERSION:
            raise SnapshotError(
                f"{path} is of version {version}, this Keepsight reads up to {VERSION}.", fix="Use the Keepsight that wrote it."
            )
        theirs = json.loads(text)
        mine = json.loads(self._header[_START.size : -_CHECKSUM_BYTES])
        if theirs["fingerprint"] != mine["fingerprint"]:
            raise SnapshotError(
                f"{self.folder} has features of bundle {theirs['bundle']} ({theirs['fingerprint'][:12]}), this is "
                f"{mine['bundle']} ({mine['fingerprint'][:12]}).",
                fix="Use another folder, or that bundle.",
            )
        if theirs["every_s"] != self.every_s:
            raise SnapshotError(
                f"{path} has a record every {theirs['every_s']:g} s, not every {self.every_s:g} s.",
                fix="Use the same interval, or another folder.",
            )

    def _whole_records(self, path: Path, start: int, records: int) -> int:
        """Records of the newest segment up to the last whole one: what is torn is at the end."""
        with open(path, "rb") as file:
            while records:
                file.seek(start + (records - 1) * self.record_bytes)
                if _is_whole(file.read(self.record_bytes)):
                    break
                records -= 1
        return records

    def _records_from(self, since_s: float) -> Iterator[Logged | SnapshotError]:
        """Every record of the segments that may hold something from this time on; an error where one is damaged."""
        segments = list(self._segments)
        for segment, following in zip_longest(segments, segments[1:]):
            if following is not None and self._begins_before(following, since_s):
                continue
            try:
                with open(segment.path, "rb") as file:
                    file.seek(segment.start)
                    for number in range(segment.records):
                        yield self._parsed(file.read(self.record_bytes), segment, number)
            except FileNotFoundError as error:
                raise SnapshotError(f"{segment.path} made room while the log was read.", fix="Ask again.") from error

    def _begins_before(self, segment: _Segment, time_s: float) -> bool:
        first = self._record(segment, 0) if segment.records else None
        return isinstance(first, Logged) and first.time_s < time_s

    def _record(self, segment: _Segment, number: int) -> Logged | SnapshotError:
        with open(segment.path, "rb") as file:
            file.seek(segment.start + number * self.record_bytes)
            return self._parsed(file.read(self.record_bytes), segment, number)

    def _parsed(self, content: bytes, segment: _Segment, number: int) -> Logged | SnapshotError:
        if not _is_whole(content):
            return SnapshotError(
                f"{segment.path} is damaged: the checksum of record {number} is wrong.",
                fix="Ask about a time before or after it.",
            )
        features = np.frombuffer(content, "<f2", math.prod(self._shape), _HEAD.size).reshape(self._shape)
        time_s, wall_s, index = _HEAD.unpack_from(content)
        return Logged(features, time_s, wall_s, index)

    def _last_record(self) -> Logged | None:
        """The newest whole record."""
        for segment in reversed(self._segments):
            for number in reversed(range(segment.records)):
                if isinstance(record := self._record(segment, number), Logged):
                    return record
        return None

    def _size(self, segment: _Segment) -> int:
        return segment.start + segment.records * self.record_bytes

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


def _is_whole(content: bytes) -> bool:
    return len(content) > _CHECKSUM_BYTES and checksum(content[:-_CHECKSUM_BYTES]) == content[-_CHECKSUM_BYTES:]
