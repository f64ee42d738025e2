"""Training streams are what the runtime's memory would hold, and every snapshot knows what had been shown."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from keepsight.export import streamset
from keepsight.export.batches import SnapshotBatches
from keepsight.export.pools import Pools
from keepsight.export.questions import QuestionSet, TextBatch
from keepsight.export.streamset import BankShape, Basis, labels_until
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime import easyvqa
from keepsight.runtime.memory import MemoryBank, Rider

SHAPE = BankShape(4, 8)
PICTURES = 48


@pytest.fixture(scope="module")
def pools() -> Pools:
    """Real pictures' names and labels with made-up features: each picture has a direction of its own."""
    rng = np.random.default_rng(0)
    pictures = easyvqa.pictures("train")[:PICTURES]
    centres = rng.normal(size=(PICTURES, 1, 49, 1280))
    held = centres + 0.1 * rng.normal(size=(PICTURES, 4, 49, 1280))
    successors = rng.integers(PICTURES, size=(PICTURES, 2))
    fades = 0.5 * (centres[:, None] + centres[successors]) * np.ones((1, 1, 3, 1, 1))
    half = np.float16
    return Pools(pictures, centres[:, 0].astype(half), held.astype(half), fades.astype(half), successors)


@pytest.fixture(scope="module")
def basis() -> Basis:
    directions, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(1280, streamset.BASIS)))
    return Basis(np.zeros(1280, np.float32), directions.astype(np.float32), np.ones(streamset.BASIS, np.float32))


def test_a_snapshot_is_the_bank_at_its_frame(pools: Pools, basis: Basis) -> None:
    streamset._start_worker(pools, basis, SHAPE, 7)
    made = streamset._stream(3, False)
    walk = streamset._walk(pools, np.random.default_rng([7, 10, 3]), streamset.MAX_SCENES)
    bank = MemoryBank(length=4, tokens=49, channels=1280, riders={"basis": Rider(1, streamset.BASIS)})
    found = 0
    for frame, features in enumerate(walk.features):
        rows = basis.project(features)
        bank.append(features.astype(np.float32), time_s=frame * streamset.FRAME_S, riders={"basis": rows})
        ranks = bank.rank_of_slot[0]
        for slots, rank, scene in zip(made["slots"], made["rank"], made["scene"], strict=True):
            if (rank == ranks).all() and np.allclose(slots, bank.riders["basis"][0], atol=0.02):
                assert walk.settled[frame] and scene == walk.scene[frame]
                found += 1
                break
    assert found == streamset.SNAPSHOTS


def test_neighbouring_scenes_differ_also_after_fades(pools: Pools) -> None:
    for seed in range(10):
        walk = streamset._walk(pools, np.random.default_rng(seed), 20)
        labels = labels_until(pools, np.array(walk.pictures), 19)
        assert len(labels) == 20 and all(a != b for a, b in pairwise(labels))
        assert len(walk.features) == len(walk.scene) == len(walk.settled)


def test_batches_ask_about_what_had_been_shown(pools: Pools, basis: Basis, tmp_path: Path) -> None:
    arrays = streamset.build_streams(tmp_path, pools, basis, SHAPE, count=8, whole=False, seed=0)
    questions = QuestionSet()
    text = TextBatch(build_tokenizer(questions.texts(), tmp_path / "tokenizer.json"))
    batches = SnapshotBatches(arrays, pools, basis, questions, text, range(8))
    batch = batches.draw(4, 3, 3, (5, 24), np.random.default_rng(0))
    assert batch.answers.shape == (4, 3) and batch.banks.features.shape == (4, 5, 49, streamset.BASIS)
    assert batch.banks.visible.shape == (4, 3, 5, 49) and bool(batch.banks.steps[:, -1].all())
    # The last of the replayed steps sees the whole bank, each earlier one less.
    seen = batch.banks.visible.sum((2, 3))
    assert bool((seen[:, 1:] > seen[:, :-1]).all()) and bool((seen[:, -1] == 5 * 49).all())
    again = streamset.build_streams(tmp_path, pools, basis, SHAPE, count=8, whole=False, seed=0)
    assert all((again[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(ValueError, match="8 streams, 9 are asked for"):
        streamset.build_streams(tmp_path, pools, basis, SHAPE, count=9, whole=False, seed=0)
