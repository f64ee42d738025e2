"""`keepsight export --dry-run`: it says the size of what an export then really writes, and refuses what an export refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from keepsight.export.checkpoints import Checkpoint, load_huggingface
from keepsight.export.convert import Conversion, Precision, convert, language_source
from keepsight.export.graphs import GRAPHS, example_inputs
from keepsight.export.preview import preview
from keepsight.export.qformer import QFormer
from keepsight.runtime.boards import Board, board
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.footprint import fit, graph_tensors
from keepsight.runtime.graphs.onnx_weights import weight_bytes
from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.streams.errors import KeepsightError

from . import hf_models
from .test_llama_gguf import save_llama

# Wide enough that weights, and not the graphs' text, are most of a bundle.
WIDE = {
    "vision_hidden_size": 256, "vision_intermediate_size": 1100, "qformer_hidden_size": 128, "qformer_intermediate_size": 1200,
    "qformer_encoder_hidden_size": 256, "qformer_vocab_size": 3000,
}  # fmt: skip


def checkpoint(folder: Path, kind: Callable[..., Any] = hf_models.instructblip, **changes: Any) -> Checkpoint:
    torch.manual_seed(3)
    return load_huggingface(hf_models.save(kind(**changes), folder / "hf"))


def written(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", [hf_models.instructblip, hf_models.blip2])  # with text and without
def test_every_file_has_the_size_that_was_said(kind: Callable[..., Any], precision: Precision, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, kind, **WIDE)
    options = Conversion(memory_length=4, precision=precision)
    said = preview(model, tmp_path / "bundle", options)
    convert(model, tmp_path / "bundle", options)
    sizes = written(tmp_path / "bundle")
    assert {file.name for file in said.files} == sizes.keys()
    for file in said.files:
        tolerance = 0 if file.basis == "exact" else 1e-4 if file.name.endswith(".weights") else 0.2
        assert file.bytes == pytest.approx(sizes[file.name], rel=tolerance), file.name
    assert said.total_bytes == pytest.approx(sum(sizes.values()), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_reads_the_weights_that_were_said(precision: Precision, tmp_path: Path) -> None:
    model = replace(checkpoint(tmp_path, **WIDE), image_pe=torch.eye(120, 256)[7:8])
    options = Conversion(memory_length=4, precision=precision)
    said = preview(model, tmp_path / "bundle", options).weights
    convert(model, tmp_path / "bundle", options)
    bundle = Bundle.open(tmp_path / "bundle")
    found = {name: weight_bytes(bundle.graph_path(name)) for name in bundle.manifest.graphs}
    assert found.pop("memory") < 2000  # constants
    assert found == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize("llm_type", ["F16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_the_language_model_has_the_size_that_was_said(llm_type: str, vocabulary: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama", vocabulary, hidden_size=256)
    model = checkpoint(tmp_path, text_hidden_size=256)
    options = Conversion(memory_length=4, llm=language_source(model, str(tmp_path / "llama")), llm_type=llm_type)
    said = {file.name: file.bytes for file in preview(model, tmp_path / "bundle", options).files}
    convert(model, tmp_path / "bundle", options)
    sizes = written(tmp_path / "bundle")
    assert said["llm.gguf"] == sizes["llm.gguf"]
    assert said["manifest.json"] == pytest.approx(sizes["manifest.json"], rel=0.05)
    # The finished file, taken as it is, is described alike.
    again = preview(model, tmp_path / "other", replace(options, llm=tmp_path / "bundle" / "llm.gguf")).llm
    converted = preview(model, tmp_path / "other", options).llm
    assert again is not None and converted is not None
    assert (again.bytes, again.shape) == (sizes["llm.gguf"], converted.shape)


def test_the_shapes_on_a_device_are_those_of_the_graphs(tmp_path: Path) -> None:
    for kind in (hf_models.instructblip, hf_models.blip2):
        model = checkpoint(tmp_path / kind.__name__, kind, qformer_num_hidden_layers=5)  # the last layer reads the frame, too
        dims = preview(model, tmp_path / "bundle", Conversion(memory_length=4)).manifest.dims
        qformer = QFormer(model.qformer)
        inputs = example_inputs(qformer, slots=5, tokens=dims.tokens, text=dims.text_buckets[-1])
        said = graph_tensors(dims)
        for graph, (build, outputs) in GRAPHS.items():
            found = build(qformer)(*inputs[graph].values())
            tensors = {**inputs[graph], **dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))}
            assert said[graph] == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_nothing_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_models.save(hf_models.instructblip(), tmp_path / "hf")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("keepsight.export.tensorfiles._reading", lambda path, key: lambda: pytest.fail(f"{key} was read"))
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm", "none", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Nothing was written" in result.output and "vision.weights" in result.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_as_json_it_says_the_same(vocabulary: Path, tmp_path: Path) -> None:
    folder = hf_models.save(hf_models.instructblip(text_vocab_size=701, text_hidden_size=64), tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm-type", "Q8_0", "--dry-run", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["total_bytes"] == sum(file["bytes"] for file in said["files"])
    assert said["memory_bytes"] == sum(part["bytes"] for part in said["memory"])
    assert said["language_model"]["kind"] == "Q8_0" and said["precision"] == "fp32"
    assert all(found["fits"] and found["change"] is None for found in said["boards"])
    assert not (tmp_path / "bundle").exists()


def spoiled(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    hf_models.save(hf_models.instructblip(), folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("query_tokens"), "missing: query_tokens"),
        (lambda tensors: tensors.update(surprise=torch.zeros(3)), "surprise"),
        (lambda tensors: tensors.update(query_tokens=torch.zeros(1, 5, 63)), r"query_tokens \[1, 5, 63\] instead of"),
    ],
    ids=["a missing key", "an unexpected key", "a wrong shape"],
)
def test_a_bad_checkpoint_fails_as_in_the_export(change: Any, complaint: str, tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "hf", change)
    arguments = ["export", str(folder), "--out", str(tmp_path / "bundle"), "--llm", "none"]
    export, dry = (CliRunner().invoke(app, [*arguments, *more]) for more in ([], ["--dry-run"]))
    assert export.exception is not None and dry.exception is not None
    assert type(export.exception) is type(dry.exception) and str(export.exception) == str(dry.exception)
    assert export.exit_code == dry.exit_code
    assert re.search(complaint, str(dry.exception))


def test_options_that_make_no_sense_are_refused_alike(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    for source, options in (
        (model, Conversion(memory_length=0)),
        (model, Conversion(prompt="what?")),
        (model, Conversion(llm_type="Q1")),
    ):
        with pytest.raises(KeepsightError) as export:
            convert(source, tmp_path / "bundle", options)
        with pytest.raises(type(export.value)) as dry:
            preview(source, tmp_path / "bundle", options)
        assert str(dry.value) == str(export.value)


def test_what_to_change_is_what_makes_it_fit(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board whose memory is exactly what one of the ways takes: the first of them, and nothing more, is named."""
    save_llama(tmp_path / "llama", vocabulary, hidden_size=256)
    model = checkpoint(tmp_path, text_hidden_size=256)
    full = Conversion(memory_length=20, llm=language_source(model, str(tmp_path / "llama")))
    small = board("orin-nano-8gb-super")

    def total(options: Conversion) -> int:
        return preview(model, tmp_path / "bundle", options).footprint.total

    def just_enough_for(options: Conversion) -> Board:
        value = total(options) + small.os_bytes.value
        return small.model_copy(update={"total_bytes": small.total_bytes.model_copy(update={"value": value})})

    def change(target: Board) -> str:
        monkeypatch.setattr("keepsight.export.preview.boards", lambda: (target,))
        return preview(model, tmp_path / "bundle", full).changes[small.name]

    half = replace(full, precision="fp16")
    assert change(just_enough_for(half)) == "--precision fp16"
    assert change(just_enough_for(replace(half, llm_type="Q8_0"))) == "--precision fp16 --llm-type Q8_0"
    smallest = min(QUANTISATIONS, key=lambda kind: total(replace(half, llm_type=kind)))
    assert "--memory-length 10" in change(just_enough_for(replace(half, llm_type=smallest, memory_length=10)))
    nothing = small.model_copy(update={"total_bytes": small.os_bytes})
    assert change(nothing) == "a smaller language model, or a larger board"
    assert fit(preview(model, tmp_path / "bundle", half).footprint, just_enough_for(half)).free_bytes == 0
