"""Features of the training pictures, computed once: as still pictures, as held scenes, and as cross-fades between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.easyvqa import Picture
from keepsight.runtime.evaluation.scenes import Scene, render

IMAGE_SIZE = 224
TOKENS, CHANNELS = 49, 1280
VARIANTS = 4  # looks of one camera at a held picture
SUCCESSORS = 2  # pictures that each picture fades into
BATCH = 16


@dataclass(frozen=True)
class Pools:
    """Memory-mapped float16 features, `[..., 49, 1280]`.

    Attributes:
        stills: one clean look at every picture that has questions, by image id.
        held: `[pictures, VARIANTS]` looks of one unsteady camera per picture.
        fades: `[pictures, SUCCESSORS, 3]`: a one-frame fade (index 0) and a two-frame fade (1, 2) into a successor.
        successors: `[pictures, SUCCESSORS]` index of the picture that is faded into.
    """

    pictures: list[Picture]
    stills: NDArray[np.float16]
    held: NDArray[np.float16]
    fades: NDArray[np.float16]
    successors: NDArray[np.int64]


def read_picture(path: Path) -> NDArray[np.uint8]:
    """RGB pixels `[H, W, 3]`."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def still(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture scaled to the encoder's size as GStreamer's bilinear scaler does, uint8 `[224, 224, 3]`."""
    image = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def build_pools(folder: Path, vision: Path, seed: int) -> Pools:
    """Compute the pools with the `vision` graph, or map the finished files of an earlier run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = easyvqa.pictures("train")
    rng = np.random.default_rng([seed, 0])
    successors = rng.integers(len(pictures), size=(len(pictures), SUCCESSORS))
    asked = {question.picture.path for question in easyvqa.load("train")}
    stills = sorted(asked, key=lambda path: int(path.stem))
    shapes = {"stills": (len(stills),), "held": (len(pictures), VARIANTS), "fades": (len(pictures), SUCCESSORS, 3)}
    for name, leading in shapes.items():
        target = folder / f"{name}.npy"
        if not target.exists():
            works = list(_works(name, pictures, stills, successors, seed))
            _fill(target, leading, works, vision, name)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
    return Pools(pictures, arrays["stills"], arrays["held"], arrays["fades"], successors)


@dataclass(frozen=True)
class _Work:
    """Frames to encode: which pool, the pictures involved, the seed."""

    pool: str
    paths: tuple[Path, ...]
    seed: tuple[int, ...]


def _works(
    pool: str, pictures: list[Picture], stills: Sequence[Path], successors: NDArray[np.int64], seed: int
) -> Iterator[_Work]:
    if pool == "stills":
        yield from (_Work(pool, (path,), ()) for path in stills)
    elif pool == "held":
        yield from (_Work(pool, (picture.path,), (seed, 1, index)) for index, picture in enumerate(pictures))
    else:
        for index, picture in enumerate(pictures):
            for rank in range(SUCCESSORS):
                other = int(successors[index, rank])
                yield _Work(pool, (picture.path, pictures[other].path), (seed, 2, index, rank))


def _frames(work: _Work) -> NDArray[np.uint8]:
    pixels = [read_picture(path) for path in work.paths]
    if work.pool == "stills":
        return still(pixels[0])[None]
    rng = np.random.default_rng(work.seed)
    if work.pool == "held":
        scene = Scene(Picture(work.paths[0], "", ""), VARIANTS, 0)
        return np.stack(list(render([scene], pixels, IMAGE_SIZE, rng)))
    first, second = (Picture(path, "", "") for path in work.paths)
    looks: list[NDArray[np.uint8]] = []
    for length in (1, 2):
        stream = render([Scene(first, 0, length), Scene(second, 0, 0)], pixels, IMAGE_SIZE, rng)
        looks.extend(stream)
    return np.stack(looks)


_session: ort.InferenceSession | None = None


def _start_worker(vision: str) -> None:
    global _session
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    _session = ort.InferenceSession(vision, options, providers=["CPUExecutionProvider"])


def _encode(works: Sequence[_Work]) -> NDArray[np.float16]:
    assert _session is not None
    frames = np.concatenate([_frames(work) for work in works])
    features = [
        _session.run(["features"], {"frames": frames[start : start + BATCH]})[0]
        for start in range(0, len(frames), BATCH)
    ]
    return np.concatenate(features).astype(np.float16)


def _fill(target: Path, leading: tuple[int, ...], works: list[_Work], vision: Path, name: str) -> None:
    """Encode all works on every core and move the finished file into place."""
    partial = target.with_suffix(".partial.npy")
    rows = int(np.prod(leading))
    progress = target.with_suffix(".progress")
    done = int(progress.read_text()) if progress.exists() and partial.exists() else 0
    shape = (*leading, TOKENS, CHANNELS)
    array = np.lib.format.open_memmap(partial, mode="r+" if done else "w+", dtype=np.float16, shape=shape)
    flat = array.reshape(rows, TOKENS, CHANNELS)
    per_work = rows // len(works)
    chunks = [works[start : start + 16] for start in range(done // per_work, len(works), 16)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=_start_worker, initargs=(str(vision),)) as pool, Progress() as bar:
        task = bar.add_task(f"features of {name}", total=rows)
        for features in pool.map(_encode, chunks):
            flat[done : done + len(features)] = features
            done += len(features)
            bar.update(task, completed=done)
            progress.write_text(str(done))
    array.flush()
    partial.rename(target)
    progress.unlink()
