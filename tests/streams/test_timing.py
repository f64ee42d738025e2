"""A picture's way through a pipeline: every point is seen, matched whatever order the decoder keeps, and adds up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from keepsight.streams import Source
from keepsight.streams.timing import _KEPT, PictureTimes, PipelineTiming, _Moments


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory, gst_run: Any) -> Path:
    """50 frames at 25 a second, three of four of them B-frames: the decoder gets them in another order than it shows them."""
    picture = "videotestsrc pattern=ball num-buffers=50 ! video/x-raw,format=I420,width=160,height=120,framerate=25/1"
    coded = f"{picture} ! x264enc bframes=3 b-adapt=false key-int-max=25 ! h264parse ! mp4mux ! filesink name=out"
    return gst_run(coded, tmp_path_factory.mktemp("reordered") / "b.mp4")


def read(uri: str | Path, count: int | None = None, *, pause_s: float = 0.0, **options: Any) -> tuple[PipelineTiming, list[Any]]:
    timing = PipelineTiming()
    found = []
    with Source(uri, size=(64, 48), timing=timing, **options) as source:
        for frame in source:
            found.append((frame, timing.of(frame.pts_ns)))
            time.sleep(pause_s)
            if len(found) == count:
                break
    return timing, found


def assert_in_order(times: PictureTimes) -> None:
    way = [times.entered, times.decoded, times.scaling, times.scaled, times.taken, times.copied, times.done]
    assert way == sorted(way)
    parts = times.decode_ms + times.scale_ms + times.copy_ms + times.wait_ms
    assert parts == pytest.approx(1000 * (times.done - times.entered))
    assert min(times.decode_ms, times.scale_ms, times.copy_ms, times.wait_ms, times.held_ms) >= 0


def test_the_parts_of_a_way_add_up_and_each_is_what_it_says() -> None:
    times = PictureTimes(10.0, 10.5, 10.7, 10.8, 11.3, 11.4, 11.45, held_ms=100.0)
    assert times.decode_ms == pytest.approx(400)
    assert times.scale_ms == pytest.approx(100 + 50)
    assert times.copy_ms == pytest.approx(100)
    assert times.wait_ms == pytest.approx(200 + 500 + 100)


def test_frames_that_a_decoder_puts_in_order_are_matched_by_their_times(reordered: Path) -> None:
    timing, found = read(reordered)
    assert len(found) == 50 and timing.decodes and timing.unmatched == 0
    for _, times in found:
        assert_in_order(times)
    entered = [times.entered for _, times in found]
    assert entered != sorted(entered)  # or nothing was put in order
    assert [times.decoded for _, times in found] == sorted(times.decoded for _, times in found)


def test_what_a_sampler_refuses_is_decoded_and_not_missed(reordered: Path) -> None:
    timing, found = read(reordered, fps=5.0)
    assert len(found) == 10 and timing.unmatched == 0
    for _, times in found:
        assert_in_order(times)


def test_a_reader_that_is_slow_makes_pictures_wait_and_decoding_no_longer(reordered: Path) -> None:
    """The decoder's thread stands before the full queue: that is no decoding, though pictures are in the decoder meanwhile."""
    _, found = read(reordered, 30, pause_s=0.02)
    late = [times for _, times in found[10:]]
    for times in late:
        assert_in_order(times)
    assert sum(times.held_ms for times in late) > 0
    assert sum(times.wait_ms for times in late) > 20 * len(late)  # several of the reader's pauses each


def test_a_test_pattern_has_no_decoder_and_waits_in_the_queue_before_the_scaler() -> None:
    timing, found = read("test://ball", 5)
    assert timing.attached and not timing.decodes
    for _, times in found:
        assert_in_order(times)
        assert times.entered == times.decoded and times.held_ms == 0
    assert any(times.scaling > times.decoded for _, times in found)


def test_a_file_that_is_played_twice_is_timed_twice(reordered: Path) -> None:
    timing, found = read(f"{reordered}?loop=2")
    assert len(found) == 100 and timing.unmatched == 0
    assert found[0][0].pts_ns == found[50][0].pts_ns
    assert found[50][1].entered > found[49][1].entered > found[0][1].entered


def test_pictures_that_lie_ready_have_no_pipeline(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "frames.npy", np.zeros((3, 48, 64, 3), np.uint8))
    timing, found = read(tmp_path / "frames.npy")
    assert len(found) == 3 and not timing.attached and all(times is None for _, times in found)


def test_a_picture_of_which_a_point_was_missed_is_counted_not_guessed() -> None:
    timing = PipelineTiming()
    timing.taken(40, 1.0, 1.1, 1.2)
    timing.taken(None, 1.0, 1.1, 1.2)
    assert timing.of(40) is None and timing.of(None) is None and timing.unmatched == 2


def test_without_timing_the_pipeline_has_nothing_of_it(reordered: Path) -> None:
    with Source(reordered, size=(64, 48)) as source:
        next(source)
        sink = source._reader._sink  # type: ignore[union-attr]
        assert not sink.get_property("emit-signals")
    with Source(reordered, size=(64, 48), timing=PipelineTiming()) as source:
        next(source)
        assert source._reader._sink.get_property("emit-signals")  # type: ignore[union-attr]


def test_of_a_decoder_within_a_decoder_the_outer_ones_moment_counts() -> None:
    moments = _Moments()
    moments.note(40, first=True)
    outer = moments.of(40)
    moments.note(40, first=True)  # the inner one gets it later
    assert outer is not None and moments.of(40) == outer
    moments.note(40)
    assert moments.of(40) > outer  # type: ignore[operator]


def test_the_oldest_moments_are_forgotten() -> None:
    moments = _Moments()
    for pts in range(_KEPT + 3):
        moments.note(pts)
    assert [moments.of(pts) is None for pts in (0, 2, 3, _KEPT + 2)] == [True, True, False, False]
