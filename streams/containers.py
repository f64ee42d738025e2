"""How long a video file says it is, in bytes: a file cut short is told apart from one that ends.

A demuxer that reaches the end of a half-downloaded file reports a normal end of stream. But MP4, Matroska and AVI
write the size of each top-level part before it, and reading those headers costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

__all__ = ["declared_size", "lacks_index"]

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"sidx", b"pnot")


def declared_size(path: str | os.PathLike[str]) -> int | None:
    """Bytes that the container's own headers account for.

    Less than the file's size means trailing data; more means that the end is missing.

    Returns:
        The size, or None for another container or one written without sizes, as live recordings are.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        reader = _reader_for(head)
        if reader is None:
            return None
        file.seek(0)
        return reader(file)


def lacks_index(path: str | os.PathLike[str]) -> bool:
    """Whether this is an MP4 or QuickTime file without its `moov` box, and so can't be played at all.

    Recorders write that box last, so a recording cut short has none.
    """
    with open(path, "rb") as file:
        if file.read(12)[4:8] not in _BOXES:
            return False
        return all(kind != b"moov" for kind, _ in _boxes(file))


def _reader_for(head: bytes) -> Callable[[BinaryIO], int | None] | None:
    if head[4:8] in _BOXES:
        return _iso_bmff_end
    if head[:4] == _EBML:
        return _matroska_end
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _avi_end
    return None


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Type and end of each top-level box of MP4 and QuickTime (ISO/IEC 14496-12, 4.2)."""
    length = os.fstat(file.fileno()).st_size
    end = 0
    while end < length:
        file.seek(end)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:  # the real size follows in 64 bits
            size = int.from_bytes(header[8:16], "big")
        if size < 8 or len(kind) < 4 or not kind.isascii():  # "up to the end of the file", or no box at all
            return
        end += size
        yield kind, end


def _iso_bmff_end(file: BinaryIO) -> int | None:
    return max((end for _, end in _boxes(file)), default=None)


def _matroska_end(file: BinaryIO) -> int | None:
    """Matroska and WebM: an EBML header, then one Segment that holds everything (RFC 9559)."""
    file.seek(4)
    header_size = _ebml_size(file)
    if header_size is None:
        return None
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return None
    segment_size = _ebml_size(file)
    return None if segment_size is None else file.tell() + segment_size


def _ebml_size(file: BinaryIO) -> int | None:
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value  # all ones: unknown


def _avi_end(file: BinaryIO) -> int | None:
    """AVI: RIFF chunks, the first one called `AVI `, large files going on with `AVIX` ones."""
    length = os.fstat(file.fileno()).st_size
    end = 0
    while end < length:
        file.seek(end)
        header = file.read(8)
        size = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):
            return end or None
        end += 8 + size + size % 2
    return end
