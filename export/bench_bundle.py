"""What the benchmark runs: a random Q-Former of full size, its graphs as a bundle of its own, and features like a video's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from keepsight.export.graphs import export_qformer
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import Decoding, Dims, GraphInfo, Manifest, NoPositionsInfo, Preprocessing, Templates
from keepsight.runtime.tokenizer import TextTokenizer

__all__ = ["FRAME_GRAPHS", "FULL_SIZE", "Case", "random_qformer", "video_features"]

FULL_SIZE = QFormerConfig(
    hidden=768, layers=12, heads=12, ffn=3072, channels=1408, queries=32, vocab=160, max_text=512, n_embd=4096
)  # fmt: skip
"""MA-LMM's Q-Former, zero-shot; its 30,523 words are left out, since no frame reads them (`prompt` does, once)."""

FRAME_GRAPHS = ("visual_kv", "prompt", "step")
"""What a frame of a standing question runs."""

_BUCKETS = (16, 32, 64, 128)


def random_qformer(config: QFormerConfig, *, seed: int = 0) -> QFormer:
    """Random weights, biases and norms: with the zero biases of a fresh net, a bias that is forgotten would not show."""
    torch.manual_seed(seed)
    qformer = QFormer(config)
    with torch.no_grad():
        for module in qformer.modules():
            if isinstance(module, nn.Linear):
                module.bias.normal_(std=0.05)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(std=0.05)
    return qformer.eval()


@dataclass(frozen=True)
class Case:
    """One size of the memory.

    Attributes:
        config: of the Q-Former.
        tokens: N.
        length: M.
        question: standing.
        folder: where graphs are written, a folder for each size.
    """

    config: QFormerConfig
    tokens: int
    length: int
    question: str
    folder: Path = field(repr=False)

    @property
    def path(self) -> Path:
        """The bundle's directory."""
        return self.folder / f"n{self.tokens}-m{self.length}"

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the question's words."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            build_tokenizer([self.question], path)
        return TextTokenizer(path)

    @property
    def text_ids(self) -> list[int]:
        """The question, without padding."""
        ids, mask = self.tokenizer.encode(self.question, _BUCKETS)
        return [int(token) for token, real in zip(ids, mask, strict=True) if real]

    @property
    def bucket(self) -> int:
        """Text rows that the graphs get for it, with the padding."""
        return len(self.tokenizer.encode(self.question, _BUCKETS)[0])

    def bundle(self, graphs: Sequence[str] = ()) -> Bundle:
        """The bundle; with graphs that have been written, or none of them, for engines of another kind."""
        config = self.config
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.tokenizer.path, self.path / "tokenizer.json")
        manifest = Manifest(
            name="bench",
            dims=Dims(
                image_size=224, tokens=self.tokens, channels=config.channels, queries=config.queries, hidden=config.hidden,
                layers=config.layers, cross_layers=tuple(config.cross_layers), heads=config.heads, n_embd=config.n_embd,
                memory_length=self.length, text_buckets=_BUCKETS, position_buckets=1,
            ),
            preprocessing=Preprocessing(width=224, height=224),
            sample_fps=1.0,
            templates=Templates(qformer="{question}", llm="{video}{question}"),
            decoding=Decoding(max_tokens=1),
            positions=NoPositionsInfo(),
            graphs={name: GraphInfo(files={"fp32": f"{name}.onnx"}) for name in graphs},
            variants=("fp32",),
            tokenizer="tokenizer.json",
        )  # fmt: skip
        return Bundle(self.path, manifest)

    def export(
        self, qformer: QFormer, graphs: Sequence[str] = FRAME_GRAPHS, *, wrote: Callable[[], None] | None = None
    ) -> Bundle:
        """Write graphs, or link those that another size has already and that are the same; `wrote` is called after each."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in graphs:
            target = self.path / f"{name}.onnx"
            twin = next(self._twins(name), None)
            if twin is not None and not target.exists():
                os.link(twin, target)
            elif twin is None:
                export_qformer(
                    qformer, self.path, slots=self.length + 1, tokens=self.tokens, text=self.bucket, half_storage=False,
                    only=(name,),
                )  # fmt: skip
            if wrote is not None:
                wrote()
        return self.bundle(graphs)

    def _twins(self, name: str) -> Iterator[Path]:
        """Where the same graph may lie: `prompt` has no N and no M, `visual_kv` no M."""
        same = {"prompt": "n*-m*", "visual_kv": f"n{self.tokens}-m*"}.get(name)
        if same is not None:
            yield from sorted(self.folder.glob(f"{same}/{name}.onnx"))


def video_features(tokens: int, channels: int, *, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Features `[N, C]` of an endless video, normalised as `ln_vision` leaves them.

    Scenes of 3 to 12 frames; within one each token drifts at a pace of its own, so that neighbouring frames are alike and which
    pair is the most similar is no accident of rounding.
    """
    rng = np.random.default_rng(seed)
    pace = rng.uniform(0.05, 0.4, (tokens, 1)).astype(np.float32)
    while True:
        scene = rng.standard_normal((tokens, channels), dtype=np.float32)
        drift = rng.standard_normal((tokens, channels), dtype=np.float32)
        for _ in range(int(rng.integers(3, 13))):
            drift = np.sqrt(1 - pace**2) * drift + pace * rng.standard_normal((tokens, channels), dtype=np.float32)
            rows = scene + drift
            rows -= rows.mean(axis=1, keepdims=True)
            yield rows / rows.std(axis=1, keepdims=True)

