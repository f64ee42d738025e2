"""A question about an interval reads what overlaps it and nothing else; cameras have wall time; so do the commands."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.answer import NOTHING_REMEMBERED
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.datasets import picture_pixels, stream_clip
from keepsight.runtime.evaluation.scenes import Scene, plan_scenes, render
from keepsight.runtime.memory_picture import slot_at
from keepsight.runtime.positions import ranks
from keepsight.runtime.qformer import QFormer
from keepsight.runtime.session import Session
from keepsight.runtime.show import show_answer, show_timeline
from keepsight.runtime.timeline import Interval, seen_within
from keepsight.streams import Frame
from keepsight.streams.errors import UsageError

from ..random_bundle import make_bundle, random_frames
from .test_cli import keepsight

COLOR = "what color is the shape?"


@pytest.fixture(scope="module")
def qformer(tmp_path_factory: pytest.TempPathFactory) -> QFormer:
    return QFormer(Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle"), layers=3)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 14), start=st.floats(-1, 14), width=st.floats(0, 10))
def test_masks_never_attend_outside_the_interval(
    qformer: QFormer, seed: int, count: int, start: float, width: float
) -> None:
    """Rank and attention, and nothing that a hidden slot holds reaches the answer."""
    bank, rng = qformer.bank, np.random.default_rng(seed)
    bank.reset()
    times = np.cumsum(rng.uniform(0.2, 1.5, count))
    for features, time_s in zip(qformer.encode(random_frames(count, seed=seed)), times, strict=True):
        qformer.remember(features, float(time_s))
    interval, prompt = Interval(start, start + width), qformer.prompt("what was there first?")
    visible = seen_within(bank, interval)
    if not visible.any():
        with pytest.raises(UsageError, match="No slot"):
            qformer.replay(prompt, visible)
        return
    outside = ~(bank.visible[0] & (bank.last_s[0] >= interval.start_s) & (bank.first_s[0] <= interval.end_s))
    assert (ranks(bank, visible)[outside] == -1).all()
    said = qformer.replay(prompt, visible)
    assert said.attention is not None
    assert (said.attention[:, outside] == 0).all()
    assert said.attention.sum((1, 2)) == pytest.approx(1, abs=1e-5)
    hidden = {name: rider.copy() for name, rider in bank.riders.items()}
    for rider in bank.riders.values():
        rider[:, outside] = 50 - rider[:, outside]
    again = qformer.replay(prompt, visible)
    for name, rider in bank.riders.items():
        rider[:] = hidden[name]
    assert np.array_equal(again.rows, said.rows) and np.array_equal(again.query_output, said.query_output)


def test_an_interval_that_holds_everything_changes_nothing(qformer: QFormer) -> None:
    qformer.bank.reset()
    for time_s, features in enumerate(qformer.encode(random_frames(12))):
        qformer.remember(features, float(time_s))
    prompt = qformer.prompt("what was there first?")
    whole = qformer.replay(prompt, seen_within(qformer.bank, Interval(0, 11)))
    assert np.array_equal(whole.rows, qformer.replay(prompt).rows)


def test_a_question_about_an_interval_equals_one_put_to_a_memory_of_its_frames_alone(qformer: QFormer) -> None:
    """While nothing has been merged: the positions, too, are those of the slots that are read."""
    frames = qformer.encode(random_frames(5))
    prompt = qformer.prompt("what was there first?")
    said = []
    for shown in (frames, frames[1:4]):
        qformer.bank.reset()
        for time_s, features in enumerate(shown, start=0 if len(shown) == 5 else 1):
            qformer.remember(features, float(time_s))
        said.append(qformer.replay(prompt, seen_within(qformer.bank, Interval(1, 3))).rows)
    assert np.abs(said[0] - said[1]).max() < 1e-5


# -- the shipped model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return plan_scenes(easyvqa.pictures("test"), 8, np.random.default_rng(1))


@pytest.fixture(scope="module")
def session(scenes: list[Scene]):
    with Session(Bundle.open("tiny"), threads=1) as opened:
        rng = np.random.default_rng(1)
        for index, image in enumerate(render(scenes, [picture_pixels(scene.picture) for scene in scenes], 224, rng)):
            opened.see(Frame(image, index / 4, time.monotonic(), index))
        yield opened


def test_an_answer_about_an_interval_is_about_what_was_shown_then(session: Session, scenes: list[Scene]) -> None:
    begin = 0.0
    right = 0
    for scene in scenes:
        interval = Interval(begin + 0.25, begin + (scene.hold - 2) / 4)
        begin += (scene.hold + scene.fade) / 4
        answer = session.ask(COLOR, interval=interval).result
        right += answer.text == scene.picture.color
        assert answer.interval == interval and answer.mode == "replay"
        assert answer.evidence is not None
        for moment in answer.evidence.moments:
            assert interval.start_s - 1e-9 <= moment.start_s <= moment.end_s <= interval.end_s + 1e-9
    assert right > len(scenes) / 2


def test_an_answer_shows_the_scene_that_it_is_about(session: Session, scenes: list[Scene]) -> None:
    answer = session.ask(COLOR).result
    assert answer.text == scenes[-1].picture.color
    assert answer.evidence is not None
    newest = Interval(session.time_s - scenes[-1].hold / 4, session.time_s)
    assert newest.holds(answer.evidence.moments[0].start_s) and newest.holds(answer.evidence.frames[0].time_s)


def test_nothing_remembered_is_an_answer_that_says_what_is(session: Session) -> None:
    answer = session.ask(COLOR, interval=Interval(100, 200)).result
    assert answer.finish == NOTHING_REMEMBERED and answer.text == "nothing remembered from then"
    assert answer.remembered == (Interval(0.0, session.time_s),)
    assert "".join(session.ask(COLOR, interval=Interval(100, 200))) == answer.text
    assert json.loads(json.dumps(answer.as_dict()))["remembered"][0]["start_s"] == 0


def test_a_standing_question_is_not_limited_and_has_evidence_when_asked_for_it(session: Session) -> None:
    standing = session.stand(COLOR)
    session.see(Frame(np.zeros((224, 224, 3), np.uint8), session.time_s + 0.25, time.monotonic(), 0))
    with pytest.raises(UsageError, match="standing question"):
        session.ask(standing, interval=Interval(0, 1))
    assert session.ask(standing).result.evidence is None
    answer = session.ask(standing, evidence=True).result
    assert answer.evidence is not None and answer.evidence.moments and answer.mode == "standing"
    session.drop(standing)


def test_a_bundle_that_does_not_tell_where_it_looked_gives_answers_without_evidence(
    session: Session, tmp_path: Path, monkeypatch, capsys
) -> None:
    replay = session.qformer._engines["replay"]
    run = replay.run
    monkeypatch.setattr(replay, "run", lambda feeds: {k: v for k, v in run(feeds).items() if k != "attention"})
    answer = session.ask(COLOR).result
    assert answer.evidence is None and answer.as_dict()["evidence"] is None
    show_answer(session.ask(COLOR), tmp_path, as_json=False)
    shown = capsys.readouterr()
    assert shown.out == f"{answer.text}\n" and "no evidence: " in shown.err


def test_forgetting_forgets_pictures_and_times(tmp_path: Path) -> None:
    with Session(Bundle.open(make_bundle(tmp_path / "bundle"))) as session:
        session.see(Frame(np.zeros((24, 24, 3), np.uint8), 0.0, 0.0, 0), wall_s=1e9)
        assert len(session.key_frames) == 1 and session.clock.dated
        session.forget()
        assert len(session.key_frames) == 0 and not session.clock.dated


def test_a_camera_that_comes_back_goes_on_in_the_same_time(tmp_path: Path) -> None:
    """A source of its own begins at 0 again; the memory's time has gone on meanwhile."""
    with Session(Bundle.open(make_bundle(tmp_path / "bundle"))) as session:
        for _ in range(2):
            with session.watch(session.source("test://ball")) as watcher:
                watcher.wait(session.frames_seen + 2)
            time.sleep(0.3)
        first, last = np.nanmin(session.qformer.bank.first_s), np.nanmax(session.qformer.bank.last_s)
        assert session.frames_seen >= 4 and last - first > 0.3
        now = session.clock.wall_s(session.time_s)
        assert now is not None and abs(now - time.time()) < 5


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, scenes: list[Scene]) -> Path:
    path = tmp_path_factory.mktemp("clip") / "scenes.mp4"
    stream_clip([*scenes[:3], replace(scenes[3], fade=0)], path, np.random.default_rng(2), fps=4, size=224)
    return path


def test_ask_about_an_interval_with_evidence(clip: Path, tmp_path: Path, scenes: list[Scene]) -> None:
    options = ("--between", "0.5", "1.5", "--evidence", tmp_path / "seen", "--threads", "1", "--json")
    result = keepsight("ask", clip, COLOR, *options)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["mode"], answer["text"]) == ("replay", scenes[0].picture.color)
    assert (answer["interval"]["start_s"], answer["interval"]["end_s"], answer["interval"]["start"]) == (0.5, 1.5, None)
    assert answer["evidence"]["spans"]
    for frame in answer["evidence"]["frames"]:
        assert Path(frame["file"]).read_bytes()[:2] == b"\xff\xd8"


def test_ask_about_a_time_of_which_nothing_is_remembered(clip: Path) -> None:
    result = keepsight("ask", clip, COLOR, "--at", "0:01", "--memory", "last", "--threads", "1")
    assert result.returncode == 0 and result.stdout == "nothing remembered from then\n"
    assert result.stderr.startswith("remembered: 0:")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--at", "5", "--mode", "standing"), "--mode replay"),
        (("--at", "5", "--since", "3s"), "exclude"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_watched(
    clip: Path, options: tuple[str, ...], says: str
) -> None:
    result = keepsight("ask", clip, COLOR, *options)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_run_takes_an_interval_before_a_typed_question() -> None:
    typed = f"/since 1h {COLOR}\n/at noon {COLOR}\n/since\n"
    result = keepsight("run", "test://ball", "--threads", "1", stdin=typed)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) == 1
    assert "--at 'noon' is no time" in result.stderr and "has no question" in result.stderr and "looked at" in result.stderr


def test_memory_shows_and_draws_what_is_remembered(clip: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ("--png", tmp_path / "memory.png", "--key-frames", tmp_path / "frames")
    report = json.loads(keepsight("memory", clip, *options, "--json").stdout)
    assert len(report["slots"]) == 11 and report["tokens"] == 49
    assert report["slots"][0]["start_s"] == 0
    assert sum(row["least"] for row in report["slots"]) <= report["frames_seen"] <= sum(row["most"] for row in report["slots"])
    assert len(list((tmp_path / "frames").iterdir())) == len(report["key_frames"]) > 5
    with Image.open(tmp_path / "memory.png") as image:
        assert image.size[0] == 1200 and len(image.getcolors(1 << 20)) > 50


def test_the_table_of_a_memory_has_a_row_for_each_slot(session: Session, tmp_path: Path, capsys) -> None:
    show_timeline(session)
    shown = capsys.readouterr().out
    assert "0:00.0" in shown and shown.count("%") == session.qformer.bank.used and "visual tokens" in shown
    with pytest.raises(UsageError, match="can't be written"):
        show_timeline(session, png=tmp_path)


def test_the_memory_of_a_camera_is_dated(tmp_path: Path) -> None:
    report = json.loads(keepsight("memory", "test://ball", "--seconds", "1", "--json").stdout)
    start = datetime.fromisoformat(report["slots"][0]["start"])
    assert abs(start.timestamp() - time.time()) < 60 and report["clock_jumps"] == 0


def test_every_pixel_of_a_drawing_is_the_slot_that_covers_its_moment(session: Session) -> None:
    bank = session.qformer.bank
    times = np.linspace(-1, session.time_s + 1, 57)
    drawn = slot_at(bank, times, 0.125)
    for token in range(bank.tokens):
        for column, moment in enumerate(times):
            spans = zip(bank.first_s[0, :, token], bank.last_s[0, :, token], strict=True)
            covering = [slot for slot, (first, last) in enumerate(spans) if first - 0.125 <= moment <= last + 0.125]
            newest = max(covering, key=lambda slot: bank.first_s[0, slot, token], default=-1)
            assert drawn[token, column] == newest
