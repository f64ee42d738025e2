"""The visual encoder is EfficientNet-Lite0 as published: padding, folded batch norms, weights, and the graph made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from keepsight.export.efficientnet import BATCH_NORM_EPS, EfficientNetLite0, SameConv, _fold
from keepsight.export.vision import export_vision, pretrained_vision
from keepsight.runtime.bundle import Bundle


@pytest.mark.parametrize(
    "size, kernel, stride, before, after",
    [
        (224, 3, 2, 0, 1),  # an odd total: the larger half goes right and below
        (112, 5, 2, 1, 2),
        (112, 3, 1, 1, 1),
        (7, 5, 2, 2, 2),  # an odd size
        (14, 1, 1, 0, 0),
    ],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    conv = SameConv(2, 2, kernel, stride)
    x = torch.randn(1, 2, size, size)
    padded = F.pad(x, (before, after, before, after))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, stride))


def test_folding_a_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=BATCH_NORM_EPS).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)
    state = {"c.weight": conv.weight, **{f"n.{key}": value for key, value in norm.state_dict().items()}}
    folded = SameConv(3, 4, 3)
    _fold(folded, state, "c", "n")
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(F.conv2d(x, folded.weight, folded.bias), norm(conv(x)), atol=1e-5, rtol=1e-5)


def test_a_weight_of_another_shape_is_refused() -> None:
    state = {"_conv_stem.weight": torch.zeros(1, 1, 3, 3)}
    state |= {f"_bn0.{name}": torch.ones(1) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(ValueError, match=r"_conv_stem\.weight has shape"):
        EfficientNetLite0().load_published(state)


def test_the_shipped_vision_graph_is_the_published_encoder(tmp_path: Path) -> None:
    """Exported again, byte for byte what the bundle holds, and equal to torch on noise and on flat frames."""
    export_vision(tmp_path / "vision.onnx")
    shipped = Bundle.open("tiny").graph_path("vision")
    assert (tmp_path / "vision.onnx").read_bytes() == shipped.read_bytes()
    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    frames[1] = 128
    session = onnxruntime.InferenceSession(str(shipped), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"frames": frames})
    with torch.no_grad():
        expected = pretrained_vision()(torch.from_numpy(frames)).numpy()
    assert features.shape == (2, 49, 1280)
    # The order of float32 sums differs by engine and threads; a flat frame has channels at a relu's edge, where that shows most.
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)
    assert float(np.abs(features - expected).mean()) < 1e-5
