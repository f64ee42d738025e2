"""A feature log is asked by a command: from its folder alone, exactly, while it is written, and whatever has happened to it."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keepsight.runtime.answer import NOTHING_REMEMBERED
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.live import watch
from keepsight.runtime.memory import Policy
from keepsight.runtime.moments import TypedInterval
from keepsight.runtime.session import Session
from keepsight.runtime.storage.far_past import ask_far_past, rank_far_past, recall
from keepsight.runtime.storage.feature_history import FeatureHistory, is_feature_log
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.feature_segment import Layout
from keepsight.runtime.storage.history_report import describe_history, show_history
from keepsight.runtime.timeline import Interval, seen_within
from keepsight.streams import Frame
from keepsight.streams.errors import KeepsightError, SnapshotError, UsageError

from ..random_bundle import CHANNELS, TOKENS, make_bundle, random_frames

RECORD = 24 + 2 * TOKENS * CHANNELS + 16
SMALL = 40 * RECORD  # 16 segments of 2 records, and headers
COLOR = "what color is the shape?"
NOON = datetime(2026, 11, 24, 12).timestamp()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle")))


def opened(folder: Path, bundle: Bundle, **options: Any) -> FeatureLog:
    return FeatureLog(folder, bundle, **{"every_s": 1.0, "budget_bytes": SMALL, **options})


def fill(log: FeatureLog, times: Any, *, wall_s: float = NOON) -> None:
    """Records at these stream seconds, with the wall time of second 0."""
    for t in times:
        features = np.random.default_rng(int(t)).standard_normal((TOKENS, CHANNELS)).astype(np.float32)
        assert log.offer(features, time_s=float(t), index=int(t), wall_s=wall_s + t)


def frames(count: int, size: int) -> list[Frame]:
    images = np.random.default_rng(3).integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    return [Frame(image, 0.25 * t, time.monotonic(), t) for t, image in enumerate(images)]


def remember_plainly(session: Session, everything: list[Frame], start_s: float, end_s: float, every: int) -> None:
    """The slow way: every due frame of an interval, encoded again, rounded as the log rounds, into an empty memory."""
    for frame in everything:
        if start_s <= frame.time_s <= end_s and frame.index % every == 0:
            half = np.asarray(session.qformer.encode(frame.image[None])[0]).astype(np.float16)
            session.qformer.remember(half.astype(np.float32), frame.time_s)
            session._newest = frame


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mbc", "fifo", "average", "last"])
@pytest.mark.parametrize("interval", [None, Interval(5.0, 20.0)])
def test_a_memory_built_from_the_folder_is_that_of_the_frames_at_the_logs_rate(
    bundle: Bundle, tmp_path: Path, policy: Policy, interval: Interval | None
) -> None:
    everything = frames(120, bundle.manifest.dims.image_size)
    with opened(tmp_path, bundle, budget_bytes=10**7, live=False) as log, Session(bundle) as session:
        session.log_features(log)
        for frame in everything:
            session.see(frame)
    with Session(bundle, memory=policy) as asking, Session(bundle, memory=policy) as plain:
        recalled = recall(asking, FeatureHistory(tmp_path, bundle), interval)
        remember_plainly(plain, everything, *((0.0, 99.0) if interval is None else (5.0, 20.0)), every=4)
        assert recalled.frames_seen == plain.frames_seen == (30 if interval is None else 16)
        theirs = plain.qformer.bank.state()
        for name, array in recalled.qformer.bank.state().items():
            assert array.tobytes() == theirs[name].tobytes(), name
        prompt = plain.qformer.prompt("what was there first?")
        within = seen_within(recalled.qformer.bank, interval or Interval(0.0, 99.0))
        expected = plain.qformer.replay(prompt).rows.tobytes()
        assert recalled.qformer.replay(prompt, within).rows.tobytes() == expected
        assert asking.frames_seen == 0


def test_the_command_answers_as_the_memory_of_those_frames_does(tmp_path: Path) -> None:
    """keepsight-tiny, words and probabilities, through the command's own options."""
    log_folder, tiny = tmp_path / "anything", Bundle.open("tiny")
    everything = frames(40, tiny.manifest.dims.image_size)
    with Session(tiny, threads=1) as session:
        with FeatureLog(log_folder, tiny, every_s=0.5, budget_bytes=10**8, live=False) as log:
            session.log_features(log)
            for frame in everything:
                session.see(frame)
        session.forget()
        remember_plainly(session, everything, 2.0, 6.0, every=2)
        text = session.ask(COLOR).result.text
        ranking = session.rank(COLOR, ("red", "blue"), score="mean").as_dict()

    run = CliRunner().invoke
    given = [str(log_folder), COLOR, "--between", "2", "6", "--threads", "1", "--json"]
    asked = run(app, ["ask", *given])
    answer = json.loads(asked.stdout)
    assert (answer["text"], answer["mode"], answer["frames_seen"], answer["time_s"]) == (text, "replay", 9, 6.0)
    assert answer["interval"] == {"start_s": 2.0, "end_s": 6.0, "start": None, "end": None}
    assert "9 records, 0:02.0 to 0:06.0, remembered again" in asked.stderr
    ranked = json.loads(run(app, ["ask", *given, "--options", "red,blue", "--score", "mean"]).stdout)
    assert {**ranked, "trace": None} == {**ranking, "trace": None}


# -- what the command says -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of keepsight-tiny: 0 to 4 s and 20 to 24 s of a file, every second."""
    folder, tiny = tmp_path_factory.mktemp("log"), Bundle.open("tiny")
    dims = tiny.manifest.dims
    rows = np.random.default_rng(0).standard_normal((dims.tokens, dims.channels)).astype(np.float32)
    with FeatureLog(folder, tiny, every_s=1.0, budget_bytes=10**8, live=False) as log:
        for t in (0, 1, 2, 3, 4, 20, 21, 22, 23, 24):
            assert log.offer(rows, time_s=t, index=t, wall_s=NOON)
    return folder


def test_nothing_from_then_is_said_with_what_there_is(file_log: Path, bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["ask", str(file_log), COLOR, "--between", "8", "0:12", "--threads", "1", "--json"])
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["finish"] == NOTHING_REMEMBERED
    assert [(one["start_s"], one["end_s"]) for one in answer["remembered"]] == [(0.0, 4.0), (20.0, 24.0)]
    history = FeatureHistory(file_log, Bundle.open("tiny"))
    with Session(bundle) as session, pytest.raises(UsageError, match=r"nothing remembered.* 0:00.0 to 0:04.0, 0:20.0 to 0:24.0"):
        rank_far_past(session, history, COLOR, ("a", "b"), TypedInterval(at="10"))


def test_the_timeline_tells_times_gaps_and_bytes_and_draws_the_memory(file_log: Path, tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    run = CliRunner().invoke
    report = json.loads(run(app, ["memory", str(file_log), "--json", "--png", str(picture), "--threads", "1"]).stdout)
    assert (report["records"], report["every_s"], report["live"]) == (10, 1.0, False)
    assert (report["start_s"], report["end_s"]) == (0.0, 24.0)
    assert [(one["start_s"], one["end_s"], one["records"]) for one in report["stretches"]] == [(0.0, 4.0, 5), (20.0, 24.0, 5)]
    assert [(gap["start_s"], gap["end_s"]) for gap in report["gaps"]] == [(4.0, 20.0)]
    assert report["bytes"] == sum(path.stat().st_size for path in file_log.iterdir()) and report["damaged"] == []
    with Image.open(picture) as drawn:
        assert drawn.width == 1200 and report["png"] == str(picture)
    table = run(app, ["memory", str(file_log)])
    assert "10 records, one every 1 s" in table.stdout and "0:00.0 to 0:24.0, 1 gap; " in table.stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (["ask", "--when", "3"], UsageError, "--when"),
        (["ask", "--mode", "standing"], UsageError, "by replay"),
        (["ask", "--evidence", "x"], UsageError, "--evidence"),
        (["ask", "--memory", "concat"], UsageError, "concat"),
        (["ask", "--gate"], UsageError, "--gate"),
        (["ask", "--at", "99"], UsageError, "has been seen to"),  # after the end of the file
        (["ask", "--at", "14:05:00", "--since", "3s"], UsageError, "exclude each other"),
        (["memory", "--key-frames", "x"], UsageError, "--key-frames"),
    ],
)
def test_what_a_log_does_not_have_is_refused(file_log: Path, arguments: list[str], kind: type[KeepsightError], says: str) -> None:
    command, *options = arguments
    question = [COLOR, "--threads", "1"] if command == "ask" else []
    result = CliRunner().invoke(app, [command, str(file_log), *question, *options])
    assert isinstance(result.exception, kind) and says in str(result.exception) and result.stdout == ""


def test_another_bundles_log_is_refused_with_the_reason(file_log: Path, bundle: Bundle) -> None:
    with pytest.raises(SnapshotError, match=r"features of bundle keepsight-tiny \(\w{12}\), this is random"):
        FeatureHistory(file_log, bundle)
    for command in (["ask", str(file_log), COLOR], ["memory", str(file_log)]):
        result = CliRunner().invoke(app, [*command, "--bundle", str(bundle.path)])
        assert isinstance(result.exception, SnapshotError) and result.stdout == ""


def test_a_log_is_known_by_what_is_in_it(file_log: Path, bundle: Bundle, tmp_path: Path) -> None:
    pictures, empty, odd, both = (tmp_path / name for name in ("log", "new", "odd", "both"))
    for folder in (pictures, odd, both):
        folder.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "000000000000.png")
    (odd / "000000000000.features").write_bytes(b"something else")
    assert is_feature_log(file_log) and is_feature_log(str(file_log))
    assert not any(map(is_feature_log, (pictures, odd, tmp_path, tmp_path / "missing", pictures / "000000000000.png")))
    with opened(empty, bundle):
        assert is_feature_log(empty)
        with pytest.raises(UsageError, match="is empty"):
            FeatureHistory(empty, bundle)
    with opened(both, bundle) as log:
        fill(log, range(3))
    Image.new("RGB", (8, 8)).save(both / "a.png")
    with pytest.raises(UsageError, match="both pictures and a feature log"):
        is_feature_log(both)


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumped_at_boot_dates_what_was_before(bundle: Bundle, tmp_path: Path) -> None:
    """1970 until the network tells the time; the next process is a run of its own, and moves nothing of the first."""
    with opened(tmp_path, bundle) as log:
        fill(log, range(4), wall_s=100.0)
        fill(log, range(4, 8), wall_s=NOON)
    with opened(tmp_path, bundle) as log:
        fill(log, range(60, 64), wall_s=NOON + 600)
    history = FeatureHistory(tmp_path, bundle)
    assert history.runs == 2 and history.clock.jumps == 1
    dated = {record.time_s: record.wall_s - NOON for record in history.read()}
    assert dated == pytest.approx({t: t if t < 60 else 600 + t for t in (*range(8), *range(60, 64))}, rel=0, abs=1e-3)
    assert history.calendar.interval(TypedInterval(between=("2026-11-24T12:00:02", "2026-11-24T12:00:05"))) == Interval(2.0, 5.0)
    with Session(bundle) as session:
        recalled = recall(session, history, Interval(2.0, 5.0))
        assert recalled.calendar.iso(2.0) == history.calendar.iso(2.0) and recalled.newest is not None
        assert recalled.newest.age_ms / 1000 == pytest.approx(max(time.time() - NOON - 5, 0.0), abs=5)
        assert recalled.calendar.tolerance_s == 1.0 and not session.clock.dated
    report = describe_history(history)
    assert (report["live"], report["runs"], report["clock_jumps"]) == (True, 2, 1)
    assert datetime.fromisoformat(report["start"]).timestamp() == pytest.approx(NOON, abs=1e-3)


def test_a_moment_is_one_interval_of_the_log_wide_and_since_ends_now(bundle: Bundle, tmp_path: Path) -> None:
    now = time.time()
    with opened(tmp_path, bundle, every_s=10.0) as log:
        fill(log, range(0, 100, 10), wall_s=now - 90)
    calendar = FeatureHistory(tmp_path, bundle).calendar
    assert calendar.now_s == pytest.approx(90, abs=5)
    assert calendar.interval(TypedInterval(since="30s")).start_s == pytest.approx(60, abs=5)
    moment = datetime.fromtimestamp(now - 50).isoformat()
    around = calendar.interval(TypedInterval(at=moment))
    assert (around.start_s, around.end_s) == pytest.approx((30, 50), abs=0.01)


def test_a_question_typed_while_it_runs_reaches_the_log(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, float]] = []

    def ask(self: Session, *_: Any, interval: Interval | None = None, **__: Any) -> Any:
        assert interval is not None
        asked.append((self.frames_seen, self.time_s))
        raise UsageError("asked")

    monkeypatch.setattr(Session, "ask", ask)
    start = datetime.now().replace(hour=12, minute=0, second=0, microsecond=0).timestamp() - 86400
    with opened(tmp_path, bundle) as log, Session(bundle) as session:
        fill(log, range(20), wall_s=start)
        day = datetime.fromtimestamp(start).date().isoformat()
        watch.reply(session, f"/recall {day}T12:00:05 {day}T12:00:09 who came?", tmp_path)
        assert asked == [(5, 9.0)] and session.frames_seen == 0
        watch.reply(session, "/recall 12:00 12:01 who came?", None)
        assert "No feature log is being written" in capsys.readouterr().err


# -- whatever has happened to it -------------------------------------------------------------------------------------


def test_it_is_read_while_it_is_written_and_nothing_of_it_changes(bundle: Bundle, tmp_path: Path) -> None:
    def files() -> dict[str, tuple[int, int, bytes]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in tmp_path.iterdir()}

    with opened(tmp_path, bundle) as log:
        fill(log, range(5))
        before = files()
        history = FeatureHistory(tmp_path, bundle)
        assert [record.time_s for record in history.read()] == [0, 1, 2, 3, 4] and files() == before
        fill(log, range(5, 9))
        assert [record.time_s for record in history.read()] == [0, 1, 2, 3, 4]
        assert FeatureHistory(tmp_path, bundle).records == 9
        fill(log, range(9, 100))  # now the first segments have made room
        with pytest.raises(SnapshotError, match="made room"):
            list(history.read())
        assert log.offer(np.zeros((TOKENS, CHANNELS)), time_s=100.0, index=100, wall_s=NOON + 100)


def test_a_segment_that_makes_room_while_the_log_is_opened_is_not_missed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(6))
    plain = Layout.opened

    def gone(self: Layout, path: Path, *, newest: bool) -> Any:
        if path.stem == "000000000000":
            path.unlink(missing_ok=True)
        return plain(self, path, newest=newest)

    monkeypatch.setattr(Layout, "opened", gone)
    assert [record.time_s for record in FeatureHistory(tmp_path, bundle).read()] == [2, 3, 4, 5]


@pytest.mark.parametrize("left", [1, RECORD - 1, RECORD + 7])
def test_a_torn_tail_costs_what_was_torn(bundle: Bundle, tmp_path: Path, left: int) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(6))
    newest = max(tmp_path.glob("*.features"))
    os.truncate(newest, newest.stat().st_size - 2 * RECORD + left)
    size = newest.stat().st_size
    history = FeatureHistory(tmp_path, bundle)
    assert history.damaged == [] and history.covers_s == (0.0, 3.0 + left // RECORD) and newest.stat().st_size == size


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["header", "time", "time of a file", "wall"])
def test_what_is_damaged_is_named_and_the_rest_can_be_asked(
    bundle: Bundle, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, bundle, live=where != "time of a file") as log:
        fill(log, range(10))
    bad = sorted(tmp_path.glob("*.features"))[2]  # seconds 4 and 5
    start = bad.stat().st_size - 2 * RECORD
    damage(bad, {"header": 40, "time": start + 7, "time of a file": start + 6, "wall": start + 15}[where])
    history = FeatureHistory(tmp_path, bundle)
    assert len(history.damaged) == 1 and str(bad) in str(history.damaged[0])
    assert history.records == (8 if where == "header" else 9) and history.clock.jumps == 0
    assert [record.time_s for record in history.read(0, 3)] == [0, 1, 2, 3]
    assert [record.time_s for record in history.read(6, 9)] == [6, 7, 8, 9]
    for interval in ((0, 4), (3.5, 4.5), (0, 9)):
        with pytest.raises(SnapshotError, match=bad.name):
            list(history.read(*interval))
    show_history(history)
    assert bad.name in capsys.readouterr().err.replace("\n", "")


def test_features_that_are_damaged_are_found_when_they_are_read(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(10))
    bad = sorted(tmp_path.glob("*.features"))[2]
    damage(bad, bad.stat().st_size - 100)  # of second 5
    history = FeatureHistory(tmp_path, bundle)
    with Session(bundle) as session, pytest.raises(SnapshotError, match=f"{bad.name} is damaged: .* record 1"):
        ask_far_past(session, history, COLOR)
    assert len(list(history.read(0, 4))) == 5 and len(list(history.read(6, 9))) == 4


def test_a_log_with_nothing_but_damage_is_refused_in_its_name(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(2))
    bad = next(tmp_path.glob("*.features"))
    damage(bad, 40)
    assert is_feature_log(tmp_path)
    with pytest.raises(SnapshotError, match=f"{bad.name} is damaged: the checksum of its header"):
        FeatureHistory(tmp_path, bundle)


def test_a_long_interval_is_read_one_record_at_a_time(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle, budget_bytes=10**7) as log:
        fill(log, range(600))
    history = FeatureHistory(tmp_path, bundle)
    tracemalloc.start()
    assert sum(1 for _ in history.read()) == 600
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * RECORD, f"{peak / RECORD:.0f} records in memory at once"


def test_a_folder_of_pictures_stays_one(bundle: Bundle, tmp_path: Path) -> None:
    for index, image in enumerate(random_frames(2)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    result = CliRunner().invoke(app, ["memory", str(tmp_path), "--bundle", str(bundle.path), "--json"])
    assert json.loads(result.stdout)["frames_seen"] == 2
