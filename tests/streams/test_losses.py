"""Pictures that a decoder loses: counted where files are damaged, and never where they are healthy, whatever their kind."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepsight.streams import LiveSource, Source, SourceUnreadableError
from keepsight.streams.gst import has_element
from keepsight.streams.losses import Ledger
from keepsight.streams.probe import probe

if TYPE_CHECKING:
    from conftest import RtspServer

GstRun = Callable[[str, Path], Path]

PICTURES = "videotestsrc pattern=ball num-buffers=100 ! video/x-raw,format=I420,width=176,height=144,framerate=25/1"
X264 = "x264enc key-int-max=30"

# What an encoder and a muxer make of PICTURES: plain, with pictures sent out of order, interlaced, without times of their own...
HEALTHY = {
    "b.mp4": f"{X264} bframes=3 b-pyramid=true ! h264parse ! mp4mux",
    "b.mkv": f"{X264} bframes=3 ! h264parse ! matroskamux",
    "b.ts": f"{X264} bframes=3 ! h264parse ! mpegtsmux",
    "b.avi": f"{X264} bframes=2 ! video/x-h264,stream-format=byte-stream ! avimux",
    "b.h264": f"{X264} bframes=2 ! video/x-h264,stream-format=byte-stream",
    "interlaced.mp4": f"{X264} interlaced=true bframes=2 ! h264parse ! mp4mux",
    "intra-refresh.ts": f"{X264} intra-refresh=true ! h264parse ! mpegtsmux",
    "h265.mp4": "x265enc ! h265parse ! mp4mux",
    "mpeg2.ts": "mpeg2enc format=3 ! mpegvideoparse ! mpegtsmux",
    "mpeg2.mpg": "mpeg2enc format=3 ! mpegvideoparse ! mpegpsmux",  # the first 0.7 s lie before its segment
    "mpeg2.mkv": "mpeg2enc format=3 ! mpegvideoparse ! matroskamux",
    "mpeg4.avi": "avenc_mpeg4 max-bframes=2 ! avimux",  # two pictures stay in FFmpeg's decoder
    "mpeg4.mkv": "avenc_mpeg4 max-bframes=2 ! matroskamux",
    "vp8.webm": "vp8enc deadline=1 ! webmmux",
    "vp8.avi": "vp8enc deadline=1 ! avimux",
    "vp9.webm": "vp9enc deadline=1 cpu-used=8 lag-in-frames=16 auto-alt-ref=true ! webmmux",
    "jpeg.avi": "jpegenc ! avimux",
    "jpeg.mov": "jpegenc ! qtmux",
    "theora.ogv": "theoraenc ! oggmux",
    "flash.flv": "avenc_flv ! flvmux",
    "wmv.asf": "avenc_wmv2 ! asfmux",
    "raw.avi": "avimux",
}


def make(gst_run: GstRun, folder: Path, name: str) -> Path:
    launch = f"{PICTURES} ! {HEALTHY[name]} ! filesink name=out"
    missing = [word for word in launch.split() if "enc" in word and "=" not in word and not has_element(word)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    return gst_run(launch, folder / name)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_file_has_lost_nothing(gst: Any, gst_run: GstRun, tmp_path: Path, name: str) -> None:
    with Source(make(gst_run, tmp_path, name), size=(32, 32)) as source:
        frames = list(source)
    assert source.drops == {"replaced": 0, "damaged": 0}
    assert len(frames) == 100 or name in ("mpeg2.mpg", "mpeg4.avi")


def test_headers_are_no_pictures(gst: Any, gst_run: GstRun, tmp_path: Path) -> None:
    one = PICTURES.replace("num-buffers=100", "num-buffers=1")
    path = gst_run(f"{one} ! theoraenc ! oggmux ! filesink name=out", tmp_path / "one.ogv")  # three headers, one picture
    with Source(path, size=(32, 32)) as source:
        assert len(list(source)) == 1 and source.drops["damaged"] == 0


@pytest.mark.parametrize("container", ["webmmux", "avimux"])
def test_alternate_reference_frames_of_vp8_are_no_losses(gst: Any, gst_run: GstRun, tmp_path: Path, container: str) -> None:
    encoder = "vp8enc auto-alt-ref=true lag-in-frames=16 deadline=1000000 arnr-maxframes=5 arnr-strength=3 target-bitrate=100000"
    passes = f"{encoder} multipass-cache-file={tmp_path}/cache multipass-mode"
    moving = PICTURES.replace("pattern=ball", "pattern=smpte horizontal-speed=3")
    gst_run(f"{moving} ! {passes}=first-pass ! filesink name=out", tmp_path / "first")
    path = gst_run(f"{moving} ! {passes}=last-pass ! {container} ! filesink name=out", tmp_path / "v")
    assert hidden(gst, path, "avidemux" if container == "avimux" else "matroskademux") > 3
    with Source(path, size=(32, 32)) as source:
        assert len(list(source)) == 100 and source.drops["damaged"] == 0


def hidden(gst: Any, path: Path, demuxer: str) -> int:
    pipeline = gst.parse_launch(f"filesrc location={path} ! {demuxer} ! appsink name=coded sync=false")
    pipeline.set_state(gst.State.PLAYING)
    count = 0
    while (sample := pipeline.get_by_name("coded").emit("pull-sample")) is not None:
        count += not sample.get_buffer().extract_dup(0, 1)[0] & 16
    pipeline.set_state(gst.State.NULL)
    return count


def damaged(path: Path, target: Path, changes: int, seed: int = 1) -> Path:
    """The same file with bytes changed between its beginning and its end, where containers have their indexes."""
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(changes):
        content[rng.randrange(2000, len(content) - 2500)] = rng.randrange(256)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize(("name", "changes"), [("b.mp4", 400), ("interlaced.mp4", 400), ("vp9.webm", 5), ("jpeg.mov", 40)])
def test_a_damaged_file_gives_what_it_has_and_says_how_many_are_lost(
    gst: Any, gst_run: GstRun, tmp_path: Path, name: str, changes: int
) -> None:
    path = damaged(make(gst_run, tmp_path, name), tmp_path / f"changed-{name}", changes)
    frames = []
    with pytest.raises(SourceUnreadableError, match="is damaged") as caught, Source(path, size=(32, 32)) as source:
        for frame in source:
            frames.append(frame)
    lost = 100 - len(frames)
    assert 0 < lost < 100 and source.drops["damaged"] == lost == source.dropped
    assert f"{lost} of its 100 pictures" in str(caught.value)


def test_a_rate_that_leaves_frames_out_does_not_hide_what_is_lost(gst: Any, gst_run: GstRun, tmp_path: Path) -> None:
    path = damaged(make(gst_run, tmp_path, "b.mp4"), tmp_path / "changed.mp4", 400)
    with pytest.raises(SourceUnreadableError, match="of its 100 pictures"):
        list(Source(path, size=(32, 32), fps=2))


def test_a_healthy_file_in_real_time_with_a_slow_reader_has_lost_nothing(numbered: Path) -> None:
    with Source(numbered, pace="realtime") as source:
        for _ in source:
            time.sleep(0.15)
    assert source.drops["replaced"] > 20 and source.drops["damaged"] == 0


def test_probe_tells_of_a_damaged_file(gst: Any, gst_run: GstRun, tmp_path: Path) -> None:
    path = damaged(make(gst_run, tmp_path, "jpeg.mov"), tmp_path / "changed.mov", 40)
    report, error = probe(str(path), 20.0)
    assert error is not None and error.exit_code == 4 and report.drops["damaged"] > 0 and report.corrupted == 0
    assert report.events[-1]["state"] == "lost" and f"{report.drops['damaged']} of its 100" in report.events[-1]["reason"]


# -- cameras ----------------------------------------------------------------------------------------------------------


def test_a_camera_that_is_joined_in_mid_stream_has_lost_nothing(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(32, 32)) as first:
        next(first)
        for delay_s in (0.05, 0.13, 0.21):  # key frames come every third of a second
            time.sleep(delay_s)
            with LiveSource(rtsp_server.url("/ball"), size=(32, 32)) as source:
                begun = time.monotonic()
                while time.monotonic() - begun < 1.5:
                    source.latest(0.5)
                assert source.drops["damaged"] == 0, source.events


def test_what_a_network_damages_is_counted_and_told_and_no_error(gst: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sender = gst.parse_launch(
        "videotestsrc is-live=true pattern=snow ! video/x-raw,format=I420,width=160,height=120,framerate=30/1 "
        "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=30 ! video/x-h264,stream-format=byte-stream "
        "! rtph264pay config-interval=-1 mtu=600 "
        f"! breakmydata skip=20000 probability=0.001 seed=1 ! udpsink host=127.0.0.1 port={port}"
    )
    sender.set_state(gst.State.PLAYING)
    try:
        with LiveSource(f"rtp://@:{port}", size=(32, 32)) as source:
            begun = time.monotonic()
            while time.monotonic() - begun < 20 and not any("could not be decoded" in event.reason for event in source.events):
                source.latest(0.5)
            drops, told = source.drops, [event for event in source.events if "could not be decoded" in event.reason]
    finally:
        sender.set_state(gst.State.NULL)
    assert drops["damaged"] > 0 and source.drops["damaged"] >= drops["damaged"]
    assert told and told[0].state == "live" and len(told) <= 3 + source.generation  # not one of each picture


# -- the account ------------------------------------------------------------------------------------------------------


def account(
    coded: Iterable[tuple[int | None, bool]], shown: Iterable[int], ends: bool = True, *, interlaced: bool = False
) -> Ledger:
    ledger = Ledger()
    ledger.interlaced = interlaced
    for pts, is_key in coded:
        ledger.entered(pts, is_key=is_key)
    for pts in shown:
        ledger.left(pts)
    if ends:
        ledger.ended()
    return ledger


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
    st.data(),
)
def test_whatever_the_order_and_the_rate_each_lost_picture_is_counted(steps: list[int], data: st.DataObject) -> None:
    """Against the plain account: how many there are less how many came out."""
    times = np.cumsum([0, *steps]).tolist()
    lost = data.draw(st.sets(st.sampled_from(times[1:]), max_size=len(times) - 1))
    coded = [times[0], *data.draw(st.permutations(times[1:]))]
    ledger = account(((pts, pts == 0) for pts in coded), (pts for pts in times if pts not in lost))
    assert ledger.lost == len(lost) and ledger.shown == len(times) - len(lost) and ledger.total == len(times)


def test_second_fields_are_no_losses_whether_they_have_times_or_not() -> None:
    frames = range(0, 1000, 40)
    assert account(((pts, pts == 0) for frame in frames for pts in (frame, frame + 20)), frames, interlaced=True).lost == 0
    assert account(((pts, pts == 0) for frame in frames for pts in (frame, frame)), frames).lost == 0
    assert account(((pts, frame == 0) for frame in frames for pts in (frame, None)), frames).lost == 0
    # And a frame of which both are gone is one, or two.
    both = (((pts, pts == 0) for frame in frames for pts in (frame, frame + 20)), [pts for pts in frames if pts != 400])
    assert account(*both, interlaced=True).lost in (1, 2)
    gone = account(((pts, pts == 0) for frame in frames for pts in (frame, frame)), (pts for pts in frames if pts != 400))
    assert gone.lost == 1


def test_what_comes_before_the_first_key_frame_or_belongs_there_is_no_loss() -> None:
    joined = [(pts, False) for pts in range(0, 200, 40)]
    key, leading = [(280, True)], [(200, False), (240, False)]
    rest = [(pts, False) for pts in range(320, 600, 40)]
    assert account([*joined, *key, *leading, *rest], range(280, 600, 40)).lost == 0


def test_what_is_inside_is_not_lost_until_the_end_or_many_have_followed() -> None:
    assert account(((pts, pts == 0) for pts in range(10)), range(5), ends=False).lost == 0
    assert account(((pts, pts == 0) for pts in range(10)), range(5)).lost == 5
    ledger = Ledger()
    for pts in range(200):
        ledger.entered(pts, is_key=pts == 0)
        if pts != 50:
            ledger.left(pts)
    assert ledger.lost == 1


def test_pictures_without_times_are_compared_by_number_at_the_end() -> None:
    coded: list[tuple[int | None, bool]] = [(0, True)] + [(None, False)] * 99
    assert account(coded, range(100)).lost == 0
    assert account(coded, range(90)).lost == 8  # two may have stayed inside
    assert account(coded, range(50), ends=False).lost == 0


def test_a_decoder_that_dates_its_pictures_anew_is_not_accused() -> None:
    assert account(((pts, pts == 0) for pts in range(0, 4000, 40)), range(1000000, 1004000, 40)).lost == 0


def test_damage_that_the_decoder_marks_is_counted() -> None:
    ledger = Ledger()
    for pts in range(3):
        ledger.entered(pts, is_key=True)
        ledger.left(pts, corrupted=pts == 1)
    assert ledger.corrupted == 1 and ledger.lost == 0
