"""Reading the kernel's small files: what is missing, unreadable or garbage is None, never an exception and never zero."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["named", "number", "text"]

_ROOM = 4096  # no attribute of sysfs is longer than a page
_MOST_DIGITS = 20


def text(path: str | Path) -> str | None:
    """What a file says, without the white space around it; None for an empty one."""
    try:
        # Not open(): a Jetson has some fifty of these to read, many times a second.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        # A sensor that is switched off answers EAGAIN, or EIO.
        return os.read(descriptor, _ROOM).decode("utf-8", "replace").strip("\0 \t\r\n") or None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def number(path: str | Path | None) -> int | None:
    """A whole number in a file."""
    said = None if path is None else text(path)
    if said is None or len(said) > _MOST_DIGITS:
        return None
    try:
        return int(said)
    except ValueError:
        return None


def named(folder: Path, pattern: str) -> list[Path]:
    """The files or folders of a pattern, in the order of their numbers: zone2 before zone10."""
    try:
        return sorted(folder.glob(pattern), key=_order)
    except OSError:
        return []


def _order(path: Path) -> tuple[int, str]:
    digits = "".join(character for character in path.name if character.isascii() and character.isdigit())
    return int(digits or 0), path.name
