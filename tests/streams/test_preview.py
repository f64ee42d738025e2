"""MJPEG over HTTP beside the frames: what is shown, to how many, and that nobody waits for it."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import LiveSource, Source, UsageError
from keepsight.streams.preview import Preview, parse_address


@pytest.fixture
def preview() -> Iterator[Preview]:
    with Preview(width=160, fps=10, quality=95, max_clients=2) as server:
        yield server


def get(preview: Preview, path: str, **headers: str) -> http.client.HTTPResponse:
    client = http.client.HTTPConnection("127.0.0.1", preview.port, timeout=10)
    client.request("GET", path, headers=headers)
    return client.getresponse()


def parts(stream: http.client.HTTPResponse, count: int) -> list[bytes]:
    """JPEGs of a multipart stream, cut as a browser does: by the length that stands before each."""
    found = []
    for _ in range(count):
        length = 0
        while (line := stream.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        found.append(stream.read(length))
        assert stream.readline() == b"\r\n"
    return found


def shown(jpeg: bytes, folder: Path) -> np.ndarray:
    (folder / "part.jpg").write_bytes(jpeg)
    return next(Source(folder / "part.jpg")).image


def test_what_the_camera_sees_is_shown_in_its_shape_and_at_the_rate_asked(preview: Preview, tmp_path: Path) -> None:
    with LiveSource("test://smpte?width=640&height=360&fps=30", size=(64, 36), branches=(preview.branch("door"),)) as source:
        frame = next(source)
        stream = get(preview, "/stream/door")
        assert stream.getheader("Content-Type") == "multipart/x-mixed-replace; boundary=keepsight"
        parts(stream, 3)
        begun = time.monotonic()
        pictures = parts(stream, 15)
        rate = 15 / (time.monotonic() - begun)
        stream.close()
        page = get(preview, "/").read().decode()
        single = get(preview, "/picture/door").read()
    assert rate < 12
    for jpeg in (pictures[-1], single):
        image = shown(jpeg, tmp_path)
        assert image.shape == (90, 160, 3)
        bars = image[20, 10::23][:7].astype(int), frame.image[8, 4::9][:7].astype(int)
        assert np.abs(bars[0] - bars[1]).mean() < 12  # the seven bars of the test pattern, by colour
    assert '<img src="/stream/door"' in page and "http" not in page.replace("http-equiv", "")


def test_nothing_is_encoded_while_nobody_looks_on(preview: Preview) -> None:
    branch = preview.branch()
    encoded: list[int] = []

    def setup(pipeline: object) -> None:
        assert branch.setup is not None
        branch.setup(pipeline)
        sink = pipeline.get_by_name("preview-pictures")  # type: ignore[attr-defined]
        sink.connect("new-sample", lambda sink: encoded.append(1) or 0)

    watched = type(branch)(branch.point, branch.launch, branch.elements, setup)
    with LiveSource("test://ball?fps=30", size=(32, 32), branches=(watched,)) as source:
        wait(source, lambda: source.arrivals is not None and source.arrivals.count > 30)
        assert not encoded
        stream = get(preview, "/stream/camera")
        parts(stream, 2)
        stream.close()
        # It notices with the next picture or two that nobody is there any more.
        wait(source, lambda: quiet(encoded, source))


def quiet(encoded: list[int], source: LiveSource) -> bool:
    before = len(encoded)
    begun = time.monotonic()
    while time.monotonic() - begun < 0.6:
        source.latest(0.1)
    return len(encoded) == before


def wait(source: LiveSource, until: Callable[[], bool], timeout_s: float = 20.0) -> None:
    begun = time.monotonic()
    while not until():
        assert time.monotonic() - begun < timeout_s
        source.latest(0.2)


def test_a_client_that_reads_nothing_delays_neither_the_frames_nor_the_other(preview: Preview) -> None:
    uri = "test://snow?width=640&height=480&fps=30"
    with LiveSource(uri, size=(32, 32), branches=(preview.branch(),)) as source:
        next(source)
        asleep = socket.create_connection(("127.0.0.1", preview.port))
        asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asleep.sendall(b"GET /stream/camera HTTP/1.1\r\nHost: localhost\r\n\r\n")
        other = get(preview, "/stream/camera")
        ages = []
        for _ in range(3):
            parts(other, 5)
            frame = source.latest(5.0)
            assert frame is not None
            ages.append(frame.age_ms)
        busy = get(preview, "/stream/camera")  # a third one
        assert busy.status == 503
        begun = time.monotonic()
        preview.close()
        assert time.monotonic() - begun < 5
        other.close()
        asleep.close()
    assert min(ages) < 500 and source.generation == 1 and not [event for event in source.events if event.state == "stalled"]


def test_it_goes_on_with_the_next_connection_of_a_camera(preview: Preview) -> None:
    with LiveSource("test://ball?fps=30&frames=40", size=(32, 32), branches=(preview.branch(),)) as source:
        next(source)
        stream = get(preview, "/stream/camera")
        wait(source, lambda: source.generation >= 1 and source.state == "live")
        assert len(parts(stream, 20)) == 20  # more than what one connection had
        stream.close()


def test_strangers_are_turned_away(preview: Preview) -> None:
    assert not preview.is_public and preview.host == "127.0.0.1"
    assert get(preview, "/", Host="evil.example").status == 403  # a name that was made to point here
    assert get(preview, "/", Host=f"localhost:{preview.port}").status == 200
    assert get(preview, "/stream/other").status == get(preview, "/../etc/passwd").status == 404
    with pytest.raises(UsageError, match="can't listen"):
        Preview(preview.port)


def test_addresses() -> None:
    assert parse_address("8080") == ("127.0.0.1", 8080)
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80) and parse_address("[::1]:80") == ("::1", 80)
    for text in ("x", "1.2.3.4", "99999", ""):
        with pytest.raises(UsageError, match="no port"):
            parse_address(text)
    with pytest.raises(UsageError, match="fps=0"):
        Preview(fps=0)
