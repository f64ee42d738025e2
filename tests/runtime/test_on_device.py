"""On a board, or any machine with an NVIDIA GPU and TensorRT: real engines, against ONNX Runtime on the CPU.

Run them with `pytest -m device`. Elsewhere they are skipped, and counted as skipped.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.clips import synthetic_clip
from keepsight.runtime.graphs.backends import open_engines
from keepsight.runtime.graphs.cuda import CudaStream
from keepsight.runtime.graphs.engine_check import check_engines
from keepsight.runtime.graphs.tensorrt_build import build_engines, tensorrt_for
from keepsight.runtime.qformer import QFormer
from keepsight.streams import Frame

from .fake_cuda import HAS_DRIVER

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(
        not HAS_DRIVER or importlib.util.find_spec("tensorrt") is None, reason="there is no NVIDIA GPU with TensorRT here"
    ),
]

QUESTION = "what was there first?"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """keepsight-tiny, with engines for this machine."""
    path = tmp_path_factory.mktemp("device") / "tiny"
    shutil.copytree(Bundle.open("tiny").path, path)
    bundle = Bundle.open(path)
    build_engines(bundle, *tensorrt_for(None), progress=print)
    return bundle


@pytest.fixture
def stream() -> Iterator[CudaStream]:
    made = CudaStream()
    yield made
    made.close()


def test_what_is_copied_to_the_device_comes_back(stream: CudaStream) -> None:
    array, back = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    with stream:
        first, second = stream.allocate(array.nbytes), stream.allocate(array.nbytes)
        stream.copy_in(first, array)
        stream.copy_within(second, first, array.nbytes)
        stream.copy_out(back, second)
        stream.synchronize()
        stream.free(first)
        stream.free(second)
    np.testing.assert_array_equal(back, array)


def test_a_second_build_builds_nothing(built: Bundle) -> None:
    states: list[str] = []
    build_engines(built, *tensorrt_for(None), progress=lambda step: states.append(step.state))
    assert set(states) == {"unchanged"}


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_engines_say_what_the_graphs_say(built: Bundle, cuda_graphs: bool) -> None:
    frames = [Frame(image, float(index), 0.0, index) for index, image in enumerate(synthetic_clip(40, 224))]
    engines = open_engines(built, "tensorrt", cuda_graphs=cuda_graphs)
    report = check_engines(built, engines, frames, QUESTION, clip="40 synthetic frames", backend="tensorrt")
    assert report.passed, report.failures


def test_every_text_bucket_runs_and_runs_again(built: Bundle) -> None:
    with open_engines(built, "tensorrt") as engines, open_engines(built) as reference:
        for bucket in (*built.manifest.dims.text_buckets, *built.manifest.dims.text_buckets):
            feeds = {"text_ids": np.arange(bucket) % 7, "text_mask": np.ones(bucket, np.float32)}
            got, wanted = (side["prompt"].run(feeds)["prompt_state"] for side in (engines, reference))
            np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_latency_is_printed(built: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Milliseconds of encoder, memory and step for one frame, with and without CUDA graphs; nothing is asserted of them."""
    frames = synthetic_clip(60, 224)
    for cuda_graphs in (True, False):
        with open_engines(built, "tensorrt", cuda_graphs=cuda_graphs) as engines:
            qformer = QFormer(built, engines=engines)
            standing = qformer.stand(qformer.prompt(QUESTION))
            taken = []
            for index, frame in enumerate(frames):
                start = perf_counter()
                features = qformer.encode(frame[None])[0]
                seen = perf_counter()
                qformer.remember(features, float(index))
                remembered = perf_counter()
                standing.step(float(index))
                taken.append((seen - start, remembered - seen, perf_counter() - remembered))
            vision, memory, step = 1000 * np.median(taken[10:], axis=0)
        with capsys.disabled():
            print(f"\nCUDA graphs {cuda_graphs}: vision {vision:.2f} ms, memory {memory:.2f} ms, step {step:.2f} ms")
