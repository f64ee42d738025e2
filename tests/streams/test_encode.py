from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import KeepsightError, Source, UsageError, write_video


def flat_frames(count: int, height: int, width: int) -> list[np.ndarray]:
    colours = np.random.default_rng(0).integers(0, 256, (count, 3), dtype=np.uint8)
    return [np.broadcast_to(colour, (height, width, 3)).copy() for colour in colours]


SHAPES = [
    # frames, height, width
    (1, 112, 112),  # a single one
    (2, 120, 160),
    (61, 224, 224),  # more than the encoder looks ahead
    (9, 90, 214),  # rows that GStreamer pads
    (9, 91, 213),  # odd both ways
    (5, 720, 1280),  # above 576 lines another colour matrix is the default
]


@pytest.mark.parametrize(("count", "height", "width"), SHAPES)
def test_a_round_trip_keeps_every_frame_and_its_colour(tmp_path: Path, count: int, height: int, width: int) -> None:
    frames = flat_frames(count, height, width)
    write_video(tmp_path / "clip.mp4", frames, fps=25)
    with Source(tmp_path / "clip.mp4") as source:
        got = list(source)
    assert [frame.image.shape for frame in got] == [(height, width, 3)] * count
    error = [np.abs(frame.image.astype(int) - sent).mean() for frame, sent in zip(got, frames, strict=True)]
    assert np.mean(error) < 1.0  # of 255: GStreamer's direct YUV to RGB would be 3.5 off
    assert np.allclose([frame.time_s for frame in got], np.arange(count) / 25, atol=1e-6)


def test_each_frame_keeps_its_place_in_a_moving_picture(tmp_path: Path) -> None:
    frames = []
    for index in range(40):
        frame = np.full((96, 96, 3), 60, np.uint8)
        frame[40:56, 2 * index : 2 * index + 16] = (250, 30, 30)
        frames.append(frame)
    write_video(tmp_path / "moving.mp4", frames, fps=30)
    for frame in Source(tmp_path / "moving.mp4"):
        columns = np.flatnonzero(frame.image[48, :, 0] > 150)
        assert abs(columns[0] - 2 * frame.index) <= 1


@pytest.mark.parametrize("fps", [1, 12.5, 29.97, Fraction(30000, 1001), 120])
def test_the_frame_rate_is_kept(tmp_path: Path, fps: float | Fraction) -> None:
    write_video(tmp_path / "clip.mp4", flat_frames(13, 32, 32), fps=fps)
    times = [frame.time_s for frame in Source(tmp_path / "clip.mp4")]
    assert times == pytest.approx([index / float(fps) for index in range(13)], abs=1e-4)


def test_frames_may_come_from_a_generator_and_are_not_kept(tmp_path: Path) -> None:
    def generate() -> Iterator[np.ndarray]:
        one = np.zeros((64, 64, 3), np.uint8)
        for index in range(100):
            one[:] = index  # the same array every time: the encoder must have its own copy
            yield one

    write_video(tmp_path / "clip.mp4", generate(), fps=30)
    means = [frame.image.mean() for frame in Source(tmp_path / "clip.mp4")]
    assert means == pytest.approx(range(100), abs=1.6)


REFUSED = [
    ([], "no frames"),
    ([np.zeros((4, 4), np.uint8)], r"frame 0 is uint8 \[4, 4\]"),
    ([np.zeros((4, 4, 3), np.float32)], "frame 0 is float32"),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)], r"frame 1 is \[8, 6, 3\]"),
]


@pytest.mark.parametrize(("frames", "says"), REFUSED)
def test_bad_frames_are_refused_and_leave_no_file(tmp_path: Path, frames: list[np.ndarray], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        write_video(tmp_path / "clip.mp4", frames, fps=30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -5, float("nan")])
def test_a_frame_rate_that_makes_no_sense_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UsageError, match="not a frame rate"):
        write_video(tmp_path / "clip.mp4", flat_frames(1, 8, 8), fps=fps)


def test_a_folder_that_is_not_there_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with pytest.raises(KeepsightError, match="can't be written"):
        write_video(tmp_path / "nowhere" / "clip.mp4", flat_frames(40, 64, 64), fps=30)
