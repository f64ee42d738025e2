"""`memory.onnx`: one update of a memory bank as a graph without weights, so that on a device features never leave it.

It does what :class:`~keepsight.runtime.memory.MemoryBank` does for one frame (MA-LMM's ``blip2.py: memory_bank_compress``): the
merge that is due, then the frame enters. Shapes are static, operators are those of opset 17 that TensorRT 10.3 has: one row of
each tensor is gathered by index, and written by a mask over the slots. No ScatterND, no If, no double.

The host keeps order, sizes and times (`runtime/graphs/device_bank.py`) and gives them with each frame, some kilobytes; what comes
back to it is which pair each token merged. Similarities and norms are kept by slot and stay on the device with the features.

Cost. A graph is a function: it reads the whole bank and writes another one, where the host's algorithm moves five rows a token.
At MA-LMM's size (N=257, C=1408, six cross-attention layers, H=768, M=20) that is 229 MB read and 229 MB written in float32, so
4.5 ms at the 102 GB/s of an Orin NX (counted, not measured; and if TensorRT fuses the two masks into one pass). The rows that
the merge itself touches are below 100 MB more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from keepsight.export.onnxfile import OPSET
from keepsight.runtime.graphs.device_bank import FREED, NOWHERE, OWN_CHOICE, VISUAL_RIDERS
from keepsight.runtime.manifest import Dims
from keepsight.runtime.memory import COSINE_EPS, Rider

__all__ = ["MEMORY_FILE", "memory_graph", "memory_graph_bytes", "write_memory_graph"]

MEMORY_FILE = "memory.onnx"

_BELOW_EVERY_COSINE = -4.0  # less 1, too
_NO_POSITION = -8.0  # and none of the seven after it is one, nor -1, which marks slots out of use
_FLOAT, _INT32 = TensorProto.FLOAT, TensorProto.INT32


def write_memory_graph(folder: Path, dims: Dims) -> Path:
    """Write the visual bank's graph to `folder/memory.onnx`; the same dimensions give the same bytes."""
    path = folder / MEMORY_FILE
    path.write_bytes(memory_graph_bytes(dims))
    return path


def memory_graph_bytes(dims: Dims) -> bytes:
    """The graph of a bundle's visual bank: one group of N tokens, with the cross-attention keys and values as riders."""
    riders = {name: Rider(len(dims.cross_layers), dims.hidden) for name in VISUAL_RIDERS}
    graph = memory_graph(slots=dims.slots, tokens=dims.tokens, channels=dims.channels, riders=riders)
    return graph.SerializeToString(deterministic=True)


def memory_graph(
    *, slots: int, tokens: int, channels: int, groups: int = 1, riders: Mapping[str, Rider] | None = None
) -> onnx.ModelProto:
    """One update of a bank of G groups, S slots, n tokens, C channels; for each rider G' groups of width H (`memory.py`).

    All tensors are float32 but for position, pair, entry and merged, which are int32. Where G is 1, `features` is `[n, C]`.

    In:

    - features `[G, n, C]` and each rider's rows `[G', n, H]`: the frame;
    - bank_features `[G, S, n, C]`, bank_<rider> `[G', S, n, H]`, bank_similarity, bank_norms `[G, S, n]`: what the last run gave
      (zeros before the first). A slot's similarity is its cosine with the next one in time, less 1;
    - position `[G, S, n]`: of each slot in time before this update, 0 = the oldest, -1 = out of use;
    - sizes `[G, S, n]`: frames in each slot;
    - pair `[G, n]`: position of the older slot to merge; -1 = the first most similar pair; -2 = none;
    - entry `[G, n]`: the slot that the frame takes; -1 = the one that the merge frees; -2 = no frame enters.

    Out: next_features, next_<rider>, next_similarity, next_norms, shaped as they came in; merged `[G, n]`, the position that was
    merged or -1; magnitude `[G, n]`, the sum of all absolute values of the frame's row and riders, finite if those are.

    Sums are in float32, the host's in float64. Features have much in common, so that cosines lie close to 1, where float32 is
    coarse; what is compared is therefore cosine - 1 = -|a/|a| - b/|b||^2 / 2, which is precise in itself: only pairs whose
    *difference* from 1 agrees to about six digits may be told apart otherwise than on the host. Equal rows have exactly 0: of a
    static scene's pairs the oldest is merged, and it does not drift.
    """
    graph = _Graph()
    riders = riders or {}
    bank = _Bank(graph, groups, slots, tokens)
    rows_shape = [tokens, channels] if groups == 1 else [groups, tokens, channels]
    frame = graph.reshape(graph.input("features", _FLOAT, rows_shape), [groups, tokens, channels])
    rider_rows = {name: graph.input(name, _FLOAT, [rider.groups, tokens, rider.channels]) for name, rider in riders.items()}
    stored = {
        name: graph.input(f"bank_{name}", _FLOAT, [part_groups, slots, tokens, width])
        for name, part_groups, width in [
            ("features", groups, channels), *((name, rider.groups, rider.channels) for name, rider in riders.items())
        ]
    }  # fmt: skip
    bank.read_state()

    merged_rows = {
        name: bank.blend(values, groups if name == "features" else riders[name].groups) for name, values in stored.items()
    }
    bank.compare(stored["features"], merged_rows["features"], frame, channels)
    for name, values in stored.items():
        part_groups = groups if name == "features" else riders[name].groups
        new = frame if name == "features" else rider_rows[name]
        bank.write(f"next_{name}", values, merged_rows[name], new, part_groups)
    bank.report(frame, rider_rows)
    return graph.model()


class _Bank:
    """The parts of the update, in the order in which they run.

    Small arrays are `[G, S, n]`, or `[G, 1, n]` where they are of one slot for each token.
    """

    def __init__(self, graph: _Graph, groups: int, slots: int, tokens: int) -> None:
        self.graph, self.groups, self.slots, self.tokens = graph, groups, slots, tokens
        self.by_slot = [groups, slots, tokens]
        self.one = [groups, 1, tokens]

    def read_state(self) -> None:
        """What is merged, and where the frame goes: masks over the slots."""
        g = self.graph
        self.similarity = g.input("bank_similarity", _FLOAT, self.by_slot)
        self.norms = g.input("bank_norms", _FLOAT, self.by_slot)
        # Positions are small integers: exact in float32, in which every operator of TensorRT takes them.
        self.position = g.cast(g.input("position", _INT32, self.by_slot), _FLOAT)
        self.sizes = g.input("sizes", _FLOAT, self.by_slot)
        pair = g.reshape(g.cast(g.input("pair", _INT32, [self.groups, self.tokens]), _FLOAT), self.one)
        entry = g.reshape(g.cast(g.input("entry", _INT32, [self.groups, self.tokens]), _FLOAT), self.one)
        self.slot_index = g.constant(np.arange(self.slots, dtype=np.float32).reshape(1, -1, 1))

        self.newest = g.node("ReduceMax", self.position, axes=[1], keepdims=1)
        chosen = g.where(g.node("Equal", pair, g.number(OWN_CHOICE)), self._most_similar(), pair)
        merges = g.both(g.node("GreaterOrEqual", chosen, g.number(0)), g.node("Less", chosen, self.newest))
        older = g.where(merges, chosen, g.number(_NO_POSITION))
        newer = g.node("Add", older, g.number(1))
        before = g.where(g.node("Greater", older, g.number(0)), g.node("Sub", older, g.number(1)), g.number(_NO_POSITION))
        self.merged = g.where(merges, chosen, g.number(-1))
        self.is_older, self.is_newer = self._at(older), self._at(newer)
        self.is_before, self.is_after = self._at(before), self._at(g.node("Add", older, g.number(2)))
        in_use = g.node("GreaterOrEqual", self.position, g.number(0))
        self.is_newest = g.both(self._at(self.newest), in_use)
        # The merge may take the newest slot in: then it is the merged row that the frame follows.
        self.joins_newest = g.node("Equal", newer, self.newest)
        freed = g.where(merges, self._slot_of(self.is_newer), g.number(NOWHERE))
        takes = g.where(g.node("Equal", entry, g.number(FREED)), freed, entry)
        self.is_entry = g.node("Equal", self.slot_index, takes)

    def _most_similar(self) -> str:
        """Position of the first most similar pair: the host's argmax in time order."""
        g = self.graph
        pairs = g.both(g.node("GreaterOrEqual", self.position, g.number(0)), g.node("Less", self.position, self.newest))
        shown = g.where(pairs, self.similarity, g.number(_BELOW_EVERY_COSINE))
        best = g.both(pairs, g.node("GreaterOrEqual", shown, g.node("ReduceMax", shown, axes=[1], keepdims=1)))
        return g.node("ReduceMin", g.where(best, self.position, g.number(self.slots)), axes=[1], keepdims=1)

    def _at(self, position: str) -> str:
        return self.graph.node("Equal", self.position, position)

    def _of(self, mask: str, values: str) -> str:
        """The value of the slot that a mask names for each token, `[G, 1, n]`; 0 where it names none."""
        g = self.graph
        return g.node("ReduceSum", g.where(mask, values, g.number(0)), g.ints([1]), keepdims=1)

    def _slot_of(self, mask: str) -> str:
        return self._of(mask, self.slot_index)

    def _rows(self, values: str, mask: str, part_groups: int) -> str:
        """Rows `[G', n, C]` of the slot that a mask names for each token; of slot 0 where it names none."""
        g = self.graph
        first = np.arange(part_groups)[:, None] * (self.slots * self.tokens) + np.arange(self.tokens)
        down = g.node("Mul", g.cast(self._slot_of(mask), _INT32), g.constant(np.array(self.tokens, np.int32)))
        index = g.node("Add", g.reshape(down, [self.groups, self.tokens]), g.constant(first.astype(np.int32)))
        flat = g.reshape(values, [part_groups * self.slots * self.tokens, -1])
        return g.node("Gather", flat, index, axis=0)

    def blend(self, values: str, part_groups: int) -> str:
        """The merged rows `[G', n, C]`: into + weight * (other - into), which leaves equal rows exactly equal."""
        g = self.graph
        older, newer = (self._rows(values, mask, part_groups) for mask in (self.is_older, self.is_newer))
        size_older, size_newer = self._of(self.is_older, self.sizes), self._of(self.is_newer, self.sizes)
        total = g.node("Max", g.node("Add", size_older, size_newer), g.number(1))
        weight = g.reshape(g.node("Div", size_newer, total), [self.groups, self.tokens, 1])
        return g.node("Add", older, g.node("Mul", g.node("Sub", newer, older), weight))

    def compare(self, features: str, merged: str, frame: str, channels: int) -> None:
        """Norms of the two rows that are written, and the three similarities that they change."""
        g = self.graph
        stack = [1, self.groups, self.tokens, channels]

        def stacked(*rows: str) -> str:
            return g.node("Concat", *(g.reshape(part, stack) for part in rows), axis=0)

        written = stacked(merged, frame)
        norms = g.node("Sqrt", g.node("ReduceSum", g.node("Mul", written, written), g.ints([3]), keepdims=0))
        norm, frame_norm = (g.reshape(part, self.one) for part in g.split(norms, 2))
        masks = (self.is_before, self.is_after, self.is_newest)
        before, after, newest = (self._rows(features, mask, self.groups) for mask in masks)
        before_norm, after_norm, newest_norm = (self._of(mask, self.norms) for mask in masks)
        last = g.where(g.reshape(self.joins_newest, [self.groups, self.tokens, 1]), merged, newest)
        last_norm = g.where(self.joins_newest, norm, newest_norm)

        older, older_whole = self._unit(stacked(before, merged, last), before_norm, norm, last_norm)
        newer, newer_whole = self._unit(stacked(merged, after, frame), norm, after_norm, frame_norm)
        apart = g.node("Sub", older, newer)
        distance = g.node("ReduceSum", g.node("Mul", apart, apart), g.ints([3]), keepdims=0)
        product = g.node("ReduceSum", g.node("Mul", older, newer), g.ints([3]), keepdims=0)
        changed = g.where(
            g.both(older_whole, newer_whole), g.node("Mul", distance, g.number(-0.5)), g.node("Sub", product, g.number(1))
        )
        with_before, with_after, with_frame = (g.reshape(part, self.one) for part in g.split(changed, 3))

        similarity = g.where(self.is_before, with_before, self.similarity)
        similarity = g.where(self.is_older, with_after, similarity)
        # The slot before the frame; where the merge took the newest slot in, what is written to that one means nothing.
        is_last = g.node("Or", g.both(self.joins_newest, self.is_older), self.is_newest)
        g.output("next_similarity", _FLOAT, self.by_slot, g.where(is_last, with_frame, similarity))
        norms = g.where(self.is_older, norm, self.norms)
        g.output("next_norms", _FLOAT, self.by_slot, g.where(self.is_entry, frame_norm, norms))

    def _unit(self, rows: str, *norms: str) -> tuple[str, str]:
        """Rows `[3, G, n, C]` over their norms, and whether they are of length 1 `[3, G, n]`: not where a norm is below 1e-8."""
        g = self.graph
        shape = [1, self.groups, self.tokens]
        norm = g.node("Concat", *(g.reshape(part, shape) for part in norms), axis=0)
        divisor = g.reshape(g.node("Max", norm, g.number(COSINE_EPS)), [len(norms), self.groups, self.tokens, 1])
        return g.node("Div", rows, divisor), g.node("GreaterOrEqual", norm, g.number(COSINE_EPS))

    def write(self, name: str, values: str, merged: str, new: str, part_groups: int) -> None:
        """The bank with the merged row in the older slot's place and the frame in its own."""
        g = self.graph
        shape = g.shapes[values]
        row = [part_groups, 1, self.tokens, shape[-1]]
        masks = (g.reshape(mask, [*self.by_slot, 1]) for mask in (self.is_older, self.is_entry))
        older, entry = masks
        g.output(name, _FLOAT, shape, g.where(entry, g.reshape(new, row), g.where(older, g.reshape(merged, row), values)))

    def report(self, frame: str, riders: Mapping[str, str]) -> None:
        """What the host is told: the pair that was merged, and whether what came in was finite."""
        g = self.graph
        shape = [self.groups, self.tokens]
        g.output("merged", _INT32, shape, g.cast(g.reshape(self.merged, shape), _INT32))
        total = g.node("ReduceSum", g.node("Abs", frame), g.ints([2]), keepdims=0)
        for rows in riders.values():
            axes = [2] if g.shapes[rows][0] == self.groups else [0, 2]
            total = g.node("Add", total, g.reshape(g.node("ReduceSum", g.node("Abs", rows), g.ints(axes), keepdims=0), shape))
        g.output("magnitude", _FLOAT, shape, total)


class _Graph:
    """An ONNX graph in the making; a value is its name."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[int]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []

    def input(self, name: str, kind: int, shape: list[int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        self.shapes[name] = shape
        return name

    def output(self, name: str, kind: int, shape: list[int], value: str) -> None:
        """Call an existing value by the name of an output."""
        maker = next(node for node in self._nodes if value in node.output)
        maker.output[0] = name
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, values: NDArray[np.generic]) -> str:
        """A constant; equal ones are one."""
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(values, self._constants[key]))
        return self._constants[key]

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def ints(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def cast(self, value: str, kind: int) -> str:
        return self.node("Cast", value, to=kind)

    def reshape(self, value: str, shape: list[int]) -> str:
        return self.node("Reshape", value, self.ints(shape))

    def where(self, mask: str, yes: str, no: str) -> str:
        return self.node("Where", mask, yes, no)

    def both(self, one: str, other: str) -> str:
        return self.node("And", one, other)

    def split(self, value: str, parts: int) -> list[str]:
        """Along the first axis, one entry each."""
        return [self.node("Gather", value, self.constant(np.array(index, np.int32)), axis=0) for index in range(parts)]

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, "memory", self._inputs, self._outputs, self._initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model
