"""The data set easy-VQA (package `easy-vqa`, MIT): 64x64 pictures of one coloured shape each, with questions and answers."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keepsight.streams.errors import DatasetError, MissingComponentError

Split = Literal["train", "test"]
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class Picture:
    """One picture of the data set and what it shows ("" where the data set does not say)."""

    path: Path
    shape: str
    color: str


@dataclass(frozen=True)
class PictureQuestion:
    """One of the data set's own questions about one picture."""

    picture: Picture
    question: str
    answer: str


def _split_folder(split: Split) -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise MissingComponentError(
            "the data set package `easy-vqa` is not installed.", fix='Install it with: pip install "keepsight[tiny]"'
        )
    return Path(spec.submodule_search_locations[0]) / "data" / split


def load(split: Split) -> list[PictureQuestion]:
    """All questions of a split, in the package's order.

    A picture's labels are taken from its direct questions only ("what color is the circle?" tells both): the yes/no
    questions are partly negated. A picture without a direct question for each label is left out of `pictures`, not of
    the questions.

    Raises:
        MissingComponentError: the package is not installed.
        DatasetError: a picture that is asked about is not there.
    """
    folder = _split_folder(split)
    rows: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text())
    shapes: dict[int, str] = {}
    colors: dict[int, str] = {}
    for question, answer, image in rows:
        if answer not in YES_NO:
            words = (*question.rstrip("?").split(), answer)
            shapes.update((image, word) for word in words if word in SHAPES)
            colors.update((image, word) for word in words if word in COLORS)
    found = {
        image: Picture(folder / "images" / f"{image}.png", shapes.get(image, ""), colors.get(image, ""))
        for _, _, image in rows
    }
    missing = next((picture.path for picture in found.values() if not picture.path.is_file()), None)
    if missing is not None:
        raise DatasetError(f"{missing} is asked about but is not there.", fix="Reinstall the package easy-vqa.")
    return [PictureQuestion(found[image], question, answer) for question, answer, image in rows]


def pictures(split: Split) -> list[Picture]:
    """The split's pictures whose shape and color are both known, in a fixed order."""
    known = {question.picture for question in load(split) if question.picture.shape and question.picture.color}
    return sorted(known, key=lambda picture: int(picture.path.stem))
