"""Streams made of pictures: scenes held for a while, with jitter, noise, cuts and cross-fades, and questions about them.

The stream version of easy-VQA: pictures follow each other, and one asks about the present (the data set's own questions)
and about the past. Training (train split) and evaluation (test split) make their streams here, so that both see the
same process; everything follows from the random generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.evaluation.easyvqa import COLORS, SHAPES, Picture

HOLD_FRAMES = (3, 12)
FADE_FRAMES = (1, 2)
FADE_SHARE = 0.5
SHIFT_PX, JITTER_PX = 8.0, 1.5  # of a 224-pixel frame: offset of a scene, tremor of a frame
ZOOM = 0.06
GAIN = 0.08
NOISE = (1.0, 5.0)  # standard deviation on 0..255, one value per scene
COUNT_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PAST_KINDS = ("first", "previous", "before", "after", "ever", "count")
KINDS = ("present", *PAST_KINDS)
ANSWERS = ("yes", "no", *SHAPES, *COLORS, *COUNT_WORDS)


@dataclass(frozen=True)
class Scene:
    """One picture on screen for `hold` frames, then `fade` frames in which the next one fades in (0: a cut)."""

    picture: Picture
    hold: int
    fade: int


@dataclass(frozen=True)
class StreamQuestion:
    """A question about a stream, asked at its end.

    Attributes:
        evidence: the scenes that show the answer; none where it is that something was not there, or a number.
        referent: the scenes that the question points at: the one before which, the ones that are like what is asked for.
    """

    kind: str
    question: str
    answer: str
    evidence: tuple[int, ...] = ()
    referent: tuple[int, ...] = ()


def frame_count(scenes: Sequence[Scene]) -> int:
    """Frames of the whole stream."""
    return sum(scene.hold + scene.fade for scene in scenes)


def plan_scenes(pictures: Sequence[Picture], count: int, rng: np.random.Generator) -> list[Scene]:
    """Choose `count` pictures, neighbours always different in shape or color, and how long each is held.

    Half of the streams draw from a palette of a few colors and shapes, so that "how many" and "ever" are open questions.
    """
    palette = list(pictures)
    if rng.random() < 0.5:
        colors = set(rng.choice(COLORS, size=rng.integers(2, 8), replace=False))
        shapes = set(rng.choice(SHAPES, size=rng.integers(2, 4), replace=False))
        palette = [picture for picture in pictures if picture.color in colors and picture.shape in shapes]
    scenes: list[Scene] = []
    while len(scenes) < count:
        picture = palette[rng.integers(len(palette))]
        if scenes and (picture.shape, picture.color) == (scenes[-1].picture.shape, scenes[-1].picture.color):
            continue
        fade = int(rng.integers(FADE_FRAMES[0], FADE_FRAMES[1] + 1)) if rng.random() < FADE_SHARE else 0
        last = len(scenes) == count - 1
        scenes.append(Scene(picture, int(rng.integers(HOLD_FRAMES[0], HOLD_FRAMES[1] + 1)), 0 if last else fade))
    return scenes


class Camera:
    """A picture as an unsteady camera sees it: one offset, zoom, gain and noise per scene, and a tremor per frame."""

    def __init__(self, pixels: NDArray[np.uint8], size: int, rng: np.random.Generator) -> None:
        self.pixels = pixels.astype(np.float32)
        self.size = size
        self.rng = rng
        self.shift = rng.uniform(-SHIFT_PX, SHIFT_PX, 2)
        self.zoom = 1 + rng.uniform(-ZOOM, ZOOM)
        self.gain = 1 + rng.uniform(-GAIN, GAIN)
        self.noise = rng.uniform(*NOISE)

    def look(self) -> NDArray[np.float32]:
        """The next clean frame, float32 `[size, size, 3]` on 0..255."""
        upright = self._resample(self.pixels, axis=0)
        view = self._resample(upright, axis=1)
        return view * np.float32(self.gain)

    def _resample(self, pixels: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Linear interpolation to `size` samples along one axis; the border is repeated."""
        length = pixels.shape[axis]
        shift = self.shift[axis] + self.rng.normal(0.0, JITTER_PX)
        centre = (np.arange(self.size) + 0.5 - self.size / 2 + shift) / self.zoom + self.size / 2
        position = np.clip(centre * length / self.size - 0.5, 0, length - 1)
        low = np.minimum(position.astype(np.int64), length - 2)
        share = np.expand_dims((position - low).astype(np.float32), tuple(k for k in range(pixels.ndim) if k != axis))
        below, above = pixels.take(low, axis), pixels.take(low + 1, axis)
        return below + share * (above - below)


def render(
    scenes: Sequence[Scene], pixels: Sequence[NDArray[np.uint8]], size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.uint8]]:
    """The stream's frames, uint8 `[size, size, 3]`; `pixels[i]` is the picture of `scenes[i]`."""
    cameras = [Camera(image, size, rng) for image in pixels]
    for index, scene in enumerate(scenes):
        camera = cameras[index]
        for _ in range(scene.hold):
            yield expose(camera.look(), camera)
        for step in range(scene.fade):
            share = (step + 1) / (scene.fade + 1)
            yield expose(camera.look() * (1 - share) + cameras[index + 1].look() * share, camera)


def expose(view: NDArray[np.float32], camera: Camera) -> NDArray[np.uint8]:
    """A view `[size, size, 3]` on 0..255 as a frame, with the camera's noise."""
    noisy = view + camera.rng.standard_normal(view.shape, np.float32) * np.float32(camera.noise)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


Label = tuple[str, str]


def past_question(kind: str, labels: Sequence[Label], rng: np.random.Generator) -> StreamQuestion | None:
    """A question of this kind about a stream whose scenes show `labels` (shape, color), or None if none can be asked."""
    return _MAKERS[kind](labels, rng)


def _pick(rng: np.random.Generator, *texts: str) -> str:
    return texts[rng.integers(len(texts))]


def _attribute(label: Label, rng: np.random.Generator) -> tuple[str, str]:
    """("shape" | "color", its value), at random."""
    which = int(rng.integers(2))
    return ("shape", "color")[which], label[which]


def _first(labels: Sequence[Label], rng: np.random.Generator) -> StreamQuestion | None:
    if len(labels) < 2:
        return None
    name, answer = _attribute(labels[0], rng)
    question = _pick(rng, f"what {name} was first?", f"what was the first {name}?")
    return StreamQuestion("first", question, answer, evidence=(0,), referent=(0,))


def _previous(labels: Sequence[Label], rng: np.random.Generator) -> StreamQuestion | None:
    if len(labels) < 2:
        return None
    name, answer = _attribute(labels[-2], rng)
    question = _pick(rng, f"what {name} was last but one?", f"what {name} was right before this one?")
    newest = len(labels) - 1
    return StreamQuestion("previous", question, answer, evidence=(newest - 1,), referent=(newest,))


def _neighbour(labels: Sequence[Label], rng: np.random.Generator, step: int) -> StreamQuestion | None:
    """Ask for the scene `step` (-1 or +1) beside one whose label occurs once."""
    places = [
        place
        for place, label in enumerate(labels)
        if 0 <= place + step < len(labels) and list(labels).count(label) == 1
    ]
    if not places:
        return None
    place = places[rng.integers(len(places))]
    shape, color = labels[place]
    name, answer = _attribute(labels[place + step], rng)
    word = "before" if step < 0 else "after"
    question = _pick(
        rng, f"what {name} came right {word} the {color} {shape}?", f"what {name} was {word} the {color} {shape}?"
    )
    return StreamQuestion(word, question, answer, evidence=(place + step,), referent=(place,))


def _ever(labels: Sequence[Label], rng: np.random.Generator) -> StreamQuestion | None:
    """Yes and no equally often wherever both can be asked."""
    things: dict[str, list[int]] = {}
    style = rng.integers(3)
    shown = list(enumerate(labels))
    if style == 0:
        things = {shape: [place for place, label in shown if label[0] == shape] for shape in SHAPES}
    elif style == 1:
        things = {f"{color} shape": [place for place, label in shown if label[1] == color] for color in COLORS}
    else:
        pairs = [(shape, color) for shape in SHAPES for color in COLORS]
        things = {f"{pair[1]} {pair[0]}": [place for place, label in shown if label == pair] for pair in pairs}
    wanted = bool(rng.integers(2))
    choice = [thing for thing, places in things.items() if bool(places) == wanted]
    if not choice:
        return None
    thing = choice[rng.integers(len(choice))]
    question = _pick(rng, f"was there ever a {thing}?", f"has there been a {thing}?")
    places = tuple(things[thing])
    return StreamQuestion("ever", question, "yes" if wanted else "no", evidence=places, referent=places)


def _count(labels: Sequence[Label], rng: np.random.Generator) -> StreamQuestion | None:
    which = int(rng.integers(2))
    name = ("shapes", "colors")[which]
    number = len({label[which] for label in labels})
    question = _pick(rng, f"how many different {name} were there?", f"how many {name} were there?")
    return StreamQuestion("count", question, COUNT_WORDS[number - 1])


_MAKERS = {
    "first": _first,
    "previous": _previous,
    "before": lambda labels, rng: _neighbour(labels, rng, -1),
    "after": lambda labels, rng: _neighbour(labels, rng, +1),
    "ever": _ever,
    "count": _count,
}
