from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import Source, SourceUnreadableError

Save = Callable[[Path, np.ndarray], Path]


def noise(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_png_is_one_frame_bit_for_bit(tmp_path: Path, save_image: Save) -> None:
    image = noise(1)
    with Source(save_image(tmp_path / "one.png", image)) as source:
        frames = list(source)
    assert len(frames) == 1 and frames[0].time_s == 0
    assert np.array_equal(frames[0].image, image)


def test_a_jpeg_keeps_its_colours(tmp_path: Path, save_image: Save) -> None:
    image = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    frame = next(Source(save_image(tmp_path / "one.jpg", image)))
    assert np.abs(frame.image.astype(int) - image).max() <= 4


def test_a_directory_is_its_pictures_in_name_order(tmp_path: Path, save_image: Save) -> None:
    names = ["c.png", "a.png", "b.JPEG.png", "d.png"]
    images = {name: noise(seed, height=20 + 10 * seed) for seed, name in enumerate(names)}  # all of different sizes
    for name, image in images.items():
        save_image(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "sub").mkdir()
    with Source(tmp_path) as source:
        frames = list(source)
        assert source.duration_s == 4
    assert [frame.time_s for frame in frames] == [0, 1, 2, 3]
    assert all(np.array_equal(frame.image, images[name]) for frame, name in zip(frames, sorted(names), strict=True))


def test_pictures_come_at_the_rate_asked_for(tmp_path: Path, save_image: Save) -> None:
    for index in range(4):
        save_image(tmp_path / f"{index}.png", noise(index))
    frames = list(Source(tmp_path, fps=2, size=(32, 24)))
    assert [frame.time_s for frame in frames] == [0, 0.5, 1.0, 1.5]
    assert {frame.image.shape for frame in frames} == {(24, 32, 3)}


def test_pictures_as_a_camera_drop_what_is_late(tmp_path: Path, save_image: Save) -> None:
    for index in range(10):
        save_image(tmp_path / f"{index}.png", noise(index))
    with Source(tmp_path, fps=20, pace="realtime", size=(16, 16)) as source:
        times = []
        for frame in source:
            times.append(frame.time_s)
            time.sleep(0.12)
    assert len(times) + source.dropped == 10
    assert 2 <= len(times) <= 6 and times[-1] == pytest.approx(0.45)


def test_a_picture_that_is_none_is_named(tmp_path: Path, save_image: Save) -> None:
    save_image(tmp_path / "1.png", noise(1))
    (tmp_path / "2.png").write_text("hello\n" * 100)
    source = Source(tmp_path)
    next(source)
    with pytest.raises(SourceUnreadableError, match=r"2\.png"):
        next(source)
