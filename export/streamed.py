"""Write a large module as ONNX without ever holding its weights: trace it hollow, then stream each weight to the external file.

A ViT-g has 4 GB of float32 weights, and the tracing exporter holds several copies. Here the module is traced with parameters
that occupy no memory (one zero, expanded), the graph is written without them, and each weight is read from the checkpoint,
written and forgotten: the peak is the trace's activations and the largest single weight.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from keepsight.export.half import halve_graph, too_large
from keepsight.export.onnxfile import OPSET
from keepsight.export.tensorfiles import StoredTensor

_ALIGN = 64

Progress = Callable[[int, int], None]
"""Called with the weights written so far and their number."""


def hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, its parameters zeros that take no memory: right shapes, for tracing only."""
    with torch.device("meta"):
        module = build()
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(owner, name, nn.Parameter(zeros, requires_grad=False))
    return module.train()


def export_streamed(
    build: Callable[[], nn.Module],
    weights: Mapping[str, StoredTensor],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    half_compute: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the module that `build` makes, with `weights`, to `path` and `path` with the ending `.weights`.

    Args:
        build: makes the module; it must work on the meta device (no buffers with values), and not differ in training (no
            dropout, no batch norm).
        weights: one for each parameter, by name, of its shape.
        inputs: example tensors by graph input name, in call order.
        outputs: graph output names, in return order.
        dynamic_axes: axis -> name of a dynamic size, per input or output.
        half_compute: matrix products and convolutions in float16, as `export/half.py` says.
        progress: told after each weight.

    Returns:
        With `half_compute`: weights that float16 can't hold, whose operators stay float32.

    Raises:
        ValueError: the weights are not those of the module.
    """
    module = hollow(build)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError("the weights are not those of the module")
    model = _trace(module, inputs, outputs, dynamic_axes or {})
    turned = _drop_transposes(model, set(weights))
    del model.graph.input[len(inputs) :]
    halves: set[str] = set()
    large: list[str] = []
    if half_compute:
        large = [name for name, tensor in weights.items() if too_large(tensor.read())]
        halves = halve_graph(model.graph, weights.keys() - set(large), {name: len(t.shape) for name, t in weights.items()})
    file = path.with_suffix(".weights")
    used = {name for node in model.graph.node for name in node.input}
    with file.open("wb") as out:
        for index, (name, tensor) in enumerate(weights.items()):
            if name in used:
                kind = torch.float16 if name in halves else torch.float32
                values = tensor.read().detach().to(kind).numpy()
                model.graph.initializer.append(_write(out, file.name, name, values.T if name in turned else values))
            if progress is not None:
                progress(index + 1, len(weights))
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
    return large


def _trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """The graph, its weights being inputs after `inputs`, under the parameters' names."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracing exporter's age; it is the one that writes opset 17
        target = Path(folder) / "graph.onnx"
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(target),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in dynamic_axes.items()},
            opset_version=OPSET,
            export_params=False,
            dynamo=False,
            # Folding would transpose weights that are not there; and weights that are all alike would be taken for one,
            # unless the module says that it is being trained, when only the same storage counts.
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
        model = onnx.load(str(target))
    model.producer_version = ""  # the same weights give the same bytes whatever torch wrote them
    return model


def _drop_transposes(model: onnx.ModelProto, weights: set[str]) -> set[str]:
    """Take out each `Transpose` of a weight that nothing else reads; returns the weights to be stored transposed.

    PyTorch keeps a linear layer's weight as [out, in] and the graph multiplies by [in, out].
    """
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    turned: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights and readers[node.input[0]] == 1:
            turned[node.output[0]] = node.input[0]
            model.graph.node.remove(node)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = turned.get(name, name)
    return set(turned.values())


def _write(out: BinaryIO, file: str, name: str, values: NDArray[Any]) -> TensorProto:
    """Append one weight to the external file; the record that the graph keeps of it."""
    out.write(bytes(-out.tell() % _ALIGN))
    offset = out.tell()
    np.ascontiguousarray(values).tofile(out)
    kind = TensorProto.FLOAT16 if values.dtype == np.float16 else TensorProto.FLOAT
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", offset), ("length", out.tell() - offset)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


__all__ = ["Progress", "export_streamed", "hollow"]
