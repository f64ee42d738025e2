from __future__ import annotations

import traceback
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepsight.streams import SourceURI, UsageError

PARSED = [
    # a plain path, and one that looks like options or a fragment
    ("clips/a.mp4", "file", "clips/a.mp4", {}),
    ("a b#1?x=2.mp4", "file", "a b#1?x=2.mp4", {}),
    # file:// decodes percent signs and nothing else
    ("file:///tmp/a%20b.mp4", "file", "/tmp/a b.mp4", {}),
    ("file:///tmp/a#1.mp4", "file", "/tmp/a#1.mp4", {}),
    ("file://localhost/tmp/a.mp4", "file", "/tmp/a.mp4", {}),
    # a path object is a path, whatever it looks like
    (Path("test:/ball"), "file", "test:/ball", {}),
    # cameras
    ("/dev/video2", "v4l2", "/dev/video2", {}),
    ("v4l2:///dev/video0", "v4l2", "/dev/video0", {}),
    ("V4L2:///dev/video0?width=640&height=480", "v4l2", "/dev/video0", {"width": 640, "height": 480}),
    ("csi://1", "csi", "1", {}),
    # test patterns
    ("test://ball", "test", "ball", {}),
    ("test://checkers-8?fps=29.97&frames=3", "test", "checkers-8", {"fps": Fraction(2997, 100), "frames": 3}),
    # rtsp: our options go, the camera's stay
    ("rtsp://h:8554/a/b", "rtsp", "rtsp://h:8554/a/b", {}),
    ("rtsp://h/x?channel=1&latency=50&subtype=0", "rtsp", "rtsp://h/x?channel=1&subtype=0", {"latency": 50}),
    ("rtsps://h/x?transport=udp", "rtsp", "rtsps://h/x", {"transport": "udp"}),
    ("rtsp://[::1]:8554/x?flip=rotate-180", "rtsp", "rtsp://[::1]:8554/x", {"flip": "rotate-180"}),
    # rtp: where to listen
    ("rtp://@:1234", "rtp", "0.0.0.0:1234", {}),
    ("rtp://239.1.1.1:5004?encoding=h265&payload=98", "rtp", "239.1.1.1:5004", {"encoding": "h265", "payload": 98}),
    ("rtp://[::]:5004/?latency=0", "rtp", "[::]:5004", {"latency": 0}),
    # http: our options go, the server's stay
    ("http://h/a%20b.mp4?id=7&loop=0", "http", "http://h/a%20b.mp4?id=7", {"loop": 0}),
    ("https://h:8443/live.m3u8", "http", "https://h:8443/live.m3u8", {}),
    ("http://cam/mjpg?fps=5&live=1", "http", "http://cam/mjpg?fps=5", {"live": 1}),
    ("http://h?x=1", "http", "http://h/?x=1", {}),
    # options of files: after a '?' that only options follow
    ("clip.mp4?loop=3", "file", "clip.mp4", {"loop": 3}),
    ("clip.mp4?loop=3&flip=clockwise", "file", "clip.mp4", {"loop": 3, "flip": "clockwise"}),
    ("clip?loop=3&x=2.mp4", "file", "clip?loop=3&x=2.mp4", {}),
    ("file:///a%3Fb.mp4?loop=0", "file", "/a?b.mp4", {"loop": 0}),
    (Path("clip.mp4?loop=3"), "file", "clip.mp4?loop=3", {}),
]


@pytest.mark.parametrize(("text", "kind", "location", "options"), PARSED)
def test_a_source_is_parsed(text: str | Path, kind: str, location: str, options: dict[str, object]) -> None:
    uri = SourceURI.parse(text)
    assert (uri.kind, uri.location, dict(uri.options)) == (kind, location, options)


REFUSED = [
    ("", "empty"),
    ("  ", "empty"),
    ("webrtc://x", "not supported yet"),
    ("rtp://@", "no port to listen on"),
    ("rtp://h:port", "port of rtp"),
    ("rtp://h:0", "port of rtp"),
    ("rtp://@:5004/live", "port of rtp"),
    ("rtp://@:5004?encoding=vp8", "encoding=h264 or encoding=h265"),
    ("rtp://@:5004?payload=128", "not a payload type"),
    ("rtp://@:5004?transport=tcp", "rtp:// has no option 'transport'.*latency, encoding, payload, flip"),
    ("http://", "names no host"),
    ("http:///x.mp4", "names no host"),
    ("http://h:99999/x", "port of http"),
    ("http://h/x?live=yes", "live=0 or live=1"),
    ("rtsp://ann:se/cret@h/x", "port of rtsp.*%2F"),
    ("rtsp://h/x?flip=upside-down", "flip=rotate-180"),
    ("file:///a.mp4?width=3", "file:// has no option 'width'.*loop, flip"),
    ("clip.mp4?loop=-1", "loop=-1 is not a number"),
    ("csi://\u00b2", "not a camera"),
    ("csi://0?latency=5", "csi:// has no option 'latency'.*width, height, fps, flip"),
    ("file:///a%00b", "NUL"),
    ("test://ball?fps=1e99999999", "not a frame rate"),
    ("test://ball?width=" + "9" * 5000, "not a number"),
    ("gopher://x", "not a kind of source"),
    ("test://", "not a test pattern"),
    ("test://ball ! fakesink", "not a test pattern"),
    ("test://ball?size=3", "no option 'size'"),
    ("test://ball?width=0", "width=0"),
    ("test://ball?fps=1/0", "not a frame rate"),
    ("csi://front", "not a camera"),
    ("v4l2://sda/../x", "not a camera"),
    ("rtsp://", "names no host"),
    ("rtsp://u:p@/x", "names no host"),
    ("rtsp://h/x?transport=carrier-pigeon", "transport=tcp"),
    ("rtsp://h/x?latency=-1", "not a number"),
    ("file://", "names no file"),
    ("a\0b", "NUL"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED)
def test_a_bad_source_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SourceURI.parse(text)


PASSWORDS = [
    # what is typed, the user, the password
    ("rtsp://ann:secret@h/x", "ann", "secret"),
    ("rtsp://ann:p%40ss%2Fw@h/x", "ann", "p@ss/w"),
    ("rtsp://ann:se#cr?et@h/x", "ann", "se#cr?et"),
    ("rtsp://ann:a@b:c@h/x", "ann", "a@b:c"),
    ("rtsp://ann:@h/x", "ann", ""),
    ("rtsp://ann@h/x", "ann", None),
]


@pytest.mark.parametrize(("text", "user", "password"), PASSWORDS)
def test_a_password_is_read_and_never_shown(text: str, user: str, password: str | None) -> None:
    uri = SourceURI.parse(text)
    assert (uri.user, uri.password, uri.location) == (user, password, "rtsp://h/x")
    for shown in (str(uri), repr(uri), uri.redacted, uri.redact(f"Could not open {text} ({password})")):
        assert not password or password not in shown
        assert text.split("@h")[0].removeprefix("rtsp://ann:") not in shown or not password
    assert "ann" in uri.redacted


def test_the_option_text_of_a_camera_is_shown() -> None:
    assert str(SourceURI.parse("rtsp://a:b@h/x?channel=1")) == "rtsp://a:***@h/x?channel=1"


SHOWN = [
    # what is typed, what is shown
    ("http://ann:pw@h/x.mp4", "http://ann:***@h/x.mp4"),
    ("https://h/v.m3u8?token=abc&id=4", "https://h/v.m3u8?token=***&id=4"),
    ("https://h/v?X-Amz-Signature=ab%2Fc&X-Amz-Expires=60", "https://h/v?X-Amz-Signature=***&X-Amz-Expires=60"),
    ("http://h/v?tok%65n=abc", "http://h/v?tok%65n=***"),
    ("http://h/v?key=1&channel=1", "http://h/v?key=***&channel=1"),
    ("rtsp://h/user=admin_password=tlJwpbo6_channel=1", "rtsp://h/user=admin_password=***"),
    ("rtsp://h/x?user=ann&password=pw", "rtsp://h/x?user=ann&password=***"),
    ("v4l2:///dev/video0?width=640", "v4l2:///dev/video0?width=640"),
    ("clip.mp4?loop=2", "clip.mp4?loop=2"),
    ("http://h/keyframes?monkey=3", "http://h/keyframes?monkey=3"),
]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_what_is_named_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    uri = SourceURI.parse(text)
    assert str(uri) == uri.redacted == shown
    assert repr(uri) == f"SourceURI.parse({shown!r})"


def test_a_secret_goes_to_the_server_and_not_into_a_message() -> None:
    uri = SourceURI.parse("https://ann:p%40w@h/v?sig=a%2Bb&x=1")
    assert (uri.location, uri.user, uri.password) == ("https://h/v?sig=a%2Bb&x=1", "ann", "p@w")
    said = uri.redact("GET https://ann:p@w@h/v?sig=a%2Bb&x=1 failed: a+b is not the signature of p%40w; sig=zz")
    assert not [secret for secret in ("p@w", "p%40w", "a+b", "a%2Bb", "zz") if secret in said]


SCHEMES = ("", "file://", "test://", "v4l2://", "csi://", "rtsp://", "rtsps://", "rtp://", "http://", "https://", "srt://", "x://")
words = st.sampled_from(
    ["?", "&", "=", ":", "@", "/", "#", "%", "%00", "[::1]", "loop", "fps", "flip", "width", "latency", "payload", "live", "1",
     "30000/1001", "ball", "h", "/dev/video0", "\ud800", "\0", "\u00b2", "~", "token", "1e9"]
)  # fmt: skip
addresses = st.builds(str.__add__, st.sampled_from(SCHEMES), st.one_of(st.text(), st.lists(words, max_size=12).map("".join)))


@given(addresses)
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    try:
        uri = SourceURI.parse(text)
    except UsageError as error:
        assert "\n" not in error.message or "\n" in text
    else:
        assert str(uri) == uri.redacted and SourceURI.parse(text) == uri


# Letters that no address has otherwise, so that a find is a leak.
secret_texts = st.text("QZ0123456789!$*+,;:#?%QZ", min_size=1, max_size=12).map(lambda text: f"QZ{text}ZQ")
hosts = st.sampled_from(["h", "10.0.0.5", "h:8554", "h:port", "", "[::1]:8554", "ball", "0", "h h"])
queries = st.sampled_from(["", "?latency=5", "?latency=x", "?fps=0", "?width=2", "?nope=1", "?transport=udp", "?loop=1"])


@given(st.sampled_from(SCHEMES[2:]), secret_texts, hosts, queries)
def test_a_password_is_in_no_text_that_anybody_sees(scheme: str, secret: str, host: str, query: str) -> None:
    assert secret not in everything_shown(f"{scheme}ann:{secret}@{host}/x{query}", secret)


@given(
    st.sampled_from(["rtsp://", "http://", "https://", "test://", "rtp://", "csi://", "v4l2://", "file://"]),
    st.sampled_from(["token", "access_token", "Key", "api-key", "password", "pwd", "sig", "X-Signature", "auth", "p%61ssword"]),
    secret_texts.map(lambda text: quote(text, safe="")),
    hosts,
)
def test_a_secret_item_is_in_no_text_that_anybody_sees(scheme: str, name: str, secret: str, host: str) -> None:
    for text in (f"{scheme}{host}/x?a=1&{name}={secret}&b=2", f"{scheme}{host}?{name}={secret}"):
        assert secret not in everything_shown(text, secret)


def everything_shown(text: str, secret: str) -> str:
    try:
        uri = SourceURI.parse(text)
    except UsageError as error:
        return "".join(traceback.format_exception(error))
    return "\n".join((str(uri), repr(uri), uri.redact(f"Could not open {text} because of {secret} or {unquote(secret)}")))
