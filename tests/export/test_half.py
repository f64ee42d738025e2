"""Half precision: matrix products in float16, the rest in float32, every type explicit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import Conversion, convert
from keepsight.export.half import HEAVY
from keepsight.export.onnxfile import export_onnx
from keepsight.export.verify import source_of, verify
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.clips import synthetic_clip

from . import hf_models


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(7)
    checkpoint = load_huggingface(hf_models.save(hf_models.instructblip(), folder / "hf"))
    convert(checkpoint, folder / "fp16", Conversion(memory_length=3, precision="fp16"))
    convert(checkpoint, folder / "fp32", Conversion(memory_length=3))
    return checkpoint, folder


def types_of(path: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The graph and the element type of each of its tensors, as strict inference finds them."""
    model = onnx.load(str(path))
    typed = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*typed.value_info, *typed.input, *typed.output]}
    return model, kinds | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("graph", ["vision", "visual_kv", "prompt", "step", "answer", "replay"])
def test_products_are_half_and_norms_are_not(bundle: tuple[Any, Path], graph: str) -> None:
    model, kinds = types_of(bundle[1] / "fp16" / f"{graph}.onnx")
    heavy = [node for node in model.graph.node if node.op_type in HEAVY]
    assert heavy and all(kinds[node.input[0]] == kinds[node.input[1]] == TensorProto.FLOAT16 for node in heavy)
    single = [node for node in model.graph.node if node.op_type in ("LayerNormalization", "Softmax", "Erf")]
    assert all(kinds[node.input[0]] == TensorProto.FLOAT for node in single)
    matrices = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1 and np.prod(tensor.dims) > 2000]
    embeddings = [name for node in model.graph.node if node.op_type == "Gather" for name in node.input]
    assert all(t.data_type == TensorProto.FLOAT16 for t in matrices if t.name not in embeddings)
    for value in [*model.graph.input, *model.graph.output]:
        assert value.type.tensor_type.elem_type != TensorProto.FLOAT16  # the contract's types stay


def test_it_is_half_the_size(bundle: tuple[Any, Path]) -> None:
    sizes = {name: (bundle[1] / name / "vision.weights").stat().st_size for name in ("fp16", "fp32")}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


def test_it_says_nearly_the_same(bundle: tuple[Any, Path]) -> None:
    checkpoint, folder = bundle
    opened = Bundle.open(folder / "fp16")
    report = verify(opened, source_of(opened, checkpoint), synthetic_clip(12, 28), [hf_models.QUESTION], clip="12 frames")
    print({name: {o: f"{d.largest:.1e}" for o, d in graph.outputs.items()} for name, graph in report.graphs.items()})
    print([(row.frames, f"{row.forced.largest:.1e}", f"{row.free.largest:.1e}") for row in report.drift], report.merges)
    assert report.passed, report.failures


class Large(torch.nn.Module):
    """One matrix that float16 can't hold, and one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        with torch.no_grad():
            self.large.weight[0, 0] = 1e5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(torch.tanh(self.large(x)))


def test_a_weight_that_overflows_stays_single(tmp_path: Path) -> None:
    module, x = Large(), torch.randn(3, 4, 8)
    export_onnx(module, {"x": x}, ["y"], tmp_path / "large.onnx", half_compute=True)
    model, _ = types_of(tmp_path / "large.onnx")
    matrices = sorted(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2)
    assert matrices == [TensorProto.FLOAT, TensorProto.FLOAT16]
    session = onnxruntime.InferenceSession(tmp_path / "large.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert np.abs(session.run(None, {"x": x.numpy()})[0] - module(x).numpy()).max() < 2e-2
