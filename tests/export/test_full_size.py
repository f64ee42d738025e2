"""Figures of full size in docs/full-size.json, made by scripts/full-size: the predictions agree, and so does docs/export.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepsight.export.checkpoints import Checkpoint, module_shapes
from keepsight.export.convert import Conversion, Precision
from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.preview import preview
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.tensorfiles import StoredTensor
from keepsight.runtime.footprint import engines
from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.runtime.language.gguf_sizes import file_bytes

from ..runtime.test_gguf_sizes import MODELS, shapes_of
from . import hf_models

ROOT = Path(__file__).parents[2]
FIGURES: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "full-size.json").read_text())
QFORMER = QFormerConfig(
    hidden=768, layers=12, heads=12, ffn=3072, channels=1408, queries=32, vocab=30523, max_text=512, n_embd=4096
)  # fmt: skip


def unread(shapes: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(shape, lambda: pytest.fail("a weight was read")) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def instructblip(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """InstructBLIP's visual half, by its shapes alone."""
    folder = hf_models.save(hf_models.instructblip(), tmp_path_factory.mktemp("tokenizer"))
    vision = EvaConfig()
    return Checkpoint(
        name="instructblip",
        vision=vision,
        qformer=QFORMER,
        vision_tensors=unread(module_shapes(EvaVision, vision)),
        qformer_tensors=unread(module_shapes(QFormer, QFORMER)),
        tokenizer=folder / "qformer_tokenizer",
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_visual_half_has_the_size_that_is_said(precision: Precision, instructblip: Checkpoint, tmp_path: Path) -> None:
    real = FIGURES[f"visual half, {precision}"]
    said = preview(instructblip, tmp_path / "bundle", Conversion(precision=precision))
    sizes = {file.name: file.bytes for file in said.files}
    assert sizes["vision.weights"] == real["files"]["vision.weights"]
    assert sum(sizes.values()) == pytest.approx(sum(real["files"].values()), rel=0.01)
    assert said.weights == pytest.approx(real["weights"], rel=0.01)


def test_engines_have_the_size_that_is_said(instructblip: Checkpoint, tmp_path: Path) -> None:
    said = preview(instructblip, tmp_path / "bundle", Conversion(precision="fp16"))
    vision, qformer, *_ = engines(said.manifest.dims, said.weights)
    for target in ("sm86", "sm120"):
        real = dict(FIGURES[f"engines, fp16, {target}"]["files"])
        assert vision.bytes == pytest.approx(real.pop("vision.engine"), rel=0.01)
        assert qformer.bytes == pytest.approx(sum(real.values()), rel=0.01)


@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize(("model", "shape"), [("LLaMA 7B", "7B"), ("LLaMA 1.1B", "1.1B, grouped keys")])
def test_a_language_model_has_the_size_that_is_said(model: str, shape: str, kind: str) -> None:
    *_, heads, keys, _tied = MODELS[shape]
    real = FIGURES[f"{model}, {kind}"]["files"][f"{kind}.gguf"]
    said = file_bytes(shapes_of(*MODELS[shape]), kind, head_bytes=0, grouping=heads // keys)
    assert said == pytest.approx(real, rel=0.01)
    assert 0 < real - said < 2**20  # the vocabulary


def test_a_7b_model_was_converted_in_less_than_4_gb() -> None:
    assert FIGURES["LLaMA 7B, F16"]["files"]["F16.gguf"] > 13e9
    assert FIGURES["LLaMA 7B, F16"]["peak_bytes"] < 4e9


def test_the_page_on_export_shows_what_fits() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fit-table")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") > 10
    assert printed in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
