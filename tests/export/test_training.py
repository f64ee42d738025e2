"""Training is seeded and resumes where it stopped; the last fit is the least squares that it says it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from keepsight.export.alignment import _least_squares
from keepsight.export.answerrows import _mixed
from keepsight.export.batches import Batch, one_frame
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.train import Stage, Trainer, plot_curve
from keepsight.runtime.evaluation.scenes import ANSWERS, Label, StreamQuestion

CONFIG = QFormerConfig(
    hidden=16, layers=4, heads=2, ffn=32, channels=12, queries=2, vocab=9, max_text=8, n_embd=10, slots=3, time_buckets=4
)


def _draw(share: float, rng: np.random.Generator) -> Batch:
    features = torch.from_numpy(rng.normal(size=(3, 5, 12)).astype(np.float32))
    text = torch.from_numpy(rng.integers(9, size=(3, 2, 6)))
    answers = torch.from_numpy(rng.integers(len(ANSWERS), size=(3, 2)))
    rows = [
        [StreamQuestion("present", "is there a red shape?", ANSWERS[int(index)], (0,), (0,)) for index in row] for row in answers
    ]
    labels: list[list[Label | None]] = [[("circle", "red")], [None], [("triangle", "blue")]]
    return Batch(text, torch.ones(3, 2, 6), one_frame(features), answers, rows, labels, torch.ones(3, 5, 1))


def _trainer(folder: Path) -> Trainer:
    folder.mkdir()
    torch.manual_seed(0)
    trainer = Trainer(QFormer(CONFIG), folder, seed=3)
    trainer.answer_rows = torch.randn(len(ANSWERS), 2, 10)
    return trainer


def test_an_interrupted_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.run(Stage("one", 6, 1e-2, _draw), row_weight=1.0, hint_weight=0.3, save_every=2, log_every=1)

    def broken(share: float, rng: np.random.Generator) -> Batch:
        if share >= 5 / 6:
            raise KeyboardInterrupt
        return _draw(share, rng)

    first = _trainer(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        first.run(Stage("one", 6, 1e-2, broken), row_weight=1.0, hint_weight=0.3, save_every=2, log_every=1)
    torch.manual_seed(99)
    resumed = Trainer(QFormer(CONFIG), tmp_path / "parts", seed=3)
    resumed.answer_rows = whole.answer_rows
    resumed.run(Stage("one", 6, 1e-2, _draw), row_weight=1.0, hint_weight=0.3, save_every=2, log_every=1)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # step 5 was done twice, and is told once
    for name, value in whole.qformer.state_dict().items():
        torch.testing.assert_close(resumed.qformer.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_training_lowers_the_loss_and_its_curve_is_drawn(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "run")
    fixed = _draw(0, np.random.default_rng(0))
    trainer.run(Stage("one", 60, 1e-2, lambda share, rng: fixed), log_every=10)
    losses = [row["loss"] for row in trainer.curve.rows]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    plot_curve(tmp_path / "run" / "curve.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_least_squares_finds_a_projection_that_is_there() -> None:
    torch.manual_seed(1)
    qformer = QFormer(CONFIG)
    values, weight, bias = torch.randn(400, 2, 16), torch.randn(10, 16), torch.randn(10)
    _least_squares(qformer, values, values @ weight.T + bias)
    torch.testing.assert_close(qformer.llm_proj.weight.data, weight, atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(qformer.llm_proj.bias.data, bias, atol=5e-3, rtol=1e-2)


def test_mixed_rows_stay_nearer_to_their_own_answer() -> None:
    torch.manual_seed(0)
    rows = torch.randn(21, 8, 64)
    mixed = _mixed(rows, np.random.default_rng(0))
    distance = (mixed[:, None] - rows[None]).pow(2).mean((2, 3))
    assert (distance.argmin(1) == torch.arange(21)).all()
