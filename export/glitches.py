"""What goes wrong before a camera's lens and behind it: grey and black frames, an infrared switch, a lamp, day and night.

Frames of a stream come as uint8 `[H, W, 3]`; a *view* is how one of them is seen, and a *glitch* a frame that shows nothing
of the scene. `CONDITIONS` says, for a stream of so many frames, which of them are seen how and what comes in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONDITIONS", "Shot", "View", "see_through"]

Level = tuple[int, int, int]
GREY: Level = (128, 128, 128)
GREEN: Level = (0, 135, 0)  # what a decoder makes of YUV zeros
BLACK: Level = (0, 0, 0)
View = tuple[str, float]
"""`("gain", factor)` or `("infrared", gain)`."""

LUMA_OF_INFRARED = np.array([0.4, 0.4, 0.2], np.float32)
INFRARED_GAIN, INFRARED_FLOOR = 1.15, 25.0
LAMP_GAIN, LAMP_FRAMES = 1.4, (5, 30)
FLICKER_GAIN = 1.6
DAY_MEAN, DAY_SWING, DAY_FRAMES = 0.7, 0.4, 400  # gains in steps of a tenth


@dataclass(frozen=True)
class Shot:
    """One frame of a disturbed stream.

    Attributes:
        frame: index of the undisturbed stream's frame that it shows, or that it comes after.
        view: how that frame is seen, None as it is.
        still: a frame of one level instead of it, None for none.
        disturbed: counted as a glitch when one asks what holds the memory's slots.
    """

    frame: int
    view: View | None = None
    still: Level | None = None
    disturbed: bool = False


def see_through(image: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """A frame uint8 `[H, W, 3]` as a view shows it."""
    kind, amount = view
    light = image.astype(np.float32)
    if kind == "infrared":
        light = np.repeat((light @ LUMA_OF_INFRARED)[..., None], 3, axis=-1) + np.float32(INFRARED_FLOOR / amount)
    return np.clip(np.rint(light * np.float32(amount)), 0, 255).astype(np.uint8)


def _insert(level: Level, every: int, burst: int = 1) -> Callable[[int, np.random.Generator], list[Shot]]:
    """Bursts of still frames, after one frame in `every` on average, never after the last."""

    def shots(frames: int, rng: np.random.Generator) -> list[Shot]:
        made: list[Shot] = []
        for frame in range(frames):
            made.append(Shot(frame))
            if frame < frames - 1 and rng.random() < 1 / every:
                made += [Shot(frame, still=level, disturbed=True)] * burst
        return made

    return shots


def _infrared(frames: int, _rng: np.random.Generator) -> list[Shot]:
    """The middle third."""
    night = range(frames // 3, 2 * frames // 3)
    return [Shot(k, ("infrared", INFRARED_GAIN), disturbed=True) if k in night else Shot(k) for k in range(frames)]


def _lamp(frames: int, rng: np.random.Generator) -> list[Shot]:
    """Off and on in turn, for 5 to 30 frames each."""
    lit: list[bool] = []
    while len(lit) < frames:
        lit += [len(lit) > 0 and not lit[-1]] * int(rng.integers(LAMP_FRAMES[0], LAMP_FRAMES[1] + 1))
    return [Shot(k, ("gain", LAMP_GAIN), disturbed=True) if lit[k] else Shot(k) for k in range(frames)]


def _flicker(frames: int, rng: np.random.Generator) -> list[Shot]:
    """One frame in ten is too bright, but for the last."""
    bright = rng.random(frames - 1) < 0.1
    shots = [Shot(k, ("gain", FLICKER_GAIN), disturbed=True) if bright[k] else Shot(k) for k in range(frames - 1)]
    return [*shots, Shot(frames - 1)]


def _day(frames: int, _rng: np.random.Generator) -> list[Shot]:
    """A slow sine of the light: no frame is a glitch."""
    phase = 2 * math.pi / DAY_FRAMES
    return [Shot(k, ("gain", round(DAY_MEAN + DAY_SWING * math.sin(phase * k), 1))) for k in range(frames)]


CONDITIONS: Mapping[str, Callable[[int, np.random.Generator], list[Shot]]] = {
    "undisturbed": lambda frames, rng: [Shot(k) for k in range(frames)],
    "grey, 1 frame in 50": _insert(GREY, 50),
    "grey, 1 frame in 10": _insert(GREY, 10),
    "grey, 5 frames every 50": _insert(GREY, 50, burst=5),
    "green, 1 frame in 10": _insert(GREEN, 10),
    "black, 1 frame in 10": _insert(BLACK, 10),
    "infrared, middle third": _infrared,
    "lamp on and off": _lamp,
    "flicker, 1 frame in 10": _flicker,
    "day and night": _day,
}
