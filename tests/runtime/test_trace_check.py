"""A bundle against a golden trace: the same machine agrees with itself, and what differs is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.evaluation.trace_check import check_trace, read_trace
from keepsight.runtime.memory import MemoryBank
from keepsight.streams.errors import ParityError, UsageError

from ..random_bundle import make_bundle, random_frames

COUNT = 14  # M = 4


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random `bundle`, `frames.npy`, and the `trace.npz` that the command writes of them."""
    folder = tmp_path_factory.mktemp("traced")
    make_bundle(folder / "bundle")
    np.save(folder / "frames.npy", random_frames(COUNT))
    arguments = ["trace", str(folder / "bundle"), str(folder / "frames.npy"), "--question", "what was there first?"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(folder / "trace.npz")])
    assert result.exit_code == 0, result.output
    return folder


def test_the_command_passes_against_its_own_trace(traced: Path, tmp_path: Path) -> None:
    arguments = ["verify", str(traced / "bundle"), "--against", str(traced / "trace.npz"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--clip", str(traced / "frames.npy")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "parity.html").exists() and "vision: features" in result.output


def test_the_same_bundle_gives_the_same_to_the_bit(traced: Path) -> None:
    report = check_trace(Bundle.open(traced / "bundle"), read_trace(traced / "trace.npz"), against="trace.npz")
    assert [row.frames for row in report.drift] == [1, 4, 8, 14]
    assert all(row.forced.largest == row.free.largest == 0 for row in report.drift)
    assert report.merges == {"visual": 1.0, "query": 1.0}


def test_other_weights_fail(traced: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "other", seed=1)
    result = CliRunner().invoke(
        app, ["verify", str(bundle), "--against", str(traced / "trace.npz"), "--out", str(tmp_path)]
    )
    assert isinstance(result.exception, ParityError)


def test_a_decision_that_the_soft_prompts_do_not_come_from_is_found(traced: Path) -> None:
    bundle, trace = Bundle.open(traced / "bundle"), read_trace(traced / "trace.npz")
    changed = trace["visual_merge"].copy()
    changed[6, 0] = (changed[6, 0] + 1) % 4
    report = check_trace(bundle, {**trace, "visual_merge": changed}, against="changed")
    assert report.merges["visual"] < 1.0
    assert not report.passed


def test_a_trace_that_does_not_fit_is_refused(traced: Path, tmp_path: Path) -> None:
    trace = read_trace(traced / "trace.npz")
    with pytest.raises(UsageError, match="not of keepsight-tiny"):
        check_trace(Bundle.open("tiny"), trace, against="trace.npz")
    np.savez(tmp_path / "old.npz", times=trace["times"])
    with pytest.raises(UsageError, match="has no features, query_merge"):
        read_trace(tmp_path / "old.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UsageError, match="not a readable trace"):
        read_trace(tmp_path / "text.npz")


def test_a_forced_merge_is_the_one_that_is_made() -> None:
    rng = np.random.default_rng(0)
    bank = MemoryBank(length=3, tokens=2, channels=5)
    for moment in range(4):
        bank.append(rng.normal(size=(2, 5)).astype(np.float32), time_s=float(moment))
    for pair in ([[3, 0]], [[-1, 0]], [[0]]):
        with pytest.raises(UsageError, match="a forced merge must name one of 3 pairs"):
            bank.settle(pair)
    before = bank.in_time_order()[0][0].copy()
    bank.settle([[2, 0]])
    after, sizes = bank.in_time_order()
    assert bank.last_merge.tolist() == [[2, 0]] and sizes[0, :, 0].tolist() == [1, 1, 2] and sizes[0, :, 1].tolist() == [2, 1, 1]
    assert np.allclose(after[0, 2, 0], (before[2, 0] + before[3, 0]) / 2, atol=1e-6)
    assert np.allclose(after[0, 0, 1], (before[0, 1] + before[1, 1]) / 2, atol=1e-6)
