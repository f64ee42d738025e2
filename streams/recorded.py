"""What a recorder has written: segments whose names tell their order and their time, so that no index can be lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from keepsight.streams.errors import SourceNotFoundError

__all__ = ["Segment", "segment_name", "segments_in"]

_NAME = re.compile(r"(\d{8})-(\d{8}T\d{6})\.(\d{3})Z\.(ts|mkv)")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a recording.

    Attributes:
        path: where it is.
        number: counts up over restarts: the order of recording, whatever the clock said.
        start_s: when its first picture was captured, in seconds since 1970, by the clock of that moment.
        size: bytes, when it was looked at.
    """

    path: Path
    number: int
    start_s: float
    size: int


def segment_name(number: int, start_s: float, suffix: str) -> str:
    """The name of a segment: its number, and when it began, in UTC to a millisecond."""
    start = _EPOCH + timedelta(milliseconds=round(1000 * start_s))
    return f"{number:08d}-{start:%Y%m%dT%H%M%S}.{start.microsecond // 1000:03d}Z{suffix}"


def segments_in(folder: Path) -> list[Segment]:
    """The segments of a folder, in the order of recording; other files are left alone.

    Raises:
        SourceNotFoundError: there is no such folder.
    """
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise SourceNotFoundError(
            f"{folder} is no recording: {error.strerror}.", fix="Name the folder given to --record."
        ) from error
    found = [segment for path in entries if (segment := _segment(path)) is not None]
    return sorted(found, key=lambda segment: segment.number)


def _segment(path: Path) -> Segment | None:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    try:
        size = path.stat().st_size
        start = datetime.strptime(match[2], "%Y%m%dT%H%M%S").replace(tzinfo=timezone.utc)
    except (OSError, ValueError):  # a recorder has just deleted it; a name that is no time
        return None
    return Segment(path, int(match[1]), (start - _EPOCH).total_seconds() + int(match[3]) / 1000, size)
