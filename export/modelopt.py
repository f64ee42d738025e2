"""INT8 and FP8 with explicit Q/DQ through NVIDIA ModelOpt, calibrated on the CPU.

ModelOpt rewrites the file that it is given, so it gets a copy. It leaves the weights of products and convolutions in float
behind a QuantizeLinear; here they are stored in 8 bits, with the numbers that this operator gives.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from keepsight.export.fp8 import fp8_codes, fp8_tensor
from keepsight.export.graphfile import save_graph
from keepsight.export.int8 import quiet
from keepsight.streams.errors import MissingComponentError

__all__ = ["modelopt_version", "quantize_with_modelopt", "store_weights"]


def modelopt_version() -> str:
    """The version of ModelOpt that is installed.

    Raises:
        MissingComponentError: none is.
    """
    try:
        return importlib.metadata.version("nvidia-modelopt")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingComponentError(
            "NVIDIA ModelOpt is not installed.",
            fix="It wants its own versions of packages, so give it an environment of its own: "
            'python3 -m venv modelopt-env && modelopt-env/bin/pip install "keepsight[modelopt]", '
            "then run modelopt-env/bin/keepsight quantize; or leave out --with modelopt.",
        ) from error


def quantize_with_modelopt(
    source: Path,
    target: Path,
    frames: Sequence[NDArray[np.uint8]],
    *,
    mode: Literal["int8", "fp8"],
    operators: Collection[str],
    keep: Collection[str],
) -> None:
    """Write a graph of the input `frames` in 8 bits; what is not quantised keeps its type.

    Args:
        frames: to calibrate with, uint8 `[S, S, 3]`.
        operators: types of nodes. Residual additions, which ModelOpt would round as well, are best not among them.
        keep: names of nodes that stay as they are.

    Raises:
        MissingComponentError: ModelOpt is not installed.
    """
    modelopt_version()
    with tempfile.TemporaryDirectory() as folder, quiet(), contextlib.redirect_stdout(io.StringIO()):
        from modelopt.onnx.quantization import quantize

        copy, out = Path(folder) / "graph.onnx", Path(folder) / "quantized.onnx"
        model = onnx.load(str(source))
        save_graph(model, copy)
        quantize(
            onnx_path=str(copy),
            output_path=str(out),
            quantize_mode=mode,
            calibration_data={"frames": np.stack(frames)},
            calibration_eps=["cpu"],
            calibration_method="max",
            high_precision_dtype="fp32",  # as it came: no part is turned into float16
            op_types_to_quantize=list(operators),
            nodes_to_exclude=[f"{re.escape(name)}$" for name in keep],
            log_level="ERROR",
        )
        model = onnx.load(str(out))
    store_weights(model)
    save_graph(model, target)


def store_weights(model: onnx.ModelProto) -> None:
    """Quantise each weight that a QuantizeLinear reads, in place, and take that node out."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    stored: dict[str, TensorProto] = {}
    kept = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in weights:
            stored[node.output[0]] = _quantised(node, weights)
        else:
            kept.append(node)
    read = {name for node in kept for name in node.input}
    left = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend([*left, *stored.values()])


def _quantised(node: NodeProto, weights: Mapping[str, TensorProto]) -> TensorProto:
    """What a QuantizeLinear with a zero point of 0 makes of a weight."""
    values, scale = (numpy_helper.to_array(weights[name]).astype(np.float32) for name in node.input[:2])
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    if scale.ndim:
        scale = np.expand_dims(scale, tuple(place for place in range(values.ndim) if place != axis % values.ndim))
    if weights[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN:
        return fp8_tensor(node.output[0], fp8_codes(values / scale))
    codes = np.clip(np.rint(values / scale), -128, 127).astype(np.int8)
    return numpy_helper.from_array(codes, node.output[0])
