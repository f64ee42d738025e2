"""A bundle's replay graph written again from its own weights: what an older export has not, such as `attention`, is added.

Nothing else changes: the new graph reads the weights where they lie, and the manifest gets its hash.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from keepsight.export.costs import with_costs
from keepsight.export.graphs import GRAPHS, Replay, dynamic_axes, example_inputs
from keepsight.export.onnxfile import HALF_MIN_ELEMENTS, export_onnx
from keepsight.export.weights import WEIGHTS, load_qformer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import write_manifest
from keepsight.streams.errors import BundleError

__all__ = ["renew_replay"]


def renew_replay(folder: Path) -> Path:
    """Write `replay.onnx` of a bundle again; returns its path.

    Raises:
        BundleError: not a bundle, one without the index of its weights, one with several variants of this graph, or one whose
            file of shared weights lacks a weight in the form that the graph reads.
    """
    manifest = Bundle.open(folder).manifest
    files = manifest.graphs["replay"].files
    if set(files.values()) != {"replay.onnx"}:
        raise BundleError(f"{folder} has several replay graphs: {', '.join(files.values())}.", fix="Export it again.")
    half_storage, half_compute = _storage(folder / "replay.onnx")
    qformer, dims = load_qformer(folder), manifest.dims
    text = dims.text_buckets[0]
    inputs = example_inputs(qformer, slots=dims.slots, tokens=dims.tokens, text=text)["replay"]
    outputs = GRAPHS["replay"][1]
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "replay.onnx"
        axes = dynamic_axes([*inputs, *outputs], text)
        export_onnx(
            Replay(qformer), inputs, outputs, fresh, dynamic_axes=axes, half_storage=half_storage, half_compute=half_compute
        )
        model = onnx.load(str(fresh))
    _share(model, _stored(folder), folder)
    partial = folder / ".replay.onnx.part"
    partial.write_bytes(model.SerializeToString(deterministic=True))
    os.replace(partial, folder / "replay.onnx")
    write_manifest(folder, with_costs(folder, manifest))
    return folder / "replay.onnx"


def _storage(path: Path) -> tuple[bool, bool]:
    """How its large weights are held: (as float16 cast to float32 at the graph's head, as float16 that it computes in)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    half = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    stored = any(name.endswith(".half") for name in half)
    return stored, bool(half) and not stored


def _stored(folder: Path) -> dict[str, tuple[int, int]]:
    """sha256 -> offset and length of every weight that the bundle's graphs have in their shared file."""
    blob = (folder / WEIGHTS).read_bytes()
    found = {}
    for name in GRAPHS:
        for tensor in onnx.load(str(folder / f"{name}.onnx"), load_external_data=False).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                offset, length = int(place["offset"]), int(place["length"])
                found[hashlib.sha256(blob[offset : offset + length]).hexdigest()] = (offset, length)
    return found


def _share(model: onnx.ModelProto, stored: dict[str, tuple[int, int]], folder: Path) -> None:
    """Let the graph's large weights be those that lie in the shared file already."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size < HALF_MIN_ELEMENTS:
            continue
        place = stored.get(hashlib.sha256(values.tobytes()).hexdigest())
        if place is None:
            raise BundleError(f"{folder / WEIGHTS} does not hold {tensor.name} as this graph reads it.", fix="Export it again.")
        tensor.raw_data = values.tobytes()
        onnx.external_data_helper.set_external_data(tensor, WEIGHTS, offset=place[0], length=place[1])
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
