"""INT8 for the visual encoder: explicit Q/DQ, calibrated on frames, as a new variant of a bundle.

Through ONNX Runtime's static quantisation: convolutions and matrix products with weights of one scale per output channel and
activations of one scale per tensor, both symmetric, which TensorRT asks for. The Q-Former's graphs stay as they are: what
decides which moments merge, and what is banked, keeps its precision.

A small convolutional encoder loses much when all of it is quantised, and errors made early go through everything after. So
the first operators stay float32, as few of them as bring the features' cosine with the float32 graph's over a limit.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.engine import OnnxRuntimeEngine
from keepsight.runtime.manifest import Manifest, write_manifest
from keepsight.streams.errors import ParityError, UsageError

__all__ = ["LEAST_COSINE", "Quantized", "quantize_vision"]

LEAST_COSINE = 0.98
VARIANT = "int8"
FILE = "vision.int8.onnx"
_OPERATORS = ("Conv", "MatMul", "Gemm")
_JUDGED = 16  # frames that the cosine is taken over


@dataclass(frozen=True)
class Quantized:
    """What came out.

    Attributes:
        manifest: of the bundle, with the new variant.
        cosine: of the features with those of float32, over calibration frames.
        operators: convolutions and matrix products in INT8, and in all.
        file_bytes: of the graph in INT8, and in the first variant.
    """

    manifest: Manifest
    cosine: float
    operators: tuple[int, int]
    file_bytes: tuple[int, int]


def quantize_vision(
    bundle: Bundle,
    frames: Iterable[NDArray[np.uint8]],
    *,
    least_cosine: float = LEAST_COSINE,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quantized:
    """Write `vision.int8.onnx` into a bundle and name the variant `int8` in its manifest.

    Args:
        bundle: its first variant must be fp32.
        frames: uint8 `[S, S, 3]`, scaled as the manifest says; a hundred of what the camera will see is a good number.
        least_cosine: what the features must keep.

    Raises:
        UsageError: no frames, frames of another size, or a bundle that is not fp32.
        ParityError: not even one operator in INT8 keeps the cosine.
    """
    manifest, pictures = bundle.manifest, list(frames)
    _check(manifest, pictures)
    source = bundle.graph_path("vision", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        plain, target = Path(folder) / "vision.onnx", Path(folder) / FILE
        nodes = _widen(source, plain)
        wanted = _features(plain, pictures)
        low, high = 0, len(nodes)  # how many of the first stay float32: `high` always keeps the cosine
        rounds = 0
        while low < high:
            kept = (low + high) // 2
            _quantize(plain, target, pictures, nodes[:kept])
            low, high = (low, kept) if _cosine(_features(target, pictures), wanted) >= least_cosine else (kept + 1, high)
            rounds += 1
            if progress is not None:
                progress("which operators stay float32", rounds, len(nodes).bit_length())
        if high == len(nodes):
            raise ParityError(
                f"no operator of {source.name} can be INT8 with the features' cosine at {least_cosine}.",
                fix="Calibrate with frames that are more like the camera's, or accept less: --least-cosine.",
            )
        _quantize(plain, target, pictures, nodes[:high])
        cosine = _cosine(_features(target, pictures), wanted)
        shutil.copyfile(target, bundle.path / FILE)
    written = write_manifest(bundle.path, _with_variant(manifest))
    sizes = ((bundle.path / FILE).stat().st_size, source.stat().st_size)
    return Quantized(written, cosine, (len(nodes) - high, len(nodes)), sizes)


def _check(manifest: Manifest, frames: Sequence[NDArray[np.uint8]]) -> None:
    if manifest.variants[0] != "fp32":
        raise UsageError(
            f"{manifest.name} is {manifest.variants[0]}; int8 is made from fp32.", fix="Export it in fp32, then quantise."
        )
    if not frames:
        raise UsageError("there are no frames to calibrate with.", fix="Give a video or pictures: --calibrate.")
    shape = (manifest.dims.image_size, manifest.dims.image_size, 3)
    odd = next((frame.shape for frame in frames if frame.shape != shape), None)
    if odd is not None:
        raise UsageError(f"a calibration frame is {list(odd)}, not {list(shape)}.")


def _with_variant(manifest: Manifest) -> Manifest:
    """The manifest with INT8 vision; the other graphs are those of fp32 in this variant, too."""
    graphs = {
        name: graph.model_copy(update={"files": {**graph.files, VARIANT: FILE if name == "vision" else graph.files["fp32"]}})
        for name, graph in manifest.graphs.items()
    }
    variants = (*(name for name in manifest.variants if name != VARIANT), VARIANT)
    return manifest.model_copy(update={"graphs": graphs, "variants": variants})


def _widen(source: Path, target: Path) -> list[str]:
    """Write the graph with float32 weights inside, where they were stored in half precision; returns what can be INT8."""
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
    onnx.save(model, str(target))
    return [node.name for node in kept if node.op_type in _OPERATORS]


def _quantize(plain: Path, target: Path, frames: Sequence[NDArray[np.uint8]], keep: Sequence[str]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with _quiet():
        quantize_static(
            str(plain),
            str(target),
            _Reader(frames),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_exclude=list(keep),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # TensorRT dequantises no 32-bit biases, so they stay float32.
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )


def _features(graph: Path, frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Of some frames, spread over all."""
    places = np.unique(np.linspace(0, len(frames) - 1, _JUDGED).astype(int))
    with OnnxRuntimeEngine(graph) as engine:
        return np.stack([engine.run({"frames": frames[place][None]})["features"][0] for place in places])


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((a.astype(np.float64) * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


class _Reader:
    """ONNX Runtime's calibration reader: it asks for one feed after the other."""

    def __init__(self, frames: Sequence[NDArray[np.uint8]]) -> None:
        self._frames = iter(frames)

    def get_next(self) -> dict[str, Any] | None:
        frame = next(self._frames, None)
        return None if frame is None else {"frames": frame[None]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        feeds = self.get_next()
        if feeds is None:
            raise StopIteration
        return feeds


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice to prepare the graph first, which changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
