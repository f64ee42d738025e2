"""An engine on TensorRT says what ONNX Runtime says: with doubles of TensorRT and of the CUDA driver, which work on the CPU.

cuda-python between them is the real one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.cuda import CudaStream
from keepsight.runtime.graphs.device import DeviceBuffer, DeviceTensor
from keepsight.runtime.graphs.engine import Engine, OnnxRuntimeEngine
from keepsight.runtime.graphs.engine_store import Target, find_engine
from keepsight.runtime.graphs.tensorrt_build import build_engines, this_target
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine, load_plan
from keepsight.streams.errors import EngineError

from ..random_bundle import make_bundle
from .fake_cuda import load_driver
from .fake_tensorrt import fake_tensorrt

GRAPHS = ("answer", "memory", "prompt", "replay", "step", "vision", "visual_kv")
ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")


@pytest.fixture
def driver() -> Iterator[ctypes.CDLL]:
    """The double; whatever a test allocates, opens or captures must be given back by its end."""
    loaded = load_driver()
    held = loaded.keepsight_allocated(), loaded.keepsight_streams(), loaded.keepsight_graphs()
    yield loaded
    assert held == (loaded.keepsight_allocated(), loaded.keepsight_streams(), loaded.keepsight_graphs())


@pytest.fixture
def stream(driver: ctypes.CDLL) -> Iterator[CudaStream]:
    made = CudaStream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    opened = Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", layers=3))
    build_engines(opened, fake_tensorrt(), ORIN)
    return opened


def load(
    bundle: Bundle, graph: str, stream: CudaStream, *, trt: Any = None, cuda_graphs: bool = True, **changes: Any
) -> TensorRTEngine:
    with stream:
        plan = load_plan(find_engine(bundle, graph, ORIN)[0], trt or fake_tensorrt(**changes))
    return TensorRTEngine(plan, stream, cuda_graphs=cuda_graphs)


def feeds_for(engine: Engine, text: int, queries: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the right shapes, for a text bucket."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, spec in engine.inputs.items():
        free = 1 if name == "frames" else text if name.startswith("text_") else queries + text
        shape = tuple(free if size is None else size for size in spec.shape)
        if name == "position":  # every slot has its place in time
            feeds[name] = np.broadcast_to(np.arange(shape[1], dtype=spec.dtype)[:, None], shape).copy()
        elif spec.dtype.kind == "f":
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
    bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL
) -> None:
    count = driver.keepsight_allocated
    before = count()
    engine = load(bundle, "step", stream)
    held = count()
    assert held - before == len(engine.inputs) + len(engine.outputs) + 1  # and the scratch memory
    for text in bundle.manifest.dims.text_buckets:
        engine.run(feeds_for(engine, text, bundle.manifest.dims.queries))
    assert count() == held
    engine.close()
    engine.close()
    assert count() == before
    with pytest.raises(EngineError, match="closed"):
        engine.run({})


def test_each_bucket_has_a_context_of_its_own_and_no_run_switches_profiles(bundle: Bundle, stream: CudaStream) -> None:
    trt = fake_tensorrt()
    with load(bundle, "prompt", stream, trt=trt) as engine:
        assert trt.record.switched == [0, 1, 2]
        for text in (16, 32, 32, 16, 64):
            engine.run(feeds_for(engine, text, bundle.manifest.dims.queries))
    assert trt.record.switched == [0, 1, 2]


def test_engines_can_share_their_scratch_memory(bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL) -> None:
    with stream:
        plans = [load_plan(find_engine(bundle, graph, ORIN)[0], fake_tensorrt()) for graph in ("visual_kv", "vision")]
        scratch = stream.allocate(max(plan.scratch_bytes for plan in plans))
    before = driver.keepsight_allocated()
    engines = [TensorRTEngine(plan, stream, scratch=scratch) for plan in plans]
    assert driver.keepsight_allocated() - before == sum(len(engine.inputs) + len(engine.outputs) for engine in engines)
    for engine in engines:
        engine.run(feeds_for(engine, 16, 4))
        engine.close()
    with stream:
        stream.free(scratch)  # still there: closing an engine frees only its own


# -- CUDA graphs ---------------------------------------------------------------------------------------------------------


def test_a_bucket_is_captured_at_its_second_run_and_launched_as_a_graph_from_then_on(
    bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL
) -> None:
    trt, launches = fake_tensorrt(), driver.keepsight_launches
    with load(bundle, "prompt", stream, trt=trt) as engine, OnnxRuntimeEngine(bundle.graph_path("prompt")) as reference:
        before = launches()
        for seed, text in enumerate((16, 16, 32, 16, 32, 16)):
            feeds = feeds_for(engine, text, 4, seed=seed)
            np.testing.assert_array_equal(engine.run(feeds)["prompt_state"], reference.run(feeds)["prompt_state"])
    assert launches() - before == 4  # all but the first run of each bucket
    assert trt.record.executed == 4  # those, and one capture each


def test_a_network_that_cannot_be_captured_is_an_error_and_runs_without_graphs(bundle: Bundle, stream: CudaStream) -> None:
    features = np.ones((9, 48), np.float32)
    with load(bundle, "visual_kv", stream, captures=False) as engine:
        engine.run({"features": features})
        with pytest.raises(EngineError, match=r"can't be captured as a CUDA graph.*waits for the host.*--no-cuda-graphs"):
            engine.run({"features": features})
    with load(bundle, "visual_kv", stream, captures=False, cuda_graphs=False) as engine:
        first, second = (engine.run({"features": features}) for _ in range(2))
    np.testing.assert_array_equal(first["cross_k"], second["cross_k"])


def test_what_a_graph_cannot_hold_ends_the_capture_and_the_stream_goes_on(stream: CudaStream) -> None:
    with stream, pytest.raises(EngineError, match="STREAM_CAPTURE_UNSUPPORTED"):
        stream.capture(stream.synchronize)
    with stream:
        stream.synchronize()


def test_two_places_that_an_input_comes_from_in_turn_have_a_graph_each_and_a_third_one_closes_the_oldest(
    bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL
) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 9, 48)).astype(np.float32)
    with load(bundle, "visual_kv", stream) as engine, load(bundle, "visual_kv", stream) as other:
        buffers = [DeviceBuffer(name, stream, rows[0].nbytes) for name in "abc"]
        with stream:
            for buffer, values in zip(buffers, rows, strict=True):
                buffer.fill(values)
        places = [DeviceTensor(buffer, (9, 48), rows.dtype, 0, buffer.writes) for buffer in buffers]
        wanted = [other.run({"features": values})["cross_k"] for values in rows]
        held, before = driver.keepsight_graphs(), driver.keepsight_launches()
        for turn in (0, 1, 0, 1, 0, 1):
            np.testing.assert_array_equal(engine.run({"features": places[turn]})["cross_k"], wanted[turn])
        assert driver.keepsight_launches() - before == 4 and driver.keepsight_graphs() - held == 2
        for turn in (2, 2, 1, 0):
            np.testing.assert_array_equal(engine.run({"features": places[turn]})["cross_k"], wanted[turn])
        assert driver.keepsight_launches() - before == 6 and driver.keepsight_graphs() - held == 1  # of place 1; 0 is new again
        with stream:
            for buffer in buffers:
                buffer.close()


def test_an_engine_may_read_and_write_in_anothers_buffers_which_it_does_not_free(
    bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL
) -> None:
    before = driver.keepsight_allocated()
    first = load(bundle, "visual_kv", stream)
    held = driver.keepsight_allocated()
    with stream:
        plan = load_plan(find_engine(bundle, "visual_kv", ORIN)[0], fake_tensorrt())
    second = TensorRTEngine(plan, stream, buffers=first.buffers)
    assert driver.keepsight_allocated() - held == 1  # its scratch memory
    features = np.ones((9, 48), np.float32)
    kept = first.enqueue({"features": features})["cross_k"]
    np.testing.assert_array_equal(second.run({"features": features})["cross_k"], first.run({"features": features})["cross_k"])
    with pytest.raises(EngineError, match="a later run has overwritten it"):
        np.asarray(kept)
    second.close()
    assert driver.keepsight_allocated() == held
    first.close()
    assert driver.keepsight_allocated() == before


# -- tensors that stay on the device -------------------------------------------------------------------------------------


def test_the_next_graph_reads_what_stayed_on_the_device(bundle: Bundle, stream: CudaStream) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 1, 24, 24, 3), dtype=np.uint8)
    with load(bundle, "vision", stream) as vision, load(bundle, "visual_kv", stream) as visual_kv:
        for frame in frames:  # the third launches both as graphs, which hold the addresses
            features = vision.enqueue({"frames": frame})["features"]
            kept = visual_kv.run({"features": features[0]})
            copied = OnnxRuntimeEngine(bundle.graph_path("visual_kv")).run({"features": np.asarray(features)[0]})
            np.testing.assert_array_equal(kept["cross_k"], copied["cross_k"])


def test_a_graph_is_captured_anew_when_an_input_comes_from_elsewhere(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "vision", stream) as vision, load(bundle, "visual_kv", stream) as visual_kv:
        host = np.random.default_rng(0).normal(size=(9, 48)).astype(np.float32)
        kept = vision.enqueue({"frames": np.ones((1, 24, 24, 3), np.uint8)})["features"][0]
        first, second = ([visual_kv.run({"features": value})["cross_k"] for _ in range(3)] for value in (host, kept))
        for results in (first, second):
            for repeated in results[1:]:
                np.testing.assert_array_equal(repeated, results[0])
        assert not np.array_equal(first[0], second[0])


def test_what_was_overwritten_is_refused(bundle: Bundle, stream: CudaStream) -> None:
    frame = np.zeros((1, 24, 24, 3), np.uint8)
    with load(bundle, "vision", stream) as vision, load(bundle, "visual_kv", stream) as visual_kv:
        features = vision.enqueue({"frames": frame})["features"]
        vision.run({"frames": frame})
        for use in (lambda: np.asarray(features), lambda: visual_kv.run({"features": features[0]})):
            with pytest.raises(EngineError, match="'features' was kept on the device, and a later run has overwritten it"):
                use()


def test_a_placed_input_is_read_by_many_runs_until_another_is_fed(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "step", stream) as engine, OnnxRuntimeEngine(bundle.graph_path("step")) as reference:
        feeds = feeds_for(engine, 16, 4)
        placed = engine.place("cross_k", feeds["cross_k"])
        for seed in range(3):
            others = feeds_for(engine, 16, 4, seed=seed) | {"cross_k": feeds["cross_k"]}
            expected = reference.run(others)
            np.testing.assert_array_equal(engine.run({**others, "cross_k": placed})["rows"], expected["rows"])
        engine.run(feeds)
        with pytest.raises(EngineError, match="'cross_k' was kept on the device"):
            engine.run({**feeds, "cross_k": placed})


def test_one_entry_of_a_placed_input_is_read_wherever_it_lies(bundle: Bundle, stream: CudaStream) -> None:
    """One layer of the keys, which `answer` reads: aligned as TensorRT wants it, or copied to where it is."""
    with load(bundle, "step", stream) as step, load(bundle, "answer", stream) as answer:
        keys = feeds_for(step, 16, 4)["cross_k"]
        feeds = feeds_for(answer, 16, 4)
        placed = step.place("cross_k", keys)
        for index in (0, 1, -1):
            assert (placed[index].address - placed.address) % keys[0].nbytes == 0
            expected = answer.run({**feeds, "cross_k": keys[index]})
            np.testing.assert_array_equal(answer.run({**feeds, "cross_k": placed[index]})["soft_prompt"], expected["soft_prompt"])
        with pytest.raises(IndexError):
            placed[len(keys)]


def test_an_entry_at_an_odd_address_is_copied(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "step", stream) as step, load(bundle, "visual_kv", stream) as visual_kv:
        placed = step.place("cross_k", feeds_for(step, 16, 4)["cross_k"])
        odd = DeviceTensor(placed.buffer, (9, 48), placed.dtype, 12, placed.written)
        assert odd.address % 256
        for _ in range(3):  # the last as a graph
            results = visual_kv.run({"features": odd})
        np.testing.assert_array_equal(results["cross_k"], visual_kv.run({"features": np.asarray(odd)})["cross_k"])


def test_a_tensor_of_another_stream_is_refused(bundle: Bundle, stream: CudaStream) -> None:
    other = CudaStream()
    with load(bundle, "vision", other) as vision, load(bundle, "visual_kv", stream) as visual_kv:
        features = vision.enqueue({"frames": np.ones((1, 24, 24, 3), np.uint8)})["features"]
        with pytest.raises(EngineError, match="was kept on another stream"):
            visual_kv.run({"features": features[0]})
    other.close()


def test_onnx_runtime_refuses_what_is_on_a_device(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "vision", stream) as vision:
        features = vision.enqueue({"frames": np.ones((1, 24, 24, 3), np.uint8)})["features"]
        with pytest.raises(EngineError, match=r"must be float32 \[9, 48\], got DeviceTensor"):
            OnnxRuntimeEngine(bundle.graph_path("visual_kv")).run({"features": features[0]})


# -- what is refused -----------------------------------------------------------------------------------------------------


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


def test_a_thread_waits_until_another_has_enqueued_all_of_its_run(bundle: Bundle, stream: CudaStream) -> None:
    """CUDA's context belongs to a thread; kernels of two engines must not mix, nor get into the other's capture."""
    inside, go_on = threading.Event(), threading.Event()
    features = np.ones((9, 48), np.float32)
    slow = fake_tensorrt(during=lambda: (inside.set(), go_on.wait(10)))
    with load(bundle, "visual_kv", stream, trt=slow) as one, load(bundle, "visual_kv", stream) as other:
        results: list[Mapping[str, Any]] = []
        threads = [
            threading.Thread(target=lambda engine=engine: results.append(engine.run({"features": features})))
            for engine in (one, other)
        ]
        threads[0].start()
        assert inside.wait(10)
        threads[1].start()
        threads[1].join(0.3)
        assert threads[1].is_alive() and results == []
        go_on.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(results[0]["cross_k"], results[1]["cross_k"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": False}, r"TensorRT 10\.3\.0 can't start for visual_kv\.engine"),
        ({"loads": False}, r"refuses visual_kv\.engine: the engine was made by another TensorRT\. .*keepsight build"),
        ({"has_memory": False}, r"has no memory for visual_kv\.engine"),
    ],
)
def test_an_engine_that_does_not_load_is_refused(
    bundle: Bundle, stream: CudaStream, changes: dict[str, bool], said: str
) -> None:
    with pytest.raises(EngineError, match=said):
        load(bundle, "visual_kv", stream, **changes).close()


def test_a_run_that_fails_is_an_error(bundle: Bundle, stream: CudaStream) -> None:
    with load(bundle, "visual_kv", stream, runs=False) as engine, pytest.raises(EngineError, match="or the GPU is"):
        engine.run({"features": np.ones((9, 48), np.float32)})


def test_the_target_is_asked_of_the_driver(stream: CudaStream) -> None:
    assert this_target(fake_tensorrt("10.3.0")) == ORIN


def test_too_much_memory_is_an_error_with_the_drivers_word_for_it(stream: CudaStream) -> None:
    with stream, pytest.raises(EngineError, match=r"refused cuMemAlloc \(CUDA_ERROR_OUT_OF_MEMORY\)\."):
        stream.allocate(1 << 41)


def test_a_closed_stream_says_so(stream: CudaStream) -> None:
    stream.close()
    with pytest.raises(EngineError, match="the CUDA stream is closed"):
        stream.synchronize()
