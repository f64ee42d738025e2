"""What a run of a graph costs: the products of a manifest's `Cost`, its floating-point operations and the bytes that it moves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from keepsight.runtime.manifest import PRODUCT, Cost, Manifest
from keepsight.streams.errors import BundleError

__all__ = [
    "BYTES", "COUNT_COMMAND", "Precision", "Product", "cost_of", "graph_bytes", "product_flops", "products", "total_bytes",
]  # fmt: skip

Precision = Literal["fp32", "fp16", "int8", "fp8"]
BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
"""Of a value that a product reads or writes. What is no product stays float32 in every precision (`export/half.py`)."""

COUNT_COMMAND = "keepsight count BUNDLE"
_SINGLE = 4
_SHAPE = re.compile(PRODUCT.replace(r"([1-9]\d*\*)?[1-9]\d*x[1-9]\d*x[1-9]\d*", r"(?:([1-9]\d*)\*)?(\d+)x(\d+)x(\d+)"))


@dataclass(frozen=True)
class Product:
    """`count` times a product of `batch` pairs of matrices, `[m, k]` by `[k, n]`.

    Attributes:
        convolution: the first matrix is made of patches, and is not as large in memory.
        weights: the second matrix is known when the graph is loaded.
    """

    batch: int
    m: int
    k: int
    n: int
    count: int = 1
    convolution: bool = False
    weights: bool = False

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.count * self.batch * self.m * self.k * self.n

    def __str__(self) -> str:
        """Without its count, as a manifest has it."""
        batch = "" if self.batch == 1 else f"{self.batch}*"
        return f"{'conv ' * self.convolution}{batch}{self.m}x{self.k}x{self.n}{' w' * self.weights}"

    @classmethod
    def parse(cls, shape: str, count: int = 1) -> Product:
        """From what a manifest says."""
        found = _SHAPE.fullmatch(shape)
        if found is None:
            raise ValueError(f"{shape!r} is no shape of a product")
        convolution, batch, m, k, n, weights = found.groups()
        return cls(int(batch or 1), int(m), int(k), int(n), count, convolution is not None, weights is not None)


def products(cost: Cost) -> Iterator[Product]:
    """All products of a run."""
    for shape, count in cost.products.items():
        yield Product.parse(shape, count)


def product_flops(cost: Cost) -> int:
    """Of the products alone."""
    return sum(product.flops for product in products(cost))


def graph_bytes(cost: Cost, precision: Precision) -> dict[str, int]:
    """Bytes that a run moves: weights read, activations of products, activations of all else, inputs and outputs.

    Inputs and outputs are part of the activations; they are named because they are moved whatever is fused.
    """
    size = BYTES[precision]
    return {
        "weights": size * cost.weights,
        "products": size * cost.product_values,
        "others": _SINGLE * sum(cost.other_values.values()),
        "inputs_outputs": _SINGLE * cost.inputs_outputs,
    }


def total_bytes(cost: Cost, precision: Precision) -> int:
    """All that is read and written if nothing is fused but Gelu: the most that a backend moves."""
    moved = graph_bytes(cost, precision)
    return moved["weights"] + moved["products"] + moved["others"]


def cost_of(manifest: Manifest, graph: str, text: int | None = None) -> Cost:
    """The cost of a graph at a text bucket, by default the largest.

    Raises:
        BundleError: there is no such graph, or nobody has counted it.
    """
    info = manifest.graphs.get(graph)
    if info is None:
        raise BundleError(f"bundle {manifest.name} has no graph {graph!r}.", fix=f"It has {', '.join(manifest.graphs)}.")
    if info.costs is None:
        raise BundleError(
            f"bundle {manifest.name} does not say what a run of its graph {graph!r} costs: it was exported by an older version.",
            fix=f"Let it be counted, on a machine with keepsight[export]: {COUNT_COMMAND}",
        )
    found = [cost for cost in info.costs if text is None or cost.text in (0, text)]
    if not found:
        raise BundleError(f"graph {graph!r} of bundle {manifest.name} has not been counted at {text} rows of text.")
    return found[-1]
