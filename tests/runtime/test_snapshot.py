"""A session goes on from its snapshot as if it had never stopped, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.runtime.bank_state import RIDER
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import Dims, Manifest, manifest_text
from keepsight.runtime.memory import MemoryBank, Policy, Rider
from keepsight.runtime.session import Session
from keepsight.runtime.storage import snapshot as saving
from keepsight.runtime.storage.saver import Saver
from keepsight.runtime.storage.sections import write_sections
from keepsight.runtime.storage.snapshot import Snapshot, bytes_per_day, fingerprint, is_snapshot, snapshot_bytes
from keepsight.streams import Frame
from keepsight.streams.errors import SnapshotError, UsageError
from keepsight.streams.uri import SourceURI

from ..random_bundle import IMAGE_SIZE, make_bundle

QUESTION, OTHER = "what is the color of the shape?", "what was there first?"
KV_TOLERANCE = 1e-5  # of the largest key or value: what docs/memory.md states


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # Five layers: the last one has cross-attention, so that an answer reads the visual bank, too.
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("bundle"), layers=5))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("another"), seed=1, layers=5))


def frames(count: int, *, start: int = 0, seed: int = 0) -> list[Frame]:
    rng = np.random.default_rng(seed)
    scenes = rng.integers(0, 256, (start + count, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    return [Frame(scenes[t], 0.5 * t, time.monotonic(), t) for t in range(start, start + count)]


def see(session: Session, some: list[Frame]) -> None:
    for frame in some:
        session.see(frame)


def answers(session: Session) -> list[bytes]:
    """Every bit of what the Q-Former says: to each standing question, and to one that is put now."""
    asked = [*session.standing, OTHER]
    return [array.tobytes() for one in asked for soft in [session.perceive(one)] for array in (soft.rows, soft.query_output)]


# -- restored --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mbc", "fifo", "average", "last"])
@pytest.mark.parametrize("seen", [1, 3, 17])
def test_a_session_goes_on_from_its_snapshot_bit_for_bit(bundle: Bundle, tmp_path: Path, policy: Policy, seen: int) -> None:
    path = tmp_path / "memory.keepsight"
    everything = frames(seen + 9)
    with Session(bundle, memory=policy) as whole:
        whole.stand(QUESTION)
        whole.stand("anything", prompt=OTHER)
        see(whole, everything[:seen])
        whole.save(path, kv=True)
        at_save = answers(whole)
        see(whole, everything[seen:])
        with Session(bundle, memory=policy) as restored:
            restored.restore(path)
            assert [(one.question, one.prompt) for one in restored.standing] == [(QUESTION, None), ("anything", OTHER)]
            assert restored.frames_seen == seen and restored.time_s == everything[seen - 1].time_s
            assert answers(restored) == at_save
            for frame in everything[seen:]:
                restored.see(frame)
            assert answers(restored) == answers(whole)
            for name, array in whole.qformer.bank.state().items():
                assert array.tobytes() == restored.qformer.bank.state()[name].tobytes(), name


def test_a_question_put_after_the_last_frame_is_carried_on_from_the_next(bundle: Bundle, tmp_path: Path) -> None:
    everything = frames(8)
    with Session(bundle) as whole, Session(bundle) as restored:
        see(whole, everything[:6])
        whole.stand(QUESTION)
        whole.save(tmp_path / "m", kv=True)
        restored.restore(tmp_path / "m")
        with pytest.raises(UsageError, match="since the question was put"):
            restored.perceive(restored.standing[0])
        see(whole, everything[6:])
        see(restored, everything[6:])
        assert answers(restored) == answers(whole)


def test_a_restore_replaces_what_a_session_remembers(bundle: Bundle, tmp_path: Path) -> None:
    with Session(bundle) as first, Session(bundle) as second:
        first.stand(QUESTION)
        see(first, frames(3))  # not full: what the second one shows of its own must be gone
        first.save(tmp_path / "m", kv=True)
        second.stand(OTHER)
        second.stand(OTHER)
        see(second, frames(30, seed=5))
        second.restore(tmp_path / "m")
        assert answers(second) == answers(first)


def test_an_empty_memory_is_saved_and_restored(bundle: Bundle, tmp_path: Path) -> None:
    for kv in (False, True):
        with Session(bundle) as first, Session(bundle) as second:
            first.save(tmp_path / "m", kv=kv)
            restored = second.restore(tmp_path / "m")
            assert restored.frames_seen == second.frames_seen == 0 and restored.newest is None
            see(first, frames(7))
            see(second, frames(7))
            assert answers(first) == answers(second)


def test_without_keys_and_values_answers_are_equal_but_for_rounding(bundle: Bundle, tmp_path: Path) -> None:
    with Session(bundle) as whole, Session(bundle) as restored:
        whole.stand(QUESTION)
        see(whole, frames(40))
        with_kv, without = whole.save(tmp_path / "kv", kv=True), whole.save(tmp_path / "m")
        assert without < with_kv
        restored.restore(tmp_path / "m")
        for name, values in whole.qformer.bank.riders.items():
            theirs = restored.qformer.bank.riders[name]
            shown = whole.qformer.bank.visible[..., None]
            assert np.abs(np.where(shown, values - theirs, 0)).max() < KV_TOLERANCE * np.abs(values).max()
        for ask, asked in ((whole.standing[0], restored.standing[0]), (OTHER, OTHER)):
            difference = np.abs(whole.perceive(ask).rows - restored.perceive(asked).rows).max()
            assert np.abs(whole.perceive(ask).rows).max() > 0 and difference < 1e-4


@pytest.mark.parametrize(("tokens", "count", "length"), [(257, 24, 10), (2, 1500, 20)])
def test_keys_of_merged_features_are_merged_keys_at_full_width(tokens: int, count: int, length: int) -> None:
    """N=257, C=1408, H=768, and 1,500 frames: what `restore` computes is what had been merged, within the tolerance."""
    channels, hidden = 1408, 768
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((channels, hidden)) * 0.02).astype(np.float32)
    bias = rng.standard_normal(hidden).astype(np.float32)
    bank = MemoryBank(length=length, tokens=tokens, channels=channels, riders={"k": Rider(1, hidden)})
    scene = rng.standard_normal((tokens, channels))
    for t in range(count):
        if t % 50 == 0:
            scene = rng.standard_normal((tokens, channels))
        features = (scene + 0.3 * rng.standard_normal((tokens, channels))).astype(np.float32)
        bank.append(features, time_s=t, riders={"k": features @ weight + bias})
    state = bank.state()
    recomputed = state["features"][0] @ weight + bias
    merged = state[RIDER + "k"][0]
    assert (state["sizes"] > 1).any()
    assert np.abs(recomputed - merged).max() < KV_TOLERANCE * np.abs(merged).max()


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    with Session(bundle) as session:
        session.stand(QUESTION)
        see(session, frames(7))
        session.save(tmp_path / "memory.keepsight")
    return tmp_path / "memory.keepsight"


def refused(bundle: Bundle, path: Path, says: str, error: type[Exception] = SnapshotError, memory: Policy = "mbc") -> None:
    with Session(bundle, memory=memory) as session:
        session.stand(OTHER)
        see(session, frames(3))
        before = answers(session)
        with pytest.raises(error, match=says):
            session.restore(path)
        assert answers(session) == before, "a refused snapshot changed the memory"


def test_another_bundle_is_refused_with_both_names(another: Bundle, bundle: Bundle, saved: Path) -> None:
    own, other = fingerprint(bundle)[:12], fingerprint(another)[:12]
    refused(another, saved, rf"bundle random \({own}\), this is random \({other}\)")


def test_another_policy_is_refused(bundle: Bundle, saved: Path) -> None:
    refused(bundle, saved, "policy mbc, this session has fifo. Use --memory mbc", memory="fifo")


@pytest.mark.parametrize("where", ["image", "visual/features", "standing/0/rider.self_k"])
def test_a_flipped_bit_is_refused_and_named(bundle: Bundle, saved: Path, where: str) -> None:
    content = bytearray(saved.read_bytes())
    arrays = Snapshot.read(saved)
    wanted = {
        "image": arrays.newest and arrays.newest.image, "visual/features": arrays.visual["features"],
        "standing/0/rider.self_k": arrays.standing[0]["rider.self_k"],
    }[where]  # fmt: skip
    assert wanted is not None
    place = bytes(content).index(wanted.tobytes())
    content[place + wanted.nbytes // 2] ^= 4
    saved.write_bytes(content)
    refused(bundle, saved, f"section '.*{where}' is wrong")


def test_a_truncated_one_is_refused(bundle: Bundle, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    refused(bundle, saved, "truncated")


def test_a_whole_file_with_an_impossible_memory_is_refused(bundle: Bundle, saved: Path) -> None:
    snapshot = Snapshot.read(saved)
    visual = {**snapshot.visual, "sizes": snapshot.visual["sizes"] + 1}
    dataclasses.replace(snapshot, visual=visual).write(saved)
    refused(bundle, saved, "add up", UsageError)
    state = {**snapshot.standing[0], "norms": -snapshot.standing[0]["norms"]}
    dataclasses.replace(snapshot, standing=(state,)).write(saved)
    refused(bundle, saved, "norm", UsageError)


def test_a_section_file_that_is_no_snapshot_is_refused(bundle: Bundle, saved: Path) -> None:
    write_sections(saved, {"hello": 1}, {"x": np.zeros(3)})
    refused(bundle, saved, "no snapshot")


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    return Bundle(bundle.path, Manifest.model_validate({**bundle.manifest.model_dump(), **fields}))


def test_a_fingerprint_is_of_what_decides_the_meaning_of_a_memory(bundle: Bundle, tmp_path: Path) -> None:
    own, manifest = fingerprint(bundle), bundle.manifest
    assert fingerprint(changed(bundle, name="renamed", sample_fps=9.0, provenance={}, licences=())) == own
    replay = manifest.files | {manifest.graphs["replay"].files["fp32"]: "0" * 64}
    assert fingerprint(changed(bundle, files=replay)) == own
    for name in ("vision", "visual_kv", "prompt", "step"):
        files = manifest.files | {manifest.graphs[name].files["fp32"]: "0" * 64}
        assert fingerprint(changed(bundle, files=files)) != own, name
    assert manifest.tokenizer is not None
    for name in [manifest.tokenizer, *(file for file in manifest.files if file.endswith(".weights"))]:
        assert fingerprint(changed(bundle, files=manifest.files | {name: "0" * 64})) != own, name
    templates = {"qformer": "Q: {question}", "llm": manifest.templates.llm}
    assert fingerprint(changed(bundle, templates=templates)) != own
    assert fingerprint(Bundle.open(make_bundle(tmp_path / "longer", layers=5, memory_length=5))) != own


def test_a_variant_that_is_added_leaves_the_fingerprint(bundle: Bundle, tmp_path: Path) -> None:
    graphs = {
        name: {**info.model_dump(), "files": {**info.files, "fp16": info.files["fp32"]}}
        for name, info in bundle.manifest.graphs.items()
    }
    both = changed(bundle, graphs=graphs, variants=("fp32", "fp16"))
    assert "fp16" in manifest_text(both.manifest)
    assert fingerprint(both) == fingerprint(Bundle(both.path, both.manifest, "fp16")) == fingerprint(bundle)


# -- parts of others -------------------------------------------------------------------------------------------------


class Notes:
    """A part as others write them."""

    def __init__(self, *values: float) -> None:
        self.values = np.array(values)

    def state(self) -> dict[str, np.ndarray]:
        return {"values": self.values}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.values = state["values"]


def test_parts_are_saved_and_restored_by_name_whenever_their_owner_comes(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Session(bundle) as first:
        first.keep("notes", Notes(1, 2, 3))
        first.keep("more", Notes(4))
        first.save(path)
    with Session(bundle) as second:
        early, late = Notes(), Notes()
        second.keep("notes", early)
        second.restore(path)
        assert early.values.tolist() == [1, 2, 3]
        second.save(path)  # nobody has claimed `more` yet: it must not be lost
    with Session(bundle) as third:
        third.restore(path)
        third.keep("more", late)
        assert late.values.tolist() == [4]
        with pytest.raises(UsageError, match="'more'"):
            third.keep("more", late)
        third.forget()
        fresh = Notes(9)
        third.keep("notes", fresh)
        assert fresh.values.tolist() == [9], "a memory that was forgotten came back"


# -- time ------------------------------------------------------------------------------------------------------------


class FakeSource:
    """Frames with an address."""

    def __init__(self, uri: str, some: list[Frame]) -> None:
        self.uri, self._frames = SourceURI.parse(uri), some

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._frames)

    def __enter__(self) -> FakeSource:
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...


def watch(session: Session, uri: str, some: list[Frame]) -> None:
    session.watch(FakeSource(uri, some)).join(10)  # type: ignore[arg-type]


def live(times: list[float], *, captured: float) -> list[Frame]:
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return [Frame(image, t, captured + t, index) for index, t in enumerate(times)]


@pytest.mark.parametrize(("clock_s", "gap_s"), [(3600.0, 3600.0), (0.0, 0.0), (-5e8, 0.0)])
def test_a_camera_goes_on_behind_the_gap_that_the_clock_tells(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_s: float, gap_s: float
) -> None:
    """Saved at stream time 2, restored an hour later (or when the clock went back years: a board without a battery)."""
    now = time.time()
    with Session(bundle) as first:
        watch(first, "/dev/video0", live([0.0, 1.0, 2.0], captured=time.monotonic() - 2.0))
        assert first.time_s == 2.0
        first.save(tmp_path / "m")
    monkeypatch.setattr(saving.time, "time", lambda: now + clock_s)
    with Session(bundle) as second:
        snapshot = second.restore(tmp_path / "m")
        assert snapshot.newest is not None and snapshot.age_s == pytest.approx(clock_s, abs=2)
        assert snapshot.newest.as_frame().age_ms / 1000 == pytest.approx(gap_s, abs=2)
        watch(second, "/dev/video0", live([0.0, 0.5, 1.0], captured=time.monotonic()))
        assert second.time_s == pytest.approx(2.0 + gap_s + 1.0, abs=2)
        assert second.time_s >= 3.0 and second.frames_seen == 6
        newest = np.unique(second.qformer.bank.last_s[second.qformer.bank.visible])
        assert newest[-2] == pytest.approx(newest[-1] - 0.5)


def test_a_camera_that_comes_back_goes_on_behind_its_gap(bundle: Bundle) -> None:
    with Session(bundle) as session:
        start = time.monotonic() - 100
        watch(session, "rtsp://host/a", live([0.0, 1.0, 2.0], captured=start))
        watch(session, "rtsp://host/a", live([0.0, 1.0], captured=start + 32))
        assert session.time_s == pytest.approx(33.0) and session.frames_seen == 5


def test_a_file_goes_on_where_the_snapshot_was_taken(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(b"x")
    everything = frames(10)
    with Session(bundle) as whole, Session(bundle) as first:
        watch(whole, str(tmp_path / "a.npy"), everything)
        watch(first, str(tmp_path / "a.npy"), everything[:4])
        first.save(tmp_path / "m", kv=True)
        with Session(bundle) as second:
            second.restore(tmp_path / "m")
            watch(second, str(tmp_path / "a.npy"), everything)
            assert second.frames_seen == 10 and answers(second) == answers(whole)
        with Session(bundle) as third:  # another file is not the same film: nothing of it is skipped
            third.restore(tmp_path / "m")
            watch(third, str(tmp_path / "b.npy"), everything)
            assert third.frames_seen == 14 and third.time_s >= everything[3].time_s + everything[9].time_s


def test_a_restored_frame_tells_its_age(bundle: Bundle, saved: Path) -> None:
    with Session(bundle) as session:
        session.restore(saved)
        newest = Snapshot.read(saved).newest
        assert newest is not None
        assert newest.as_frame().age_ms / 1000 == pytest.approx(time.time() - newest.captured_wall_s, abs=1)
        assert np.array_equal(newest.image, frames(7)[-1].image) and newest.index == 6


# -- saving meanwhile ------------------------------------------------------------------------------------------------


def test_saves_while_frames_arrive_are_all_of_one_moment(bundle: Bundle, tmp_path: Path) -> None:
    path, everything = tmp_path / "m", frames(150)
    found = {}
    with Session(bundle) as session, Session(bundle) as plain, Session(bundle) as restored:
        session.stand(QUESTION)
        with Saver(session, path, every_s=0.005, kv=True) as saver:
            for frame in everything:
                session.see(frame)
                saves, deadline = saver.saved, time.monotonic() + 10
                while frame.index % 30 == 29 and saver.saved == saves and time.monotonic() < deadline:
                    time.sleep(0.001)  # a slow disk must not turn five saves into one
                if is_snapshot(path) and frame.index % 5 == 4:
                    snapshot = Snapshot.read(path)
                    found[snapshot.frames_seen] = snapshot
        assert saver.saved > 3 and saver.failed == 0
        assert Snapshot.read(path).frames_seen == 150, "the end was not saved"
        plain.stand(QUESTION)
        for frame in everything:
            plain.see(frame)
            if plain.frames_seen in found:
                restored.restore(found[plain.frames_seen])
                assert answers(restored) == answers(plain)
    assert len(found) > 2


def test_a_save_that_takes_too_long_skips_the_next_ones(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, at_once, most = Snapshot.write, threading.Lock(), 0.2

    def slow(snapshot: Snapshot, path: Path) -> int:
        assert at_once.acquire(blocking=False), "two saves at once"
        time.sleep(most)
        at_once.release()
        return write(snapshot, path)

    monkeypatch.setattr(Snapshot, "write", slow)
    with Session(bundle) as session, Saver(session, tmp_path / "m", every_s=0.05) as saver:
        start = time.monotonic()
        for frame in frames(40):
            session.see(frame)
            time.sleep(0.01)
        assert session.frames_seen == 40
        assert saver.skipped >= 2 and saver.saved <= (time.monotonic() - start) / most + 1


def test_a_save_that_fails_is_reported_and_tried_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, errors = Snapshot.write, []

    def failing(snapshot: Snapshot, path: Path) -> int:
        if len(errors) < 2:
            raise SnapshotError("the disk is full.")
        return write(snapshot, path)

    monkeypatch.setattr(Snapshot, "write", failing)
    with Session(bundle) as session:
        saver = Saver(session, tmp_path / "m", every_s=0.02, on_error=errors.append)
        see(session, frames(5))
        deadline = time.monotonic() + 10
        while not saver.saved and time.monotonic() < deadline:
            time.sleep(0.01)
        saver.close()
        assert saver.failed == 2 == len(errors) and saver.saved == 1
        assert Snapshot.read(tmp_path / "m").frames_seen == 5
        errors.clear()
        again = Saver(session, tmp_path / "m", every_s=100.0)
        see(session, frames(1, start=5))
        with pytest.raises(SnapshotError, match="full"):
            again.close()


def test_nothing_is_written_where_nothing_came(bundle: Bundle, tmp_path: Path) -> None:
    with Session(bundle) as session:
        with Saver(session, tmp_path / "m", every_s=0.01):
            time.sleep(0.1)
        assert not (tmp_path / "m").exists()
        see(session, frames(3))
        with Saver(session, tmp_path / "m", every_s=0.01) as saver:
            time.sleep(0.1)
        assert saver.saved == 0, "a memory that was restored or saved before is written again"
        with pytest.raises(UsageError, match="every 0 s"):
            Saver(session, tmp_path / "m", every_s=0)


# -- how much is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [False, True])
def test_the_bytes_that_are_promised_are_those_written(bundle: Bundle, tmp_path: Path, kv: bool) -> None:
    with Session(bundle) as session:
        session.stand(QUESTION)
        see(session, frames(12))
        rows = len(session.standing[0].carried.prompt.state)
        written = session.save(tmp_path / "m", kv=kv)
        parts = session.snapshot(kv=kv).parts.values()  # key frames have a budget of their own
        kept = sum(array.nbytes for state in parts for array in state.values())
        assert 0 < kept < session.key_frames.budget_bytes
        promised = snapshot_bytes(bundle.manifest.dims, question_rows=[rows], kv=kv) + kept
        assert 0 <= written - promised < 8000  # the header, and the query bank is as full as it gets
        assert (tmp_path / "m").stat().st_size == written


def test_bytes_at_full_size_are_those_in_the_readme(tmp_path: Path) -> None:
    """N=257, C=1408, six cross layers of 768, M=20: a full memory of random numbers, really written."""
    dims = Dims(
        image_size=224, tokens=257, channels=1408, queries=32, hidden=768, layers=12, cross_layers=(0, 2, 4, 6, 8, 10), heads=12,
        n_embd=4096, memory_length=20, text_buckets=(16, 32, 64, 128), position_buckets=1,
    )  # fmt: skip
    bank = MemoryBank(length=20, tokens=257, channels=1408, riders=dict.fromkeys(("cross_k", "cross_v"), Rider(6, 768)))
    rng = np.random.default_rng(0)
    for t in range(22):
        riders = {name: rng.random((6, 257, 768), np.float32) for name in bank.riders}
        bank.append(rng.random((257, 1408), np.float32), time_s=t, riders=riders)
    for kv, million in ((False, 30.6), (True, 229.6)):
        snapshot = Snapshot("b", "f", "fp32", "mbc", None, 0.0, None, bank.state(riders=kv))
        written, promised = snapshot.write(tmp_path / "m"), snapshot_bytes(dims, kv=kv)
        assert written == (tmp_path / "m").stat().st_size == pytest.approx(promised - 3 * 224**2, abs=8000)
        assert written / 1e6 == pytest.approx(million, abs=0.1)
    question = snapshot_bytes(dims, question_rows=[32 + 16], kv=True) - promised
    assert question / 1e6 == pytest.approx(102.7, abs=0.1)


def test_bytes_per_day_are_those_of_every_save() -> None:
    assert bytes_per_day(1000, 300) == 288_000
    with pytest.raises(UsageError):
        bytes_per_day(1000, 0)
