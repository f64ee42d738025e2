"""The last stage: fit the projection of the finished Q-Former so that the frozen language model says what the head says.

The Q-Former is done and frozen here; its query outputs are computed once, as the runtime would give them (doubtful ones
included), and `llm_proj` alone is trained: first by least squares onto the answers' rows, then on the cross-entropy
through the language model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from keepsight.export.batches import Batch
from keepsight.export.dense import replay
from keepsight.export.language import FrozenLanguageModel
from keepsight.export.qformer import QFormer
from keepsight.export.train import Curve
from keepsight.runtime.evaluation.scenes import ANSWERS

STEPS, RATE, RIDGE = 120, 2e-3, 0.1
EXTRA = (0, 0, 0, 1, 1, 1)  # yes and no are most of the questions: more of each batch


@dataclass(frozen=True)
class Outputs:
    """Query outputs `[samples, Q, H]`, what the head makes of each `[samples]`, and the questions."""

    values: Tensor
    answers: Tensor
    questions: list[str]


@torch.no_grad()
def collect_outputs(qformer: QFormer, head: nn.Module, batches: Iterable[Batch]) -> Outputs:
    """Run the finished Q-Former over batches of all kinds."""
    qformer.eval()
    values, answers, questions = [], [], []
    for batch in batches:
        output = replay(qformer, batch.text_ids, batch.text_mask, batch.banks).flatten(0, 1)
        values.append(output)
        answers.append(head(output).argmax(-1))
        questions += [asked.question for row in batch.rows for asked in row]
    return Outputs(torch.cat(values), torch.cat(answers), questions)


def align_projection(
    qformer: QFormer, outputs: Outputs, rows: Tensor, language: FrozenLanguageModel, log: Path, seed: int
) -> None:
    """Train `qformer.llm_proj` in place; `rows` `[answers, Q, n_embd]` is where least squares starts it.

    Every step asks the language model about one sample of each answer. Loss and the share of exact answers go to `log`.
    """
    _least_squares(qformer, outputs.values, rows[outputs.answers])
    samples = [torch.nonzero(outputs.answers == index).flatten().tolist() for index in range(len(ANSWERS))]
    asked = [index for index in (*range(len(ANSWERS)), *EXTRA) if samples[index]]
    optimizer = torch.optim.Adam(qformer.llm_proj.parameters(), lr=RATE)
    rng = np.random.default_rng([seed, 60])
    log.unlink(missing_ok=True)
    curve = Curve(log)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 3) * (1 - 0.9 * step / STEPS)
        chosen = [samples[index][int(rng.integers(len(samples[index])))] for index in asked]
        told = [(outputs.questions[index], ANSWERS[int(outputs.answers[index])]) for index in chosen]
        loss, right = language.loss(qformer.soft_prompt(outputs.values[chosen]), told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.report("alignment", step + 1, STEPS, float(loss.detach()), float(right.float().mean()))


@torch.no_grad()
def _least_squares(qformer: QFormer, values: Tensor, wanted: Tensor) -> None:
    """Ridge regression of every row of every sample, in double."""
    ones = torch.ones(*values.shape[:-1], 1)
    inputs = torch.cat([values, ones], dim=-1).flatten(0, 1).double()
    normal = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(normal, inputs.T @ wanted.flatten(0, 1).double()).float()
    qformer.llm_proj.weight.copy_(solution[:-1].T)
    qformer.llm_proj.bias.copy_(solution[-1])
