"""MA-LMM's `image_pe` with several trained rows: exported, banked, verified and traced as the reference uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keepsight.export.checkpoints import Checkpoint, load_huggingface
from keepsight.export.convert import TABLE_FILE, convert
from keepsight.export.preview import preview
from keepsight.export.verify import source_of, verify
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.evaluation import trace as recording
from keepsight.runtime.evaluation.trace_check import check_trace
from keepsight.runtime.position_table import PositionTable, position_table
from keepsight.runtime.qformer import QFormer
from keepsight.streams import Frame
from keepsight.streams.errors import BundleError, CheckpointError, UsageError

from . import hf_models
from .test_convert import FORCED, FRAMES, OPTIONS, SLOTS, Watching, compare

ROWS = len(FRAMES)  # the shortest table that is long enough


def model_with(folder: Path, table: torch.Tensor) -> tuple[Any, Checkpoint]:
    torch.manual_seed(2)
    model = hf_models.instructblip()
    return model, replace(load_huggingface(hf_models.save(model, folder / "hf")), image_pe=table)


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Large enough to change which frames look alike."""
    return 1.5 * torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, table: torch.Tensor) -> tuple[Any, Checkpoint, Path]:
    folder = tmp_path_factory.mktemp("table")
    model, checkpoint = model_with(folder, table)
    convert(checkpoint, folder / "bundle", OPTIONS)
    return model, checkpoint, folder / "bundle"


def test_after_every_frame_the_soft_prompt_is_that_of_the_reference(
    exported: tuple[Any, Checkpoint, Path], table: torch.Tensor
) -> None:
    differences, equal = compare(exported[0], exported[2], forced=True, image_pe=table)
    assert max(differences) < FORCED
    assert equal > 0.99  # decisions too: the position is in the similarity test


def test_running_free_most_merges_agree(exported: tuple[Any, Checkpoint, Path], table: torch.Tensor) -> None:
    differences, equal = compare(exported[0], exported[2], forced=False, image_pe=table)
    print(f"free-running: {equal:.4f} of the merges agree, largest difference {max(differences):.2e}")
    assert equal > 0.97 and max(differences[: SLOTS + 1]) < 1e-4


def test_positions_decide_what_is_merged(exported: tuple[Any, Checkpoint, Path], table: torch.Tensor, tmp_path: Path) -> None:
    """The same frames without the table merge otherwise, so the tests above would notice one that comes after the banks."""
    convert(replace(exported[1], image_pe=None), tmp_path / "plain", OPTIONS)
    ours, plain = Watching(exported[2]), Watching(tmp_path / "plain")
    equal = []
    for frame in FRAMES:
        ours.see(frame)
        plain.see(frame)
        equal.append(np.array_equal(ours.merges()[0], plain.merges()[0]))
    assert not all(equal)
    banked = ours.qformer.bank.in_time_order()[0][0]
    assert np.abs(banked - plain.qformer.bank.in_time_order()[0][0]).max() > 1


def test_the_rows_are_a_file_of_the_bundle_that_the_manifest_vouches_for(
    exported: tuple[Any, Checkpoint, Path], table: torch.Tensor, tmp_path: Path
) -> None:
    _, checkpoint, path = exported
    manifest = Bundle.open(path).manifest
    assert manifest.positions.policy == "table" and manifest.dims.position_buckets == 1
    stored = position_table(Bundle.open(path))
    assert stored is not None and np.array_equal(stored.rows, table.numpy())
    assert TABLE_FILE in manifest.files and manifest.referenced_files() >= {TABLE_FILE}
    said = {file.name: file.bytes for file in preview(checkpoint, tmp_path / "other", OPTIONS).files}
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert said.keys() == sizes.keys() and said[TABLE_FILE] == sizes[TABLE_FILE] == 4 * ROWS * 48


def test_a_table_with_one_row_is_a_marker_still(tmp_path: Path) -> None:
    rows = torch.zeros(ROWS, 48)
    rows[3] = 1.0
    _, checkpoint = model_with(tmp_path, rows)
    manifest = convert(checkpoint, tmp_path / "bundle", OPTIONS)
    assert manifest.positions.policy == "current" and TABLE_FILE not in manifest.files


def test_a_frame_beyond_the_table_is_refused_and_changes_nothing(exported: tuple[Any, Checkpoint, Path]) -> None:
    watching = Watching(exported[2])
    for frame in FRAMES:
        watching.see(frame)
    said = watching.standing.answer().rows
    with pytest.raises(UsageError, match=rf"frame {ROWS} is beyond .* {ROWS} frames.*--when.*--sample-fps"):
        watching.see(FRAMES[0])
    assert watching.qformer.bank.frames_seen == ROWS
    assert np.array_equal(watching.standing.answer().rows, said)
    watching.qformer.bank.reset()
    watching.see(FRAMES[0])  # another stream starts at the first row


def test_a_replay_equals_the_online_loop_while_nothing_has_merged(exported: tuple[Any, Checkpoint, Path]) -> None:
    watching = Watching(exported[2])
    for frame in FRAMES[: SLOTS + 1]:
        watching.see(frame)
        replayed, standing = watching.qformer.replay(watching.prompt).rows, watching.standing.answer().rows
        assert np.abs(replayed - standing).max() < 1e-4


def test_it_is_verified_and_a_changed_row_is_named(exported: tuple[Any, Checkpoint, Path], tmp_path: Path) -> None:
    _, checkpoint, path = exported
    arguments = {"questions": [hf_models.QUESTION], "clip": "some frames"}
    report = verify(Bundle.open(path), source_of(Bundle.open(path), checkpoint), FRAMES[:9], **arguments)
    assert report.passed and "positions" in report.graphs
    changed = source_of(Bundle.open(path), replace(checkpoint, image_pe=_with_one_more(checkpoint)))
    report = verify(Bundle.open(path), changed, FRAMES[:9], **arguments)
    assert any(line.startswith("positions: rows differs") for line in report.failures)
    assert not any(line.startswith("step") for line in report.failures)
    with pytest.raises(CheckpointError, match="has positions"):
        verify(Bundle.open(path), source_of(Bundle.open(path), replace(checkpoint, image_pe=None)), FRAMES[:2], **arguments)


def _with_one_more(checkpoint: Checkpoint) -> torch.Tensor:
    assert checkpoint.image_pe is not None
    table = checkpoint.image_pe.clone()
    table[2, 5] += 1
    return table


def test_verify_takes_no_more_frames_than_the_table_has(exported: tuple[Any, Checkpoint, Path], tmp_path: Path) -> None:
    """By default it takes five memory lengths: 20 frames here, where the table has 16 rows."""
    from keepsight.export.cli import _pictures

    assert len(_pictures(Bundle.open(exported[2]), None, None)[0]) == ROWS < 5 * SLOTS


def test_a_trace_has_features_before_positions_and_is_repeated(exported: tuple[Any, Checkpoint, Path]) -> None:
    bundle = Bundle.open(exported[2])
    frames = [Frame(image, float(index), 0.0, index) for index, image in enumerate(FRAMES)]
    trace = recording.record(QFormer(bundle), frames, hf_models.QUESTION)
    plain = np.asarray(QFormer(bundle).encode(FRAMES[3][None])[0])
    assert np.array_equal(trace["features"][3], plain)
    assert check_trace(bundle, trace, against="trace.npz").passed


def test_the_command_says_which_policy_it_exported(exported: tuple[Any, Checkpoint, Path], tmp_path: Path) -> None:
    from . import lavis_files

    torch.manual_seed(4)
    model = hf_models.instructblip()
    folder = hf_models.save(model, tmp_path / "hf")
    state = lavis_files.qformer(model) | {"image_pe.weight": torch.randn(120, 48)}
    (tmp_path / "tuned").mkdir()
    torch.save({"model": state}, tmp_path / "tuned" / "checkpoint_best.pth")
    arguments = ["export", str(folder), "--fine-tuned", str(tmp_path / "tuned" / "checkpoint_best.pth"), "--llm", "none"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "bundle"), "--memory-length", "4"])
    assert result.exit_code == 0, result.output
    assert "positions 'table'" in result.stdout
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "bundle"), "--json"]).stdout)
    assert shown["manifest"]["positions"] == {"policy": "table", "file": TABLE_FILE, "frames": 120}


def test_a_damaged_table_is_refused(exported: tuple[Any, Checkpoint, Path]) -> None:
    opened = Bundle.open(exported[2])
    positions = opened.manifest.positions.model_copy(update={"frames": ROWS + 1})
    longer = Bundle(opened.path, opened.manifest.model_copy(update={"positions": positions}))
    with pytest.raises(BundleError, match=f"not {ROWS + 1} rows of 48"):
        position_table(longer)
    gone = Bundle(opened.path / "nowhere", opened.manifest)
    with pytest.raises(BundleError, match="can't be read"):
        position_table(gone)


def test_each_frame_gets_its_own_row() -> None:
    table = PositionTable(np.arange(6, dtype=np.float32).reshape(3, 2))
    features = np.ones((4, 2), np.float32)
    assert np.array_equal(table.added(features, 1), np.tile(np.float32([3, 4]), (4, 1)))
    assert np.array_equal(features, np.ones((4, 2)))  # the encoder's own array is left alone
