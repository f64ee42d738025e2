"""An engine on TensorRT says what ONNX Runtime says: with doubles of TensorRT and of the CUDA driver, which work on the CPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.runtime import cuda
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cuda import CudaStream
from keepsight.runtime.engine import Engine, OnnxRuntimeEngine
from keepsight.runtime.engine_store import Target, find_engine
from keepsight.runtime.tensorrt_build import build_engines, this_target
from keepsight.runtime.tensorrt_engine import TensorRTEngine
from keepsight.streams.errors import EngineError, MissingComponentError

from ..random_bundle import make_bundle
from .fake_cuda import compile_driver
from .fake_tensorrt import fake_tensorrt

GRAPHS = ("answer", "prompt", "replay", "step", "vision", "visual_kv")
ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def stream(driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaStream]:
    monkeypatch.setattr(cuda, "_DRIVER", str(driver))
    made = CudaStream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    opened = Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", layers=3))
    build_engines(opened, fake_tensorrt(), ORIN)
    return opened


def load(bundle: Bundle, graph: str, stream: CudaStream, **changes: Any) -> TensorRTEngine:
    return TensorRTEngine(find_engine(bundle, graph, ORIN)[0], fake_tensorrt(**changes), stream)


def feeds_for(engine: Engine, text: int, queries: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the right shapes, for a text bucket."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, spec in engine.inputs.items():
        free = 1 if name == "frames" else text if name.startswith("text_") else queries + text
        shape = tuple(free if size is None else size for size in spec.shape)
        if spec.dtype.kind == "f":
            feeds[name] = (rng.random(shape) if "mask" in name else rng.normal(size=shape)).astype(spec.dtype)
        else:
            feeds[name] = rng.integers(0, 5, shape).astype(spec.dtype)
    return feeds


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_says_what_onnx_runtime_says_in_every_bucket(bundle: Bundle, stream: CudaStream, graph: str) -> None:
    queries, buckets = bundle.manifest.dims.queries, bundle.manifest.dims.text_buckets
    with load(bundle, graph, stream) as engine, OnnxRuntimeEngine(bundle.graph_path(graph)) as reference:
        assert engine.inputs == reference.inputs and engine.outputs == reference.outputs
        for text in (*buckets, *reversed(buckets)):
            feeds = feeds_for(reference, text, queries, seed=text)
            expected = reference.run(feeds)
            results = engine.run(feeds)
            assert results.keys() == expected.keys()
            for name, value in results.items():
                np.testing.assert_array_equal(value, expected[name])


def test_another_bucket_allocates_nothing_and_closing_frees_everything(
    bundle: Bundle, stream: CudaStream, driver: Path
) -> None:
    count = ctypes.CDLL(str(driver)).keepsight_allocated
    before = count()
    engine = load(bundle, "step", stream)
    held = count()
    assert held - before == len(engine.inputs) + len(engine.outputs)
    for text in bundle.manifest.dims.text_buckets:
        engine.run(feeds_for(engine, text, bundle.manifest.dims.queries))
    assert count() == held
    engine.close()
    engine.close()
    assert count() == before
    with pytest.raises(EngineError, match="closed"):
        engine.run({})


def test_the_profile_is_switched_only_for_another_bucket(bundle: Bundle, stream: CudaStream) -> None:
    trt = fake_tensorrt()
    with TensorRTEngine(find_engine(bundle, "prompt", ORIN)[0], trt, stream) as engine:
        trt.record.switched.clear()
        for text in (16, 16, 32, 32, 32, 16):
            engine.run(feeds_for(engine, text, bundle.manifest.dims.queries))
    assert trt.record.switched == [0, 1, 0]


def test_a_size_without_a_profile_is_refused_with_those_there_are(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "prompt", stream) as engine:
        with pytest.raises(EngineError, match=r"was not built for \{'text_ids': \(20,\).*'text_ids': \(16,\).*\(64,\)"):
            engine.run(feeds_for(engine, 20, 4))
        assert engine.run(feeds_for(engine, 16, 4))


def test_wrong_feeds_are_refused(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "visual_kv", stream) as engine:
        with pytest.raises(EngineError, match=r"missing \['features'\], unknown \['x'\]"):
            engine.run({"x": np.zeros(1)})
        with pytest.raises(EngineError, match=r"must be float32 \[9, 48\], got float64 \[9, 48\]"):
            engine.run({"features": np.zeros((9, 48))})


def test_a_view_that_is_not_contiguous_is_read_right(bundle: Bundle, stream: CudaStream) -> None:
    features = np.random.default_rng(0).normal(size=(48, 9)).astype(np.float32).T
    with load(bundle, "visual_kv", stream) as engine:
        turned, plain = engine.run({"features": features}), engine.run({"features": features.copy(order="C")})
    np.testing.assert_array_equal(turned["cross_k"], plain["cross_k"])


def test_what_is_not_finite_is_refused(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "visual_kv", stream) as engine, pytest.raises(EngineError, match="values that are nan or inf"):
        engine.run({"features": np.full((9, 48), np.nan, np.float32)})


def test_an_engine_runs_from_another_thread(bundle: Bundle, stream: CudaStream) -> None:
    """CUDA's context belongs to a thread, and frames are seen in one that did not load the engine."""
    results: list[dict[str, np.ndarray]] = []
    with load(bundle, "visual_kv", stream) as engine:
        thread = threading.Thread(target=lambda: results.append(engine.run({"features": np.ones((9, 48), np.float32)})))
        thread.start()
        thread.join()
    assert len(results) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": False}, r"TensorRT 10\.3\.0 can't start for visual_kv\.engine"),
        ({"loads": False}, r"refuses visual_kv\.engine: the engine was made by another TensorRT\. .*keepsight build"),
        ({"has_memory": False}, r"has no memory for the activations of visual_kv\.engine"),
    ],
)
def test_an_engine_that_does_not_load_is_refused(
    bundle: Bundle, stream: CudaStream, changes: dict[str, bool], said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        load(bundle, "visual_kv", stream, **changes)


def test_a_run_that_fails_is_an_error(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "visual_kv", stream, runs=False) as engine, pytest.raises(EngineError, match="or the GPU is"):
        engine.run({"features": np.ones((9, 48), np.float32)})


def test_the_target_is_asked_of_the_driver(stream: CudaStream) -> None:
    assert this_target(fake_tensorrt("10.3.0")) == ORIN


def test_too_much_memory_is_an_error_with_the_drivers_number(stream: CudaStream) -> None:
    with pytest.raises(EngineError, match=r"refused cuMemAlloc_v2 \(error 2\)\. 2 is out of memory"):
        stream.allocate(1 << 41)


def test_without_a_driver_there_is_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DRIVER", "libno-such-driver.so")
    with pytest.raises(MissingComponentError, match="no CUDA driver here"):
        CudaStream()


def test_a_closed_stream_says_so(stream: CudaStream) -> None:
    stream.close()
    with pytest.raises(EngineError, match="the CUDA stream is closed"):
        stream.synchronize()
