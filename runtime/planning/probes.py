"""What this machine's processor does with the operators that graphs are made of: small ONNX graphs, timed on ONNX Runtime.

The graphs are written here, field by field of onnx.proto, since boards have no `onnx` package. Rounds of all probes, one after
the other, are what a noisy machine needs: a slow moment meets them all.
Timed is the thread's own processor time: on a shared machine the clock on the wall tells what others do, and tells it of long
operators, which are interrupted, more than of short ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.manifest import Work
from keepsight.runtime.planning.costs import Product
from keepsight.streams.errors import MissingComponentError

__all__ = ["CONVOLUTIONS", "OVERHEAD_NODES", "PRODUCTS", "Probes", "WORK_VALUES", "model_bytes"]

PRODUCTS = tuple(
    Product.parse(shape)
    for shape in (
        # By weights: rows of a frame, of a question and of many, by widths of small and of full models.
        "8x160x480 w", "32x768x768 w", "32x768x3072 w", "32x3072x768 w", "64x384x384 w", "64x256x1024 w", "200x128x128 w",
        "200x768x768 w", "257x384x1536 w", "257x1024x256 w", "257x1408x768 w", "640x192x768 w", "640x768x192 w", "900x256x256 w",
        # Of two activations: scores and what is read by them.
        "12*200x64x200", "12*200x200x64", "12*32x64x2000", "12*32x2000x64", "4*48x32x400", "4*48x400x32", "48*24x32x500",
        "48*24x500x32", "8*64x48x800", "8*64x800x48", "6*257x64x257", "6*257x257x64",
    )
)  # fmt: skip
"""Calibrated with; no shape of a bundle is looked at to choose them."""

CONVOLUTIONS = (
    # (channels, filters, kernel, stride, groups, pixels a side): patches, one pixel at a time, channel by channel.
    (3, 384, 16, 16, 1, 224), (3, 200, 14, 14, 1, 224), (3, 40, 3, 2, 1, 200), (20, 120, 1, 1, 1, 56), (192, 32, 1, 1, 1, 28),
    (300, 640, 1, 1, 1, 7), (88, 88, 3, 1, 88, 56), (160, 160, 5, 1, 160, 28), (440, 440, 3, 1, 440, 14),
)  # fmt: skip
WORK_VALUES: Mapping[Work, tuple[int, ...]] = {
    "map": (200, 768), "gelu": (200, 1536), "softmax": (12, 200, 200), "norm": (200, 768), "reduce": (200, 768),
    "move": (200, 12, 64),
}  # fmt: skip
"""What is no product: the shape of its input."""
OVERHEAD_NODES = 64
Probe = tuple[bytes, dict[str, NDArray[np.float32]]]
_BANDWIDTH_BYTES = 96 << 20
_CALLS = ("run", "nodes")


@dataclass
class Probes:
    """All probes, loaded, and what each round took.

    Attributes:
        seconds: of processor time, of each round, by a probe's name: a product's shape, `conv` and its numbers, a kind of work,
            `run` (a graph of one tiny operator), `nodes` (of many more), `bandwidth`.
    """

    threads: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self._runs: dict[str, tuple[Any, dict[str, NDArray[np.float32]]]] = {}
        for product in PRODUCTS:
            self._add(str(product), *_product_graph(product, rng))
        for shape in CONVOLUTIONS:
            self._add(f"conv {shape}", *_convolution_graph(shape, rng))
        for kind, sizes in WORK_VALUES.items():
            self._add(kind, *_work_graph(kind, sizes, rng))
        self._add("run", *_chain_graph(rng, 1))
        self._add("nodes", *_chain_graph(rng, OVERHEAD_NODES + 1))
        self._memory = rng.random(_BANDWIDTH_BYTES // 8)
        self._sink = np.empty_like(self._memory)

    def round(self) -> None:
        """Time every probe once. Throw the first round away: it loads what later ones find."""
        start = time.thread_time()
        np.copyto(self._sink, self._memory)
        self.seconds.setdefault("bandwidth", []).append(time.thread_time() - start)
        for name, (session, feeds) in self._runs.items():
            first, second = (_timed(session, feeds) for _ in range(2))
            # In a graph, what an operator reads has just been written; and its code is met as often warm as cold.
            self.seconds.setdefault(name, []).append((first + second) / 2 if name in _CALLS else second)

    def forget(self) -> None:
        """Start counting anew."""
        self.seconds.clear()

    def medians(self) -> dict[str, float]:
        """Seconds of each probe."""
        return {name: float(np.median(taken)) for name, taken in self.seconds.items()}

    @property
    def copied_bytes(self) -> int:
        """Read and written by the probe of the bandwidth."""
        return 2 * self._memory.nbytes

    def _add(self, name: str, model: bytes, feeds: dict[str, NDArray[np.float32]]) -> None:
        self._runs[name] = (_session(model, self.threads), feeds)


def _timed(session: Any, feeds: Mapping[str, NDArray[np.float32]]) -> float:
    start = time.thread_time()
    session.run(None, feeds)
    return time.thread_time() - start


def _session(model: bytes, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingComponentError(
            f"onnxruntime cannot be loaded ({error}).", fix="Install it with `pip install onnxruntime`."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _product_graph(product: Product, rng: np.random.Generator) -> Probe:
    batch = [product.batch] if product.batch > 1 else []
    left, right = [*batch, product.m, product.k], [*batch, product.k, product.n]
    feeds = {"x": _random(rng, left)}
    weights: dict[str, NDArray[np.float32]] = {}
    (weights if product.weights else feeds)["w"] = _random(rng, right)
    inputs = {name: values.shape for name, values in feeds.items()}
    return model_bytes([("MatMul", ["x", "w"], "y", {})], inputs, "y", [*batch, product.m, product.n], weights), feeds


def _convolution_graph(
    shape: tuple[int, int, int, int, int, int], rng: np.random.Generator
) -> Probe:
    channels, filters, kernel, stride, groups, side = shape
    pad = kernel // 2 if stride < kernel <= 5 else 0
    out = (side + 2 * pad - kernel) // stride + 1
    feeds = {"x": _random(rng, [1, channels, side, side])}
    weights = {"w": _random(rng, [filters, channels // groups, kernel, kernel])}
    attributes = {"strides": [stride] * 2, "pads": [pad] * 4, "group": groups}
    model = model_bytes([("Conv", ["x", "w"], "y", attributes)], {"x": feeds["x"].shape}, "y", [1, filters, out, out], weights)
    return model, feeds


def _work_graph(kind: Work, sizes: tuple[int, ...], rng: np.random.Generator) -> Probe:
    """Spelled as the exporter spells it, since ONNX Runtime knows these patterns."""
    feeds = {"x": _random(rng, sizes)}
    weights: dict[str, NDArray[np.float32]] = {}
    out: Sequence[int] = sizes
    nodes: list[tuple[str, list[str], str, dict[str, Any]]]
    if kind == "gelu":
        weights = {name: np.array(value, np.float32) for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))}
        nodes = [
            ("Div", ["x", "root"], "a", {}), ("Erf", ["a"], "b", {}), ("Add", ["b", "one"], "c", {}),
            ("Mul", ["x", "c"], "d", {}), ("Mul", ["d", "half"], "y", {}),
        ]  # fmt: skip
    elif kind == "softmax":
        nodes = [("Softmax", ["x"], "y", {"axis": -1})]
    elif kind == "norm":
        weights = {"scale": _random(rng, sizes[-1:]), "bias": _random(rng, sizes[-1:])}
        nodes = [("LayerNormalization", ["x", "scale", "bias"], "y", {"axis": -1})]
    elif kind == "reduce":
        nodes, out = [("ReduceMean", ["x"], "y", {"axes": [-1], "keepdims": 1})], [*sizes[:-1], 1]
    elif kind == "move":
        nodes, out = [("Transpose", ["x"], "y", {"perm": [1, 0, 2]})], [sizes[1], sizes[0], sizes[2]]
    else:
        feeds["z"] = _random(rng, sizes)
        nodes = [("Add", ["x", "z"], "y", {})]
    inputs = {name: values.shape for name, values in feeds.items()}
    return model_bytes(nodes, inputs, "y", list(out), weights), feeds


def _chain_graph(rng: np.random.Generator, count: int) -> Probe:
    """Operators of sixteen values each, of several kinds: what it takes to call one."""
    feeds = {"x": _random(rng, [4, 4]), "z": _random(rng, [4, 4])}
    names = ["x", *(f"t{index}" for index in range(count - 1)), "y"]
    kinds: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Add", ["z"], {}), ("Softmax", [], {"axis": -1}), ("Mul", ["z"], {}), ("ReduceMean", [], {"axes": [-1], "keepdims": 1}),
    ]  # fmt: skip
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
    for index in range(count):
        kind, more, attributes = kinds[index % len(kinds)]
        nodes.append((kind, [names[index], *more], names[index + 1], attributes))
    return model_bytes(nodes, {"x": (4, 4), "z": (4, 4)}, "y", [4, 4], {}), feeds


def _random(rng: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    return rng.standard_normal(tuple(shape), dtype=np.float32)


# -- onnx.proto, as far as it is needed: field numbers of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto


def model_bytes(
    nodes: Sequence[tuple[str, list[str], str, dict[str, Any]]],
    inputs: Mapping[str, Sequence[int]],
    output: str,
    output_shape: Sequence[int],
    weights: Mapping[str, NDArray[np.float32]],
) -> bytes:
    """An ONNX file of opset 17 with float32 tensors: nodes as (operator, inputs, output, attributes of ints or lists of them)."""
    graph = b"".join(_message(1, _node(*node)) for node in nodes)
    graph += _text(2, "probe")
    graph += b"".join(_message(5, _tensor(name, values)) for name, values in weights.items())
    graph += b"".join(_message(11, _value(name, shape)) for name, shape in inputs.items())
    graph += _message(12, _value(output, output_shape))
    return _number(1, 8) + _message(7, graph) + _message(8, _text(1, "") + _number(2, 17))


def _node(operator: str, inputs: Sequence[str], output: str, attributes: Mapping[str, Any]) -> bytes:
    found = b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, operator)
    for name, value in attributes.items():
        body = _text(1, name)
        if isinstance(value, list):
            body += b"".join(_number(8, one) for one in value) + _number(20, 7)
        else:
            body += _number(3, value) + _number(20, 2)
        found += _message(5, body)
    return found


def _tensor(name: str, values: NDArray[np.float32]) -> bytes:
    return b"".join(_number(1, size) for size in values.shape) + _number(2, 1) + _text(8, name) + _message(9, values.tobytes())


def _value(name: str, shape: Sequence[int]) -> bytes:
    sizes = b"".join(_message(1, _number(1, size)) for size in shape)
    return _text(1, name) + _message(2, _message(1, _number(1, 1) + _message(2, sizes)))


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _text(number: int, words: str) -> bytes:
    return _message(number, words.encode())


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
