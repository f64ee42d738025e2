"""What GStreamer complains about, told as our own errors: one clear line and what to do."""

from __future__ import annotations

import os
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from keepsight.streams.containers import declared_size
from keepsight.streams.errors import (
    KeepsightError,
    NoFrameError,
    SourceLostError,
    SourceNotFoundError,
    SourceUnreadableError,
)
from keepsight.streams.uri import SourceURI

__all__ = ["RefusedError", "fault_of", "lost", "silence_of", "truncation_of"]

# Error codes, not texts: the texts are translated to the user's language.
_RESOURCE, _STREAM = "gst-resource-error-quark", "gst-stream-error-quark"
_NOT_FOUND, _BUSY, _NOT_AUTHORIZED = (_RESOURCE, 3), (_RESOURCE, 4), (_RESOURCE, 15)
_OPENING = {(_RESOURCE, code) for code in (5, 6, 7)}
_NO_ANSWER = {(_RESOURCE, code) for code in (9, 10)}
_NO_TYPE, _WRONG_TYPE, _FAILED = (_STREAM, 4), (_STREAM, 5), (_STREAM, 1)
_NO_DECODER = {(_STREAM, 6), ("gst-core-error-quark", 12)}

PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}

_DECODERS = "apt-get install gstreamer1.0-libav gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly."
_PLAYABLE = "Give an MP4, MKV, AVI or WebM video, or PNG or JPEG pictures."


class RefusedError(SourceUnreadableError):
    """A camera wants another user or password. Asked too often, many lock the account."""


def fault_of(uri: SourceURI, message: Any, *, delivered: bool, has_video: bool | None = None) -> KeepsightError:
    """Translate an ERROR message of the bus.

    Args:
        uri: the source.
        message: the first ERROR message.
        delivered: whether frames had come before it.
        has_video: whether the decoder found a video stream; None if it doesn't know.
    """
    error, debug = message.parse_error()
    code = (error.domain, error.code)
    reason = uri.redact(_reason(error.message, debug))
    if uri.is_camera and delivered:
        return lost(uri, reason)
    if uri.kind == "file":
        return _file_fault(uri, code, reason, has_video=has_video)
    if uri.kind == "rtsp":
        return _rtsp_fault(uri, code, reason)
    if uri.kind == "http":
        return _http_fault(uri, code, reason, has_video=has_video)
    return _camera_fault(uri, code, reason)


def lost(uri: SourceURI, reason: str) -> SourceLostError:
    """The error of a live source that stopped."""
    fix = {
        "rtsp": "Check the camera and the network, then start again.",
        "v4l2": "Check the cable, then start again.",
        "http": "Check the camera and the network, then start again.",
        "rtp": "Check the sender and the network, then start again.",
        "csi": "Check the ribbon cable and nvargus-daemon, then start again.",
    }.get(uri.kind, "Start again.")
    return SourceLostError(f"{uri} is lost: {reason}.", fix=fix)


def silence_of(uri: SourceURI, waited_s: float) -> NoFrameError:
    """The error of a source whose first frame did not come in time."""
    what = f"{uri} gave no frame within {waited_s:g} s"
    if not uri.is_camera:
        return NoFrameError(f"{what}.", fix="It may be damaged: try to play it elsewhere.")
    if uri.kind in ("rtsp", "http"):  # a host that swallows packets and a server that hangs look the same to GStreamer
        problem = _connection_problem(uri)
        what += ": it accepts connections, and says nothing" if problem is None else f": it can't be reached: {problem}"
    return NoFrameError(f"{what}.", fix="Check that it is playing, or wait longer for it.")


def truncation_of(uri: SourceURI) -> str | None:
    """How much of a file is missing, or None if its container does not say that something is."""
    try:
        declared, actual = declared_size(uri.location), os.path.getsize(uri.location)
    except OSError:
        return None
    if declared is None or declared <= actual:
        return None
    return f"{actual:,} of {declared:,} bytes"


def _reason(message: str, debug: str | None) -> str:
    """GStreamer's sentence, with the detail that it hides on the last line of its debug text."""
    detail = (debug or "").strip().splitlines()[-1:]
    sentence = message.strip().rstrip(".")
    if not detail or detail[0].startswith("../") or detail[0].strip(" .") in sentence:
        return sentence
    return f"{sentence} ({detail[0].strip().rstrip('.')})"


def _file_fault(uri: SourceURI, code: tuple[str, int], reason: str, *, has_video: bool | None) -> KeepsightError:
    missing = truncation_of(uri)
    if missing is not None:
        return SourceUnreadableError(f"{uri} is truncated: {missing} are there.", fix="Copy or download it again.")
    if code == _WRONG_TYPE:
        return SourceUnreadableError(f"{uri} is not a video: {reason}.", fix=_PLAYABLE)
    if code == _NO_TYPE:
        return SourceUnreadableError(f"{uri} is nothing that GStreamer recognises: {reason}.", fix=_PLAYABLE)
    if code in _NO_DECODER:
        return _no_decoder(uri, reason)
    if code == _FAILED and has_video is False:
        return SourceUnreadableError(f"{uri} has no video in it, only sound or text.", fix=_PLAYABLE)
    return SourceUnreadableError(f"{uri} can't be read: {reason}.", fix="It may be damaged: try to play it elsewhere.")


def _rtsp_fault(uri: SourceURI, code: tuple[str, int], reason: str) -> KeepsightError:
    if code == _NOT_AUTHORIZED:
        how = "Write rtsp://user:password@host/path." if uri.password is None else "Check the user and the password."
        return RefusedError(f"{uri} refuses us: {reason}.", fix=how)
    if code == _NOT_FOUND:
        return SourceNotFoundError(f"{uri}: the camera answers, but has no such path: {reason}.", fix="Check the path.")
    if code in _OPENING:
        why = _connection_problem(uri) or reason
        return SourceNotFoundError(f"{uri} can't be reached: {why}.", fix="Check the host, the port and the network.")
    if code in _NO_ANSWER:
        return NoFrameError(f"{uri} does not answer: {reason}.", fix="Check that an RTSP server listens there.")
    if code in _NO_DECODER:
        return _no_decoder(uri, reason)
    return SourceUnreadableError(f"{uri} can't be played: {reason}.", fix="Try ?transport=udp or ?transport=tcp.")


def _http_fault(uri: SourceURI, code: tuple[str, int], reason: str, *, has_video: bool | None) -> KeepsightError:
    if code == _NOT_AUTHORIZED:
        how = "Write http://user:password@host/path." if uri.password is None else "Check the user and the password."
        return RefusedError(f"{uri} refuses us: {reason}.", fix=how)
    if code == _NOT_FOUND:
        return SourceNotFoundError(f"{uri}: the server answers, but has no such path: {reason}.", fix="Check the path.")
    # souphttpsrc says "Internal data stream error." of a server that is not there.
    if code == _FAILED or code in _OPENING or code in _NO_ANSWER:
        why = _connection_problem(uri)
        if why is not None:
            return SourceNotFoundError(f"{uri} can't be reached: {why}.", fix="Check the host, the port and the network.")
    return _file_fault(uri, code, reason, has_video=has_video)


def _no_decoder(uri: SourceURI, reason: str) -> SourceUnreadableError:
    # The reason ends with everything that is known of the stream; its type is what matters.
    kind = re.search(r"\b(?:video|image)/[\w-]+", reason)
    what = f"no decoder for {kind[0]} is installed" if kind else reason
    return SourceUnreadableError(f"{uri} can't be decoded here: {what}.", fix=_DECODERS)


def _connection_problem(uri: SourceURI) -> str | None:
    """Why a host can't be reached, in the system's words: GStreamer's "Generic error" is for everything."""
    address = urlsplit(uri.location)
    try:
        socket.create_connection((address.hostname or "", address.port or PORTS.get(address.scheme, 554)), timeout=2).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except ValueError as error:  # a port out of range
        return str(error)
    return None


def _camera_fault(uri: SourceURI, code: tuple[str, int], reason: str) -> KeepsightError:
    if code == _NOT_FOUND:
        return SourceNotFoundError(f"{uri} is not there: {reason}.", fix="See `keepsight sources`.")
    if code == _BUSY:
        return SourceUnreadableError(f"{uri} is in use: {reason}.", fix="Close the program that shows this camera.")
    if code in _OPENING:
        return SourceUnreadableError(f"{uri} can't be opened: {reason}.", fix="See `keepsight sources`.")
    return SourceUnreadableError(f"{uri} can't be read: {reason}.", fix="Try another ?width=..&height=..&fps=.. of it.")
