"""How two graphs of the same model differ: which weights, and node by node where the first difference is."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from keepsight.runtime.evaluation.parity import ChangedWeight, Located, difference
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine

__all__ = ["changed_weights", "first_difference"]


def changed_weights(graph: Path, reference: Path) -> list[ChangedWeight]:
    """Weights of `graph` that `reference` does not hold, value for value, with the first node that reads each.

    They are compared by content, whatever they are called; half-precision storage counts as the values it stands for. A
    changed weight is found here even if no output shows it, such as one behind a Relu that is never open.
    """
    known = {_digest(values) for _, values in _weights(reference)}
    model = onnx.load(str(graph), load_external_data=False)
    found = []
    for name, values in _weights(graph):
        if _digest(values) not in known:
            used_as = next((n.output[0] for n in model.graph.node if n.op_type == "Cast" and name in n.input), name)
            node = next((n for n in model.graph.node if used_as in n.input), None)
            found.append(ChangedWeight(used_as, node.name if node else "", node.op_type if node else ""))
    return found


def _weights(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and values of each floating-point weight, one in memory at a time."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            held = TensorProto()
            held.CopyFrom(tensor)
            if onnx.external_data_helper.uses_external_data(held):
                onnx.external_data_helper.load_external_data_for_tensor(held, str(path.parent))
                held.data_location = TensorProto.DEFAULT
                del held.external_data[:]
            yield tensor.name, numpy_helper.to_array(held)


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.astype(np.float32).tobytes()).hexdigest()

def first_difference(
    graph: Path, reference: Path, feeds: Mapping[str, NDArray[Any]], limit: float
) -> Located | None:
    """The first node of `graph` whose output differs from the tensor of the same name in `reference`, by more than `limit`.

    Both must come from the same exporter, which names tensors after the module's parts. Weights count as tensors, so that a
    changed weight is named as an input of the node that first shows it.

    Args:
        graph, reference: .onnx files, with their external weights beside them.
        feeds: inputs of both, by name.

    Returns:
        None if no tensor that both have differs.
    """
    ours, theirs = (onnx.load(str(path), load_external_data=False) for path in (graph, reference))
    shared = _tensors(ours) & _tensors(theirs)
    values, wanted = _run(graph, shared, feeds), _run(reference, shared, feeds)
    apart = {
        name: difference(values[name], wanted[name], limit).largest
        for name in shared
        if values[name].shape == wanted[name].shape and values[name].dtype.kind == "f"
    }
    over = {name for name, largest in apart.items() if not largest <= limit}
    for node in ours.graph.node:
        wrong = next((name for name in node.output if name in over), None)
        if wrong is None:
            continue
        if node.op_type == "Cast" and wrong == node.output[0] and _is_weight(ours, node.input[0]):
            continue  # a stored weight as it is loaded: the node that uses it tells more
        blamed = tuple(name for name in node.input if name in over)
        return Located(node.name or node.output[0], node.op_type, wrong, apart[wrong], blamed)
    return None


def _is_weight(model: onnx.ModelProto, name: str) -> bool:
    return any(tensor.name == name for tensor in model.graph.initializer)


def _tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all that the graph computes or holds."""
    return {name for node in model.graph.node for name in node.output if name} | {
        tensor.name for tensor in model.graph.initializer
    }


def _run(path: Path, names: set[str], feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Values of the tensors `names`, weights among them, from one run."""
    with tempfile.TemporaryDirectory() as folder:
        for file in path.parent.iterdir():
            if file.is_file() and file.suffix == ".weights":
                _place(file, Path(folder) / file.name)
        model = onnx.load(str(path), load_external_data=False)
        outputs = {value.name for value in model.graph.output}
        weights = {tensor.name for tensor in model.graph.initializer}
        copies = {name: f"{name}/told" for name in names & weights}
        for name, copy in copies.items():  # a weight can't be an output itself
            model.graph.node.append(helper.make_node("Identity", [name], [copy], name=copy))
        for name in sorted(names - outputs):
            model.graph.output.append(onnx.ValueInfoProto(name=copies.get(name, name)))  # ONNX Runtime infers its type
        target = Path(folder) / "told.onnx"
        target.write_bytes(model.SerializeToString())
        engine = OnnxRuntimeEngine(target)
        found = engine.run({name: feeds[name] for name in engine.inputs})
        engine.close()
    originals = {copy: name for name, copy in copies.items()}
    return {originals.get(name, name): value for name, value in found.items()}


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
