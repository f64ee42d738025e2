"""Whether a source is there at all, asked before GStreamer is, whose answers are vaguer and cost a pipeline."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from keepsight.streams.containers import lacks_index
from keepsight.streams.errors import SourceNotFoundError, SourceUnreadableError
from keepsight.streams.faults import PORTS, truncation_of
from keepsight.streams.uri import SourceURI

__all__ = ["check_presence", "is_reachable"]

def check_presence(uri: SourceURI) -> None:
    """Refuse a file or a device that is not there, or can't be read.

    Raises:
        SourceNotFoundError: there is none.
        SourceUnreadableError: it may not be read, is empty, or is cut off before its index.
    """
    if uri.kind == "file":
        _check_file(uri)
    elif uri.kind == "v4l2":
        _check_device(uri.location)


def is_reachable(uri: SourceURI, timeout_s: float = 0.5) -> bool | None:
    """Whether a camera could answer: its port accepts a connection, its device exists. None if that can't be told.

    It costs a thousandth of a full attempt, and says nothing about paths and passwords.
    """
    if uri.kind == "v4l2":
        return os.path.exists(uri.location)
    address = urlsplit(uri.location)
    if address.scheme not in PORTS or address.hostname is None:
        return None
    try:
        socket.create_connection((address.hostname, address.port or PORTS[address.scheme]), timeout=timeout_s).close()
    except (OSError, ValueError):  # a port out of range
        return False
    return True


def _check_file(uri: SourceURI) -> None:
    path = Path(uri.location)
    if not path.exists():
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise SourceNotFoundError(f"there is no file {path}{place}.", fix="Check the path.")
    if not os.access(path, os.R_OK):
        raise SourceUnreadableError(f"{path} may not be read by this user.", fix=f"chmod +r {path}.")
    if not (path.is_file() or path.is_dir()):  # reading a pipe may block for ever, even against closing it
        raise SourceUnreadableError(f"{path} is a pipe or a device, not a file.", fix="Save it to a file first.")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceUnreadableError(f"{path} is empty (0 bytes).", fix="Copy or download it again.")
    if path.is_file() and lacks_index(path):
        # Checked here because decodebin sometimes swallows the demuxer's complaint, and then nothing ever comes.
        missing = truncation_of(uri)
        what = f"is truncated: {missing} are there, and its" if missing else "has no"
        raise SourceUnreadableError(
            f"{path} {what} index (the moov box){' is in the rest' if missing else ''}.",
            fix="Copy or download it again.",
        )


def _check_device(device: str) -> None:
    if not os.path.exists(device):
        there = ", ".join(sorted(str(item) for item in Path("/dev").glob("video*"))) or "none at all"
        raise SourceNotFoundError(
            f"there is no camera {device}; this machine has {there}.", fix="Plug it in, and see `keepsight sources`."
        )
    if not os.access(device, os.R_OK | os.W_OK):
        raise SourceUnreadableError(
            f"{device} may not be used by this user.", fix="sudo usermod -aG video $USER, then log in again."
        )
