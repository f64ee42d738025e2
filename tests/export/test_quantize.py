"""INT8 vision: explicit Q/DQ in a new variant, nearly the same features, the Q-Former untouched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from keepsight.export.quantize import quantize_vision
from keepsight.runtime import easyvqa
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.engine import OnnxRuntimeEngine
from keepsight.runtime.engine_store import find_engine
from keepsight.runtime.tensorrt_build import build_engines, target_of
from keepsight.streams.errors import ParityError, UsageError

from ..random_bundle import IMAGE_SIZE, make_bundle, random_frames


def test_the_tiny_encoder_in_8_bits(tmp_path: Path) -> None:
    """As a user would: calibrated on the training pictures by the command, judged on others."""
    folder = Path(shutil.copytree(Bundle.open("tiny").path, tmp_path / "bundle"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for picture in easyvqa.pictures("train")[:24]:
        shutil.copy(picture.path, pictures)
    result = CliRunner().invoke(app, ["quantize", str(folder), "--calibrate", str(pictures)])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(folder, variant="int8")  # hashes are checked
    assert bundle.manifest.variants == ("fp32", "int8")
    assert bundle.graph_path("step") == folder / "step.onnx"
    sizes = {name: (folder / name).stat().st_size for name in ("vision.onnx", "vision.int8.onnx")}
    assert sizes["vision.int8.onnx"] < 0.9 * sizes["vision.onnx"]
    frames = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    frames[:, 60:160, 60:160] = (0, 200, 0)
    with OnnxRuntimeEngine(bundle.graph_path("vision")) as small, OnnxRuntimeEngine(folder / "vision.onnx") as plain:
        a, b = (engine.run({"frames": frames})["features"] for engine in (small, plain))
    assert 0.9 < float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) < 0.99999


def test_it_builds_in_tensorrt(tmp_path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')
    quantize_vision(Bundle.open(make_bundle(tmp_path)), random_frames(12), least_cosine=0.9)
    bundle = Bundle.open(tmp_path, variant="int8")
    for sm in (86, 120):
        build_engines(bundle, rtx, target_of(rtx, sm), variant="int8")
        assert find_engine(bundle, "vision", target_of(rtx, sm), "int8")


def test_scales_are_symmetric_and_weights_per_channel(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path))
    done = quantize_vision(bundle, random_frames(12), least_cosine=0.9)
    assert done.operators[0] >= 1 and done.cosine >= 0.9
    model = onnx.load(str(tmp_path / "vision.int8.onnx"))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        if len(node.input) > 2 and stored[node.input[2]].dtype == np.int8:
            assert not stored[node.input[2]].any()  # zero point 0
    weights = [node for node in pairs if node.input[0] in stored and stored[node.input[0]].ndim > 1]
    assert weights and all(stored[node.input[1]].size == len(stored[node.input[0]]) for node in weights)


def test_what_can_not_be_quantised_is_said(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="no frames to calibrate with"):
        quantize_vision(bundle, [])
    with pytest.raises(UsageError, match=r"a calibration frame is \[30, 30, 3\]"):
        quantize_vision(bundle, random_frames(2, size=30))
    with pytest.raises(ParityError, match="no operator"):
        quantize_vision(bundle, random_frames(4, size=IMAGE_SIZE), least_cosine=1.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(UsageError, match="the shipped bundle"):
        CliRunner().invoke(app, ["quantize", "tiny", "--calibrate", "x"], catch_exceptions=False)
    with pytest.raises(UsageError, match="no variant 'int8'"):
        Bundle.open(tmp_path, variant="int8")
