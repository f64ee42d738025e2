"""Named arrays in one file: written whole or not at all, every byte under a checksum, read back as they were.

```
 0  16  magic
16   4  version of the format
20   4  bytes of the header
24   8  bytes of the whole file
32  16  checksum of the header
48  16  checksum of the 48 bytes before
64      header: JSON, {"meta": ..., "sections": [{"name", "dtype", "shape", "bytes", "checksum"}, ...]}
        the sections, one after another, without gaps
```

Numbers are little-endian, dtypes are spelt as NumPy's (`<f4`), arrays are in C order, checksums are BLAKE2b of 16 bytes:
nothing depends on the machine, and nothing in the file is ever executed. The first 64 bytes keep their form in every version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import SnapshotError

__all__ = ["MAGIC", "VERSION", "checksum", "is_section_file", "read_sections", "sync_folder", "write_sections"]

Array = npt.NDArray[Any]

MAGIC = b"\x89keepsight-snap\n"
VERSION = 1

_PREAMBLE = struct.Struct("<16sIIQ16s")
_DIGEST_BYTES = 16
_START = _PREAMBLE.size + _DIGEST_BYTES
_KINDS = "fiub"  # floats, integers, bool: what a section may hold
_AGAIN = "Restore a copy of it, or start over without it."


def checksum(data: Any) -> bytes:
    """BLAKE2b of 16 bytes of anything that has a buffer."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def is_section_file(path: str | Path) -> bool:
    """Whether a file begins as ours do. A folder, a missing file or an address does not."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


# -- writing ---------------------------------------------------------------------------------------------------------


def write_sections(path: str | Path, meta: Mapping[str, Any], sections: Mapping[str, Array]) -> int:
    """Replace a file by these arrays, atomically: under another name in the same folder, synced, then renamed.

    Whatever happens meanwhile, the file is the old one or the new one. It takes the room of both while it is written.

    Args:
        path: the file; its folder must be there.
        meta: what JSON can say.
        sections: name -> array of numbers.

    Returns:
        Bytes written.

    Raises:
        SnapshotError: the disk is full, the folder is not there or may not be written, or another process is writing this
            file. The old file is unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    arrays = {name: _plain(name, array) for name, array in sections.items()}
    try:
        with _only_writer(partial) as file:
            written = _write(file, meta, arrays)
            os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise SnapshotError(
            f"{path} can't be written ({error.strerror or error}).",
            fix="What was saved before is unchanged; make room, or save elsewhere.",
        ) from error
    return written


@contextlib.contextmanager
def _only_writer(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, empty, held by this process alone. What a killed process left of it is overwritten."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
        except OSError:
            mine = False
        if not mine:  # another process holds it, or has just renamed it
            raise SnapshotError(f"{partial} is being written by another process.", fix="Give each process a snapshot of its own.")
        file.truncate(0)
        yield file


def _write(file: BinaryIO, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> int:
    listed = [
        {
            "name": name,
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "bytes": array.nbytes,
            "checksum": checksum(_bytes(array)).hex(),
        }
        for name, array in arrays.items()
    ]
    header = json.dumps({"meta": meta, "sections": listed}, ensure_ascii=False, allow_nan=False).encode()
    total = _START + len(header) + sum(array.nbytes for array in arrays.values())
    preamble = _PREAMBLE.pack(MAGIC, VERSION, len(header), total, checksum(header))
    for part in (preamble, checksum(preamble), header):
        file.write(part)
    for array in arrays.values():
        file.write(_bytes(array).data)
    file.flush()
    os.fsync(file.fileno())
    return total


def _plain(name: str, array: Array) -> Array:
    """Numbers in C order, little-endian."""
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"section {name!r} is {array.dtype}, not numbers")
    # Not ascontiguousarray: it would make [1] of [].
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """An array's memory, for whatever takes a buffer."""
    return array.reshape(-1).view(np.uint8)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_sections(path: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `write_sections` wrote: (meta, arrays), every checksum checked.

    Raises:
        SnapshotError: no such file, not one of ours, truncated, longer than it was written, damaged (with the place), or of
            a newer version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header, size = _read_header(path, file), os.fstat(file.fileno()).st_size
            arrays = {entry["name"]: _read_section(path, file, entry) for entry in header["sections"]}
            if file.tell() != size:
                raise _damaged(path, f"has {size - file.tell()} bytes more than its sections")
    except OSError as error:
        raise SnapshotError(f"{path} can't be read ({error.strerror or error}).", fix="Check the path.") from error
    return header["meta"], arrays


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_START)
    if not start.startswith(MAGIC[: len(start)]) or not start:
        raise SnapshotError(f"{path} is no snapshot, or its first bytes are damaged.", fix=_AGAIN)
    if len(start) < _START:
        raise _truncated(path, size, None)
    preamble, digest = start[: _PREAMBLE.size], start[_PREAMBLE.size :]
    if checksum(preamble) != digest:
        raise _damaged(path, f"is damaged: the checksum of its first {_START} bytes is wrong")
    _, version, header_bytes, total, header_digest = _PREAMBLE.unpack(preamble)
    if version > VERSION:
        raise SnapshotError(
            f"{path} is of version {version}, this Keepsight reads up to {VERSION}.",
            fix="Use the Keepsight that saved it, or a newer one.",
        )
    if size < total:
        raise _truncated(path, size, total)
    header = file.read(header_bytes)
    if checksum(header) != header_digest:
        raise _damaged(path, "is damaged: the checksum of its header is wrong")
    return cast(dict[str, Any], json.loads(header))


def _read_section(path: Path, file: BinaryIO, entry: Mapping[str, Any]) -> Array:
    # The header's checksum was right, so sizes are what was written.
    data = np.empty(entry["bytes"], np.uint8)
    if cast(Any, file).readinto(data.data) != data.size:
        raise _damaged(path, f"ends inside section {entry['name']!r}")
    if checksum(data).hex() != entry["checksum"]:
        raise _damaged(path, f"is damaged: the checksum of section {entry['name']!r} is wrong")
    stored = data.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _truncated(path: Path, size: int, total: int | None) -> SnapshotError:
    of = "" if total is None else f" of {total}"
    return SnapshotError(f"{path} is truncated: {size}{of} bytes are there.", fix=_AGAIN)


def _damaged(path: Path, what: str) -> SnapshotError:
    return SnapshotError(f"{path} {what}.", fix=_AGAIN)
