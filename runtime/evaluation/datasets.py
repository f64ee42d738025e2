"""Data sets to evaluate on: easy-VQA pictures, easy-VQA streams, and a user's own JSON lines."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.easyvqa import Picture
from keepsight.runtime.evaluation.scenes import PAST_KINDS, Scene, past_question, plan_scenes, render
from keepsight.streams import Source, write_video
from keepsight.streams.errors import DatasetError, UsageError

# Which questions of a stream are about the past: of any first k, at least two thirds.
_ORDER = (True, True, False, True, True, True, False, True)


@dataclass(frozen=True)
class Question:
    """A question about a clip. `time_s` is when it is asked, None for the clip's end."""

    kind: str
    text: str
    answer: str
    past: bool = False
    time_s: float | None = None


@dataclass(frozen=True)
class Clip:
    """A video or a picture, and what is asked about it."""

    path: Path
    questions: list[Question]


def open_dataset(name: str, *, limit: int | None, seed: int, scenes: int, fps: float, size: int) -> Iterator[Clip]:
    """Clips of `easy-vqa`, `easy-vqa-stream`, or a JSON lines file, `limit` questions in all.

    A clip's file may be gone once the next clip is asked for.

    Args:
        limit: questions; None for all (easy-VQA's 9,673, or 1,000 about streams).
        seed: chooses easy-VQA's questions, and makes the streams.
        scenes: scenes of each generated stream.
        fps, size: frame rate and edge of generated streams: those of the bundle.

    Raises:
        DatasetError: an unknown name, or a file with a row that can't be used.
        MissingComponentError: the package `easy-vqa` is not installed.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} asks no question.", fix="Give 1 or more.")
    if name == "easy-vqa":
        return _pictures(limit, seed)
    if name == "easy-vqa-stream":
        if scenes < 2:
            raise UsageError(f"a stream of {scenes} scene has no past.", fix="Give --scenes 2 or more.")
        return _streams(limit or 1000, seed, scenes, fps, size)
    return _json_lines(Path(name), limit)


def _pictures(limit: int | None, seed: int) -> Iterator[Clip]:
    rows = easyvqa.load("test")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:limit]
    by_path: dict[Path, list[Question]] = {}
    for index in chosen:
        row = rows[index]
        kind = "yes/no" if row.answer in easyvqa.YES_NO else "shape" if row.answer in easyvqa.SHAPES else "color"
        by_path.setdefault(row.picture.path, []).append(Question(kind, row.question, row.answer))
    return (Clip(path, questions) for path, questions in by_path.items())


def picture_pixels(picture: Picture) -> NDArray[np.uint8]:
    """The picture as it is stored, uint8 `[H, W, 3]`."""
    with Source(picture.path) as source:
        return next(source).image


def stream_clip(
    scenes: Sequence[Scene], path: Path, rng: np.random.Generator, *, fps: float, size: int
) -> None:
    """Render a stream and encode it as a video, one frame per memory sample."""
    pixels = [picture_pixels(scene.picture) for scene in scenes]
    write_video(path, render(scenes, pixels, size, rng), fps=fps)


def _streams(limit: int, seed: int, scenes: int, fps: float, size: int) -> Iterator[Clip]:
    own: dict[Path, list[tuple[str, str]]] = {}
    for row in easyvqa.load("test"):
        own.setdefault(row.picture.path, []).append((row.question, row.answer))
    pictures = easyvqa.pictures("test")
    asked = stream = 0
    with tempfile.TemporaryDirectory(prefix="keepsight-") as folder:
        while asked < limit:
            rng = np.random.default_rng([seed, scenes, stream])
            plan = plan_scenes(pictures, scenes, rng)
            questions = stream_questions(plan, own[plan[-1].picture.path], rng)[: limit - asked]
            path = Path(folder) / f"stream-{stream}.mp4"
            stream_clip(plan, path, rng, fps=fps, size=size)
            yield Clip(path, questions)
            path.unlink()
            asked, stream = asked + len(questions), stream + 1


def stream_questions(
    scenes: Sequence[Scene], own: Sequence[tuple[str, str]], rng: np.random.Generator
) -> list[Question]:
    """Six questions about the past, of as many kinds as can be asked, and two of the data set's own about the present."""
    labels = [(scene.picture.shape, scene.picture.color) for scene in scenes]
    kinds = list(rng.permutation(PAST_KINDS))
    past: list[Question] = []
    while len(past) < _ORDER.count(True):
        kind = str(kinds[0])
        kinds = [*kinds[1:], kinds[0]]
        made = past_question(kind, labels, rng)
        if made is not None:
            past.append(Question(kind, made.question, made.answer, past=True))
    present = [Question("present", *own[index]) for index in rng.choice(len(own), _ORDER.count(False))]
    return [past.pop(0) if is_past else present.pop(0) for is_past in _ORDER]


class _Row(BaseModel):
    """One line of a user's data set. A `video` (or picture) is relative to the file."""

    model_config = ConfigDict(extra="forbid")
    video: str
    question: str
    answer: str
    time: float | None = None
    kind: str = "question"
    past: bool = False


def _json_lines(path: Path, limit: int | None) -> Iterator[Clip]:
    if not path.is_file():
        raise DatasetError(
            f"there is no data set {str(path)!r}.",
            fix="Use easy-vqa, easy-vqa-stream, or a file of JSON lines with video, question, answer and maybe time.",
        )
    by_video: dict[str, list[Question]] = {}
    lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not lines:
        raise DatasetError(f"{path} has no rows.")
    for number, line in lines[:limit]:
        row = _parse(path, number, line)
        question = Question(row.kind, row.question, row.answer, row.past, row.time)
        by_video.setdefault(row.video, []).append(question)
    return iter([Clip(path.parent / video, questions) for video, questions in by_video.items()])


def _parse(path: Path, number: int, line: str) -> _Row:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{path} line {number} is not JSON: {error}.") from None
    try:
        return _Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the row"
        raise DatasetError(
            f"{path} line {number}: {where}: {first['msg']}.",
            fix='A row looks like {"video": "clip.mp4", "question": "...", "answer": "...", "time": 12.5}.',
        ) from None
