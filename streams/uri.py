"""What a user types for a source, parsed: the spelling of jetson-utils."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args
from urllib.parse import unquote

from keepsight.streams.errors import UsageError

__all__ = ["SourceURI"]

Kind = Literal["file", "test", "v4l2", "rtsp", "csi"]
Option = int | str | Fraction

SPELLINGS = (
    "a path, file:///path, a directory of images, a .npy of frames, test://ball, v4l2:///dev/video0 or /dev/video0, "
    "csi://0, rtsp://user:password@host/path"
)
_PLANNED = ("rtp", "webrtc", "http", "https", "rtmp", "srt", "udp")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*):[^\s/]*@")


@dataclass(frozen=True, slots=True)
class SourceURI:
    """The address of a source.

    `str()` and `repr()` never show a password.

    Attributes:
        kind: which family of sources.
        location: a path (`file`), a pattern (`test`), a device (`v4l2`), a sensor number (`csi`), or the address
            without credentials and without our own options (`rtsp`).
        user: for `rtsp`, the decoded user name.
        password: for `rtsp`, the decoded password.
        options: what stood behind `?`: `width`, `height`, `fps` for `test`, `v4l2` and `csi`; `frames` for `test`;
            `latency` (ms) and `transport` (`tcp` or `udp`) for `rtsp`, whose other options go to the camera.

    >>> SourceURI.parse("rtsp://ann:secret@10.0.0.5/door?latency=50").redacted
    'rtsp://ann:***@10.0.0.5/door?latency=50'
    """

    kind: Kind
    location: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, Option] = field(default_factory=dict)
    redacted: str = field(default="", compare=False)
    secrets: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def parse(cls, source: str | os.PathLike[str]) -> SourceURI:
        """Read a source's address.

        Args:
            source: text as a user types it, or a path object, which is always a path.

        Raises:
            UsageError: empty, a scheme we don't know or don't support yet, a bad option.
        """
        if isinstance(source, os.PathLike):
            return _file(os.fspath(source))
        if not source.strip():
            raise UsageError("the source is empty.", fix=f"Name one: {SPELLINGS}.")
        if "\0" in source:
            raise UsageError("the source has a NUL character in it.", fix=f"Name one: {SPELLINGS}.")
        match = _SCHEME.match(source)
        if match is None:
            return _v4l2(source) if source.startswith("/dev/video") else _file(os.path.expanduser(source))
        scheme, rest = match[1].lower(), match[2]
        parser = _PARSERS.get(scheme)
        if parser is None:
            raise _unknown_scheme(scheme)
        return parser(rest) if scheme != "rtsps" else _rtsp(rest, scheme="rtsps")

    @property
    def is_camera(self) -> bool:
        """Whether the world goes on while nobody looks: everything but files."""
        return self.kind != "file"

    def redact(self, text: str) -> str:
        """The same text with this source's password, and any `user:password@`, hidden."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return _CREDENTIALS.sub(r"\1:***@", text)

    def __str__(self) -> str:
        return self.redacted


def _unknown_scheme(scheme: str) -> UsageError:
    why = "is not supported yet" if scheme in _PLANNED else "is not a kind of source"
    return UsageError(f"{scheme}:// {why}.", fix=f"Sources are {SPELLINGS}.")


def _file(path: str) -> SourceURI:
    return SourceURI("file", path, redacted=path)


def _file_url(rest: str) -> SourceURI:
    # Only percent signs are decoded: users write file:///a#1.mp4 and mean that file.
    path = unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    if not path:
        raise UsageError("file:// names no file.", fix="Write file:///path/to/video.mp4.")
    return _file(path)


def _test(rest: str) -> SourceURI:
    pattern, options = _split_options("test", rest, width=_count, height=_count, fps=_rate, frames=_count)
    if not re.fullmatch(r"[a-z0-9-]+", pattern):
        raise UsageError(f"test://{pattern} is not a test pattern.", fix="Write test://ball or test://smpte.")
    return SourceURI("test", pattern, options=options, redacted=f"test://{rest}")


def _v4l2(rest: str) -> SourceURI:
    device, options = _split_options("v4l2", rest, width=_count, height=_count, fps=_rate)
    device = f"/dev/video{device}" if device.isdigit() else device
    if not device.startswith("/dev/"):
        raise UsageError(f"v4l2://{device} is not a camera.", fix="Write v4l2:///dev/video0.")
    return SourceURI("v4l2", device, options=options, redacted=f"v4l2://{device}")


def _csi(rest: str) -> SourceURI:
    sensor, options = _split_options("csi", rest, width=_count, height=_count, fps=_rate)
    if not sensor.isdigit():
        raise UsageError(f"csi://{sensor} is not a camera.", fix="Write csi://0 for the board's first camera.")
    return SourceURI("csi", sensor, options=options, redacted=f"csi://{rest}")


def _rtsp(rest: str, *, scheme: str = "rtsp") -> SourceURI:
    # By hand, not with urllib: passwords hold '#', '?' and ':' that a strict parser would cut at. The last '@'
    # before the first '/' ends the credentials.
    authority, slash, path = rest.partition("/")
    credentials, at, host = authority.rpartition("@")
    if not host:
        raise UsageError(f"{scheme}:// names no host.", fix="Write rtsp://user:password@host/path.")
    address, options = _split_options(
        "rtsp", host + slash + path, keep_others=True, latency=_number, transport=_transport
    )
    user, colon, password = credentials.partition(":")
    hidden = f"{user}:***@" if colon else credentials + at
    secrets = {password, unquote(password)} - {""}
    return SourceURI(
        "rtsp",
        f"{scheme}://{address}",
        user=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        options=options,
        redacted=f"{scheme}://{hidden}{host}{slash}{path}",
        secrets=tuple(sorted(secrets, key=len, reverse=True)),
    )


_PARSERS: Mapping[str, Callable[[str], SourceURI]] = {
    "file": _file_url,
    "test": _test,
    "v4l2": _v4l2,
    "csi": _csi,
    "rtsp": _rtsp,
    "rtsps": _rtsp,
}
assert set(get_args(Kind)) <= set(_PARSERS)


def _split_options(
    kind: str, rest: str, *, keep_others: bool = False, **readers: Callable[[str, str], Option]
) -> tuple[str, dict[str, Option]]:
    """Cut our options off an address; with `keep_others` the rest of the query stays in it."""
    address, _, query = rest.partition("?")
    options: dict[str, Option] = {}
    others = []
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name in readers:
            options[name] = readers[name](name, value)
        elif keep_others:
            others.append(item)
        else:
            raise UsageError(f"{kind}:// has no option {name!r}.", fix=f"Options are {', '.join(readers)}.")
    return address + ("?" + "&".join(others) if others else ""), options


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{name}={text} is not a number.", fix=f"Write {name}=100, a whole number of 0 or more.")
    return int(text)


def _count(name: str, text: str) -> int:
    value = _number(name, text)
    if value == 0:
        raise UsageError(f"{name}=0 makes no sense.", fix="Write a whole number of 1 or more.")
    return value


def _rate(name: str, text: str) -> Fraction:
    try:
        value = Fraction(text).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise UsageError(f"{name}={text} is not a frame rate.", fix="Write fps=30 or fps=30000/1001.")
    return value


def _transport(name: str, text: str) -> str:
    if text not in ("tcp", "udp"):
        raise UsageError(f"{name}={text} is not known.", fix="Write transport=tcp or transport=udp.")
    return text
