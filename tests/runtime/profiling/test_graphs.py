"""Clocks before graphs: engines say what they said, each run is timed, and on a device by events; layers are told by block.

TensorRT and the CUDA driver are doubles; cuda-python between them is the real one. None of this was run on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.graphs.cuda import CudaStream
from keepsight.runtime.graphs.engine_store import Target, find_engine
from keepsight.runtime.graphs.tensorrt_build import build_engines
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine, load_plan
from keepsight.runtime.graphs.tensorrt_layers import layer_origins, layers_timed
from keepsight.runtime.profiling.device_clock import DeviceClock
from keepsight.runtime.profiling.graphs import GraphTimes, timed
from keepsight.runtime.profiling.layers import block_of, layer_times
from keepsight.runtime.profiling.load import Loaded, Setup
from keepsight.runtime.profiling.run import Options, profile
from keepsight.runtime.session import Session

from ...random_bundle import make_bundle, random_frames
from ..fake_cuda import load_driver
from ..fake_tensorrt import fake_tensorrt

ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")


@pytest.fixture
def driver() -> Iterator[ctypes.CDLL]:
    """The double; whatever a test makes must be given back by its end."""
    loaded = load_driver()

    def held() -> tuple[int, ...]:
        return tuple(getattr(loaded, f"keepsight_{what}")() for what in ("allocated", "streams", "graphs", "events"))

    before = held()
    yield loaded
    assert held() == before


@pytest.fixture
def stream(driver: ctypes.CDLL) -> Iterator[CudaStream]:
    made = CudaStream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    opened = Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))
    build_engines(opened, fake_tensorrt(), ORIN)
    return opened


def on_tensorrt(bundle: Bundle, stream: CudaStream, *names: str) -> Engines:
    with stream:
        plans = {name: load_plan(find_engine(bundle, name, ORIN)[0], fake_tensorrt()) for name in names}
    return Engines({name: TensorRTEngine(plan, stream) for name, plan in plans.items()})


def test_a_session_with_clocks_says_what_one_without_says(bundle: Bundle) -> None:
    from keepsight.streams import Frame

    times = GraphTimes()
    sessions = [Session(bundle), Session(bundle, engines=timed(open_engines(bundle), times))]
    said = []
    for session in sessions:
        with session:
            standing = session.stand("what is the color of the shape?")
            for index, image in enumerate(random_frames(7)):
                session.see(Frame(image, float(index), 0.0, index))
            said.append((session.perceive(standing).rows, session.perceive("what was there first?").rows))
    np.testing.assert_array_equal(said[0][0], said[1][0])
    np.testing.assert_array_equal(said[0][1], said[1][1])
    assert set(times.take()) == {"vision", "visual_kv", "step", "prompt", "answer", "replay"}
    assert times.take() == {}


def test_times_of_several_runs_of_a_graph_are_added() -> None:
    times = GraphTimes()
    for name, ms in (("step", 2.0), ("vision", 5.0), ("step", 3.0)):
        times.note(name, ms)
    assert times.take() == {"step": 5.0, "vision": 5.0}


def test_on_a_device_events_around_the_kernels_are_read_for_every_run_with_and_without_a_cuda_graph(
    bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL
) -> None:
    times, frames = GraphTimes(), random_frames(3)
    launched = driver.keepsight_launches()
    with timed(on_tensorrt(bundle, stream, "vision", "visual_kv"), times) as engines:
        for image in frames:
            features = engines["vision"].enqueue({"frames": image[None]})["features"][0]
            engines["visual_kv"].run({"features": features})
            found = times.take()
            assert set(found) == {"vision", "vision_device", "visual_kv", "visual_kv_device"}
            for name in ("vision", "visual_kv"):
                assert 0 < found[f"{name}_device"] <= found[name]
    assert driver.keepsight_launches() - launched == 4  # from each one's second run on


def test_a_clock_is_read_after_its_second_event_and_closed_twice(stream: CudaStream) -> None:
    clock = DeviceClock(stream)
    with stream, clock:
        pass
    assert clock.read_ms() >= 0
    clock.close()
    clock.close()


@pytest.mark.parametrize(("urgent", "priority"), [(False, 0), (True, -5)])
def test_an_urgent_stream_has_the_highest_priority_that_there_is(driver: ctypes.CDLL, urgent: bool, priority: int) -> None:
    CudaStream(urgent=urgent).close()
    assert driver.keepsight_priority() == priority


def test_layers_are_timed_without_cuda_graphs_and_only_meanwhile(bundle: Bundle, stream: CudaStream, driver: ctypes.CDLL) -> None:
    frames = random_frames(1)
    with on_tensorrt(bundle, stream, "vision") as engines:
        engine = engines["vision"]
        assert isinstance(engine, TensorRTEngine)
        for _ in range(3):
            expected = engine.run({"frames": frames})["features"]
        launched, graphs = driver.keepsight_launches(), driver.keepsight_graphs()
        with layers_timed(engine) as times:
            assert driver.keepsight_graphs() == graphs - 1
            for _ in range(2):
                np.testing.assert_array_equal(engine.run({"frames": frames})["features"], expected)
            assert driver.keepsight_launches() == launched
        assert times and all(ms == [0.25, 0.25] for ms in times.values())
        assert set(layer_origins(engine)) == set(times)
        for _ in range(2):
            engine.run({"frames": frames})
        assert driver.keepsight_launches() == launched + 1 and all(len(ms) == 2 for ms in times.values())


def test_an_engine_built_for_detailed_profiling_says_where_layers_come_from() -> None:
    said = '{"Layers": [{"Name": "fused_1", "Metadata": "[ONNX Layer: /encoder/blocks.3/Add]"}, {"Name": "copy"}, "plain"]}'
    inspector = SimpleNamespace(get_engine_information=lambda kind: said)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    graph: Any = SimpleNamespace(plan=SimpleNamespace(engine=engine, trt=fake_tensorrt()))
    assert layer_origins(graph) == {"fused_1": "[ONNX Layer: /encoder/blocks.3/Add]", "copy": "copy", "plain": "plain"}


def test_a_profile_has_the_layers_of_every_engine_that_ran(bundle: Bundle, stream: CudaStream, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", random_frames(6))
    names = tuple(name for name in bundle.manifest.graphs if name != "memory")
    engines = on_tensorrt(bundle, stream, *names)
    with Session(bundle, engines=engines) as session:
        loaded = Loaded(Setup("random", backend="tensorrt"), bundle, session, engines, None, None, [])
        layers = layer_times(loaded, str(tmp_path / "frames.npy"))
        assert session.frames_seen == 0
    assert {layer.engine for layer in layers} == {"vision", "visual_kv", "prompt", "replay"}
    assert {layer.ms for layer in layers} == {0.25}
    on_cpu = Loaded(Setup("random"), bundle, session, open_engines(bundle), None, None, [])
    assert layer_times(on_cpu, str(tmp_path / "frames.npy")) == []
    on_cpu.engines.close()


def test_a_whole_profile_on_tensorrt_has_device_times_layers_and_what_the_system_takes(
    bundle: Bundle, driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake_tensorrt()
    monkeypatch.setattr("keepsight.runtime.graphs.backends.import_tensorrt", lambda: trt)
    monkeypatch.setattr("keepsight.runtime.graphs.backends.this_target", lambda trt: ORIN)
    np.save(tmp_path / "frames.npy", random_frames(6))
    setup = Setup(str(bundle.path), backend="tensorrt", urgent=True)
    found = profile(Options(setup, str(tmp_path / "frames.npy"), frames=4, warmup=2, runs=2, sensor_hz=20))
    assert found.machine.gpu == "Orin" and driver.keepsight_priority() == -5
    on_device = {stage.name: stage for stage in found.stages if stage.clock == "device"}
    inside = {"vision_device": "vision", "visual_kv_device": "memory", "memory_graph_device": "memory"}
    assert {name: stage.inside for name, stage in on_device.items()} == inside
    for name, stage in on_device.items():
        host = found.stage(inside[name])
        assert host is not None and len(stage.samples) == 8
        assert all(0 < ms <= whole for ms, whole in zip(stage.samples, host.samples, strict=True))
    names = [(stage.name, stage.path) for stage in found.stages]
    assert len(set(names)) == len(names)
    assert {"vision", "visual_kv", "memory"} <= {layer.engine for layer in found.layers}
    assert "system, GPU included" in {use.component for use in found.memory}
    assert any("goes before the language model's" in note for note in found.notes)


@pytest.mark.parametrize(
    ("origin", "block"),
    [
        ("/encoder/blocks.6/project/Conv", "blocks.6"),
        ("/encoder/blocks.6/project/Conv + /encoder/blocks.6/Clip", "blocks.6"),
        ("{ForeignNode[/blocks.0/norm1/ReduceMean.../blocks.11/mlp/fc2/MatMul]}", "blocks.0 to blocks.11"),
        ("qformer.layers.10.cross.query.weight.cast", "layers.10"),
        ("[ONNX Layer: /visual/transformer/resblocks.2/attn/MatMul]", "resblocks.2"),
        ("/MatMul_10", "outside of blocks"),
        ("Reformatting CopyNode for Input Tensor 0 to /stem/Conv", "outside of blocks"),
    ],
)
def test_a_layer_is_of_the_block_that_its_nodes_are_named_after(origin: str, block: str) -> None:
    assert block_of(origin) == block
