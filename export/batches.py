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
from keepsight.runtime.evaluation.scenes import Label, StreamQuestion


@dataclass(frozen=True)
class Batch:
    """Questions about B streams, n about each, and what answers them.

    Attributes:
        text_ids, text_mask: `[B, n, L]`.
        banks: what the streams remember.
        answers: `[B, n]`, indices into `ANSWERS`.
        rows: the questions `[B][n]`.
        labels: (shape, color) of every scene, by stream; None for a picture whose label no question tells.
        scenes: float32 `[B, K, scenes]`, how much of every visual token each scene is.
    """

    text_ids: Tensor
    text_mask: Tensor
    banks: Banks
    answers: Tensor
    rows: list[list[StreamQuestion]]
    labels: list[list[Label | None]]
    scenes: Tensor


class PictureBatches:
    """Single pictures, a bank of one frame each: clean ones and unsteady looks, half and half."""

    def __init__(self, pools: Pools, basis: Basis, questions: QuestionSet, text: TextBatch, cache: Path) -> None:
        self.questions, self.text, self.scale = questions, text, torch.from_numpy(basis.scale)
        self.labels: dict[Path, Label] = {picture.path: (picture.shape, picture.color) for picture in pools.pictures}
        self.paths = [*questions.stills, *(picture.path for picture in pools.pictures)]
        self.stills = _projected(basis, pools.stills[:, None], cache / "stills.npy")
        self.looks = _projected(basis, pools.held, cache / "looks.npy")

    def draw(self, pictures: int, each: int, rng: np.random.Generator) -> Batch:
        chosen = rng.integers(len(self.paths), size=pictures)
        rows = [[self.questions.present(self.paths[index], rng) for _ in range(each)] for index in chosen]
        features = torch.stack([self._features(int(index), rng) for index in chosen])
        ids, mask, answers = self.text(rows)
        labels = [[self.labels.get(self.paths[index])] for index in chosen]
        return Batch(ids, mask, one_frame(features), answers, rows, labels, torch.ones(*features.shape[:2], 1))

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
    return Banks(features[:, None, None], ones, ones.to(torch.int64), ones[:, :, 0, 0])


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
        slots = self.arrays["rank"].shape[1]
        replayed = np.append(np.sort(rng.choice(slots - 1, steps - 1, replace=False)), slots - 1)
        bank = _in_use(self._read(np.asarray(chosen)))
        return self._ask_about(chosen, each, bank["shown"], self._replay_banks(bank, replayed), rng)

    def draw_standing(self, streams: int, each: int, steps: int, scenes: tuple[int, int], rng: np.random.Generator) -> Batch:
        """Questions that were asked at the first of `steps` moments of a stream, and stood: each moment reads its own bank.

        The moments are snapshots of one stream; at the last, which is asked about, it has had `scenes` scenes. The runtime
        merges what a standing question remembers where it repeats itself; moments far apart do not.
        """
        seen = self.scene[self.mine] + 1
        fits = (seen >= scenes[0]) & (seen <= scenes[1])
        earlier = self.mine - np.searchsorted(self.stream, self.stream[self.mine])  # moments of the stream before this one
        now = rng.choice(self.mine[fits & (earlier >= steps - 1)], streams, replace=False)
        start = np.searchsorted(self.stream, self.stream[now])
        moments = [
            [*np.sort(rng.choice(np.arange(low, high), steps - 1, replace=False)), high]
            for low, high in zip(start, now, strict=True)
        ]
        bank = _in_use(self._read(np.array(moments).reshape(-1)))
        bank = {name: values.unflatten(0, (streams, steps)) for name, values in bank.items()}
        return self._ask_about(now, each, bank["shown"][:, -1], self._standing_banks(bank), rng)

    def _ask_about(
        self, chosen: Sequence[int] | NDArray[np.int64], each: int, shown: Tensor, banks: Banks, rng: np.random.Generator
    ) -> Batch:
        labels = [labels_until(self.pools, self.arrays["pictures"][self.stream[index]], self.scene[index]) for index in chosen]
        rows = [self.ask(int(index), known, each, rng) for index, known in zip(chosen, labels, strict=True)]
        ids, mask, answers = self.text(rows)
        return Batch(ids, mask, banks, answers, rows, [list(known) for known in labels], shown.float().flatten(1, 2))

    def ask(self, index: int, labels: Sequence[Label], each: int, rng: np.random.Generator) -> list[StreamQuestion]:
        now = int(self.arrays["pictures"][self.stream[index], self.scene[index]])
        return self.questions.about_stream(self.pools.pictures[now].path, labels, each, rng)

    def _read(self, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
        """The stored rows of snapshots; memory-mapped files are read in order."""
        ordered = np.sort(chosen)
        back = np.searchsorted(ordered, chosen)
        return {name: torch.from_numpy(self.arrays[name][ordered][back]) for name in ("rank", "slots", "bucket", "shown")}

    def _replay_banks(self, bank: dict[str, Tensor], replayed: NDArray[np.int64]) -> Banks:
        rank, now = bank["rank"].long(), torch.from_numpy(replayed)
        visible = (rank[:, None] >= 0) & (rank[:, None] <= now[None, :, None, None])
        features = bank["slots"].float() * self.scale
        steps = visible.flatten(2).any(-1)
        live = steps.any(0)  # a step that none of these streams has is left out
        return Banks(features[:, None], visible[:, live], bank["bucket"].long()[:, now[live]], steps[:, live])

    def _standing_banks(self, bank: dict[str, Tensor]) -> Banks:
        """Banks of `[B, G]` moments; the last step of a replay has the positions of a moment's `step`."""
        visible = bank["rank"] >= 0
        return Banks(bank["slots"].float() * self.scale, visible, bank["bucket"].long()[:, :, -1], visible.flatten(2).any(-1))


def _in_use(bank: dict[str, Tensor]) -> dict[str, Tensor]:
    """The newest slots of each token, as many as any of these banks uses: some policies leave most slots empty."""
    rank = bank["rank"]
    used = int((rank >= 0).sum(1).max())
    if used == rank.shape[1]:
        return bank
    newest = rank.argsort(dim=1, descending=True, stable=True)[:, :used]
    found = {"rank": rank.gather(1, newest)}
    for name in ("slots", "shown"):
        found[name] = bank[name].gather(1, newest[..., None].expand(-1, -1, -1, bank[name].shape[-1]))
    found["bucket"] = bank["bucket"].gather(2, newest[:, None].expand(-1, bank["bucket"].shape[1], -1, -1))
    return found
