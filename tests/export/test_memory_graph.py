"""`memory.onnx` as a file: what is in it, that TensorRT builds it at MA-LMM's size, and that every export writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from keepsight.export.memory_graph import memory_graph, memory_graph_bytes, write_memory_graph
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.device_bank import OTHER_TURN
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.runtime.graphs.tensorrt_build import target_of
from keepsight.runtime.graphs.tensorrt_network import build_plan, parse, profiles_of
from keepsight.runtime.manifest import Dims
from keepsight.runtime.memory import Rider

MALMM = Dims(
    image_size=224, tokens=257, channels=1408, queries=32, hidden=768, layers=12, cross_layers=tuple(range(0, 12, 2)), heads=12,
    n_embd=4096, memory_length=20, text_buckets=(16, 32, 64, 128), position_buckets=1,
)  # fmt: skip

# What TensorRT 10.3's parser takes with static shapes; nothing here writes by index, branches or loops.
PLAIN = {
    "Abs", "Add", "And", "Cast", "Concat", "Div", "Equal", "Gather", "Greater", "GreaterOrEqual", "Less", "Max", "Mul", "Or",
    "ReduceMax", "ReduceMin", "ReduceSum", "Reshape", "Sqrt", "Sub", "Where",
}  # fmt: skip


@pytest.fixture(scope="session")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')


def test_it_is_of_plain_operators_without_weights_and_static(tmp_path: Path) -> None:
    model = onnx.load(str(write_memory_graph(tmp_path, MALMM)))
    assert {node.op_type for node in model.graph.node} <= PLAIN
    assert [opset.version for opset in model.opset_import] == [17]
    assert (tmp_path / "memory.onnx").stat().st_size < 32_000
    for value in (*model.graph.input, *model.graph.output):
        assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name
    assert memory_graph_bytes(MALMM) == (tmp_path / "memory.onnx").read_bytes()


def test_what_a_run_writes_the_next_one_reads(tmp_path: Path) -> None:
    with OnnxRuntimeEngine(write_memory_graph(tmp_path, MALMM)) as engine:
        for one, other in OTHER_TURN.items():
            read, written = (one, other) if one in engine.inputs else (other, one)
            wanted, found = engine.inputs[read], engine.outputs[written]
            assert (wanted.shape, wanted.dtype) == (found.shape, found.dtype)


@pytest.mark.parametrize("sm", [86, 120])
@pytest.mark.parametrize("bank", ["visual", "query"])
def test_tensorrt_builds_it_at_real_size(rtx: Any, tmp_path: Path, bank: str, sm: int) -> None:
    path = tmp_path / "memory.onnx"
    if bank == "visual":
        write_memory_graph(tmp_path, MALMM)
    else:  # a standing question's: 11 groups of 32 + 16 rows
        riders = {name: Rider(11, 768) for name in ("self_k", "self_v")}
        path.write_bytes(memory_graph(slots=21, tokens=48, channels=768, groups=11, riders=riders).SerializeToString())
    parsed = parse(rtx, path)
    profiles = profiles_of(parsed, [])
    assert len(profiles) == 0
    assert build_plan(rtx, parsed, profiles, target=target_of(rtx, sm)).nbytes > 0


def test_the_shipped_bundle_has_the_graph_of_its_dimensions() -> None:
    bundle = Bundle.open("tiny")
    assert bundle.graph_path("memory").read_bytes() == memory_graph_bytes(bundle.manifest.dims)
