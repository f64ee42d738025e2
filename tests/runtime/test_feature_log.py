"""The feature log keeps what it took, within its budget, through every crash; and an exact memory is built of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.memory import Policy
from keepsight.runtime.session import Session
from keepsight.runtime.storage import feature_log
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.feature_segment import Layout
from keepsight.streams import Frame
from keepsight.streams.errors import SnapshotError, UsageError

from ..random_bundle import CHANNELS, IMAGE_SIZE, TOKENS, make_bundle

RECORD = 24 + 2 * TOKENS * CHANNELS + 16
SMALL = 40 * RECORD  # 16 segments of 2 records, and headers


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle")))


def features(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal((TOKENS, CHANNELS)).astype(np.float32)


def fill(log: FeatureLog, indices: range, *, every_s: float = 1.0) -> None:
    for index in indices:
        assert log.offer(features(index), time_s=every_s * index, index=index, wall_s=1e9 + every_s * index)


def indices(log: FeatureLog, *interval: float) -> list[int]:
    found = list(log.read(*interval))
    for record in found:
        assert record.features.dtype == np.float16 and np.array_equal(record.features, features(record.index).astype(np.float16))
        assert record.wall_s - 1e9 == record.time_s
    return [record.index for record in found]


def opened(folder: Path, bundle: Bundle, **options: Any) -> FeatureLog:
    return FeatureLog(folder, bundle, **{"every_s": 1.0, "budget_bytes": SMALL, **options})


# -- what it keeps ---------------------------------------------------------------------------------------------------


def test_what_is_logged_is_read_by_interval_also_when_opened_again(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        assert log.newest is None and log.covers_s is None and indices(log) == []
        fill(log, range(7))
        assert indices(log) == list(range(7)) and log.covers_s == (0.0, 6.0)
    with opened(tmp_path, bundle) as log:
        assert log.records == 7 and log.newest is not None and log.newest.index == 6
        fill(log, range(7, 12))
        assert indices(log) == list(range(12))
        assert indices(log, 3.0, 8.5) == [3, 4, 5, 6, 7, 8]
        assert indices(log, 3.1, 3.9) == indices(log, 50.0, 60.0) == []
    with opened(tmp_path, bundle, writable=False) as reader:
        assert indices(reader, 11.0) == [11]
        with pytest.raises(UsageError, match="only read"):
            reader.offer(features(0), time_s=99.0, index=0, wall_s=0.0)


@settings(max_examples=40, deadline=None)
@given(every=st.floats(0.5, 5), steps=st.lists(st.floats(0.01, 4), min_size=1, max_size=40))
def test_the_first_frame_at_or_after_each_multiple_is_taken(bundle, tmp_path_factory, every, steps):
    times = np.cumsum(steps)
    with opened(tmp_path_factory.mktemp("log"), bundle, every_s=every, budget_bytes=10**7) as log:
        for index, t in enumerate(times):
            log.offer(features(index), time_s=t, index=index, wall_s=0.0)
        taken = [record.time_s for record in log.read()]
    plain = []
    for t in times:
        if not plain or int((t + 0.001) // every) > int((plain[-1] + 0.001) // every):
            plain.append(t)
    assert taken == plain


def test_what_is_not_due_is_not_even_fetched(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle, every_s=10.0) as log:
        fill(log, range(1))
        assert not log.offer(object(), time_s=9.9, index=1, wall_s=0.0)
        assert not log.offer(object(), time_s=-5.0, index=1, wall_s=0.0)  # seen again after a restart


def test_the_budget_is_never_exceeded_and_the_oldest_goes(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        for index in range(200):
            fill(log, range(index, index + 1))
            on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
            assert on_disk == log.nbytes <= SMALL
        kept = indices(log)
        assert kept == list(range(kept[0], 200)) and len(kept) >= 30
    with opened(tmp_path, bundle) as log:
        assert indices(log) == kept
    with opened(tmp_path, bundle, budget_bytes=SMALL // 2) as log:  # a smaller budget holds from the next segment on
        fill(log, range(200, 210))
        assert log.nbytes <= SMALL // 2


def test_hours_follow_from_the_sizes() -> None:
    """The figures in the module's docstring."""
    log = FeatureLog.__new__(FeatureLog)
    log._layout = Layout.__new__(Layout)
    log._layout.shape, log.every_s = (257, 1408), 10.0
    assert log.record_bytes == 723_752 and 10**9 // log.record_bytes == 1381
    assert log.hours(10**9) == pytest.approx(3.84, abs=0.01)
    assert 24 / log.hours(1) / 1e9 == pytest.approx(6.25, abs=0.05)


# -- crashes ---------------------------------------------------------------------------------------------------------


def newest_segment(folder: Path) -> Path:
    return max(folder.glob("*.features"))


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 400, RECORD - 1, RECORD, RECORD + 1])
def test_a_torn_tail_is_cut_off_and_nothing_else_is_lost(bundle: Bundle, tmp_path: Path, cut: int) -> None:
    with opened(tmp_path, bundle, budget_bytes=16 * 5 * RECORD) as log:
        fill(log, range(9))
    path = newest_segment(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    left = list(range(9 - -(-cut // RECORD)))
    with opened(tmp_path, bundle, budget_bytes=16 * 5 * RECORD, writable=False) as reader:
        assert indices(reader) == left
    with opened(tmp_path, bundle, budget_bytes=16 * 5 * RECORD) as log:
        assert indices(log) == left
        fill(log, range(len(left), 14))
        assert indices(log) == list(range(14))


@pytest.mark.parametrize("size", [0, 10, 40])
def test_a_segment_whose_header_is_torn_is_empty(bundle: Bundle, tmp_path: Path, size: int) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(3))
    path = newest_segment(tmp_path)
    os.truncate(path, size)
    with opened(tmp_path, bundle) as log:
        assert indices(log) == [0, 1]
        fill(log, range(2, 6))
        assert indices(log) == list(range(6))


def test_a_tail_of_garbage_is_cut_off(bundle: Bundle, tmp_path: Path) -> None:
    """After a power cut the length may be there before the content is."""
    with opened(tmp_path, bundle) as log:
        fill(log, range(3))
    with newest_segment(tmp_path).open("ab") as file:
        file.write(bytes(RECORD + 77))
    with opened(tmp_path, bundle) as log:
        assert indices(log) == [0, 1, 2]


def test_a_damaged_record_stops_only_who_asks_for_its_time(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(10))
    path = sorted(tmp_path.glob("*.features"))[2]  # records 4 and 5
    content = bytearray(path.read_bytes())
    content[-RECORD - 300] ^= 1  # in record 4
    path.write_bytes(content)
    with opened(tmp_path, bundle) as log:
        for interval in ((3.5, 9.0), (0.0, 4.0), (4.0, 4.5)):
            with pytest.raises(SnapshotError, match="record 0 is wrong"):
                list(log.read(*interval))
        assert indices(log, 0.0, 2.9) == [0, 1, 2] and indices(log, 5.0, 9.0) == [5, 6, 7, 8, 9]


def test_every_flipped_bit_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        fill(log, range(4))
    path = sorted(tmp_path.glob("*.features"))[0]
    content = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        says = r"damaged: the checksum of (its header|record \d)"
        with pytest.raises(SnapshotError, match=says), opened(tmp_path, bundle) as log:
            list(log.read())


WRITER = """
import sys, numpy as np
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.feature_segment import Layout
bundle = Bundle.open(sys.argv[1])
dims = bundle.manifest.dims
with FeatureLog(sys.argv[2], bundle, every_s=1.0, budget_bytes=int(sys.argv[3])) as log:
    index = 0 if log.newest is None else log.newest.index + 1
    print("ready", flush=True)
    while True:
        features = np.random.default_rng(index).standard_normal((dims.tokens, dims.channels)).astype(np.float32)
        log.offer(features, time_s=float(index), index=index, wall_s=1e9 + index)
        print(index, flush=True)
        index += 1
"""


def test_a_killed_writer_loses_at_most_the_record_in_flight(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(bundle.path), str(tmp_path), str(SMALL)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.01, 0.2))
            writer.send_signal(signal.SIGKILL)
            told = writer.stdout.read().splitlines()
        with opened(tmp_path, bundle) as log:
            found = indices(log)
            # The last line may be torn as well.
            last = max((int(line) for line in told[:-1]), default=-1)
            assert found == list(range(found[0], found[-1] + 1)) and found[-1] >= last


class _FullDisk:
    """Takes a part of what is written, as a full disk does."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, content: bytes) -> int:
        return self._file.write(content[:100])

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_a_full_disk_is_told_and_what_is_there_stays(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle, budget_bytes=16 * 5 * RECORD) as log:
        fill(log, range(3))
        whole, log._file = log._file, _FullDisk(log._file)  # type: ignore[assignment]
        with pytest.raises(SnapshotError, match="No space left"):
            log.offer(features(3), time_s=3.0, index=3, wall_s=0.0)
        assert whole is not None and whole.closed
        assert indices(log) == [0, 1, 2]
        fill(log, range(4, 8))  # room was made
        assert indices(log) == [0, 1, 2, 4, 5, 6, 7]


def test_a_folder_that_is_gone_is_told(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path, bundle) as log:
        fill(log, range(2))
        monkeypatch.setattr(feature_log, "_write_all", fail)
        monkeypatch.setattr(os, "fdatasync", fail)
        for t in (5.0, 6.0):
            with pytest.raises(SnapshotError, match="Input/output error"):
                log.offer(features(0), time_s=t, index=5, wall_s=0.0)
        monkeypatch.undo()
        fill(log, range(7, 9))
        assert indices(log) == [0, 1, 7, 8]


# -- refused ---------------------------------------------------------------------------------------------------------


def test_a_log_of_another_bundle_or_interval_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path / "log", bundle) as log:
        fill(log, range(2))
    another = Bundle.open(make_bundle(tmp_path / "another", seed=1))
    with pytest.raises(SnapshotError, match=r"features of bundle random \(\w{12}\), this is random \(\w{12}\)"):
        opened(tmp_path / "log", another)
    with pytest.raises(SnapshotError, match="every 1 s, not every 2 s"):
        opened(tmp_path / "log", bundle, every_s=2.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"every_s": 0.0}, "every 0 s"), ({"every_s": float("nan")}, "nan"), ({"budget_bytes": RECORD}, "too small")],
)
def test_options_that_make_no_sense_are_refused(bundle: Bundle, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        opened(tmp_path, bundle, **options)


def test_features_that_do_not_fit_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log:
        with pytest.raises(UsageError, match="7e"):
            log.offer(features(0) * 0 + 7e4, time_s=0.0, index=0, wall_s=0.0)
        with pytest.raises(UsageError, match="must be"):
            log.offer(features(0)[:-1], time_s=0.0, index=0, wall_s=0.0)
        assert log.records == 0


def test_two_writers_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle), pytest.raises(SnapshotError, match="another process"):
        opened(tmp_path, bundle)
    opened(tmp_path, bundle).close()


# -- an exact memory of any interval ---------------------------------------------------------------------------------


def frames(count: int) -> list[Frame]:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    return [Frame(image, 0.25 * t, time.monotonic(), t) for t, image in enumerate(images)]


@pytest.mark.parametrize("policy", ["mbc", "fifo", "average", "last"])
def test_a_recalled_memory_is_that_of_a_stream_that_began_there(bundle: Bundle, tmp_path: Path, policy: Policy) -> None:
    """Bit for bit: the features that were logged, in half precision, frame by frame into an empty memory."""
    everything = frames(120)
    with (
        opened(tmp_path, bundle, budget_bytes=10**7) as log,
        Session(bundle, memory=policy) as session,
        Session(bundle, memory=policy) as plain,
    ):
        session.log_features(log)
        for frame in everything:
            session.see(frame)
        before = session.perceive("what is this?").rows.tobytes()
        recalled = session.recall(log, 5.0, 20.0)
        for frame in everything:
            if 5.0 <= frame.time_s <= 20.0 and frame.index % 4 == 0:
                half = np.asarray(plain.qformer.encode(frame.image[None])[0]).astype(np.float16)
                plain.qformer.remember(half.astype(np.float32), frame.time_s)
        theirs = plain.qformer.bank.state()
        for name, array in recalled.qformer.bank.state().items():
            assert array.tobytes() == theirs[name].tobytes(), name
        assert recalled.frames_seen == 16 and recalled.time_s == 20.0
        question = plain.qformer.prompt(plain.bundle.manifest.templates.qformer_text("what is this?"))
        assert recalled.perceive("what is this?").rows.tobytes() == plain.qformer.replay(question).rows.tobytes()
        assert session.perceive("what is this?").rows.tobytes() == before, "recalling changed the memory"


def test_a_time_that_is_not_in_the_log_is_told(bundle: Bundle, tmp_path: Path) -> None:
    with opened(tmp_path, bundle) as log, Session(bundle) as session:
        with pytest.raises(UsageError, match="it is empty"):
            session.recall(log, 0.0, 9.0)
        session.log_features(log)
        for frame in frames(20):
            session.see(frame)
        with pytest.raises(UsageError, match=r"covers 0.0 s to 4.0 s"):
            session.recall(log, 5.0, 9.0)


def test_a_log_that_fails_is_reported_and_the_stream_goes_on(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    errors: list[Exception] = []
    with opened(tmp_path, bundle) as log, Session(bundle) as session:
        session.log_features(log, on_error=errors.append)
        monkeypatch.setattr(feature_log, "_write_all", fail)
        for frame in frames(8):
            session.see(frame)
        assert session.frames_seen == 8 and errors and "No space left" in str(errors[0])


def test_a_camera_without_a_snapshot_goes_on_behind_the_log(bundle: Bundle, tmp_path: Path) -> None:
    from .test_snapshot import live, watch

    with opened(tmp_path, bundle) as log, Session(bundle) as session:
        session.log_features(log)
        watch(session, "/dev/video0", live([0.0, 1.0, 2.0], captured=time.monotonic() - 62))
    with opened(tmp_path, bundle) as log, Session(bundle) as session:
        session.log_features(log)
        watch(session, "/dev/video0", live([0.0, 1.0], captured=time.monotonic()))
        assert session.frames_seen == 2 and session.time_s == pytest.approx(63, abs=1)
        assert log.records == 5


