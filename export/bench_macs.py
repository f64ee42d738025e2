"""Multiply-adds of a frame: what the reference computes, what the fast path computes, and the ceiling that their ratio sets.

Counted are matrix products: projections, attention, feed-forward. Left out on both sides is what adds up to less than 0.1 %:
norms, activations, softmax, cosines (22 million at M = 20), merges.
"""

from __future__ import annotations

from keepsight.export.eva import EvaConfig
from keepsight.export.qformer import QFormerConfig

__all__ = ["ceiling", "fast_macs", "naive_macs", "vision_macs"]


def naive_macs(config: QFormerConfig, *, tokens: int, text: int, seen: int) -> int:
    """One frame as the reference computes it: every layer projects its whole bank, and the last layer runs too.

    Args:
        tokens: N.
        text: L, without padding.
        seen: slots that the frame sees, itself included: min(t, M) + 1 at frame t = 0, 1, ...
    """
    rows, hidden = config.queries + text, config.hidden
    project, keys, places = hidden * hidden, seen * rows, seen * tokens
    self_attention = 2 * rows * project + 2 * keys * project + 2 * rows * keys * hidden
    cross = 2 * config.queries * project + 2 * places * config.channels * hidden + 2 * config.queries * places * hidden
    feed_forward = 2 * rows * hidden * config.ffn
    return config.layers * (self_attention + feed_forward) + len(config.cross_layers) * cross


def fast_macs(config: QFormerConfig, *, tokens: int, text: int, slots: int) -> int:
    """One frame of the graphs `visual_kv` and `step`, the same at every frame: shapes are static, unused slots are masked.

    Args:
        tokens: N.
        text: L, with the padding up to the bucket.
        slots: S = M + 1.
    """
    rows, hidden = config.queries + text, config.hidden
    project, keys, places = hidden * hidden, (slots + 1) * rows, slots * tokens
    last = config.layers - 1
    visual_kv = 2 * tokens * config.channels * hidden * len(config.cross_layers)
    between = 4 * rows * project + 2 * rows * keys * hidden  # layers 1..last-1; layer 0 is constant, the last one waits
    cross = 2 * config.queries * project + 2 * config.queries * places * hidden
    feed_forward = 2 * rows * hidden * config.ffn
    before_last = sum(index < last for index in config.cross_layers)
    return visual_kv + (last - 1) * between + 2 * rows * project + last * feed_forward + before_last * cross


def ceiling(config: QFormerConfig, *, tokens: int, text: int, bucket: int, length: int, frames: range) -> float:
    """Naive multiply-adds over fast ones, summed over frames (0 = the first)."""
    naive = sum(naive_macs(config, tokens=tokens, text=text, seen=min(t, length) + 1) for t in frames)
    return naive / (len(frames) * fast_macs(config, tokens=tokens, text=bucket, slots=length + 1))


def vision_macs(config: EvaConfig | None = None) -> int:
    """One frame of the visual encoder, by default ViT-g/14 as MA-LMM has it (260.4e9)."""
    config = config or EvaConfig()
    n, width = config.tokens, config.width
    block = n * width * (4 * width + 2 * config.mlp) + 2 * n * n * width
    return (n - 1) * 3 * config.patch**2 * width + config.blocks * block
