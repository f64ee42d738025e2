"""The recipe of keepsight-tiny: data, stages, bundle. Every part is seeded, and resumes where an earlier run stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from keepsight.export.alignment import align_projection, collect_outputs
from keepsight.export.answerrows import learn_answer_rows
from keepsight.export.batches import Batch, PictureBatches, SnapshotBatches
from keepsight.export.bundlewriter import CHATML, SMOLLM2, unfold_basis, write_bundle
from keepsight.export.language import FrozenLanguageModel
from keepsight.export.pools import build_pools
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.questions import QuestionSet, TextBatch
from keepsight.export.streamset import BASIS, MAX_SCENES, BankShape, build_streams, fit_basis
from keepsight.export.train import Stage, Trainer, plot_curve
from keepsight.export.vision import export_vision
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime.bundle import Bundle, find_packaged
from keepsight.runtime.gguf_cache import requantised
from keepsight.runtime.llm import LLM

MEMORY_LENGTH = 10
TIME_BUCKETS = 32
HIDDEN, LAYERS, HEADS, QUERIES, MAX_TEXT = 128, 6, 4, 8, 64
STREAMS, HELD_OUT = 1000, 40
PICTURE_STEPS, READING_STEPS, REPLAY_STEPS = 600, 1600, 2400


class _Data:
    """Everything that batches are drawn from."""

    def __init__(self, work: Path, seed: int) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.vision = work / "vision.onnx"
        if not self.vision.exists():
            export_vision(self.vision)
        shape = BankShape(MEMORY_LENGTH, TIME_BUCKETS)
        pools = build_pools(work / "pools", self.vision, seed)
        self.basis = fit_basis(pools, work / "basis.npz")
        questions = self.questions = QuestionSet()
        self.tokenizer_file = work / "tokenizer.json"
        self.tokenizer = build_tokenizer(questions.texts(), self.tokenizer_file)
        text = TextBatch(self.tokenizer)
        arrays = build_streams(work / "streams", pools, self.basis, shape, count=STREAMS, whole=False, seed=seed)
        cache = work / "projected"
        cache.mkdir(exist_ok=True)
        self.pictures = PictureBatches(pools, self.basis, questions, text, cache)
        self.streams = SnapshotBatches(arrays, pools, self.basis, questions, text, range(STREAMS - HELD_OUT))
        self.held_out = SnapshotBatches(arrays, pools, self.basis, questions, text, range(STREAMS - HELD_OUT, STREAMS))


def train_tiny(work: Path, out: Path, *, seed: int, threads: int | None) -> None:
    """Train keepsight-tiny and write its bundle to `out`.

    Raises:
        MissingComponentError, MissingModelError: a package with weights or data is not installed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    data = _Data(work, seed)
    torch.manual_seed(seed)
    qformer = QFormer(
        QFormerConfig(
            hidden=HIDDEN, layers=LAYERS, heads=HEADS, ffn=4 * HIDDEN, channels=BASIS, queries=QUERIES,
            vocab=data.tokenizer.get_vocab_size(), max_text=MAX_TEXT, n_embd=576, slots=MEMORY_LENGTH + 1,
            time_buckets=TIME_BUCKETS,
        )
    )  # fmt: skip
    gguf = find_packaged(SMOLLM2)
    trainer = Trainer(qformer, work, seed)
    with LLM(requantised(gguf, kind="F16"), n_threads=1) as deployed:
        language = FrozenLanguageModel(gguf, deployed, CHATML)
        rows = learn_answer_rows(language, data.questions, QUERIES, work / "answer-rows.npy", seed)
        for stage in _perception_stages(data):
            trainer.run(stage)
        trainer.answer_rows = rows
        trainer.run(_replay_stage(data), row_weight=2.0)
        outputs = collect_outputs(qformer, trainer.head, _samples(data, seed))
        align_projection(qformer, outputs, rows, language, work / "alignment.jsonl", seed)
    report = trainer.accuracy(_held_out(data, seed))
    plot_curve(work / "curve.jsonl", work / "curve.png")
    provenance = {"seed": seed, "command": f"keepsight train --seed {seed}", "held_out_accuracy": report}
    write_bundle(
        out, unfold_basis(qformer, data.basis, half_storage=True), vision=data.vision, tokenizer=data.tokenizer_file,
        memory_length=MEMORY_LENGTH, llm=SMOLLM2, provenance=provenance,
    )  # fmt: skip
    Bundle.open(out)
    print(json.dumps(report, indent=2))


def _perception_stages(data: _Data) -> list[Stage]:
    """Pictures first, then banks read once, streams lengthening over the first half."""

    def reading(share: float, rng: np.random.Generator) -> Batch:
        if rng.random() < 0.15:
            return data.pictures.draw(48, 4, rng)
        return data.streams.draw(24, 8, 1, (1, _longest(3, share / 0.5)), rng)

    return [
        Stage("pictures", PICTURE_STEPS, 1.5e-3, lambda share, rng: data.pictures.draw(48, 4, rng)),
        Stage("reading", READING_STEPS, 1.5e-3, reading),
    ]


def _replay_stage(data: _Data) -> Stage:
    """Replays of a few steps or of all, while the soft prompt learns the rows that make the LLM say the answer."""

    def replay(share: float, rng: np.random.Generator) -> Batch:
        kind = rng.random()
        if kind < 0.15:
            return data.pictures.draw(16, 4, rng)
        if kind < 0.5:
            return data.streams.draw(8, 8, 1, (1, MAX_SCENES), rng)
        steps = int(rng.choice([3, 5, MEMORY_LENGTH + 1], p=[0.45, 0.45, 0.10]))
        longest = MAX_SCENES if rng.random() < 0.5 else MEMORY_LENGTH + 1
        return data.streams.draw(6, 8, steps, (1, longest), rng)

    return Stage("replay", REPLAY_STEPS, 7e-4, replay)


def _samples(data: _Data, seed: int) -> Iterator[Batch]:
    """Pictures and whole replays in turn, about 7,000 questions."""
    for index in range(90):
        rng = np.random.default_rng([seed, 77, index])
        if index % 2:
            yield data.pictures.draw(24, 4, rng)
        else:
            yield data.streams.draw(8, 8, MEMORY_LENGTH + 1, (1, MAX_SCENES), rng)


def _longest(start: int, share: float) -> int:
    """The most scenes of a stream when the curriculum is `share` of its way."""
    return int(min(MAX_SCENES, start + (MAX_SCENES - start) * share))


def _held_out(data: _Data, seed: int) -> Iterator[Batch]:
    for index in range(6):
        rng = np.random.default_rng([seed, 99, index])
        yield data.held_out.draw(16, 8, MEMORY_LENGTH + 1, (9, 11), rng)
