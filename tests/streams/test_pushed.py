from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import PushSource, Source, SourceURI, UsageError


def pictures(count: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_what_is_pushed_is_read_once_in_order_bit_for_bit() -> None:
    source, frames = PushSource(capacity=5), pictures(5)
    for number, image in enumerate(frames):
        assert source.push(image, time_s=number / 4)
    source.end()
    seen = list(source)
    assert [(frame.time_s, frame.index) for frame in seen] == [(0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1, 4)]
    assert np.array_equal([frame.image for frame in seen], frames)
    assert source.dropped == 0


def test_a_picture_may_be_changed_once_it_is_pushed() -> None:
    source, image = PushSource(), pictures(1)[0]
    before = image.copy()
    source.push(image)
    image[:] = 0
    source.end()
    assert np.array_equal(next(source).image, before)


@pytest.mark.parametrize("scaler", ["bilinear", "bicubic-antialias", "bicubic-wrap"])
def test_pictures_of_any_size_are_scaled_as_a_source_scales_them(tmp_path: Path, scaler: str) -> None:
    with PushSource(size=(32, 24), scaler=scaler, capacity=9) as source:  # type: ignore[arg-type]
        for at, (height, width) in enumerate([(40, 60), (40, 60), (51, 33)]):  # the size changes in the middle
            frames = pictures(1, height, width)
            np.save(tmp_path / f"{at}.npy", frames)
            source.push(frames[0])
        source.end()
        for at, frame in enumerate(source):
            with Source(tmp_path / f"{at}.npy", size=(32, 24), scaler=scaler) as reference:  # type: ignore[arg-type]
                assert np.array_equal(frame.image, next(reference).image)


def test_without_room_a_push_waits_for_the_reader() -> None:
    source, frames = PushSource(capacity=2), pictures(4)
    assert source.push(frames[0]) and source.push(frames[1])
    assert not source.push(frames[2], timeout_s=0.05)
    told: list[bool] = []
    pusher = threading.Thread(target=lambda: told.append(source.push(frames[3])))
    pusher.start()
    time.sleep(0.05)
    assert pusher.is_alive()
    first = next(source)
    pusher.join(5)
    source.end()
    assert told == [True] and np.array_equal([first.image, *(frame.image for frame in source)], frames[[0, 1, 3]])
    assert source.dropped == 0


def test_with_newest_the_oldest_that_waits_is_replaced_and_counted() -> None:
    source, frames = PushSource(capacity=2, newest=True), pictures(5)
    for image in frames:
        assert source.push(image)
    source.end()
    assert np.array_equal([frame.image for frame in source], frames[3:])
    assert source.drops == {"replaced": 3} and source.is_live


def test_times_follow_the_captures_unless_they_are_given() -> None:
    source = PushSource()
    source.push(pictures(1)[0], captured_at=100.0)
    source.push(pictures(1)[0], captured_at=100.5)
    source.end()
    first, second = source
    assert (first.time_s, second.time_s) == (0.0, 0.5)
    assert second.captured_at == 100.5 and second.wall_time is not None and first.wall_time is not None
    assert second.wall_time - first.wall_time == pytest.approx(0.5, abs=0.05)


def test_closing_frees_who_waits_to_read_and_who_waits_to_push() -> None:
    idle, full = PushSource(), PushSource(capacity=1)
    full.push(pictures(1)[0])
    told: list[object] = []
    threads = [
        threading.Thread(target=lambda: told.append(list(idle))),
        threading.Thread(target=lambda: told.append(full.push(pictures(1)[0]))),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    idle.close()
    full.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert [] in told and False in told


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), [[1, 2, 3]]]
)
def test_what_is_no_picture_is_refused(image: object) -> None:
    with pytest.raises(UsageError, match=r"not a picture.*uint8 \[H, W, 3\]"):
        PushSource().push(image)  # type: ignore[arg-type]


def test_time_does_not_go_back_and_nothing_comes_after_the_end() -> None:
    source = PushSource()
    source.push(pictures(1)[0], time_s=2.0)
    with pytest.raises(UsageError, match="a picture of 1 s came after one of 2 s"):
        source.push(pictures(1)[0], time_s=1.0)
    source.end()
    with pytest.raises(UsageError, match="has ended"):
        source.push(pictures(1)[0])
    with pytest.raises(UsageError, match="capacity of 0"):
        PushSource(capacity=0)
    with pytest.raises(UsageError, match="fed by a program"):
        SourceURI.parse("appsrc://mine")
