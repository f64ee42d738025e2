"""Position policies: which row of the position table each remembered slot reads, and in which order slots were seen.

Features are banked without a position; the graphs add one when they read a slot, looked up by a *bucket* (0 = none).
(The policy `table` adds its rows before banking, in `position_table.py`, and none here.)
A policy turns the order and the times of a bank's slots into buckets:

- for `step`: one array [S, N], read at the newest frame;
- for `answer`: another one if the frame that is asked about reads otherwise than it is banked (`CurrentPositions` only);
- for `replay`: an array [S_step, S_slot, N], where step j of the replay reads the slots of rank 0..j of each token,
  with the slot of rank j as its newest.

Everything is computed in float64, in the order of operations that each class states, so that training code can
reproduce the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bank import Bank
from keepsight.runtime.manifest import AgeInfo, CurrentInfo, Manifest, OrderInfo
from keepsight.streams.errors import UsageError

__all__ = [
    "AgePositions",
    "CurrentPositions",
    "NonePositions",
    "OrderPositions",
    "PositionPolicy",
    "position_policy",
    "ranks",
    "step_mask",
]

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class PositionPolicy(Protocol):
    """What turns the state of a visual bank into buckets."""

    @property
    def buckets(self) -> int:
        """P, rows of the position table; bucket 0 is no position."""
        ...

    def step(self, bank: Bank) -> Int32:
        """Buckets at the newest frame, [S, N] int32; 0 where a slot is out of use."""
        ...

    def answer(self, bank: Bank) -> Int32 | None:
        """Buckets [S, N] int32 of the pass that makes an answer; None: those of `step`, whose pass will do."""
        ...

    def replay(self, bank: Bank, visible: Bool | None = None) -> Int32:
        """Buckets at each step of a replay over the visible slots, [S_step, S_slot, N] int32; 0 where not read.

        Args:
            bank: the visual bank (one group).
            visible: [S, N] bool, the slots to replay, for a question about an interval; None = all that are in use.
        """
        ...


@dataclass(frozen=True)
class NonePositions:
    """No position added at reading: every bucket is 0."""

    @property
    def buckets(self) -> int:
        """P = 1."""
        return 1

    def step(self, bank: Bank) -> Int32:
        """See :meth:`PositionPolicy.step`."""
        return np.zeros(_visual(bank).visible.shape[1:], dtype=np.int32)

    def answer(self, bank: Bank) -> None:
        """See :meth:`PositionPolicy.answer`."""

    def replay(self, bank: Bank, visible: Bool | None = None) -> Int32:
        """See :meth:`PositionPolicy.replay`."""
        slots, tokens = _visual(bank).visible.shape[1:]
        return np.zeros((slots, slots, tokens), dtype=np.int32)


@dataclass(frozen=True)
class CurrentPositions:
    """One marker, bucket 1, on each token's newest slot, in the pass that makes an answer and in no other. P = 2.

    In MA-LMM's fine-tuned checkpoints the last frame's position is the only row that is not zero
    (`blip2_vicuna_instruct.py : forward` banks detached copies, so no other row was ever trained). Whatever is banked was
    read without it, and the newest frame is marked because it is the one that is answered at.
    """

    @property
    def buckets(self) -> int:
        """P = 2."""
        return 2

    def step(self, bank: Bank) -> Int32:
        """See :meth:`PositionPolicy.step`: no marker in what is banked."""
        return np.zeros(_visual(bank).visible.shape[1:], dtype=np.int32)

    def answer(self, bank: Bank) -> Int32:
        """See :meth:`PositionPolicy.answer`."""
        return _newest(ranks(bank))

    def replay(self, bank: Bank, visible: Bool | None = None) -> Int32:
        """See :meth:`PositionPolicy.replay`: the last step alone has the marker."""
        marked = _newest(ranks(bank, visible))
        buckets = np.zeros((len(marked), *marked.shape), dtype=np.int32)
        buckets[-1] = marked
        return buckets


@dataclass(frozen=True)
class OrderPositions:
    """Order in time, and age relative to all that is remembered. P = 1 + S * U.

    For a token's slot of rank r, read at a step whose newest slot has rank j (r <= j)::

        bucket = 1 + (j - r) * U + u

    Seconds play no part by themselves: a stream twice as slow has the same buckets. In float64, in this order, with
    the maximum and minimum over all tokens, and over the slots that are read at that step::

        age    = last_s[slot of rank j, same token] - last_s[slot]
        span   = max over tokens(last_s[slot of rank j]) - min over tokens and slots(first_s)
        u      = min(U - 1, floor((U * age) / span))          and 0 where span <= 0

    Attributes:
        slots: S of the bank.
        time_buckets: U.
    """

    slots: int
    time_buckets: int

    def __post_init__(self) -> None:
        if self.slots < 1 or self.time_buckets < 1:
            raise UsageError(f"{self} needs at least one slot and one time bucket.")

    @property
    def buckets(self) -> int:
        """P = 1 + S * U."""
        return 1 + self.slots * self.time_buckets

    def step(self, bank: Bank) -> Int32:
        """See :meth:`PositionPolicy.step`."""
        return self._at(_Remembered.of(bank), np.array([bank.slots - 1]))[0]

    def answer(self, bank: Bank) -> None:
        """See :meth:`PositionPolicy.answer`."""

    def replay(self, bank: Bank, visible: Bool | None = None) -> Int32:
        """See :meth:`PositionPolicy.replay`."""
        return self._at(_Remembered.of(bank, visible), np.arange(bank.slots))

    def _at(self, seen: _Remembered, steps: npt.NDArray[np.intp]) -> Int32:
        if self.slots != len(seen.rank):
            raise UsageError(f"positions over {self.slots} slots cannot read a bank of {len(seen.rank)}.")
        span = seen.span(steps)[:, None, None]
        scaled = self.time_buckets * seen.age(steps)
        relative = np.divide(scaled, span, out=np.zeros_like(scaled), where=span > 0)
        time = np.minimum(self.time_buckets - 1, np.floor(relative)).astype(np.int32)
        steps_back = steps[:, None, None] - seen.rank
        return np.where(seen.read(steps), 1 + steps_back * self.time_buckets + time, 0).astype(np.int32)


@dataclass(frozen=True)
class AgePositions:
    """Age in seconds between edges, usually in a geometric row. P = 2 + number of edges.

    For a slot read at a step whose newest slot, for the same token, has rank j (float64)::

        age    = last_s[slot of rank j, same token] - last_s[slot]
        bucket = 1 + number of edges <= age

    Attributes:
        edges_s: rising, in seconds.
    """

    edges_s: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.edges_s) or (np.diff(self.edges_s) <= 0).any():
            raise UsageError(f"age edges {list(self.edges_s)} must rise, and be at least one.")

    @property
    def buckets(self) -> int:
        """P = 2 + number of edges."""
        return len(self.edges_s) + 2

    def step(self, bank: Bank) -> Int32:
        """See :meth:`PositionPolicy.step`."""
        return self._at(_Remembered.of(bank), np.array([bank.slots - 1]))[0]

    def answer(self, bank: Bank) -> None:
        """See :meth:`PositionPolicy.answer`."""

    def replay(self, bank: Bank, visible: Bool | None = None) -> Int32:
        """See :meth:`PositionPolicy.replay`."""
        return self._at(_Remembered.of(bank, visible), np.arange(bank.slots))

    def _at(self, seen: _Remembered, steps: npt.NDArray[np.intp]) -> Int32:
        edges = np.asarray(self.edges_s, dtype=np.float64)
        bucket = 1 + np.searchsorted(edges, seen.age(steps), side="right")
        return np.where(seen.read(steps), bucket, 0).astype(np.int32)


def position_policy(manifest: Manifest) -> PositionPolicy:
    """The policy that a bundle was trained with."""
    info = manifest.positions
    if isinstance(info, OrderInfo):
        return OrderPositions(manifest.dims.slots, info.time_buckets)
    if isinstance(info, AgeInfo):
        return AgePositions(info.edges_s)
    if isinstance(info, CurrentInfo):
        return CurrentPositions()
    return NonePositions()


def ranks(bank: Bank, visible: Bool | None = None) -> Int32:
    """Place in time of each slot for each token, [S, N] int32: the replay graph's `rank`.

    Right-aligned: a token's newest slot has rank S-1, the one before it S-2, and so on; -1 = not visible.

    Args:
        bank: the visual bank (one group).
        visible: [S, N] bool, the slots to rank; None = all that are in use. Slots out of use are never visible.
    """
    rank = _visual(bank).rank_of_slot[0]
    if visible is None:
        return rank
    if visible.shape != rank.shape:
        raise UsageError(f"visible has the shape {list(visible.shape)}, the bank {list(rank.shape)}.")
    slots = len(rank)
    by_time = np.argsort(rank, axis=0, kind="stable")
    shown = np.take_along_axis(visible & (rank >= 0), by_time, axis=0)
    newer_shown = shown[::-1].cumsum(axis=0)[::-1] - shown
    ranked = np.full_like(rank, -1)
    np.put_along_axis(ranked, by_time, np.where(shown, slots - 1 - newer_shown, -1).astype(np.int32), axis=0)
    return ranked


def step_mask(rank: Int32) -> Float32:
    """Steps of a replay that read anything, [S] float32: 0 = no token has a slot of that rank or an older one."""
    return (rank[None] == np.arange(len(rank))[:, None, None]).any(axis=(1, 2)).astype(np.float32)


@dataclass(frozen=True)
class _Remembered:
    """Rank and times of the slots that are looked at, and the same times by rank instead of by slot."""

    rank: Int32  # [S, N], -1 = not looked at
    last_s: Float64  # [S, N]
    last_by_rank: Float64  # [S, N], nan where a token has no slot of that rank
    first_by_rank: Float64  # [S, N]

    @classmethod
    def of(cls, bank: Bank, visible: Bool | None = None) -> _Remembered:
        rank = ranks(bank, visible)
        used, (slot, token) = rank[rank >= 0], np.nonzero(rank >= 0)
        first_by_rank, last_by_rank = np.full(rank.shape, np.nan), np.full(rank.shape, np.nan)
        first_by_rank[used, token] = bank.first_s[0, slot, token]
        last_by_rank[used, token] = bank.last_s[0, slot, token]
        return cls(rank, bank.last_s[0], last_by_rank, first_by_rank)

    def read(self, steps: npt.NDArray[np.intp]) -> Bool:
        """Slots that are read at each step, [steps, S, N]."""
        return (self.rank >= 0) & (self.rank <= steps[:, None, None])

    def age(self, steps: npt.NDArray[np.intp]) -> Float64:
        """Seconds from the end of a slot to the end of the step's newest, [steps, S, N]; 0 where not read."""
        newest: npt.NDArray[Any] = self.last_by_rank[steps][:, None, :]
        return np.where(self.read(steps), newest - self.last_s, 0.0)

    def span(self, steps: npt.NDArray[np.intp]) -> Float64:
        """Seconds that the slots read at each step cover, [steps]; 0 where none is read."""
        end = np.fmax.reduce(self.last_by_rank, axis=1, initial=-np.inf)
        start = np.minimum.accumulate(np.fmin.reduce(self.first_by_rank, axis=1, initial=np.inf))
        return np.where(np.isfinite(end), end - start, 0.0)[steps]


def _newest(rank: Int32) -> Int32:
    """1 where a token's slot is its newest, [S, N] int32."""
    return (rank == len(rank) - 1).astype(np.int32)


def _visual(bank: Bank) -> Bank:
    if bank.groups != 1:
        raise UsageError(f"positions are of a visual bank, of one group; this one has {bank.groups}.")
    return bank
