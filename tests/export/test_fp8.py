"""FP8: the rounding against PyTorch's, and what is written against each product computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from keepsight.export.fp8 import fp8_codes, fp8_operators, fp8_values, watch_inputs, write_fp8
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.streams.errors import UsageError

BATCH, WIDTH, OUT, CHANNELS, SIDE = 3, 32, 24, 20, 5


def numbers(count: int) -> np.ndarray:
    """Of all magnitudes that FP8 tells apart, and smaller."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=count) * 2.0 ** rng.uniform(-14, 7, count)).astype(np.float32)


def nearest(values: np.ndarray) -> np.ndarray:
    """FP8 by its definition, slowly: the nearest of all its finite numbers, of two equally near ones the even."""
    sizes = [m / 8 * 2**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    table = np.array(sizes[:-1])  # the last code is nan
    apart = np.abs(np.abs(values.astype(np.float64))[..., None] - table)
    code = apart.argmin(axis=-1)  # of a tie, the lower
    above = np.minimum(code + 1, len(table) - 1)
    tied = np.take_along_axis(apart, above[..., None], -1) == np.take_along_axis(apart, code[..., None], -1)
    return np.sign(values) * table[np.where(tied[..., 0] & (code % 2 == 1), above, code)]


def rounded(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Through FP8 and back, in float64."""
    return nearest(values.astype(np.float32) / np.float32(scale)) * np.float64(scale)


# The format.


def test_every_code_stands_for_what_pytorch_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(fp8_values(codes.numpy()), codes.view(torch.float8_e4m3fn).float().numpy())


def test_rounding_is_pytorchs_and_ties_go_to_the_even_code() -> None:
    sizes = fp8_values(np.arange(127, dtype=np.uint8))
    middles = (sizes[1:] + sizes[:-1]) / 2
    around = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), sizes, numbers(10_000)])
    values = np.concatenate([around, -around]).clip(-448, 448)
    wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8_codes(values), wanted)
    np.testing.assert_array_equal(fp8_values(fp8_codes(values[:999])), nearest(values[:999]).astype(np.float32))


def test_what_is_too_large_becomes_the_largest() -> None:
    np.testing.assert_array_equal(fp8_values(fp8_codes(np.array([449, 1e30, -480.0]))), [448, 448, -448])


# The graph.


def model(dtype: type[np.floating] = np.float32) -> onnx.ModelProto:
    """One of each operator: x by a weight, by a turned weight with a bias, by itself, and as a picture, clipped, convolved."""
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.normal(size=(WIDTH, OUT)) * 2.0 ** rng.uniform(-6, 0, OUT), "turned": rng.normal(size=(OUT, WIDTH)),
        "bias": rng.normal(size=OUT), "kernel": rng.normal(size=(CHANNELS, CHANNELS, 3, 3)),
        "low": np.zeros(()), "high": np.full((), 0.7),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Gemm", ["x", "turned", "bias"], ["linear"], name="linear", transB=1),
        helper.make_node("Transpose", ["x"], ["xt"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "xt"], ["scores"], name="scores"),
        helper.make_node("Clip", ["picture", "low", "high"], ["clipped"], name="clip"),
        helper.make_node("Conv", ["clipped", "kernel"], ["convolved"], name="convolution"),
        helper.make_node("Mul", ["product", "high"], ["unread"], name="other"),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shapes = {"x": [BATCH, WIDTH], "picture": [1, CHANNELS, SIDE, SIDE]}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    results = {
        "product": [BATCH, OUT], "linear": [BATCH, OUT], "scores": [BATCH, BATCH],
        "convolved": [1, CHANNELS, SIDE - 2, SIDE - 2],
    }  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in results.items()]
    stored = [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(dtype: type[np.floating] = np.float32, *, seed: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(size=(BATCH, WIDTH)), "picture": rng.normal(size=(1, CHANNELS, SIDE, SIDE))}
    return {name: value.astype(dtype) for name, value in arrays.items()}


def run(graph: onnx.ModelProto, folder: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx.save(graph, str(folder / "graph.onnx"))
    onnx.checker.check_model(str(folder / "graph.onnx"), full_check=True)
    with OnnxRuntimeEngine(folder / "graph.onnx") as engine:
        return engine.run(given)


def by_hand(given: dict[str, np.ndarray], largest: dict[str, float], dtype: type[np.floating]) -> dict[str, np.ndarray]:
    """Each product of the rounded sides, in float64. Scales are stored in the graph's type, so they are rounded to it."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model(dtype).graph.initializer}

    def weight(name: str, channel: int) -> np.ndarray:
        others = tuple(axis for axis in range(weights[name].ndim) if axis != channel)
        scale = (np.abs(weights[name]).max(axis=others, keepdims=True).astype(np.float32) / 448).astype(dtype)
        return rounded(weights[name], scale)

    def activation(values: np.ndarray, name: str) -> np.ndarray:
        return rounded(values, dtype(np.float32(largest[name]) / 448))

    x, xt = activation(given["x"], "x"), activation(given["x"].T, "xt")
    pixels, kernel = activation(given["picture"].clip(0, dtype(0.7)), "clipped"), weight("kernel", 0)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), axis=(2, 3))
    return {
        "product": x @ weight("w", 1),
        "linear": x @ weight("turned", 0).T + weights["bias"],
        "scores": x @ xt,
        "convolved": np.einsum("bchwij,ocij->bohw", windows, kernel),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 4e-3)])
def test_each_operator_computes_with_rounded_sides(tmp_path: Path, dtype: type[np.floating], tolerance: float) -> None:
    graph, largest = model(dtype), {"x": 1.3, "xt": 2.0, "clipped": 0.7}  # x is larger than 1.3 in places: cut there
    write_fp8(graph, fp8_operators(graph), largest)
    got, wanted = run(graph, tmp_path, feeds(dtype)), by_hand(feeds(dtype), largest, dtype)
    exact = run(model(dtype), tmp_path, feeds(dtype))
    for name, value in got.items():
        assert value.dtype == dtype
        spread = np.abs(wanted[name]).max()
        np.testing.assert_allclose(value, wanted[name], atol=tolerance * spread, rtol=0)
        assert np.abs(value - exact[name]).max() > 2 * tolerance * spread  # FP8 is not nothing


def test_calibration_sees_the_largest_magnitude_of_what_operators_read(tmp_path: Path) -> None:
    graph = model()
    watched = watch_inputs(graph, fp8_operators(graph))
    given = feeds()
    met = run(graph, tmp_path, given)
    assert {name: float(met[output]) for name, output in watched.items()} == {
        "x": np.abs(given["x"]).max(), "xt": np.abs(given["x"]).max(), "clipped": np.float32(0.7)
    }  # fmt: skip


def test_weights_are_stored_in_8_bits_and_an_activation_is_rounded_once(tmp_path: Path) -> None:
    graph = model()
    write_fp8(graph, fp8_operators(graph), {"x": 1.0, "xt": 1.0, "clipped": 0.7})
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    assert not {"w", "turned", "kernel"} & kinds.keys()  # the float32 ones are gone
    assert sum(kind == TensorProto.FLOAT8E4M3FN and "zero" not in name for name, kind in kinds.items()) == 3
    assert kinds["bias"] == TensorProto.FLOAT
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("QuantizeLinear") == 3 and operators.count("DequantizeLinear") == 6  # x has two readers


def test_what_is_kept_is_untouched(tmp_path: Path) -> None:
    graph = model()
    write_fp8(graph, {"linear"}, {"x": 3.0})
    got, exact = run(graph, tmp_path, feeds()), run(model(), tmp_path, feeds())
    for name in ("product", "scores", "convolved"):
        np.testing.assert_array_equal(got[name], exact[name])
    assert not np.array_equal(got["linear"], exact["linear"])


def test_a_channel_of_zeros_stays_zero(tmp_path: Path) -> None:
    graph = model()
    for tensor in graph.graph.initializer:
        if tensor.name == "w":
            values = numpy_helper.to_array(tensor).copy()
            values[:, 4] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "w"))
    write_fp8(graph, {"product"}, {"x": 0.0})  # neither did calibration meet anything
    assert not run(graph, tmp_path, feeds())["product"][:, 4].any()


@pytest.mark.parametrize(
    ("out", "into", "kernel", "chosen"),
    [
        (32, 32, 1, True),
        (32, 32, 5, True),
        (32, 32, 6, False),  # 36 weights
        (32, 16, 1, False),
        (16, 32, 1, False),
        (32, 1, 3, False),  # depthwise
    ],
)
def test_which_convolutions_are_for_fp8(out: int, into: int, kernel: int, chosen: bool) -> None:
    weight = numpy_helper.from_array(np.zeros((out, into, kernel, kernel), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="convolution")
    graph = helper.make_model(helper.make_graph([node], "graph", [], [], [weight]))
    assert fp8_operators(graph) == ["convolution"] * chosen


def test_an_operation_that_changed_its_meaning_is_refused() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy"]
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1])]  # its axes are an input from opset 18 on
    graph = helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    with pytest.raises(UsageError, match="ReduceMean of opset 17 is another operation in opset 19"):
        write_fp8(graph, [], {})
