"""A streamed export: the same graph as the plain one's, weights read one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.streamed import export_streamed, hollow
from keepsight.export.tensorfiles import StoredTensor

CONFIG = EvaConfig(image_size=28, patch=7, width=48, blocks=3, heads=4, mlp=80)
FRAMES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8))


def random_vision() -> EvaVision:
    torch.manual_seed(0)
    vision = EvaVision(CONFIG).eval()
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vision


def export(vision: EvaVision, path: Path) -> list[tuple[int, int]]:
    """Write it, and what the progress was told."""
    told: list[tuple[int, int]] = []
    weights = {name: StoredTensor(tuple(p.shape), p.detach) for name, p in vision.named_parameters()}
    axes = {"frames": {0: "batch"}, "features": {0: "batch"}}
    export_streamed(
        lambda: EvaVision(CONFIG), weights, {"frames": FRAMES[:1]}, ["features"], path, dynamic_axes=axes,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    return told


def test_the_graph_says_what_the_module_says(tmp_path: Path) -> None:
    vision = random_vision()
    told = export(vision, tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    [features] = session.run(None, {"frames": FRAMES.numpy()})
    with torch.no_grad():
        assert np.abs(vision(FRAMES).numpy() - features).max() < 1e-4
    assert told == [(n + 1, len(told)) for n in range(len(told))]


def test_weights_are_stored_once_beside_a_small_graph(tmp_path: Path) -> None:
    vision = random_vision()
    export(vision, tmp_path / "vision.onnx")
    weights = 4 * sum(parameter.numel() for parameter in vision.parameters())
    stored = (tmp_path / "vision.weights").stat().st_size
    assert weights <= stored < weights + 64 * len(list(vision.parameters()))
    assert (tmp_path / "vision.onnx").stat().st_size < weights / 4


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(random_vision(), tmp_path / name / "vision.onnx")
    for file in ("vision.onnx", "vision.weights"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_of_another_module_are_refused(tmp_path: Path) -> None:
    weights = {"cls_token": StoredTensor((1, 1, 48), lambda: torch.zeros(1, 1, 48))}
    with pytest.raises(ValueError, match="not those of the module"):
        export_streamed(lambda: EvaVision(CONFIG), weights, {"frames": FRAMES}, ["features"], tmp_path / "vision.onnx")


def test_a_hollow_vit_g_takes_no_memory() -> None:
    vision = hollow(lambda: EvaVision(EvaConfig()))
    assert sum(parameter.numel() for parameter in vision.parameters()) > 985e6
    assert sum(parameter.untyped_storage().nbytes() for parameter in vision.parameters()) < 4096
