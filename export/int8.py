"""INT8 with explicit Q/DQ through ONNX Runtime's static quantisation.

Weights have one scale per output channel, activations one per tensor, both symmetric, which TensorRT asks for; biases stay
float32.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.graphs.onnx_weights import external_files

__all__ = ["quantize_int8", "quiet"]


def quantize_int8(
    source: Path, target: Path, frames: Sequence[NDArray[np.uint8]], *, operators: Collection[str], keep: Collection[str]
) -> None:
    """Write a float32 graph of the input `frames` with INT8 convolutions and matrix products.

    Args:
        frames: to calibrate with, uint8 `[S, S, 3]`.
        operators: types of nodes.
        keep: names of nodes that stay float32.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with quiet():
        quantize_static(
            str(source),
            str(target),
            _Reader(frames),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            nodes_to_exclude=list(keep),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=bool(external_files(source)),
            # TensorRT dequantises no 32-bit biases, so they stay float32.
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )


class _Reader:
    """ONNX Runtime's calibration reader: it asks for one feed after the other."""

    def __init__(self, frames: Sequence[NDArray[np.uint8]]) -> None:
        self._frames = iter(frames)

    def get_next(self) -> dict[str, Any] | None:
        frame = next(self._frames, None)
        return None if frame is None else {"frames": frame[None]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        feeds = self.get_next()
        if feeds is None:
            raise StopIteration
        return feeds


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's advice to prepare the graph first, which changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
