"""The files that hold a graph's weights, found without the `onnx` package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.onnx_weights import external_files
from keepsight.streams.errors import BundleError


def external(file: str) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.arange(4, dtype=np.float32), file)
    onnx.external_data_helper.set_external_data(tensor, file, offset=64, length=16)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def save(path: Path, graph: onnx.GraphProto) -> Path:
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("graph", ["answer", "prompt", "replay", "step", "visual_kv", "vision"])
def test_the_shipped_graphs_agree_with_the_onnx_package(graph: str) -> None:
    path = Bundle.open("tiny", verify=False).graph_path(graph)
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    expected = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    assert external_files(path) == expected
    assert expected == (set() if graph == "vision" else {"qformer.weights"})


def test_weights_of_initializers_constants_and_branches_are_all_found(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [], [external("branch.bin")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=external("constant.bin")),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=helper.make_graph([], "other", [], [])),
    ]
    inside = numpy_helper.from_array(np.zeros(1000, np.float32), "inside")  # stepped over
    graph = helper.make_graph(nodes, "graph", [], [], [inside, external("folder/a.bin"), external("folder/b.bin")])
    found = external_files(save(tmp_path / "graph.onnx", graph))
    assert found == {"branch.bin", "constant.bin", "folder/a.bin", "folder/b.bin"}


@pytest.mark.parametrize("content", [b"", b"hello" * 100, b"\x3a\x7f\x00", b"\xff" * 20])
def test_what_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"graph\.onnx is not an ONNX model"):
        external_files(tmp_path / "graph.onnx")


def test_a_truncated_graph_is_refused(tmp_path: Path) -> None:
    whole = Bundle.open("tiny", verify=False).graph_path("step").read_bytes()
    (tmp_path / "graph.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="is not an ONNX model"):
        external_files(tmp_path / "graph.onnx")


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"can't be read \(No such file"):
        external_files(tmp_path / "graph.onnx")
