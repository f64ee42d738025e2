"""A memory bank whose features and riders stay on a device: the graph `memory` updates them, the host keeps the books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bank_state import RIDER, BankShape, check_state, rows_in_order, write_rows
from keepsight.runtime.graphs.engine import Array, Engine, Tensor
from keepsight.runtime.manifest import Dims
from keepsight.runtime.memory import COSINE_EPS, FloatArray, MemoryBank, Policy, Rider
from keepsight.streams.errors import EngineError, UsageError

__all__ = [
    "FREED",
    "MEMORY",
    "NOWHERE",
    "NO_MERGE",
    "OTHER_TURN",
    "OWN_CHOICE",
    "POLICIES",
    "VISUAL_RIDERS",
    "DeviceMemoryBank",
    "visual_bank",
]

MEMORY = "memory"
"""The graph's name in a bundle; one without it keeps its banks on the host."""

VISUAL_RIDERS = ("cross_k", "cross_v")
"""What rides along with the visual bank's features."""

# What `pair` and `entry` say besides a position or a slot (export/memory_graph.py).
OWN_CHOICE, NO_MERGE = -1, -2
FREED, NOWHERE = -1, -2

_COSINES = ("similarity", "norms")
_KEPT = ("features", *VISUAL_RIDERS, *_COSINES)
OTHER_TURN = {f"bank_{name}": f"next_{name}" for name in _KEPT} | {f"next_{name}": f"bank_{name}" for name in _KEPT}
"""Inputs and outputs of `memory` that change places from one run to the next: what one writes, the other reads."""

POLICIES: tuple[Policy, ...] = ("mbc", "fifo", "average", "last")
"""How a bank on a device can make room."""

_CHOOSES = "mbc"  # the one of them whose merges depend on features
_MERGES = (_CHOOSES, "average")


def visual_bank(dims: Dims, turns: Sequence[Engine] = (), *, policy: Policy = "mbc") -> MemoryBank | DeviceMemoryBank:
    """An empty visual bank of a bundle's dimensions: on the device, if the graph `memory` is loaded there and knows the policy.

    Args:
        turns: `Engines.memory`.
    """
    riders = {name: Rider(len(dims.cross_layers), dims.hidden) for name in VISUAL_RIDERS}
    length, tokens, channels = dims.memory_length, dims.tokens, dims.channels
    if turns and policy in POLICIES:
        return DeviceMemoryBank(turns, length=length, tokens=tokens, channels=channels, riders=riders, policy=policy)
    return MemoryBank(length=length, tokens=tokens, channels=channels, riders=riders, policy=policy)


class DeviceMemoryBank:
    """A :class:`~keepsight.runtime.memory.MemoryBank` whose tensors are on a device.

    It says and does what that one does, at the same moments, except that `features` and `riders` are tensors on the device, which
    any engine there reads in place. Order, sizes and times are kept by a host bank of one channel, which repeats the merges that
    the device has chosen: what crosses over for a frame is order and sizes there, [S, n] each, and two rows of n numbers back.

    The tensors are held twice, since no engine may write over what it reads: one update reads one half and writes the other.
    A tensor got from here therefore lasts for one more `append`, not longer.

    Similarities are summed in float32, where the host's are in float64, so near-ties may merge otherwise (export/memory_graph.py
    says how near; the tests measure how often).

    Attributes:
        features: float32 [G, S, n, C] on the device. Slots out of use hold stale but finite values.
        riders: name -> float32 [G', S, n, H] on the device.
    """

    def __init__(
        self,
        turns: Sequence[Engine],
        *,
        length: int,
        tokens: int,
        channels: int,
        groups: int = 1,
        riders: Mapping[str, Rider] | None = None,
        policy: Policy = "mbc",
        current_outside: bool = False,
    ) -> None:
        """Create an empty bank.

        Args:
            turns: the graph `memory`, loaded on the device: twice, so that each writes what the other reads, or once, and the
                engine then copies what it has written before it reads it again.
            length, tokens, channels, groups, riders, policy, current_outside: as :class:`MemoryBank`'s.

        Raises:
            UsageError: as :class:`MemoryBank`, or a policy that a device's bank does not have.
            EngineError: the graph is of a bank of another shape.
        """
        if policy not in POLICIES:
            raise UsageError(f"a memory on a device can't be {policy!r}.", fix=f"Use a MemoryBank, or {', '.join(POLICIES)}.")
        self.channels, self.current_outside = channels, current_outside
        # The books alone: one channel, no riders. It must not merge by itself, which "average" does for a visual bank.
        self._book = MemoryBank(
            length=length, tokens=tokens, channels=1, groups=groups, policy=policy, current_outside=True
        )
        self._row = np.ones((groups, tokens, 1), np.float32)
        self._turns, self._turn = tuple(turns), 0
        self._riders = {"features": Rider(groups, channels), **(riders or {})}
        # Zeros, not what happens to lie there: what a mask hides must be finite.
        self._state: dict[str, Tensor] = {name: self._place(name, self._zeros(name)) for name in (*self._riders, *_COSINES)}

    def __repr__(self) -> str:
        return (
            f"DeviceMemoryBank({list(self._turns)}, length={self.length}, tokens={self.tokens}, channels={self.channels}, "
            f"groups={self.groups}, riders={sorted(self.riders)}, policy={self.policy!r}, "
            f"current_outside={self.current_outside}, frames_seen={self.frames_seen})"
        )

    # -- what a reader needs -------------------------------------------------------------------------------------

    @property
    def features(self) -> Tensor:
        return self._state["features"]

    @property
    def riders(self) -> Mapping[str, Tensor]:
        return {name: self._state[name] for name in self._riders if name != "features"}

    @property
    def length(self) -> int:
        return self._book.length

    @property
    def slots(self) -> int:
        return self._book.slots

    @property
    def tokens(self) -> int:
        return self._book.tokens

    @property
    def groups(self) -> int:
        return self._book.groups

    @property
    def policy(self) -> Policy:
        return self._book.policy

    @property
    def sizes(self) -> npt.NDArray[np.float64]:
        """See :class:`MemoryBank`."""
        return self._book.sizes

    @property
    def first_s(self) -> npt.NDArray[np.float64]:
        """See :class:`MemoryBank`."""
        return self._book.first_s

    @property
    def last_s(self) -> npt.NDArray[np.float64]:
        """See :class:`MemoryBank`."""
        return self._book.last_s

    @property
    def last_merge(self) -> npt.NDArray[np.int32]:
        """See :class:`MemoryBank`."""
        return self._book.last_merge

    @property
    def frames_seen(self) -> int:
        """See :class:`MemoryBank`."""
        return self._book.frames_seen

    @property
    def used(self) -> int:
        """See :attr:`MemoryBank.used`."""
        return self._book.used

    @property
    def visible(self) -> npt.NDArray[np.bool_]:
        """See :attr:`MemoryBank.visible`."""
        return self._book.visible

    @property
    def past(self) -> npt.NDArray[np.bool_]:
        """See :attr:`MemoryBank.past`."""
        return self._book.past

    @property
    def order(self) -> npt.NDArray[np.int32]:
        """See :attr:`MemoryBank.order`."""
        return self._book.order

    @property
    def rank_of_slot(self) -> npt.NDArray[np.int32]:
        """See :attr:`MemoryBank.rank_of_slot`."""
        return self._book.rank_of_slot

    def in_time_order(self) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        """See :meth:`MemoryBank.in_time_order`; copies the whole bank from the device."""
        order = self.order.astype(np.intp)
        features = np.take_along_axis(np.asarray(self.features), order[..., None], axis=1)
        return features, np.take_along_axis(self.sizes, order, axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes held, the device's two halves and the host's books: fixed at construction."""
        return 2 * sum(int(tensor.nbytes) for tensor in self._state.values()) + self._book.nbytes

    def state(self, *, riders: bool = True) -> dict[str, npt.NDArray[Any]]:
        """See :meth:`MemoryBank.state`, whose form this has; copies the bank from the device."""
        order = self.order
        kept = [name for name in self._riders if riders or name == "features"]
        rows = {_saved(name): rows_in_order(np.asarray(self._state[name]), order) for name in kept}
        similarity, norms = (
            np.take_along_axis(np.asarray(self._state[name]), order.astype(np.intp), axis=1).astype(np.float64)
            for name in _COSINES
        )
        cosines = {"norms": np.maximum(norms, COSINE_EPS), "similarity": 1 + similarity[:, : max(self.used - 1, 0)]}
        return {**self._book.state(riders=False), **rows, **cosines}

    # -- what changes the bank -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. Feature data stays where it is, masked, and finite."""
        self._book.reset()

    def check_state(self, state: Mapping[str, npt.NDArray[Any]], *, riders: bool = True) -> None:
        """See :meth:`MemoryBank.check_state`.

        Raises:
            UsageError: a state that a bank of these sizes and this policy can't have been in.
        """
        carried = {name: (part.groups, part.channels) for name, part in self._riders.items() if riders and name != "features"}
        shape = BankShape(
            groups=self.groups, slots=self.slots, tokens=self.tokens, channels=self.channels, dtype=np.dtype(np.float32),
            riders=carried, merges=self.policy in _MERGES,
        )  # fmt: skip
        check_state(shape, state)

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """See :meth:`MemoryBank.restore`; what a device's bank gave goes on bit for bit, a host's with its norms in float32.

        Raises:
            UsageError: as :meth:`check_state`; the bank is then unchanged.
        """
        self.check_state(state)
        used = state["features"].shape[1]
        order = state["order"][:, :used].astype(np.intp)
        self._turn = 0
        for name in self._riders:
            values = self._zeros(name)
            write_rows(values, order, state[_saved(name)])
            self._state[name] = self._place(name, values)
        # The graph's are the cosine less 1, and a norm of 0 where the host's is at its least.
        cosines = {
            "similarity": np.minimum(state["similarity"] - 1, 0),
            "norms": np.where(state["norms"] <= COSINE_EPS, 0, state["norms"]),
        }
        for name, by_position in cosines.items():
            values = self._zeros(name)
            np.put_along_axis(values, order[:, : by_position.shape[1]], by_position.astype(np.float32), axis=1)
            self._state[name] = self._place(name, values)
        own = {"features": np.ones((self.groups, used, self.tokens, 1), np.float32)}
        self._book.restore({name: own.get(name, array) for name, array in state.items() if not name.startswith(RIDER)})

    def append(self, features: Tensor, *, time_s: float, riders: Mapping[str, Tensor] | None = None) -> None:
        """Make the room that is due, then store a frame in each token's free slot: one run of the graph (`average`: two).

        Args:
            features: float32 [G, n, C], or [n, C] where G is 1; on the device or on the host.
            time_s: moment of the frame in seconds, on a clock that never goes back.
            riders: name -> float32 [G', n, H], exactly the riders that the bank was made with.

        Raises:
            UsageError: a time before the newest frame, or wrong riders.
            EngineError: a wrong shape or dtype, or a frame with nan or inf; what is remembered is as it was.
        """
        rows = {"features": features, **(riders or {})}
        if rows.keys() != self._riders.keys():
            raise UsageError(
                f"append got the riders {sorted(riders or {})}, the bank has {sorted(self.riders)}.",
                fix="Pass every rider of the bank with each frame.",
            )
        self._book.check_time(time_s)
        if self._book.room_due and self.policy != _CHOOSES:
            self.settle()
        if self._book.room_due:
            merged = self._update(rows, self._everywhere(OWN_CHOICE), self._everywhere(FREED))
            self._book.settle(merged)
        else:
            self._update(rows, self._everywhere(NO_MERGE), self._book.free_slot.astype(np.int32))
        self._book.append(self._row, time_s=time_s)
        if self.policy == "average" and not self.current_outside:
            self.settle()  # one mean that includes the current frame

    def settle(self, pair: npt.ArrayLike | None = None) -> None:
        """See :meth:`MemoryBank.settle`. `append` merges on its way; a merge by itself is one more run of the graph.

        Raises:
            UsageError: a pair that is not in the bank.
        """
        if not self._book.room_due:
            return
        if self.policy not in _MERGES:
            self._book.settle()  # the oldest slot is out of use: nothing of it is moved
            return
        own = self._everywhere(OWN_CHOICE if self.policy == _CHOOSES else 0)
        chosen = own if pair is None else self._book.checked_pair(pair).astype(np.int32)
        nothing = {name: np.zeros(self._row_shape(name), np.float32) for name in self._riders}
        self._book.settle(self._update(nothing, chosen, self._everywhere(NOWHERE)))

    def _update(self, rows: Mapping[str, Tensor], pair: Array, entry: Array) -> npt.NDArray[np.int32]:
        """Run the graph; its outputs are the bank if the frame is finite. Returns the pairs that were merged, [G, n]."""
        rank = self.rank_of_slot
        feeds: dict[str, Tensor] = {
            **rows,
            **{f"bank_{name}": tensor for name, tensor in self._state.items()},
            "position": np.where(rank < 0, rank, rank - (self.slots - self.used)).astype(np.int32),
            "sizes": self.sizes.astype(np.float32),
            "pair": pair,
            "entry": entry,
        }
        outputs = self._turns[self._turn].enqueue(feeds)
        magnitude = np.asarray(outputs["magnitude"])
        if not np.isfinite(magnitude).all():
            raise EngineError(
                f"features, keys or values of the frame hold nan or inf, in {np.count_nonzero(~np.isfinite(magnitude))} of "
                f"{magnitude.size} tokens.",
                fix="Run `keepsight verify` on the bundle; a graph may overflow at its precision.",
            )
        self._state = {name: outputs[f"next_{name}"] for name in self._state}
        self._turn = (self._turn + 1) % len(self._turns)
        return np.asarray(outputs["merged"])

    def _everywhere(self, value: int) -> npt.NDArray[np.int32]:
        return np.full((self.groups, self.tokens), value, np.int32)

    def _zeros(self, name: str) -> npt.NDArray[np.float32]:
        """An empty bank's tensor."""
        part = self._riders.get(name)
        width = () if part is None else (part.channels,)
        return np.zeros((self.groups if part is None else part.groups, self.slots, self.tokens, *width), np.float32)

    def _row_shape(self, name: str) -> tuple[int, ...]:
        part = self._riders[name]
        shape = (part.groups, self.tokens, part.channels)
        return shape[1:] if name == "features" and self.groups == 1 else shape

    def _place(self, name: str, values: Array) -> Tensor:
        return self._turns[0].place(f"bank_{name}", values)


def _saved(name: str) -> str:
    """What a state calls the rows of a tensor."""
    return name if name == "features" else RIDER + name
