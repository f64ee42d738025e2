from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

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
]


@pytest.mark.parametrize(("text", "kind", "location", "options"), PARSED)
def test_a_source_is_parsed(text: str | Path, kind: str, location: str, options: dict[str, object]) -> None:
    uri = SourceURI.parse(text)
    assert (uri.kind, uri.location, dict(uri.options)) == (kind, location, options)


REFUSED = [
    ("", "empty"),
    ("  ", "empty"),
    ("webrtc://x", "not supported yet"),
    ("rtp://@:1234", "not supported yet"),
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
