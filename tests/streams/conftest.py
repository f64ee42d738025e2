"""Media and cameras for the tests of streams, all made on the spot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.streams import write_video
from keepsight.streams.gst import load_gst

GstRun = Callable[[str, Path], Path]


@pytest.fixture(scope="session")
def gst() -> Any:
    return load_gst()


@pytest.fixture(scope="session")
def gst_run(gst: Any) -> GstRun:
    """Run a pipeline whose last element is `filesink name=out` to its end."""

    def run(description: str, path: Path) -> Path:
        pipeline = gst.parse_launch(description)
        pipeline.get_by_name("out").set_property("location", str(path))
        pipeline.set_state(gst.State.PLAYING)
        ending = gst.MessageType.ERROR | gst.MessageType.EOS
        message = pipeline.get_bus().timed_pop_filtered(30 * gst.SECOND, ending)
        pipeline.set_state(gst.State.NULL)
        assert message is not None and message.type == gst.MessageType.EOS, message and message.parse_error()
        return path

    return run


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory, gst_run: GstRun) -> Path:
    """A folder of clips: fast.mp4, plain.mp4, clip.mkv, clip.avi (100 frames, 4 s), sound.mp4 (no video),
    long_sound.mp4 (4 s of video, 10 s of sound)."""
    folder = tmp_path_factory.mktemp("media")
    picture = "videotestsrc pattern=ball num-buffers=100 ! video/x-raw,format=I420,width=160,height=120,framerate=25/1"
    h264 = f"{picture} ! x264enc speed-preset=ultrafast ! h264parse"
    sound = "audiotestsrc num-buffers={n} ! audio/x-raw,rate=44100 ! audioconvert ! avenc_aac"
    out = "filesink name=out"
    gst_run(f"{h264} ! mp4mux ! {out}", folder / "plain.mp4")
    gst_run(f"{h264} ! mp4mux faststart=true ! {out}", folder / "fast.mp4")
    gst_run(f"{h264} ! matroskamux ! {out}", folder / "clip.mkv")
    gst_run(f"{picture} ! jpegenc ! avimux ! {out}", folder / "clip.avi")
    gst_run(f"{sound.format(n=50)} ! mp4mux ! {out}", folder / "sound.mp4")
    gst_run(f"mp4mux name=mux ! {out}  {h264} ! mux.  {sound.format(n=431)} ! mux.", folder / "long_sound.mp4")
    return folder


@pytest.fixture(scope="session")
def save_image(gst: Any) -> Callable[[Path, np.ndarray], Path]:
    """Write a picture with GStreamer: PNG, or JPEG by its suffix. Widths must be multiples of 4."""

    def save(path: Path, image: np.ndarray) -> Path:
        height, width = image.shape[:2]
        encoder = "jpegenc quality=100" if path.suffix == ".jpg" else "pngenc"
        pipeline = gst.parse_launch(
            f"appsrc name=in format=time caps=video/x-raw,format=RGB,width={width},height={height},framerate=1/1 "
            f"! videoconvert ! {encoder} ! filesink name=out"
        )
        pipeline.get_by_name("out").set_property("location", str(path))
        pipeline.set_state(gst.State.PLAYING)
        pipeline.get_by_name("in").push_buffer(gst.Buffer.new_wrapped(image.tobytes()))
        pipeline.get_by_name("in").end_of_stream()
        pipeline.get_bus().timed_pop_filtered(10 * gst.SECOND, gst.MessageType.EOS | gst.MessageType.ERROR)
        pipeline.set_state(gst.State.NULL)
        return path

    return save


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """numbered.mp4: 60 frames at 30 fps, frame i of grey level 4 * i."""
    frames = (np.full((48, 64, 3), 4 * index, np.uint8) for index in range(60))
    write_video(tmp_path / "numbered.mp4", frames, fps=30)
    return tmp_path / "numbered.mp4"


class RtspServer:
    """rtsp_server.py in a process of its own, so that it can be killed and frozen."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self.port = 0
        self.start()

    def start(self) -> None:
        """Begin, or begin again on the same port."""
        script = Path(__file__).with_name("rtsp_server.py")
        command = [sys.executable, str(script), str(self.port), *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def url(self, path: str, credentials: str = "") -> str:
        return f"rtsp://{credentials}127.0.0.1:{self.port}{path}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def rtsp_server() -> Iterator[RtspServer]:
    server = RtspServer()
    yield server
    server.stop()


@pytest.fixture
def locked_rtsp_server() -> Iterator[RtspServer]:
    server = RtspServer("locked")
    yield server
    server.stop()
