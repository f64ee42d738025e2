"""A small complete bundle with random weights, written by the project's own export code; cheap to make and to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from keepsight.export.bundlewriter import write_bundle
from keepsight.export.onnxfile import export_onnx
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.vocabulary import build_tokenizer
from keepsight.runtime.manifest import LLMInfo

IMAGE_SIZE, PATCH, CHANNELS = 24, 8, 48
TOKENS = (IMAGE_SIZE // PATCH) ** 2
HIDDEN, HEADS, QUERIES, N_EMBD, MAX_TEXT, TIME_BUCKETS = 64, 4, 4, 40, 64, 6
WORDS = ("what is the color of the shape?", "what was there first?", "was there ever a red circle before the triangle?")


class PatchVision(nn.Module):
    """The cheapest encoder of the right form: one projection of each patch, then a norm without weights.

    In: frames uint8 `[B, 24, 24, 3]`. Out: features float32 `[B, 9, 48]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(CHANNELS, elementwise_affine=False)

    def forward(self, frames: Tensor) -> Tensor:
        # Cast first: TensorRT takes uint8 as an input, and can do nothing with it but cast it.
        pixels = frames.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        features: Tensor = self.norm(self.project(pixels).flatten(2).transpose(1, 2))
        return features


def make_bundle(
    folder: Path, *, seed: int = 0, layers: int = 4, llm: LLMInfo | None = None, memory_length: int = 4
) -> Path:
    """Write a bundle of random weights to `folder` and return it.

    Args:
        folder: made if it is not there.
        seed: of the weights.
        layers: of the Q-Former; the even ones have cross-attention, so the last one does where this is odd.
        llm: the language model that the manifest names; it must take rows of 40.
        memory_length: M.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vision = PatchVision()
    frames = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    axes = {"frames": {0: "batch"}, "features": {0: "batch"}}
    export_onnx(vision, {"frames": frames}, ["features"], folder / "vision.onnx", dynamic_axes=axes)
    tokenizer = build_tokenizer(WORDS, folder / "tokenizer.json")
    write_bundle(
        folder,
        random_qformer(layers=layers, slots=memory_length + 1, vocab=tokenizer.get_vocab_size()),
        vision=folder / "vision.onnx",
        tokenizer=folder / "tokenizer.json",
        memory_length=memory_length,
        tokens=TOKENS,
        image_size=IMAGE_SIZE,
        llm=llm,
        provenance={"seed": seed},
        name="random",
    )
    return folder


def random_qformer(*, layers: int = 4, slots: int = 5, vocab: int = 50, channels: int = CHANNELS) -> QFormer:
    """A small Q-Former whose every parameter matters: three times BERT's spread, and no zero biases or unit norms.

    At the usual spread attention is all but flat, and a wrong mask, position or merge would hardly show in the output.
    """
    qformer = QFormer(
        QFormerConfig(
            hidden=HIDDEN, layers=layers, heads=HEADS, ffn=2 * HIDDEN, channels=channels, queries=QUERIES, vocab=vocab,
            max_text=MAX_TEXT, n_embd=N_EMBD, slots=slots, time_buckets=TIME_BUCKETS,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in qformer.named_parameters():
            if "norm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.2)
            elif name.endswith("weight") and "embeddings" not in name:
                parameter.normal_(std=3 * 0.02 * (768 / parameter.shape[1]) ** 0.5)  # BERT's 0.02 is for rows of 768
            else:
                parameter.normal_()
    return qformer.eval()


def random_frames(count: int, *, size: int = IMAGE_SIZE, hold: int = 3, seed: int = 0) -> np.ndarray:
    """Frames uint8 `[T, size, size, 3]`: scenes of flat patches, each held for `hold` frames, and noise on all."""
    rng = np.random.default_rng(seed)
    cells = size // 8
    scenes = rng.integers(30, 226, (count // hold + 1, cells, cells, 3)).repeat(8, 1).repeat(8, 2)
    noise = rng.integers(-25, 26, (count, 8 * cells, 8 * cells, 3))
    frames = (scenes[np.arange(count) // hold] + noise).astype(np.uint8)
    return np.pad(frames, ((0, 0), (0, size - 8 * cells), (0, size - 8 * cells), (0, 0)))
