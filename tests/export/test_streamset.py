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


def test_a_snapshot_knows_what_every_token_shows(pools: Pools, basis: Basis) -> None:
    """Each picture has a direction of its own, so that a slot's features tell what was averaged into them."""
    streamset._start_worker(pools, basis, SHAPE, 7)
    made = streamset._stream(3, False)
    centres = pools.stills[made["pictures"]].astype(np.float64)
    for shown, slots, rank, scene in zip(made["shown"], made["slots"], made["rank"], made["scene"], strict=True):
        used = rank >= 0
        np.testing.assert_allclose(shown.astype(np.float64).sum(-1)[used], 1, atol=2e-3)
        assert (shown[..., scene + 1 :] == 0).all() and (shown[used].max(-1) > 0).all()
        mixed = np.einsum("snk,knc->snc", shown.astype(np.float64), centres) @ basis.directions.astype(np.float64)
        assert np.abs(mixed - slots)[used].max() < 0.6 and np.abs(mixed)[used].max() > 2  # what is left is the noise


def test_a_frame_that_fades_shows_two_scenes() -> None:
    shown = streamset._shares([0, 0, 0, 1], [0.0, 1 / 3, 2 / 3, 0.0])
    np.testing.assert_allclose(shown[:, :2], [[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 1]], atol=1e-6)
    assert shown.shape == (4, streamset.MAX_SCENES) and (shown[:, 2:] == 0).all()


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
    assert batch.answers.shape == (4, 3) and batch.banks.features.shape == (4, 1, 5, 49, streamset.BASIS)
    assert batch.scenes.shape == (4, 5 * 49, streamset.MAX_SCENES) and [len(row) for row in batch.rows] == [3] * 4
    assert batch.banks.visible.shape == (4, 3, 5, 49) and bool(batch.banks.steps[:, -1].all())
    # The last of the replayed steps sees the whole bank, each earlier one less.
    seen = batch.banks.visible.sum((2, 3))
    assert bool((seen[:, 1:] > seen[:, :-1]).all()) and bool((seen[:, -1] == 5 * 49).all())
    standing = batches.draw_standing(4, 2, 3, (9, 24), np.random.default_rng(0))
    assert standing.banks.features.shape == (4, 3, 5, 49, streamset.BASIS) and bool(standing.banks.steps.all())
    for stored, banks, labels in zip(standing.scenes, standing.banks.features, standing.labels, strict=True):
        # Each moment is of the stream whose end is asked about, the last one is that end.
        (end,) = (k for k, one in enumerate(arrays["shown"]) if np.array_equal(one.reshape(-1, 24), stored.half().numpy()))
        stream = [k for k in range(end + 1) if arrays["stream"][k] == arrays["stream"][end]]
        places = [next(k for k in stream if np.allclose(arrays["slots"][k], one, atol=1e-3)) for one in banks.numpy()]
        assert places == sorted(set(places)) and places[-1] == end and len(labels) == arrays["scene"][end] + 1
    again = streamset.build_streams(tmp_path, pools, basis, SHAPE, count=8, whole=False, seed=0)
    assert all((again[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(ValueError, match="8 streams, 9 are asked for"):
        streamset.build_streams(tmp_path, pools, basis, SHAPE, count=9, whole=False, seed=0)
