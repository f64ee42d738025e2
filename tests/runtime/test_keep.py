"""Saved memories as a user meets them: `run --snapshot`, `ask SNAPSHOT`, and what is said of them."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keepsight.runtime.answer import Mode
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.session import Session
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.keep import ask_saved, kept, parse_bytes
from keepsight.runtime.storage.sections import checksum
from keepsight.runtime.storage.snapshot import Snapshot
from keepsight.streams import Frame
from keepsight.streams.errors import SnapshotError, UsageError

from ..random_bundle import IMAGE_SIZE, make_bundle

ENVIRONMENT = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
COMMAND = [sys.executable, "-m", "keepsight.runtime.cli"]


def keepsight(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, input=stdin)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle")))


def saved_by(bundle: Bundle, path: Path, *, standing: str | None = None) -> Path:
    with Session(bundle, threads=1) as session:
        if standing is not None:
            session.stand(standing)
        size = bundle.manifest.dims.image_size
        for t in range(5):
            session.see(Frame(np.full((size, size, 3), 40 * t, np.uint8), 0.25 * t, time.monotonic(), t))
        session.save(path)
    return path


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_its_file_can_be_asked(tmp_path: Path) -> None:
    """A live source, SIGTERM as systemd sends it, a question to the file, and a second run that knows the gap."""
    path, log = tmp_path / "memory.keepsight", tmp_path / "log"
    options = ["test://ball", "--threads", "1", "--snapshot", str(path), "--save-every", "0.5"]
    options += ["--feature-log", str(log), "--log-every", "1", "--log-bytes", "100M"]
    with subprocess.Popen(
        [*COMMAND, "run", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    ) as first:  # fmt: skip
        deadline = time.monotonic() + 90
        while not path.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert re.search(r"every 0\.5 s: up to 5\.03 MB a time, 869 GB a day", said), said  # 2.10 of it key frames
    assert re.search(r"Logging features .* 100 MB hold 0\.\d h", said), said
    saved = Snapshot.read(path)
    assert re.search(rf"Saved \d+ times; .* has {saved.frames_seen} frames", said), said

    asked = keepsight("ask", path, "what color is the shape?", "--threads", "1", "--json")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert (answer["frames_seen"], answer["time_s"], answer["mode"]) == (saved.frames_seen, saved.time_s, "replay")
    assert answer["text"] and f"{saved.frames_seen} frames of test://ball up to {saved.time_s:.1f} s, saved 20" in asked.stderr

    second = keepsight("run", *options, stdin="what color is the shape?\n")
    assert second.returncode == 0 and second.stdout.strip(), second.stderr
    assert saved.newest is not None
    gap = re.search(r"Nothing was seen for (\d+) s\.", second.stderr)
    assert gap is not None and abs(int(gap[1]) - (time.time() - saved.newest.captured_wall_s)) < 60, second.stderr
    assert f"{saved.frames_seen} frames of test://ball" in second.stderr
    with FeatureLog(log, Bundle.open("tiny"), every_s=1.0, budget_bytes=10**8) as opened:
        assert opened.records >= 1


def test_a_standing_question_of_a_snapshot_answers_as_one(tmp_path: Path) -> None:
    path = saved_by(Bundle.open("tiny"), tmp_path / "m", standing="what color is the shape?")
    asked = keepsight("ask", path, "what color is the shape?", "--threads", "1", "--json")
    assert json.loads(asked.stdout)["mode"] == "standing", asked.stderr
    saved = Snapshot.read(path)
    perception = Bundle.open("tiny")
    with Session(Bundle(perception.path, perception.manifest.model_copy(update={"llm": None}))) as session:
        cases: list[tuple[str, Mode]] = [("what color is the shape?", "replay"), ("what shape?", "standing")]
        for question, mode in cases:
            assert ask_saved(session, saved, question, prompt=None, mode=mode) == question  # by replay


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _newer(path: Path) -> None:
    content = path.read_bytes()
    start = content[:16] + struct.pack("<I", 7) + content[20:48]
    path.write_bytes(start + checksum(start) + content[64:])


@pytest.mark.parametrize(
    ("change", "options", "code", "says"),
    [
        (_cut, (), 15, "truncated"),
        (_flip, (), 15, "section '"),
        (_newer, (), 15, "version 7"),
        (lambda _: None, (), 15, "saved with bundle random"),  # asked with the default bundle
        (lambda _: None, ("--when", "3"), 2, "--when"),
    ],
)
def test_a_snapshot_that_can_not_be_asked_is_one_line_and_its_exit_code(
    bundle: Bundle, tmp_path: Path, change: Callable[[Path], None], options: tuple[str, ...], code: int, says: str
) -> None:
    path = saved_by(bundle, tmp_path / "a name without an ending")
    change(path)
    result = keepsight("ask", path, "what is this?", "--threads", "1", *options)
    assert result.returncode == code, result.stderr
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""


# -- what is kept while a session runs ---------------------------------------------------------------------------------


def see(session: Session, times: list[float]) -> None:
    for index, t in enumerate(times):
        image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 7 * index, np.uint8)
        session.see(Frame(image, t, time.monotonic(), index))


def test_an_error_is_a_clean_end_too(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Session(bundle) as session, pytest.raises(ZeroDivisionError), kept(session, "test://ball", snapshot=path):
        see(session, [0.0, 1.0])
        raise ZeroDivisionError
    assert Snapshot.read(path).frames_seen == 2


def test_sigterm_is_as_it_was_afterwards(bundle: Bundle, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Session(bundle) as session:
        with pytest.raises(KeyboardInterrupt), kept(session, "test://ball", snapshot=tmp_path / "m"):
            see(session, [0.0])
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        with kept(session, "test://ball"):
            assert signal.getsignal(signal.SIGTERM) == before, "nothing is kept, and SIGTERM was taken"
    assert signal.getsignal(signal.SIGTERM) == before and Snapshot.read(tmp_path / "m").frames_seen == 1


def test_a_file_that_is_no_snapshot_is_not_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_text("my film")
    with Session(bundle) as session:
        film = tmp_path / "film.mp4"
        with pytest.raises(SnapshotError, match="would be overwritten"), kept(session, "test://ball", snapshot=film):
            pass
        with pytest.raises(SnapshotError, match="no folder"), kept(session, "test://ball", snapshot=tmp_path / "no" / "m"):
            pass
    assert (tmp_path / "film.mp4").read_text() == "my film"


def test_a_file_does_not_begin_anew_over_the_log_of_a_stream(bundle: Bundle, tmp_path: Path) -> None:
    film = tmp_path / "a.npy"
    np.save(film, np.zeros((4, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    options = {"log": tmp_path / "log", "snapshot": tmp_path / "m", "log_every_s": 1.0, "log_bytes": 10**7}
    with Session(bundle) as session, kept(session, str(film), **options):
        see(session, [0.0, 1.0, 2.0])
    with Session(bundle) as session, kept(session, str(film), **options):  # with its snapshot it goes on
        see(session, [3.0])
    (tmp_path / "m").unlink()
    with (
        Session(bundle) as session,
        pytest.raises(UsageError, match=r"a stream up to 3\.0 s, and .*a\.npy begins at 0"),
        kept(session, str(film), **options),
    ):
        pass


@pytest.mark.parametrize(("text", "number"), [("2G", 2e9), ("500M", 5e8), ("1.5k", 1500), ("7", 7), ("3GB", 3e9)])
def test_sizes_are_read(text: str, number: float) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "G", "-1", "2 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no number of bytes"):
        parse_bytes(text)
