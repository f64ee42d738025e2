"""Write a torch module as an ONNX file: fixed opset, named inputs and outputs, optionally weights stored in half precision."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from keepsight.export.half import halve_model

# TensorRT 10.3 (JetPack 6) takes 17: LayerNormalization is native there, Gelu is still spelled with Erf.
OPSET = 17
HALF_MIN_ELEMENTS = 1024
_ALIGN = 64


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    half_storage: bool = False,
    half_compute: bool = False,
) -> None:
    """Trace `module(*inputs.values())` and write it to `path`.

    Args:
        inputs: example tensors by graph input name, in call order.
        outputs: graph output names, in return order.
        dynamic_axes: axis -> name of a dynamic size, per input or output.
        half_storage: keep weights of 1,024 elements or more as float16 on disk, cast to float32 as the graph loads.
            The module's own weights must have been rounded first (`round_to_half`), else the file differs from it.
        half_compute: matrix products and convolutions in float16, as `export/half.py` says.
    """
    module = module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        # The tracing exporter is the one that still writes opset 17; it warns that it is deprecated, and on shape reads.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in (dynamic_axes or {}).items()},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(path))
    restore_inputs(model, inputs, dynamic_axes or {})
    _turn_gemm_weights(model)
    if half_compute:
        halve_model(model)
    if half_storage:
        store_half(model)
    model.producer_version = ""  # the same weights give the same bytes whatever torch wrote them
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def restore_inputs(
    model: onnx.ModelProto, inputs: Mapping[str, Tensor], dynamic_axes: Mapping[str, Mapping[int, str]]
) -> None:
    """Give the graph every input of its contract, in order: the exporter drops those that a model has no use for, such as
    the position buckets of one without positions.
    """
    kept = {value.name: value for value in model.graph.input}
    del model.graph.input[:]
    for name, tensor in inputs.items():
        axes = dynamic_axes.get(name, {})
        shape = [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(str(tensor.dtype).removeprefix("torch.")))
        model.graph.input.append(kept.get(name) or helper.make_tensor_value_info(name, kind, shape))


def round_to_half(module: nn.Module) -> None:
    """Round every weight that `half_storage` would keep as float16 to a value that float16 holds exactly."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() >= HALF_MIN_ELEMENTS:
                parameter.copy_(parameter.half().float())


def store_half(model: onnx.ModelProto) -> None:
    """Keep large float32 initializers as float16 and cast them back at the head of the graph (folded when it is loaded).

    Raises:
        ValueError: a weight does not survive the trip, so the stored graph would differ from its source.
    """
    graph = model.graph
    casts = []
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < HALF_MIN_ELEMENTS:
            continue
        half = values.astype("float16")
        if not (half.astype("float32") == values).all():
            raise ValueError(f"weight {tensor.name} is not representable in float16; call round_to_half first")
        stored = f"{tensor.name}.half"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], name=f"{tensor.name}.cast", to=TensorProto.FLOAT))
        graph.initializer[index].CopyFrom(numpy_helper.from_array(half, stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _turn_gemm_weights(model: onnx.ModelProto) -> None:
    """Store the weight of each `Gemm` as `MatMul` has it, [in, out], so that graphs can share one copy."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in weights:
            continue
        turned = next((attribute for attribute in node.attribute if attribute.name == "transB" and attribute.i), None)
        users = sum(list(other.input).count(node.input[1]) for other in model.graph.node)
        if turned is None or users != 1:
            continue
        tensor = weights[node.input[1]]
        values = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        turned.i = 0


def share_weights(folder: Path, graphs: Sequence[str], file: str) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Move the large weights of several graphs to one external file in which equal ones stand once.

    Returns:
        sha256 of a weight's bytes -> (offset in the file, numpy dtype, shape).
    """
    index: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    blob = bytearray()
    for name in graphs:
        path = folder / f"{name}.onnx"
        model = onnx.load(str(path))
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.size < HALF_MIN_ELEMENTS:
                continue
            raw = values.tobytes()
            key = hashlib.sha256(raw).hexdigest()
            if key not in index:
                blob += bytes(-len(blob) % _ALIGN)
                index[key] = (len(blob), values.dtype.name, values.shape)
                blob += raw
            tensor.raw_data = raw
            onnx.external_data_helper.set_external_data(tensor, file, offset=index[key][0], length=len(raw))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        path.write_bytes(model.SerializeToString(deterministic=True))
    (folder / file).write_bytes(blob)
    return index
