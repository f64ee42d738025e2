from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepsight.streams import LiveSource, Sampler, Source, UsageError, write_video
from keepsight.streams.sampling import ChangeSampler


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200), st.floats(0.2, 30))
def test_the_first_frame_at_or_after_each_grid_point_is_taken(gaps: list[float], fps: float) -> None:
    times, now = [0.0], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    sampler = Sampler(fps)
    taken = [time_s for time_s in times if sampler.take(time_s)]
    # the slow reference: grid point by grid point, with the same allowance of 1 ms for rounded times
    wanted = {next((t for t in times if t + 0.001 >= k / fps), None) for k in range(math.ceil(now * fps) + 2)} - {None}
    near_a_grid_point = any(abs((t + 0.001) * fps - round((t + 0.001) * fps)) < 1e-6 for t in times)
    assert near_a_grid_point or taken == sorted(wanted)  # type: ignore[type-var]


RATES = [
    # frames/s of the stream, frames/s wanted, seconds, frames taken
    (30, 1, 60, 60),
    (30000 / 1001, 1, 3600, 3600),  # no drift in an hour
    (25, 2, 10, 20),
    (30, 30, 10, 300),  # the same rate: all
    (10, 30, 10, 100),  # a slower stream: all
    (30, 0.1, 60, 6),
]


@pytest.mark.parametrize(("rate", "fps", "seconds", "count"), RATES)
def test_a_rate_is_kept_without_drift(rate: float, fps: float, seconds: int, count: int) -> None:
    sampler = Sampler(fps)
    assert sum(sampler.take(index / rate) for index in range(round(rate * seconds))) == count


def test_times_rounded_to_milliseconds_are_still_on_the_grid() -> None:
    sampler = Sampler(3)
    assert [sampler.take(time_s) for time_s in (0.0, 0.333, 0.667, 1.0)] == [True] * 4


def test_after_a_gap_one_frame_is_taken_not_the_backlog() -> None:
    sampler = Sampler(1)
    assert [sampler.take(time_s) for time_s in (0.0, 10.2, 10.3, 10.9, 11.0)] == [True, True, False, False, True]


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_that_makes_no_sense_is_refused(fps: float) -> None:
    with pytest.raises(UsageError, match="sampling rate"):
        Sampler(fps)


def test_every_nth_frame_is_counted_and_not_timed(numbered: Path) -> None:
    frames = list(Source(numbered, every=7))
    assert [round(frame.image.mean() / 4) for frame in frames] == list(range(0, 60, 7))
    assert [frame.index for frame in frames] == list(range(9))


def test_every_nth_of_pictures_that_lie_ready(tmp_path: Path) -> None:
    np.save(tmp_path / "n.npy", np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8))
    assert [int(frame.image[0, 0, 0]) for frame in Source(tmp_path / "n.npy", every=4)] == [0, 4, 8]


def plain_luma_difference(a: np.ndarray, b: np.ndarray, parts: int = 16) -> float:
    """The difference of two pictures as the policy describes it, pixel by pixel; sides are multiples of the parts."""
    total = 0.0
    height, width = a.shape[0] // parts, a.shape[1] // parts
    for row in range(parts):
        for column in range(parts):
            means = []
            for image in (a, b):
                values = [
                    0.299 * float(r) + 0.587 * float(g) + 0.114 * float(b)
                    for line in image[row * height : (row + 1) * height]
                    for r, g, b in line[column * width : (column + 1) * width]
                ]
                means.append(sum(values) / len(values))
            total += abs(means[0] - means[1])
    return total / parts**2


def test_the_difference_of_two_pictures_is_that_of_their_lumas_parts() -> None:
    random = np.random.default_rng(4)
    a, b = (random.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(2))
    sampler = ChangeSampler(1)
    sampler.take_picture(0, a)
    sampler.take_picture(1, b)
    assert sampler.difference == pytest.approx(plain_luma_difference(a, b), abs=1e-3)


def test_what_differs_is_kept_and_what_stands_still_now_and_then() -> None:
    still, moved = np.full((60, 80, 3), 100, np.uint8), np.full((60, 80, 3), 100, np.uint8)
    moved[:30, :40] = 140  # a quarter of the picture by 40 levels: 10 on average
    sampler = ChangeSampler(9, floor_s=5)
    pictures = [still] * 12 + [moved] * 3 + [still] * 2
    kept = [second for second, picture in enumerate(pictures) if sampler.take_picture(float(second), picture)]
    assert kept == [0, 5, 10, 12, 15]
    deaf = ChangeSampler(11, floor_s=100)
    assert [second for second, picture in enumerate(pictures) if deaf.take_picture(float(second), picture)] == [0]


def test_slow_drift_adds_up_against_the_frame_that_was_kept() -> None:
    sampler = ChangeSampler(4.9, floor_s=1000)  # the weights of luma add up to 1 but for rounding
    kept = [level for level in range(30) if sampler.take_picture(level, np.full((20, 20, 3), level, np.uint8))]
    assert kept == [0, 5, 10, 15, 20, 25]


def test_a_file_is_sampled_on_change(tmp_path: Path) -> None:
    scenes = [30] * 20 + [200] * 20 + [90] * 20
    write_video(tmp_path / "cuts.mp4", (np.full((48, 64, 3), grey, np.uint8) for grey in scenes), fps=10)
    frames = list(Source(tmp_path / "cuts.mp4", change=5))
    assert [round(frame.time_s, 1) for frame in frames] == [0, 2, 4]
    often = [round(frame.time_s, 1) for frame in Source(tmp_path / "cuts.mp4", change=5, change_floor_s=1.5)]
    assert often == [0, 1.5, 2, 3.5, 4, 5.5]


def test_a_scene_that_stands_still_is_shown_every_ten_seconds_or_as_asked(tmp_path: Path) -> None:
    np.save(tmp_path / "still.npy", np.full((25, 8, 8, 3), 90, np.uint8))
    for floor_s, seconds in ((None, [0, 10, 20]), (4.0, [0, 4, 8, 12, 16, 20, 24]), (float("inf"), [0])):
        frames = Source(tmp_path / "still.npy", change=5, change_floor_s=floor_s)
        assert [frame.time_s for frame in frames] == seconds


def test_a_camera_takes_the_floor_too() -> None:
    with LiveSource("test://black?fps=30", size=(8, 8), change=5, change_floor_s=0.2) as source:
        times = [next(source).time_s for _ in range(4)]
    assert np.diff(times) == pytest.approx([0.2] * 3, abs=0.19) and times[-1] >= 0.6 - 0.003


BAD = [
    ({"every": 0}, "every=0"),
    ({"every": 2.5}, "every=2.5"),
    ({"change": 0}, "change=0"),
    ({"change": float("nan")}, "change=nan"),
    ({"fps": 1, "every": 2}, "fps and every"),
    ({"change": 3, "change_floor_s": 0.0}, "change_floor_s=0"),
    ({"change": 3, "change_floor_s": float("nan")}, "change_floor_s=nan"),
    ({"fps": 1, "change_floor_s": 5.0}, "change_floor_s= is for"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source("a.mp4", **options)
