"""Training streams: scenes of pooled features through the runtime's own memory bank, cut into snapshots and sequences.

A *snapshot* is a bank as a question would find it at some moment of a stream. A *sequence* is a whole stream, frame by frame,
with what the bank decided, so that a standing question can be carried along. Both keep features in a basis of 256
directions: keys and values are affine in the features, so a projection learnt in the basis is folded back into the full
width when the graphs are written. Merge decisions are made on the full features, by `MemoryBank` itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from keepsight.export.pools import CHANNELS, SUCCESSORS, TOKENS, Pools
from keepsight.runtime.evaluation.scenes import FADE_SHARE, HOLD_FRAMES, plan_scenes
from keepsight.runtime.memory import MemoryBank, Policy, Rider
from keepsight.runtime.positions import OrderPositions

BASIS = 256
MAX_SCENES = 24
SNAPSHOTS = 8  # per stream
FRAME_S = 0.25


@dataclass(frozen=True)
class Basis:
    """Principal directions of the features: `mean` [1280], `directions` [1280, 256], orthonormal, and `scale` [256].

    Training reads `project(x) * scale`, which has unit variance in every direction: colors and shapes live in directions that
    vary fifty times less than the first, and learn too slowly without.
    """

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]
    scale: NDArray[np.float32]

    def project(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        centred: NDArray[np.float32] = features.astype(np.float32) - self.mean
        return np.matmul(centred, self.directions, dtype=np.float32)


def fit_basis(pools: Pools, path: Path) -> Basis:
    """Principal directions of a sample of the pools, or those of an earlier run at `path`."""
    if not path.exists():
        sample = np.concatenate([pools.stills[::8], pools.held[::8, 0], pools.fades[::16, 0, 0]])
        rows = sample.reshape(-1, CHANNELS)[::3].astype(np.float64)
        mean = rows.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov((rows - mean).T))
        scale = 1 / np.sqrt(values[::-1][:BASIS])
        directions = vectors[:, ::-1][:, :BASIS]
        np.savez(path, mean=mean, directions=directions, scale=scale)
    with np.load(path) as saved:
        return Basis(*(saved[name].astype(np.float32) for name in ("mean", "directions", "scale")))


@dataclass(frozen=True)
class _Walk:
    """One stream over the pools: the features of each frame and the scene that each frame belongs to (or fades from)."""

    pictures: list[int]
    features: NDArray[np.float16]
    scene: NDArray[np.int64]
    settled: NDArray[np.bool_]  # a held frame, not the first of its scene
    shown: NDArray[np.float32]  # [frames, MAX_SCENES], how much of a frame each scene is; each row adds up to 1


def _walk(pools: Pools, rng: np.random.Generator, scenes: int) -> _Walk:
    """Scenes as `plan_scenes` draws them; where one fades, it fades into a successor whose fade is in the pools."""
    index = {picture.path: place for place, picture in enumerate(pools.pictures)}
    plan = plan_scenes(pools.pictures, scenes, rng)
    chosen = [index[scene.picture.path] for scene in plan]
    allowed = {(scene.picture.shape, scene.picture.color) for scene in plan}
    parts: list[NDArray[np.float16]] = []
    scene_of: list[int] = []
    settled: list[bool] = []
    leaving: list[float] = []
    for place in range(scenes):
        current = chosen[place]
        hold = int(rng.integers(HOLD_FRAMES[0], HOLD_FRAMES[1] + 1))
        parts.append(pools.held[current][_looks(rng, hold)])
        scene_of += [place] * hold
        settled += [False] + [True] * (hold - 1)
        leaving += [0.0] * hold
        if place + 1 < scenes and rng.random() < FADE_SHARE:
            rank = int(rng.integers(SUCCESSORS))
            other = int(pools.successors[current, rank])
            label, here = (_label(pools, k) for k in (other, current))
            # The palette of the stream is kept: a successor outside it would change what the questions are about.
            following = _label(pools, chosen[place + 2]) if place + 2 < scenes else None
            if label in allowed and label not in (here, following):
                chosen[place + 1] = other
                fade = pools.fades[current, rank, :1] if rng.random() < 0.5 else pools.fades[current, rank, 1:]
                parts.append(fade)
                scene_of += [place] * len(fade)
                settled += [False] * len(fade)
                leaving += [(step + 1) / (len(fade) + 1) for step in range(len(fade))]
    return _Walk(chosen, np.concatenate(parts), np.array(scene_of), np.array(settled), _shares(scene_of, leaving))


def _shares(scene_of: Sequence[int], leaving: Sequence[float]) -> NDArray[np.float32]:
    """`[frames, MAX_SCENES]`: each frame shows its scene, but for the share that already is the next one's."""
    shown = np.zeros((len(scene_of), MAX_SCENES + 1), np.float32)
    frames = np.arange(len(scene_of))
    shown[frames, scene_of] = 1 - np.array(leaving)
    shown[frames, np.array(scene_of) + 1] = leaving
    return shown[:, :MAX_SCENES]


def _looks(rng: np.random.Generator, count: int) -> list[int]:
    """Which look of the camera each held frame shows, never the same twice in a row."""
    looks = [int(rng.integers(4))]
    while len(looks) < count:
        looks.append((looks[-1] + int(rng.integers(1, 4))) % 4)
    return looks


def _label(pools: Pools, index: int) -> tuple[str, str]:
    picture = pools.pictures[index]
    return picture.shape, picture.color


@dataclass(frozen=True)
class BankShape:
    """The bank that is trained for: memory length M, the number of time buckets of its positions, and how it makes room."""

    length: int
    time_buckets: int
    policy: Policy = "mbc"

    @property
    def slots(self) -> int:
        return self.length + 1


_RIDERS = {"basis": Rider(1, BASIS), "shown": Rider(1, MAX_SCENES)}
_context: tuple[Pools, Basis, BankShape, int] | None = None


def _start_worker(pools: Pools, basis: Basis, shape: BankShape, seed: int) -> None:
    global _context
    threadpool_limits(1)  # each worker would start a thread per core, and all of them would wait for each other
    _context = (pools, basis, shape, seed)


def _stream(index: int, whole: bool) -> dict[str, Any]:
    """Snapshots of stream `index`, or (whole) the sequence."""
    assert _context is not None
    pools, basis, shape, seed = _context
    rng = np.random.default_rng([seed, 10 + whole, index])
    walk = _walk(pools, rng, MAX_SCENES)
    projected = basis.project(walk.features)
    bank = MemoryBank(length=shape.length, tokens=TOKENS, channels=CHANNELS, riders=_RIDERS, policy=shape.policy)
    positions = OrderPositions(shape.slots, shape.time_buckets)
    wanted = set(rng.choice(np.flatnonzero(walk.settled), SNAPSHOTS, replace=False).tolist())
    rows: dict[str, list[Any]] = {}
    for frame, features in enumerate(walk.features):
        riders = {"basis": projected[frame], "shown": np.tile(walk.shown[frame], (TOKENS, 1))}
        bank.append(features.astype(np.float32), time_s=frame * FRAME_S, riders=riders)
        if whole:
            _record(rows, merge=bank.last_merge[0], rank=bank.rank_of_slot[0], size=bank.sizes[0], bucket=positions.step(bank))
        elif frame in wanted:
            slots, shown = (bank.riders[name][0].astype(np.float16) for name in ("basis", "shown"))
            shown[~bank.visible[0]] = 0  # a slot that a policy gave up keeps its rows, and nobody is to look there
            bucket, scene = positions.replay(bank), walk.scene[frame]
            _record(rows, slots=slots, shown=shown, rank=bank.rank_of_slot[0], bucket=bucket, scene=scene)
    if whole:
        rows |= {"features": list(projected.astype(np.float16)), "scene": list(walk.scene), "settled": list(walk.settled)}
    rows["pictures"] = walk.pictures
    return rows


def _record(rows: dict[str, list[Any]], **values: Any) -> None:
    for name, value in values.items():
        rows.setdefault(name, []).append(np.array(value))


_KINDS: dict[str, Any] = {
    "slots": np.float16, "shown": np.float16, "features": np.float16, "rank": np.int8, "bucket": np.int16, "merge": np.int8,
    "size": np.int16, "scene": np.int16, "settled": np.bool_,
}  # fmt: skip


def _streams(indices: tuple[list[int], bool]) -> list[dict[str, Any]]:
    return [_stream(index, indices[1]) for index in indices[0]]


def build_streams(
    folder: Path, pools: Pools, basis: Basis, shape: BankShape, *, count: int, whole: bool, seed: int
) -> dict[str, NDArray[Any]]:
    """`count` streams of 24 scenes in `folder`, or the finished files of an earlier run.

    Returns:
        Arrays with one row per snapshot (or per frame), and `stream` with the stream of each row; `pictures` `[count, 24]`
        the pictures of every stream.
    """
    name = "sequences" if whole else "snapshots"
    target = folder / name
    if not target.exists():
        partial = folder / f"{name}.partial"
        partial.mkdir(exist_ok=True, parents=True)
        _write_streams(partial, pools, basis, shape, count, whole, seed)
        partial.rename(target)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in target.glob("*.npy")}
    if len(arrays["pictures"]) != count:
        raise ValueError(f"{target} holds {len(arrays['pictures'])} streams, {count} are asked for; remove the folder.")
    made = BankShape(**json.loads((target / "shape.json").read_text()))
    if made != shape:
        raise ValueError(f"{target} was made for {made}, {shape} is asked for; remove the folder.")
    return arrays


def _write_streams(
    folder: Path, pools: Pools, basis: Basis, shape: BankShape, count: int, whole: bool, seed: int
) -> None:
    jobs = [(list(range(start, min(start + 8, count))), whole) for start in range(0, count, 8)]
    columns: dict[str, list[NDArray[Any]]] = {}
    pictures: list[list[int]] = []
    stream_of: list[int] = []
    with ProcessPoolExecutor(
        os.cpu_count(), initializer=_start_worker, initargs=(pools, basis, shape, seed)
    ) as pool, Progress() as bar:
        task = bar.add_task("sequences" if whole else "snapshots", total=count)
        for made in pool.map(_streams, jobs):
            for rows in made:
                stream_of += [len(pictures)] * len(rows["scene"])
                pictures.append(rows.pop("pictures"))
                for key, values in rows.items():
                    columns.setdefault(key, []).append(np.array(values, dtype=_KINDS[key]))
            bar.advance(task, len(made))
    for key, parts in columns.items():
        np.save(folder / f"{key}.npy", np.concatenate(parts))
    np.save(folder / "pictures.npy", np.array(pictures))
    np.save(folder / "stream.npy", np.array(stream_of))
    (folder / "shape.json").write_text(json.dumps(vars(shape)))


def labels_until(pools: Pools, pictures: NDArray[np.int64], scene: int) -> list[tuple[str, str]]:
    """(shape, color) of every scene from the first to `scene`."""
    return [_label(pools, int(index)) for index in pictures[: scene + 1]]


__all__: list[str] = [
    "BASIS", "MAX_SCENES", "BankShape", "Basis", "build_streams", "fit_basis", "labels_until",
]  # fmt: skip


