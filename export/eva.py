"""EVA-CLIP ViT-g/14 as BLIP-2, InstructBLIP and MA-LMM use it: 39 blocks, no final norm, then `ln_vision`.

Sizes and numerics are those of LAVIS `eva_vit.py : create_eva_vit_g`: pre-norm blocks (eps 1e-6), one fused q/k/v projection
whose key part has no bias, erf-Gelu, a class token and a position table added to it and to the patches. The names of the
parameters are LAVIS's. All tokens, the class token included, go through `ln_vision` to the Q-Former.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keepsight.runtime.planning.shapes import VisionShape

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LAVIS_NORM_EPS = 1e-5  # of ln_vision: torch's default there, 1e-6 in Hugging Face's port


@dataclass(frozen=True)
class EvaConfig(VisionShape):
    """Those of `VisionShape`, and the epsilons: `norm_eps` is that of `ln_vision`. The defaults are ViT-g/14 at 224 pixels."""

    block_eps: float = 1e-6
    norm_eps: float = LAVIS_NORM_EPS


class EvaAttention(nn.Module):
    """Multi-head self-attention with a fused q, k, v projection."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        context = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(context.transpose(1, 2).flatten(2)))


class EvaMlp(nn.Module):
    """Linear, erf-Gelu, linear."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class EvaBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.block_eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.block_eps)
        self.mlp = EvaMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class EvaVision(nn.Module):
    """The `vision` graph: frames uint8 RGB `[B, S, S, 3]` -> features float32 `[B, N, C]` after `ln_vision`.

    Normalisation by CLIP's mean and spread is inside.
    """

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.blocks))
        self.ln_vision = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = (frames.to(torch.float32) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        patches = self.patch_embed(pixels.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.ln_vision(x))


def resize_positions(table: Tensor, tokens: int) -> Tensor:
    """A position table `[1, N, C]` for another grid, as LAVIS's `interpolate_pos_embed` does: the class token's row stays,
    the others are resized as a picture, bicubic, corners not aligned. The same grid returns the table itself.
    """
    if table.shape[1] == tokens:
        return table
    first, grid = table[:, :1], table[:, 1:]
    side, wanted = _side(grid.shape[1]), _side(tokens - 1)
    picture = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(picture.float(), size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{patches} patches do not form a square")
    return side
