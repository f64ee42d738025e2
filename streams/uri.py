"""What a user types for a source, parsed: the spelling of jetson-utils."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args
from urllib.parse import unquote, unquote_plus

from keepsight.streams.errors import UsageError
from keepsight.streams.redaction import is_secret_name, redacted_text

__all__ = ["Flip", "Option", "SourceURI"]

Kind = Literal["file", "test", "v4l2", "rtsp", "rtp", "http", "csi", "appsrc"]
Option = int | str | Fraction

Flip = Literal[
    "none", "counterclockwise", "rotate-180", "clockwise", "horizontal", "vertical", "upper-right-diagonal", "upper-left-diagonal"
]
"""How pictures are turned or mirrored, in jetson-utils' names: `horizontal` swaps left and right, `vertical` up and down; the
diagonals mirror at the one that ends in that corner."""

SPELLINGS = (
    "a path, file:///path, a directory of images, a .npy of frames, test://ball, v4l2:///dev/video0 or /dev/video0, "
    "csi://0, rtsp://user:password@host/path, rtp://@:1234, http://host/video.mp4"
)
_PLANNED = ("webrtc", "rtmp", "srt", "udp")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$", re.DOTALL)
_PORT_LIMIT = 65535


@dataclass(frozen=True, slots=True, repr=False)
class SourceURI:
    """The address of a source.

    `str()` and `repr()` never show a password, nor the value of an item of the query that is named like a secret (`token`,
    `key`, `sig`...).

    Attributes:
        kind: which family of sources.
        location: a path (`file`), a pattern (`test`), a device (`v4l2`), a sensor number (`csi`), the address and port to listen
            on (`rtp`), or the address without user and password and without our own options (`rtsp`, `http`).
        user: for `rtsp` and `http`, the decoded user name.
        password: for `rtsp` and `http`, the decoded password.
        options: what stood behind `?`, of these:

            - all kinds: `flip`, one of `Flip`.
            - `test`, `v4l2`, `csi`: `width`, `height`, `fps` of the capture.
            - `test`: `frames`, how many there are.
            - `v4l2`: `encoding`, `raw`, `mjpeg` or `h264`, for a camera that has more than one of them.
            - `file`, `http`: `loop`, how many times it is played, 0 for ever.
            - `http`: `live=1` for a camera, whose newest picture is wanted and whose end is a loss. Otherwise it is a file.
            - `rtsp`: `latency` (ms), `transport` (`tcp` or `udp`) and `encoding` (`h264`, `h265` or `mjpeg`), which saves finding
              it out and, on a Jetson, a copy in device memory.
            - `rtp`: `latency` (ms), `encoding` (`h264` or `h265`) and `payload` (the payload type, 96 by default).

            Other items of an `rtsp` or `http` query go to the server.

    >>> SourceURI.parse("rtsp://ann:secret@10.0.0.5/door?latency=50").redacted
    'rtsp://ann:***@10.0.0.5/door?latency=50'
    """

    kind: Kind
    location: str
    user: str | None = None
    password: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    redacted: str = field(default="", compare=False)
    secrets: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(cls, source: str | os.PathLike[str]) -> SourceURI:
        """Read a source's address.

        Args:
            source: text as a user types it, or a path object, which is always a path.

        Raises:
            UsageError: empty, a scheme we don't know or don't support yet, a bad option; it names the part.
        """
        if isinstance(source, os.PathLike):
            return _file(os.fspath(source))
        if not source.strip():
            raise UsageError("the source is empty.", fix=f"Name one: {SPELLINGS}.")
        if "\0" in source:
            raise UsageError("the source has a NUL character in it.", fix=f"Name one: {SPELLINGS}.")
        match = _SCHEME.match(source)
        try:
            if match is None:
                return _v4l2(source) if source.startswith("/dev/video") else _path(source)
            scheme, rest = match[1].lower(), match[2]
            if scheme not in _PARSERS:
                raise _unknown_scheme(scheme)
            if scheme != "file" and not _is_text(rest):
                raise UsageError(f"{scheme}:// has characters in it that can't be sent.", fix="Write them as %XX.")
            return _PARSERS[scheme](rest)
        except UsageError as error:  # its text has parts of the address in it
            raise UsageError(redacted_text(error.message), fix=redacted_text(error.fix or "")) from None

    @property
    def is_camera(self) -> bool:
        """Whether the world goes on while nobody looks: everything but files, which may lie on a server."""
        return self.kind != "file" and not (self.kind == "http" and not self.options.get("live"))

    def redact(self, text: str) -> str:
        """The same text with this source's secrets, any `user:password@` and any secret item of a query hidden."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return redacted_text(text)

    def __str__(self) -> str:
        return self.redacted

    def __repr__(self) -> str:
        return f"SourceURI.parse({self.redacted!r})"


def _unknown_scheme(scheme: str) -> UsageError:
    why = "is not supported yet" if scheme in _PLANNED else "is not a kind of source"
    return UsageError(f"{scheme}:// {why}.", fix=f"Sources are {SPELLINGS}.")


def _file(path: str | bytes, options: Mapping[str, Option] | None = None) -> SourceURI:
    path = os.fsdecode(path)
    if "\0" in path:
        raise UsageError("the source has a NUL character in it.", fix=f"Name one: {SPELLINGS}.")
    return SourceURI("file", path, options=options or {}, redacted=path + _shown(options or {}))


def _path(text: str) -> SourceURI:
    # A '?' is a good character of a file's name, so it only begins options if nothing but options follows it.
    path, mark, query = text.rpartition("?")
    names = [item.partition("=")[0] for item in query.split("&") if "=" in item]
    if not (mark and path and names and len(names) == len(query.split("&")) and set(names) <= set(_OPTIONS["file"])):
        return _file(_expanded(text))
    _, options = _split_options("file", text)
    return _file(_expanded(path), options)


def _expanded(path: str) -> str:
    try:
        return os.path.expanduser(path)
    except (ValueError, UnicodeError):  # no user has such a name
        return path


def _file_url(rest: str) -> SourceURI:
    # Only percent signs are decoded: users write file:///a#1.mp4 and mean that file.
    address, options = _split_options("file", rest)
    path = unquote(address.removeprefix("localhost") if address.startswith("localhost/") else address)
    if not path:
        raise UsageError("file:// names no file.", fix="Write file:///path/to/video.mp4.")
    return _file(path, options)


def _test(rest: str) -> SourceURI:
    pattern, options = _split_options("test", rest)
    if not re.fullmatch(r"[a-z0-9-]+", pattern):
        raise UsageError(f"test://{pattern} is not a test pattern.", fix="Write test://ball or test://smpte.")
    return SourceURI("test", pattern, options=options, redacted=f"test://{rest}")


def _v4l2(rest: str) -> SourceURI:
    device, options = _split_options("v4l2", rest)
    device = f"/dev/video{device}" if _is_number(device) else device
    if not device.startswith("/dev/") or "\0" in device:
        raise UsageError(f"v4l2://{device} is not a camera.", fix="Write v4l2:///dev/video0.")
    return SourceURI("v4l2", device, options=options, redacted=f"v4l2://{device}{_shown(options)}")


def _csi(rest: str) -> SourceURI:
    sensor, options = _split_options("csi", rest)
    if not _is_number(sensor):
        raise UsageError(f"csi://{sensor} is not a camera.", fix="Write csi://0 for the board's first camera.")
    return SourceURI("csi", sensor, options=options, redacted=f"csi://{rest}")


def _rtp(rest: str) -> SourceURI:
    address, options = _split_options("rtp", rest)
    host, colon, port = address.removesuffix("/").removeprefix("@").rpartition(":")
    if not colon or "@" in host or not re.fullmatch(r"[\w.-]*|\[[0-9A-Fa-f:.]+\]", host):
        raise UsageError(
            "rtp:// names no port to listen on.", fix="Write rtp://@:1234, or rtp://239.1.1.1:1234 for a multicast group."
        )
    _check_port("rtp", port)
    return SourceURI("rtp", f"{host or '0.0.0.0'}:{port}", options=options, redacted=f"rtp://{rest}")


def _server(scheme: str, kind: Literal["rtsp", "http"]) -> Callable[[str], SourceURI]:
    return lambda rest: _on_server(scheme, kind, rest)


def _on_server(scheme: str, kind: Literal["rtsp", "http"], rest: str) -> SourceURI:
    # By hand, not with urllib: passwords hold '#', '?' and ':' that a strict parser would cut at. The last '@'
    # before the first '/' ends the credentials.
    authority, slash, path = rest.partition("/")
    credentials, at, host = authority.rpartition("@")
    if not at and not slash and "?" in host:  # http://host?x=1
        host, mark, query = host.partition("?")
        slash, path = "/", mark + query
    user, colon, password = credentials.partition(":")
    _check_host(scheme, host)
    path, _, query = path.partition("?")
    options, sent, shown, hidden = _split_server_query(kind, query)
    secrets = {password, unquote(password), *hidden, *map(unquote, hidden), *map(unquote_plus, hidden)} - {""}
    return SourceURI(
        kind,
        f"{scheme}://{host}{slash}{path}{sent}",
        user=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        options=options,
        redacted=f"{scheme}://{f'{user}:***@' if colon else credentials + at}{redacted_text(host + slash + path)}{shown}",
        secrets=tuple(sorted(secrets, key=len, reverse=True)),
    )


def _check_host(scheme: str, host: str) -> None:
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    name = name if colon else host
    if not name:
        raise UsageError(f"{scheme}:// names no host.", fix=f"Write {scheme}://user:password@host/path.")
    if not re.fullmatch(r"[^\s/?#@:\[\]\\\0]+|\[[0-9A-Fa-f:.%\w]+\]", name):
        raise UsageError(
            f"{scheme}:// has no host that could be read.", fix=f"Write {scheme}://user:password@host/path, '@' in a name as %40."
        )
    if colon:
        _check_port(scheme, port)


def _check_port(scheme: str, port: str) -> None:
    # It is not shown: where a '/' stands in a password unescaped, it is the beginning of that.
    if not (_is_number(port) and 0 < int(port) <= _PORT_LIMIT):
        raise UsageError(
            f"the port of {scheme}:// is not a number from 1 to {_PORT_LIMIT}.",
            fix="Write host:port. If it is part of a password, write a '/' in that as %2F and a '@' as %40.",
        )


def _split_options(kind: Kind, rest: str) -> tuple[str, dict[str, Option]]:
    """Cut the options off an address."""
    address, _, query = rest.partition("?")
    readers = _OPTIONS[kind]
    options: dict[str, Option] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name not in readers:
            how = f"Options are {', '.join(readers)}."
            how += " A '?' in a file's name is written %3F." if kind == "file" else ""
            raise UsageError(f"{kind}:// has no option {name[:40]!r}.", fix=how)
        options[name] = readers[name](name, value)
    return address, options


def _split_server_query(kind: Kind, query: str) -> tuple[dict[str, Option], str, str, tuple[str, ...]]:
    """Our options out of a query, the query for the server without them, all of it to be shown, and the secrets in it."""
    options: dict[str, Option] = {}
    sent, shown, secrets = [], [], []
    for item in filter(None, query.split("&")):
        name, equals, value = item.partition("=")
        if name in _OPTIONS[kind]:
            options[name] = _OPTIONS[kind][name](name, value)
        else:
            sent.append(item)
        hide = equals and is_secret_name(unquote_plus(name))
        secrets += [value] if hide else []
        shown.append(f"{name}=***" if hide else redacted_text(item))
    return options, _query(sent), _query(shown), tuple(secrets)


def _query(items: Sequence[str]) -> str:
    return "?" + "&".join(items) if items else ""


def _shown(options: Mapping[str, Option]) -> str:
    return _query([f"{name}={value}" for name, value in options.items()])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _number(name: str, text: str) -> int:
    if not _is_number(text):
        raise UsageError(f"{name}={text} is not a number.", fix=f"Write {name}=100, a whole number of 0 or more.")
    return int(text)


def _count(name: str, text: str) -> int:
    value = _number(name, text)
    if value == 0:
        raise UsageError(f"{name}=0 makes no sense.", fix="Write a whole number of 1 or more.")
    return value


def _rate(name: str, text: str) -> Fraction:
    # What Fraction() takes besides could be a number of a million digits.
    good = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?|[0-9]{1,6}/[0-9]{1,6}", text)
    try:
        value = Fraction(text).limit_denominator(1001) if good else Fraction(0)
    except ZeroDivisionError:
        value = Fraction(0)
    if value <= 0:
        raise UsageError(f"{name}={text} is not a frame rate.", fix="Write fps=30 or fps=30000/1001.")
    return value


def _payload(name: str, text: str) -> int:
    value = _number(name, text)
    if value > 127:
        raise UsageError(f"{name}={text} is not a payload type.", fix="Write a number up to 127; 96 is usual.")
    return value


def _one_of(*known: str) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        if text not in known:
            raise UsageError(f"{name}={text} is not known.", fix=f"Write {' or '.join(f'{name}={word}' for word in known)}.")
        return text

    return read


def _switch(name: str, text: str) -> int:
    return int(_one_of("0", "1")(name, text))


_CAPTURE: Mapping[str, Callable[[str, str], Option]] = {"width": _count, "height": _count, "fps": _rate}
_FLIP: Mapping[str, Callable[[str, str], Option]] = {"flip": _one_of(*get_args(Flip))}

_OPTIONS: Mapping[Kind, Mapping[str, Callable[[str, str], Option]]] = {
    "file": {"loop": _number, **_FLIP},
    "test": {**_CAPTURE, "frames": _count, **_FLIP},
    "v4l2": {**_CAPTURE, "encoding": _one_of("raw", "mjpeg", "h264"), **_FLIP},
    "csi": {**_CAPTURE, **_FLIP},
    "rtsp": {
        "latency": _number,
        "transport": _one_of("tcp", "udp"),
        "encoding": _one_of("h264", "h265", "mjpeg"),
        **_FLIP,
    },
    "rtp": {"latency": _number, "encoding": _one_of("h264", "h265"), "payload": _payload, **_FLIP},
    "http": {"live": _switch, "loop": _number, **_FLIP},
}

def _appsrc(rest: str) -> SourceURI:
    raise UsageError("appsrc:// is fed by a program.", fix="In Python, push frames into a keepsight.streams.PushSource.")


_PARSERS: Mapping[str, Callable[[str], SourceURI]] = {
    "appsrc": _appsrc,
    "file": _file_url,
    "test": _test,
    "v4l2": _v4l2,
    "csi": _csi,
    "rtsp": _server("rtsp", "rtsp"),
    "rtsps": _server("rtsps", "rtsp"),
    "rtp": _rtp,
    "http": _server("http", "http"),
    "https": _server("https", "http"),
}
assert set(get_args(Kind)) - {"appsrc"} == set(_OPTIONS)
