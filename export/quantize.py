"""Eight bits for the visual encoder: explicit Q/DQ, calibrated on frames, as a new variant of a bundle.

INT8 is written by ONNX Runtime's static quantisation (`export/int8.py`) and FP8, for GPUs that have it, by `export/fp8.py`, which
ONNX Runtime calibrates; or either by NVIDIA ModelOpt (`export/modelopt.py`). The Q-Former's graphs stay as they are: what is
banked, and how similar two moments are, is computed in the precision that it had. That the features themselves are coarser may
still change which moments merge, so that is measured.

A small convolutional encoder loses much when all of it is quantised, and errors made early go through everything after. So
the first operators stay as they are, as few of them as bring the features' cosine with the original's over a limit. The cosine
is that of the very file that is written: ONNX Runtime's CPU computes Q/DQ in both types as ONNX defines it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from keepsight.export.fp8 import fp8_operators, watch_inputs, write_fp8
from keepsight.export.graphfile import save_graph
from keepsight.export.int8 import quantize_int8
from keepsight.export.merges import Agreement, compare_memories
from keepsight.export.modelopt import modelopt_version, quantize_with_modelopt
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.runtime.graphs.onnx_weights import external_files
from keepsight.runtime.manifest import Manifest, write_manifest
from keepsight.streams.errors import ParityError, UsageError

__all__ = ["LEAST_COSINE", "Quantized", "Tool", "Variant", "quantize_vision"]

Variant = Literal["int8", "fp8"]
Tool = Literal["onnxruntime", "modelopt"]
Frames = Sequence[NDArray[np.uint8]]
Progress = Callable[[str, int, int], None]

LEAST_COSINE = 0.98
_OPERATORS = ("Conv", "MatMul", "Gemm")
_JUDGED = 16  # frames that the cosine is taken over
_QUESTION = "what is there?"


@dataclass(frozen=True)
class Quantized:
    """What came out.

    Attributes:
        manifest: of the bundle, with the new variant.
        cosine: of the features with those of the first variant, over calibration frames.
        operators: convolutions and matrix products in 8 bits, and in all.
        file_bytes: of the graph and its weights in 8 bits, and in the first variant.
        memory: how the memory over the calibration frames compares with that of the first variant.
    """

    manifest: Manifest
    cosine: float
    operators: tuple[int, int]
    file_bytes: tuple[int, int]
    memory: Agreement


def quantize_vision(
    bundle: Bundle,
    frames: Iterable[NDArray[np.uint8]],
    *,
    variant: Variant = "int8",
    tool: Tool = "onnxruntime",
    least_cosine: float = LEAST_COSINE,
    progress: Progress | None = None,
) -> Quantized:
    """Write `vision.int8.onnx` or `vision.fp8.onnx` into a bundle and name the variant in its manifest.

    Args:
        bundle: made from its first variant, fp32 or fp16, whose files the other graphs of the new variant are.
        frames: uint8 `[S, S, 3]`, scaled as the manifest says; a hundred of what the camera will see is a good number.
        tool: who calibrates.
        least_cosine: what the features must keep.

    Raises:
        UsageError: no frames, frames of another size, or a bundle that this can't be made from.
        MissingComponentError: ModelOpt is asked for and not installed.
        ParityError: not even one operator in 8 bits keeps the cosine.
    """
    pictures, first = list(frames), bundle.manifest.variants[0]
    _check(bundle.manifest, pictures, variant, tool)
    source, target = bundle.graph_path("vision", first), bundle.path / f"vision.{variant}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / source.name
        save_graph(_widened(source), plain)
        quantizer = _QUANTIZERS[variant, tool](plain, pictures)
        tell = progress or (lambda what, done, total: None)
        model, cosine = _search(quantizer, plain, Path(folder) / target.name, pictures, least_cosine, tell)
        operators = _in_8_bits(model), sum(node.op_type in _OPERATORS for node in model.graph.node)
        written = save_graph(model, target)
    manifest = _with_variant(bundle.manifest, variant, target.name)
    memory = compare_memories(Bundle(bundle.path, manifest), variant, pictures, _QUESTION, threads=_threads())
    made = {"tool": quantizer.name, "frames": len(pictures), "operators": operators[0], "cosine": cosine, **asdict(memory)}
    manifest = manifest.model_copy(update={"provenance": {**manifest.provenance, target.name: made}})
    weights = [source.parent / name for name in external_files(source)]
    sizes = sum(file.stat().st_size for file in written), sum(file.stat().st_size for file in (source, *weights))
    return Quantized(write_manifest(bundle.path, manifest), cosine, operators, sizes, memory)


def _check(manifest: Manifest, frames: Frames, variant: Variant, tool: Tool) -> None:
    known = ("fp32",) if (variant, tool) == ("int8", "onnxruntime") else ("fp32", "fp16")
    if manifest.variants[0] not in known:
        raise UsageError(
            f"{manifest.name} is {manifest.variants[0]}; {variant} is made from {' or '.join(known)}.",
            fix="Export it in fp32, then quantise.",
        )
    if tool == "modelopt":
        modelopt_version()
    if not frames:
        raise UsageError("there are no frames to calibrate with.", fix="Give a video or pictures: --calibrate.")
    shape = (manifest.dims.image_size, manifest.dims.image_size, 3)
    odd = next((frame.shape for frame in frames if frame.shape != shape), None)
    if odd is not None:
        raise UsageError(f"a calibration frame is {list(odd)}, not {list(shape)}.")


def _with_variant(manifest: Manifest, variant: Variant, file: str) -> Manifest:
    """The manifest with vision in 8 bits; the other graphs of this variant are those of the first."""
    first = manifest.variants[0]
    graphs = {
        name: graph.model_copy(update={"files": {**graph.files, variant: file if name == "vision" else graph.files[first]}})
        for name, graph in manifest.graphs.items()
    }
    variants = (*(name for name in manifest.variants if name != variant), variant)
    return manifest.model_copy(update={"graphs": graphs, "variants": variants})


def _widened(source: Path) -> onnx.ModelProto:
    """The graph with float32 weights, where they were stored in half precision to be cast as it is loaded."""
    model = onnx.load(str(source))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored and node.attribute[0].i == TensorProto.FLOAT:
            values = numpy_helper.to_array(stored.pop(node.input[0])).astype(np.float32)
            stored[node.output[0]] = numpy_helper.from_array(values, node.output[0])
        else:
            kept.append(node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(stored.values())
    return model


# -- what writes a graph in 8 bits --------------------------------------------------------------------------------------


class _Quantizer(Protocol):
    """Made of a graph and of frames to calibrate with."""

    @property
    def name(self) -> str:
        """The tool's, for the manifest."""
        ...

    @property
    def operators(self) -> Sequence[str]:
        """Nodes that may be in 8 bits, in the graph's order."""
        ...

    def write(self, target: Path, keep: Collection[str]) -> None:
        """Write the graph with all of these operators in 8 bits but those to keep."""
        ...


class _Int8:
    def __init__(self, plain: Path, frames: Frames) -> None:
        self.name = "onnxruntime"
        self.operators = _heavy(plain)
        self._plain, self._frames = plain, frames

    def write(self, target: Path, keep: Collection[str]) -> None:
        quantize_int8(self._plain, target, self._frames, operators=_OPERATORS, keep=keep)


class _Fp8:
    """Calibrates once: what an operator reads hardly depends on which others are in FP8."""

    def __init__(self, plain: Path, frames: Frames) -> None:
        self.name = "onnxruntime"
        self._model = onnx.load(str(plain))
        self.operators = fp8_operators(self._model)
        self._largest = _largest_inputs(plain, self.operators, frames)

    def write(self, target: Path, keep: Collection[str]) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        write_fp8(model, set(self.operators) - set(keep), self._largest)
        save_graph(model, target)


class _ModelOpt:
    def __init__(self, plain: Path, frames: Frames, variant: Variant) -> None:
        self.name = f"modelopt {modelopt_version()}"
        self.operators = _heavy(plain) if variant == "int8" else fp8_operators(onnx.load(str(plain)))
        self._plain, self._frames, self._variant = plain, frames, variant

    def write(self, target: Path, keep: Collection[str]) -> None:
        quantize_with_modelopt(
            self._plain, target, self._frames, mode=self._variant, operators=_OPERATORS, keep=keep
        )


_QUANTIZERS: dict[tuple[Variant, Tool], Callable[[Path, Frames], _Quantizer]] = {
    ("int8", "onnxruntime"): _Int8,
    ("fp8", "onnxruntime"): _Fp8,
    ("int8", "modelopt"): partial(_ModelOpt, variant="int8"),
    ("fp8", "modelopt"): partial(_ModelOpt, variant="fp8"),
}


def _heavy(graph: Path) -> list[str]:
    model = onnx.load(str(graph), load_external_data=False)
    return [node.name for node in model.graph.node if node.op_type in _OPERATORS]


def _largest_inputs(plain: Path, operators: Collection[str], frames: Frames) -> dict[str, float]:
    """The largest magnitude, over the frames, of each tensor that these operators read."""
    model = onnx.load(str(plain))
    watched = watch_inputs(model, operators)
    largest = dict.fromkeys(watched, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        save_graph(model, Path(folder) / "watched.onnx")
        with OnnxRuntimeEngine(Path(folder) / "watched.onnx", threads=_threads()) as engine:
            for frame in frames:
                met = engine.run({"frames": frame[None]})
                largest = {name: max(before, float(met[watched[name]])) for name, before in largest.items()}
    return largest


# -- how many operators -------------------------------------------------------------------------------------------------


def _search(
    quantizer: _Quantizer, plain: Path, attempt: Path, frames: Frames, least_cosine: float, tell: Progress
) -> tuple[onnx.ModelProto, float]:
    """The graph with as few of the first operators kept as keep the cosine, and that cosine."""
    wanted, names = _features(plain, frames), quantizer.operators
    low, high, kept = 0, len(names), 0  # none first: most transformers need none, and calibrating takes long
    rounds, best = 0, None
    while low < high:
        quantizer.write(attempt, names[:kept])
        cosine = _cosine(_features(attempt, frames), wanted)
        if cosine >= least_cosine:
            high, best = kept, (onnx.load(str(attempt)), cosine)
        else:
            low = kept + 1
        kept, rounds = (low + high) // 2, rounds + 1
        tell("which operators stay as they are", rounds, 1 + len(names).bit_length())
    if best is None:
        raise ParityError(
            f"no operator of {plain.name} can be in 8 bits with the features' cosine at {least_cosine}.",
            fix="Calibrate with frames that are more like the camera's, or accept less: --least-cosine.",
        )
    return best


def _in_8_bits(model: onnx.ModelProto) -> int:
    """Convolutions and products that read both sides through Q/DQ."""
    restored = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type in _OPERATORS and restored.issuperset(node.input[:2]) for node in model.graph.node)


def _features(graph: Path, frames: Frames) -> NDArray[np.float32]:
    """Of some frames, spread over all."""
    places = np.unique(np.linspace(0, len(frames) - 1, _JUDGED).astype(int))
    with OnnxRuntimeEngine(graph, threads=_threads()) as engine:
        return np.stack([engine.run({"frames": frames[place][None]})["features"][0] for place in places])


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a.astype(np.float64) * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def _threads() -> int:
    return os.cpu_count() or 1
