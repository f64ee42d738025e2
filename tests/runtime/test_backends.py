"""The whole perception on another backend says what it says on the CPU: with the doubles of TensorRT and of the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.graphs import backends
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.graphs.engine_check import check_engines
from keepsight.runtime.graphs.tensorrt_build import build_engines, this_target
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine
from keepsight.runtime.manifest import CurrentInfo
from keepsight.runtime.qformer import QFormer
from keepsight.streams import Frame
from keepsight.streams.errors import EngineError, MissingComponentError

from ..random_bundle import make_bundle, random_frames
from .fake_cuda import HAS_DRIVER, load_driver
from .fake_tensorrt import fake_tensorrt

FRAMES = random_frames(11)
QUESTIONS = ("what was there first?", "is there a circle?")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double in place of `tensorrt`; what was put on the device is gone at the end."""
    driver: ctypes.CDLL = load_driver()
    held = driver.keepsight_allocated(), driver.keepsight_streams(), driver.keepsight_graphs()
    module = fake_tensorrt()
    monkeypatch.setattr(backends, "import_tensorrt", lambda: module)
    yield module
    assert held == (driver.keepsight_allocated(), driver.keepsight_streams(), driver.keepsight_graphs())


@pytest.fixture(scope="module", params=[4, 3], ids=["last layer without vision", "last layer with vision"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", layers=request.param)


@pytest.fixture
def built(path: Path, trt: Any) -> Bundle:
    bundle = Bundle.open(path)
    build_engines(bundle, trt, this_target(trt))
    return bundle


def watch(bundle: Bundle, engines: Engines) -> list[np.ndarray]:
    """Soft prompts of two standing questions and of a replay, again and again, with an answer before the other's step."""
    said = []
    with engines:
        qformer = QFormer(bundle, engines=engines)
        standing = [qformer.stand(qformer.prompt(question)) for question in QUESTIONS]
        for index, frame in enumerate(FRAMES):
            qformer.remember(qformer.encode(frame[None])[0], float(index))
            for carried in standing:
                carried.step(float(index))
            if index % 3:
                said += [carried.answer().rows for carried in standing]
                said.append(qformer.replay(standing[0].prompt).rows)
    return said


@pytest.mark.parametrize("marked", [False, True])
def test_a_stream_on_tensorrt_says_what_it_says_on_the_cpu(built: Bundle, marked: bool) -> None:
    if marked:  # then an answer reads the newest frame again, with other buckets
        built.manifest = built.manifest.model_copy(update={"positions": CurrentInfo(frame=3)})
    on_cpu, on_tensorrt = (watch(built, open_engines(built, backend)) for backend in ("cpu", "tensorrt"))
    for one, other in zip(on_cpu, on_tensorrt, strict=True):
        np.testing.assert_array_equal(one, other)


def without_memory(bundle: Bundle) -> Bundle:
    """As bundles are that were exported before there was a graph `memory`."""
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "memory"}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs}))


def test_a_bundle_without_the_graph_memory_says_the_same_with_its_bank_on_the_host(built: Bundle) -> None:
    on_device, on_host = open_engines(built, "tensorrt"), open_engines(without_memory(built), "tensorrt")
    assert (len(on_device.memory), len(on_host.memory)) == (2, 0)
    for one, other in zip(watch(built, on_device), watch(without_memory(built), on_host), strict=True):
        np.testing.assert_array_equal(one, other)


def test_keys_and_values_of_a_bank_on_the_host_are_brought_to_the_device_once_a_frame(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[str] = []
    place = TensorRTEngine.place
    monkeypatch.setattr(TensorRTEngine, "place", lambda self, name, value: placed.append(name) or place(self, name, value))
    watch(without_memory(built), open_engines(without_memory(built), "tensorrt"))
    assert placed == ["cross_k", "cross_v"] * len(FRAMES)  # for two questions, and their answers


def test_all_engines_share_one_scratch_memory(built: Bundle) -> None:
    driver = load_driver()
    before = driver.keepsight_allocated()
    with open_engines(built, "tensorrt") as engines:
        tensors = sum(len(engine.inputs) + len(engine.outputs) for engine in engines.values())
        assert driver.keepsight_allocated() - before == tensors - 2 + 1  # `step` reads keys and values where the bank has them


def test_an_engine_that_was_not_built_is_named_before_any_is_loaded(path: Path, trt: Any, tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "other"))
    with pytest.raises(EngineError, match=r"no engine of \w+ that this machine can use.*keepsight build"):
        open_engines(bundle, "tensorrt")


def test_what_was_opened_is_given_back_when_the_next_does_not_load(built: Bundle, trt: Any) -> None:
    trt.record.behaviour.has_memory = False
    with pytest.raises(EngineError, match="has no memory for"):
        open_engines(built, "tensorrt")  # the fixture counts what is left


def test_engines_are_checked_against_their_graphs(built: Bundle) -> None:
    frames = [Frame(image, float(index), 0.0, index) for index, image in enumerate(FRAMES)]
    report = check_engines(
        built, open_engines(built, "tensorrt"), frames, QUESTIONS[0], clip="11 frames", backend="tensorrt"
    )
    assert report.passed and set(report.graphs) == set(built.manifest.graphs)
    assert [row.frames for row in report.drift] == [1, 4, 8, 11] and report.merges == {"visual": 1.0, "query": 1.0}


def test_an_engine_that_computes_something_else_is_found(built: Bundle, trt: Any, tmp_path: Path) -> None:
    other = Bundle.open(make_bundle(tmp_path / "other", seed=1, layers=built.manifest.dims.layers))
    build_engines(other, trt, this_target(trt))
    frames = [Frame(image, float(index), 0.0, index) for index, image in enumerate(FRAMES)]
    engines = open_engines(other, "tensorrt")
    report = check_engines(built, engines, frames, QUESTIONS[0], clip="11 frames", backend="tensorrt")
    assert not report.passed and any(line.startswith("vision: features differs") for line in report.failures)


def test_the_commands_take_a_backend(built: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", FRAMES)
    for backend in ("cpu", "tensorrt"):
        arguments = ["trace", str(built.path), str(tmp_path / "frames.npy"), "--question", QUESTIONS[0], "--backend", backend]
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / f"{backend}.npz")])
        assert result.exit_code == 0, result.output
    arguments = ["verify", str(built.path), "--clip", str(tmp_path / "frames.npy"), "--backend", "tensorrt"]
    for against in ([], ["--against", str(tmp_path / "cpu.npz")]):
        result = CliRunner().invoke(app, [*arguments, *against, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "vision: features" in result.output and "passed" in result.output


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a GPU")
@pytest.mark.parametrize(("backend", "error"), [("tensorrt", MissingComponentError), ("cuda", EngineError)])
def test_a_backend_that_is_not_there_is_an_error_and_nothing_else_is_tried(
    path: Path, backend: backends.Backend, error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_engines(Bundle.open(path), backend)
