"""Files, HLS and an MJPEG camera over HTTP, from a real server on 127.0.0.1, and what is told when they are not there."""

from __future__ import annotations

import base64
import functools
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from keepsight.streams import Source, SourceLostError, SourceNotFoundError, SourceUnreadableError

if TYPE_CHECKING:
    from conftest import GstRun

SMALL = (64, 48)
SECRET = "tops3cret"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A folder's files; /locked/* for ann alone; /camera an endless MJPEG stream of ten pictures."""

    jpeg: bytes = b""

    def do_GET(self) -> None:
        if self.path.startswith("/camera"):
            self._camera()
        elif self.path.startswith("/locked/"):
            known = "Basic " + base64.b64encode(f"ann:{SECRET}".encode()).decode()
            if self.headers.get("Authorization") != known:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="x"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.path = self.path.removeprefix("/locked")
            super().do_GET()
        else:
            super().do_GET()

    def _camera(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=part")
        self.end_headers()
        for _ in range(10):
            head = f"--part\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + self.jpeg + b"\r\n")
            threading.Event().wait(0.05)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(media: Path, gst_run: GstRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("www")
    for name in ("plain.mp4", "fast.mp4"):
        (folder / name).write_bytes((media / name).read_bytes())
    fast = (media / "fast.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(fast[: len(fast) // 2])
    (folder / "text.mp4").write_text("not a video\n" * 200)
    picture = "videotestsrc pattern=ball num-buffers=50 ! video/x-raw,format=I420,width=160,height=120,framerate=25/1"
    for part in ("a.ts", "b.ts"):
        coder = "x264enc speed-preset=ultrafast key-int-max=25 ! h264parse"
        gst_run(f"{picture} ! {coder} ! mpegtsmux ! filesink name=out", folder / part)
    (folder / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n"
        "#EXTINF:2.0,\na.ts\n#EXT-X-DISCONTINUITY\n#EXTINF:2.0,\nb.ts\n#EXT-X-ENDLIST\n"
    )
    gst_run(f"{picture} ! identity eos-after=2 ! jpegenc ! filesink name=out", folder / "one.jpg")
    Handler.jpeg = (folder / "one.jpg").read_bytes()
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


@pytest.mark.parametrize("name", ["plain.mp4", "fast.mp4?id=4", "list.m3u8"])
def test_a_file_on_a_server_gives_every_frame(server: str, name: str) -> None:
    frames = list(Source(f"{server}/{name}", size=SMALL))
    assert len(frames) == 100 and frames[0].image.max() > 200


def test_an_mjpeg_camera_is_live_and_its_end_is_a_loss(server: str) -> None:
    with Source(f"{server}/camera?live=1", size=SMALL) as source:
        assert source.is_live
        with pytest.raises(SourceLostError, match="is lost"):
            frames = [next(source)]
            while True:
                frames.append(next(source))
    assert len(frames) + source.dropped >= 5 and frames[0].image.shape == (48, 64, 3)


def test_a_password_opens_a_locked_file(server: str) -> None:
    locked = server.replace("http://", f"http://ann:{SECRET}@") + "/locked/plain.mp4"
    assert next(Source(locked, size=SMALL)).image.shape == (48, 64, 3)
    for url in (f"{server}/locked/plain.mp4", locked.replace(SECRET, "wr0ng-one")):
        with pytest.raises(SourceUnreadableError, match="refuses us") as caught:
            next(Source(url))
        assert "wr0ng-one" not in str(caught.value)


BAD = [
    ("nope.mp4?token=tops3cret", SourceNotFoundError, "no such path"),
    ("text.mp4", SourceUnreadableError, "is not a video"),
]


@pytest.mark.parametrize(("path", "error", "says"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_address_is_one_clear_line(server: str, path: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        list(Source(f"{server}/{path}", size=SMALL))
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_off_on_a_server_is_told_after_its_frames(server: str) -> None:
    source, count = Source(f"{server}/half.mp4", size=SMALL), 0
    with pytest.raises(SourceUnreadableError, match="truncated"):
        for _ in source:
            count += 1
    assert 30 < count < 70


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SourceNotFoundError, match="can't be reached: connection refused"):
        next(Source(f"http://127.0.0.1:{port}/x.mp4?key=tops3cret"))


def test_an_unknown_host() -> None:
    with pytest.raises(SourceNotFoundError, match="can't be reached") as caught:
        next(Source(f"http://ann:{SECRET}@no-such-host.invalid/x"))
    assert SECRET not in str(caught.value)
