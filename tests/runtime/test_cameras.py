"""Several cameras in one process: each is remembered and asked as if it were alone, whatever becomes of the others."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.live import cameras_run
from keepsight.runtime.live.cameras import CameraWatcher
from keepsight.runtime.live.cameras_run import addressed, folders, parse_cameras
from keepsight.runtime.live.gate import FrameGate
from keepsight.runtime.live.side import beside_each
from keepsight.runtime.memory import Policy
from keepsight.runtime.session import Session
from keepsight.runtime.storage.feature_history import is_feature_log
from keepsight.runtime.storage.snapshot import Snapshot
from keepsight.streams import Frame, LiveSource
from keepsight.streams.capture import Arrivals
from keepsight.streams.errors import EngineError, KeepsightError, NoFrameError, SourceNotFoundError, UsageError
from keepsight.streams.events import Event, State
from keepsight.streams.recorded import segments_in

from ..random_bundle import IMAGE_SIZE, make_bundle, random_frames
from ..streams.conftest import RtspServer

QUESTION = "what was there first?"
NAMES = ("door", "yard", "gate")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def rtsp_server() -> Iterator[RtspServer]:
    server = RtspServer()
    yield server
    server.stop()


def frames_of(seed: int, count: int) -> list[Frame]:
    """Of one camera: other pictures and other moments than another seed's."""
    images = random_frames(count, seed=seed)
    return [Frame(image, (0.25 + 0.01 * seed) * t, time.monotonic(), t) for t, image in enumerate(images)]


def everything(session: Session) -> dict[str, Any]:
    """All that a session remembers, and what it says of it, as arrays and plain values."""
    snapshot = session.snapshot(kv=True)
    replayed, standing = session.perceive(QUESTION), session.perceive(session.standing[0])
    parts = {f"{part}.{name}": array for part, state in snapshot.parts.items() for name, array in state.items()}
    return {
        **{f"visual.{name}": array for name, array in snapshot.visual.items()},
        **{f"standing.{name}": array for name, array in snapshot.standing[0].items()},
        **parts, "attention": replayed.attention, "replay": replayed.rows, "asked": standing.rows,
        "time_s": np.float64(session.time_s), "frames": np.int64(session.frames_seen),
    }  # fmt: skip


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mbc", "fifo", "average", "last"])
def test_cameras_that_share_everything_are_remembered_bit_for_bit_as_in_sessions_of_their_own(
    bundle: Bundle, policy: Policy
) -> None:
    streams = {name: frames_of(seed, 20 + 3 * seed) for seed, name in enumerate(NAMES)}
    with Session(bundle, memory=policy) as first:
        together = {"door": first, "yard": first.beside(), "gate": first.beside()}
        for session in together.values():
            session.stand(QUESTION)
        waiting = {name: list(frames) for name, frames in streams.items()}
        rng = np.random.default_rng(5)
        while any(waiting.values()):  # in no order: what one leaves behind in the graphs, another finds
            name = rng.choice([name for name, frames in waiting.items() if frames])
            together[name].see(waiting[name].pop(0), wall_s=1e9 + len(waiting[name]))
        shared = {name: everything(session) for name, session in together.items()}
    for name, frames in streams.items():
        with Session(bundle, memory=policy) as alone:
            alone.stand(QUESTION)
            for left, frame in zip(reversed(range(len(frames))), frames, strict=True):
                alone.see(frame, wall_s=1e9 + left)
            assert_same(shared[name], everything(alone))


def test_a_frame_that_was_encoded_before_is_remembered_as_one_that_is_seen(bundle: Bundle) -> None:
    noted: list[int] = []
    with Session(bundle) as seeing, Session(bundle) as given:
        given.observe(lambda features, frame: noted.append(frame.index))
        for session in (seeing, given):
            session.stand(QUESTION)
        for frame in frames_of(0, 12):
            seen = seeing.see(frame, wall_s=1e9 + frame.time_s)
            cost = given.remember(frame, given.qformer.encode(frame.image[None])[0], wall_s=1e9 + frame.time_s, vision_ms=7.0)
            assert cost.vision_ms == 7.0 and min(seen.vision_ms, seen.memory_ms, cost.memory_ms) > 0
        assert noted == list(range(12))
        assert_same(everything(seeing), everything(given))


class Script:
    """A camera that shows given frames, each when the one before has been taken; then nothing."""

    state: State = "live"
    arrivals: Arrivals | None = None

    def __init__(self, frames: Sequence[Frame] = ()) -> None:
        self.events: list[Event] = []
        self.drops: Counter[str] = Counter()
        self._frames = list(frames)
        self._closed = threading.Event()

    def latest(self, timeout_s: float | None = None) -> Frame | None:
        if not self._frames:
            self._closed.wait(timeout_s or 0.1)
            return None
        return self._frames.pop(0)

    def close(self) -> None:
        self._closed.set()


def test_watched_together_they_answer_in_the_words_of_sessions_of_their_own() -> None:
    """Live, with the shipped bundle and its language model: what each session saw is seen again, by one session each."""
    tiny = Bundle.open("tiny")
    asked = ("what color is the shape?", "what shape was first?")
    uris = {"door": "test://ball?fps=30", "yard": "test://smpte?fps=30", "snow": "test://snow?fps=15"}
    seen: dict[str, list[Frame]] = {name: [] for name in uris}
    with Session(tiny, threads=1) as first:
        together = {"door": first, "yard": first.beside(), "snow": first.beside()}
        with CameraWatcher(together, uris, on_frame=lambda name, frame: seen[name].append(frame)) as watcher:
            watcher.wait(frames=5, timeout_s=60)
        assert all(abs((session.clock.wall_s(session.time_s) or 0) - time.time()) < 60 for session in together.values())
        states = {name: session.snapshot(kv=True) for name, session in together.items()}
        answers = {name: [session.ask(one).result.text for one in asked] for name, session in together.items()}
        for name, frames in seen.items():
            with Session(tiny, llm=first.llm) as alone:
                for frame in frames:
                    alone.see(frame)
                state = alone.snapshot(kv=True)
                assert state.frames_seen == states[name].frames_seen == len(frames) >= 5
                for key, array in state.visual.items():
                    np.testing.assert_array_equal(states[name].visual[key], array, err_msg=f"{name} {key}")
                assert [alone.ask(one).result.text for one in asked] == answers[name]
    assert len({answer for said in answers.values() for answer in said}) > 1, "all cameras were answered for alike"


def test_a_gate_and_a_forgotten_memory_are_of_one_camera(bundle: Bundle) -> None:
    grey = Frame(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 128, np.uint8), 1.0, time.monotonic(), 1)
    with Session(bundle, gate=FrameGate()) as door:
        yard, ungated = door.beside(gate=FrameGate()), door.beside()
        for session in (door, yard, ungated):
            session.see(frames_of(0, 1)[0], wall_s=1e9)
            session.stand(QUESTION)
        for session in (yard, ungated):
            session.see(grey)
        assert door.gate is not None and yard.gate is not None
        assert (door.gate.dropped.total(), yard.gate.dropped.total(), ungated.frames_seen) == (0, 1, 2)
        door.forget()
        assert [session.frames_seen for session in (door, yard, ungated)] == [0, 1, 2]
        assert [len(session.standing) for session in (door, yard, ungated)] == [0, 1, 1]
        assert [session.clock.dated for session in (door, yard)] == [False, True] and len(yard.key_frames) == 1


def test_a_restored_camera_goes_on_behind_the_gap_and_another_begins_at_0(bundle: Bundle, tmp_path: Path) -> None:
    old = frames_of(0, 4)
    with Session(bundle) as session:
        for frame in old:
            session.see(frame)
        session.save(tmp_path / "m")
    new = frames_of(3, 3)
    seen: dict[str, list[Frame]] = {"door": [], "yard": []}
    with Session(bundle) as door:
        door.restore(tmp_path / "m")
        sessions, uris = {"door": door, "yard": door.beside()}, {"door": "test://ball", "yard": "test://snow"}
        watcher = CameraWatcher(
            sessions, uris, on_frame=lambda name, frame: seen[name].append(frame), open_feed=lambda *_, **__: Script(new)
        )
        with watcher:  # on a busy machine a frame may give way to a newer one, but never the last one
            until(lambda: all(frames and frames[-1].index == 2 for frames in seen.values()))
            status = watcher.status("door")
            assert status.frames_seen == 4 + status.frames == 4 + len(seen["door"])
    assert all(frame.time_s == new[frame.index].time_s for frame in seen["yard"])
    first = new[seen["door"][0].index]
    behind_s = old[-1].time_s + first.captured_at - old[-1].captured_at
    assert seen["door"][0].time_s == pytest.approx(behind_s, abs=0.1)  # a restored moment is known by wall time
    assert all(
        frame.time_s - seen["door"][0].time_s == pytest.approx(new[frame.index].time_s - first.time_s) for frame in seen["door"]
    )


# -- faults ------------------------------------------------------------------------------------------------------------


def until(done: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_one_that_is_killed_and_one_that_hangs_are_not_felt_by_a_third_and_come_back(
    bundle: Bundle, rtsp_server: RtspServer
) -> None:
    other_server = RtspServer()
    try:
        events: dict[str, list[str]] = {name: [] for name in ("killed", "hangs", "good")}
        with Session(bundle) as first:
            sessions = {"killed": first, "hangs": first.beside(), "good": first.beside()}
            uris = {"killed": rtsp_server.url("/ball"), "hangs": other_server.url("/ball"), "good": "test://ball"}
            watcher = CameraWatcher(sessions, uris, on_event=lambda name, event: events[name].append(event.state))
            with watcher:
                watcher.wait(frames=4, timeout_s=30)
                rtsp_server.stop()
                other_server.process.send_signal(signal.SIGSTOP)
                begun, before = time.monotonic(), watcher.status("good").frames
                until(lambda: watcher.status("killed").state == "lost" and watcher.status("hangs").state in ("stalled", "lost"))
                until(lambda: time.monotonic() - begun > 3.5)
                good = watcher.status("good")
                assert good.frames - before > 3 and good.state == "live", good
                assert good.age_ms is not None and good.age_ms < 2000
                dead = watcher.status("killed")
                assert dead.age_ms is not None and dead.age_ms > 3000
                time.sleep(0.2)
                assert watcher.status("killed").fps < dead.fps, "of one that is gone the rate falls"
                kept = {name: session.frames_seen for name, session in sessions.items()}
                assert sessions["killed"].perceive(QUESTION).rows.shape == sessions["good"].perceive(QUESTION).rows.shape
                other_server.process.send_signal(signal.SIGCONT)
                rtsp_server.start()
                until(lambda: all(sessions[name].frames_seen > kept[name] + 2 for name in ("killed", "hangs")))
                times = sessions["killed"].qformer.bank.last_s
                assert np.nanmax(times) > 3, "time goes on over the gap"
                watcher.check()
            assert set(events["good"]) <= {"connecting", "live"} and {"lost", "live"} <= set(events["killed"])
    finally:
        other_server.process.send_signal(signal.SIGCONT)
        other_server.stop()


def test_a_memory_that_fails_gives_up_its_camera_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    with Session(bundle) as first:
        bad, good = first.beside(), first

        def failing(message: str) -> Callable[..., None]:
            def fail(frame: Frame, **_: Any) -> None:
                raise EngineError(message)

            return fail

        monkeypatch.setattr(bad, "see", failing("no such memory"))
        uris = {"bad": "test://ball?fps=30", "good": "test://ball?fps=30"}
        with CameraWatcher(
            {"bad": bad, "good": good}, uris, on_error=lambda name, error: told.append((name, str(error)))
        ) as watcher:
            until(lambda: good.frames_seen > 3)
            assert told == [("bad", "no such memory")] and watcher.running
            status = watcher.status("bad")
            assert (status.state, status.frames) == ("lost", 0) and isinstance(status.error, EngineError)
            watcher.check()
            with pytest.raises(EngineError, match="no such memory"):
                watcher.wait(timeout_s=1)
            monkeypatch.setattr(good, "see", failing("nor this one"))
            until(lambda: not watcher.running)
            with pytest.raises(EngineError, match="nor this one"):
                watcher.check()
    assert told == [("bad", "no such memory"), ("good", "nor this one")]


def test_what_is_not_there_is_waited_for_and_what_can_not_be_is_told(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Session(bundle) as first:
        port = silent.getsockname()[1]
        sessions = {"silent": first, "good": first.beside()}
        uris = {"silent": f"rtsp://127.0.0.1:{port}/x", "good": "test://ball"}
        with CameraWatcher(sessions, uris) as watcher:
            until(lambda: sessions["good"].frames_seen > 0)
            with pytest.raises(NoFrameError, match=r"silent \(connecting\) 0"):
                watcher.wait(timeout_s=0.2)
            begun = time.monotonic()
        assert time.monotonic() - begun < 8

    def gone(uri: str, **_: Any) -> Script:
        feed = Script()

        def latest(timeout_s: float | None = None) -> Frame | None:
            raise SourceNotFoundError("there is no such camera")

        feed.latest = latest  # type: ignore[method-assign]
        return feed

    with Session(bundle) as first, CameraWatcher({"gone": first}, {"gone": "test://ball"}, open_feed=gone) as watcher:
        until(lambda: not watcher.running)
        with pytest.raises(SourceNotFoundError):
            watcher.check()


def test_what_makes_no_sense_is_refused(bundle: Bundle) -> None:
    with Session(bundle) as one, Session(Bundle.open(bundle.path)) as stranger:
        cases: list[tuple[dict[str, Session], dict[str, str], str]] = [
            ({"a": one}, {"b": "test://ball"}, "sessions for a, and cameras b"),
            ({"a": one, "b": one}, {"a": "test://ball", "b": "test://ball"}, "can't share a session"),
            ({"a": one, "b": stranger}, {"a": "test://ball", "b": "test://ball"}, "of 2 bundles"),
            ({}, {}, "of 0 bundles"),
            ({"a": one}, {"a": "clip.mp4"}, "not live"),
        ]
        for sessions, uris, message in cases:
            with pytest.raises(UsageError, match=message):
                CameraWatcher(sessions, uris)


def test_a_session_beside_another_is_closed_with_it(bundle: Bundle) -> None:
    with Session(bundle) as first:
        second = first.beside()
        watcher = second.watch(LiveSource("test://ball", size=(IMAGE_SIZE, IMAGE_SIZE)))
        watcher.wait()
    assert not watcher.running
    watcher.check()


def test_gone_cameras_end_the_command_with_the_last_ones_reason_and_what_happens_waits_for_an_answer(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    news = cameras_run._News()
    news.tell("door", "one")
    with news.held():
        news.tell("yard", "two")
        print("an answer", file=sys.stderr)
    news.tell("door", "three")
    assert capsys.readouterr().err.split("\n") == ["door: one", "an answer", "yard: two", "door: three", ""]

    def see(session: Session, frame: Frame, **_: Any) -> None:
        raise EngineError("no room for a frame")

    monkeypatch.setattr(Session, "see", see)
    with Session(bundle) as first, pytest.raises(EngineError, match="no room for a frame"):
        sessions = {"door": first, "yard": first.beside()}
        cameras_run.converse_with_cameras(sessions, dict.fromkeys(sessions, "test://ball"), logs={}, branches={})
    assert capsys.readouterr().err.count("no room for a frame") == 1


# -- the command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "source", "message"),
    [
        ([], None, "nothing to watch"),
        (["a=test://ball"], "test://ball", "exclude each other"),
        (["rtsp://ann:secret@host/door"], None, "--camera has no name"),
        (["=test://ball"], None, "--camera has no name"),
        (["my door=test://ball"], None, "--camera my door=... has no name"),
        (["../up=test://ball"], None, "--camera has no name"),
        (["a=test://ball", "A=test://snow"], None, "two cameras 'A'"),
        (["a=clip.mp4"], None, "--camera a is a file"),
        (["a=rtsp://"], None, "names no host"),
    ],
)
def test_what_is_no_camera_is_refused(spellings: list[str], source: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        parse_cameras(spellings, source)
    assert "secret" not in str(refused.value)


def test_cameras_are_named_in_order_and_an_address_may_hold_an_equals_sign() -> None:
    assert list(parse_cameras(["b=test://ball?fps=30", "a-1=rtsp://h/x?y=z"], None).items()) == [
        ("b", "test://ball?fps=30"), ("a-1", "rtsp://h/x?y=z")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "names", "expected"),
    [
        ("door: who is there?", NAMES, ("door", "who is there?")),
        ("  Door : who?", NAMES, ("door", "who?")),
        ("yard: /between 14:00 14:05 who came?", NAMES, ("yard", "/between 14:00 14:05 who came?")),
        ("gate:", NAMES, ("gate", "")),
        ("who is there?", ["door"], ("door", "who is there?")),
        ("note: who is there?", ["door"], ("door", "note: who is there?")),
        ("/at 14:05 who?", ["door"], ("door", "/at 14:05 who?")),
    ],
)
def test_a_line_is_for_the_camera_that_it_names(line: str, names: Sequence[str], expected: tuple[str, str]) -> None:
    assert addressed(line, names) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("who is there?", "Which camera? There are door, yard, gate."),
        ("/at 14:05 who?", "Which camera?"),
        ("is it 14:05 there?", "Which camera?"),
        ("/nonsense", "/nonsense is no command"),
        ("attic: who?", "There is no camera 'attic'. Cameras are door, yard, gate."),
    ],
)
def test_a_line_that_names_none_of_several_cameras_is_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        addressed(line, NAMES)


def test_a_folder_that_is_a_file_is_refused_and_one_that_is_missing_is_made(tmp_path: Path) -> None:
    (tmp_path / "memory.keepsight").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file, and each of the cameras needs its own"):
        folders("--snapshot", tmp_path / "memory.keepsight", NAMES)
    with pytest.raises(UsageError, match="can't be made: No such file"):
        folders("--record", tmp_path / "no" / "folder", NAMES)
    made = folders("--snapshot", tmp_path / "new", ["door"], ".keepsight")
    assert made == {"door": tmp_path / "new" / "door.keepsight"} and (tmp_path / "new").is_dir()
    assert folders("--record", None, NAMES) == {}


def test_one_preview_shows_all_cameras_and_has_a_page_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    with beside_each(["door", "yard"], "0", {}, 10**9) as branches:
        said = capsys.readouterr().err
        found = re.search(r"Preview at http://127\.0\.0\.1:(\d+)/, or one camera at http://127\.0\.0\.1:\1/door", said)
        assert found is not None, said
        assert [len(branches[name]) for name in ("door", "yard")] == [1, 1]

        def get(path: str) -> tuple[int, str]:
            client = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read().decode(errors="replace")

        assert all(name in get("/")[1] for name in ("/stream/door", "/stream/yard"))
        status, page = get("/yard")
        assert status == 200 and "/stream/yard" in page and "door" not in page
        assert get("/attic")[0] == 404
        with LiveSource("test://ball", size=(32, 32), branches=branches["yard"]) as source:
            next(source)
            assert get("/picture/yard")[0] == 200


ENVIRONMENT = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
COMMAND = [sys.executable, "-m", "keepsight.runtime.cli"]


def test_a_stopped_run_of_two_cameras_goes_on_with_both_memories(tmp_path: Path) -> None:
    """SIGTERM as systemd sends it, then a second run: what each camera had, its log and its recording are its own."""
    saved, logs, recorded = tmp_path / "saved", tmp_path / "logs", tmp_path / "recorded"
    options = ["run", "--camera", "door=test://ball", "--camera", "yard=test://smpte", "--threads", "1", "--snapshot", str(saved)]
    options += ["--save-every", "0.5", "--feature-log", str(logs), "--log-every", "1", "--log-bytes", "100M"]
    command = [*COMMAND, *options, "--record", str(recorded), "--record-bytes", "10M"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as first:
        deadline = time.monotonic() + 90
        files = [saved / f"{name}.keepsight" for name in ("door", "yard")]
        while not all(file.exists() for file in files) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    before = {file.stem: Snapshot.read(file) for file in files}
    assert [before[name].source for name in ("door", "yard")] == ["test://ball", "test://smpte"]
    for name in ("door", "yard"):
        assert re.search(rf"Saved \d+ times; \S+{name}.keepsight has {before[name].frames_seen} frames", said), said
        assert is_feature_log(str(logs / name)) and segments_in(recorded / name), name
        assert re.search(rf"Logging features to \S+{name}: 50 MB", said), "half of the room"

    lines = ["what is there?", "/cameras", "door: what color is the shape?", "yard: /since 5s what color is the shape?"]
    an_hour_ago, now = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - ago_s)) for ago_s in (3600, 0))
    lines += [f"door: /recall {an_hour_ago} {now} what color is the shape?", "attic: who?"]
    second = CliRunner().invoke(app, options, input="\n".join(lines))
    assert second.exit_code == 0, second.output
    out, err = second.stdout, second.stderr
    assert len(re.findall(r"Nothing was seen for \d+ s\.", err)) == 2, err
    assert "Which camera? There are door, yard." in err and "There is no camera 'attic'" in err
    assert re.search(r"door .*live .*test://ball", out) and re.search(r"yard .*live .*test://smpte", out)
    assert len(re.findall(r"first token", err)) == 3 and re.search(r"logs/door: \d+ records", err), err
    for name in ("door", "yard"):
        after = Snapshot.read(saved / f"{name}.keepsight")
        assert after.frames_seen > before[name].frames_seen and after.time_s > before[name].time_s
    asked = CliRunner().invoke(app, ["ask", str(files[1]), "what color is the shape?", "--threads", "1", "--json"])
    assert json.loads(asked.stdout)["frames_seen"] == Snapshot.read(files[1]).frames_seen


def test_nothing_to_watch_is_one_line_before_a_model_is_loaded(tmp_path: Path) -> None:
    for arguments, message in (
        ([], "There is nothing to watch."),
        (["test://ball", "--camera", "a=test://ball"], "exclude each other"),
        (["--camera", "a=clip.mp4"], "is a file"),
    ):
        result = CliRunner().invoke(app, ["run", *arguments, "--bundle", str(tmp_path / "none")])
        assert isinstance(result.exception, KeepsightError) and result.exception.exit_code == 2
        assert message in str(result.exception)
