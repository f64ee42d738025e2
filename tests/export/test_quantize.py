"""Vision in 8 bits: explicit Q/DQ in a new variant, nearly the same features, the Q-Former untouched."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from keepsight.export import graphfile, modelopt
from keepsight.export.bundlewriter import write_bundle
from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.fp8 import fp8_tensor
from keepsight.export.onnxfile import export_onnx
from keepsight.export.quantize import Tool, Variant, quantize_vision
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.runtime.graphs.engine_store import find_engine
from keepsight.runtime.graphs.tensorrt_build import build_engines, target_of
from keepsight.runtime.graphs.tensorrt_network import build_plan, parse, profiles_of
from keepsight.runtime.manifest import Manifest, write_manifest
from keepsight.streams.errors import EngineError, MissingComponentError, ParityError, UsageError

from ..random_bundle import IMAGE_SIZE, WORDS, make_bundle, random_frames, random_qformer

ROOT = Path(__file__).parents[2]
EVA_SIZE = 56


def eva_bundle(folder: Path, *, half: bool = False, blocks: int = 4) -> Bundle:
    """A bundle whose encoder is a ViT like InstructBLIP's, 192 wide, with random weights of a trained one's spread."""
    torch.manual_seed(0)
    config = EvaConfig(image_size=EVA_SIZE, width=192, blocks=blocks, heads=3, mlp=768)
    vision = EvaVision(config)
    with torch.no_grad():
        for name, parameter in vision.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.2)
    folder.mkdir(parents=True)
    frames = {"frames": torch.zeros(1, EVA_SIZE, EVA_SIZE, 3, dtype=torch.uint8)}
    axes = {"frames": {0: "batch"}, "features": {0: "batch"}}
    export_onnx(vision, frames, ["features"], folder / "vision.onnx", dynamic_axes=axes, half_compute=half)
    tokenizer = build_tokenizer(WORDS, folder / "tokenizer.json")
    manifest = write_bundle(
        folder, random_qformer(channels=192, vocab=tokenizer.get_vocab_size()), vision=folder / "vision.onnx",
        tokenizer=folder / "tokenizer.json", memory_length=4, tokens=config.tokens, image_size=EVA_SIZE, llm=None,
        provenance={}, name="eva",
    )  # fmt: skip
    if half:
        write_manifest(folder, called(manifest, "fp16"))
    return Bundle.open(folder)


def called(manifest: Manifest, variant: str) -> Manifest:
    """The manifest with its only variant under another name."""
    graphs = {
        name: graph.model_copy(update={"files": {variant: next(iter(graph.files.values()))}})
        for name, graph in manifest.graphs.items()
    }
    return manifest.model_copy(update={"graphs": graphs, "variants": (variant,)})


def features(graph: Path, frames: np.ndarray) -> np.ndarray:
    with OnnxRuntimeEngine(graph) as engine:
        return engine.run({"frames": frames})["features"]


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


HAS_MODELOPT = importlib.util.find_spec("modelopt") is not None
needs_modelopt = pytest.mark.skipif(
    not HAS_MODELOPT, reason='NVIDIA ModelOpt is not installed (in an environment of its own: pip install "keepsight[modelopt]")'
)


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


def test_the_page_on_export_shows_what_8_bits_save_and_cost() -> None:
    """Its table is what `scripts/int8-table` prints of the measured figures in docs/int8.json."""
    command = [sys.executable, str(ROOT / "scripts" / "int8-table"), "--show"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") == 4
    assert printed in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


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


# FP8.


def test_the_tiny_encoder_in_fp8(tmp_path: Path) -> None:
    """As a user would, and told what it does to the memory; then every command can take the variant, on a CPU, too."""
    folder = Path(shutil.copytree(Bundle.open("tiny").path, tmp_path / "bundle"))
    before = hashes(folder)
    np.save(tmp_path / "frames.npy", np.stack(random_frames(16, size=224)))
    arguments = ["--variant", "fp8", "--calibrate", str(tmp_path / "frames.npy"), "--least-cosine", "0.9"]
    result = CliRunner().invoke(app, ["quantize", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    assert "of 49 convolutions and products in 8 bits" in result.output
    assert "merge decisions of the visual bank that agree over 16 frames" in result.output
    bundle = Bundle.open(folder, variant="fp8")
    assert bundle.manifest.variants == ("fp32", "fp8")
    assert {name: graph.files["fp8"] for name, graph in bundle.manifest.graphs.items()} == {
        name: "vision.fp8.onnx" if name == "vision" else f"{name}.onnx" for name in bundle.manifest.graphs
    }
    after = hashes(folder)
    assert after.keys() - before.keys() == {"vision.fp8.onnx"}
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    made = bundle.manifest.provenance["vision.fp8.onnx"]
    assert isinstance(made, dict) and made["tool"] == "onnxruntime" and made["frames"] == 16


def test_a_vit_in_fp8_keeps_its_features_in_a_third_of_the_bytes(tmp_path: Path) -> None:
    bundle = eva_bundle(tmp_path / "eva")
    done = quantize_vision(bundle, random_frames(12, size=EVA_SIZE), variant="fp8")
    assert done.operators == (24, 25)  # all but the patch embedding
    assert done.cosine > 0.995
    assert done.file_bytes[0] < 0.35 * done.file_bytes[1]
    other = random_frames(4, size=EVA_SIZE, seed=5)  # not those of the calibration
    a, b = (features(bundle.path / name, other) for name in ("vision.fp8.onnx", "vision.onnx"))
    assert float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)) > 0.995


def test_a_half_precision_bundle_stays_half_beside_fp8(tmp_path: Path) -> None:
    bundle = eva_bundle(tmp_path / "eva", half=True, blocks=1)
    quantize_vision(bundle, random_frames(6, size=EVA_SIZE), variant="fp8")
    opened = Bundle.open(tmp_path / "eva", variant="fp8")
    assert opened.manifest.variants == ("fp16", "fp8") and opened.graph_path("step") == bundle.graph_path("step", "fp16")
    model = onnx.load(str(opened.graph_path("vision")))
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert pairs and all(stored[node.input[1]] == TensorProto.FLOAT16 for node in pairs)
    with pytest.raises(UsageError, match="eva is fp16; int8 is made from fp32"):
        quantize_vision(bundle, random_frames(6, size=EVA_SIZE))


@pytest.mark.parametrize("half", [False, True])
def test_fp8_builds_for_blackwell_and_is_refused_for_ampere(tmp_path: Path, half: bool) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')
    quantize_vision(eva_bundle(tmp_path / "eva", half=half), random_frames(6, size=EVA_SIZE), variant="fp8")
    graph = tmp_path / "eva" / "vision.fp8.onnx"
    with pytest.raises(EngineError, match=r"can't build vision\.fp8\.onnx: .*fp8_e4m3.* This GPU has no FP8"):
        plan(rtx, graph, 86)
    size = plan(rtx, graph, 120)
    if not half:  # beside float16 the compiled kernels of so small a graph weigh more than its weights
        assert size < 0.8 * plan(rtx, tmp_path / "eva" / "vision.onnx", 120)


def plan(rtx: Any, graph: Path, sm: int) -> int:
    parsed = parse(rtx, graph)
    return build_plan(rtx, parsed, profiles_of(parsed, [{"batch": 1}]), target=target_of(rtx, sm)).nbytes


@pytest.mark.parametrize("variant", ["int8", "fp8"])
def test_weights_too_large_for_the_graphs_file_get_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    plain = eva_bundle(tmp_path / "plain", blocks=1)
    frames = random_frames(6, size=EVA_SIZE)
    quantize_vision(plain, frames, variant=variant)
    monkeypatch.setattr(graphfile, "LARGEST_FILE", 100_000)
    bundle = eva_bundle(tmp_path / "large", blocks=1)
    for _ in range(2):  # the second time nothing is left of the first
        done = quantize_vision(bundle, frames, variant=variant)
    assert f"vision.{variant}.weights" in Bundle.open(tmp_path / "large", variant=variant).manifest.files
    files = [tmp_path / "large" / f"vision.{variant}.{ending}" for ending in ("onnx", "weights")]
    assert done.file_bytes[0] == sum(file.stat().st_size for file in files) and files[0].stat().st_size < 100_000
    a, b = (features(tmp_path / folder / files[0].name, frames[:1]) for folder in ("plain", "large"))
    np.testing.assert_array_equal(a, b)


def test_verify_compares_8_bits_with_8_bits(tmp_path: Path) -> None:
    folder, other = (make_bundle(tmp_path / name, seed=seed) for seed, name in enumerate(("bundle", "other")))
    np.save(tmp_path / "frames.npy", random_frames(12))
    for path in (folder, other):
        quantize_vision(Bundle.open(path), random_frames(12), variant="int8", least_cosine=0.9)
    trace = str(tmp_path / "trace.npz")
    arguments = ["--variant", "int8", "--out"]
    asked = ["trace", str(folder), str(tmp_path / "frames.npy"), "--question", "what was there first?", *arguments, trace]
    assert CliRunner().invoke(app, asked).exit_code == 0
    against = ["--against", trace, "--clip", str(tmp_path / "frames.npy"), *arguments, str(tmp_path)]
    result = CliRunner().invoke(app, ["verify", str(folder), *against])
    assert result.exit_code == 0, result.output
    failed = CliRunner().invoke(app, ["verify", str(other), *against])
    assert isinstance(failed.exception, ParityError) and "vision: features differs by" in str(failed.exception)
    assert re.search(r"cosine -?0\.\d+ \(limit 0\.95\)", str(failed.exception))


def test_only_what_changed_is_in_8_bits(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    quantize_vision(Bundle.open(tmp_path), random_frames(12), least_cosine=0.9)
    bundle = Bundle.open(tmp_path, variant="int8")
    assert {name: bundle.precision(name) for name in bundle.manifest.graphs} == {
        name: "int8" if name == "vision" else "fp32" for name in bundle.manifest.graphs
    }


def test_a_source_is_no_reference_for_8_bits(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Bundle.open("tiny").path, tmp_path / "bundle"))
    quantize_vision(Bundle.open(folder), random_frames(2, size=224), variant="fp8", least_cosine=0.5)
    with pytest.raises(UsageError, match=r"vision of the variant fp8 is no conversion of the source.* Verify the variant fp32"):
        CliRunner().invoke(app, ["verify", str(folder), "--variant", "fp8", "--out", str(tmp_path)], catch_exceptions=False)


# NVIDIA ModelOpt.


@needs_modelopt
@pytest.mark.parametrize("variant", ["int8", "fp8"])
@pytest.mark.parametrize("half", [False, True])
def test_modelopt_changes_no_file_and_its_weights_are_stored_in_8_bits(tmp_path: Path, variant: Variant, half: bool) -> None:
    bundle = eva_bundle(tmp_path / "eva", half=half)
    before = hashes(bundle.path)
    done = quantize_vision(bundle, random_frames(12, size=EVA_SIZE), variant=variant, tool="modelopt", least_cosine=0.95)
    after = hashes(bundle.path)
    assert after.keys() - before.keys() == {f"vision.{variant}.onnx"}
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    assert done.operators[0] >= 24 and done.file_bytes[0] < 0.7 * done.file_bytes[1]
    assert "modelopt 0." in str(Bundle.open(bundle.path).manifest.provenance[f"vision.{variant}.onnx"])


@needs_modelopt
@pytest.mark.parametrize(("variant", "targets"), [("int8", [86, 120]), ("fp8", [120])])
def test_what_modelopt_writes_builds_in_tensorrt(tmp_path: Path, variant: Variant, targets: list[int]) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')
    bundle = eva_bundle(tmp_path / "eva")
    quantize_vision(bundle, random_frames(6, size=EVA_SIZE), variant=variant, tool="modelopt", least_cosine=0.9)
    for sm in targets:
        assert plan(rtx, bundle.path / f"vision.{variant}.onnx", sm)
    if variant == "fp8":
        with pytest.raises(EngineError, match="This GPU has no FP8"):
            plan(rtx, bundle.path / "vision.fp8.onnx", 86)


@pytest.fixture
def modelopt_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Does to its input what ModelOpt does; what it was told is appended to the list."""
    calls: list[dict[str, Any]] = []

    def quantize(onnx_path: str, output_path: str, **options: Any) -> None:
        shutil.copyfile(onnx_path, output_path)
        Path(onnx_path).write_bytes(b"")
        calls.append(options)

    names = ("modelopt", "modelopt.onnx", "modelopt.onnx.quantization")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "quantize", quantize, raising=False)
    monkeypatch.setattr(modelopt, "modelopt_version", lambda: "double")
    return calls


def test_what_rewrites_its_input_gets_a_copy(tmp_path: Path, modelopt_double: list[dict[str, Any]]) -> None:
    bundle, frames = Bundle.open(make_bundle(tmp_path / "bundle")), random_frames(3)
    target = tmp_path / "out.onnx"
    before = hashes(bundle.path)
    modelopt.quantize_with_modelopt(
        bundle.graph_path("vision"), target, list(frames), mode="fp8", operators=["Conv"], keep=["/a.b/Conv_1"]
    )
    assert hashes(bundle.path) == before and target.is_file()
    (options,) = modelopt_double
    np.testing.assert_array_equal(options["calibration_data"]["frames"], frames)
    assert (options["quantize_mode"], options["calibration_eps"]) == ("fp8", ["cpu"])
    assert options["nodes_to_exclude"] == ["/a\\.b/Conv_1$"]  # it reads them as patterns of how a name begins


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_storing_weights_in_8_bits_changes_nothing(tmp_path: Path, kind: int, axis: int | None) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 5)).astype(np.float32)
    scale = np.float32(0.01) if axis is None else rng.uniform(0.005, 0.02, values.shape[axis]).astype(np.float32)
    zero = np.zeros(np.shape(scale), np.int8)
    int8 = kind == TensorProto.INT8
    stored = numpy_helper.from_array(zero, "zero") if int8 else fp8_tensor("zero", zero.view(np.uint8))
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], **attributes),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [6, size]) for name, size in (("x", 6), ("y", 5)))
    initializers = [numpy_helper.from_array(values, "w"), numpy_helper.from_array(np.asarray(scale), "scale"), stored]
    graph = helper.make_graph(nodes, "graph", [inputs], [outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    runs = []
    for _ in range(2):
        onnx.save(model, str(tmp_path / "graph.onnx"))
        with OnnxRuntimeEngine(tmp_path / "graph.onnx") as engine:
            runs.append(engine.run({"x": np.eye(6, dtype=np.float32)})["y"])
        modelopt.store_weights(model)
    np.testing.assert_array_equal(*runs)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer}["q"] == kind


@pytest.mark.skipif(HAS_MODELOPT, reason="NVIDIA ModelOpt is installed")
@pytest.mark.parametrize("variant", ["int8", "fp8"])
def test_without_modelopt_the_error_is_the_command_that_installs_it(tmp_path: Path, variant: Variant) -> None:
    tool: Tool = "modelopt"
    with pytest.raises(MissingComponentError, match=r'-m venv modelopt-env && .*pip install "keepsight\[modelopt\]"'):
        quantize_vision(Bundle.open(make_bundle(tmp_path)), random_frames(4), variant=variant, tool=tool)
