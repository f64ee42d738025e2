"""Training streams are what the runtime's memory would hold, and every snapshot knows what had been shown."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from keepsight.export import streamset
from keepsight.export.batches import SnapshotBatches
from keepsight.export.dense import Banks, replay
from keepsight.export.pools import Pools
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.questions import QuestionSet, TextBatch
from keepsight.export.streamset import BankShape, Basis, labels_until
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.memory import MemoryBank, Policy
from keepsight.runtime.positions import OrderPositions

SHAPE = BankShape(4, 8)
PICTURES = 48
_STORED = ("slots", "shown", "rank", "bucket", "scene")


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


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_snapshot_is_what_a_runtime_bank_of_its_policy_holds(pools: Pools, basis: Basis, policy: Policy) -> None:
    """All that is stored of a snapshot, against a bank of whole features: riders follow what the policy does to those."""
    streamset._start_worker(pools, basis, BankShape(4, 8, policy), 7)
    made = streamset._stream(3, False)
    walk = streamset._walk(pools, np.random.default_rng([7, 10, 3]), streamset.MAX_SCENES)
    bank = MemoryBank(length=4, tokens=49, channels=1280, policy=policy, dtype=np.float64)
    positions = OrderPositions(bank.slots, 8)
    kept: list[tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32], int]] = []
    for frame, features in enumerate(walk.features):
        bank.append(features.astype(np.float64), time_s=frame * streamset.FRAME_S)
        if walk.settled[frame]:
            kept.append((bank.features[0].copy(), bank.rank_of_slot[0].copy(), positions.replay(bank), walk.scene[frame]))
    used = {"mbc": 5, "fifo": 5, "average": 1, "last": 1}[policy]
    found = 0
    for slots, shown, rank, bucket, scene in zip(*(made[name] for name in _STORED), strict=True):
        here = rank >= 0
        assert (here.sum(0) <= used).all() and (shown[~here] == 0).all()
        for features, ranks, buckets, now in kept:
            rows = basis.project(features)[here] if (ranks == rank).all() and scene == now else np.zeros(0)
            if rows.shape == slots[here].shape and np.abs(rows - slots[here]).max() < 0.02:
                assert (bucket == buckets).all()
                found += 1
                break
    assert found == streamset.SNAPSHOTS


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_snapshot_knows_what_every_token_shows(pools: Pools, basis: Basis, policy: Policy) -> None:
    """Each picture has a direction of its own, so that a slot's features tell what was averaged into them."""
    streamset._start_worker(pools, basis, BankShape(4, 8, policy), 7)
    made = streamset._stream(3, False)
    centres = pools.stills[made["pictures"]].astype(np.float64)
    least = 0.8 if policy == "average" else 2  # many scenes in one mean: each is faint
    for shown, slots, rank, scene in zip(made["shown"], made["slots"], made["rank"], made["scene"], strict=True):
        used = rank >= 0
        np.testing.assert_allclose(shown.astype(np.float64).sum(-1)[used], 1, atol=2e-3)
        assert (shown[..., scene + 1 :] == 0).all() and (shown[used].max(-1) > 0).all()
        mixed = np.einsum("snk,knc->snc", shown.astype(np.float64), centres) @ basis.directions.astype(np.float64)
        assert np.abs(mixed - slots)[used].max() < 0.6 and np.abs(mixed)[used].max() > least  # what is left is the noise


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
    with pytest.raises(ValueError, match="remove the folder"):
        streamset.build_streams(tmp_path, pools, basis, BankShape(4, 8, "fifo"), count=8, whole=False, seed=0)
    again = streamset.build_streams(tmp_path, pools, basis, SHAPE, count=8, whole=False, seed=0)
    assert all((again[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(ValueError, match="8 streams, 9 are asked for"):
        streamset.build_streams(tmp_path, pools, basis, SHAPE, count=9, whole=False, seed=0)


@pytest.mark.parametrize("policy", ["fifo", "average", "last"])
def test_empty_slots_and_steps_that_are_left_out_change_no_output(
    pools: Pools, basis: Basis, tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = BankShape(4, 8, policy)
    arrays = streamset.build_streams(tmp_path, pools, basis, shape, count=2, whole=False, seed=0)
    questions = QuestionSet()
    tokenizer = build_tokenizer(questions.texts(), tmp_path / "tokenizer.json")
    batches = SnapshotBatches(arrays, pools, basis, questions, TextBatch(tokenizer), range(2))
    torch.manual_seed(0)
    qformer = QFormer(
        QFormerConfig(
            hidden=16, layers=4, heads=2, ffn=32, channels=streamset.BASIS, queries=2, vocab=tokenizer.get_vocab_size(),
            max_text=64, n_embd=10, slots=5, time_buckets=8,
        )
    ).eval()  # fmt: skip
    chosen, each, steps = batches.mine[[1, 6, 9, 15]], 2, 5
    small = batches.batch(chosen, each, steps, np.random.default_rng(0))
    small_standing = batches.draw_standing(2, 2, 3, (9, 24), np.random.default_rng(0))
    monkeypatch.setattr("keepsight.export.batches._in_use", lambda bank: bank)
    monkeypatch.setattr(SnapshotBatches, "_replay_banks", _every_step)
    whole = batches.batch(chosen, each, steps, np.random.default_rng(0))
    standing = batches.draw_standing(2, 2, 3, (9, 24), np.random.default_rng(0))
    left = 5 if policy == "fifo" else 1
    assert small.banks.features.shape[2] == left and small.banks.steps.shape[1] == left and whole.banks.steps.shape[1] == 5
    assert small_standing.banks.features.shape[1:3] == (3, left) and standing.banks.features.shape[1:3] == (3, 5)
    for two in ((small, whole), (small_standing, standing)):
        outputs = [replay(qformer, batch.text_ids, batch.text_mask, batch.banks).detach() for batch in two]
        assert outputs[0].std() > 0.1
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(*(batch.scenes.sum(1) for batch in two))


def _every_step(batches: SnapshotBatches, bank: dict[str, torch.Tensor], replayed: NDArray[np.int64]) -> Banks:
    """Banks as the snapshots are stored."""
    now = torch.from_numpy(replayed)
    visible = (bank["rank"][:, None] >= 0) & (bank["rank"][:, None] <= now[None, :, None, None])
    features = bank["slots"].float() * batches.scale
    return Banks(features[:, None], visible, bank["bucket"].long()[:, now], visible.flatten(2).any(-1))
