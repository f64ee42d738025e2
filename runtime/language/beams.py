"""Beam search over any model that gives logits for several continuations at once.

The rules are those of transformers' beam search (`generation/utils.py`, early_stopping=False), which MA-LMM's published
numbers use with five beams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Hypothesis", "beam_search", "log_softmax"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A continuation: its tokens (a final end token included) and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    logprob: float

    def score(self, length_penalty: float) -> float:
        """What hypotheses are ranked by."""
        return self.logprob / float(len(self.tokens) ** length_penalty)


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities along the last axis, in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def beam_search(
    logits: Float32,
    advance: Callable[[Sequence[int], Sequence[int]], Float32],
    ends: Callable[[tuple[int, ...]], bool],
    *,
    beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Hypothesis:
    """The best continuation found by carrying the `beams` most likely ones.

    At each step the 2 x beams most likely extensions are looked at, best first. One that ends is a result if it is
    among the first `beams`; the others refill the beams. The search stops when `beams` results are at least as good as
    the best live beam would be if it ended now, or at `max_tokens`, where live beams count as results too.

    Args:
        logits: float32 `[n_vocab]`, after the prompt.
        advance: given, for each new beam, the index of its parent and its token, returns logits `[beams, n_vocab]`.
        ends: whether a continuation, given by its tokens, is complete.
        beams: how many live continuations, at least 1.
        max_tokens: most tokens of a continuation, an end token included.
        length_penalty: exponent of the length that divides a log-probability; above 0 it favours long ones.
        repetition_penalty: multiplies log-probabilities of tokens that a continuation already has (as the reference).
    """
    live = [Hypothesis((), 0.0)]
    results: list[Hypothesis] = []
    scores = log_softmax(logits)[None]
    for length in range(1, max_tokens + 1):
        ranked = _extensions(live, scores, repetition_penalty, 2 * beams)
        live, parents = [], []
        for rank, (parent, hypothesis) in enumerate(ranked):
            if ends(hypothesis.tokens):
                if rank < beams:
                    results = _best([*results, hypothesis], beams, length_penalty)
            elif len(live) < beams:
                live.append(hypothesis)
                parents.append(parent)
        if not live or length == max_tokens or _settled(results, live, beams, length_penalty):
            break
        scores = log_softmax(advance(parents, [hypothesis.tokens[-1] for hypothesis in live]))
    if len(results) < beams or length == max_tokens:
        results = _best([*results, *live], beams, length_penalty)
    return results[0]


def _extensions(
    live: Sequence[Hypothesis], scores: Float64, repetition_penalty: float, count: int
) -> list[tuple[int, Hypothesis]]:
    """The `count` most likely extensions of all live beams, best first, each with its parent's index."""
    if repetition_penalty != 1.0:
        for row, hypothesis in zip(scores, live, strict=True):
            row[list(set(hypothesis.tokens))] *= repetition_penalty
    totals = (scores + np.array([[hypothesis.logprob] for hypothesis in live])).ravel()
    count = min(count, len(totals))
    top = np.argpartition(-totals, count - 1)[:count]
    top = top[np.lexsort((top, -totals[top]))]
    extended = []
    for index in top.tolist():
        parent, token = divmod(index, scores.shape[1])
        extended.append((parent, Hypothesis((*live[parent].tokens, token), float(totals[index]))))
    return extended


def _best(hypotheses: list[Hypothesis], count: int, length_penalty: float) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score(length_penalty))[:count]


def _settled(results: list[Hypothesis], live: list[Hypothesis], beams: int, length_penalty: float) -> bool:
    if len(results) < beams:
        return False
    return results[-1].score(length_penalty) >= live[0].score(length_penalty)
