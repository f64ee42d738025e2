"""Positions by age, through graphs and banks: what a bundle says is what the plain loop says, in seconds and not in frames."""

from __future__ import annotations

import numpy as np
import pytest

from keepsight.export.plainloop import PlainLoop
from keepsight.export.weights import load_qformer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import AgeInfo, read_manifest, write_manifest
from keepsight.runtime.qformer import QFormer

from ..random_bundle import make_bundle, random_frames

QUESTION = "what was there first?"
LENGTH = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random bundle whose table of 31 rows is read by age: 29 edges, a third of a second to some minutes."""
    folder = make_bundle(tmp_path_factory.mktemp("age"), layers=3, memory_length=LENGTH)
    manifest = read_manifest(folder)
    edges = tuple(0.3 * 1.25**power for power in range(manifest.dims.position_buckets - 2))
    write_manifest(folder, manifest.model_copy(update={"positions": AgeInfo(edges_s=edges)}))
    return Bundle.open(folder)


def test_a_standing_question_and_a_replay_read_ages_as_the_plain_loop_does(bundle: Bundle) -> None:
    ids, mask = bundle.tokenizer.encode(QUESTION, bundle.manifest.dims.text_buckets)  # type: ignore[union-attr]
    ids = ids[mask > 0]
    plain, deployed = PlainLoop(load_qformer(bundle.path), bundle.manifest, ids), QFormer(bundle)
    prompt = deployed.prompt(QUESTION)
    standing = deployed.stand(prompt)
    rows = deployed.dims.queries + len(ids)
    times = np.cumsum(np.random.default_rng(0).uniform(0.1, 9, 18))
    before = None
    for index, (frame, time_s) in enumerate(zip(random_frames(len(times)), times, strict=True)):
        features = deployed.encode(frame[None])[0]
        deployed.remember(features, time_s)
        standing.step(time_s)
        if before is not None:  # what the deployed banks merged before this frame, the plain one merges after the one before
            merged = deployed.bank.last_merge[0], dict(enumerate(standing.bank.last_merge[:, :rows], start=1))
            forced = merged if merged[0][0] >= 0 else (None, None)
            said = plain.see(before[0], before[1], visual_merge=forced[0], query_merge=forced[1])
            assert np.abs(said.soft_prompt.numpy() - before[2]).max() < 1e-4
        soft = standing.answer().rows
        if index <= LENGTH:
            assert np.abs(deployed.replay(prompt).rows - soft).max() < 1e-4
        before = np.array(features), time_s, soft


def test_a_slower_stream_is_another_memory(bundle: Bundle) -> None:
    """The same frames further apart; positions by order would not tell."""
    rows = []
    for interval_s in (0.5, 20.0):
        deployed = QFormer(bundle)
        standing = deployed.stand(deployed.prompt(QUESTION))
        for index, frame in enumerate(random_frames(6)):
            deployed.remember(deployed.encode(frame[None])[0], index * interval_s)
            standing.step(index * interval_s)
        rows.append(standing.answer().rows)
    assert np.abs(rows[0] - rows[1]).max() > 1e-2
