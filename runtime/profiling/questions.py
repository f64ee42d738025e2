"""The questions of a profile, from a file; and the clip and the questions that a profile takes when none are given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from keepsight.runtime.answer import Mode
from keepsight.streams.errors import UsageError

__all__ = ["CLIP_SIZE", "WARM_UP", "Put", "read_questions", "shipped_clip"]

CLIP_SIZE = 720
"""Rows and columns of the shipped clip's pictures: decoding and scaling are then about those of a 720p camera."""

WARM_UP = "what is this?"
"""Asked before the others, and not counted: the template's own rows are then prefilled, as they are after any question."""

_SCENES, _SEED = 14, 0


@dataclass(frozen=True)
class Put:
    """A question, and how it is put: carried along from the first frame, or asked at the end by replay."""

    text: str
    mode: Mode = "replay"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: str
    mode: Mode = "replay"


def read_questions(path: Path) -> list[Put]:
    """Questions of a file: one a line, as text, or as JSON with `question` and perhaps `mode`.

    Raises:
        UsageError: it can't be read, has no question, or a line that makes no sense.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read as text ({error}).", fix="Give a file with one question a line.") from error
    questions = [_parsed(path, number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UsageError(f"{path} has no question.", fix="Write one a line.")
    return questions


def _parsed(path: Path, number: int, line: str) -> Put:
    if not line.startswith("{"):
        return Put(line)
    try:
        values: Any = json.loads(line)
        row = _Row.model_validate(values)
    except (ValueError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the line"
        raise UsageError(
            f"{path} line {number}: {where}: {first['msg']}.",
            fix='A line is a question, or {"question": "...", "mode": "standing"} or "replay".',
        ) from None
    if not row.question.strip():
        raise UsageError(f"{path} line {number}: the question is empty.", fix="Ask something.")
    return Put(row.question, row.mode)


def shipped_clip(folder: Path, *, fps: float, size: int = CLIP_SIZE) -> tuple[Path, list[Put]]:
    """The demo's kind of show: the same scenes every time, as a video, and questions about all of it, the first one standing.

    Args:
        folder: where the video is written.
        fps: one frame for each that the bundle samples.

    Raises:
        MissingComponentError: the pictures, `easy-vqa`, are not installed.
    """
    from keepsight.runtime.evaluation import easyvqa
    from keepsight.runtime.evaluation.datasets import stream_clip, stream_questions
    from keepsight.runtime.evaluation.scenes import plan_scenes

    rng = np.random.default_rng(_SEED)
    scenes = plan_scenes(easyvqa.pictures("test"), _SCENES, rng)
    last = scenes[-1].picture.path
    own = [(row.question, row.answer) for row in easyvqa.load("test") if row.picture.path == last]
    questions = [question.text for question in stream_questions(scenes, own, rng)]
    path = folder / "clip.mp4"
    stream_clip(scenes, path, rng, fps=fps, size=size)
    return path, [Put(text, "standing" if index == 0 else "replay") for index, text in enumerate(questions)]
