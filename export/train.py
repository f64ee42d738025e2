"""Train a Q-Former in stages over an answer head, then onto the rows that make the language model say its answers.

A stage is a name, a number of steps, a learning rate, and a way to draw batches; `tiny.py` has the stages of keepsight-tiny. An
interrupted run resumes from the last checkpoint of the stage it was in.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from keepsight.export.batches import Batch
from keepsight.export.dense import replay
from keepsight.export.hints import Hints, HintTargets, Watched, hint_targets
from keepsight.export.qformer import QFormer
from keepsight.runtime.evaluation.scenes import ANSWERS


@dataclass(frozen=True)
class Stage:
    """One stage: how many steps, the peak learning rate, and how a batch is drawn at a share (0..1) of the stage."""

    name: str
    steps: int
    rate: float
    draw: Callable[[float, np.random.Generator], Batch]


class AnswerHead(nn.Module):
    """Classifies an answer from the query outputs: `[..., Q, H]` to `[..., answers]`. Thrown away after training."""

    def __init__(self, queries: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(queries * hidden, len(ANSWERS))

    def forward(self, query_output: Tensor) -> Tensor:
        logits: Tensor = self.linear(query_output.flatten(-2))
        return logits


@dataclass
class Curve:
    """Loss and accuracy by step, written as JSON lines so that an interrupted run keeps them."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a stage wrote after `step`, from where it is resumed."""
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.rows = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def report(self, name: str, step: int, steps: int, loss: float, accuracy: float) -> None:
        """Add a step and print it: for stages of few, slow steps."""
        self.add(stage=name, step=step, loss=loss, accuracy=accuracy)
        print(f"{name}: step {step} of {steps}, loss {loss:.3f}, right {accuracy:.3f}", flush=True)


class Trainer:
    """Runs stages over a Q-Former with an answer head; its checkpoint holds everything that the next step depends on."""

    def __init__(self, qformer: QFormer, folder: Path, seed: int) -> None:
        self.qformer, self.folder, self.seed = qformer, folder, seed
        self.head = AnswerHead(qformer.config.queries, qformer.config.hidden)
        self.hints = Hints(qformer.config.hidden, qformer.config.layers, qformer.config.time_buckets)
        self.answer_rows: Tensor | None = None
        self._modules = {"qformer": qformer, "head": self.head, "hints": self.hints}
        self.curve = Curve(folder / "curve.jsonl")
        self.parameters = [*qformer.parameters(), *self.head.parameters(), *self.hints.parameters()]

    def run(
        self,
        stage: Stage,
        *,
        row_weight: float = 0.0,
        hint_weight: float = 0.0,
        log_every: int = 25,
        save_every: int = 100,
    ) -> None:
        """Train one stage from its last checkpoint, or skip it when it is done.

        Args:
            stage: what to train.
            row_weight: how much the soft prompt is pulled towards the rows that make the LLM say the answer.
            hint_weight: how much the hints' losses count.
        """
        state = _State(self.folder / f"{stage.name}.pt")
        if state.done(stage.steps):
            state.load(self._modules, None)
            return
        optimizer = torch.optim.AdamW(self.parameters, lr=stage.rate, weight_decay=0.02, betas=(0.9, 0.98))
        first = state.load(self._modules, optimizer)
        self.curve.rewind(stage.name, first)
        meter = _Meter()
        self.qformer.train()
        for step in _progress(stage.name, first, stage.steps, meter):
            rng = np.random.default_rng([self.seed, *stage.name.encode(), step])
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * _schedule(step, stage.steps)
            batch = stage.draw(step / stage.steps, rng)
            loss, right = self.loss(batch, row_weight, hint_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            meter.add(float(loss.detach()), right)
            if (step + 1) % log_every == 0:
                self.curve.add(stage=stage.name, step=step + 1, loss=meter.loss, accuracy=meter.accuracy)
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                state.save(step + 1, self._modules, optimizer)

    def loss(self, batch: Batch, row_weight: float, hint_weight: float) -> tuple[Tensor, float]:
        """Cross-entropy of the answer head, plus hints, plus how far the soft prompt is from the rows of the head's own answer.

        Aiming at the right answer instead would make a doubtful soft prompt the mean of two answers' rows, which is neither.
        """
        watched = Watched([], []) if hint_weight else None
        output = replay(self.qformer, batch.text_ids, batch.text_mask, batch.banks, watched)
        logits = self.head(output)
        loss = F.cross_entropy(logits.flatten(0, -2), batch.answers.flatten())
        if watched is not None:
            loss = loss + hint_weight * self.hints(watched, self.hint_targets(batch))
        if row_weight and self.answer_rows is not None:
            wanted = self.answer_rows[logits.argmax(-1)]
            scale = self.answer_rows.pow(2).mean()
            loss = loss + row_weight * (self.qformer.soft_prompt(output) - wanted).pow(2).mean() / scale
        right = float((logits.argmax(-1) == batch.answers).float().mean())
        return loss, right

    def hint_targets(self, batch: Batch) -> HintTargets:
        """What the newest step is to see and notice."""
        config = self.qformer.config
        age = (batch.banks.bucket[:, -1].flatten(1) - 1).clamp(min=0) % config.time_buckets
        return hint_targets(
            batch.rows, batch.labels, batch.scenes, age, queries=config.queries, ages=config.time_buckets
        )

    @torch.no_grad()
    def accuracy(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Share of right answers by kind of question, of the head alone."""
        self.qformer.eval()
        hits: dict[str, list[bool]] = {}
        for batch in batches:
            guess = self.head(replay(self.qformer, batch.text_ids, batch.text_mask, batch.banks)).argmax(-1)
            for row, right in zip(batch.rows, (guess == batch.answers).tolist(), strict=True):
                for asked, hit in zip(row, right, strict=True):
                    hits.setdefault(asked.kind, []).append(hit)
        self.qformer.train()
        return {kind: float(np.mean(values)) for kind, values in sorted(hits.items())}


class _Meter:
    """Running means for the progress bar."""

    def __init__(self) -> None:
        self.loss, self.accuracy, self.seen = 0.0, 0.0, 0

    def add(self, loss: float, accuracy: float) -> None:
        self.seen += 1
        keep = 0.98 if self.seen > 50 else 1 - 1 / self.seen
        self.loss = keep * self.loss + (1 - keep) * loss
        self.accuracy = keep * self.accuracy + (1 - keep) * accuracy


@dataclass(frozen=True)
class _State:
    """One stage's checkpoint."""

    path: Path

    def done(self, steps: int) -> bool:
        return self.path.exists() and int(torch.load(self.path, weights_only=True)["step"]) >= steps

    def load(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None) -> int:
        """Fill `modules` (and the optimizer) from the checkpoint, if there is one; the steps that are done."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        if optimizer is not None:
            optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def save(self, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        partial = self.path.with_suffix(".partial")
        state = {name: module.state_dict() for name, module in modules.items()}
        torch.save(state | {"step": step, "optimizer": optimizer.state_dict()}, partial)
        partial.rename(self.path)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine down to a twentieth."""
    warm = max(1, int(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _progress(name: str, first: int, steps: int, meter: _Meter) -> Iterator[int]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            yield step
            bar.update(task, advance=1, description=f"{name} loss {meter.loss:.3f} right {meter.accuracy:.3f}")
    rate = (steps - first) / max(time.monotonic() - started, 1e-9)
    print(f"{name}: {steps - first} steps, {rate:.2f} a second, loss {meter.loss:.3f}, right {meter.accuracy:.3f}", flush=True)


def plot_curve(curve: Path, picture: Path) -> None:
    """Draw loss and accuracy over the steps of all stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    offset = 0
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        steps = [offset + row["step"] for row in mine]
        for axis, name, label in zip(axes, ("loss", "accuracy"), ("loss, hints and all", "share of right answers"), strict=True):
            axis.plot(steps, [row[name] for row in mine], label=stage)
            axis.set(xlabel="step", ylabel=label)
        offset = steps[-1]
    axes[1].legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
