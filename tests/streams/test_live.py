"""Live sources without a camera: test patterns, devices that are not there."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from keepsight.streams import Frame, MissingComponentError, Source, SourceLostError, SourceNotFoundError, UsageError
from keepsight.streams.gst import has_element


def test_a_test_pattern_is_live_and_young() -> None:
    frames = []
    with Source("test://ball?fps=30", size=(64, 64)) as source:
        assert source.is_live and source.duration_s is None
        for frame in source:
            frames.append((frame, frame.age_ms))
            if len(frames) == 20:
                break
    times = np.array([frame.time_s for frame, _ in frames])
    assert times[0] == 0 and (np.diff(times) >= 0).all()
    assert times[-1] == pytest.approx(19 / 30, abs=0.4)
    assert np.median([age for _, age in frames]) < 100


def test_a_slow_reader_gets_the_newest_frame_and_the_drops_are_counted() -> None:
    with Source("test://ball?fps=50&width=64&height=64") as source:
        for frame in source:
            assert frame.age_ms < 200  # a backlog would grow by 80 ms each time
            time.sleep(0.1)
            if frame.index == 9:
                break
        seen = frame.time_s * 50
    assert source.dropped == pytest.approx(seen - 9, abs=3)


def test_a_fast_reader_drops_nothing() -> None:
    with Source("test://ball?fps=20&width=64&height=64") as source:
        for frame in source:
            if frame.index == 15:
                break
    assert source.dropped == 0


def test_a_live_source_is_sampled_on_its_newest_frames() -> None:
    with Source("test://ball?fps=50&width=64&height=64", fps=10) as source:
        times = []
        for frame in source:
            times.append(frame.time_s)
            assert frame.age_ms < 150
            if frame.index == 8:
                break
    assert times == pytest.approx([k / 10 for k in range(9)], abs=0.09)
    # Of 45 that came; the 36 that the sampling leaves out are not dropped, those that a busy machine misses are.
    assert source.dropped < 18


def test_a_live_source_that_ends_is_lost() -> None:
    frames: list[Frame] = []
    with pytest.raises(SourceLostError, match="ended"):
        for frame in Source("test://ball?frames=5", size=(32, 32)):
            frames.append(frame)
    assert 1 <= len(frames) <= 5


def test_a_test_pattern_offline_gives_every_frame_faster_than_real_time() -> None:
    begun = time.monotonic()
    frames = list(Source("test://smpte?frames=120&fps=30&width=64&height=48", pace="offline"))
    assert len(frames) == 120 and time.monotonic() - begun < 2.5
    assert frames[-1].time_s == pytest.approx(119 / 30, abs=1e-6)
    assert frames[0].image.shape == (48, 64, 3)


def test_closing_from_another_thread_ends_the_iteration() -> None:
    source = Source("test://ball?fps=1/2", size=(32, 32))  # a frame every two seconds: the reader waits
    counted: list[int] = []
    reader = threading.Thread(target=lambda: counted.append(len(list(source))))
    reader.start()
    time.sleep(0.5)
    begun = time.monotonic()
    source.close()
    reader.join(3)
    assert not reader.is_alive() and time.monotonic() - begun < 1
    assert counted == [1]


def test_closing_before_the_first_frame_gives_none() -> None:
    source = Source("test://ball")
    source.close()
    assert list(source) == []


@pytest.mark.parametrize("uri", ["/dev/video99", "v4l2:///dev/video99"])
def test_a_camera_that_is_not_there_is_named(uri: str) -> None:
    with pytest.raises(SourceNotFoundError, match="no camera /dev/video99; this machine has"):
        Source(uri)


@pytest.mark.skipif("has_element('nvarguscamerasrc')", reason="this is a Jetson")
def test_a_csi_camera_needs_a_jetson() -> None:
    assert not has_element("nvarguscamerasrc")
    with pytest.raises(MissingComponentError, match=r"nvarguscamerasrc.*JetPack"):
        next(Source("csi://0"))


def test_an_unknown_pattern_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"smpte.*ball"):
        next(Source("test://nosuch"))
