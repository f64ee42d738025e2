"""Whole conversions: the bundle of a checkpoint, run by the runtime, says what MA-LMM over `transformers`' modules says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import Conversion, Precision, convert, language_source
from keepsight.export.eva import EvaConfig
from keepsight.runtime import Session
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.graphs.engine_store import find_engine
from keepsight.runtime.graphs.tensorrt_build import build_engines, target_of
from keepsight.runtime.qformer import QFormer, StandingQuestion
from keepsight.streams import Frame
from keepsight.streams.errors import CheckpointError, ParityError, UsageError

from ..random_bundle import random_frames
from . import hf_models, lavis_files
from .hf_malmm import HuggingFaceMALMM
from .naive_malmm import Said
from .random_llama import save_llama

SLOTS = 4
FORCED = 1e-3  # largest difference of the soft prompt while both sides merge the same pairs
FRAMES = random_frames(16, size=28)
OPTIONS = Conversion(memory_length=SLOTS)


class Watching:
    """A bundle with a standing question, frame by frame."""

    def __init__(self, path: Path, question: str = hf_models.QUESTION) -> None:
        self.bundle = Bundle.open(path)
        self.qformer = QFormer(self.bundle)
        self.prompt = self.qformer.prompt(question)
        self.standing: StandingQuestion = self.qformer.stand(self.prompt)
        self.time_s = 0.0

    def see(self, frame: np.ndarray) -> None:
        self.qformer.remember(self.qformer.encode(frame[None])[0], self.time_s)
        self.standing.step(self.time_s)
        self.time_s += 1.0

    def merges(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """What the banks merged before the newest frame, by visual token, and by layer and row that is no padding."""
        rows = self.prompt.row_mask > 0
        query = self.standing.bank.last_merge[:, rows]
        return self.qformer.bank.last_merge[0], dict(enumerate(query, start=1))


def text_ids(bundle: Bundle) -> list[int]:
    if bundle.tokenizer is None:
        return []
    ids, mask = bundle.tokenizer.encode(hf_models.QUESTION, bundle.manifest.dims.text_buckets)
    return [int(token) for token, real in zip(ids, mask, strict=True) if real]


def compare(model: Any, path: Path, *, forced: bool, image_pe: torch.Tensor | None = None) -> tuple[list[float], float]:
    """Largest difference of the soft prompt after each frame, and the share of merge decisions that agree.

    The deployed side merges before a frame what the reference merges after the one before: so each frame of the oracle is
    run when the next one's merges are known.
    """
    watching = Watching(path)
    oracle = HuggingFaceMALMM(model, text_ids(watching.bundle), length=SLOTS, image_pe=image_pe)
    differences, equal, said = [], [], []
    for frame, following in zip(FRAMES, [*FRAMES[1:], None], strict=True):
        if not differences:
            watching.see(frame)
        rows = watching.standing.answer().rows
        if following is not None:
            watching.see(following)
        visual, query = watching.merges()
        merging = following is not None and visual[0] >= 0
        choices = {"visual_merge": visual, "query_merge": query} if forced and merging else {}
        said.append(oracle.see(frame, **choices))
        differences.append(float(np.abs(rows - said[-1].soft_prompt.numpy()).max()))
        if merging:
            equal += agreement(said[-1], visual, query, watching.qformer.dims.queries)
    watching.qformer.close()
    return differences, float(np.mean(equal))


def agreement(said: Said, visual: np.ndarray, query: dict[int, np.ndarray], queries: int) -> list[bool]:
    """Decisions that agree. Layer 1's text rows are alike at every frame: whatever is merged there changes nothing."""
    assert said.visual_choice is not None
    equal = list(said.visual_choice == visual)
    for layer, rows in query.items():
        chosen = said.query_choice[layer]
        assert chosen is not None
        equal += list((chosen == rows)[: queries if layer == 1 else None])
    return [bool(value) for value in equal]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random InstructBLIP and its bundle."""
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(1)
    model = hf_models.instructblip()
    convert(load_huggingface(hf_models.save(model, folder / "hf")), folder / "bundle", OPTIONS)
    return model, folder / "bundle"


def test_with_merges_forced_the_soft_prompt_is_the_same(converted: tuple[Any, Path]) -> None:
    differences, equal = compare(*converted, forced=True)
    assert max(differences) < FORCED
    assert equal > 0.99


def test_running_free_most_merges_agree(converted: tuple[Any, Path], record_property: Any) -> None:
    differences, equal = compare(*converted, forced=False)
    record_property("largest drift", max(differences))
    print(f"free-running: {equal:.4f} of the merges agree, largest difference {max(differences):.2e}")
    assert equal > 0.97
    assert max(differences[: SLOTS + 1]) < 1e-4  # nothing has been merged yet


def test_blip2_without_text(tmp_path: Path) -> None:
    model = hf_models.blip2()
    checkpoint = load_huggingface(hf_models.save(model, tmp_path / "hf"))
    manifest = convert(checkpoint, tmp_path / "bundle", OPTIONS)
    assert manifest.dims.text_buckets == (0,) and manifest.tokenizer is None
    differences, _ = compare(model, tmp_path / "bundle", forced=True)
    assert max(differences) < FORCED


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", [hf_models.instructblip, hf_models.blip2])  # with text and without
def test_the_graphs_build_in_tensorrt(tmp_path: Path, kind: Callable[[], Any], precision: Precision) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason='TensorRT-RTX is not installed (pip install "keepsight[trt-rtx]")')
    options = replace(OPTIONS, precision=precision)
    convert(load_huggingface(hf_models.save(kind(), tmp_path / "hf")), tmp_path / "bundle", options)
    bundle, ampere = Bundle.open(tmp_path / "bundle"), target_of(rtx, 86)
    build_engines(bundle, rtx, ampere)
    for graph in bundle.manifest.graphs:
        assert find_engine(bundle, graph, ampere)


def fine_tuned(folder: Path, table: torch.Tensor) -> Any:
    """A model and its bundle with MA-LMM's `image_pe`."""
    torch.manual_seed(2)
    model = hf_models.instructblip()
    checkpoint = replace(load_huggingface(hf_models.save(model, folder / "hf")), image_pe=table)
    convert(checkpoint, folder / "bundle", OPTIONS)
    return model


def test_the_marker_of_a_fine_tuned_checkpoint_is_on_the_last_frame_alone(tmp_path: Path) -> None:
    """Offline the reference marks frame T - 1, which is the row that its training filled: the last answer is the same."""
    table = torch.zeros(120, 48)
    table[len(FRAMES) - 1] = 3 * torch.randn(48)
    model = fine_tuned(tmp_path, table)
    assert Bundle.open(tmp_path / "bundle").manifest.positions.policy == "current"
    differences, equal = compare(model, tmp_path / "bundle", forced=True, image_pe=table)
    assert differences[-1] < FORCED
    assert min(differences[:-1]) > 0.1  # ours answers with the marker after every frame, which changes the answer
    assert equal > 0.99  # and what is banked has none of it


def test_a_replay_sees_the_marker_in_its_last_step(tmp_path: Path) -> None:
    """While nothing has been merged a replay is the online loop, so the same answer comes by both ways."""
    table = torch.zeros(120, 48)
    table[9] = 3 * torch.randn(48)
    fine_tuned(tmp_path, table)
    watching = Watching(tmp_path / "bundle")
    for frame in FRAMES[: SLOTS + 1]:
        watching.see(frame)
        replayed, standing = watching.qformer.replay(watching.prompt).rows, watching.standing.answer().rows
        assert np.abs(replayed - standing).max() < 1e-4


def test_asking_does_not_change_what_is_banked(tmp_path: Path) -> None:
    table = torch.zeros(120, 48)
    table[9] = 3 * torch.randn(48)
    fine_tuned(tmp_path, table)
    asked, silent = Watching(tmp_path / "bundle"), Watching(tmp_path / "bundle")
    for frame in FRAMES:
        asked.see(frame)
        silent.see(frame)
        asked.standing.answer()
    assert np.array_equal(asked.standing.answer().rows, silent.standing.answer().rows)


def test_what_can_not_be_converted_is_said_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint = load_huggingface(hf_models.save(hf_models.instructblip(), tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=r"without the Q-Former's text tokenizer.*--tokenizer"):
        convert(replace(checkpoint, tokenizer=None), tmp_path / "bundle", OPTIONS)
    with pytest.raises(UsageError, match="remembers nothing"):
        convert(checkpoint, tmp_path / "bundle", replace(OPTIONS, memory_length=0))
    with pytest.raises(UsageError, match="0 frames per second"):
        convert(checkpoint, tmp_path / "bundle", replace(OPTIONS, sample_fps=0.0))
    with pytest.raises(UsageError, match="once"):
        convert(checkpoint, tmp_path / "bundle", replace(OPTIONS, prompt="what?"))
    written: list[str] = []
    for change, complaint in (
        ({"tokenizer": tmp_path / "absent"}, "there is no tokenizer at"),
        ({"llm": language_source(replace(checkpoint, llm_tokenizer=tmp_path), None)}, "there is no SentencePiece model at"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            convert(checkpoint, tmp_path / "bundle", replace(OPTIONS, **change), progress=lambda what, *_: written.append(what))
    assert written == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"can't be made \(Not a directory\).*--out"):
        convert(checkpoint, tmp_path / "file" / "bundle", OPTIONS)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(UsageError, match="is no bundle"):
        convert(checkpoint, tmp_path / "bundle", OPTIONS)
    assert list((tmp_path / "bundle").iterdir()) == []


def test_the_language_model_inside_goes_along(
    converted: tuple[Any, Path], vocabulary: Path, tmp_path: Path
) -> None:
    folder = hf_models.save(hf_models.instructblip(text_vocab_size=701, text_hidden_size=64), tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm-type", "Q8_0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with Session(Bundle.open(tmp_path / "bundle"), threads=1) as session:
        for index, frame in enumerate(FRAMES[:3]):
            session.see(Frame(frame, float(index), 0.0, index))
        assert session.ask(hf_models.QUESTION).result.trace.first_token_ms > 0


def test_opt_is_refused_and_its_visual_half_is_not(tmp_path: Path) -> None:
    checkpoint = load_huggingface(hf_models.save(hf_models.blip2(text_model_type="opt"), tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=r"'opt' can't be converted.*--llm none"):
        language_source(checkpoint, None)
    assert language_source(checkpoint, "none") is None
    convert(checkpoint, tmp_path / "bundle", OPTIONS)


def test_the_command(tmp_path: Path) -> None:
    folder = hf_models.save(hf_models.instructblip(), tmp_path / "hf")
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm", "none", "--memory-length", "6"]
    result = CliRunner().invoke(app, [*arguments, "--system", "malmm"])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.dims.memory_length == 6 and not bundle.has_llm and bundle.manifest.system == "malmm"
    assert bundle.manifest.provenance["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_a_file_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    folder = hf_models.save(hf_models.instructblip(), tmp_path / "hf")
    for command in (["export", str(folder), "--out", str(tmp_path / "bundle")], ["verify", "tiny", "--against", str(folder)]):
        with pytest.raises(UsageError, match=r"a visual encoder of its own.* Leave --vision out"):
            CliRunner().invoke(app, [*command, "--vision", "eva_vit_g.pth"], catch_exceptions=False)


def test_weights_that_float16_can_not_hold_are_named(tmp_path: Path) -> None:
    model = hf_models.instructblip()
    with torch.no_grad():
        model.vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] = 1e5
        model.qformer.encoder.layer[0].output_query.dense.weight[0, 0] = -1e5
    folder = hf_models.save(model, tmp_path / "hf")
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm", "none", "--precision", "fp16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    large = ["blocks.1.mlp.fc2.weight", "layers.0.query_ffn.output.weight"]
    assert f"in float32, because float16 can't hold their weights: {', '.join(large)}" in result.output
    assert Bundle.open(tmp_path / "bundle").manifest.provenance["float32"] == large


def test_ma_lmms_files_by_the_commands(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAVIS's two files, MA-LMM's checkpoint over them, a LLaMA's folder: exported, and verified against what they hold."""
    tower = EvaConfig(image_size=28, patch=7, width=48, blocks=3, heads=4, mlp=80)
    monkeypatch.setattr("keepsight.export.checkpoints.EvaConfig", lambda: tower)  # the files do not tell; else ViT-g
    sizes = {"qformer_hidden_size": 128, "qformer_num_attention_heads": 2, "qformer_num_hidden_layers": 12}
    base, tuned = (hf_models.instructblip(**sizes, text_hidden_size=96) for _ in range(2))
    image_pe = torch.zeros(100, 48)
    image_pe[99] = torch.randn(48)
    files = {
        "eva_vit_g.pth": lavis_files.tower(base),
        "trimmed.pth": {"model": lavis_files.qformer(base)},
        "checkpoint_best.pth": {"model": lavis_files.qformer(tuned) | lavis_files.rotary() | {"image_pe.weight": image_pe}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "vicuna").mkdir()
    save_llama(tmp_path / "vicuna", vocabulary, max_position_embeddings=2048)
    tokenizer = hf_models.save(base, tmp_path / "hf") / "qformer_tokenizer"
    parts = ["--vision", str(tmp_path / "eva_vit_g.pth"), "--fine-tuned", str(tmp_path / "checkpoint_best.pth")]
    options = ["--llm", str(tmp_path / "vicuna"), "--tokenizer", str(tokenizer), "--memory-length", "3"]
    export = ["export", str(tmp_path / "trimmed.pth"), *parts, "--out", str(tmp_path / "bundle"), *options]
    result = CliRunner().invoke(app, export)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.has_llm and bundle.manifest.positions.policy == "current" and bundle.manifest.dims.layers == 12
    against = ["verify", str(bundle.path), "--against", str(tmp_path / "trimmed.pth"), "--frames", "5", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*against, *parts, "--question", hf_models.QUESTION])
    assert result.exit_code == 0, result.output
    with pytest.raises(ParityError):  # without what was fine-tuned it is another model
        CliRunner().invoke(app, [*against, *parts[:2], "--question", hf_models.QUESTION], catch_exceptions=False)
