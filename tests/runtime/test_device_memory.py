"""A whole stream with its visual memory on the device: with the doubles of TensorRT and of the CUDA driver."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.clips import synthetic_clip
from keepsight.runtime.graphs import backends
from keepsight.runtime.graphs.backends import open_engines
from keepsight.runtime.graphs.cuda import CudaStream
from keepsight.runtime.graphs.tensorrt_build import build_engines, this_target
from keepsight.runtime.inspect import describe, print_report
from keepsight.runtime.memory import Policy
from keepsight.runtime.qformer import QFormer
from keepsight.runtime.session import Session
from keepsight.streams import Frame
from keepsight.streams.errors import EngineError

from ..random_bundle import make_bundle, random_frames
from .fake_cuda import load_driver
from .fake_tensorrt import fake_tensorrt

QUESTION = "what was there first?"
FRAMES = random_frames(14)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double in place of `tensorrt`; what was put on the device is gone at the end."""
    driver = load_driver()
    held = driver.keepsight_allocated(), driver.keepsight_streams(), driver.keepsight_graphs()
    module = fake_tensorrt()
    monkeypatch.setattr(backends, "import_tensorrt", lambda: module)
    yield module
    assert held == (driver.keepsight_allocated(), driver.keepsight_streams(), driver.keepsight_graphs())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", layers=3)


@pytest.fixture
def built(path: Path, trt: Any) -> Bundle:
    bundle = Bundle.open(path)
    build_engines(bundle, trt, this_target(trt))
    return bundle


def without_memory(bundle: Bundle) -> Bundle:
    """As bundles are that were exported before there was a graph `memory`."""
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "memory"}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs}))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Bytes of every copy between host and device."""
    log: dict[str, list[int]] = {"in": [], "out": [], "within": []}
    copy_in, copy_out, copy_within = CudaStream.copy_in, CudaStream.copy_out, CudaStream.copy_within

    def note_in(self: CudaStream, address: int, array: np.ndarray) -> None:
        log["in"].append(array.nbytes)
        copy_in(self, address, array)

    def note_out(self: CudaStream, array: np.ndarray, address: int) -> None:
        log["out"].append(array.nbytes)
        copy_out(self, array, address)

    def note_within(self: CudaStream, to: int, source: int, size: int) -> None:
        log["within"].append(size)
        copy_within(self, to, source, size)

    monkeypatch.setattr(CudaStream, "copy_in", note_in)
    monkeypatch.setattr(CudaStream, "copy_out", note_out)
    monkeypatch.setattr(CudaStream, "copy_within", note_within)
    return log


def clear(copied: dict[str, list[int]]) -> None:
    for sizes in copied.values():
        sizes.clear()


def test_features_keys_and_values_never_leave_the_device(built: Bundle, copied: dict[str, list[int]]) -> None:
    dims = built.manifest.dims
    with open_engines(built, "tensorrt") as engines:
        qformer = QFormer(built, engines=engines)
        standing = [qformer.stand(qformer.prompt(question)) for question in (QUESTION, "is there a circle?")]
        for index, frame in enumerate(FRAMES):
            clear(copied)
            qformer.remember(qformer.encode(frame[None])[0], float(index))
            by_slot, by_token = 4 * dims.slots * dims.tokens, 4 * dims.tokens
            # Order and sizes there; which pairs were merged, and whether all is finite, back.
            assert copied == {"in": [frame.nbytes, by_slot, by_slot, by_token, by_token], "out": [by_token] * 2, "within": []}
            clear(copied)
            for carried in standing:
                carried.step(float(index))
            standing[0].answer()
            qformer.replay(standing[0].prompt)
            keys = qformer.bank.riders["cross_k"]
            of_the_bank = {qformer.bank.features.nbytes, keys.nbytes, keys[-1].nbytes}  # all, or what the last layer reads
            of_the_frame = {size // dims.slots for size in of_the_bank}
            assert not (of_the_bank | of_the_frame) & {*copied["in"], *copied["out"]} and copied["within"] == []


def test_after_two_frames_of_each_half_every_graph_of_the_stream_is_launched_as_one(built: Bundle, trt: Any) -> None:
    """The bank's two halves take turns, and each of the graphs that read it has a CUDA graph for both."""
    launches = load_driver().keepsight_launches
    with open_engines(built, "tensorrt") as engines:
        qformer = QFormer(built, engines=engines)
        standing = qformer.stand(qformer.prompt(QUESTION))
        for index, frame in enumerate(FRAMES):
            before, executed = launches(), trt.record.executed
            qformer.remember(qformer.encode(frame[None])[0], float(index))
            standing.step(float(index))
            if index > 4:  # vision, visual_kv, memory, step; and nothing is captured any more
                assert (launches() - before, trt.record.executed - executed) == (4, 0)


@pytest.mark.parametrize("policy", ["mbc", "fifo", "average", "last"])
def test_every_policy_says_on_the_device_what_it_says_on_the_host(built: Bundle, policy: Policy) -> None:
    said: list[list[np.ndarray]] = []
    for bundle in (built, without_memory(built)):
        with open_engines(bundle, "tensorrt") as engines:
            qformer = QFormer(bundle, memory=policy, engines=engines)
            assert qformer.bank_on == ("device" if bundle is built else "host")
            standing = qformer.stand(qformer.prompt(QUESTION))
            rows = []
            for index, frame in enumerate(FRAMES):
                qformer.remember(qformer.encode(frame[None])[0], float(index))
                standing.step(float(index))
                rows += [standing.answer().rows, qformer.replay(standing.prompt).rows]
            said.append(rows)
    for one, other in zip(*said, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_shipped_bundle_says_on_the_device_what_it_says_on_the_cpu(trt: Any, tmp_path: Path) -> None:
    shutil.copytree(Bundle.open("tiny").path, tmp_path / "tiny")
    bundle = Bundle.open(tmp_path / "tiny")
    build_engines(bundle, trt, this_target(trt))
    frames = synthetic_clip(24, bundle.manifest.dims.image_size)
    said, merges = [], []
    for backend in ("cpu", "tensorrt"):
        with open_engines(bundle, backend) as engines:
            qformer = QFormer(bundle, engines=engines)
            standing = qformer.stand(qformer.prompt(QUESTION))
            for index, frame in enumerate(frames):
                qformer.remember(qformer.encode(frame[None])[0], index / 4)
                standing.step(index / 4)
                merges.append(qformer.bank.last_merge.copy())
            said.append([standing.answer().rows, qformer.replay(standing.prompt).rows])
    np.testing.assert_array_equal(*np.split(np.array(merges), 2))
    for one, other in zip(*said, strict=True):  # the double runs on all cores, which sum in another order
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


def test_a_frame_that_is_not_finite_is_refused_and_the_stream_goes_on(built: Bundle) -> None:
    def watch(bad: tuple[int, ...]) -> np.ndarray:
        with open_engines(built, "tensorrt") as engines:
            qformer = QFormer(built, engines=engines)
            for index, frame in enumerate(FRAMES):
                features = np.asarray(qformer.encode(frame[None])[0])
                if index in bad:
                    with pytest.raises(EngineError, match="of the frame hold nan or inf, in 1 of 9 tokens"):
                        qformer.remember(np.where(np.arange(9)[:, None] == 4, np.float32(np.nan), features), float(index))
                qformer.remember(features, float(index))
            return qformer.replay(qformer.prompt(QUESTION)).rows

    np.testing.assert_array_equal(watch(bad=(0, 3, 7, 8)), watch(bad=()))


def test_a_saved_memory_goes_on_on_the_device(built: Bundle) -> None:
    features = [np.asarray(QFormer(built).encode(frame[None])[0]) for frame in FRAMES]
    with open_engines(built, "tensorrt") as engines:
        qformer = QFormer(built, engines=engines)
        for index, rows in enumerate(features):
            if index == 9:
                states = [qformer.bank_state(kv=kv) for kv in (True, False)]
            qformer.remember(rows, float(index))
        wanted = qformer.replay(qformer.prompt(QUESTION)).rows
        for state, tolerance in zip(states, (0, 1e-4), strict=True):
            qformer.restore_bank(state)
            for index, rows in enumerate(features[9:], start=9):
                qformer.remember(rows, float(index))
            np.testing.assert_allclose(qformer.replay(qformer.prompt(QUESTION)).rows, wanted, atol=tolerance, rtol=0)


def test_a_question_about_another_memory_leaves_the_one_on_the_device_alone(built: Bundle) -> None:
    with open_engines(built, "tensorrt") as engines:
        qformer = QFormer(built, engines=engines)
        for index, frame in enumerate(FRAMES):
            qformer.remember(qformer.encode(frame[None])[0], float(index))
        prompt = qformer.prompt(QUESTION)
        before = qformer.replay(prompt).rows
        other = qformer.with_empty_bank()
        assert other.bank_on == "host"
        for index, frame in enumerate(FRAMES[:3]):
            other.remember(np.asarray(other.encode(frame[None])[0]), float(index))
        assert not np.array_equal(other.replay(prompt).rows, before)
        np.testing.assert_array_equal(qformer.replay(prompt).rows, before)
        qformer.remember(qformer.encode(FRAMES[:1])[0], 99.0)


def test_it_is_said_where_the_visual_memory_is(
    built: Bundle, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "keepsight.qformer")
    for bundle, backend in ((built, "tensorrt"), (without_memory(built), "tensorrt"), (built, "cpu")):
        with open_engines(bundle, backend) as engines:
            QFormer(bundle, engines=engines)
    assert caplog.messages == [f"the visual memory of random is on the {where}" for where in ("device", "host", "host")]
    for bundle, said in ((built, "on the GPU with TensorRT"), (without_memory(built), "no graph `memory`")):
        print_report(describe(bundle))
        assert said in capsys.readouterr().out


def alone(bundle: Bundle, frames: np.ndarray) -> list[np.ndarray]:
    """What a memory says that has the engines for itself: of a standing question and by replay, after each frame."""
    with open_engines(bundle, "tensorrt") as engines:
        qformer = QFormer(bundle, engines=engines)
        return [rows for step in said_by(qformer, frames) for rows in step()]


def said_by(qformer: QFormer, frames: np.ndarray) -> list[Callable[[], list[np.ndarray]]]:
    standing = qformer.stand(qformer.prompt(QUESTION))

    def step(index: int) -> list[np.ndarray]:
        qformer.remember(qformer.encode(frames[index][None])[0], float(index))
        standing.step(float(index))
        return [standing.answer().rows, qformer.replay(standing.prompt).rows]

    return [partial(step, index) for index in range(len(frames))]


def test_two_memories_on_the_device_say_together_what_each_says_alone(built: Bundle, trt: Any) -> None:
    """In turns, so that all that one has left in a buffer is overwritten by the other; and nothing is captured in the end."""
    streams = [random_frames(14, seed=seed) for seed in (0, 1)]
    with open_engines(built, "tensorrt") as engines:
        first = QFormer(built, engines=engines)
        second = first.beside()
        assert second.bank_on == "device"
        said: list[list[np.ndarray]] = [[], []]
        for turn in zip(said_by(first, streams[0]), said_by(second, streams[1]), strict=True):
            before = trt.record.executed
            for rows, step in zip(said, turn, strict=True):
                rows += step()
        assert trt.record.executed == before, "of two memories, each half has its CUDA graph"
    for rows, frames in zip(said, streams, strict=True):
        np.testing.assert_array_equal(rows, alone(built, frames))


def test_two_threads_may_see_frames_of_two_cameras(built: Bundle) -> None:
    """Features stay on the device until the next frame, which must not be the other camera's."""
    streams = [random_frames(30, seed=seed) for seed in (0, 1)]
    with Session(built, engines=open_engines(built, "tensorrt")) as first, ThreadPoolExecutor() as threads:
        sessions = [first, first.beside()]

        def watch(session: Session, frames: np.ndarray) -> np.ndarray:
            for index, image in enumerate(frames):
                session.see(Frame(image, float(index), 0.0, index))
            return session.perceive(QUESTION).rows

        said = list(threads.map(watch, sessions, streams))
    for rows, frames in zip(said, streams, strict=True):
        with Session(built, engines=open_engines(built, "tensorrt")) as alone:
            np.testing.assert_array_equal(rows, watch(alone, frames))


def test_engines_that_have_room_for_one_memory_are_not_shared_by_two(built: Bundle) -> None:
    bundle = without_memory(built)
    with open_engines(bundle, "tensorrt") as engines, pytest.raises(EngineError, match="no graph 'memory'"):
        QFormer(bundle, engines=engines).beside()
    with open_engines(built, "tensorrt") as engines:
        own = backends.Engines({name: engines[name] for name in engines}, memory=engines.memory)
        with pytest.raises(EngineError, match="one memory on the device"):
            QFormer(built, engines=own).beside()
