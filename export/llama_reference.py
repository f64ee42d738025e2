"""LLaMA in PyTorch, a layer at a time: what a converted GGUF must say, on a machine that could not hold the model.

Every layer's weights are read, used and forgotten, so a 7B model needs the memory of one layer and of the embedding table
(under 1.5 GB in float32). Written from the architecture: RMS norm, rotary positions over the two halves of each head,
grouped keys and values, SiLU-gated feed-forward. An adapter stays beside the weights, x W' + scale * (x A') B', so that
nothing here depends on how it was merged into the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from keepsight.export.llama_gguf import LanguageSource, LlamaConfig
from keepsight.streams.errors import CheckpointError

__all__ = ["LEAST_COSINE", "Agreement", "check_gguf", "logits"]

LEAST_COSINE = 0.9999
"""Of float16 weights; a missed reordering of q and k gives about 0.1."""


@dataclass(frozen=True)
class Agreement:
    """How far a GGUF is from its source: cosine and largest difference of the logits, over all positions."""

    cosine: float
    largest_difference: float


@torch.no_grad()
def logits(source: LanguageSource, tokens: Sequence[int]) -> Tensor:
    """Logits `[T, vocab]` float32 of token ids, causal, positions from 0."""
    config = source.config

    def read(name: str) -> Tensor:
        return source.tensors[f"{name}.weight"].read().to(torch.float32)

    def linear(x: Tensor, name: str) -> Tensor:
        straight = F.linear(x, read(name))
        pair = None if source.lora is None else source.lora.pairs.get(f"{name}.weight")
        if pair is None:
            return straight
        down, up = (half.read().to(torch.float32) for half in (pair.down, pair.up))
        return straight + pair.scale * F.linear(F.linear(x, down), up)

    x = read("model.embed_tokens")[list(tokens)]
    cos, sin = _rotary(config, len(tokens))
    for index in range(config.layers):
        layer = f"model.layers.{index}"
        inner = _norm(x, read(f"{layer}.input_layernorm"), config.norm_eps)
        q, k, v = (
            linear(inner, f"{layer}.self_attn.{part}_proj").unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            for part in "qkv"
        )
        repeat = config.heads // config.kv_heads
        k, v = (_rotated(k, cos, sin).repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0))
        context = F.scaled_dot_product_attention(_rotated(q, cos, sin), k, v, is_causal=True)
        x = x + linear(context.transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
        inner = _norm(x, read(f"{layer}.post_attention_layernorm"), config.norm_eps)
        gate, up = linear(inner, f"{layer}.mlp.gate_proj"), linear(inner, f"{layer}.mlp.up_proj")
        x = x + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    return linear(_norm(x, read("model.norm"), config.norm_eps), "model.embed_tokens" if config.tied else "lm_head")


def check_gguf(gguf: Path, source: LanguageSource, *, tokens: int = 24, seed: int = 0) -> Agreement:
    """Compare a GGUF in llama.cpp with its source over random tokens.

    Raises:
        CheckpointError: the cosine of the logits is not above `LEAST_COSINE`.
        LLMError: llama.cpp can't load the file.
    """
    from keepsight.runtime.language.llm import LLM, Tokens

    ids = np.random.default_rng(seed).integers(3, source.config.vocab, tokens).tolist()
    wanted = logits(source, ids).numpy()
    with LLM(gguf, n_ctx=64, n_threads=1) as model:
        found = model.logits([Tokens(ids)], all_positions=True)
    cosine = float((wanted * found).sum() / (np.linalg.norm(wanted) * np.linalg.norm(found)))
    if not cosine > LEAST_COSINE:
        raise CheckpointError(
            f"{gguf} does not say what its source says: the cosine of their logits is {cosine:.6f}, not above {LEAST_COSINE}.",
            fix="This is a fault of the conversion: please report it with the model's config.json.",
        )
    return Agreement(cosine, float(np.abs(wanted - found).max()))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotary(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, head_dim]` of the rotation of each pair, the same for both halves."""
    rate = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
    both = torch.cat([angle, angle], dim=-1)
    return both.cos().float(), both.sin().float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
