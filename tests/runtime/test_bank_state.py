"""A bank goes on from its state as if nothing had happened, bit for bit, and refuses what it can't have been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.memory import MemoryBank, Policy, Rider
from keepsight.streams.errors import UsageError

State = dict[str, npt.NDArray[Any]]
POLICIES: list[Policy] = ["mbc", "fifo", "average", "last"]


def bank_of(
    policy: Policy = "mbc", *, groups: int = 1, length: int = 3, tokens: int = 4, channels: int = 5, outside: bool = False,
    dtype: type = np.float32,
) -> MemoryBank:  # fmt: skip
    riders = {"k": Rider(3 if groups == 1 else groups, 6), "v": Rider(groups, 2)}
    return MemoryBank(
        length=length, tokens=tokens, channels=channels, groups=groups, riders=riders, policy=policy, current_outside=outside,
        dtype=dtype,
    )  # fmt: skip


def feed(bank: MemoryBank, rng: np.random.Generator, times: range, *, settle: bool = False) -> None:
    for t in times:
        if settle:
            bank.settle()
        riders = {name: rng.standard_normal((len(v), *v.shape[2:])) for name, v in bank.riders.items()}
        bank.append(rng.standard_normal((bank.groups, bank.tokens, bank.channels)), time_s=0.25 * t, riders=riders)


def readable(bank: MemoryBank) -> State:
    """Everything that a reader can see: slots where they are, those out of use blanked (their content is nobody's business)."""
    shown = {"features": bank.features, **{f"rider {name}": values for name, values in bank.riders.items()}}
    blanked = {name: np.where(bank.visible[..., None], values, 0) for name, values in shown.items()}
    small = {name: getattr(bank, name) for name in ("sizes", "first_s", "last_s", "last_merge", "order", "rank_of_slot", "past")}
    return {**blanked, **small, "seen": np.array([bank.frames_seen, bank.used])}


def assert_same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), f"{name} differs"


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    groups=st.integers(1, 3),
    length=st.integers(1, 5),
    outside=st.booleans(),
    before=st.integers(0, 14),
    later=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    used_before=st.booleans(),
)
def test_a_restored_bank_goes_on_bit_for_bit(policy, groups, length, outside, before, later, seed, dtype, used_before):
    whole, restored = (bank_of(policy, groups=groups, length=length, outside=outside, dtype=dtype) for _ in range(2))
    if used_before:  # what a bank held before must leave no trace
        feed(restored, np.random.default_rng(seed + 1), range(7))
    rng = np.random.default_rng(seed)
    feed(whole, rng, range(before), settle=outside)
    restored.restore(whole.state())
    assert_same(readable(restored), readable(whole))
    assert_same(restored.state(), whole.state())
    generators = [np.random.default_rng(seed + 2) for _ in range(2)]
    for bank, generator in zip((whole, restored), generators, strict=True):
        feed(bank, generator, range(before, before + later), settle=outside)
    assert_same(readable(restored), readable(whole))
    assert_same(restored.state(), whole.state())


def test_a_state_is_a_copy_and_holds_slots_in_use_alone():
    bank = bank_of(length=9)
    feed(bank, np.random.default_rng(0), range(3))
    state = bank.state()
    assert state["features"].shape == (1, 3, 4, 5) and state["rider.k"].shape == (3, 3, 4, 6)
    before = {name: array.copy() for name, array in state.items()}
    feed(bank, np.random.default_rng(1), range(3, 30))
    assert_same(state, before)


def test_a_state_without_riders_is_checked_and_restored_with_riders_only():
    bank = bank_of()
    feed(bank, np.random.default_rng(0), range(9))
    state = bank.state(riders=False)
    assert not any(name.startswith("rider") for name in state)
    bank.check_state(state, riders=False)
    with pytest.raises(UsageError, match=r"lacks \['rider.k', 'rider.v'\]"):
        bank_of().restore(state)


def changed(name: str, change: Callable[[npt.NDArray[Any]], Any]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        array = state[name].copy()
        result = change(array)
        state[name] = array if result is None else result

    return apply


def put(place: Any, value: float) -> Callable[[npt.NDArray[Any]], None]:
    return lambda array: array.__setitem__(place, value)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda state: state.pop("sizes"), "lacks"),
        (lambda state: state.update(extra=np.zeros(1)), "too many"),
        (changed("features", lambda a: a.astype(np.float64)), "features is float64"),
        (changed("features", lambda a: a[:, :, :-1]), "features is float32"),
        (changed("features", put((0, 1, 2, 3), np.nan)), "features holds nan"),
        (changed("rider.v", put((0, 0, 0, 0), np.inf)), "rider.v holds nan"),
        (changed("rider.k", lambda a: a[:1]), "rider.k is"),
        (changed("order", put((0, 0, 2), 1)), "order does not name"),
        (changed("order", put((0, 0, 0), 99)), "order does not name"),
        (changed("sizes", put((0, 0, 0), 0.0)), "whole numbers"),
        (changed("sizes", put((0, 0, 0), 1.5)), "whole numbers"),
        (changed("sizes", lambda a: a + 1), "add up"),
        (changed("frames_seen", lambda a: a + 1), "add up"),
        (changed("frames_seen", lambda a: a * 0), "slots are in use"),
        (changed("first_s", put((0, 1, 0), 1e6)), "do not rise"),
        (changed("last_s", put((0, -1, 0), 1e6)), "newer than the newest"),
        (changed("newest_s", lambda a: np.array(np.nan)), "newest frame's time"),
        (changed("similarity", put((0, 0, 0), 1.5)), "cosines"),
        (changed("norms", put((0, 0, 0), 0.0)), "norm"),
        (changed("last_merge", put((0, 0), 7)), "last_merge"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(break_it, says):
    source, bank = bank_of(), bank_of()
    feed(source, np.random.default_rng(0), range(9))
    feed(bank, np.random.default_rng(1), range(6))
    before, state = readable(bank), source.state()
    break_it(state)
    with pytest.raises(UsageError, match=says):
        bank.restore(state)
    assert_same(readable(bank), before)


def test_a_state_of_another_length_is_refused():
    source = bank_of(length=4)
    feed(source, np.random.default_rng(0), range(9))
    with pytest.raises(UsageError, match="order is"):
        bank_of(length=5).restore(source.state())
