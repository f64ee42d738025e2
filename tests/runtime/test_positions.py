"""Position buckets equal a slow reading of their definition, for the step and for every step of a replay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keepsight.runtime.memory import MemoryBank
from keepsight.runtime.positions import (
    AgePositions,
    CurrentPositions,
    NonePositions,
    OrderPositions,
    ranks,
    step_mask,
)
from keepsight.streams.errors import UsageError

TOKENS = 5


def filled_bank(frames, *, length=4, policy="mbc", interval_s=0.7, start_s=100.0, seed=0):
    """A bank that has seen frames at uneven times, so that tokens differ in what their slots cover."""
    rng = np.random.default_rng(seed)
    bank = MemoryBank(length=length, tokens=TOKENS, channels=3, policy=policy)
    time_s = start_s
    for _ in range(frames):
        bank.append(rng.standard_normal((TOKENS, 3)), time_s=time_s)
        time_s += interval_s * rng.uniform(0.2, 3)
    return bank


def shown_slots(bank, visible, token):
    """Slots of a token that may be read, oldest first: (slot, rank) with the ranks right-aligned."""
    rank = bank.rank_of_slot[0, :, token]
    slots = [s for s in np.argsort(rank) if rank[s] >= 0 and (visible is None or visible[s, token])]
    return [(slot, bank.slots - len(slots) + place) for place, slot in enumerate(slots)]


def slow_ranks(bank, visible=None):
    result = np.full((bank.slots, TOKENS), -1)
    for token in range(TOKENS):
        for slot, rank in shown_slots(bank, visible, token):
            result[slot, token] = rank
    return result


def slow_replay(bank, bucket_of, visible=None):
    """Buckets [S_step, S_slot, N] by loops; bucket_of(steps back, age, span) -> bucket."""
    result = np.zeros((bank.slots, bank.slots, TOKENS), dtype=int)
    for step in range(bank.slots):
        read = {n: [(s, r) for s, r in shown_slots(bank, visible, n) if r <= step] for n in range(TOKENS)}
        newest = {n: bank.last_s[0, slots[-1][0], n] for n, slots in read.items() if slots}
        starts = [bank.first_s[0, s, n] for n, slots in read.items() for s, _ in slots]
        for token, slots in read.items():
            for slot, rank in slots:
                age = newest[token] - bank.last_s[0, slot, token]
                span = max(newest.values()) - min(starts)
                result[step, slot, token] = bucket_of(step - rank, age, span)
    return result


def order_bucket(time_buckets):
    def bucket(steps_back, age, span):
        time = min(time_buckets - 1, math.floor((time_buckets * age) / span)) if span > 0 else 0
        return 1 + steps_back * time_buckets + time

    return bucket


def age_bucket(edges_s):
    return lambda steps_back, age, span: 1 + sum(edge <= age for edge in edges_s)


EDGES = [0.5, 1, 2, 4, 8]
POLICIES = [
    (OrderPositions(5, 1), order_bucket(1)),
    (OrderPositions(5, 4), order_bucket(4)),
    (AgePositions(EDGES), age_bucket(EDGES)),
    (NonePositions(), lambda steps_back, age, span: 0),
]


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 40])
@pytest.mark.parametrize(("policy", "bucket_of"), POLICIES)
def test_step_and_replay_equal_the_slow_definition(policy, bucket_of, frames):
    bank = filled_bank(frames, seed=frames)
    expected = slow_replay(bank, bucket_of)
    assert np.array_equal(policy.replay(bank), expected)
    assert np.array_equal(policy.step(bank), expected[-1])
    assert policy.step(bank).dtype == policy.replay(bank).dtype == np.int32
    assert expected.max() < policy.buckets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("policy", "bucket_of"), POLICIES)
def test_a_replay_of_some_slots_ranks_and_ages_only_those(policy, bucket_of, seed):
    bank = filled_bank(20, seed=seed)
    visible = np.random.default_rng(seed).random((bank.slots, TOKENS)) < 0.5
    assert np.array_equal(ranks(bank, visible), slow_ranks(bank, visible))
    assert np.array_equal(policy.replay(bank, visible), slow_replay(bank, bucket_of, visible))


def test_slots_out_of_use_are_never_visible():
    bank = filled_bank(2)
    everything = np.ones((bank.slots, TOKENS), dtype=bool)
    assert np.array_equal(ranks(bank, everything), bank.rank_of_slot[0])
    assert np.array_equal(OrderPositions(5, 2).replay(bank, everything), OrderPositions(5, 2).replay(bank))


def test_nothing_visible_is_bucket_0_everywhere_and_no_step():
    bank = filled_bank(9)
    nothing = np.zeros((bank.slots, TOKENS), dtype=bool)
    assert not OrderPositions(5, 2).replay(bank, nothing).any()
    assert not AgePositions(EDGES).replay(bank, nothing).any()
    assert not step_mask(ranks(bank, nothing)).any()


def test_an_empty_bank_has_no_positions():
    bank = MemoryBank(length=4, tokens=TOKENS, channels=3)
    for policy, _ in POLICIES:
        assert not policy.step(bank).any()
        assert not policy.replay(bank).any()


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 40])
def test_the_marker_is_on_each_tokens_newest_slot_when_an_answer_is_made(frames):
    policy, bank = CurrentPositions(), filled_bank(frames, seed=frames)
    newest = np.zeros((bank.slots, TOKENS), dtype=int)
    for token in range(TOKENS):
        newest[shown_slots(bank, None, token)[-1][0], token] = 1
    assert np.array_equal(policy.answer(bank), newest)
    assert not policy.step(bank).any()  # what is banked is read without it
    replay = policy.replay(bank)
    assert np.array_equal(replay[-1], newest) and not replay[:-1].any()
    assert policy.buckets == 2 and replay.dtype == policy.step(bank).dtype == policy.answer(bank).dtype == np.int32


@pytest.mark.parametrize("seed", range(5))
def test_the_marker_of_a_replay_of_some_slots_is_on_the_newest_of_those(seed):
    bank = filled_bank(20, seed=seed)
    visible = np.random.default_rng(seed).random((bank.slots, TOKENS)) < 0.5
    replay = CurrentPositions().replay(bank, visible)
    for token in range(TOKENS):
        shown = shown_slots(bank, visible, token)
        expected = np.zeros(bank.slots, dtype=int)
        if shown:
            expected[shown[-1][0]] = 1
        assert np.array_equal(replay[-1, :, token], expected)
    assert not replay[:-1].any()


def test_other_policies_need_no_pass_of_their_own_for_an_answer():
    bank = filled_bank(9)
    assert [policy.answer(bank) for policy, _ in POLICIES] == [None] * len(POLICIES)


@pytest.mark.parametrize("frames", [1, 3, 5, 30])
def test_steps_with_something_to_read_are_those_of_the_slots_in_use(frames):
    bank = filled_bank(frames)
    expected = [0] * (bank.slots - bank.used) + [1] * bank.used
    assert step_mask(ranks(bank)).tolist() == expected
    assert step_mask(ranks(bank)).dtype == np.float32


def test_order_does_not_change_when_the_stream_is_slower():
    # Powers of two scale floats without rounding.
    policy = OrderPositions(5, 4)
    assert np.array_equal(
        policy.replay(filled_bank(30, interval_s=0.5, start_s=0)),
        policy.replay(filled_bank(30, interval_s=64.0, start_s=0)),
    )


def test_frames_of_one_moment_have_no_age():
    bank = filled_bank(9, interval_s=0.0)
    buckets = OrderPositions(5, 4).step(bank)
    assert np.array_equal(buckets, 1 + 4 * (bank.slots - 1 - bank.rank_of_slot[0]))


def test_the_newest_slot_is_bucket_1_and_the_oldest_moment_the_last_time_bucket():
    bank = MemoryBank(length=3, tokens=1, channels=2)
    for t in (0.0, 1.0, 7.0, 8.0):
        bank.append(np.ones((1, 2), np.float32), time_s=t)
    # Ages 8, 7, 1, 0 of a span of 8 s, in four time buckets; steps back 3, 2, 1, 0.
    assert OrderPositions(4, 4).step(bank)[:, 0].tolist() == [1 + 12 + 3, 1 + 8 + 3, 1 + 4 + 0, 1]


def test_an_age_on_an_edge_lies_above_it():
    bank = MemoryBank(length=3, tokens=1, channels=2)
    for t in (0.0, 1.0, 2.5, 3.0):
        bank.append(np.ones((1, 2), np.float32), time_s=t)
    assert AgePositions([0.5, 2.0]).step(bank)[:, 0].tolist() == [3, 3, 2, 1]  # ages 3, 2, 0.5, 0


@pytest.mark.parametrize("policy", ["fifo", "average", "last"])
def test_positions_read_any_policy_of_memory(policy):
    bank = filled_bank(12, policy=policy)
    assert np.array_equal(OrderPositions(5, 3).replay(bank), slow_replay(bank, order_bucket(3)))


def test_what_makes_no_sense_is_refused():
    bank = filled_bank(3)
    with pytest.raises(UsageError, match="positions over 7 slots cannot read a bank of 5"):
        OrderPositions(7, 2).step(bank)
    with pytest.raises(UsageError, match=r"visible has the shape \[2, 2\], the bank \[5, 5\]"):
        ranks(bank, np.ones((2, 2), dtype=bool))
    with pytest.raises(UsageError, match="of one group; this one has 2"):
        OrderPositions(5, 2).step(MemoryBank(length=4, tokens=2, channels=2, groups=2))
    with pytest.raises(UsageError, match="must rise"):
        AgePositions([1.0, 1.0])
    with pytest.raises(UsageError, match="at least one slot and one time bucket"):
        OrderPositions(5, 0)
