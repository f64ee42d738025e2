"""A memory bank that is told to store fewer slots equals a plain one that repeats the policy's merges until so few are left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.memory import MemoryBank, Rider
from keepsight.runtime.pages import give_back
from keepsight.runtime.session import Session
from keepsight.streams import Frame
from keepsight.streams.errors import UsageError

from ..random_bundle import IMAGE_SIZE, make_bundle
from .naive_memory import NaiveBank, compress, cosine
from .test_memory import POLICIES, affine, assert_bookkeeping_holds, assert_view_equals, stream


class ShrunkBank(NaiveBank):
    """The naive bank with a length that may change: room is made by the same step, as often as it takes."""

    def make_room(self, past):
        if self.policy != "mbc":
            return super().make_room(past)
        merge = -1
        while len(past) > self.length:
            past, merge = compress(past, self.similarity)
        return past, merge


def quick_cosine(a, b, eps=1e-8):
    """As `cosine`, for long rows."""
    norms = max(float(np.sqrt(a @ a)), eps) * max(float(np.sqrt(b @ b)), eps)
    return float(a @ b) / norms


def watch(bank: MemoryBank, frames, limits: Mapping[int, int], *, similarity=cosine, atol=1e-12) -> ShrunkBank:
    """Both banks see the frames `[T, G, n, C]`; before frame t both are limited to `limits[t]`. Riders stay affine images."""
    naive = ShrunkBank(
        length=bank.length, tokens=bank.tokens, groups=bank.groups, policy=bank.policy, current_outside=bank.current_outside,
        similarity=similarity,
    )  # fmt: skip
    for t, frame in enumerate(frames):
        if t in limits:
            naive.length = limits[t]
            before = bank.in_time_order()
            bank.limit_to(limits[t])
            for kept, now in zip(before, bank.in_time_order(), strict=True):  # nothing changes before the next reading
                assert np.array_equal(kept, now)
        riders = {name: affine(frame, len(slots), slots.shape[-1]) for name, slots in bank.riders.items()}
        seen = naive.see(frame, 0.5 * t)
        if bank.current_outside:
            bank.settle()
            assert_same(bank, seen, atol)
            bank.append(frame, time_s=0.5 * t, riders=riders)
        else:
            bank.append(frame, time_s=0.5 * t, riders=riders)
            assert_same(bank, seen, atol)
        assert_bookkeeping_holds(bank)
    return naive


def assert_same(bank: MemoryBank, seen, atol: float) -> None:
    if atol == 1e-12:
        assert_view_equals(bank, seen)
    features, sizes = bank.in_time_order()
    rows = np.array([[[slot.row for slot in token] for token in group] for group in seen]).swapaxes(1, 2)
    np.testing.assert_allclose(features, rows.reshape(features.shape), rtol=0, atol=atol)
    counts = np.array([[[slot.size for slot in token] for token in group] for group in seen]).swapaxes(1, 2)
    assert np.array_equal(sizes, counts.reshape(sizes.shape))
    assert all(np.isfinite(slots).all() for slots in (bank.features, *bank.riders.values()))
    if not bank.used:
        return
    for slots in bank.riders.values():
        found = np.take_along_axis(slots, bank.order[..., None].astype(np.intp), axis=1)
        wanted = np.stack([affine(row, len(slots), slots.shape[-1]) for row in features.swapaxes(0, 1)], axis=1)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=100 * atol)


@settings(max_examples=120, deadline=None)
@given(
    length=st.integers(1, 7),
    frames=st.integers(1, 30),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 3),
    hold=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(POLICIES),
    current_outside=st.booleans(),
    changes=st.dictionaries(st.integers(0, 29), st.integers(1, 7), max_size=5),
)
def test_at_any_moments_to_any_lengths(length, frames, tokens, groups, hold, seed, policy, current_outside, changes):
    bank = MemoryBank(
        length=length, tokens=tokens, channels=5, groups=groups, riders={"k": Rider(groups if groups > 1 else 2, 3)},
        policy=policy, current_outside=current_outside, dtype=np.float64,
    )  # fmt: skip
    limits = {moment: min(limit, length) for moment, limit in changes.items()}
    watch(bank, stream(frames, groups, tokens, 5, seed=seed, hold=hold), limits)


def test_the_visual_bank_at_real_size():
    """N=257, C=1408, M=20, full, then 10, then 20 again."""
    bank = MemoryBank(length=20, tokens=257, channels=1408, dtype=np.float64)
    naive = watch(bank, stream(28, 1, 257, 1408, hold=3), {23: 10, 25: 20}, similarity=quick_cosine, atol=1e-9)
    assert bank.used == 14 and len(naive.slots[0][0]) == 14


def test_a_query_bank_at_real_size():
    """32 queries and 32 text rows of H=768 in two of the layers, M=20, full, then 10."""
    bank = MemoryBank(
        length=20, tokens=64, channels=768, groups=2, riders={"k": Rider(2, 16)}, current_outside=True, dtype=np.float64
    )
    watch(bank, stream(30, 2, 64, 768, hold=3), {25: 10}, similarity=quick_cosine, atol=1e-9)
    assert bank.used == 11


def test_a_session_and_its_standing_questions_shrink_and_grow(tmp_path: Path):
    """The banks of a bundle's own graphs, against naive ones that get the same features and rows."""
    with Session(Bundle.open(make_bundle(tmp_path))) as session:
        early, rows, features = session.stand("what was there first?"), [], []
        append = early.carried.bank.append
        early.carried.bank.append = lambda values, **rest: (rows.append(np.array(values)), append(values, **rest))  # type: ignore[method-assign]
        session.observe(lambda values, _: features.append(np.array(values)[None]))
        rng, limits = np.random.default_rng(0), {8: 2, 15: 4}
        for index in range(20):
            if index in limits:
                session.remember_at_most(limits[index])
                late = session.stand("what is the color of the shape?")
                assert late.carried.bank.limit == limits[index]
            see(session, index, rng)
            assert np.isfinite(session.perceive(early).rows).all()
            assert np.isfinite(session.perceive("was there ever a red circle?").rows).all()
        for bank, shown, outside in ((session.qformer.bank, features, False), (early.carried.bank, rows, True)):
            naive = ShrunkBank(
                length=4, tokens=bank.tokens, groups=bank.groups, policy="mbc", current_outside=outside, similarity=quick_cosine
            )
            for index, frame in enumerate(shown):
                naive.length = limits.get(index, naive.length)
                naive.see(frame, index / 2)
            found, sizes = bank.in_time_order()
            assert np.array_equal(sizes, np.array([[[s.size for s in t] for t in g] for g in naive.slots]).swapaxes(1, 2))
            wanted = np.array([[[s.row for s in t] for t in g] for g in naive.slots]).swapaxes(1, 2)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
        with pytest.raises(UsageError, match="4 slots can't store 5"):
            session.remember_at_most(5)


def see(session: Session, index: int, rng: np.random.Generator) -> None:
    image = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    session.see(Frame(image, index / 2, index / 2, index))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_memory_of_slots_out_of_use_goes_back_and_stays_away():
    bank = MemoryBank(length=20, tokens=257, channels=1408, riders={"k": Rider(2, 768)})
    rng = np.random.default_rng(0)
    rows, keys = rng.standard_normal((3, 257, 1408)), rng.standard_normal((3, 2, 257, 768))

    def feed(start: int, count: int) -> int:
        for index in range(start, start + count):
            bank.append(rows[index % 3] + index, time_s=float(index), riders={"k": keys[index % 3]})
        return resident()

    full = feed(0, 25)
    bank.limit_to(10)
    freed = 10 / 21 * sum(slots.nbytes for slots in (bank.features, *bank.riders.values()))
    assert full - feed(25, 1) > 0.9 * freed
    assert full - feed(26, 40) > 0.9 * freed  # however long it goes on: freed slots are used again before others are touched
    assert np.isfinite(bank.features).all()


def test_a_shrunk_bank_is_saved_and_restored_bit_for_bit():
    def bank() -> MemoryBank:
        return MemoryBank(length=6, tokens=3, channels=4, riders={"k": Rider(2, 3)}, dtype=np.float64)

    first, second = bank(), bank()
    frames = stream(40, 1, 3, 4)
    watch(first, frames[:20], {11: 3})
    second.restore(first.state())
    second.limit_to(3)
    for index, frame in enumerate(frames[20:], 20):
        for one in (first, second):
            one.append(frame, time_s=float(index), riders={"k": affine(frame, 2, 3)})
    for name, values in first.state().items():
        assert np.array_equal(values, second.state()[name]), name
    assert second.used == 4


def test_only_whole_pages_within_an_array_are_given_back():
    array = np.ones(3 * 4096, np.uint8)
    inside = array[100:-100]
    given = give_back(inside)
    assert given in (4096, 8192) and (inside == 0).sum() == given
    assert (array[:100] == 1).all() and (array[-100:] == 1).all()
    assert give_back(np.ones(10)) == 0 and give_back(np.ones((4096, 8))[:, ::2]) == 0
