"""What a memory bank is, as plain arrays: gathered from its slots, and checked before it goes into a bank again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import UsageError

__all__ = ["RIDER", "BankShape", "check_state", "rows_in_order", "write_rows"]

Array = npt.NDArray[Any]

RIDER = "rider."
"""A rider's name in a state has this in front."""


class BankShape:
    """The sizes that a state must have.

    Args:
        groups, slots, tokens, channels: G, S, n, C of the bank.
        dtype: of features and riders.
        riders: name -> (G', H).
        merges: whether the bank makes room by merging: it then loses no frame, and sizes add up to the frames seen.
    """

    def __init__(
        self,
        *,
        groups: int,
        slots: int,
        tokens: int,
        channels: int,
        dtype: np.dtype[Any],
        riders: Mapping[str, tuple[int, int]],
        merges: bool,
    ) -> None:
        self.groups, self.slots, self.tokens, self.channels = groups, slots, tokens, channels
        self.dtype, self.riders, self.merges = dtype, dict(riders), merges

    def expected(self, used: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Name -> shape and dtype of every array of a state with so many slots in use."""
        double, index = np.dtype(np.float64), np.dtype(np.int32)
        by_slot = (self.groups, used, self.tokens)
        return {
            "order": ((self.groups, self.slots, self.tokens), index),
            "features": ((*by_slot, self.channels), self.dtype),
            **{RIDER + name: ((groups, used, self.tokens, width), self.dtype) for name, (groups, width) in self.riders.items()},
            **dict.fromkeys(("sizes", "first_s", "last_s", "norms"), (by_slot, double)),
            "similarity": ((self.groups, max(used - 1, 0), self.tokens), double),
            "last_merge": ((self.groups, self.tokens), index),
            "frames_seen": ((), np.dtype(np.int64)),
            "newest_s": ((), double),
        }


def rows_in_order(values: Array, order: npt.NDArray[np.integer[Any]]) -> Array:
    """A copy of slots: values [G', S, n, C] at order [G' or 1, used, n] -> [G', used, n, C]. Whole rows are copied."""
    return values.reshape(-1, values.shape[-1])[_rows(values, order)]


def write_rows(values: Array, order: npt.NDArray[np.integer[Any]], rows: Array) -> None:
    """The way back: put rows [G', used, n, C] into the slots that `rows_in_order` read them from."""
    values.reshape(-1, values.shape[-1])[_rows(values, order)] = rows


def _rows(values: Array, order: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.intp]:
    groups, slots, tokens, _ = values.shape
    rows: npt.NDArray[np.intp] = order.astype(np.intp) * tokens + np.arange(tokens)
    return rows + np.arange(groups)[:, None, None] * (slots * tokens)


def check_state(shape: BankShape, state: Mapping[str, Array]) -> None:
    """Refuse a state that a bank of this shape can't have been in.

    Raises:
        UsageError: naming the array that is wrong, and how.
    """
    used = np.shape(state.get("features", np.zeros((0, 0))))[1:2]
    expected = shape.expected(int(used[0]) if used else 0)
    if state.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise _wrong(f"it lacks {missing} and has {unknown} too many")
    for name, (size, dtype) in expected.items():
        array = state[name]
        if array.shape != size or array.dtype != dtype:
            raise _wrong(f"{name} is {array.dtype} {list(array.shape)} where the bank has {dtype} {list(size)}")
        if dtype.kind == "f" and name != "newest_s" and not np.isfinite(array).all():
            raise _wrong(f"{name} holds nan or inf")
    _check_order(shape, state)
    _check_counts(shape, state)
    _check_times(state)


def _check_order(shape: BankShape, state: Mapping[str, Array]) -> None:
    if not (np.sort(state["order"], axis=1) == np.arange(shape.slots)[:, None]).all():
        raise _wrong(f"order does not name each of the {shape.slots} slots once")
    merge = state["last_merge"]
    if not ((merge >= -1) & (merge < shape.slots - 1)).all():
        raise _wrong(f"last_merge is not within -1..{shape.slots - 2}")
    if not (np.abs(state["similarity"]) <= 1 + 1e-6).all() or not (state["norms"] > 0).all():
        raise _wrong("its cosines are not within -1..1, or a norm is not above 0")


def _check_counts(shape: BankShape, state: Mapping[str, Array]) -> None:
    sizes, seen = state["sizes"], int(state["frames_seen"])
    used = sizes.shape[1]
    if not 0 <= used <= min(shape.slots, max(seen, 0)):
        raise _wrong(f"{used} slots are in use after {seen} frames, of {shape.slots}")
    if not ((sizes >= 1) & (sizes == np.floor(sizes))).all():
        raise _wrong("sizes are not whole numbers from 1")
    if shape.merges and used and not (sizes.sum(axis=1) == seen).all():
        raise _wrong(f"sizes do not add up to the {seen} frames seen")


def _check_times(state: Mapping[str, Array]) -> None:
    first, last, newest = state["first_s"], state["last_s"], float(state["newest_s"])
    if not (first <= last).all() or not (last[:, :-1] <= first[:, 1:]).all():
        raise _wrong("its times do not rise")
    if bool(np.isfinite(newest)) != (int(state["frames_seen"]) > 0):
        raise _wrong(f"the newest frame's time is {newest}")
    if last.size and not (last[:, -1] <= newest).all():
        raise _wrong("a slot is newer than the newest frame")


def _wrong(what: str) -> UsageError:
    return UsageError(f"this is no state of such a memory bank: {what}.", fix="Restore what MemoryBank.state() gave.")
