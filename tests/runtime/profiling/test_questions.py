"""Questions of a profile: read from a file, or the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepsight.runtime.profiling.questions import Put, read_questions, shipped_clip
from keepsight.streams import Source
from keepsight.streams.errors import UsageError


def test_lines_and_json_lines_are_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text('what is this?\n\n{"question": "what was first?", "mode": "standing"}\n  {"question": "and then?"} \n')
    assert read_questions(file) == [Put("what is this?"), Put("what was first?", "standing"), Put("and then?")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n \n", "has no question"),
        ('{"question": "a", "mode": "later"}', "line 1: mode"),
        ('ok?\n{"question": "a"', "line 2: the line"),
        ('{"quest": "a"}', "line 1: question"),
        ('{"question": " "}', "line 1: the question is empty"),
    ],
)
def test_a_file_that_makes_no_sense_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "questions.txt"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_questions(file)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_can_not_be_read_is_told(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "questions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="can't be read as text"):
        read_questions(file)


def test_the_shipped_clip_is_the_same_every_time(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    found = []
    for folder in folders:
        folder.mkdir()
        path, questions = shipped_clip(folder, fps=4.0, size=64)
        with Source(path) as source:
            found.append(([frame.image.tobytes() for frame in source], questions))
    assert found[0] == found[1]
    pictures, questions = found[0]
    assert len(pictures) > 80
    assert [put.mode for put in questions].count("standing") == 1 and len(questions) == 8
