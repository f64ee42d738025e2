"""Counts the work of a graph from its ONNX file: floating-point operations, products by shape, values moved.

Sizes are found by shape inference with every free axis bound. What depends on sizes and weights alone is computed once by any
runtime, and is not counted; weights are not read. `runtime/manifest.py: Cost` says what is counted as how much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from keepsight.runtime.manifest import Cost, Dims, Manifest, Work, read_manifest, write_manifest
from keepsight.runtime.planning.costs import Precision, Product, total_bytes
from keepsight.streams.errors import BundleError

__all__ = ["count_bundle", "count_graph", "with_costs"]

Shape = tuple[int, ...]

_FREE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant", "Dropout"}
"""Views: no value moves."""
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Einsum"}
_KINDS: dict[str, Work] = {
    "Softmax": "softmax", "LayerNormalization": "norm", "InstanceNormalization": "norm", "BatchNormalization": "norm",
    **dict.fromkeys(("Transpose", "Concat", "Split", "Slice", "Gather", "GatherElements", "Expand", "Pad", "Cast"), "move"),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "GlobalAveragePool", "AveragePool"), "reduce"),
}  # fmt: skip
"""All others are `map`."""
_FLOPS: Mapping[Work, int] = {"map": 1, "gelu": 8, "softmax": 5, "norm": 7, "reduce": 1, "move": 0}
_FOLD_LIMIT = 1 << 20  # values of a tensor that is computed here


def count_bundle(folder: Path) -> Manifest:
    """Count every graph of a bundle and write its manifest again; nothing else in it changes.

    Raises:
        BundleError: no bundle, or a graph with operators that can't be counted.
    """
    return write_manifest(folder, with_costs(folder, read_manifest(folder)))


def with_costs(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the costs of its graphs, whose files lie in `folder`: those of its first variant."""
    graphs = {}
    variant = manifest.variants[0]
    precision: Precision = variant if variant in ("fp32", "fp16", "int8", "fp8") else "fp32"  # type: ignore[assignment]
    for name, info in manifest.graphs.items():
        costs = count_graph(folder / info.files[variant], manifest.dims)
        largest = costs[-1]
        graphs[name] = info.model_copy(
            update={"costs": costs, "flops": largest.flops, "bytes": total_bytes(largest, precision)}
        )
    return manifest.model_copy(update={"graphs": graphs})


def count_graph(path: Path, dims: Dims) -> tuple[Cost, ...]:
    """The cost of one run with a batch of one, at every text bucket that makes a difference.

    Raises:
        BundleError: an axis is free that no bundle has, or an operator can't be counted.
    """
    model = onnx.load(str(path), load_external_data=False)
    free = {axis.dim_param for value in model.graph.input for axis in value.type.tensor_type.shape.dim if axis.dim_param}
    if not free <= {"batch", "text", "rows"}:
        raise BundleError(f"{path.name} has free axes {sorted(free)}; a bundle's are batch, text and rows.")
    buckets = dims.text_buckets if free & {"text", "rows"} else (0,)
    return tuple(_count(model, path.name, {"batch": 1, "text": text, "rows": dims.queries + text}, text) for text in buckets)


def _count(model: ModelProto, name: str, axes: Mapping[str, int], text: int) -> Cost:
    graph = _Graph(model, name, axes)
    tally = _Tally()
    for node in graph.working():
        _COUNTERS.get(node.op_type, _count_other)(graph, node, tally)
    return Cost(
        text=text,
        flops=tally.flops,
        weights=sum(prod(graph.shapes[weight]) for weight in tally.weights),
        product_values=tally.product_values,
        other_values=dict(sorted(tally.other_values.items())),
        inputs_outputs=sum(prod(graph.shapes[value.name]) for value in (*model.graph.input, *model.graph.output)),
        kernels=tally.kernels,
        products=dict(sorted(tally.products.items())),
    )


@dataclass
class _Tally:
    flops: int = 0
    product_values: int = 0
    kernels: int = 0
    weights: set[str] = field(default_factory=set)
    other_values: Counter[Work] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)

    def add_product(self, product: Product) -> None:
        self.products[str(product)] += 1
        self.flops += product.flops


class _Graph:
    """A graph with every size known.

    Attributes:
        shapes: of every tensor.
        constant: tensors that depend on weights and sizes alone.
    """

    def __init__(self, model: ModelProto, name: str, axes: Mapping[str, int]) -> None:
        self.name, self.nodes = name, list(model.graph.node)
        self._opset = {entry.domain: entry.version for entry in model.opset_import}
        self._opsets, self._ir = list(model.opset_import), model.ir_version
        self._types: dict[str, TypeProto] = {}
        self._values: dict[str, NDArray[Any]] = {}
        self.constant: set[str] = {""}
        self.shapes: dict[str, Shape] = {}
        self._read_initializers(model)
        self._bind_inputs(model, axes)
        for node in self.nodes:
            self._infer(node)
        self.producer = {output: node for node in self.nodes for output in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for source in node.input:
                self._readers.setdefault(source, []).append(node)
        self._in_gelu = self._find_gelu()

    def working(self) -> list[NodeProto]:
        """The nodes that do something at run time; of a Gelu its Erf alone."""
        return [
            node for node in self.nodes
            if node.op_type not in _FREE and node.output[0] not in self.constant and node.output[0] not in self._in_gelu
        ]  # fmt: skip

    def size(self, name: str) -> int:
        return prod(self.shapes[name])

    def moved(self, node: NodeProto) -> int:
        """Values read, constants left out, and written."""
        read = sum(self.size(source) for source in node.input if source not in self.constant)
        return read + sum(self.size(output) for output in node.output if output in self.shapes)

    def _read_initializers(self, model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            self._know(tensor.name, helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)))
            self.constant.add(tensor.name)
            small = prod(tensor.dims) <= 64 and tensor.data_location != TensorProto.EXTERNAL
            if small:
                self._values[tensor.name] = numpy_helper.to_array(tensor)

    def _bind_inputs(self, model: ModelProto, axes: Mapping[str, int]) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        for value in model.graph.input:
            if value.name in weights:
                continue
            kind = value.type.tensor_type
            shape = [axis.dim_value if axis.HasField("dim_value") else axes[axis.dim_param] for axis in kind.shape.dim]
            self._know(value.name, helper.make_tensor_type_proto(kind.elem_type, shape))

    def _know(self, name: str, kind: TypeProto) -> None:
        self._types[name] = kind
        shape = kind.tensor_type.shape.dim
        if kind.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in shape):
            self.shapes[name] = tuple(axis.dim_value for axis in shape)

    def _infer(self, node: NodeProto) -> None:
        """Types and sizes of a node's outputs; their values where they depend on sizes alone and are small."""
        sources = [source for source in node.input if source]
        folded = self._fold(node, sources)
        if folded is not None:
            for output, value in zip(node.output, folded, strict=True):
                self._values[output] = np.asarray(value)
                kind = helper.np_dtype_to_tensor_dtype(self._values[output].dtype)
                self._know(output, helper.make_tensor_type_proto(kind, list(self._values[output].shape)))
                self.constant.add(output)
            return
        known = {source: numpy_helper.from_array(self._values[source], source) for source in sources if source in self._values}
        schema = onnx.defs.get_schema(node.op_type, self._opset.get(node.domain, 1), node.domain)
        try:
            types = onnx.shape_inference.infer_node_outputs(
                schema, node, {source: self._types[source] for source in sources}, known or None,
                opset_imports=self._opsets, ir_version=self._ir,
            )  # fmt: skip
        except Exception as error:  # onnx's own errors have no base but this
            raise BundleError(f"{self.name}: the sizes of {node.op_type} {node.name} can't be found ({error}).") from error
        for output, kind in types.items():
            self._know(output, kind)
        if not all(output in self.shapes for output in node.output if output):
            raise BundleError(f"{self.name}: the output of {node.op_type} {node.name} has a size that only its values tell.")
        if set(sources) <= self.constant:
            self.constant |= set(node.output)

    def _fold(self, node: NodeProto, sources: list[str]) -> list[Any] | None:
        """A node's outputs, computed, if its inputs are known and it is small."""
        if node.op_type == "Shape":
            start, end = (next((a.i for a in node.attribute if a.name == key), None) for key in ("start", "end"))
            return [np.array(self.shapes[sources[0]], np.int64)[start:end]]
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            value = helper.get_attribute_value(attribute)
            return [numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.array(value)]
        if not all(source in self._values for source in sources) or sum(self._values[s].size for s in sources) > _FOLD_LIMIT:
            return None
        bare = {source: self._values[source] for source in sources}
        values = list(ReferenceEvaluator(node, opsets=self._opset).run(None, bare))
        return None if sum(np.size(value) for value in values) > _FOLD_LIMIT else values

    def _find_gelu(self) -> set[str]:
        """Outputs of the nodes around an Erf that make a Gelu with it: x / sqrt(2) before, + 1, * x and * 0.5 after."""
        found: set[str] = set()
        for node in self.nodes:
            if node.op_type != "Erf":
                continue
            before = self.producer.get(node.input[0])
            if before is not None and before.op_type in ("Div", "Mul"):
                found.add(before.output[0])
            place = node
            for wanted in (("Add",), ("Mul",), ("Mul",)):
                readers = self._readers.get(place.output[0], [])
                if len(readers) != 1 or readers[0].op_type not in wanted:
                    break
                place = readers[0]
                found.add(place.output[0])
        return found


def _count_matmul(graph: _Graph, node: NodeProto, tally: _Tally) -> None:
    left, right, out = (graph.shapes[name] for name in (node.input[0], node.input[1], node.output[0]))
    m, k = (left[-2] if len(left) > 1 else 1), left[-1]
    n = right[-1] if len(right) > 1 else 1
    batch = prod(out) // (m * n)
    weights = node.input[1] in graph.constant
    if prod(right[:-2]) == 1:  # one matrix for all rows of the batch
        batch, m = 1, m * batch
    _count_product(graph, node, tally, Product(batch, m, k, n, weights=weights))


def _count_gemm(graph: _Graph, node: NodeProto, tally: _Tally) -> None:
    turned = {attribute.name: attribute.i for attribute in node.attribute}
    left, right = graph.shapes[node.input[0]], graph.shapes[node.input[1]]
    m, k = left[::-1] if turned.get("transA") else left
    n = right[0] if turned.get("transB") else right[1]
    _count_product(graph, node, tally, Product(1, m, k, n, weights=node.input[1] in graph.constant))


def _count_convolution(graph: _Graph, node: NodeProto, tally: _Tally) -> None:
    weight, out = graph.shapes[node.input[1]], graph.shapes[node.output[0]]
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    product = Product(groups, out[0] * prod(out[2:]), prod(weight[1:]), weight[0] // groups, convolution=True, weights=True)
    _count_product(graph, node, tally, product)


def _count_einsum(graph: _Graph, node: NodeProto, tally: _Tally) -> None:
    """Of two operands: letters of both and the output are the batch, of both alone are summed over."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation").replace(" ", "")
    terms, result = equation.split("->")
    left, right = terms.split(",")
    sizes = dict(zip(left + right, graph.shapes[node.input[0]] + graph.shapes[node.input[1]], strict=True))

    def extent(letters: set[str]) -> int:
        return prod(sizes[letter] for letter in letters)

    a, b, c = set(left), set(right), set(result)
    product = Product(extent(a & b & c), extent((a - b) & c), extent((a & b) - c), extent((b - a) & c))
    _count_product(graph, node, tally, product)


def _count_product(graph: _Graph, node: NodeProto, tally: _Tally, product: Product) -> None:
    tally.add_product(product)
    tally.product_values += graph.moved(node)
    tally.kernels += 1
    tally.weights |= _weights(graph, node)


def _count_other(graph: _Graph, node: NodeProto, tally: _Tally) -> None:
    kind: Work = "gelu" if node.op_type == "Erf" else _KINDS.get(node.op_type, "map")
    tally.other_values[kind] += graph.moved(node) if node.op_type != "Gather" else 2 * graph.size(node.output[0])
    tally.flops += _FLOPS[kind] * max(graph.size(node.output[0]), graph.size(node.input[0]) if kind == "reduce" else 0)
    tally.kernels += 1
    if node.op_type != "Gather":  # it reads a few rows of a table
        tally.weights |= _weights(graph, node)


def _weights(graph: _Graph, node: NodeProto) -> set[str]:
    return {source for source in node.input if source and source in graph.constant and source in graph.shapes}


_COUNTERS: dict[str, Callable[[_Graph, NodeProto, _Tally], None]] = {
    "MatMul": _count_matmul, "Gemm": _count_gemm, "Conv": _count_convolution, "Einsum": _count_einsum,
}  # fmt: skip
assert _COUNTERS.keys() == _PRODUCTS
