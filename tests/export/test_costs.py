"""What a run of a graph costs: counted in graphs small enough to count by hand, and from sizes as from the graphs themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from keepsight.export.bench_macs import fast_macs, vision_macs
from keepsight.export.costs import count_bundle, count_graph
from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.onnxfile import export_onnx
from keepsight.export.qformer import QFormerConfig
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.manifest import Dims, read_manifest
from keepsight.runtime.planning.costs import Product, cost_of, graph_bytes, product_flops, products, total_bytes
from keepsight.runtime.planning.shapes import QFormerShape, VisionShape, memory_cost, qformer_costs, vision_cost
from keepsight.streams.errors import BundleError

from .. import random_bundle

FULL = Dims(
    image_size=224, tokens=257, channels=1408, queries=32, hidden=768, layers=12, cross_layers=tuple(range(0, 12, 2)), heads=12,
    n_embd=4096, memory_length=20, text_buckets=(16, 32, 64, 128), position_buckets=1,
)  # fmt: skip


def graph(path: Path, nodes: Sequence[Any], inputs: dict[str, Sequence[int | str]], weights: dict[str, Sequence[int]]) -> Path:
    """An ONNX file whose last node's output is the graph's."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs.items()]
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "g", values, [out], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path.write_bytes(model.SerializeToString())
    return path


def count(path: Path, nodes: Sequence[Any], inputs: dict[str, Sequence[int | str]], weights: dict[str, Sequence[int]]) -> Any:
    return count_graph(graph(path / "g.onnx", nodes, inputs, weights), FULL)[-1]


@pytest.mark.parametrize(
    ("node", "inputs", "weights", "product", "moved"),
    [
        # One matrix of weights for every row of the batch: a single product.
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": (2, 3, 4)}, {"w": (4, 5)}, "6x4x5 w", 24 + 30),
        # A matrix of its own for each of the batch.
        (helper.make_node("MatMul", ["x", "z"], ["y"]), {"x": (2, 3, 4), "z": (2, 4, 5)}, {}, "2*3x4x5", 24 + 40 + 30),
        # One for all heads of a frame, but several frames.
        (helper.make_node("MatMul", ["x", "z"], ["y"]), {"x": (2, 6, 3, 4), "z": (2, 1, 4, 5)}, {}, "12*3x4x5", 144 + 40 + 180),
        (helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1), {"x": (3, 4)}, {"w": (5, 4), "b": (5,)}, "3x4x5 w", 27),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), {"x": (4, 3)}, {"w": (4, 5)}, "3x4x5 w", 27),
        (helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2]), {"x": (1, 3, 8, 8)}, {"w": (6, 3, 2, 2)},
         "conv 16x12x6 w", 192 + 96),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=4), {"x": (1, 4, 5, 5)}, {"w": (8, 1, 3, 3)},
         "conv 4*9x9x2 w", 100 + 72),
        (helper.make_node("Einsum", ["x", "z"], ["y"], equation="bqhd,bkhd->bhqk"), {"x": (2, 3, 6, 4), "z": (2, 5, 6, 4)}, {},
         "12*3x4x5", 144 + 240 + 180),
    ],
)  # fmt: skip
def test_a_product_is_counted_by_its_sizes(
    node: Any, inputs: dict[str, Sequence[int | str]], weights: dict[str, Sequence[int]], product: str, moved: int, tmp_path: Path
) -> None:
    cost = count(tmp_path, [node], inputs, weights)
    assert cost.products == {product: 1}
    assert cost.flops == product_flops(cost) == Product.parse(product).flops
    assert cost.product_values == moved
    assert cost.weights == sum(np.prod(shape) for shape in weights.values())
    assert (cost.kernels, cost.other_values) == (1, {})


def test_a_convolution_has_as_many_multiply_adds_as_values_it_adds_up(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1])
    cost = count(tmp_path, [node], {"x": (1, 4, 7, 7)}, {"w": (6, 2, 3, 3)})
    assert cost.flops == 2 * (6 * 7 * 7) * (2 * 3 * 3)


def test_views_and_what_depends_on_sizes_alone_cost_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["wanted"], axis=0),
        helper.make_node("Cast", ["w"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "single"], ["a"]),
        helper.make_node("Reshape", ["a", "wanted"], ["y"]),
    ]
    path = graph(tmp_path / "g.onnx", nodes, {"x": ("rows", 4)}, {"w": (4,)})
    model = onnx.load(str(path))
    for name, value in (("first", [0]), ("rest", [2, 2])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    path.write_bytes(model.SerializeToString())
    costs = count_graph(path, FULL)
    assert [cost.text for cost in costs] == [16, 32, 64, 128]
    assert costs[0].other_values == {"map": 2 * 48 * 4}  # 32 queries and 16 rows of text
    assert (costs[0].flops, costs[0].kernels, costs[0].weights) == (48 * 4, 1, 4)


def test_a_gelu_is_one_thing_and_others_are_told_apart(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(torch.nn.functional.layer_norm(torch.nn.functional.gelu(x), (8,)), -1).transpose(0, 1) * 2

    export_onnx(Block(), {"x": torch.zeros(5, 8)}, ["y"], tmp_path / "g.onnx")
    (cost,) = count_graph(tmp_path / "g.onnx", FULL)
    assert cost.other_values == {"gelu": 80, "norm": 80, "softmax": 80, "move": 80, "map": 80}
    assert cost.flops == 40 * (8 + 7 + 5 + 0 + 1)
    assert cost.inputs_outputs == 80
    assert graph_bytes(cost, "int8")["others"] == graph_bytes(cost, "fp32")["others"] == 4 * 400  # products alone get narrower


def test_a_size_that_no_bundle_has_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(BundleError, match="free axes"):
        count(tmp_path, [node], {"x": ("frames", 4)}, {})


def test_a_size_that_values_decide_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["y"])
    with pytest.raises(BundleError, match="only its values tell"):
        count(tmp_path, [node], {"x": (3, 4)}, {})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With cross-attention in the last layer, too."""
    return Bundle.open(random_bundle.make_bundle(tmp_path_factory.mktemp("bundle"), layers=5, memory_length=6))


def test_sizes_alone_give_the_products_of_the_exported_graphs(bundle: Bundle) -> None:
    dims = bundle.manifest.dims
    shape = QFormerShape(dims, 2 * random_bundle.HIDDEN, dims.slots + random_bundle.TIME_BUCKETS)
    for text in dims.text_buckets:
        for name, said in qformer_costs(shape, text).items():
            real = cost_of(bundle.manifest, name, text)
            assert said.products == real.products, (name, text)
            if name == MEMORY:  # its bookkeeping by slot outweighs rows as narrow as these
                continue
            assert said.flops == pytest.approx(real.flops, rel=0.1), name
            assert said.inputs_outputs == pytest.approx(real.inputs_outputs, rel=0.02), name
            assert total_bytes(said, "fp32") == pytest.approx(total_bytes(real, "fp32"), rel=0.15), name


def test_sizes_alone_give_what_the_shipped_memory_moves() -> None:
    manifest = Bundle.open("tiny").manifest
    real, said = cost_of(manifest, MEMORY), memory_cost(manifest.dims)
    assert total_bytes(said, "fp32") == pytest.approx(total_bytes(real, "fp32"), rel=0.05)
    assert said.inputs_outputs == pytest.approx(real.inputs_outputs, rel=0.01)


def test_sizes_alone_give_the_products_of_a_vision_transformer(tmp_path: Path) -> None:
    config = EvaConfig(image_size=56, width=64, heads=4, mlp=256, blocks=3)
    frames = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    axes = {"frames": {0: "batch"}, "features": {0: "batch"}}
    export_onnx(EvaVision(config), {"frames": frames}, ["features"], tmp_path / "vision.onnx", dynamic_axes=axes)
    (real,) = count_graph(tmp_path / "vision.onnx", FULL)
    said = vision_cost(VisionShape(56, 14, 64, 3, 4, 256))
    assert said.products == real.products
    assert said.weights == pytest.approx(real.weights, rel=0.02)
    assert total_bytes(said, "fp32") == pytest.approx(total_bytes(real, "fp32"), rel=0.1)


def test_at_full_size_it_is_what_the_bench_counts() -> None:
    assert product_flops(vision_cost(VisionShape())) == 2 * vision_macs() == pytest.approx(2 * 260.4e9, rel=1e-3)
    config = QFormerConfig(768, 12, 12, ffn=3072, channels=1408, queries=32, vocab=160, max_text=512, n_embd=4096)
    graphs = qformer_costs(QFormerShape(FULL, 3072), 32)
    counted = product_flops(graphs["visual_kv"]) + product_flops(graphs["step"])
    assert counted == 2 * fast_macs(config, tokens=257, text=32, slots=21)


def test_the_shipped_bundle_says_what_its_graphs_cost() -> None:
    tiny = Bundle.open("tiny")
    for name, info in tiny.manifest.graphs.items():
        assert info.costs == count_graph(tiny.graph_path(name), tiny.manifest.dims)


def test_an_older_bundle_opens_and_gets_its_costs_from_a_command(bundle: Bundle, tmp_path: Path) -> None:
    folder = random_bundle.make_bundle(tmp_path / "old")
    wanted = (folder / "manifest.json").read_bytes()
    content = json.loads(wanted)
    for info in content["graphs"].values():
        del info["costs"]
        info["flops"] = info["bytes"] = None
    (folder / "manifest.json").write_text(json.dumps(content))
    old = Bundle.open(folder)
    with pytest.raises(BundleError, match="keepsight count BUNDLE"):
        cost_of(old.manifest, "step")
    result = CliRunner().invoke(app, ["count", str(folder)])
    assert result.exit_code == 0, result.output
    assert (folder / "manifest.json").read_bytes() == wanted
    assert count_bundle(folder) == read_manifest(folder)


def test_products_are_written_and_read_alike() -> None:
    for text in ("3x4x5", "3x4x5 w", "12*32x64x257", "conv 16x12x6 w", "conv 4*9x9x2 w"):
        assert str(Product.parse(text)) == text
    with pytest.raises(ValueError, match="no shape"):
        Product.parse("3x4")
    tiny = Bundle.open("tiny").manifest
    assert sum(product.count for product in products(cost_of(tiny, "vision"))) == 49  # EfficientNet-Lite0's convolutions
