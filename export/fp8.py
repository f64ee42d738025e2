"""FP8 (e4m3fn) with explicit Q/DQ: weights stored in 8 bits, activations scaled by the largest value that calibration met.

Matrix products and convolutions read both sides through FP8 and compute in the type that they had; the rest of a graph, in
float32 or in float16, is not touched. A scale maps the largest magnitude to 448, the largest number of the format: one scale
per tensor for activations, one per output channel for weights, as NVIDIA ModelOpt chooses them (`modelopt/onnx/quantization/
fp8.py`, calibration `max`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from keepsight.streams.errors import UsageError

__all__ = ["LARGEST", "fp8_codes", "fp8_operators", "fp8_tensor", "fp8_values", "watch_inputs", "write_fp8"]

LARGEST = 448.0
OPSET = 19  # the first whose QuantizeLinear knows FP8
MIN_CHANNELS, MAX_KERNEL = 17, 32

# What these gained between opset 17 and 19 are types, and attributes whose default is the old behaviour.
_SAME_IN_19 = {
    "AveragePool", "Cast", "Constant", "DequantizeLinear", "Equal", "Identity", "Pad", "QuantizeLinear", "Reshape", "Shape",
    "Size",
}  # fmt: skip


def fp8_values(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers that FP8 codes stand for: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; 0x7f and 0xff are nan."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    size = np.where((codes & 127) == 127, np.nan, size)
    return np.where(codes & 128, -size, size).astype(np.float32)


def fp8_codes(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """FP8 codes of finite numbers: rounded to the nearest, ties to the even code; what is larger than 448 becomes 448."""
    size, middles = np.abs(values.astype(np.float32)), _middles()
    codes = np.searchsorted(middles, size, side="left")  # of a tie, the lower code
    tied = middles[np.minimum(codes, len(middles) - 1)] == size
    codes += tied & (codes % 2 == 1)
    return np.where(np.signbit(values), codes + 128, codes).astype(np.uint8)


@cache
def _middles() -> NDArray[np.float32]:
    """Half-way between each two neighbouring magnitudes; float32 holds them exactly."""
    sizes = fp8_values(np.arange(127, dtype=np.uint8))
    return np.asarray((sizes[1:] + sizes[:-1]) / 2, np.float32)


def fp8_tensor(name: str, codes: NDArray[np.uint8]) -> TensorProto:
    """An ONNX tensor of FP8 numbers."""
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, codes.shape, codes.tobytes(), raw=True)


def fp8_operators(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that FP8 is for, in the graph's order.

    Every matrix product, and the convolutions that ModelOpt picks for TensorRT: more than 16 channels on both sides (which
    leaves out those in groups) and kernels of at most 32 weights (which leaves out patch embeddings).
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") or _is_fp8_convolution(node, shapes)]


def _is_fp8_convolution(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if node.op_type != "Conv" or node.input[1] not in shapes:
        return False
    out, into, *kernel = shapes[node.input[1]]
    return min(out, into) >= MIN_CHANNELS and int(np.prod(kernel)) <= MAX_KERNEL


def watch_inputs(model: onnx.ModelProto, operators: Collection[str]) -> dict[str, str]:
    """Give a graph one more output for each tensor that these operators read and that is no weight: its largest magnitude.

    Returns:
        Tensor -> name of its output, float32 `[]`.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node if node.name in operators for name in node.input[:2] if name not in weights}
    watched = {name: f"{name}/largest" for name in sorted(read)}
    for name, output in watched.items():
        graph.node.append(helper.make_node("Cast", [name], [f"{name}/float"], to=TensorProto.FLOAT))
        graph.node.append(helper.make_node("Abs", [f"{name}/float"], [f"{name}/magnitude"]))
        graph.node.append(helper.make_node("ReduceMax", [f"{name}/magnitude"], [output], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    return watched


def write_fp8(model: onnx.ModelProto, operators: Iterable[str], largest: Mapping[str, float]) -> None:
    """Put both sides of these operators through FP8, in place.

    Args:
        model: opset 17 to 19, its weights loaded.
        operators: names from `fp8_operators`.
        largest: magnitude of each tensor that they read and that is no weight.

    Raises:
        UsageError: a graph with an operation that means something else in opset 19.
    """
    raise_opset(model)
    writing = _Writing(model, frozenset(operators), largest)
    for node in model.graph.node:
        writing.take(node)
    del model.graph.node[:]
    model.graph.node.extend(writing.nodes)
    read = {name for node in writing.nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*weights, *writing.stored])


def raise_opset(model: onnx.ModelProto) -> None:
    """Call a graph one of opset 19, if every operation in it means there what it does now."""
    opset = next(entry for entry in model.opset_import if entry.domain == "")
    for operator in sorted({node.op_type for node in model.graph.node if not node.domain} - _SAME_IN_19):
        if onnx.defs.get_schema(operator, OPSET).since_version > opset.version:
            raise UsageError(f"{operator} of opset {opset.version} is another operation in opset {OPSET}, which FP8 needs.")
    opset.version = max(opset.version, OPSET)
    model.ir_version = max(model.ir_version, 9)  # the first with FP8


@dataclass
class _Writing:
    """The new graph as it grows.

    Attributes:
        nodes: of the new graph.
        stored: its FP8 weights, scales and zero points.
    """

    model: onnx.ModelProto
    operators: Collection[str]
    largest: Mapping[str, float]
    nodes: list[NodeProto] = field(default_factory=list)
    stored: list[TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._types = _element_types(self.model)
        self._through: dict[tuple[str, int | None], str] = {}

    def take(self, node: NodeProto) -> None:
        """Carry one node over; if it is one of the operators, its two sides go through FP8."""
        if node.name in self.operators:
            for place in range(2):
                node.input[place] = self._through_fp8(node.input[place], node, place)
        self.nodes.append(node)

    def _through_fp8(self, name: str, node: NodeProto, place: int) -> str:
        """The tensor's name after FP8; several readers share it."""
        weight = self._weights.get(name)
        axis = None if weight is None or place == 0 else _channel_axis(node, len(weight.dims))
        if (name, axis) not in self._through:
            prefix = f"{name}/fp8" if axis is None else f"{name}/fp8.{axis}"
            self._through[name, axis] = (
                self._activation(name, prefix) if weight is None else self._weight(weight, prefix, axis)
            )
        return self._through[name, axis]

    def _activation(self, name: str, prefix: str) -> str:
        scale = _scale(np.array(self.largest[name]), self._types[name])
        inputs = self._store_scale(prefix, scale)
        self.nodes.append(helper.make_node("QuantizeLinear", [name, *inputs], [prefix], name=f"{prefix}/quantize"))
        return self._dequantised(prefix, inputs)

    def _weight(self, tensor: TensorProto, prefix: str, axis: int | None) -> str:
        values: NDArray[np.float32] = numpy_helper.to_array(tensor).astype(np.float32)
        others = tuple(place for place in range(values.ndim) if place != axis)
        scale = _scale(np.abs(values).max(axis=others), tensor.data_type)
        steps: NDArray[np.float32] = np.expand_dims(scale, others).astype(np.float32)  # as stored: float16 rounds it
        codes = fp8_codes(values / steps)
        self.stored.append(fp8_tensor(prefix, codes))
        return self._dequantised(prefix, self._store_scale(prefix, scale), axis)

    def _store_scale(self, prefix: str, scale: NDArray[np.floating[Any]]) -> Sequence[str]:
        """Returns the names of the scale and of its zero points."""
        self.stored.append(numpy_helper.from_array(scale, f"{prefix}/scale"))
        self.stored.append(fp8_tensor(f"{prefix}/zero", np.zeros(scale.shape, np.uint8)))
        return f"{prefix}/scale", f"{prefix}/zero"

    def _dequantised(self, prefix: str, scale: Sequence[str], axis: int | None = None) -> str:
        name = f"{prefix}/dequantize"
        node = helper.make_node("DequantizeLinear", [prefix, *scale], [name], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return name


def _scale(largest: NDArray[np.floating[Any]], kind: int) -> NDArray[np.floating[Any]]:
    """What 1 stands for in FP8, in the element type of the tensor that is scaled; never 0."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return np.maximum(largest.astype(np.float32) / LARGEST, np.finfo(dtype).tiny).astype(dtype)


def _channel_axis(node: NodeProto, rank: int) -> int:
    """Axis of the output channels of the weight on an operator's second side."""
    if node.op_type == "Conv":
        return 0
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if turned else rank - 1


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of a graph, weights aside: they stand in as inputs, so that none is copied."""
    graph = onnx.GraphProto(name="types", node=model.graph.node, input=model.graph.input, output=model.graph.output)
    for tensor in model.graph.initializer:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    light = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
