"""Watch what a camera sees in a browser: MJPEG over HTTP, from the pictures that were decoded anyway."""

from __future__ import annotations

import html
import ipaddress
import threading
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_SNDBUF, SOL_SOCKET, socket
from typing import Any

from keepsight.streams.branches import Branch
from keepsight.streams.errors import UsageError
from keepsight.streams.gst import load_gst

__all__ = ["Preview", "parse_address"]

_BOUNDARY = "keepsight"
_HEADERS_S = 10.0  # that a client has for its request, and for taking one picture
_SEND_BYTES = 128 * 1024  # in flight to one client: more would be pictures of the past
_QUIET_S = 0.5  # how soon a client's thread notices that the preview is closed

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Keepsight</title>
<style>body {{ margin: 0; background: #111; color: #ddd; font: 14px system-ui, sans-serif }}
figure {{ display: inline-block; margin: 8px }} img {{ max-width: 100%; display: block }}</style></head>
<body>{figures}</body></html>
"""


class Preview:
    """An HTTP server on a thread of its own: pages of all cameras at `/` and of one at `/NAME`, `/stream/NAME` (MJPEG) and
    `/picture/NAME` (one JPEG).

    Pictures are scaled and encoded once for all who look on, and only while somebody does. A slow client gets fewer pictures;
    nobody ever waits for it. There is no authentication and no encryption: whoever reaches the port sees the camera, which is why
    it listens on this machine alone unless asked otherwise.

    Args:
        port: 0 takes a free one.
        host: the address to listen on.
        width: of the pictures, at most; their shape is kept.
        fps: pictures per second, at most.
        quality: of the JPEGs, 1 to 100.
        max_clients: who look on at one time; one more gets 503.

    Raises:
        UsageError: an address that is not this machine's or is in use; a size, rate or number that makes no sense.

    >>> with Preview() as preview:
    ...     preview.url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        *,
        width: int = 640,
        fps: int = 10,
        quality: int = 70,
        max_clients: int = 4,
    ) -> None:
        for name, value, least, most in (
            ("width", width, 16, 4096), ("fps", fps, 1, 60), ("quality", quality, 1, 100), ("max_clients", max_clients, 1, 64)
        ):  # fmt: skip
            if not least <= value <= most:
                raise UsageError(f"a preview with {name}={value} makes no sense.", fix=f"Give {least} to {most}.")
        self._width, self._fps, self._quality = width, fps, quality
        self._views: dict[str, _View] = {}
        self._closing = threading.Event()
        self._places = threading.BoundedSemaphore(max_clients)
        try:
            self._server = _Server((host, port), partial(_Handler, self))
        except OSError as error:
            raise UsageError(
                f"the preview can't listen on {host}:{port}: {error.strerror or error}.",
                fix="Give another --preview [HOST:]PORT.",
            ) from error
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="keepsight-preview", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{self.host}:{self.port}/"

    @property
    def is_public(self) -> bool:
        """Whether others than this machine may reach it."""
        return not _is_loopback(self.host)

    def branch(self, name: str = "camera") -> Branch:
        """What to give to a `Source` or a `LiveSource`, of which the page then shows the pictures under this name."""
        view = self._views.setdefault(name, _View())
        # While nobody looks on, pictures end at the valve. (Behind it, videorate would make up for the time that it was closed.)
        # A JPEG's numbers are of BT.601 and the full range; jpegenc does not convert.
        launch = (
            f"videorate drop-only=true max-rate={self._fps} ! valve name={_VALVE} drop=true "
            "! videoscale add-borders=false ! videoconvert "
            f"! capsfilter caps=video/x-raw,format=I420,colorimetry=1:4:0:0,pixel-aspect-ratio=1/1,width=[2,{self._width}] "
            f"! jpegenc quality={self._quality} ! appsink name={_PICTURES} sync=false max-buffers=1 drop=true emit-signals=true"
        )
        elements = ("valve", "videorate", "videoconvert", "videoscale", "capsfilter", "jpegenc", "appsink")
        return Branch("decoded", launch, elements, view.attach)

    def close(self) -> None:
        """Stop; those who look on are cut off. Closing twice does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        for view in self._views.values():
            view.wake()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Preview({self.url!r}, cameras={sorted(self._views)})"


_VALVE, _PICTURES = "preview-valve", "preview-pictures"


class _View:
    """The newest JPEG of a camera, and who waits for the next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jpeg, self._serial = b"", 0
        self._watchers = 0
        self._valve: Any = None
        self._gst: Any = None

    def attach(self, pipeline: Any) -> None:
        """Take the pictures of a connection; the one before is over."""
        # The sink calls back through an object that knows nothing of the pipeline: that would never be freed otherwise.
        self._gst = load_gst()
        pipeline.get_by_name(_PICTURES).connect("new-sample", self._on_sample)
        with self._changed:
            self._valve = pipeline.get_by_name(_VALVE).weak_ref()
            self._turn()

    def next(self, after: int, timeout_s: float) -> tuple[bytes, int]:
        """The newest picture and its number, once that is above `after`; an empty one if none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._serial > after, timeout_s)
            return (self._jpeg, self._serial) if self._serial > after else (b"", after)

    def watch(self) -> int:
        """Ask for pictures; the number of the newest one, which may be old."""
        with self._changed:
            self._watchers += 1
            self._turn()
            return self._serial

    def leave(self) -> None:
        with self._changed:
            self._watchers -= 1
            self._turn()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _turn(self) -> None:
        valve = self._valve() if self._valve is not None else None
        if valve is not None:
            valve.set_property("drop", self._watchers == 0)

    def _on_sample(self, sink: Any) -> Any:
        sample = sink.emit("pull-sample")
        if sample is not None:
            buffer = sample.get_buffer()
            jpeg = bytes(buffer.extract_dup(0, buffer.get_size()))
            with self._changed:
                self._jpeg, self._serial = jpeg, self._serial + 1
                self._changed.notify_all()
        return self._gst.FlowReturn.OK


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that reads nothing would hold it up
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        super().__init__(address, handler)
        # Beside those who look on, some who ask for the page. Others wait to be accepted.
        self._places = threading.BoundedSemaphore(80)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _HEADERS_S
    server_version, sys_version = "keepsight", ""
    connection: socket

    def __init__(self, preview: Preview, *args: Any) -> None:
        self._preview = preview
        super().__init__(*args)

    def do_GET(self) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.FORBIDDEN, "another host's name")
            return
        views = self._preview._views
        path = self.path.partition("?")[0]
        kind, _, name = path.strip("/").partition("/")
        if path == "/":
            self._page(list(views))
        elif kind in ("stream", "picture") and name in views:
            self._look_on(views[name], once=kind == "picture")
        elif path[1:] in views:
            self._page([path[1:]])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are nothing to tell."""

    def _is_for_us(self) -> bool:
        """Refuse pages of others that had their name point here: a browser would let them read the pictures."""
        asked = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return self._preview.is_public or asked in ("localhost", "[::1]", self._preview.host) or _is_loopback(asked)

    def _page(self, names: list[str]) -> None:
        figures = "".join(
            f'<figure><img src="/stream/{name}" alt="{name}"><figcaption>{name}</figcaption></figure>'
            for name in map(html.escape, names)
        )
        page = _PAGE.format(figures=figures).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _look_on(self, view: _View, *, once: bool) -> None:
        if not self._preview._places.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "as many look on as may")
            return
        serial = view.watch()
        try:
            if once:
                self._send_one(view, serial)
            else:
                self._send_all(view, serial)
        except OSError:  # gone, or too slow by far
            self.close_connection = True
        finally:
            view.leave()
            self._preview._places.release()

    def _send_one(self, view: _View, serial: int) -> None:
        jpeg, _ = view.next(serial, _HEADERS_S)
        if not jpeg:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "no picture comes")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(jpeg)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(jpeg)

    def _send_all(self, view: _View, serial: int) -> None:
        self.connection.setsockopt(SOL_SOCKET, SO_SNDBUF, _SEND_BYTES)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        while not self._preview._closing.is_set():
            jpeg, serial = view.next(serial, _QUIET_S)
            if jpeg:
                head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")


def parse_address(text: str) -> tuple[str, int]:
    """Read `[HOST:]PORT`; this machine alone unless a host is named.

    Raises:
        UsageError: anything else.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"--preview {text} names no port.", fix="Write --preview 8080, or 0.0.0.0:8080 for all to see.")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
