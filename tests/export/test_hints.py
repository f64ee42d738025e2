"""Hints say what a look at the labels says, and their loss is the one that is described."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from keepsight.export.batches import one_frame
from keepsight.export.dense import Banks, replay
from keepsight.export.hints import HINTED_HEADS, UNKNOWN, Hints, HintTargets, Watched, hint_targets, look
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.runtime.evaluation.easyvqa import COLORS, SHAPES
from keepsight.runtime.evaluation.scenes import KINDS, Label, StreamQuestion

CONFIG = QFormerConfig(
    hidden=16, layers=6, heads=4, ffn=32, channels=12, queries=8, vocab=9, max_text=8, n_embd=10, slots=3, time_buckets=4
)
LABELS: list[Label | None] = [("circle", "red"), ("triangle", "blue"), ("circle", "red")]


def _targets(*questions: StreamQuestion, labels: list[Label | None] = LABELS) -> HintTargets:
    """Five tokens: one of each scene, one half of scene 1 and half of 2, and one that is not in use."""
    scenes = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [0, 0, 0]]])
    return hint_targets([list(questions)], [labels], scenes, torch.tensor([[3, 2, 0, 1, 0]]), queries=8, ages=4)


def test_targets_of_a_neighbour() -> None:
    made = _targets(StreamQuestion("after", "what color was after the blue triangle?", "red", (2,), (1,)))
    assert made.asked.tolist() == [[[COLORS.index("blue"), SHAPES.index("triangle"), 0, KINDS.index("after")]]]
    assert made.referred.tolist() == [[[COLORS.index("blue"), SHAPES.index("triangle")]]]
    assert made.shown.tolist() == [[[COLORS.index("red"), SHAPES.index("circle")]]]
    assert bool(made.there.isnan().all())
    torch.testing.assert_close(made.referent_age[0, 0], torch.tensor([0, 1 / 3, 2 / 3, 0]))
    torch.testing.assert_close(made.evidence_age[0, 0], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert made.referent[0, 0, 5].tolist() == [0, 1, 0, 0.5, 0] and made.evidence[0, 0, 5].tolist() == [0, 0, 1, 0.5, 0]


def test_targets_of_was_there_ever() -> None:
    made = _targets(
        StreamQuestion("ever", "was there ever a circle?", "yes", (0, 2), (0, 2)),
        StreamQuestion("ever", "has there been a teal shape?", "no"),
        StreamQuestion("present", "is there not a red shape?", "no", (2,), (2,)),
    )
    none = [len(COLORS), len(SHAPES)]
    named = [[none[0], SHAPES.index("circle")], [COLORS.index("teal"), none[1]], [COLORS.index("red"), none[1]]]
    assert made.asked[0, :, :2].tolist() == named
    assert made.evidence[0, 0, 0].tolist() == [1, 0, 1, 0.5, 0] and made.evidence[0, 1].abs().sum() == 0
    assert made.shown[0, 1].tolist() == [UNKNOWN, UNKNOWN] and made.asked[0, :, 2].tolist() == [0, 0, 1]
    assert made.evidence_age[0, :2].abs().sum() == 0 and made.evidence_age[0, 2].sum() == 1  # two scenes, none, one


def test_targets_where_the_scenes_differ_or_have_no_label() -> None:
    labels: list[Label | None] = [("circle", "red"), ("triangle", "red"), None]
    made = _targets(
        StreamQuestion("ever", "was there ever a red shape?", "yes", (0, 1), (0, 1)),
        StreamQuestion("present", "what shape is present?", "circle", (2,), (2,)),
        labels=labels,
    )
    assert made.shown[0].tolist() == [[COLORS.index("red"), UNKNOWN], [UNKNOWN, UNKNOWN]]


def test_targets_of_how_many() -> None:
    made = _targets(StreamQuestion("count", "how many shapes were there?", "two"))
    there = [float(shape in ("circle", "triangle")) for shape in SHAPES] + [0.0] * 5
    assert made.there[0, 0].tolist() == there
    circle = made.evidence[0, 0, SHAPES.index("circle")]
    assert circle.tolist() == [1, 0, 1, 0.5, 0] and torch.equal(made.evidence, made.referent)
    colors = _targets(StreamQuestion("count", "how many different colors were there?", "two"))
    assert colors.there[0, 0].tolist() == [float(color in ("red", "blue")) for color in COLORS]


def test_look_is_minus_the_log_of_what_rests_on_the_target() -> None:
    rng = np.random.default_rng(0)
    attention = torch.from_numpy(rng.dirichlet(np.ones(5), size=(2, 4, 3, 8)).astype(np.float32))
    target = torch.from_numpy((rng.random((2, 3, 8, 5)) < 0.4).astype(np.float32))
    target[0, 0, 0] = 0.4  # nobody shows it clearly
    terms = []
    for b, n, q in np.ndindex(2, 3, 8):
        if target[b, n, q].max() > 0.5:
            for head in range(HINTED_HEADS):
                terms.append(-math.log(float((attention[b, head, n, q] * target[b, n, q]).sum()) + 1e-4))
    assert float(look(attention, target)) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(look(attention, torch.zeros_like(target))) == 0.0


def _banks() -> Banks:
    torch.manual_seed(1)
    visible = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])[None, :, :, None].expand(1, 3, 3, 5)
    bucket = torch.where(visible, 1 + 4 * torch.arange(3)[None, None, :, None], 0)
    return Banks(torch.randn(1, 1, 3, 5, 12), visible, bucket, torch.ones(1, 3, dtype=torch.bool))


def test_watching_changes_nothing_and_sees_attention_of_the_newest_step() -> None:
    torch.manual_seed(0)
    qformer = QFormer(CONFIG).eval()
    text, mask = torch.randint(9, (1, 2, 6)), torch.ones(1, 2, 6)
    watched = Watched([], [])
    output = replay(qformer, text, mask, _banks(), watched)
    torch.testing.assert_close(output, replay(qformer, text, mask, _banks()), atol=1e-5, rtol=1e-5)
    assert [rows.shape for rows in watched.queries] == [(1, 2, 8, 16)] * 6
    torch.testing.assert_close(watched.queries[-1], output)
    assert [one.shape for one in watched.attention] == [(1, 4, 2, 8, 15)] * 3
    torch.testing.assert_close(watched.attention[1].sum(-1), torch.ones(1, 4, 2, 8))


def test_hints_alone_teach_where_to_look() -> None:
    """Ten tokens that differ; attention moves from all of them to the one that is looked for."""
    torch.manual_seed(0)
    qformer, hints = QFormer(CONFIG), Hints(16, 6, 4)
    features, text = torch.randn(1, 10, 12), torch.randint(9, (1, 1, 6))
    question = StreamQuestion("present", "what color is the circle?", "red", (0,), (0,))
    scenes = torch.nn.functional.one_hot(torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 1]), 2)[None].float()
    labels: list[Label | None] = [("circle", "red"), ("triangle", "blue")]
    targets = hint_targets([[question]], [labels], scenes, torch.zeros(1, 10, dtype=torch.int64), queries=8, ages=4)
    optimizer = torch.optim.Adam([*qformer.parameters(), *hints.parameters()], lr=3e-3)
    losses = []
    for _ in range(60):
        watched = Watched([], [])
        replay(qformer, text, torch.ones(1, 1, 6), one_frame(features), watched)
        loss = hints(watched, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seen = [float(one[:, :HINTED_HEADS, :, :, 3].mean().detach()) for one in watched.attention]
    assert losses[-1] < 0.2 * losses[0]
    assert seen[1] > 0.8 and seen[2] > 0.8
