"""The pipelines of a Jetson, as text and built from stand-in elements: no board has run them. And what is described of any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import keepsight.streams.cli as cli
from keepsight.streams import SourceURI, UsageError
from keepsight.streams.boards import BOARDS
from keepsight.streams.branches import Branch
from keepsight.streams.describe import describe
from keepsight.streams.pipelines import Delivery, recipe_for
from keepsight.streams.view import View

JETSON = BOARDS["jetson"]
SIZE = View((224, 224))
QUEUE = "queue name=tap leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0"
RTSP = "rtspsrc name=origin latency=200 drop-on-latency=true protocols=tcp ! application/x-rtp,media=video"
RTP = "application/x-rtp,media=video,clock-rate=90000"
CSI = "nvarguscamerasrc name=origin sensor-id=0 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1"
TO_HOST = "nvvidconv ! video/x-raw,format=I420"
EITHER = "videoconvert ! nvvidconv ! video/x-raw(memory:NVMM) ! nvvidconv ! video/x-raw"

GOLDEN = [
    # address, view, delivery, everything before the part that is the same on every machine
    ("csi://0", SIZE, "newest", f"{CSI} ! {QUEUE} ! {TO_HOST}"),
    ("csi://0?flip=rotate-180", SIZE, "newest", f"{CSI} ! {QUEUE} ! nvvidconv flip-method=2 ! video/x-raw,format=I420"),
    (
        "csi://0",
        View((224, 224), hardware_scaling=True),
        "newest",
        f"{CSI} ! {QUEUE} ! nvvidconv interpolation-method=1 ! video/x-raw,format=I420,width=224,height=224",
    ),
    ("rtsp://h/x", SIZE, "newest", f"{RTSP} ! decodebin name=decoder ! {QUEUE} ! {EITHER}"),
    (
        "rtsp://h/x?encoding=h264",
        SIZE,
        "newest",
        f"{RTSP} ! rtph264depay ! h264parse ! nvv4l2decoder name=decoder ! {QUEUE} ! {TO_HOST}",
    ),
    (
        "rtp://@:5004?encoding=h265&payload=98",
        SIZE,
        "newest",
        f"udpsrc name=origin caps={RTP},encoding-name=H265,payload=98 ! rtpjitterbuffer latency=200 drop-on-latency=true "
        f"! rtph265depay ! h265parse ! nvv4l2decoder name=decoder ! {QUEUE} ! {TO_HOST}",
    ),
    ("a.mp4", SIZE, "every", f"filesrc name=origin ! decodebin name=decoder ! identity name=tap ! {EITHER}"),
    (
        "v4l2:///dev/video0?encoding=mjpeg&width=1280",
        SIZE,
        "newest",
        "v4l2src name=origin ! image/jpeg,width=1280 ! jpegparse ! nvjpegdec name=decoder ! video/x-raw",
    ),
    ("v4l2:///dev/video0?encoding=raw", SIZE, "newest", "v4l2src name=origin ! video/x-raw"),
]


@pytest.mark.parametrize(("text", "view", "delivery", "head"), GOLDEN)
def test_a_jetsons_pipeline(text: str, view: View, delivery: Delivery, head: str) -> None:
    launch = recipe_for(SourceURI.parse(text), view, delivery, board=JETSON).launch
    assert launch.startswith(f"{head} ! capssetter name=colours ! ")
    after = launch.removeprefix(head)
    assert " nv" not in after and after.count("appsink") == 1
    # Behind the copy it is the pipeline of any machine, and the sampler looks at frames once.
    assert launch.count("name=tap") == 1
    assert "video/x-raw,format=RGB,width=224,height=224,pixel-aspect-ratio=1/1 ! appsink" in after


def test_coded_and_decoded_branches_of_a_jetsons_camera() -> None:
    branches = (Branch("coded", "fakesink"), Branch("decoded", "videoconvert ! fakesink"))
    recipe = recipe_for(SourceURI.parse("csi://0"), SIZE, "newest", branches, board=JETSON)
    assert f"{CSI} ! tee name=decoded ! {QUEUE} ! {TO_HOST}" in recipe.launch  # before the copy
    coded, decoded = (place.launch for place in recipe.places)
    assert "! nvv4l2h264enc insert-sps-pps=true iframeinterval=30 bitrate=4000000 ! h264parse ! fakesink" in coded
    assert "nvvidconv" not in coded and f"! {TO_HOST} ! videoconvert ! fakesink" in decoded
    known = recipe_for(SourceURI.parse("rtsp://h/x?encoding=h265"), SIZE, "newest", branches[:1], board=JETSON)
    assert "h265parse ! tee name=coded ! nvv4l2decoder" in known.launch and "nvv4l2h264enc" not in known.elements


NOT_IN_HARDWARE = [
    ("csi://0", View((224, 224), "letterbox", hardware_scaling=True), "aspect='letterbox'"),
    ("csi://0", View((224, 224), scaler="bicubic-antialias", hardware_scaling=True), "scaler='bicubic-antialias'"),
    ("v4l2:///dev/video0?encoding=raw", View((224, 224), hardware_scaling=True), "decoded into the host's"),
]


@pytest.mark.parametrize(("text", "view", "says"), NOT_IN_HARDWARE)
def test_what_the_hardware_can_not_scale_is_refused(text: str, view: View, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        recipe_for(SourceURI.parse(text), view, "newest", board=JETSON)


def test_a_machine_without_that_hardware_refuses_it() -> None:
    with pytest.raises(UsageError, match="needs a Jetson's nvvidconv"):
        recipe_for(SourceURI.parse("a.mp4"), View((224, 224), hardware_scaling=True), "every", board=BOARDS["this"])


def test_a_jetsons_pipelines_can_be_built_from_stand_in_elements() -> None:
    script = Path(__file__).with_name("jetson_stand_ins.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("built:") == 15 and "refused:" in done.stdout


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    cli.commands(app)
    return app


def test_describe_prints_the_pipeline_without_secrets(app: typer.Typer) -> None:
    text = "rtsp://ann:tops3cret@h/x?token=tops3cret&latency=50"
    for options in ([], ["--json"], ["--board", "jetson", "--size", "224x224"]):
        result = CliRunner().invoke(app, ["stream", "describe", text, *options])
        assert result.exit_code == 0 and "tops3cret" not in result.stdout
        assert "user-pw=***" in result.stdout and "latency=50" in result.stdout


def test_describe_names_what_is_missing_and_its_package(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["stream", "describe", "csi://0", "--board", "jetson", "--json"])
    report = json.loads(result.stdout)
    assert report["missing"] == dict.fromkeys(("nvarguscamerasrc", "nvvidconv"), "nvidia-l4t-gstreamer (JetPack only)")
    assert report["elements"][0]["stage"] == "origin"
    assert any("No Jetson has run" in note for note in report["notes"])


def test_what_describe_prints_can_be_given_to_gst_launch(media: Path) -> None:
    description = describe(SourceURI.parse(media / "plain.mp4"), SIZE, "every")
    # Without the last, the appsink: nobody would read it.
    text = [*" ! ".join(element.launch for element in description.elements[:-1]).split(), "!", "fakesink"]
    done = subprocess.run(["gst-launch-1.0", "-q", *text], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize(("option", "value"), [("--size", "224"), ("--size", "0x5"), ("--board", "tx1")])
def test_describe_refuses_what_makes_no_sense(app: typer.Typer, option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["stream", "describe", "a.mp4", option, value])
    assert isinstance(result.exception, UsageError) and f"{option} {value}" in str(result.exception)
