"""Soft-prompt rows that make the frozen language model say each answer, learnt through it once, before the Q-Former aims at them.

BLIP-2's second stage trains the Q-Former through the LLM. With a closed set of answers that splits into two cheap parts:
find, through the LLM, rows `[Q, n_embd]` for each answer (21 x 8 rows, started at the answer's own word embeddings); then
regress the Q-Former's soft prompt onto them, for which no LLM is needed. A second phase mixes other answers and noise into
the rows, as much as the error of that regression will, so that they forgive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keepsight.export.language import FrozenLanguageModel
from keepsight.export.questions import QuestionSet
from keepsight.export.train import Curve
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.scenes import ANSWERS, PAST_KINDS, past_question

RATE = 4e-3
PLAIN_STEPS, MIXED_STEPS = 76, 44
NOISE = 0.03  # standard deviation; the rows' own is about 0.11
MIXED_SHARE, COMMON_NOISE = 0.4, 0.025  # most of another answer, and noise that all rows of a prompt share
_GENERATED = 12000


def learn_answer_rows(language: FrozenLanguageModel, questions: QuestionSet, queries: int, path: Path, seed: int) -> Tensor:
    """`[answers, Q, n_embd]` in the order of `ANSWERS`; those of an earlier run if `path` exists.

    Each step asks every answer one question that it can be the answer to, and descends on the cross-entropy of the answer
    and its end token. Loss and the share of exact answers go to `path` with the suffix .jsonl.
    """
    if path.exists():
        return torch.from_numpy(np.load(path))
    rng = np.random.default_rng([seed, 50])
    torch.manual_seed(seed)
    asked = _questions_by_answer(questions, rng)
    rows = language.word_rows(queries).clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=RATE)
    log = path.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    curve = Curve(log)
    steps = PLAIN_STEPS + MIXED_STEPS
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 4) * (1 - 0.9 * step / steps)
        batch = [(asked[answer][int(rng.integers(len(asked[answer])))], answer) for answer in ANSWERS]
        noisy = rows if step < PLAIN_STEPS else _mixed(rows, rng)
        loss, right = language.loss(noisy + NOISE * torch.randn(rows.shape), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.report("answer rows", step + 1, steps, float(loss.detach()), float(right.float().mean()))
    found = rows.detach()
    np.save(path, found.numpy())
    return found


def _mixed(rows: Tensor, rng: np.random.Generator) -> Tensor:
    """Each answer's rows with up to `MIXED_SHARE` of another's; every other time yes and no are mixed with each other."""
    other = torch.from_numpy(rng.permutation(len(rows)))
    if rng.random() < 0.5:
        other[0], other[1] = 1, 0
    share = MIXED_SHARE * torch.rand(len(rows), 1, 1)
    return (1 - share) * rows + share * rows[other] + COMMON_NOISE * torch.randn(len(rows), 1, rows.shape[2])


def _questions_by_answer(questions: QuestionSet, rng: np.random.Generator) -> dict[str, Sequence[str]]:
    """For each answer the questions that have it somewhere in the training data."""
    asked: dict[str, set[str]] = {answer: set() for answer in ANSWERS}
    for rows in questions.by_picture.values():
        for question, answer in rows:
            asked[answer].add(question)
    labels = [(picture.shape, picture.color) for picture in easyvqa.pictures("train")]
    for _ in range(_GENERATED):
        shown = [labels[index] for index in rng.integers(len(labels), size=rng.integers(2, 14))]
        made = past_question(PAST_KINDS[rng.integers(len(PAST_KINDS))], shown, rng)
        if made is not None:
            asked[made.answer].add(made.question)
    return {answer: sorted(texts) for answer, texts in asked.items()}
