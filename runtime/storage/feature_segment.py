"""One file of a feature log: a header that says whose features these are, and records of one size behind it.

```
segment:  16 magic | 4 version | 4 bytes of the JSON | JSON | 16 checksum of all before
          then records, all of one size
record:    8 time_s float64 | 8 wall time float64 | 8 index int64 | N*C float16 | 16 checksum of all before
```

Numbers are little-endian; checksums are BLAKE2b of 16 bytes; a segment's header keeps its form in every version. That records are
of one size is why none needs a length: where one is damaged, the next one's place is known, and the times of all are read
without their features.

The JSON has: bundle, fingerprint, variant, shape, every_s; live (whether a camera was watched, so that wall times mean
something) and run (the process that wrote it: a segment is of one, since a clock that jumps does so within one).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.storage.sections import checksum
from keepsight.runtime.storage.snapshot import fingerprint
from keepsight.streams.errors import SnapshotError

__all__ = ["Header", "Layout", "Logged", "Segment", "is_segment", "read_header"]

Float16 = npt.NDArray[np.float16]

MAGIC = b"\x89keepsight-flog\n"
VERSION = 1

_START = struct.Struct("<16sII")
_HEAD = struct.Struct("<ddq")
_CHECKSUM_BYTES = 16


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
class Segment:
    """A file, the bytes before its first record, how many records it has, and whose run wrote it."""

    path: Path
    start: int
    records: int
    run: str = ""


@dataclass(frozen=True)
class Header:
    """What a segment says of itself.

    Attributes:
        nbytes: of all of it: where the first record begins.
        version: of the format.
        about: the JSON.
    """

    nbytes: int
    version: int
    about: Mapping[str, Any]

    @property
    def every_s(self) -> float:
        """Seconds from one record to the next."""
        return float(self.about["every_s"])

    @property
    def live(self) -> bool:
        """Whether a camera was watched; segments that do not tell have wall times, and count as such."""
        return bool(self.about.get("live", True))

    @property
    def run(self) -> str:
        """Which process wrote it; empty where that is not told."""
        return str(self.about.get("run", ""))


def is_segment(path: Path) -> bool:
    """Whether a file begins as a segment does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header | None:
    """The header of a segment; None where there is no whole one."""
    with open(path, "rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size:
            return None
        magic, version, length = _START.unpack(start)
        # Read before it is checked: a damaged length must not ask for gigabytes.
        text = file.read(min(length, 1 << 16))
        if magic != MAGIC or file.read(_CHECKSUM_BYTES) != checksum(start + text):
            return None
    return Header(len(start) + len(text) + _CHECKSUM_BYTES, version, json.loads(text))


class Layout:
    """How the segments of one log look.

    Args:
        bundle: whose features these are.
        every_s: seconds from one record to the next.
        live: of segments that are written: whether a camera is watched.
        run: of segments that are written: which process writes.
    """

    def __init__(self, bundle: Bundle, every_s: float, *, live: bool = True, run: str = "") -> None:
        dims = bundle.manifest.dims
        self.shape = (dims.tokens, dims.channels)
        self._own = {
            "bundle": bundle.manifest.name, "fingerprint": fingerprint(bundle), "variant": bundle.variant,
            "shape": list(self.shape), "every_s": every_s, "live": live, "run": run,
        }  # fmt: skip
        text = json.dumps(self._own).encode()
        start = _START.pack(MAGIC, VERSION, len(text)) + text
        self.header = start + checksum(start)

    @property
    def record_bytes(self) -> int:
        """Of one record."""
        return _HEAD.size + 2 * math.prod(self.shape) + _CHECKSUM_BYTES

    def nbytes(self, segment: Segment) -> int:
        """Of a segment."""
        return segment.start + segment.records * self.record_bytes

    def packed(self, record: Logged) -> bytes:
        """A record as it is written."""
        content = _HEAD.pack(record.time_s, record.wall_s, record.index) + record.features.astype("<f2").tobytes()
        return content + checksum(content)

    # -- opening ---------------------------------------------------------------------------------------------------

    def opened(self, path: Path, *, newest: bool) -> Segment | None:
        """A file of the folder as a segment; of the newest one, up to its last whole record.

        Returns:
            None where a crash left less than a header, and so nothing.

        Raises:
            SnapshotError: a damaged header, a newer version, another bundle or interval.
        """
        header, size = read_header(path), path.stat().st_size
        if header is None and newest and size < len(self.header) + self.record_bytes:
            return None
        if header is None:
            raise SnapshotError(
                f"{path} is damaged: the checksum of its header is wrong.", fix="Delete this one file; the others stay."
            )
        self._check_ours(path, header)
        records = (size - header.nbytes) // self.record_bytes
        whole = self._whole(path, header.nbytes, records) if newest else records
        return Segment(path, header.nbytes, whole, header.run)

    def _check_ours(self, path: Path, header: Header) -> None:
        if header.version > VERSION:
            raise SnapshotError(
                f"{path} is of version {header.version}, this Keepsight reads up to {VERSION}.",
                fix="Use the Keepsight that wrote it.",
            )
        theirs, own = header.about, self._own
        if theirs["fingerprint"] != own["fingerprint"]:
            raise SnapshotError(
                f"{path.parent} has features of bundle {theirs['bundle']} ({theirs['fingerprint'][:12]}), this is "
                f"{own['bundle']} ({str(own['fingerprint'])[:12]}).",
                fix="Use another folder, or that bundle.",
            )
        if theirs["every_s"] != own["every_s"]:
            raise SnapshotError(
                f"{path} has a record every {theirs['every_s']:g} s, not every {own['every_s']:g} s.",
                fix="Use the same interval, or another folder.",
            )

    def _whole(self, path: Path, start: int, records: int) -> int:
        """Records up to the last whole one: what is torn is at the end."""
        with open(path, "rb") as file:
            while records:
                file.seek(start + (records - 1) * self.record_bytes)
                if _is_whole(file.read(self.record_bytes)):
                    break
                records -= 1
        return records

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, segment: Segment) -> Iterator[Logged | SnapshotError]:
        """Its records, oldest first; an error in the place of one that is damaged."""
        with open(segment.path, "rb") as file:
            file.seek(segment.start)
            for number in range(segment.records):
                yield self._next(file, segment, number)

    def moments(self, segment: Segment) -> npt.NDArray[np.float64]:
        """Stream time and wall time of its records, `[records, 2]`, as they stand there: no features read, nothing checked."""
        found = np.full((segment.records, 2), np.nan)
        with open(segment.path, "rb", buffering=0) as file:
            for number in range(segment.records):
                file.seek(segment.start + number * self.record_bytes)
                head = file.read(_HEAD.size)
                if len(head) == _HEAD.size:
                    found[number] = _HEAD.unpack(head)[:2]
        return found

    def record(self, segment: Segment, number: int) -> Logged | SnapshotError:
        """One of its records, or the error that it is damaged."""
        with open(segment.path, "rb") as file:
            file.seek(segment.start + number * self.record_bytes)
            return self._next(file, segment, number)

    def _next(self, file: BinaryIO, segment: Segment, number: int) -> Logged | SnapshotError:
        content = file.read(self.record_bytes)
        if not _is_whole(content):
            return SnapshotError(
                f"{segment.path} is damaged: the checksum of record {number} is wrong.",
                fix="Ask about a time before or after it.",
            )
        features: npt.NDArray[Any] = np.frombuffer(content, "<f2", math.prod(self.shape), _HEAD.size).reshape(self.shape)
        time_s, wall_s, index = _HEAD.unpack_from(content)
        return Logged(features, time_s, wall_s, index)


def _is_whole(content: bytes) -> bool:
    return len(content) > _CHECKSUM_BYTES and checksum(content[:-_CHECKSUM_BYTES]) == content[-_CHECKSUM_BYTES:]
