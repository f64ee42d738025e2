"""Hints: what a Q-Former should look at and notice on its way to an answer, as further losses in training.

Questions about the past take steps: find the scene that is named, find its neighbour, read its color, compare. From answers
alone such a chain is learnt slowly or not at all, since no part of it pays before the others are there. Training streams know
which scene every visual token shows, so each part can be taught by itself:

- of each middle and last cross-attention, `HINTED_HEADS` heads are to look at the scenes that the question points at (the
  referent), then at those that show the answer (the evidence);
- query rows are to hold, each from the layer given in `Hints`, what is asked (kind, color, shape, negation), then label and age
  of the referent, then the age of the evidence, before it is looked for, and its label after;
- for "how many", query q looks for the q-th color or shape, and notes whether it was there.

The heads that read the query rows here are thrown away after training, like the answer head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepsight.runtime.evaluation.easyvqa import COLORS, SHAPES
from keepsight.runtime.evaluation.scenes import KINDS, Label, StreamQuestion

UNKNOWN = -100
HINTED_HEADS = 2
_LEAST_SHARE = 0.5  # a scene that no token shows more than this is not worth looking for


@dataclass(frozen=True)
class HintTargets:
    """What is to be seen and noticed for B streams with n questions.

    Attributes:
        referent, evidence: float32 `[B, n, Q, K]`, the share of what is looked for in each of the K = S N visual tokens.
        asked: int64 `[B, n, 4]`, the question's color, shape (`len(COLORS)`, `len(SHAPES)` for none), negation and kind.
        referred, shown: int64 `[B, n, 2]`, color and shape of the referent and of the evidence; `UNKNOWN` where there is not
            just one.
        referent_age, evidence_age: float32 `[B, n, U]`, shares of the age buckets of their tokens; 0 where there is not just
            one scene.
        there: float32 `[B, n, Q]`, whether the q-th color or shape was there; NaN where it is not asked how many.
    """

    referent: Tensor
    evidence: Tensor
    asked: Tensor
    referred: Tensor
    shown: Tensor
    referent_age: Tensor
    evidence_age: Tensor
    there: Tensor


def hint_targets(
    rows: Sequence[Sequence[StreamQuestion]],
    labels: Sequence[Sequence[Label | None]],
    scenes: Tensor,
    age: Tensor,
    *,
    queries: int,
    ages: int,
) -> HintTargets:
    """Targets of `rows` `[B][n]` about streams whose scenes show `labels`.

    Args:
        rows: the questions.
        labels: of every scene of a stream.
        scenes: `[B, K, scenes]`, what each token shows.
        age: int64 `[B, K]`, the age bucket of each token.
        queries: Q.
        ages: U, the number of age buckets.
    """
    asked, referred, shown, there = [], [], [], []
    sought = torch.zeros(2, len(rows), len(rows[0]), queries, scenes.shape[-1])
    single = torch.zeros(2, len(rows), len(rows[0]), 1)
    for stream, (row, known) in enumerate(zip(rows, labels, strict=True)):
        for place, question in enumerate(row):
            words = set(question.question.rstrip("?").split())
            negated = int(bool({"not", "no"} & words))
            asked.append([_only(COLORS, words), _only(SHAPES, words), negated, KINDS.index(question.kind)])
            referred.append(_label_ids(known, question.referent))
            shown.append(_label_ids(known, question.evidence))
            there.append([float("nan")] * queries)
            if question.kind == "count":
                wanted = _scenes_by_value(known, "colors" in words, queries)
                there[-1] = [float(bool(places)) for places in wanted]
                for query, places in enumerate(wanted):
                    sought[:, stream, place, query, places] = 1
            for role, meant in enumerate((question.referent, question.evidence)):
                sought[role, stream, place, :, list(meant)] = 1
                single[role, stream, place] = len(meant) == 1
    looked = torch.einsum("rbnqs,bks->rbnqk", sought, scenes)
    shares = torch.einsum("rbnk,bku->rbnu", looked[:, :, :, 0] * single, F.one_hot(age, ages).to(looked.dtype))
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-6)
    shape = (len(rows), len(rows[0]), -1)
    asked_ids, referred_ids, shown_ids, was_there = (torch.tensor(ids).view(shape) for ids in (asked, referred, shown, there))
    return HintTargets(looked[0], looked[1], asked_ids, referred_ids, shown_ids, shares[0], shares[1], was_there)


def _only(values: Sequence[str], words: set[str]) -> int:
    named = [index for index, value in enumerate(values) if value in words]
    return named[0] if named else len(values)


def _label_ids(labels: Sequence[Label | None], places: Sequence[int]) -> list[int]:
    """(color, shape) of the scenes at `places` where they agree."""
    found = [labels[place] for place in places]
    ids = []
    for values, which in ((COLORS, 1), (SHAPES, 0)):
        kinds = {None if label is None else label[which] for label in found}
        value = kinds.pop() if len(kinds) == 1 else None
        ids.append(UNKNOWN if value is None else values.index(value))
    return ids


def _scenes_by_value(labels: Sequence[Label | None], colors: bool, queries: int) -> list[list[int]]:
    """For each query the scenes with its color or shape."""
    values, which = (COLORS, 1) if colors else (SHAPES, 0)
    found: list[list[int]] = [[] for _ in range(queries)]
    for place, label in enumerate(labels):
        if label is not None and values.index(label[which]) < queries:
            found[values.index(label[which])].append(place)
    return found


@dataclass
class Watched:
    """What `dense.replay` saw at the newest step.

    Attributes:
        attention: of each cross-attention layer, `[B, heads, n, Q, K]`.
        queries: query rows after each layer, `[B, n, Q, H]`.
    """

    attention: list[Tensor]
    queries: list[Tensor]


class Hints(nn.Module):
    """The heads that read query rows, and their loss."""

    def __init__(self, hidden: int, layers: int, ages: int) -> None:
        super().__init__()
        middle, last = layers // 2 - 1, layers - 2  # the middle and the last cross-attention, of layers that alternate
        self.asked_at, self.referred_at, self.sought_at, self.shown_at = 1, middle, last - 1, last
        sizes = (len(COLORS) + 1, len(SHAPES) + 1)
        self.asked = nn.ModuleList(nn.Linear(hidden, size) for size in (*sizes, 2, len(KINDS)))
        self.referred = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        self.shown = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        self.referent_age, self.evidence_age = nn.Linear(hidden, ages), nn.Linear(hidden, ages)
        self.there = nn.Linear(hidden, 1)

    def forward(self, watched: Watched, targets: HintTargets) -> Tensor:
        """The sum of all hints' losses."""
        rows = watched.queries
        losses = [
            _notice(self.asked, rows[self.asked_at], targets.asked),
            _notice(self.referred, rows[self.referred_at], targets.referred),
            _notice(self.shown, rows[self.shown_at], targets.shown),
            _tell(self.referent_age, rows[self.referred_at], targets.referent_age),
            _tell(self.evidence_age, rows[self.sought_at], targets.evidence_age),
            look(watched.attention[-2], targets.referent),
            look(watched.attention[-1], targets.evidence),
        ]
        told = ~targets.there.isnan()
        if bool(told.any()):
            guess = self.there(rows[self.shown_at])[..., 0]
            losses.append(F.binary_cross_entropy_with_logits(guess[told], targets.there[told]))
        return torch.stack(losses).sum()


def _tell(head: nn.Module, rows: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of what every query row `[B, n, Q, H]` says about `shares` `[B, n, U]`, which add up to 1 or to 0."""
    logs = torch.log_softmax(head(rows), dim=-1)
    loss = -(shares[:, :, None] * logs).sum(-1).mean(-1)
    return loss.sum() / shares.sum().clamp(min=1)


def _notice(heads: nn.ModuleList, rows: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of what every query row `[B, n, Q, H]` says about `targets` `[B, n, len(heads)]`."""
    total = rows.new_zeros(())
    for index, head in enumerate(heads):
        wanted = targets[..., index, None].expand(rows.shape[:-1])
        if bool((wanted != UNKNOWN).any()):
            total = total + F.cross_entropy(head(rows).flatten(0, -2), wanted.flatten(), ignore_index=UNKNOWN)
    return total


def look(attention: Tensor, target: Tensor) -> Tensor:
    """Minus the logarithm of how much of `attention` `[B, heads, n, Q, K]` rests on `target` `[B, n, Q, K]`."""
    there = target.amax(-1) > _LEAST_SHARE
    if not bool(there.any()):
        return attention.new_zeros(())
    mass = torch.einsum("bhnqk,bnqk->bhnq", attention[:, :HINTED_HEADS], target)
    return -(mass + 1e-4).log().permute(0, 2, 3, 1)[there].mean()
