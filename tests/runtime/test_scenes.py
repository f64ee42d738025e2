"""Generated streams and their questions say what they claim."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.easyvqa import COLORS, SHAPES, Picture
from keepsight.runtime.evaluation.scenes import (
    COUNT_WORDS,
    FADE_FRAMES,
    HOLD_FRAMES,
    PAST_KINDS,
    Scene,
    frame_count,
    past_question,
    plan_scenes,
    render,
)  # fmt: skip

PICTURES = [Picture(Path(f"{shape}-{color}.png"), shape, color) for shape in SHAPES for color in COLORS]


def test_scenes_are_held_as_long_as_they_should_and_neighbours_differ() -> None:
    for seed in range(20):
        scenes = plan_scenes(PICTURES, 12, np.random.default_rng(seed))
        assert len(scenes) == 12
        assert all(HOLD_FRAMES[0] <= scene.hold <= HOLD_FRAMES[1] for scene in scenes)
        assert all(scene.fade in (0, *FADE_FRAMES) for scene in scenes) and scenes[-1].fade == 0
        labels = [(scene.picture.shape, scene.picture.color) for scene in scenes]
        assert all(a != b for a, b in pairwise(labels))


def test_the_same_seed_gives_the_same_frames() -> None:
    scenes = plan_scenes(PICTURES, 3, np.random.default_rng(5))
    pixels = [np.full((64, 64, 3), 40 * index, np.uint8) for index in range(3)]
    first, second = (list(render(scenes, pixels, 32, np.random.default_rng(1))) for _ in range(2))
    assert len(first) == frame_count(scenes)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert first[0].shape == (32, 32, 3) and first[0].dtype == np.uint8


def test_a_fade_lies_between_its_scenes() -> None:
    scenes = [Scene(PICTURES[0], 3, 2), Scene(PICTURES[1], 3, 0)]
    pixels = [np.full((64, 64, 3), value, np.uint8) for value in (40, 200)]
    levels = [frame.mean() for frame in render(scenes, pixels, 48, np.random.default_rng(0))]
    assert levels[2] < levels[3] < levels[4] < levels[5]


def test_a_still_camera_shows_the_picture_itself() -> None:
    """Without shift, zoom, gain and noise the view is the picture."""
    from keepsight.runtime.evaluation.scenes import Camera

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    camera = Camera(pixels, 64, np.random.default_rng(0))
    camera.shift, camera.zoom, camera.gain = np.zeros(2), 1.0, 1.0
    camera.rng = _Still()  # type: ignore[assignment]
    np.testing.assert_allclose(camera.look(), pixels, atol=1e-3)


class _Still:
    def normal(self, *_: float) -> float:
        return 0.0


Label = tuple[str, str]


def _slow_answer(question: str, labels: list[Label]) -> str:
    """Answer a generated question from the words of the question alone."""
    words = question.rstrip("?").split()
    which = 0 if "shape" in words or "shapes" in words else 1
    if "how" in words:
        return COUNT_WORDS[len({label[which] for label in labels}) - 1]
    if "ever" in words or "been" in words:
        shapes = [word for word in words if word in SHAPES]
        colors = [word for word in words if word in COLORS]
        seen = any((not shapes or s in shapes) and (not colors or c in colors) for s, c in labels)
        return "yes" if seen else "no"
    which = 0 if words[1] == "shape" or words[-1] == "shape" else 1
    if "one" in words or "this" in words:
        return labels[-2][which]
    if "first" in words:
        return labels[0][which]
    place = labels.index((words[-1], words[-2]))
    which = 0 if words[1] == "shape" else 1
    return labels[place + (1 if "after" in words else -1)][which]


@pytest.mark.parametrize("kind", PAST_KINDS)
def test_answers_agree_with_a_reading_of_the_question(kind: str) -> None:
    rng = np.random.default_rng(7)
    asked = 0
    for seed in range(60):
        scenes = plan_scenes(PICTURES, 2 + seed % 10, np.random.default_rng(seed))
        labels = [(scene.picture.shape, scene.picture.color) for scene in scenes]
        made = past_question(kind, labels, rng)
        if made is not None:
            asked += 1
            assert made.answer == _slow_answer(made.question, labels), (made, labels)
    assert asked > 30


@pytest.mark.parametrize("kind", PAST_KINDS)
def test_the_evidence_of_a_question_shows_its_answer(kind: str) -> None:
    rng = np.random.default_rng(11)
    for seed in range(60):
        scenes = plan_scenes(PICTURES, 2 + seed % 10, np.random.default_rng(seed))
        labels = [(scene.picture.shape, scene.picture.color) for scene in scenes]
        made = past_question(kind, labels, rng)
        if made is None:
            continue
        named = set(made.question.rstrip("?").split())
        if kind == "ever":
            alike = [place for place, label in enumerate(labels) if named & {*SHAPES, *COLORS} <= set(label)]
            assert list(made.evidence) == list(made.referent) == alike
        elif kind == "count":
            assert made.evidence == made.referent == ()
        else:
            (shows,), (points_at,) = made.evidence, made.referent
            assert made.answer in labels[shows]
            step = {"first": 0, "previous": -1, "before": -1, "after": 1}[kind]
            assert shows == points_at + step
            assert kind not in ("before", "after") or set(labels[points_at]) <= named


def test_ever_is_yes_about_half_the_time() -> None:
    rng = np.random.default_rng(3)
    answers = []
    for seed in range(300):
        scenes = plan_scenes(PICTURES, 10, np.random.default_rng(seed))
        made = past_question("ever", [(scene.picture.shape, scene.picture.color) for scene in scenes], rng)
        answers += [made.answer] if made else []
    assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_easy_vqa_labels_agree_with_every_direct_question() -> None:
    for row in easyvqa.load("test"):
        if row.answer in SHAPES:
            assert row.picture.shape == row.answer
        if row.answer in COLORS:
            assert row.picture.color == row.answer
    assert len(easyvqa.load("test")) == 9673 and len(easyvqa.pictures("test")) > 700
    train = {row.picture.path for row in easyvqa.load("train")}
    assert not train & {row.picture.path for row in easyvqa.load("test")}
