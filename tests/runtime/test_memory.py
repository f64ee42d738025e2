"""The memory bank equals a plain, slow one at every frame, whatever its sizes, policy and data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.memory import MemoryBank, Rider
from keepsight.streams.errors import UsageError

from .naive_memory import NaiveBank, Slot, cosine

POLICIES = ["mbc", "fifo", "average", "last"]


def stream(frames, groups, tokens, channels, *, seed=0, hold=1):
    """Features [T, G, n, C] float64: scenes of `hold` frames with a little noise."""
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((frames // hold + 1, groups, tokens, channels))
    noise = rng.standard_normal((frames, groups, tokens, channels))
    return scenes[np.arange(frames) // hold] + (0.3 * noise if hold > 1 else 0)


def affine(rows, groups, width, seed=1):
    """An affine image [G', n, H] of rows [G, n, C], another one for every rider group."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((groups, rows.shape[-1], width)), rng.standard_normal((groups, 1, width))
    return rows @ weight + bias


def naive_view(seen: list[list[list[Slot]]]):
    """The reader's view as arrays [G, count, n, ...], oldest first."""

    def stacked(field):
        return np.array([[[getattr(s, field) for s in token] for token in group] for group in seen]).swapaxes(1, 2)

    return stacked("row"), stacked("size"), stacked("first_s"), stacked("last_s")


def assert_view_equals(bank: MemoryBank, seen):
    """What is in use in the bank, in time order, is what the naive bank shows."""
    rows, sizes, first_s, last_s = naive_view(seen)
    assert bank.used == rows.shape[1]
    features, _ = bank.in_time_order()
    assert np.allclose(features, rows.reshape(features.shape), rtol=0, atol=1e-12)
    for ours, theirs in ((bank.sizes, sizes), (bank.first_s, first_s), (bank.last_s, last_s)):
        in_order = np.take_along_axis(ours, bank.order, axis=1)
        assert np.array_equal(in_order, theirs.reshape(in_order.shape))


def assert_bookkeeping_holds(bank: MemoryBank):
    visible, rank, order = bank.visible, bank.rank_of_slot, bank.order
    assert np.array_equal(visible, rank >= 0)
    assert np.array_equal(visible, bank.sizes > 0)
    assert np.array_equal(visible, ~np.isnan(bank.first_s))
    assert np.array_equal(visible, ~np.isnan(bank.last_s))
    assert (visible.sum(axis=1) == bank.used).all()
    if bank.used:
        ranks = np.take_along_axis(rank, order, axis=1)
        assert (ranks == np.arange(bank.slots - bank.used, bank.slots)[:, None]).all()
        assert np.array_equal(np.take_along_axis(bank.past, order, axis=1), ranks < bank.slots - 1)


def watch(bank: MemoryBank, frames, *, similarity=cosine):
    """Feed both banks the same frames [T, G, n, C] and compare what each reader sees."""
    naive = NaiveBank(
        length=bank.length,
        tokens=bank.tokens,
        groups=bank.groups,
        policy=bank.policy,
        current_outside=bank.current_outside,
        similarity=similarity,
    )
    for t, frame in enumerate(frames):
        time_s = 0.5 * t
        seen = naive.see(frame, time_s)
        if bank.current_outside:
            bank.settle()
            assert_view_equals(bank, seen)
            bank.append(frame, time_s=time_s)
        else:
            bank.append(frame, time_s=time_s)
            assert_view_equals(bank, seen)
        if bank.policy == "mbc":
            assert np.array_equal(bank.last_merge, naive.merged), f"decisions differ at frame {t}"
        assert_bookkeeping_holds(bank)
    assert bank.frames_seen == len(frames)


# -- equal to the naive bank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("current_outside", [False, True])
@pytest.mark.parametrize(
    ("length", "frames", "tokens", "groups", "channels"),
    [
        (1, 6, 3, 1, 5),  # the smallest bank: every merge is of the only pair
        (2, 9, 1, 1, 4),  # one token
        (3, 3, 4, 2, 6),  # never full
        (3, 4, 4, 2, 6),  # full at the last frame, never merged
        (3, 5, 4, 2, 6),  # merged once
        (5, 40, 3, 4, 8),  # the query bank's layout
        (10, 60, 5, 1, 7),  # the tiny bundle's length
        (4, 200, 2, 1, 3),  # far longer than the bank
    ],
)
def test_mbc_makes_the_naive_decisions_and_values(length, frames, tokens, groups, channels, current_outside):
    bank = MemoryBank(
        length=length,
        tokens=tokens,
        channels=channels,
        groups=groups,
        current_outside=current_outside,
        dtype=np.float64,
    )
    watch(bank, stream(frames, groups, tokens, channels, seed=length, hold=1))


@pytest.mark.parametrize("current_outside", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_shows_what_its_description_says(policy, current_outside):
    bank = MemoryBank(
        length=4, tokens=3, channels=5, groups=2, policy=policy, current_outside=current_outside, dtype=np.float64
    )
    watch(bank, stream(30, 2, 3, 5, hold=3))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 6),
    frames=st.integers(1, 25),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 3),
    channels=st.integers(2, 6),
    hold=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(POLICIES),
    current_outside=st.booleans(),
)
def test_any_bank_on_any_stream_equals_the_naive_one(
    length, frames, tokens, groups, channels, hold, seed, policy, current_outside
):
    bank = MemoryBank(
        length=length,
        tokens=tokens,
        channels=channels,
        groups=groups,
        policy=policy,
        current_outside=current_outside,
        dtype=np.float64,
    )
    watch(bank, stream(frames, groups, tokens, channels, seed=seed, hold=hold))


def test_equals_the_naive_bank_at_the_dims_of_the_full_size_model():
    def fast_cosine(a, b):
        return float(a @ b) / (max(float(np.linalg.norm(a)), 1e-8) * max(float(np.linalg.norm(b)), 1e-8))

    bank = MemoryBank(length=5, tokens=257, channels=1408, dtype=np.float64)
    watch(bank, stream(12, 1, 257, 1408), similarity=fast_cosine)


def test_float32_keeps_close_to_the_double_bank_with_equal_decisions():
    frames = stream(60, 1, 20, 64, hold=4).astype(np.float32)
    single = MemoryBank(length=6, tokens=20, channels=64)
    double = MemoryBank(length=6, tokens=20, channels=64, dtype=np.float64)
    for t, frame in enumerate(frames):
        single.append(frame, time_s=t)
        double.append(frame, time_s=t)
        assert np.array_equal(single.last_merge, double.last_merge)
    assert np.allclose(single.in_time_order()[0], double.in_time_order()[0], rtol=0, atol=2e-6)


def test_double_rows_in_a_single_bank_decide_as_they_are_stored():
    frames = stream(40, 1, 8, 6, hold=3)
    rounded, given_double = (MemoryBank(length=4, tokens=8, channels=6) for _ in range(2))
    for t, frame in enumerate(frames):
        rounded.append(frame.astype(np.float32), time_s=t)
        given_double.append(frame, time_s=t)
    assert np.array_equal(rounded.features, given_double.features)
    assert np.array_equal(rounded._similarity, given_double._similarity)


# -- details of a merge --------------------------------------------------------------------------------------------


def test_ties_go_to_the_oldest_pair():
    # Unit vectors along different axes: every cosine is exactly 0.
    bank = MemoryBank(length=3, tokens=1, channels=5, dtype=np.float64)
    for t in range(5):
        bank.append(np.eye(5)[t][None], time_s=t)
    assert bank.last_merge[0, 0] == 0
    assert bank.in_time_order()[1][0, :, 0].tolist() == [2, 1, 1, 1]


def test_the_mean_is_weighted_by_the_frames_in_each_slot():
    bank = MemoryBank(length=1, tokens=1, channels=1, dtype=np.float64)
    for t, value in enumerate((3.0, 6.0, 9.0, 0.0)):
        bank.append(np.array([[value]]), time_s=t)
    features, sizes = bank.in_time_order()
    assert features[0, :, 0, 0].tolist() == [6.0, 0.0]  # (3 + 6 + 9) / 3, where the paper's /2 would give 6.75
    assert sizes[0, :, 0].tolist() == [3, 1]


def test_zero_rows_have_similarity_zero_with_anything():
    # By the reference's eps. -1 against 1 is the worst pair, zeros lie between, so the pair of zeros wins by order.
    rows = [[1.0], [-1.0], [0.0], [0.0]]
    bank = MemoryBank(length=2, tokens=1, channels=1, dtype=np.float64)
    for t, row in enumerate(rows):
        bank.append(np.array([row]), time_s=t)
    assert bank.last_merge[0, 0] == 1
    watch(MemoryBank(length=2, tokens=1, channels=1, dtype=np.float64), np.array(rows)[:, None, None])


def test_a_static_scene_does_not_drift_in_float32():
    frame = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    bank = MemoryBank(length=2, tokens=3, channels=8, riders={"k": Rider(2, 4)})
    keys = affine(frame[None], 2, 4).astype(np.float32)
    for t in range(3000):
        bank.append(frame, time_s=t, riders={"k": keys})
    assert np.array_equal(bank.features, np.broadcast_to(frame, bank.features.shape))
    assert np.array_equal(bank.riders["k"], np.broadcast_to(keys[:, None], bank.riders["k"].shape))


def test_the_merge_is_due_at_the_next_frame_and_runs_once():
    frames = stream(6, 1, 2, 4)
    bank = MemoryBank(length=3, tokens=2, channels=4, dtype=np.float64)
    for t in range(4):
        bank.append(frames[t], time_s=t)
    assert bank.used == 4
    assert (bank.last_merge == -1).all()
    bank.settle()
    merged, decision = bank.in_time_order()[0], bank.last_merge.copy()
    assert bank.used == 3
    assert (decision >= 0).all()
    bank.settle()
    assert np.array_equal(bank.in_time_order()[0], merged)
    bank.append(frames[4], time_s=4)
    assert np.array_equal(bank.last_merge, decision)
    assert np.array_equal(bank.in_time_order()[0][:, :3], merged)


@pytest.mark.parametrize("policy", POLICIES)
def test_past_is_what_a_query_bank_showed_before_its_newest_rows(policy):
    bank = MemoryBank(length=3, tokens=2, channels=4, groups=2, policy=policy, current_outside=True)
    for t, frame in enumerate(stream(8, 2, 2, 4)):
        bank.settle()
        shown, held = bank.visible, bank.features[bank.visible]
        bank.append(frame, time_s=t)
        assert np.array_equal(bank.past, shown)
        assert np.array_equal(bank.features[bank.past], held)


# -- riders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "rider_groups"), [(1, 1), (1, 3), (4, 4)])
@pytest.mark.parametrize("policy", POLICIES)
def test_riders_stay_the_affine_image_of_the_merged_features(policy, groups, rider_groups):
    bank = MemoryBank(
        length=4,
        tokens=3,
        channels=6,
        groups=groups,
        riders={"k": Rider(rider_groups, 5), "v": Rider(rider_groups, 2)},
        policy=policy,
        dtype=np.float64,
    )
    for t, frame in enumerate(stream(25, groups, 3, 6, hold=2)):
        riders = {"k": affine(frame, rider_groups, 5, seed=8), "v": affine(frame, rider_groups, 2, seed=9)}
        bank.append(frame, time_s=t, riders=riders)
        for name, width, seed in (("k", 5, 8), ("v", 2, 9)):
            for slot in range(bank.slots):
                expected = affine(bank.features[:, slot], rider_groups, width, seed=seed)
                used = np.broadcast_to(bank.visible[:, slot], expected.shape[:2])
                assert np.allclose(bank.riders[name][:, slot][used], expected[used], rtol=0, atol=1e-12)


# -- invariants ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 5), frames=st.integers(1, 30), outside=st.booleans(), seed=st.integers(0, 1000))
def test_sizes_sum_to_the_frames_seen_and_spans_cover_them_in_order(length, frames, outside, seed):
    bank = MemoryBank(length=length, tokens=3, channels=4, current_outside=outside, dtype=np.float64)
    for t, frame in enumerate(stream(frames, 1, 3, 4, seed=seed)):
        bank.append(frame, time_s=float(t))
        assert (bank.sizes.sum(axis=1) == t + 1).all()
        first = np.take_along_axis(bank.first_s, bank.order, axis=1)
        last = np.take_along_axis(bank.last_s, bank.order, axis=1)
        assert (first[:, 0] == 0).all()
        assert (last[:, -1] == t).all()
        assert np.array_equal(first[:, 1:], last[:, :-1] + 1)
        assert np.array_equal(last - first + 1, bank.in_time_order()[1])


@pytest.mark.parametrize("length", [3, 12])
def test_a_step_moves_no_feature_data_whatever_the_length(length):
    tokens, frames = 4, stream(60, 1, 4, 8)
    bank = MemoryBank(length=length, tokens=tokens, channels=8, riders={"k": Rider(2, 3)}, dtype=np.float64)
    where = bank.features.ctypes.data, bank.riders["k"].ctypes.data
    for t, frame in enumerate(frames):
        before = bank.features.copy(), bank.riders["k"].copy()
        bank.append(frame, time_s=t, riders={"k": affine(frame[None, 0], 2, 3)})
        for old, new in zip(before, (bank.features, bank.riders["k"]), strict=True):
            changed = (old != new).any(axis=-1).sum(axis=1)  # slots per group and token
            assert (changed == (1 if t <= length else 2)).all()  # the frame's slot; once full, the merged one too
    assert where == (bank.features.ctypes.data, bank.riders["k"].ctypes.data)


def test_memory_is_fixed_and_values_stay_finite_over_a_long_stream():
    bank = MemoryBank(length=3, tokens=2, channels=4, riders={"k": Rider(1, 2)})
    nbytes, rng = bank.nbytes, np.random.default_rng(0)
    for t in range(5000):
        bank.append(rng.standard_normal((2, 4)), time_s=t * 0.1, riders={"k": rng.standard_normal((1, 2, 2))})
    assert bank.nbytes == nbytes
    assert (bank.sizes.sum(axis=1) == 5000).all()
    assert np.isfinite(bank.features).all()
    assert np.isfinite(bank.riders["k"]).all()


def test_slots_out_of_use_are_finite_before_the_first_frame_and_after_reset():
    bank = MemoryBank(length=3, tokens=2, channels=4)
    assert np.isfinite(bank.features).all()
    assert not bank.visible.any()
    for t, frame in enumerate(stream(9, 1, 2, 4)):
        bank.append(frame, time_s=t)
    bank.reset()
    assert np.isfinite(bank.features).all()
    assert not bank.visible.any()
    assert bank.used == bank.frames_seen == 0
    assert (bank.rank_of_slot == -1).all()


def test_after_reset_a_bank_is_as_good_as_new():
    bank = MemoryBank(length=3, tokens=2, channels=4, dtype=np.float64)
    watch(bank, stream(9, 1, 2, 4, seed=1))
    bank.reset()
    watch(bank, stream(11, 1, 2, 4, seed=2))


# -- refusals ------------------------------------------------------------------------------------------------------


def good_bank():
    return MemoryBank(length=2, tokens=3, channels=4, riders={"k": Rider(2, 5)})


ROWS, KEYS = np.zeros((3, 4), np.float32), np.zeros((2, 3, 5), np.float32)


@pytest.mark.parametrize(
    ("features", "time_s", "riders", "message"),
    [
        (np.zeros((4, 3), np.float32), 1.0, {"k": KEYS}, r"features must have the shape \[1, 3, 4\]"),
        (np.zeros((3, 4), np.uint8), 1.0, {"k": KEYS}, "features must be floats, got uint8"),
        (np.full((3, 4), np.nan), 1.0, {"k": KEYS}, "nan or inf"),
        (np.full((3, 4), np.inf), 1.0, {"k": KEYS}, "nan or inf"),
        (ROWS, 1.0, {}, r"riders \[\], the bank has \['k'\]"),
        (ROWS, 1.0, {"k": KEYS, "v": KEYS}, "riders"),
        (ROWS, 1.0, {"k": KEYS[:1]}, r"rider 'k' must have the shape \[2, 3, 5\]"),
        (ROWS, 0.5, {"k": KEYS}, r"went back from 1.000 s to 0.500 s"),
        (ROWS, float("nan"), {"k": KEYS}, "frame time is nan"),
    ],
)
def test_append_refuses_what_does_not_fit_and_leaves_the_bank_as_it_was(features, time_s, riders, message):
    bank = good_bank()
    for t in (0.0, 0.5, 1.0):
        bank.append(ROWS + 1, time_s=t, riders={"k": KEYS})
    before = bank.in_time_order()
    with pytest.raises(UsageError, match=message):
        bank.append(features, time_s=time_s, riders=riders)
    assert bank.used == bank.frames_seen == 3
    for old, new in zip(before, bank.in_time_order(), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length of at least 1, got 0"),
        ({"channels": 0}, "channels of at least 1"),
        ({"policy": "lru"}, "unknown memory policy 'lru'. Use one of mbc, fifo, average, last"),
        ({"dtype": np.float16}, "can't be float16"),
        ({"groups": 2, "riders": {"k": Rider(3, 4)}}, "rider 'k' has 3 groups and the bank 2"),
        ({"riders": {"k": Rider(1, 0)}}, r"riders\['k'\].channels of at least 1"),
    ],
)
def test_a_bank_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        MemoryBank(**{"length": 2, "tokens": 3, "channels": 4, **change})
