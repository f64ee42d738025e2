"""The memory bank: at most M+1 slots of features for a stream of any length, compressed as MA-LMM does it.

One class serves both banks of MA-LMM: the visual bank (one group, N visual tokens) and the query banks (one group per
self-attention layer, Q+L rows each). See :class:`MemoryBank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bank_state import RIDER, BankShape, check_state, rows_in_order, write_rows
from keepsight.runtime.pages import give_back
from keepsight.streams.errors import UsageError

__all__ = ["COSINE_EPS", "MemoryBank", "Policy", "Rider"]

Policy = Literal["mbc", "fifo", "average", "last"]
"""How a full bank makes room: merge the most similar neighbours, drop the oldest, keep one mean, keep nothing."""

FloatArray = npt.NDArray[np.floating[Any]]
IndexArray = npt.NDArray[np.intp]

COSINE_EPS = 1e-8
"""Smallest norm that a cosine divides by, as in torch's ``cosine_similarity``."""

_NONE = -1


@dataclass(frozen=True)
class Rider:
    """Shape of a tensor that rides along: an affine image of the features, merged with their index and weights.

    Attributes:
        groups: G', either the bank's own G (one decision per group and token) or, where the bank has one group,
            any number (the decision of a token then holds for every group of the rider).
        channels: H, width of a row.
    """

    groups: int
    channels: int


def _most_similar_pair(similarity: npt.NDArray[np.float64]) -> IndexArray:
    """First of the most similar adjacent pairs; similarity: [G, pairs, n] -> [G, n]. Ties go to the oldest pair."""
    return similarity.argmax(axis=1)


def _oldest_pair(similarity: npt.NDArray[np.float64]) -> IndexArray:
    return np.zeros((similarity.shape[0], similarity.shape[2]), dtype=np.intp)


# Which adjacent pair a policy merges. Policies that are not named here merge nothing: they drop the oldest frame.
_PAIR_TO_MERGE: Mapping[str, Callable[[npt.NDArray[np.float64]], IndexArray]] = {
    "mbc": _most_similar_pair,
    "average": _oldest_pair,
}

# How many slots of a token stay in use once the bank has made room.
_STORED: Mapping[str, Callable[[int], int]] = {
    "mbc": lambda length: length,
    "fifo": lambda length: length,
    "average": lambda length: 1,
    "last": lambda length: 0,
}


class _Slots:
    """One tensor of the bank, [G, S, n, C], read and written one slot per token at a time.

    A slot index [G or 1, n] names, for each token, the slot meant. The rows of one slot index lie apart in memory, so
    each access gathers or scatters n rows per group: the only feature data that a step moves.
    """

    def __init__(self, groups: int, slots: int, tokens: int, channels: int, dtype: npt.DTypeLike) -> None:
        # Zeros, not empty: masked slots take part in attention as 0 x value, so they must always be finite.
        self.values: FloatArray = np.zeros((groups, slots, tokens, channels), dtype=dtype)
        self._rows = self.values.reshape(-1, channels)
        self._row_of_slot_0 = np.arange(groups)[:, None] * (slots * tokens) + np.arange(tokens)
        self._tokens = tokens
        self._one: FloatArray = np.empty((groups, tokens, channels), dtype=dtype)
        self._other: FloatArray = np.empty_like(self._one)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots and of the scratch rows."""
        return self.values.nbytes + self._one.nbytes + self._other.nbytes

    def read(self, slot: IndexArray) -> FloatArray:
        """Rows of one slot per token, [G, n, C]. The array is reused by the next call."""
        return self._gather(slot, self._one)

    def write(self, slot: IndexArray, rows: FloatArray) -> None:
        self._rows[self._row_of_slot_0 + slot * self._tokens] = rows

    def blend(self, into: IndexArray, other: IndexArray, weight: npt.NDArray[np.float64]) -> FloatArray:
        """Write ``into + weight * (other - into)`` to slot ``into`` and return it, [G, n, C].

        This form of a weighted mean leaves equal rows exactly equal, however often they are merged: a static scene
        does not drift in float32 over a long stream.
        """
        merged = self._gather(into, self._one)
        step = self._gather(other, self._other)
        step -= merged
        step *= weight.astype(step.dtype)[..., None]
        merged += step
        self.write(into, merged)
        return merged

    def _gather(self, slot: IndexArray, out: FloatArray) -> FloatArray:
        # mode="clip" lets numpy write straight into `out`; the indices are in range by construction.
        return self._rows.take(self._row_of_slot_0 + slot * self._tokens, axis=0, out=out, mode="clip")


class MemoryBank:
    """A bounded memory of an unbounded stream: M stored slots and a free one for the next frame, per token.

    It does what MA-LMM's code does (``blip2.py: memory_bank_compress``), which differs from the paper: every token
    of every group merges its own most similar pair of neighbours in time (cosine, the first on ties), and the merged
    features are their mean weighted by the number of frames in each. One merge a frame, none before the bank is full.

    When the merge runs. A frame is appended, the Q-Former sees the M stored slots and the frame, and the merge for
    that frame runs at the start of the next one: inside the next :meth:`append`, or earlier by :meth:`settle`. The
    reference compresses after every frame but its last, so what is seen is the same at every length of stream.

    - The visual bank is read with the current frame in it: ``append``, then read.
    - A query bank (``current_outside=True``) is read without the current rows: ``settle``, read, ``append`` them.
      After that ``append`` and until the next ``settle``, the slots in :attr:`past` are still what was read.

    Policies, as (what is seen in the visual bank, what a query bank holds when it is read):

    ======== ==================================== =====================================
    mbc      M merged slots and the current frame M merged slots
    fifo     the last M+1 frames                  the last M frames before the current
    average  one mean of all frames               one mean of all frames before the current
    last     the current frame                    nothing
    ======== ==================================== =====================================

    A bank can be told to store fewer slots for a while (:meth:`limit_to`): the shapes stay, what is out of use is masked.

    Cost. Slots are never moved to close a gap: each token has its own order of slot indices. A step reads five slots
    per token and writes two, whatever M is. Similarities of neighbours are kept, so that a step computes three
    cosines per token, and so are the norms. Products are summed in float64 whatever ``dtype`` is, which costs little:
    the decisions are then those of the stored values, the same on every machine up to true ties.

    Attributes:
        features: [G, S, n, C] of ``dtype``, with S = M + 1. Slots out of use hold stale but finite values.
        riders: name -> [G', S, n, H] of ``dtype``. These are the arrays that the graphs read: no copy is needed.
        sizes: [G, S, n] float64, frames merged into a slot; 0 = out of use.
        first_s, last_s: [G, S, n] float64, the first and last moment that a slot covers, in seconds; nan = out of use.
        last_merge: [G, n] int32, position in time order (0 = oldest) of the older slot of the last merge, -1 before the
            first. After an ``append`` it is the merge that followed the frame before; after ``settle``, the newest.
        frames_seen: frames appended since the last :meth:`reset`.
        limit: slots that are stored at present, at most `length` (see :meth:`limit_to`).
    """

    def __init__(
        self,
        *,
        length: int,
        tokens: int,
        channels: int,
        groups: int = 1,
        riders: Mapping[str, Rider] | None = None,
        policy: Policy = "mbc",
        current_outside: bool = False,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        """Create an empty bank.

        Args:
            length: M, slots that stay stored for a token (MA-LMM: memory_bank_length).
            tokens: n, tokens that decide for themselves (visual tokens, or rows of a layer).
            channels: C, width of the features.
            groups: G, token sets side by side (1 for the visual bank, banked layers for the query bank).
            riders: affine images of the features to carry along, by name.
            policy: how room is made, see the table above.
            current_outside: True for a bank that is read without the current frame (the query banks).
            dtype: float32 or float64.

        Raises:
            UsageError: a size below 1, an unknown policy, a dtype other than float32 and float64, or a rider whose
                groups fit neither G nor a bank of one group.
        """
        _check_sizes(length=length, tokens=tokens, channels=channels, groups=groups)
        if policy not in get_args(Policy):
            raise UsageError(f"unknown memory policy {policy!r}.", fix=f"Use one of {', '.join(get_args(Policy))}.")
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise UsageError(f"a memory bank can't be {np.dtype(dtype)}.", fix="Use float32 or float64.")
        self.length, self.slots, self.tokens, self.channels, self.groups = length, length + 1, tokens, channels, groups
        self.policy: Policy = policy
        self.current_outside = current_outside
        self.dtype = np.dtype(dtype)

        self._compares = policy == "mbc"
        self._pair_to_merge = _PAIR_TO_MERGE.get(policy)
        self.limit = length
        self._stored = _STORED[policy](length)
        self._pack_due = False
        self._features = _Slots(groups, self.slots, tokens, channels, dtype)
        self._riders = {name: self._rider_slots(name, rider) for name, rider in (riders or {}).items()}
        self._new64, self._merged64, self._near64 = (np.empty((groups, tokens, channels)) for _ in range(3))

        shape = (groups, self.slots, tokens)
        self.sizes = np.zeros(shape)
        self.first_s = np.full(shape, np.nan)
        self.last_s = np.full(shape, np.nan)
        self.last_merge = np.full((groups, tokens), _NONE, dtype=np.int32)
        self.frames_seen = 0
        self._norms = np.ones(shape)  # of each slot, at least COSINE_EPS
        self._similarity = np.zeros(shape)  # by position in time order: [:, p] is of positions p and p+1
        self._order = np.zeros(shape, dtype=np.intp)  # position in time order -> slot; positions >= _count are free
        self._row_of_slot_0 = np.arange(groups)[:, None] * (self.slots * tokens) + np.arange(tokens)
        self._position = np.arange(self.slots)[:, None]
        self.reset()

    def __repr__(self) -> str:
        return (
            f"MemoryBank(length={self.length}, tokens={self.tokens}, channels={self.channels}, groups={self.groups}, "
            f"riders={sorted(self._riders)}, policy={self.policy!r}, current_outside={self.current_outside}, "
            f"dtype={self.dtype}, frames_seen={self.frames_seen})"
        )

    # -- what a reader needs -------------------------------------------------------------------------------------

    @property
    def features(self) -> FloatArray:
        return self._features.values

    @property
    def riders(self) -> Mapping[str, FloatArray]:
        return {name: slots.values for name, slots in self._riders.items()}

    @property
    def used(self) -> int:
        """Slots in use, the same number for every token."""
        return self._count

    @property
    def room_due(self) -> bool:
        """Whether the newest frame's room is still to be made: by the next :meth:`append`, or before it by :meth:`settle`."""
        return self._count > self._stored

    @property
    def free_slot(self) -> IndexArray:
        """The slot that the next frame takes, [G, n]; only where no room is due."""
        return self._order[:, self._count]

    @property
    def visible(self) -> npt.NDArray[np.bool_]:
        """Slots in use, [G, S, n] bool."""
        return self.sizes > 0

    @property
    def past(self) -> npt.NDArray[np.bool_]:
        """Slots in use but for the newest of each token, [G, S, n] bool.

        For a bank that is read without the current frame: what an answer to the frame just appended may see.
        """
        rank = self.rank_of_slot
        return (rank >= 0) & (rank < self.slots - 1)

    @property
    def order(self) -> npt.NDArray[np.int32]:
        """Slots by time, [G, used, n] int32, oldest first: order[g, p, i] is the slot of token i at position p."""
        return self._order[:, : self._count].astype(np.int32)

    @property
    def rank_of_slot(self) -> npt.NDArray[np.int32]:
        """Place of every slot in time, [G, S, n] int32, right-aligned: newest = S-1, -1 = out of use."""
        rank = np.full(self.sizes.shape, _NONE, dtype=np.int32)
        positions = np.arange(self.slots - self._count, self.slots, dtype=np.int32)[:, None]
        rank.reshape(-1)[self._row_of_slot_0[:, None] + self._order[:, : self._count] * self.tokens] = positions
        return rank

    def in_time_order(self) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        """Copies of the slots in use, oldest first: features [G, used, n, C] and sizes [G, used, n] float64."""
        order = self._order[:, : self._count]
        features = np.take_along_axis(self.features, order[..., None], axis=1)
        return features, np.take_along_axis(self.sizes, order, axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes held: fixed at construction, whatever the length of the stream."""
        slots = sum(part.nbytes for part in (self._features, *self._riders.values()))
        scratch = self._new64.nbytes + self._merged64.nbytes + self._near64.nbytes
        small = (self.sizes, self.first_s, self.last_s, self.last_merge, self._norms, self._similarity, self._order)
        return slots + scratch + sum(array.nbytes for array in small)

    # -- what changes the bank -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. Feature data stays where it is, masked, and finite."""
        self.sizes.fill(0)
        self.first_s.fill(np.nan)
        self.last_s.fill(np.nan)
        self.last_merge.fill(_NONE)
        self._order[:] = np.arange(self.slots)[:, None]
        self.frames_seen = 0
        self._count = 0
        self._newest_s = -math.inf

    def append(self, features: FloatArray, *, time_s: float, riders: Mapping[str, FloatArray] | None = None) -> None:
        """Make the room that is due, then store a frame in each token's free slot.

        Args:
            features: [G, n, C], or [n, C] where G is 1. Copied, and converted to the bank's dtype.
            time_s: moment of the frame in seconds, on a clock that never goes back.
            riders: name -> [G', n, H] ([n, H] where G' is 1), exactly the riders that the bank was made with.

        Raises:
            UsageError: a wrong shape or rider name, features that are not finite, or a time before the newest frame.
                The bank is then unchanged. (Riders are outputs of an engine, which refuses non-finite ones.)
        """
        rows = _checked_rows("features", features, (self.groups, self.tokens, self.channels), self.dtype)
        rider_rows = self._checked_riders(riders or {})
        self.check_time(time_s)
        np.copyto(self._new64, rows)
        norms = _norm(self._new64)
        if not np.isfinite(norms).all():
            raise UsageError(f"features of the frame at {time_s:.3f} s hold nan or inf.", fix="Check the vision graph.")

        self.settle()
        slot = self._order[:, self._count]
        self._features.write(slot, rows)
        for name, rider in rider_rows.items():
            self._riders[name].write(slot, rider)
        self._enter(slot, norms, time_s)
        if self.policy == "average" and not self.current_outside:
            self.settle()  # one mean that includes the current frame

    def settle(self, pair: npt.ArrayLike | None = None) -> None:
        """Make the room that the newest frame needs, if that has not been done: idempotent.

        :meth:`append` calls it. A reader of a bank with ``current_outside`` calls it before it reads.

        Args:
            pair: [G, n] positions in time order of the older slot to merge, instead of the policy's own choice: to repeat
                what another bank did, and compare all else. It is one merge, also where more are due.

        Raises:
            UsageError: a pair that is not in the bank.
        """
        while self._count > self._stored:
            self._make_room(pair)
            if pair is not None:
                return
        if self._pack_due:
            self._pack()

    def limit_to(self, length: int) -> None:
        """Store M' slots from here on, as a bank of that length would, until another limit.

        Fewer than before: the next :meth:`settle` merges (or drops) until M' are left, one after the other, each as the policy
        would; until then a reader sees what it saw. The memory of the slots that are never used under the limit is given back to
        the system. More than before: there is room again. What was merged stays merged, what was dropped stays lost.

        Args:
            length: M', from 1 to `length`. The policies `average` and `last` store fewer anyway.

        Raises:
            UsageError: another number.
        """
        if not 1 <= length <= self.length:
            raise UsageError(f"a memory bank of {self.length} slots can't store {length}.", fix=f"Use 1 to {self.length}.")
        self._pack_due = length < self.limit or (self._pack_due and length == self.limit)
        self.limit, self._stored = length, _STORED[self.policy](length)

    def _make_room(self, pair: npt.ArrayLike | None) -> None:
        if self._pair_to_merge is None:
            self._drop_oldest()
        else:
            own = self._pair_to_merge(self._similarity[:, : self._count - 1])
            self._merge(own if pair is None else self.checked_pair(pair))

    def checked_pair(self, pair: npt.ArrayLike) -> IndexArray:
        """A forced merge as :meth:`settle` takes it; raises UsageError for one that is not in the bank."""
        chosen = np.asarray(pair, dtype=np.intp)
        if chosen.shape != (self.groups, self.tokens) or not ((chosen >= 0) & (chosen < self._count - 1)).all():
            raise UsageError(
                f"a forced merge must name one of {self._count - 1} pairs for each of [{self.groups}, {self.tokens}] tokens."
            )
        return chosen

    def _merge(self, pair: IndexArray) -> None:
        """Merge positions pair and pair + 1 of every token, [G, n], into the older one's slot; free the other."""
        at = self._flat(pair)
        into, other = self._order.take(at), self._order.take(at + self.tokens)
        kept, freed = self._flat(into), self._flat(other)
        size = self.sizes.take(kept) + self.sizes.take(freed)
        weight = self.sizes.take(freed) / size
        for rider in self._riders.values():
            rider.blend(into, other, weight)
        merged = self._features.blend(into, other, weight)

        self.sizes.reshape(-1)[kept] = size
        self.last_s.reshape(-1)[kept] = self.last_s.take(freed)
        self.last_merge[:] = pair
        self._free(pair + 1, other)
        if self._compares:
            self._compare_merged(pair, into, merged)

    def _compare_merged(self, pair: IndexArray, slot: IndexArray, merged: FloatArray) -> None:
        """Norm and similarities of the slot that was just written, now at position pair."""
        np.copyto(self._merged64, merged)
        norms = _norm(self._merged64)
        self._norms.reshape(-1)[self._flat(slot)] = norms
        earlier, at = self._flat(np.maximum(pair - 1, 0)), self._flat(pair)
        similarity = self._similarity.reshape(-1)
        # A token merged at position 0 has no earlier neighbour: what is written there is overwritten by the next line.
        # One merged at its newest has no later one: that value lies past the pairs in use, until append sets it.
        similarity[earlier] = self._cosine(self._order.take(earlier), self._merged64, norms)
        similarity[at] = self._cosine(self._order.take(at + self.tokens), self._merged64, norms)

    def _drop_oldest(self) -> None:
        self._free(np.zeros((self.groups, self.tokens), dtype=np.intp), self._order[:, 0].copy())

    def _free(self, position: IndexArray, slot: IndexArray) -> None:
        """Take each token's slot, at that position in time order, out of use; [G, n] both."""
        at = self._flat(slot)
        self.sizes.reshape(-1)[at] = 0
        self.first_s.reshape(-1)[at] = np.nan
        self.last_s.reshape(-1)[at] = np.nan
        self._count -= 1
        before = self._position[: self._count] < position[:, None]
        for by_position in (self._order[:, : self._count + 1], self._similarity[:, : self._count + 1]):
            by_position[:, :-1] = np.where(before, by_position[:, :-1], by_position[:, 1:])
        self._order[:, self._count] = slot  # the next to be used: under a limit the others are never touched

    def _pack(self) -> None:
        """Move what is stored into the first slots, as many as the limit needs, and give the memory of the others back."""
        self._pack_due = False
        needed = self.limit + 1
        for position in range(self._count):
            group, token = np.nonzero(self._order[:, position] >= needed)
            if len(group):
                free = self._order[group, self._count :, token]
                self._move(group, token, position, self._count + np.argmax(free < needed, axis=1))
        self._order[:, self._count :].sort(axis=1)
        for part in (self._features, *self._riders.values()):
            for slots in part.values:
                give_back(slots[needed:])

    def _move(self, group: IndexArray, token: IndexArray, position: int, free: IndexArray) -> None:
        """Move slots of some tokens, [k] each: from what is at a position in time order to what is at a free one."""
        source, target = self._order[group, position, token], self._order[group, free, token]
        self._order[group, position, token], self._order[group, free, token] = target, source
        for part in (self._features, *self._riders.values()):
            rows = part.values
            if len(rows) == self.groups:
                rows[group, target, token] = rows[group, source, token]
            else:  # of a bank with one group
                rows[:, target, token] = rows[:, source, token]
        for by_slot, out_of_use in ((self.sizes, 0.0), (self.first_s, np.nan), (self.last_s, np.nan), (self._norms, 1.0)):
            by_slot[group, target, token] = by_slot[group, source, token]
            by_slot[group, source, token] = out_of_use

    def _enter(self, slot: IndexArray, norms: npt.NDArray[np.float64], time_s: float) -> None:
        """Book the rows just written to slot [G, n] as the newest frame."""
        if self._compares and self._count:
            newest = self._order[:, self._count - 1]
            self._similarity[:, self._count - 1] = self._cosine(newest, self._new64, norms)
        at = self._flat(slot)
        self._norms.reshape(-1)[at] = norms
        self.sizes.reshape(-1)[at] = 1
        self.first_s.reshape(-1)[at] = time_s
        self.last_s.reshape(-1)[at] = time_s
        self._newest_s = time_s
        self._count += 1
        self.frames_seen += 1

    def _cosine(
        self, slot: IndexArray, rows: npt.NDArray[np.float64], norms: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Cosine of the stored rows of slot [G, n] with rows [G, n, C] of known norms [G, n]."""
        np.copyto(self._near64, self._features.read(slot))
        return _dot(self._near64, rows) / (self._norms.take(self._flat(slot)) * norms)

    def _flat(self, slot: IndexArray) -> IndexArray:
        """Index of a slot (or position) per token [G, n] into a [G, S, n] array seen as one row of numbers."""
        return self._row_of_slot_0 + slot * self.tokens

    # -- what survives a restart ---------------------------------------------------------------------------------

    def state(self, *, riders: bool = True) -> dict[str, npt.NDArray[Any]]:
        """All that the bank is, as copies of its arrays; slots out of use are left out.

        Args:
            riders: without them the state is smaller, and what restores it must compute them from `features`.

        Returns:
            order: [G, S, n] int32, the slot at each position in time; those after `used` are free.
            features, rider.NAME: [G, used, n, C] and [G', used, n, H] of `dtype`, oldest first.
            sizes, first_s, last_s, norms: [G, used, n] float64, oldest first.
            similarity: [G, used - 1, n] float64, of neighbours in time.
            last_merge: [G, n] int32.
            frames_seen, newest_s: [] int64 and float64; newest_s is -inf before the first frame.
        """
        order = self._order[:, : self._count]
        small = {"sizes": self.sizes, "first_s": self.first_s, "last_s": self.last_s, "norms": self._norms}
        return {
            "order": self._order.astype(np.int32),
            "features": rows_in_order(self.features, order),
            **{RIDER + name: rows_in_order(values, order) for name, values in self.riders.items() if riders},
            **{name: np.take_along_axis(array, order, axis=1) for name, array in small.items()},
            "similarity": self._similarity[:, : max(self._count - 1, 0)].copy(),
            "last_merge": self.last_merge.copy(),
            "frames_seen": np.array(self.frames_seen, np.int64),
            "newest_s": np.array(self._newest_s, np.float64),
        }

    def check_state(self, state: Mapping[str, npt.NDArray[Any]], *, riders: bool = True) -> None:
        """Refuse what :meth:`restore` would refuse.

        Args:
            riders: False for a state that was taken without them.

        Raises:
            UsageError: a state that a bank of these sizes and this policy can't have been in.
        """
        carried = {name: (len(values), values.shape[-1]) for name, values in self.riders.items() if riders}
        shape = BankShape(
            groups=self.groups, slots=self.slots, tokens=self.tokens, channels=self.channels, dtype=self.dtype,
            riders=carried, merges=self._pair_to_merge is not None,
        )  # fmt: skip
        check_state(shape, state)

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Become what :meth:`state` was taken from, riders included: from here on every bit is as it would have been.

        Rows go back into the slots they were in, since an attention's sum over slots rounds by their order.

        Raises:
            UsageError: as :meth:`check_state`; the bank is then unchanged.
        """
        self.check_state(state)
        self.reset()
        self._order[:] = state["order"]
        self._count = state["features"].shape[1]
        order = self._order[:, : self._count]
        write_rows(self.features, order, state["features"])
        for name, values in self.riders.items():
            write_rows(values, order, state[RIDER + name])
        small = {"sizes": self.sizes, "first_s": self.first_s, "last_s": self.last_s, "norms": self._norms}
        for name, array in small.items():
            np.put_along_axis(array, order, state[name], axis=1)
        self._similarity[:, : max(self._count - 1, 0)] = state["similarity"]
        self.last_merge[:] = state["last_merge"]
        self.frames_seen = int(state["frames_seen"])
        self._newest_s = float(state["newest_s"])

    # -- what append refuses -------------------------------------------------------------------------------------

    def _rider_slots(self, name: str, rider: Rider) -> _Slots:
        _check_sizes(**{f"riders[{name!r}].groups": rider.groups, f"riders[{name!r}].channels": rider.channels})
        if self.groups not in (1, rider.groups):
            raise UsageError(
                f"rider {name!r} has {rider.groups} groups and the bank {self.groups}.",
                fix="A rider needs the bank's groups, unless the bank has one group.",
            )
        return _Slots(rider.groups, self.slots, self.tokens, rider.channels, self.dtype)

    def _checked_riders(self, riders: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        if riders.keys() != self._riders.keys():
            raise UsageError(
                f"append got the riders {sorted(riders)}, the bank has {sorted(self._riders)}.",
                fix="Pass every rider of the bank with each frame.",
            )
        shapes = {name: slots.values.shape for name, slots in self._riders.items()}
        return {
            name: _checked_rows(
                f"rider {name!r}", rows, (shapes[name][0], shapes[name][2], shapes[name][3]), self.dtype
            )
            for name, rows in riders.items()
        }

    def check_time(self, time_s: float) -> None:
        """Raise UsageError for a moment that :meth:`append` would refuse."""
        if not math.isfinite(time_s):
            raise UsageError(f"frame time is {time_s}.", fix="Give seconds on a monotonic clock.")
        if time_s < self._newest_s:
            raise UsageError(
                f"frame time went back from {self._newest_s:.3f} s to {time_s:.3f} s.",
                fix="Frames must come in time order; call reset() before another stream.",
            )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"a memory bank needs {name} of at least 1, got {value}.")


def _checked_rows(name: str, rows: FloatArray, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> FloatArray:
    """Rows as [G, n, C] of a dtype, from that or from [n, C] where G is 1."""
    rows = np.asarray(rows)
    if rows.dtype.kind != "f":
        raise UsageError(f"{name} must be floats, got {rows.dtype}.")
    if shape[0] == 1 and rows.shape == shape[1:]:
        rows = rows[None]
    if rows.shape != shape:
        raise UsageError(f"{name} must have the shape {list(shape)} of the bank, got {list(rows.shape)}.")
    return rows.astype(dtype, copy=False)


def _dot(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Dot products over the last axis, [G, n, C] x [G, n, C] -> [G, n]."""
    # A batched product of 1 x C by C x 1: half the time of einsum.
    return np.matmul(a[:, :, None, :], b[:, :, :, None])[..., 0, 0]


def _norm(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Norms over the last axis, at least COSINE_EPS, [G, n, C] -> [G, n]."""
    return np.maximum(np.sqrt(_dot(rows, rows)), COSINE_EPS)
