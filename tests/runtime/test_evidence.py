"""Where attention went in time equals a slow count over a grid; key frames stay in their bounds and drop what shows least."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keepsight.runtime.evidence import evidence_of, moments_of
from keepsight.runtime.keyframes import KeyFrames, write_key_frames
from keepsight.runtime.timeline import Interval
from keepsight.streams.errors import UsageError

FRAME_S = 0.5


def random_slots(seed: int, slots: int = 5, tokens: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention `[X, S, N]`, first and last moments `[S, N]` of frames every half second, cut anew for every token."""
    rng = np.random.default_rng(seed)
    frames = 24
    first, last = np.full((2, slots, tokens), np.nan)
    for token in range(tokens):
        used = int(rng.integers(1, slots + 1))
        cuts = np.sort(rng.choice(np.arange(1, frames), used - 1, replace=False))
        begins, ends = np.concatenate([[0], cuts]), np.concatenate([cuts - 1, [frames - 1]])
        places = rng.permutation(slots)[:used]
        first[places, token], last[places, token] = FRAME_S * begins, FRAME_S * ends
    attention = rng.gamma(0.5, size=(3, slots, tokens)) * np.isfinite(first)
    return (attention / attention.sum((1, 2), keepdims=True)).astype(np.float32), first, last


def slow_moments(attention, first, last, interval: Interval | None) -> list[tuple[float, float, float, float]]:
    """Count on a grid, one cell for each half of a frame's time: every slot of every token puts its attention down evenly."""
    cell = FRAME_S / 2
    begin = np.nanmin(first) - cell
    cells = round((np.nanmax(last) + cell - begin) / cell)
    centre = begin + cell * (np.arange(cells) + 0.5)
    share, part = np.zeros(cells), np.zeros(cells)
    read = np.argwhere(attention.mean(0) > 0)
    for slot, token in read:
        inside = (centre > first[slot, token] - cell) & (centre < last[slot, token] + cell)
        if interval is not None:
            inside &= (centre > interval.start_s - cell) & (centre < interval.end_s + cell)
        share[inside] += attention[:, slot, token].astype(float).mean() / inside.sum()
        part[inside] += 1 / len(read) / inside.sum()
    share /= share.sum()
    found, k = [], 0
    while k < cells:
        if share[k] - part[k] > 1e-7:
            end = k
            while end < cells and share[end] - part[end] > 1e-7:
                end += 1
            found.append((centre[k], centre[end - 1], share[k:end].sum(), part[k:end].sum()))
            k = end
        k += 1
    return sorted(found, key=lambda one: one[3] - one[2])


@pytest.mark.parametrize("interval", [None, Interval(3.0, 7.5)])
@pytest.mark.parametrize("seed", range(20))
def test_moments_equal_a_slow_count_over_time(seed: int, interval: Interval | None) -> None:
    attention, first, last = random_slots(seed)
    if interval is not None:
        attention = attention * interval.overlaps(first, last)
        attention /= attention.sum((1, 2), keepdims=True)
    got = moments_of(attention, first, last, frame_s=FRAME_S, interval=interval, count=99)
    wanted = slow_moments(attention, first, last, interval)
    assert len(got) == len(wanted) > 0
    for moment, (centre_from, centre_to, share, part) in zip(got, wanted, strict=True):
        assert (moment.share, moment.part) == pytest.approx((share, part), abs=1e-6)
        # A moment goes from its first frame to its last: half a frame inside its edges, which are half a cell outside.
        edges = centre_from + FRAME_S / 4, centre_to - FRAME_S / 4
        middle = sum(edges) / 2
        assert (moment.start_s, moment.end_s) == pytest.approx((min(edges[0], middle), max(edges[1], middle)))


def test_a_scene_that_every_token_looks_at_is_the_moment() -> None:
    first = np.array([0.0, 2.0, 4.0])[:, None].repeat(4, 1)
    last = np.array([1.5, 3.5, 4.0])[:, None].repeat(4, 1)
    attention = np.array([0.1, 0.8, 0.1], np.float32)[None, :, None].repeat(4, 2) / 4
    [moment] = moments_of(attention, first, last, frame_s=FRAME_S)
    assert (moment.start_s, moment.end_s) == pytest.approx((2.0, 3.5))
    assert moment.share == pytest.approx(0.8) and moment.part == pytest.approx(1 / 3)


def test_attention_that_is_the_same_everywhere_is_one_moment() -> None:
    first, last = np.array([[0.0, 0.0], [2.0, 3.0]]), np.array([[1.5, 2.5], [4.0, 4.0]])
    [moment] = moments_of(np.full((1, 2, 2), 0.25, np.float32), first, last, frame_s=FRAME_S)
    assert (moment.start_s, moment.end_s, moment.share) == pytest.approx((0.0, 4.0, 1.0))
    assert moments_of(np.zeros((1, 2, 2), np.float32), first, last, frame_s=FRAME_S) == []


# -- key frames ------------------------------------------------------------------------------------------------------


def picture(level: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def features(direction: int, noise: float = 0.0, seed: int = 0, channels: int = 64) -> np.ndarray:
    rng = np.random.default_rng([direction, seed])
    return np.eye(channels, dtype=np.float32)[direction] + noise * rng.standard_normal((3, channels)).astype(np.float32)


def filled(limit: int, scenes: list[int], **options: float) -> KeyFrames:
    kept = KeyFrames(limit=limit, **options)
    for index, scene in enumerate(scenes):
        kept.take(picture(scene), features(scene, 0.05, index), float(index))
    return kept


def test_the_older_of_the_most_alike_neighbours_goes_first() -> None:
    kept = filled(5, [0] * 10 + [1] + [2] * 10 + [3] + [4] * 10)
    assert [frame.time_s for frame in kept.frames] == [9, 10, 20, 21, 31]  # of every scene its last


def slow_drops(limit: int, pooled: list[np.ndarray]) -> list[int]:
    kept: list[int] = []
    for index in range(len(pooled)):
        kept.append(index)
        if len(kept) > limit:
            alike = [float(pooled[a] @ pooled[b]) for a, b in pairwise(kept)]
            del kept[alike.index(max(alike))]
    return kept


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(1, 6), scenes=st.lists(st.integers(0, 5), min_size=1, max_size=25))
def test_drops_equal_the_rule_counted_anew(limit: int, scenes: list[int]) -> None:
    pooled = [features(scene, 0.05, index).mean(0) for index, scene in enumerate(scenes)]
    pooled = [row / np.linalg.norm(row) for row in pooled]
    kept = filled(limit, scenes)
    assert [frame.time_s for frame in kept.frames] == slow_drops(limit, pooled)
    assert len(kept) <= limit and kept.frames[-1].time_s == len(scenes) - 1


def test_pictures_never_exceed_the_budget() -> None:
    rng = np.random.default_rng(0)
    kept = KeyFrames(limit=1000, budget_bytes=40_000)
    for index in range(60):
        kept.take(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8), features(index % 7), float(index))
        assert kept.nbytes <= 40_000
    assert len(kept) > 3
    tiny = KeyFrames(budget_bytes=100)
    tiny.take(picture(3), features(0), 0.0)
    assert len(tiny) == 0


def test_frames_are_taken_at_most_so_often() -> None:
    kept = KeyFrames(every_s=1.0)
    taken = []
    for time_s in np.arange(0, 5, 0.25):
        if kept.wants(float(time_s)):
            kept.take(picture(1), features(0), float(time_s))
            taken.append(float(time_s))
    assert taken == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_saved_store_is_the_same_and_goes_on_alike() -> None:
    kept, again = filled(6, [0, 0, 1, 2, 2, 3, 3, 3]), KeyFrames(limit=6)
    again.restore(kept.state())
    for store in (kept, again):
        store.take(picture(5), features(5), 8.0)
    assert [(f.time_s, f.jpeg) for f in again.frames] == [(f.time_s, f.jpeg) for f in kept.frames]
    assert not again.wants(8.25)
    smaller = KeyFrames(limit=2)
    smaller.restore(kept.state())
    assert len(smaller) == 2
    with pytest.raises(UsageError, match="no key frames"):
        again.restore({**kept.state(), "ends": np.array([5, 3])})
    empty = KeyFrames()
    empty.restore(KeyFrames().state())
    assert len(empty) == 0


def test_time_does_not_go_back_and_settings_make_sense(tmp_path) -> None:
    kept = filled(4, [0, 1])
    with pytest.raises(UsageError, match="went back"):
        kept.take(picture(0), features(0), 0.5)
    for wrong in ({"limit": 0}, {"budget_bytes": 0}, {"every_s": -1.0}, {"every_s": math.nan}, {"quality": 96}):
        with pytest.raises(UsageError):
            KeyFrames(**wrong)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        write_key_frames(kept.frames, tmp_path / "file")


def test_each_moment_has_the_picture_nearest_to_its_middle(tmp_path) -> None:
    first, last = np.array([[0.0], [4.0]]), np.array([[3.0], [9.0]])
    attention = np.array([[[0.2], [0.8]]], np.float32)
    kept = filled(10, list(range(10)))
    evidence = evidence_of(moments_of(attention, first, last, frame_s=1.0), kept, 1.0)
    assert [frame.time_s for frame in evidence.frames] == [6.0]
    [path] = write_key_frames(evidence.frames, tmp_path / "new" / "folder")
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "JPEG" and abs(np.asarray(image).astype(int) - 6).max() <= 3
    assert evidence_of(moments_of(attention, first, last, frame_s=1.0), KeyFrames(), 1.0).frames == ()
