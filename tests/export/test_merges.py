"""Two variants of an encoder, one memory each: how often both merge the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from keepsight.export.merges import compare_memories
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.runtime.manifest import write_manifest
from keepsight.runtime.memory import MemoryBank

from ..random_bundle import make_bundle, random_frames

QUESTION = "what was there first?"


def other_encoder(folder: Path, noise: float) -> Bundle:
    """A bundle with a second variant, whose encoder has noise on its weights."""
    bundle = Bundle.open(make_bundle(folder))
    model = onnx.load(str(bundle.graph_path("vision")))
    rng = np.random.default_rng(3)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            noisy = (values + noise * rng.normal(size=values.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
    onnx.save(model, str(folder / "other.onnx"))
    files = {name: graph.files["fp32"] for name, graph in bundle.manifest.graphs.items()}
    graphs = {
        name: graph.model_copy(update={"files": {"fp32": files[name], "other": (files | {"vision": "other.onnx"})[name]}})
        for name, graph in bundle.manifest.graphs.items()
    }
    write_manifest(folder, bundle.manifest.model_copy(update={"graphs": graphs, "variants": ("fp32", "other")}))
    return Bundle.open(folder)


def visual_merges(bundle: Bundle, variant: str, frames: np.ndarray) -> np.ndarray:
    """A bank by hand, `[T, N]`."""
    dims = bundle.manifest.dims
    bank = MemoryBank(length=dims.memory_length, tokens=dims.tokens, channels=dims.channels)
    merges = []
    with OnnxRuntimeEngine(bundle.graph_path("vision", variant)) as vision:
        for index, frame in enumerate(frames):
            bank.append(vision.run({"frames": frame[None]})["features"][0], time_s=float(index))
            merges.append(bank.last_merge[0].copy())
    return np.stack(merges)


def test_the_share_is_that_of_equal_decisions(tmp_path: Path) -> None:
    bundle, frames = other_encoder(tmp_path, noise=0.03), random_frames(20)
    agreement = compare_memories(bundle, "other", list(frames), QUESTION)
    a, b = (visual_merges(bundle, variant, frames)[bundle.manifest.dims.slots :] for variant in ("fp32", "other"))
    assert agreement.visual == pytest.approx((a == b).mean())
    assert 0.3 < agreement.visual < 0.98
    assert agreement.query is not None and 0.1 < agreement.query < 1
    assert 0.5 < agreement.soft_prompt < 0.9999


def test_equal_encoders_agree_in_everything(tmp_path: Path) -> None:
    agreement = compare_memories(other_encoder(tmp_path, noise=0), "other", list(random_frames(12)), QUESTION)
    assert (agreement.visual, agreement.query) == (1, 1) and agreement.soft_prompt == pytest.approx(1)


def test_a_clip_that_fits_into_the_memory_merges_nothing(tmp_path: Path) -> None:
    bundle = other_encoder(tmp_path, noise=0.03)
    agreement = compare_memories(bundle, "other", list(random_frames(bundle.manifest.dims.slots)), QUESTION)
    assert (agreement.visual, agreement.query) == (None, None)
