"""Properties of a memory bank that hold whatever the stream: what a slot holds is told by its span and its size alone.

`test_memory.py` compares banks with a plain one that does the same things; here nothing is simulated. All that is kept is the
frames themselves, and each slot must be the mean of exactly those that its span covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.memory import MemoryBank, Policy, Rider

POLICIES: list[Policy] = ["mbc", "fifo", "average", "last"]


@dataclass(frozen=True, eq=False)
class Stream:
    """Frames `[T, G, n, C]` float64 at rising moments `[T]`; `settled` says after which frames somebody settles the bank."""

    frames: np.ndarray
    times_s: np.ndarray
    settled: np.ndarray


@dataclass(frozen=True)
class Shape:
    length: int
    tokens: int
    groups: int
    channels: int
    current_outside: bool


shapes = st.builds(
    Shape,
    length=st.integers(1, 6),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    current_outside=st.booleans(),
)


def make_stream(shape: Shape, count: int, seed: int, kind: str) -> Stream:
    """Random frames; held scenes with noise; the same few frames over and over, exact ties among them; or zeros in between."""
    rng = np.random.default_rng(seed)
    size = (count, shape.groups, shape.tokens, shape.channels)
    frames = rng.standard_normal(size)
    if kind == "scenes":
        frames = frames[np.arange(count) // 3] + 0.05 * rng.standard_normal(size)
    elif kind == "repeats":
        frames = frames[rng.integers(0, min(3, count), count)]
    elif kind == "zeros":
        frames *= rng.random((count, 1, 1, 1)) < 0.6
    return Stream(frames, np.cumsum(rng.uniform(0.01, 50, count)), rng.random(count) < 0.4)


streams = st.tuples(st.integers(1, 24), st.integers(0, 2**32 - 1), st.sampled_from(["random", "scenes", "repeats", "zeros"]))


def bank_of(shape: Shape, policy: Policy, riders: dict[str, Rider] | None = None) -> MemoryBank:
    return MemoryBank(
        length=shape.length, tokens=shape.tokens, channels=shape.channels, groups=shape.groups, riders=riders, policy=policy,
        current_outside=shape.current_outside, dtype=np.float64,
    )  # fmt: skip


def by_time(bank: MemoryBank, values: np.ndarray) -> np.ndarray:
    """Values `[G, S, n]` of the slots in use, oldest first: `[G, used, n]`."""
    return np.take_along_axis(values, bank.order, axis=1)


def assert_slots_are_the_means_of_what_they_cover(bank: MemoryBank, stream: Stream, seen: int) -> None:
    rows, sizes = bank.in_time_order()
    first, last = by_time(bank, bank.first_s), by_time(bank, bank.last_s)
    for group in range(bank.groups):
        for token in range(bank.tokens):
            for place in range(bank.used):
                times = stream.times_s[:seen]
                covered = (times >= first[group, place, token]) & (times <= last[group, place, token])
                frames = stream.frames[:seen][covered][:, group, token]
                assert len(frames) == sizes[group, place, token]
                assert {first[group, place, token], last[group, place, token]} <= set(times)
                assert np.allclose(rows[group, place, token], frames.mean(axis=0), rtol=0, atol=1e-12)


def assert_spans_are_disjoint_and_in_order(bank: MemoryBank) -> None:
    first, last = by_time(bank, bank.first_s), by_time(bank, bank.last_s)
    assert (first <= last).all()
    assert (last[:, :-1] < first[:, 1:]).all()
    rank = by_time(bank, bank.rank_of_slot)
    assert (np.diff(rank, axis=1) == 1).all() and (not bank.used or (rank[:, -1] == bank.slots - 1).all())


def assert_nothing_is_lost_or_counted_twice(bank: MemoryBank, stream: Stream, seen: int) -> None:
    """Merging policies count every frame; `fifo` and `last` are gapless up to the newest frame they still have."""
    sizes = bank.sizes.sum(axis=1)
    first, last = by_time(bank, bank.first_s), by_time(bank, bank.last_s)
    if bank.policy in ("mbc", "average"):
        assert (sizes == seen).all()
        assert (first[:, 0] == stream.times_s[0]).all()
    else:
        assert (by_time(bank, bank.sizes) == 1).all() and (sizes == bank.used).all()
        assert bank.used <= (bank.slots if bank.policy == "fifo" else 1)
    if bank.used:
        assert (last[:, -1] == stream.times_s[seen - 1]).all()
        kept = np.arange(seen - int(sizes[0, 0]), seen)
        assert (first[:, 0] == stream.times_s[kept[0]]).all()
    assert bank.used <= bank.slots and bank.frames_seen == seen


@settings(max_examples=150, deadline=None)
@given(shape=shapes, stream=streams, policy=st.sampled_from(POLICIES))
def test_every_slot_is_the_mean_of_exactly_the_frames_of_its_span(
    shape: Shape, stream: tuple[int, int, str], policy: Policy
) -> None:
    bank, made = bank_of(shape, policy), make_stream(shape, *stream)
    for index, (frame, time_s) in enumerate(zip(made.frames, made.times_s, strict=True)):
        bank.append(frame, time_s=float(time_s))
        if made.settled[index]:
            bank.settle()
        assert_slots_are_the_means_of_what_they_cover(bank, made, index + 1)
        assert_spans_are_disjoint_and_in_order(bank)
        assert_nothing_is_lost_or_counted_twice(bank, made, index + 1)


@settings(max_examples=80, deadline=None)
@given(shape=shapes, stream=streams, seed=st.integers(0, 2**32 - 1))
def test_so_it_is_whichever_neighbours_are_merged(shape: Shape, stream: tuple[int, int, str], seed: int) -> None:
    """Merges that are forced, each token's at random: the books do not depend on what was most similar."""
    rng = np.random.default_rng(seed)
    bank, made = bank_of(shape, "mbc"), make_stream(shape, *stream)
    for index, (frame, time_s) in enumerate(zip(made.frames, made.times_s, strict=True)):
        if bank.used > bank.length:
            bank.settle(rng.integers(0, bank.used - 1, (bank.groups, bank.tokens)))
        bank.append(frame, time_s=float(time_s))
        assert_slots_are_the_means_of_what_they_cover(bank, made, index + 1)
        assert_spans_are_disjoint_and_in_order(bank)
        assert_nothing_is_lost_or_counted_twice(bank, made, index + 1)


@settings(max_examples=80, deadline=None)
@given(shape=shapes, stream=streams, policy=st.sampled_from(POLICIES), groups=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_riders_are_affine_images_of_the_slots_at_every_moment(
    shape: Shape, stream: tuple[int, int, str], policy: Policy, groups: int, seed: int
) -> None:
    """Another map for each of a rider's groups, and of each size: a bank of one group may have riders of any number of them."""
    rng = np.random.default_rng(seed)
    counts = {"k": shape.groups if shape.groups > 1 else groups, "v": shape.groups}
    maps = {
        name: (rng.standard_normal((count, shape.channels, 3)), rng.standard_normal((count, 1, 3)))
        for name, count in counts.items()
    }
    bank = bank_of(shape, policy, {name: Rider(count, 3) for name, count in counts.items()})
    made = make_stream(shape, *stream)
    for index, (frame, time_s) in enumerate(zip(made.frames, made.times_s, strict=True)):
        bank.append(frame, time_s=float(time_s), riders={name: frame @ weight + bias for name, (weight, bias) in maps.items()})
        if made.settled[index]:
            bank.settle()
        for name, (weight, bias) in maps.items():
            image = bank.features @ weight[:, None] + bias[:, None]
            used = np.broadcast_to(bank.visible, bank.riders[name].shape[:3])
            assert np.allclose(bank.riders[name][used], image[used], rtol=0, atol=1e-11)


@settings(max_examples=80, deadline=None)
@given(shape=shapes, stream=streams, policy=st.sampled_from(POLICIES))
def test_when_somebody_settles_changes_nothing_that_is_read(
    shape: Shape, stream: tuple[int, int, str], policy: Policy
) -> None:
    """A reader of query rows settles before it reads; doing so earlier, or twice, must not change what the next frame shows."""
    early, late, made = bank_of(shape, policy), bank_of(shape, policy), make_stream(shape, *stream)
    for index, (frame, time_s) in enumerate(zip(made.frames, made.times_s, strict=True)):
        for bank in (early, late):
            bank.append(frame, time_s=float(time_s))
        assert np.array_equal(early.in_time_order()[0], late.in_time_order()[0])
        assert np.array_equal(early.past, early.visible & (early.rank_of_slot < early.slots - 1))
        if made.settled[index]:
            early.settle()
            early.settle()


@settings(max_examples=80, deadline=None)
@given(shape=shapes, stream=streams, seed=st.integers(0, 2**32 - 1))
def test_tokens_and_groups_know_nothing_of_each_other(shape: Shape, stream: tuple[int, int, str], seed: int) -> None:
    """One token alone in a bank of its own remembers what it remembers among the others."""
    rng = np.random.default_rng(seed)
    made = make_stream(shape, *stream)
    group, token = int(rng.integers(shape.groups)), int(rng.integers(shape.tokens))
    together = bank_of(shape, "mbc")
    alone = MemoryBank(
        length=shape.length, tokens=1, channels=shape.channels, current_outside=shape.current_outside, dtype=np.float64
    )
    for frame, time_s in zip(made.frames, made.times_s, strict=True):
        together.append(frame, time_s=float(time_s))
        alone.append(frame[group, token][None], time_s=float(time_s))
    assert np.allclose(together.in_time_order()[0][group, :, token], alone.in_time_order()[0][0, :, 0], rtol=0, atol=1e-12)
    assert np.array_equal(by_time(together, together.last_s)[group, :, token], by_time(alone, alone.last_s)[0, :, 0])
