"""Standing questions: told when answers change, at exact frames, and never in the way of a live stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime import Bundle, Session
from keepsight.runtime.cli import app
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.datasets import stream_clip
from keepsight.runtime.evaluation.easyvqa import Picture
from keepsight.runtime.evaluation.scenes import Scene
from keepsight.runtime.live import watch as watching
from keepsight.runtime.standing import (
    Change,
    Question,
    StandingQuestions,
    follow_camera,
    follow_file,
    parse_question,
)
from keepsight.runtime.storage.resume import after
from keepsight.streams import Event, Frame, SourceURI, write_video
from keepsight.streams.errors import SourceNotFoundError, UsageError

from ..random_bundle import random_frames

FPS, HOLD = 4.0, 8  # the rate of keepsight-tiny; a scene lasts 2 s
SHOWN = [("circle", "blue"), ("triangle", "red"), ("rectangle", "green"), ("circle", "yellow")]
COLOR, SEEN = "what color is the shape?", "has there been a triangle?"
EVERY_S = 1.1  # no multiple of a frame's time


def picture(shape: str, color: str) -> Picture:
    return next(one for one in easyvqa.pictures("test") if (one.shape, one.color) == (shape, color))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes of 2 s with cuts between them, as an encoded video."""
    path = tmp_path_factory.mktemp("scenes") / "scenes.mp4"
    scenes = [Scene(picture(*label), HOLD, 0) for label in SHOWN]
    stream_clip(scenes, path, np.random.default_rng(0), fps=FPS, size=224)
    return path


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(Bundle.open("tiny"), threads=1) as opened:
        yield opened


def run(*arguments: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The changes and the summary that the command prints."""
    result = CliRunner().invoke(app, ["watch", *map(str, arguments), "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    *changes, summary = map(json.loads, result.stdout.splitlines())
    assert all(change["event"] == "change" for change in changes) and summary["event"] == "summary"
    return changes, summary


def due_frames(count: int, every_s: float) -> list[float]:
    """By the description: the first frame at or after each multiple of the interval, and the last frame."""
    times, due, multiple = [index / FPS for index in range(count)], [], 0
    for time_s in times:
        if time_s >= multiple * every_s - 1e-9:
            due.append(time_s)
            while multiple * every_s <= time_s + 1e-9:
                multiple += 1
    return due if due[-1] == times[-1] else [*due, times[-1]]


def answers_at(changes: list[dict[str, Any]], text: str, times: list[float]) -> list[str]:
    """What a question was last told to be answered with at each of these moments."""
    mine = [change for change in changes if change["text"] == text]
    return [[change["answer"] for change in mine if change["time_s"] <= time_s][-1] for time_s in times]


@pytest.fixture(scope="module")
def watched(clip: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run(clip, "--question", COLOR, "--question", f"{SEEN} [no|yes]", "--every", str(EVERY_S))


def test_an_answer_is_told_when_what_is_seen_changes_it(watched: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    changes, summary = watched
    cuts = [HOLD * index / FPS for index in range(len(SHOWN))]
    told = [(change["time_s"], change["answer"]) for change in changes if change["question"] == 1]
    assert [answer for _, answer in told] == [color for _, color in SHOWN]
    assert all(cut <= time_s <= cut + EVERY_S + 1 / FPS for cut, (time_s, _) in zip(cuts, told, strict=True))
    seen = [(change["time_s"], change["answer"], change["previous"]) for change in changes if change["question"] == 2]
    assert [row[1:] for row in seen] == [("no", None), ("yes", "no")]
    assert cuts[1] <= seen[1][0] <= cuts[1] + EVERY_S + 1 / FPS
    assert all((change["probability"] is None) == (change["question"] == 1) for change in changes)
    assert all(0.5 < change["probability"] <= 1 for change in changes if change["question"] == 2)
    rounds = len(due_frames(len(SHOWN) * HOLD, EVERY_S))
    assert summary == {
        "event": "summary", "frames": len(SHOWN) * HOLD, "frames_dropped": 0, "rounds": rounds, "rounds_dropped": 0,
        "answers": 2 * rounds, "changes": len(changes),
    }  # fmt: skip


def test_at_every_round_the_answer_is_that_of_ask_when(
    watched: tuple[list[dict[str, Any]], dict[str, Any]], clip: Path, session: Session
) -> None:
    times = due_frames(len(SHOWN) * HOLD, EVERY_S)
    assert {change["time_s"] for change in watched[0]} <= set(times)
    expected = []
    for time_s in times:
        session.forget()
        color, seen = session.stand(COLOR), session.stand(SEEN)
        with session.source(str(clip)) as source:
            watching.watch_until(session, source, until_s=time_s)  # what `ask --when` does
        assert session.time_s == time_s
        expected.append((session.ask(color).result.text, session.rank(seen, ("yes", "no")).best.option))
    assert list(zip(*(answers_at(watched[0], text, times) for text in (COLOR, SEEN)), strict=True)) == expected


def test_the_ask_command_says_the_same_at_a_change(
    watched: tuple[list[dict[str, Any]], dict[str, Any]], clip: Path
) -> None:
    last = [change for change in watched[0] if change["question"] == 1][-1]
    arguments = ["ask", str(clip), COLOR, "--when", str(last["time_s"]), "--threads", "1", "--json"]
    answer = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (answer["text"], answer["time_s"], answer["frames_seen"]) == (last["answer"], last["time_s"], last["frames_seen"])


def test_the_order_of_the_questions_changes_no_answer(
    watched: tuple[list[dict[str, Any]], dict[str, Any]], clip: Path
) -> None:
    changes, _ = run(clip, "--question", f"{SEEN} [no|yes]", "--question", COLOR, "--every", str(EVERY_S))
    for text in (COLOR, SEEN):
        mine, other = (
            [(row["time_s"], row["answer"], row["probability"]) for row in rows if row["text"] == text]
            for rows in (watched[0], changes)
        )
        assert mine == other


def test_people_read_the_time_the_question_and_the_answer(clip: Path) -> None:
    arguments = ["watch", str(clip), "--question", f"{SEEN} [no|yes]", "--seconds", "1", "--every", "0", "--threads", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith(f"     0.00 s  1. {SEEN}  no (") and result.stdout.count("\n") == 1
    assert result.stderr.strip() == "5 frames (0 dropped), 5 answers in 5 rounds (0 dropped), 1 changes"


def test_what_all_questions_share_is_computed_once_a_frame(session: Session) -> None:
    counts = dict.fromkeys(("vision", "visual_kv", "step"), 0)
    session.forget()
    StandingQuestions(session, [Question(COLOR), Question(SEEN), Question(COLOR)], lambda change: None)
    engines = session.qformer._engines
    graphs = dict(engines._graphs)  # type: ignore[attr-defined]
    try:
        for name in counts:
            engines._graphs[name] = _Counted(graphs[name], counts, name)  # type: ignore[attr-defined]
        for index, image in enumerate(random_frames(3, size=224)):
            session.see(Frame(image, float(index), 0.0, index))
    finally:
        engines._graphs.update(graphs)  # type: ignore[attr-defined]
    assert counts == {"vision": 3, "visual_kv": 3, "step": 9}


class _Counted:
    """An engine that counts its runs."""

    def __init__(self, engine: Any, counts: dict[str, int], name: str) -> None:
        self._engine, self._counts, self._name = engine, counts, name

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "enqueue"):
            self._counts[self._name] += 1
        return getattr(self._engine, name)


# -- live ----------------------------------------------------------------------------------------------------------


def test_frames_do_not_wait_for_answers_and_the_newest_state_is_asked_about(
    session: Session, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two answers take until two more frames have been seen: they are, and only the newest is asked about next."""
    session.forget()
    told: list[Change] = []
    standing = StandingQuestions(session, [Question(COLOR)], told.append, every_s=1 / FPS)
    asked, honest = [], session.ask

    def slow(*arguments: Any, **options: Any) -> Any:
        newest = session.frames_seen
        answers = honest(*arguments, **options)
        assert answers.result.frames_seen >= newest
        asked.append(answers.result.frames_seen)
        patience = time.monotonic() + 20
        while len(asked) <= 2 and session.frames_seen < newest + 2:
            assert time.monotonic() < patience, "frames wait for an answer"
            time.sleep(0.01)
        return answers

    monkeypatch.setattr(session, "ask", slow)
    follow_camera(standing, str(clip), until_s=3.0)
    summary = standing.summary
    assert len(set(asked)) == len(asked) == summary.rounds  # nothing is asked twice about the same moment
    assert asked[1] >= asked[0] + 2 and asked[2] >= asked[1] + 2
    assert summary.rounds_dropped >= 2 and summary.frames >= asked[2] and told[0].previous is None


def test_a_round_is_behind_while_one_of_its_answers_has_not_seen_the_newest_frame(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that comes between two answers of a round: the first has not seen it, and the next round is not in vain."""
    session.forget()
    images = random_frames(3, size=224)
    standing = StandingQuestions(session, [Question(COLOR), Question(SEEN)], lambda change: None)
    session.see(Frame(images[0], 0.0, 0.0, 0))
    assert standing.behind
    standing.ask()
    assert not standing.behind
    session.see(Frame(images[1], 1.0, 1.0, 1))
    assert standing.behind
    honest = session.ask

    def overtaken(*arguments: Any, **options: Any) -> Any:
        answers = honest(*arguments, **options)
        if session.frames_seen == 2:
            session.see(Frame(images[2], 2.0, 2.0, 2))
        return answers

    monkeypatch.setattr(session, "ask", overtaken)
    standing.ask()
    assert standing.behind
    standing.ask()
    assert not standing.behind


def test_live_rounds_are_as_far_apart_as_offline(
    session: Session, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that plays as a camera: at the first frame seen in each second, and once more at the last; which frames those
    are depends on the machine's speed."""
    session.forget()
    standing = StandingQuestions(session, [Question(COLOR)], lambda change: None, every_s=1.0)
    times: list[float] = []
    due: list[float] = []
    honest = standing.due

    def noted(frame: Frame) -> bool:
        times.append(frame.time_s)
        due.extend([frame.time_s] if (is_due := honest(frame)) else [])
        return is_due

    monkeypatch.setattr(standing, "due", noted)
    follow_camera(standing, str(clip), until_s=2.4)
    summary = standing.summary
    assert due == list({int(time_s + 1e-9): time_s for time_s in reversed(times)}.values())[::-1]
    assert summary.frames == len(times) and times[-1] >= 2.4 - 1 / FPS and summary.answers == summary.rounds >= 1
    assert len(due) <= summary.rounds + summary.rounds_dropped <= len(due) + 1


def test_a_camera_that_is_lost_is_opened_again_and_time_goes_on(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.forget()
    standing = StandingQuestions(session, [parse_question(f"{SEEN} [yes|no]")], lambda change: None, every_s=0.5)
    server = Path(__file__).parents[1] / "streams" / "rtsp_server.py"
    with subprocess.Popen([sys.executable, str(server), "0"], stdout=subprocess.PIPE, text=True) as camera:
        try:
            assert camera.stdout is not None
            port = int(camera.stdout.readline())
            follow_camera(standing, f"rtsp://127.0.0.1:{port}/short", until_s=3.0)  # it ends after 20 frames, 0.7 s
        finally:
            camera.kill()
    assert standing.summary.frames > 4 and session.time_s >= 3.0
    assert standing.summary.rounds >= 3
    told = capsys.readouterr().err
    assert "[lost] " in told and "the stream ended" in told and "[live] frames of 160x120 again" in told


def test_a_camera_that_is_unplugged_is_waited_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is gone is refused when it is opened, and not only when it is read."""
    session.forget()
    opened: list[SourceURI] = []

    def plugged_again_at_the_fourth_try(uri: SourceURI) -> None:
        opened.append(uri)
        if len(opened) in (2, 3):
            raise SourceNotFoundError("there is no camera.")

    monkeypatch.setattr("keepsight.streams.live.check_presence", plugged_again_at_the_fourth_try)
    standing = StandingQuestions(session, [parse_question(f"{SEEN} [yes|no]")], lambda change: None)
    follow_camera(standing, "test://ball?frames=15", until_s=1.5)
    assert len(opened) >= 4 and session.time_s >= 1.5


def test_one_failure_over_and_over_is_told_once() -> None:
    told: list[str] = []
    tell = watching.StateLines(told.append)
    lines = [
        ("connecting", "started"), ("live", "first frame after 0.1 s"),  # as it should be: nothing to tell
        ("lost", "it ended. Trying again at once."), ("connecting", "attempt 2"),
        ("lost", "no camera. Next try in 0.2 s."), ("connecting", "attempt 3"), ("lost", "no camera. Next try in 0.5 s."),
        ("connecting", "attempt 4"), ("connecting", "no frame yet after 2.4 s"), ("live", "frames again"),
    ]  # fmt: skip
    for t, (state, reason) in enumerate(lines):
        tell(Event(float(t), state, reason))  # type: ignore[arg-type]
    assert told == [
        "[lost] it ended. Trying again at once.", "[lost] no camera. Next try in 0.2 s.",
        "[connecting] no frame yet after 2.4 s", "[live] frames again",
    ]  # fmt: skip


def test_a_source_that_is_opened_again_goes_on_by_the_clock_of_its_captures() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    before = Frame(image, 7.0, 100.0, 28)
    again = [Frame(image, 0.25, 112.5, 0), Frame(image, 0.5, 112.75, 1)]
    assert [frame.time_s for frame in after(before, again)] == [19.5, 19.75]


def test_ctrl_c_ends_with_a_summary() -> None:
    """As a person presses it: the process gets SIGINT while it watches, tells what it has done, and leaves with 0."""
    command = [sys.executable, "-m", "keepsight.runtime.cli", "watch", "test://ball", "--question", COLOR, "--threads", "1"]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that: not what a person has.
    with subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, complaint = process.communicate(timeout=30)
    summary = json.loads(rest.splitlines()[-1])
    assert process.returncode == 0 and "Traceback" not in complaint
    assert first["event"] == "change" and summary["event"] == "summary"
    assert summary["frames"] >= 1 and summary["answers"] >= 1


# -- what may be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "question"),
    [
        ("is it dark?", Question("is it dark?")),
        ("is it dark? [yes|no]", Question("is it dark?", ("yes", "no"))),
        ("  who? [ Ann |Bob, or Eve]  ", Question("who?", ("Ann", "Bob, or Eve"))),
        ("what is on [the] table?", Question("what is on [the] table?")),
    ],
)
def test_questions_and_their_options(spelling: str, question: Question) -> None:
    assert parse_question(spelling) == question


@pytest.mark.parametrize("spelling", ["", " ", "[yes|no]", "dark? [yes]", "dark? []", "dark? [yes|]", "dark? [no|no]"])
def test_what_is_no_question_is_refused(spelling: str) -> None:
    with pytest.raises(UsageError):
        parse_question(spelling)


def test_refused_before_anything_is_loaded() -> None:
    result = CliRunner().invoke(app, ["watch", "test://ball", "--question", "dark? [yes]", "--bundle", "nowhere"])
    assert isinstance(result.exception, UsageError) and "at least two" in str(result.exception)


def test_intervals_and_lists_that_make_no_sense(session: Session) -> None:
    with pytest.raises(UsageError, match="nothing to ask"):
        StandingQuestions(session, [], print)
    for every_s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError):
            StandingQuestions(session, [Question("why?")], print, every_s=every_s)


def test_a_file_without_a_frame_up_to_there_is_no_success(session: Session, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4, fps=4)
    session.forget()
    standing = StandingQuestions(session, [Question(COLOR)], lambda change: None)
    with session.source(str(tmp_path / "clip.mp4")) as source:
        follow_file(standing, source, until_s=0.5)
    assert standing.summary.frames == 3
    session.forget()
    closed = session.source(str(tmp_path / "clip.mp4"))
    closed.close()
    with pytest.raises(UsageError, match="no frame"):
        follow_file(StandingQuestions(session, [Question(COLOR)], print), closed)
