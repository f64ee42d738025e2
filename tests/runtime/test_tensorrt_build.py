"""Building engines: decisions with a double of TensorRT, and every graph for real with TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine_store import Target, engine_folder, read_engine_set
from keepsight.runtime.graphs.tensorrt_build import Progress, build_engines, target_of, tensorrt_for
from keepsight.runtime.graphs.tensorrt_module import log_of
from keepsight.runtime.graphs.tensorrt_network import Profile, build_plan, parse, profiles_of
from keepsight.runtime.manifest import read_manifest, write_manifest
from keepsight.streams.errors import EngineError, MissingComponentError, UsageError

from ..random_bundle import make_bundle
from .fake_tensorrt import fake_tensorrt

ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")
GRAPHS = ("answer", "memory", "prompt", "replay", "step", "vision", "visual_kv")


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("random") / "bundle")


@pytest.fixture
def bundle(random_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of its own, to build in."""
    shutil.copytree(random_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(tmp_path / "bundle")


def change(bundle: Bundle, name: str) -> Bundle:
    """The bundle with another export of a graph that computes the same."""
    path = bundle.graph_path(name)
    model = onnx.load(path, load_external_data=False)
    model.doc_string = "another export"
    path.write_bytes(model.SerializeToString())
    write_manifest(bundle.path, read_manifest(bundle.path))
    return Bundle.open(bundle.path)


# Decisions, with the double.


def test_every_graph_is_built_once_and_not_again(bundle: Bundle) -> None:
    trt, steps = fake_tensorrt(), list[Progress]()
    folder = build_engines(bundle, trt, ORIN, progress=steps.append)
    assert folder == bundle.path / "engines" / "orin-sm87-trt10.3.0-fp32"
    assert sorted(trt.record.built) == list(GRAPHS)
    assert [(step.graph, step.state) for step in steps[:2]] == [("answer", "building"), ("answer", "built")]
    build_engines(Bundle.open(bundle.path), trt, ORIN, progress=steps.append)
    assert len(trt.record.built) == len(GRAPHS)
    assert [str(step) for step in steps[-7:]] == [
        f"[{index}/7] {name}: unchanged, 0.0 MB" for index, name in enumerate(bundle.manifest.graphs, 1)
    ]


def test_only_the_changed_graph_is_built_again(bundle: Bundle) -> None:
    trt = fake_tensorrt()
    build_engines(bundle, trt, ORIN)
    trt.record.built.clear()
    build_engines(change(bundle, "step"), trt, ORIN)
    assert trt.record.built == ["step"]


def test_other_weights_rebuild_the_graphs_that_refer_to_them(bundle: Bundle) -> None:
    trt = fake_tensorrt()
    build_engines(bundle, trt, ORIN)
    trt.record.built.clear()
    weights = bundle.path / "qformer.weights"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    write_manifest(bundle.path, bundle.manifest)
    build_engines(Bundle.open(bundle.path), trt, ORIN)
    assert "vision" not in trt.record.built and "step" in trt.record.built


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_lost_or_damaged_engine_is_built_again(bundle: Bundle, damage: Callable[[Path], Any]) -> None:
    trt = fake_tensorrt()
    folder = build_engines(bundle, trt, ORIN)
    trt.record.built.clear()
    damage(folder / "vision.engine")
    build_engines(bundle, trt, ORIN)
    assert trt.record.built == ["vision"]


def test_another_workspace_limit_is_another_build(bundle: Bundle) -> None:
    trt = fake_tensorrt()
    build_engines(bundle, trt, ORIN)
    folder = build_engines(bundle, trt, ORIN, workspace_mib=64)
    assert len(trt.record.built) == 2 * len(GRAPHS)
    assert f'"WORKSPACE": {64 << 20}' in (folder / "step.engine").read_text()


def test_a_broken_off_build_goes_on_where_it_stopped(bundle: Bundle) -> None:
    def stop(step: Progress) -> None:
        if (step.graph, step.state) == ("replay", "building"):
            raise KeyboardInterrupt

    trt = fake_tensorrt()
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, trt, ORIN, progress=stop)
    build_engines(bundle, trt, ORIN)
    assert sorted(trt.record.built) == list(GRAPHS)


def test_another_tensorrt_gets_a_directory_of_its_own(bundle: Bundle) -> None:
    newer = ORIN.model_copy(update={"version": "10.7.0"})
    assert build_engines(bundle, fake_tensorrt(), ORIN) != build_engines(bundle, fake_tensorrt("10.7.0"), newer)


def test_engines_are_no_part_of_what_the_manifest_vouches_for(bundle: Bundle) -> None:
    build_engines(bundle, fake_tensorrt(), ORIN)
    before = bundle.manifest
    assert write_manifest(bundle.path, before) == before


@pytest.mark.parametrize(("strongly_typed", "flags"), [(1, 2), (0, 1)])  # TensorRT 10, TensorRT 11
def test_networks_are_strongly_typed_by_the_value_of_each_version(bundle: Bundle, strongly_typed: int, flags: int) -> None:
    trt = fake_tensorrt(strongly_typed=strongly_typed)
    parse(trt, bundle.graph_path("visual_kv"))
    assert trt.record.network_flags == [flags]


def test_float32_is_float32(bundle: Bundle) -> None:
    folder = build_engines(bundle, fake_tensorrt(), ORIN)
    assert '"cleared": ["TF32"]' in (folder / "step.engine").read_text()
    engines = read_engine_set(folder)
    assert engines is not None and engines.graphs["step"].recipe.flags == ("STRONGLY_TYPED", "no TF32")


def test_one_profile_per_text_bucket_and_none_for_a_static_graph(bundle: Bundle) -> None:
    engines = read_engine_set(build_engines(bundle, fake_tensorrt(), ORIN))
    assert engines is not None
    queries = bundle.manifest.dims.queries
    step = engines.graphs["step"].profiles
    assert [profile["text_mask"] for profile in step] == [(16,), (32,), (64,)]
    assert [profile["self_k"][2] for profile in step] == [queries + 16, queries + 32, queries + 64]
    assert engines.graphs["vision"].profiles == ({"frames": (1, 24, 24, 3)},)
    assert engines.graphs["visual_kv"].profiles == ()


def test_timings_are_kept_and_offered_to_the_next_build(bundle: Bundle) -> None:
    trt = fake_tensorrt()
    folder = build_engines(bundle, trt, ORIN)
    assert trt.record.timings[:3] == [b"", b"+1", b"+1+1"]
    assert (folder / "timing.cache").read_bytes() == b"+1" * len(GRAPHS)


def test_timings_that_do_not_fit_are_started_anew(bundle: Bundle) -> None:
    trt = fake_tensorrt(accepts_timings=False)
    folder = build_engines(bundle, trt, ORIN)
    assert trt.record.timings[:3] == [b"", b"+1", b""]
    assert (folder / "timing.cache").read_bytes() == b"+1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": False}, r"TensorRT 10\.3\.0 can't start: no driver\. Check that the GPU's driver"),
        ({"accepts_profiles": False}, r"refuses the optimisation profile \{'rows_last'.* of answer\.onnx: it did not say why"),
        ({"builds": False}, r"can't build answer\.onnx: no tactics to implement the operation\. If it names"),
    ],
)
def test_each_refusal_is_an_error_that_repeats_tensorrts_reason(bundle: Bundle, changes: dict[str, bool], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        build_engines(bundle, fake_tensorrt(**changes), ORIN)
    assert read_engine_set(engine_folder(bundle, ORIN, "fp32")) is None


def test_an_axis_with_an_unknown_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], x=["time", 4], y=["time", 4])
    with pytest.raises(EngineError, match=r"axis 0 of input x of graph\.onnx is free and called 'time'; known are batch"):
        profiles_of(parse(fake_tensorrt(), path), [{"batch": 1}])


def test_a_directory_that_cannot_be_written_says_what_to_do(bundle: Bundle) -> None:
    (bundle.path / "engines").write_text("in the way")
    with pytest.raises(EngineError, match=r"can't be written .*copy it to a directory that you may write"):
        build_engines(bundle, fake_tensorrt(), ORIN)


def test_an_unknown_variant_is_refused_before_anything_is_built(bundle: Bundle) -> None:
    trt = fake_tensorrt()
    with pytest.raises(UsageError, match=r"has no variant 'fp8'\. It has fp32"):
        build_engines(bundle, trt, ORIN, variant="fp8")
    assert trt.record.built == []


def test_only_tensorrt_rtx_builds_for_a_gpu_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="builds for the GPU that it runs on, not for sm86"):
        target_of(fake_tensorrt(), 86)
    with pytest.raises(UsageError, match=r"'8\.6' is not a GPU to build for"):
        tensorrt_for("8.6")


def test_without_tensorrt_the_error_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingComponentError, match=r"apt install python3-libnvinfer.*--system-site-packages"):
        tensorrt_for(None)


# The real parser and builder.


@pytest.fixture(scope="session")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')


def save(
    folder: Path, nodes: Sequence[Any], *, weights: dict[str, np.ndarray] | None = None, opset: int = 17, **values: list[Any]
) -> Path:
    """An ONNX file of one input x and one output y, float32; a size that is a string is a free axis."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def relu(folder: Path) -> Path:
    return save(folder, [helper.make_node("Relu", ["x"], ["y"], name="relu")], x=["batch", 4], y=["batch", 4])


def fp8(folder: Path) -> Path:
    """A product whose sides go through FP8."""
    nodes = []
    for name in ("x", "w"):
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"], name=f"{name}_quantize"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"], name=f"{name}_back"))
    nodes.append(helper.make_node("MatMul", ["x_d", "w_d"], ["y"], name="product"))
    weights = {"w": np.ones((64, 64), np.float32), "scale": np.array(0.1, np.float32)}
    path = save(folder, nodes, weights=weights, opset=19, x=["batch", 64], y=["batch", 64])
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    path.write_bytes(model.SerializeToString())
    return path


def plan(rtx: Any, path: Path, *profiles: Profile, sm: int = 86, workspace_mib: int | None = None) -> bytes:
    return bytes(
        build_plan(rtx, parse(rtx, path), profiles, target=target_of(rtx, sm), workspace_mib=workspace_mib)
    )


@pytest.mark.parametrize("sm", [86, 120])
@pytest.mark.parametrize(
    ("which", "graph"),
    [(which, graph) for which in ("random", "tiny") for graph in GRAPHS],
)
def test_every_graph_of_a_bundle_builds(rtx: Any, random_bundle: Path, which: str, graph: str, sm: int) -> None:
    opened = Bundle.open(random_bundle if which == "random" else "tiny", verify=False)
    queries = opened.manifest.dims.queries
    sizes = [{"batch": 1, "text": text, "rows": queries + text} for text in opened.manifest.dims.text_buckets]
    parsed = parse(rtx, opened.graph_path(graph))
    profiles = profiles_of(parsed, sizes)
    assert len(profiles) == {"vision": 1, "visual_kv": 0, "memory": 0}.get(graph, len(sizes))
    assert build_plan(rtx, parsed, profiles, target=target_of(rtx, sm)).nbytes > 0


def test_a_whole_bundle_is_built_and_the_second_call_builds_nothing(rtx: Any, bundle: Bundle) -> None:
    steps: list[Progress] = []
    folder = build_engines(bundle, rtx, target_of(rtx, 86), progress=steps.append)
    assert {step.state for step in steps} == {"building", "built"}
    assert sorted(path.stem for path in folder.glob("*.engine")) == list(GRAPHS)
    steps.clear()
    build_engines(bundle, rtx, target_of(rtx, 86), progress=steps.append)
    assert {step.state for step in steps} == {"unchanged"}
    steps.clear()
    build_engines(change(bundle, "prompt"), rtx, target_of(rtx, 86), progress=steps.append)
    assert [step.graph for step in steps if step.state == "built"] == ["prompt"]


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ([], "no optimization profile has been defined"),
        ([{"z": (1, 4)}], "input tensor x is missing dimensions in profile 0"),
        ([{"x": (1, 5)}], "axis 1, profile has min=5, opt=5, max=5 but tensor has 4"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(rtx: Any, tmp_path: Path, profiles: list[Profile], said: str) -> None:
    with pytest.raises(EngineError, match=rf"can't build graph\.onnx: .*{said}.* The profile must name"):
        plan(rtx, relu(tmp_path), *profiles)


def test_an_unknown_operation_is_refused_by_its_node(rtx: Any, tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Frobnicate", ["x"], ["y"], name="odd")], x=["batch", 4], y=["batch", 4])
    with pytest.raises(EngineError, match=r"can't parse graph\.onnx: node 0 'odd' \(Frobnicate\): .*Plugin not found"):
        parse(rtx, path)


def test_a_product_of_float16_and_float32_is_refused(rtx: Any, tmp_path: Path) -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = save(tmp_path, [product], weights={"w": np.zeros((4, 4), np.float16)}, x=["batch", 4], y=["batch", 4])
    with pytest.raises(EngineError, match=r"node 0 'product' \(MatMul\): .*`A` is of type Float and `B` is of type Half"):
        parse(rtx, path)


@pytest.mark.parametrize("content", [b"", b"hello" * 100])
def test_a_file_that_is_no_onnx_is_refused(rtx: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"can't parse graph\.onnx"):
        parse(rtx, tmp_path / "graph.onnx")


def test_missing_external_weights_are_named(rtx: Any, bundle: Bundle) -> None:
    (bundle.path / "qformer.weights").unlink()
    with pytest.raises(EngineError, match=r"can't parse step\.onnx: .*qformer\.weights"):
        parse(rtx, bundle.graph_path("step"))


def test_fp8_is_refused_for_ampere_and_built_for_blackwell(rtx: Any, tmp_path: Path) -> None:
    path = fp8(tmp_path)
    with pytest.raises(EngineError, match=r"fp8_e4m3.* This GPU has no FP8: build another variant"):
        plan(rtx, path, {"x": (16, 64)}, sm=86)
    assert plan(rtx, path, {"x": (16, 64)}, sm=120)


def test_orin_itself_is_no_target_of_tensorrt_rtx(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"can't build for sm87\. It can for sm75, .*sm86"):
        plan(rtx, relu(tmp_path), {"x": (1, 4)}, sm=87)


def test_too_little_workspace_is_refused_with_the_option_that_gives_more(rtx: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Softmax", ["a"], ["b"], name="softmax"),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="second"),
    ]
    weights = {"w": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    path = save(tmp_path, nodes, weights=weights, x=["batch", 256], y=["batch", 256])
    with pytest.raises(EngineError, match=r"can't build graph\.onnx: .*workspace.* Give more with --workspace"):
        plan(rtx, path, {"x": (4096, 256)}, workspace_mib=1)
    assert plan(rtx, path, {"x": (4096, 256)})


def test_one_logger_serves_every_build_of_a_process(
    rtx: Any, tmp_path: Path, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    assert log_of(rtx) is log_of(rtx)
    caplog.set_level(logging.DEBUG, "keepsight.tensorrt")
    plan(rtx, relu(tmp_path), {"x": (1, 4)})
    plan(rtx, bundle.graph_path("visual_kv"))
    assert caplog.messages  # it is ours that TensorRT talks to
    assert "differs from one already registered" not in caplog.text  # what it says of a second logger
