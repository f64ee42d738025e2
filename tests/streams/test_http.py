"""A file on a server: played, not there, not a video, nobody there."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from keepsight.streams import Source, SourceNotFoundError, SourceUnreadableError
from keepsight.streams.gst import has_element

pytestmark = pytest.mark.skipif("not has_element('souphttpsrc')", reason="GStreamer has no HTTP client here")
assert has_element  # for the condition above


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path, numbered: Path) -> Iterator[str]:
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_on_a_server_gives_every_frame(served: str) -> None:
    frames = list(Source(f"{served}/numbered.mp4", size=(64, 48)))
    assert len(frames) == 60 and frames[-1].time_s == pytest.approx(59 / 30, abs=0.005)
    assert not Source(f"{served}/numbered.mp4").is_live


def test_what_a_server_does_not_have(served: str) -> None:
    with pytest.raises(SourceNotFoundError, match="the server says 404"):
        list(Source(f"{served}/none.mp4"))


def test_text_on_a_server(served: str) -> None:
    with pytest.raises(SourceUnreadableError, match="not a video"):
        list(Source(f"{served}/text.mp4"))


def test_no_server() -> None:
    with pytest.raises(SourceNotFoundError, match="refused"):
        list(Source("http://127.0.0.1:9/a.mp4"))
