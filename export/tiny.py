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
from keepsight.runtime.language.gguf_cache import requantised
from keepsight.runtime.language.llm import LLM
from keepsight.runtime.memory import Policy

MEMORY_LENGTH = 10
TIME_BUCKETS = 32
HIDDEN, LAYERS, HEADS, QUERIES, MAX_TEXT = 128, 6, 4, 8, 64
STREAMS, HELD_OUT = 1000, 40
PICTURE_STEPS, READING_STEPS, MODES_STEPS = 1600, 9000, 2500
RATE, MODES_RATE = 6e-4, 4e-4
HINT_WEIGHT, ROW_WEIGHT = 0.5, 2.0


class _Data:
    """Everything that batches are drawn from."""

    def __init__(self, work: Path, seed: int, policy: Policy) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.vision = work / "vision.onnx"
        if not self.vision.exists():
            export_vision(self.vision)
        shape = BankShape(MEMORY_LENGTH, TIME_BUCKETS, policy)
        pools = build_pools(work / "pools", self.vision, seed)
        self.basis = fit_basis(pools, work / "basis.npz")
        questions = self.questions = QuestionSet()
        self.tokenizer_file = work / "tokenizer.json"
        self.tokenizer = build_tokenizer(questions.texts(), self.tokenizer_file)
        text = TextBatch(self.tokenizer)
        streams = work / _named("streams", policy)
        arrays = build_streams(streams, pools, self.basis, shape, count=STREAMS, whole=False, seed=seed)
        cache = work / "projected"
        cache.mkdir(exist_ok=True)
        self.pictures = PictureBatches(pools, self.basis, questions, text, cache)
        self.streams = SnapshotBatches(arrays, pools, self.basis, questions, text, range(STREAMS - HELD_OUT))
        self.held_out = SnapshotBatches(arrays, pools, self.basis, questions, text, range(STREAMS - HELD_OUT, STREAMS))


def train_tiny(work: Path, out: Path, *, seed: int, threads: int | None, policy: Policy = "mbc") -> None:
    """Train keepsight-tiny and write its bundle to `out`.

    Args:
        work: features and answer rows, which all policies share, and checkpoints: of another policy than `mbc` in a folder of
            its name.
        out: the bundle's directory.
        seed: of everything that is drawn.
        threads: of torch; None is its choice.
        policy: how the banks that are trained on make room. All else is the same.

    Raises:
        MissingComponentError, MissingModelError: a package with weights or data is not installed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    data = _Data(work, seed, policy)
    folder = work if policy == "mbc" else work / policy
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    qformer = QFormer(
        QFormerConfig(
            hidden=HIDDEN, layers=LAYERS, heads=HEADS, ffn=4 * HIDDEN, channels=BASIS, queries=QUERIES,
            vocab=data.tokenizer.get_vocab_size(), max_text=MAX_TEXT, n_embd=576, slots=MEMORY_LENGTH + 1,
            time_buckets=TIME_BUCKETS,
        )
    )  # fmt: skip
    gguf = find_packaged(SMOLLM2)
    trainer = Trainer(qformer, folder, seed)
    with LLM(requantised(gguf, kind="F16"), n_threads=1) as deployed:
        language = FrozenLanguageModel(gguf, deployed, CHATML)
        rows = learn_answer_rows(language, data.questions, QUERIES, work / "answer-rows.npy", seed)
        for stage in _perception_stages(data):
            trainer.run(stage, hint_weight=HINT_WEIGHT)
        trainer.answer_rows = rows
        trainer.run(_modes_stage(data), row_weight=ROW_WEIGHT, hint_weight=HINT_WEIGHT)
        outputs = collect_outputs(qformer, trainer.head, _samples(data, seed))
        align_projection(qformer, outputs, rows, language, folder / "alignment.jsonl", seed)
    report = trainer.accuracy(_held_out(data, seed))
    plot_curve(folder / "curve.jsonl", folder / "curve.png")
    command = f"keepsight train --seed {seed}" + ("" if policy == "mbc" else f" --policy {policy}")
    provenance = {"seed": seed, "command": command, "memory": policy, "held_out_accuracy": report}
    write_bundle(
        out, unfold_basis(qformer, data.basis, half_storage=True), vision=data.vision, tokenizer=data.tokenizer_file,
        memory_length=MEMORY_LENGTH, llm=SMOLLM2, provenance=provenance, name=_named("keepsight-tiny", policy),
    )  # fmt: skip
    Bundle.open(out)
    print(json.dumps(report, indent=2))


def _named(name: str, policy: Policy) -> str:
    """A name for what is made for a policy; MA-LMM's own, `mbc`, goes without saying."""
    return name if policy == "mbc" else f"{name}-{policy}"


def _perception_stages(data: _Data) -> list[Stage]:
    """Pictures until they are known; then banks, read once, of streams that lengthen over the first third."""

    def reading(share: float, rng: np.random.Generator) -> Batch:
        if rng.random() < 0.15:
            return data.pictures.draw(16, 4, rng)
        return data.streams.draw(8, 8, 1, (1, _longest(6, share / 0.3)), rng)

    return [
        Stage("pictures", PICTURE_STEPS, RATE, lambda share, rng: data.pictures.draw(16, 4, rng)),
        Stage("reading", READING_STEPS, RATE, reading),
    ]


def _modes_stage(data: _Data) -> Stage:
    """Both ways to ask, replay and standing, while the soft prompt learns the rows that make the LLM say the answer."""

    def modes(share: float, rng: np.random.Generator) -> Batch:
        kind = rng.random()
        if kind < 0.15:
            return data.pictures.draw(16, 4, rng)
        if kind < 0.3:
            return data.streams.draw(8, 8, 1, (1, MAX_SCENES), rng)
        if kind < 0.65:
            return data.streams.draw_standing(6, 8, int(rng.integers(2, 5)), (2, MAX_SCENES), rng)
        steps = int(rng.choice([3, 5, MEMORY_LENGTH + 1], p=[0.5, 0.4, 0.1]))
        return data.streams.draw(6, 8, steps, (1, MAX_SCENES), rng)

    return Stage("modes", MODES_STEPS, MODES_RATE, modes)


def _samples(data: _Data, seed: int) -> Iterator[Batch]:
    """Pictures, whole replays and standing questions in turn, about 7,000 questions."""
    for index in range(120):
        rng = np.random.default_rng([seed, 77, index])
        if index % 3 == 0:
            yield data.pictures.draw(16, 4, rng)
        elif index % 3 == 1:
            yield data.streams.draw(8, 8, MEMORY_LENGTH + 1, (1, MAX_SCENES), rng)
        else:
            yield data.streams.draw_standing(8, 8, 4, (4, MAX_SCENES), rng)


def _longest(start: int, share: float) -> int:
    """The most scenes of a stream when the curriculum is `share` of its way."""
    return int(min(MAX_SCENES, start + (MAX_SCENES - start) * share))


def _held_out(data: _Data, seed: int) -> Iterator[Batch]:
    for index in range(6):
        rng = np.random.default_rng([seed, 99, index])
        yield data.held_out.draw(16, 8, MEMORY_LENGTH + 1, (9, 11), rng)
