"""One file of a feature log: a header that says whose features these are, and records of one size behind it.

```
segment:  16 magic | 4 version | 4 bytes of the JSON | JSON | 16 checksum of all before
          then records, all of one size
record:    8 time_s float64 | 8 wall time float64 | 8 index int64 | N*C float16 | 16 checksum of all before
```

Numbers are little-endian; checksums are BLAKE2b of 16 bytes; a segment's header keeps its form in every version. That records are
of one size is why none needs a length: where one is damaged, the next one's place is known.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.sections import checksum
from keepsight.runtime.snapshot import fingerprint
from keepsight.streams.errors import SnapshotError

__all__ = ["Layout", "Logged", "Segment"]

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
    """A file, the bytes before its first record, and how many records it has."""

    path: Path
    start: int
    records: int


class Layout:
    """How the segments of one log look.

    Args:
        bundle: whose features these are.
        every_s: seconds from one record to the next.
    """

    def __init__(self, bundle: Bundle, every_s: float) -> None:
        dims = bundle.manifest.dims
        self.shape = (dims.tokens, dims.channels)
        self._own = {
            "bundle": bundle.manifest.name, "fingerprint": fingerprint(bundle), "variant": bundle.variant,
            "shape": list(self.shape), "every_s": every_s,
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
        start, size = self._start(path), path.stat().st_size
        if start is None and newest and size < len(self.header) + self.record_bytes:
            return None
        if start is None:
            raise SnapshotError(
                f"{path} is damaged: the checksum of its header is wrong.", fix="Delete this one file; the others stay."
            )
        records = (size - start) // self.record_bytes
        return Segment(path, start, self._whole(path, start, records) if newest else records)

    def _start(self, path: Path) -> int | None:
        """Bytes before the first record; None without a whole header."""
        with open(path, "rb") as file:
            start = file.read(_START.size)
            if len(start) < _START.size:
                return None
            magic, version, length = _START.unpack(start)
            # Read before it is checked: a damaged length must not ask for gigabytes.
            text = file.read(min(length, 1 << 16))
            if magic != MAGIC or file.read(_CHECKSUM_BYTES) != checksum(start + text):
                return None
        self._check_ours(path, version, text)
        return len(start) + len(text) + _CHECKSUM_BYTES

    def _check_ours(self, path: Path, version: int, text: bytes) -> None:
        if version > VERSION:
            raise SnapshotError(
                f"{path} is of version {version}, this Keepsight reads up to {VERSION}.", fix="Use the Keepsight that wrote it."
            )
        theirs, own = json.loads(text), self._own
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
