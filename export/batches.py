"""Training batches: single pictures, snapshots of streams, and the tensors that `dense.replay` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keepsight.export.dense import Banks
from keepsight.export.pools import Pools
from keepsight.export.questions import QuestionSet, TextBatch
from keepsight.export.streamset import Basis, labels_until


@dataclass(frozen=True)
class Batch:
    """`text_ids`, `text_mask` `[B, n, L]`, the banks of B streams, and answers `[B, n]` as indices into `ANSWERS`."""

    text_ids: Tensor
    text_mask: Tensor
    banks: Banks
    answers: Tensor
    rows: list[list[tuple[str, str]]]


class PictureBatches:
    """Single pictures, a bank of one frame each: clean ones and unsteady looks, half and half."""

    def __init__(self, pools: Pools, basis: Basis, questions: QuestionSet, text: TextBatch, cache: Path) -> None:
        self.questions, self.text, self.scale = questions, text, torch.from_numpy(basis.scale)
        self.paths = [*questions.stills, *(picture.path for picture in pools.pictures)]
        self.stills = _projected(basis, pools.stills[:, None], cache / "stills.npy")
        self.looks = _projected(basis, pools.held, cache / "looks.npy")

    def draw(self, pictures: int, each: int, rng: np.random.Generator) -> Batch:
        chosen = rng.integers(len(self.paths), size=pictures)
        rows = [[self.questions.present(self.paths[index], rng) for _ in range(each)] for index in chosen]
        features = torch.stack([self._features(int(index), rng) for index in chosen])
        ids, mask, answers = self.text(rows)
        return Batch(ids, mask, one_frame(features), answers, rows)

    def _features(self, index: int, rng: np.random.Generator) -> Tensor:
        pool, place = (self.stills, index) if index < len(self.stills) else (self.looks, index - len(self.stills))
        return torch.from_numpy(pool[place, rng.integers(pool.shape[1])].astype(np.float32)) * self.scale


def _projected(basis: Basis, features: NDArray[np.float16], cache: Path) -> NDArray[np.float16]:
    """`[P, V, N, 1280]` to the basis, in pieces that fit memory; kept in a file."""
    if not cache.exists():
        starts = range(0, len(features), 256)
        rows = np.concatenate([basis.project(features[at : at + 256]).astype(np.float16) for at in starts])
        partial = cache.with_suffix(".partial.npy")
        np.save(partial, rows)
        partial.rename(cache)
    return np.asarray(np.load(cache))


def one_frame(features: Tensor) -> Banks:
    """Banks that hold one frame, `[B, N, C]`: rank 0 and age 0, bucket 1."""
    ones = torch.ones(features.shape[0], 1, 1, features.shape[1], dtype=torch.bool)
    return Banks(features[:, None], ones, ones.to(torch.int64), ones[:, :, 0, 0])


class SnapshotBatches:
    """Snapshots of streams up to a number of scenes, with questions about the past and the present."""

    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        pools: Pools,
        basis: Basis,
        questions: QuestionSet,
        text: TextBatch,
        streams: range,
    ) -> None:
        self.arrays, self.pools, self.questions, self.text = arrays, pools, questions, text
        self.scale = torch.from_numpy(basis.scale)
        self.scene = np.asarray(arrays["scene"])
        self.stream = np.asarray(arrays["stream"])
        self.mine = np.flatnonzero((self.stream >= streams.start) & (self.stream < streams.stop))

    def draw(self, snapshots: int, each: int, steps: int, scenes: tuple[int, int], rng: np.random.Generator) -> Batch:
        """Snapshots of streams with `scenes` (fewest, most) scenes so far, `each` questions about every one.

        `steps` 1 reads the bank once, S replays it slot by slot; in between, a random choice of steps is replayed that
        ends with the newest: as instructive for the time it takes, and no step can rely on any other.
        """
        seen = self.scene[self.mine] + 1
        chosen = rng.choice(self.mine[(seen >= scenes[0]) & (seen <= scenes[1])], snapshots, replace=False)
        return self.batch(chosen, each, steps, rng)

    def batch(self, chosen: Sequence[int] | NDArray[np.int64], each: int, steps: int, rng: np.random.Generator) -> Batch:
        rows = [self.ask(int(index), each, rng) for index in chosen]
        ids, mask, answers = self.text(rows)
        slots = self.arrays["rank"].shape[1]
        replayed = np.append(np.sort(rng.choice(slots - 1, steps - 1, replace=False)), slots - 1)
        return Batch(ids, mask, self._banks(np.sort(np.asarray(chosen)), np.asarray(chosen), replayed), answers, rows)

    def ask(self, index: int, each: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        pictures, scene = self.arrays["pictures"][self.stream[index]], int(self.scene[index])
        labels = labels_until(self.pools, pictures, scene)
        return self.questions.about_stream(self.pools.pictures[int(pictures[scene])].path, labels, each, rng)

    def _banks(self, ordered: NDArray[np.int64], chosen: NDArray[np.int64], steps: NDArray[np.int64]) -> Banks:
        back = np.searchsorted(ordered, chosen)  # memory-mapped rows are read in order
        rank = torch.from_numpy(self.arrays["rank"][ordered][back].astype(np.int64))
        features = torch.from_numpy(self.arrays["slots"][ordered][back].astype(np.float32)) * self.scale
        bucket = torch.from_numpy(self.arrays["bucket"][ordered][back].astype(np.int64))
        now = torch.from_numpy(steps)
        bucket = bucket[:, now]
        visible = (rank[:, None] >= 0) & (rank[:, None] <= now[None, :, None, None])
        return Banks(features, visible, bucket, visible.flatten(2).any(-1))



