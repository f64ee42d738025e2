"""`keepsight verify`: a bundle passes against what it was made from, and a changed weight is found and named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import Conversion, convert
from keepsight.export.plainloop import PlainLoop
from keepsight.export.verify import source_of, verify
from keepsight.export.weights import load_qformer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.clips import synthetic_clip
from keepsight.runtime.evaluation.parity import difference
from keepsight.runtime.qformer import QFormer
from keepsight.streams.errors import CheckpointError, ParityError, UsageError

from ..random_bundle import make_bundle, random_frames
from . import hf_models
from .naive_malmm import NaiveMALMM

FRAMES = 13  # M = 10, so three merges
VERIFY_TINY = ["--frames", str(FRAMES), "--question", "what was there first?"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the shipped bundle, to be damaged."""
    return Path(shutil.copytree(Bundle.open("tiny").path, tmp_path / "keepsight-tiny"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


def change_weight(path: Path, index: int) -> str:
    """Change the `index`-th weight that is stored inside the graph; returns the node that reads it."""
    model = onnx.load(str(path), load_external_data=False)
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL and len(t.dims) > 0]
    stored = [t for t in inside if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and np.prod(t.dims) > 8]
    tensor = stored[index]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())
    name = tensor.name.removesuffix(".half")
    return next(node.name for node in model.graph.node if name in node.input)


def test_the_shipped_bundle_passes(tmp_path: Path) -> None:
    result = run("tiny", *VERIFY_TINY, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["passed"] and set(report["graphs"]) == {"vision", "visual_kv", "prompt", "step", "answer", "replay"}
    assert [row["frames"] for row in report["drift"]] == [1, 10, 13]
    assert report["merges"]["visual"] > 0.99 and report["language"]["agreement"] == 1.0
    HTMLParser().feed((tmp_path / "parity.html").read_text())


@pytest.mark.parametrize(("graph", "index"), [("vision", 3), ("vision", -1), ("step", 2), ("replay", 5)])
def test_a_changed_weight_is_named_by_its_node(tiny: Path, graph: str, index: int, tmp_path: Path) -> None:
    node = change_weight(tiny / f"{graph}.onnx", index)
    result = run(str(tiny), *VERIFY_TINY, "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, ParityError)
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    shown = report["graphs"][graph]["first_difference"]
    assert shown["node"] == node if index >= 0 else shown is None  # a channel of the last layer that is never active
    assert [weight["node"] for weight in report["graphs"][graph]["changed_weights"]] == [node]
    assert any(line.startswith(f"{graph}:") and node in line for line in report["failures"])
    for name in report["graphs"].keys() - {graph}:
        assert report["graphs"][name]["first_difference"] is None and not report["graphs"][name]["changed_weights"]


@pytest.mark.parametrize("questions", [[""], [" \n"], ["what was there first?", ""]])
def test_an_empty_question_is_refused(questions: list[str], tmp_path: Path) -> None:
    result = run("tiny", *(f"--question={text}" for text in questions), "--out", str(tmp_path))
    assert isinstance(result.exception, UsageError) and "A question is empty" in str(result.exception)
    assert not list(tmp_path.iterdir())
    bundle, size = Bundle.open("tiny"), Bundle.open("tiny").manifest.dims.image_size
    with pytest.raises(UsageError) as caught:
        verify(bundle, source_of(bundle, None), np.zeros((1, size, size, 3), np.uint8), questions, clip="none")
    assert str(caught.value) == str(result.exception)


def test_parity_has_an_exit_code_of_its_own() -> None:
    assert (ParityError.exit_code, ParityError.kind) == (14, "parity")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random InstructBLIP `hf` and its `bundle`."""
    folder = tmp_path_factory.mktemp("verified")
    torch.manual_seed(5)
    checkpoint = load_huggingface(hf_models.save(hf_models.instructblip(), folder / "hf"))
    convert(checkpoint, folder / "bundle", Conversion(memory_length=3))
    return folder


def test_a_converted_checkpoint_passes_against_itself(converted: Path, tmp_path: Path) -> None:
    arguments = [str(converted / "bundle"), "--against", str(converted / "hf"), "--out", str(tmp_path)]
    result = run(*arguments, "--question", hf_models.QUESTION)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "parity.json").read_text())
    assert [row["frames"] for row in report["drift"]] == [1, 3, 6, 15] and report["language"] is None


def test_and_fails_against_another(converted: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    other = hf_models.save(hf_models.instructblip(), tmp_path / "hf")
    bundle = Bundle.open(converted / "bundle")
    source = source_of(bundle, load_huggingface(other))
    report = verify(bundle, source, synthetic_clip(6, 28), [hf_models.QUESTION], clip="six frames")
    assert not report.passed and not report.graphs["vision"].passed
    assert report.graphs["vision"].first_difference is not None


def test_a_checkpoint_of_other_dimensions_is_refused(converted: Path, tmp_path: Path) -> None:
    """Before anything is compared: tensors of other shapes can't be."""
    wider = hf_models.save(hf_models.instructblip(text_hidden_size=64, num_query_tokens=6), tmp_path / "wider")
    without_text = hf_models.save(hf_models.blip2(), tmp_path / "blip2")
    for other, complaint in ((wider, "queries 6 instead of 5, n_embd 64 instead of 40"), (without_text, r"text_buckets \(0,\)")):
        with pytest.raises(CheckpointError, match=rf"bundle was not made from .*, which has {complaint}.*--against CHECKPOINT"):
            source_of(Bundle.open(converted / "bundle"), load_huggingface(other))


@pytest.mark.parametrize("command", ["verify", "quantize"])
def test_a_number_of_frames_is_at_least_one(converted: Path, command: str) -> None:
    for frames in ("0", "-3"):
        arguments = [command, str(converted / "bundle"), "--frames", frames]
        result = CliRunner().invoke(app, [*arguments, *(["--calibrate", "x"] if command == "quantize" else [])])
        assert result.exit_code == 2 and "--frames" in result.output


def test_a_marker_is_verified_too(converted: Path, tmp_path: Path) -> None:
    table = torch.zeros(120, 48)
    table[7] = 3 * torch.randn(48)
    checkpoint = replace(load_huggingface(converted / "hf"), image_pe=table)
    convert(checkpoint, tmp_path / "bundle", Conversion(memory_length=3))
    bundle = Bundle.open(tmp_path / "bundle")
    frames, questions = synthetic_clip(9, 28), [hf_models.QUESTION]
    assert verify(bundle, source_of(bundle, checkpoint), frames, questions, clip="nine frames").passed
    unmarked = source_of(bundle, load_huggingface(converted / "hf"))
    assert not verify(bundle, unmarked, frames, questions, clip="nine frames").passed


def test_what_it_was_made_from_must_be_named(converted: Path) -> None:
    with pytest.raises(CheckpointError, match="--against CHECKPOINT"):
        source_of(Bundle.open(converted / "bundle"), None)
    bundle = Bundle.open("tiny")
    with pytest.raises(UsageError, match="at least one frame"):
        verify(bundle, source_of(bundle, None), synthetic_clip(1, 224)[:0], ["what?"], clip="nothing")


@pytest.mark.parametrize("layers", [4, 5])
def test_the_plain_loop_is_ma_lmm_as_it_is_written(layers: int, tmp_path: Path) -> None:
    """Against the slow reference, row by row and head by head in float64, positions and free-running merges included."""
    bundle = Bundle.open(make_bundle(tmp_path, layers=layers))
    module, ids = load_qformer(bundle.path), [4, 7, 1, 30]
    plain = PlainLoop(module, bundle.manifest, ids)
    slow = NaiveMALMM(module, ids, length=bundle.manifest.dims.memory_length)
    deployed = QFormer(bundle)
    times = np.cumsum(np.random.default_rng(3).uniform(0.1, 0.9, 15))
    tokens = bundle.manifest.dims.tokens
    for frame, time_s in zip(random_frames(15), times, strict=True):
        features = deployed.encode(frame[None])[0]
        moment = np.full(tokens, time_s)
        ours, theirs = plain.see(features, time_s), slow.see(features, moment, moment)
        assert (ours.soft_prompt - theirs.soft_prompt).abs().max() < 1e-4
        if theirs.visual_choice is None:
            assert ours.visual_choice is None
        else:
            assert np.array_equal(ours.visual_choice, theirs.visual_choice)


def test_a_difference_is_in_units_of_the_spread_and_nan_fails() -> None:
    reference = np.array([0.0, 100.0, -100.0])
    apart = difference(reference + np.array([0, 0, 8.16496580927726]), reference, 0.2)
    assert apart.largest == pytest.approx(0.1) and apart.passed
    assert not difference(np.array([np.nan, 1.0]), np.array([0.0, 1.0]), 1.0).passed
    assert difference(np.zeros(3), np.zeros(3), 0.0).cosine == 1.0
    with pytest.raises(UsageError, match="can't be compared"):
        difference(np.zeros(3), np.zeros(4), 1.0)
