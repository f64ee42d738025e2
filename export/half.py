"""Graphs in float16 where it pays, and in float32 where it matters: mixed precision baked into the ONNX, not asked of a builder.

As under PyTorch's autocast, which the reference runs its visual encoder in: matrix products and convolutions take and give
float16 (accumulated in float32 by the hardware), with their bias; norms, softmax, Gelu, masks and the residual stream stay
float32. What only moves numbers about follows its input. Every other type is explicit, so a strongly typed TensorRT network
has nothing to choose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

__all__ = ["halve_graph", "halve_model", "too_large"]

HEAVY = ("MatMul", "Gemm", "Conv")
LARGEST = float(np.finfo(np.float16).max)
# Operators that only move numbers about, and which of their inputs are those numbers.
_MOVES: Mapping[str, int | None] = {
    "Transpose": 1, "Reshape": 1, "Flatten": 1, "Unsqueeze": 1, "Squeeze": 1, "Split": 1, "Slice": 1, "Expand": 1,
    "Gather": 1, "Identity": 1, "Concat": None,
}  # fmt: skip


def too_large(weight: torch.Tensor) -> bool:
    """Whether float16 can't hold all of its numbers."""
    return weight.numel() > 0 and not float(weight.detach().abs().max()) <= LARGEST


def halve_model(model: onnx.ModelProto) -> list[str]:
    """`halve_graph` for a model that holds its weights; they are converted too.

    Returns:
        Weights that float16 can't hold, whose operators stay float32.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    floats = {name: values for name, values in weights.items() if values.dtype == np.float32}
    large = [name for name, values in floats.items() if values.size and np.abs(values).max() > LARGEST]
    halves = halve_graph(model.graph, floats.keys() - set(large), {name: values.ndim for name, values in floats.items()})
    for tensor in model.graph.initializer:
        if tensor.name in halves:
            tensor.CopyFrom(numpy_helper.from_array(floats[tensor.name].astype(np.float16), tensor.name))
    return sorted(large)


def halve_graph(graph: onnx.GraphProto, weights: Collection[str], ranks: Mapping[str, int]) -> set[str]:
    """Rewrite a float32 graph in place.

    Args:
        weights: float32 weights that float16 can hold.
        ranks: number of axes of each float32 weight.

    Returns:
        The weights that must be stored as float16 from now on.
    """
    rewriting = _Rewriting(set(weights), ranks, _users(graph))
    for node in graph.node:
        rewriting.take(node)
    for output in graph.output:
        rewriting.as_float(output.name)
    del graph.node[:]
    graph.node.extend(rewriting.nodes)
    return rewriting.stored_half


def _users(graph: onnx.GraphProto) -> dict[str, list[NodeProto]]:
    users: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


@dataclass
class _Rewriting:
    """The new graph as it grows.

    Attributes:
        half_of: float32 tensor of the old graph -> its float16 twin in the new one.
        exact: those whose float32 numbers are nothing but their twin's.
        shown: those that exist in the new graph as float32, too.
    """

    weights: set[str]
    ranks: Mapping[str, int]
    users: Mapping[str, list[NodeProto]]
    nodes: list[NodeProto] = field(default_factory=list)
    half_of: dict[str, str] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    stored_half: set[str] = field(default_factory=set)

    def take(self, node: NodeProto) -> None:
        """Carry one node over, in the precision that it should have."""
        if node.op_type in HEAVY and self._can_be_half(node):
            self._in_half(node, range(len(node.input)))
        elif self._is_bias(node):
            self._in_half(node, range(2))
        elif node.op_type in _MOVES and self._moves_half(node):
            self._in_half(node, range(_MOVES[node.op_type] or len(node.input)))
        else:
            for name in node.input:
                self.as_float(name)
            self.nodes.append(node)

    def as_float(self, name: str) -> None:
        """Make sure that a tensor exists as float32."""
        if name in self.exact and name not in self.shown:
            self.nodes.append(_cast(self.half_of[name], name, TensorProto.FLOAT))
            self.shown.add(name)

    def _in_half(self, node: NodeProto, data: range) -> None:
        for place in data:
            node.input[place] = self._as_half(node.input[place])
        for place, name in enumerate(node.output):
            self.half_of[name] = node.output[place] = f"{name}/half"
            self.exact.add(name)
        self.nodes.append(node)

    def _as_half(self, name: str) -> str:
        if name in self.weights and self._only_half_users(name):
            self.stored_half.add(name)
            return name
        if name and name not in self.half_of:
            self.half_of[name] = f"{name}/half"
            self.nodes.append(_cast(name, self.half_of[name], TensorProto.FLOAT16))
        return self.half_of.get(name, name)

    def _only_half_users(self, name: str) -> bool:
        users = self.users[name]
        return len(users) == 1 or all(user.op_type in HEAVY and self._can_be_half(user) for user in users)

    def _can_be_half(self, node: NodeProto) -> bool:
        """Not if it reads a weight that float16 can't hold."""
        return all(name in self.weights for name in node.input if name in self.ranks)

    def _is_bias(self, node: NodeProto) -> bool:
        """A weight of one axis added to what is half already: the bias of a linear layer."""
        if node.op_type != "Add":
            return False
        weight, other = sorted(node.input, key=lambda name: name not in self.ranks)
        biases = weight in self.weights and self.ranks[weight] == 1 and len(self.users[weight]) == 1
        return biases and other in self.exact

    def _moves_half(self, node: NodeProto) -> bool:
        data = list(node.input)[: _MOVES[node.op_type]]
        return all(name in self.exact for name in data)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind)
