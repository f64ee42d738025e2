"""Data sets ask what they should, when they should, and refuse what can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from keepsight.runtime.evaluation.datasets import Clip, Question, open_dataset
from keepsight.runtime.evaluation.evaluate import Result, evaluate, summary
from keepsight.streams import Source, write_video
from keepsight.streams.errors import DatasetError, UsageError

STREAM = {"scenes": 3, "fps": 4.0, "size": 48}


def _streams(limit: int, seed: int = 0) -> list[tuple[int, list[Question]]]:
    """Frames and questions of each clip; a clip's file is gone when the next one comes."""
    made = []
    for clip in open_dataset("easy-vqa-stream", limit=limit, seed=seed, **STREAM):  # type: ignore[arg-type]
        with Source(clip.path) as source:
            made.append((sum(1 for _ in source), clip.questions))
    return made


def test_streams_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    assert _streams(10) == _streams(10)
    assert _streams(10) != _streams(10, seed=1)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 11, 13])
def test_limit_counts_questions_and_two_thirds_are_about_the_past(limit: int) -> None:
    questions = [question for _, asked in _streams(limit) for question in asked]
    assert len(questions) == limit
    assert sum(question.past for question in questions) >= 2 * limit / 3


def test_easy_vqa_asks_as_many_test_questions_as_it_should() -> None:
    clips = list(open_dataset("easy-vqa", limit=50, seed=3, **STREAM))  # type: ignore[arg-type]
    assert sum(len(clip.questions) for clip in clips) == 50
    assert all(clip.path.is_file() and clip.path.parts[-3] == "test" for clip in clips)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "no rows"),
        ("{", "line 1 is not JSON"),
        ('{"video": "a.mp4", "question": "?"}', "line 1: answer"),  # a missing field
        ('{"video": "a.mp4", "question": "?", "answer": "x", "when": 1}', "line 1: when"),  # an unknown one
        ('{"video": "a", "question": "?", "answer": "x"}\n[]', "line 2"),  # not an object
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=complaint):
        list(open_dataset(str(path), limit=None, seed=0, **STREAM))  # type: ignore[arg-type]


def test_unknown_names_and_empty_limits_are_refused() -> None:
    with pytest.raises(DatasetError, match="no data set 'nonesuch'"):
        open_dataset("nonesuch", limit=None, seed=0, **STREAM)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--limit 0"):
        open_dataset("easy-vqa", limit=0, seed=0, **STREAM)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no past"):
        open_dataset("easy-vqa-stream", limit=9, seed=0, scenes=1, fps=4.0, size=48)


class _Recorder:
    """Stands in for a session: answers with the time of the newest frame."""

    def __init__(self) -> None:
        self.now: float | None = None
        self.put: list[str] = []

    def forget(self) -> None:
        self.now = None

    def stand(self, question: str) -> str:
        self.put.append(question)
        return question

    def source(self, path: str) -> Source:
        return Source(path)

    def see(self, frame: object) -> None:
        self.now = frame.time_s  # type: ignore[attr-defined]

    def ask(self, question: str) -> object:
        return type("Stream", (), {"result": type("Answer", (), {"text": f"{self.now}"})})


@pytest.mark.parametrize("mode", ["standing", "replay"])
def test_each_question_is_asked_at_its_time(tmp_path: Path, mode: str) -> None:
    video = tmp_path / "clip.mp4"
    write_video(video, [np.full((32, 32, 3), 20 * index, np.uint8) for index in range(8)], fps=4)
    rows = [("end", None), ("middle", 1.0), ("between", 1.1), ("late", 99.0)]
    own = tmp_path / "own.jsonl"
    own.write_text(
        "\n".join(json.dumps({"video": "clip.mp4", "question": q, "answer": "x", "time": t}) for q, t in rows)
    )
    recorder = _Recorder()
    clips = open_dataset(str(own), limit=None, seed=0, **STREAM)  # type: ignore[arg-type]
    results = evaluate(recorder, clips, mode)  # type: ignore[arg-type]
    assert {row.question.text: float(row.answer) for row in results} == {
        "middle": 1.0, "between": 1.0, "end": 1.75, "late": 1.75,
    }  # fmt: skip
    assert bool(recorder.put) == (mode == "standing")


def test_the_summary_counts_what_was_right() -> None:
    asked = [("first", True, "red", "Red "), ("first", True, "blue", "red"), ("present", False, "red", "red")]
    report = summary(Result(Question(kind, "?", right, past), said) for kind, past, right, said in asked)
    assert report == {
        "accuracy": 0.6667, "n": 3, "past": 0.5, "present": 1.0, "majority": 0.6667,
        "by_kind": {"first": {"accuracy": 0.5, "n": 2}, "present": {"accuracy": 1.0, "n": 1}},
    }  # fmt: skip
    assert Clip(Path("x"), []) == Clip(Path("x"), [])


def test_a_summary_without_questions_about_the_past_says_so() -> None:
    assert summary([Result(Question("shape", "?", "circle"), "circle")])["past"] is None
