"""How large a LLaMA is as a GGUF file, to the byte, in every quantisation: llama.cpp chooses a type for each tensor.

The rules are those of llama.cpp's `llama-quant.cpp` (`llama_tensor_get_type_impl`, `tensor_type_fallback`) for a LLaMA without
experts and without an importance matrix, at the revision that llama-cpp-python is pinned to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.streams.errors import UsageError

__all__ = ["file_bytes", "tensor_bytes", "tensor_types"]

Shapes = Mapping[str, tuple[int, ...]]

_ALIGNMENT = 32
# What llama_model_quantize adds to the metadata: the length and text of a key, its type, and a number.
_VERSION_BYTES = 8 + len("general.quantization_version") + 4 + 4
_DEFAULTS = {
    "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_0": "Q4_0", "Q3_K_M": "Q3_K",
    "Q2_K": "Q2_K",
}  # fmt: skip
# For rows that are no whole number of blocks of 256.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LARGEST_LAYERS = 80  # LLaMA-2 70B and its kin


def file_bytes(shapes: Shapes, kind: str, *, head_bytes: int, grouping: int) -> int:
    """Size of a GGUF file.

    Args:
        shapes: of all tensors, by llama.cpp's names, rows first as in PyTorch.
        kind: one of `QUANTISATIONS`.
        head_bytes: of what stands before the tensors (metadata, vocabulary, the table of tensors) in the F16 file.
        grouping: query heads that share a key head.

    Raises:
        UsageError: `kind` is unknown.
    """
    types = tensor_types(shapes, kind, grouping=grouping)
    head = head_bytes + (0 if kind == "F16" else _VERSION_BYTES)
    return _aligned(head) + sum(_aligned(tensor_bytes(shapes[name], found)) for name, found in types.items())


def tensor_types(shapes: Shapes, kind: str, *, grouping: int) -> dict[str, str]:
    """ggml's type of each tensor after `quantise`. The arguments are those of `file_bytes`."""
    if kind not in QUANTISATIONS:
        raise UsageError(f"Quantisation {kind!r} is unknown here.", fix=f"Use one of {', '.join(QUANTISATIONS)}.")
    rules = _Rules(kind, layers=sum("attn_v" in name for name in shapes), grouping=grouping, tied="output.weight" not in shapes)
    return {name: rules.type_of(name, shape) for name, shape in shapes.items()}


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in one of ggml's types."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // block * size


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Rules:
    """llama.cpp's choices for one quantisation of one model."""

    def __init__(self, kind: str, *, layers: int, grouping: int, tied: bool) -> None:
        self._kind, self._layers, self._grouping, self._tied = kind, layers, grouping, tied

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2:
            return "F32"
        default = _DEFAULTS[self._kind]
        return default if default == "F16" else _fitting(self._wanted(name, shape, default), shape)

    def _wanted(self, name: str, shape: tuple[int, ...], default: str) -> str:
        if name == ("token_embd.weight" if self._tied else "output.weight"):
            return "Q8_0" if default == "Q8_0" or not _fits(default, shape) else "Q6_K"
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            return default
        layer, part = int(found[1]), found[2]
        if part == "attn_v":
            return self._value_type(layer, default)
        if part == "ffn_down":
            return self._down_type(layer, default)
        if part == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(self._kind, default)
        return default

    def _value_type(self, layer: int, default: str) -> str:
        kind = default
        if self._kind == "Q2_K":
            kind = "Q4_K" if self._grouping >= 4 else "Q3_K"
        elif self._kind == "Q3_K_M":
            kind = "Q5_K" if layer < 2 else "Q4_K"
        elif self._kind in ("Q4_K_M", "Q5_K_M") and self._deserves_more(layer):
            kind = "Q6_K"
        largest = self._layers == _LARGEST_LAYERS and self._grouping > 1
        return "Q5_K" if largest and kind in ("Q3_K", "Q4_K") else kind

    def _down_type(self, layer: int, default: str) -> str:
        if self._kind == "Q2_K":
            return "Q3_K"
        if self._kind == "Q3_K_M":
            return "Q5_K" if layer < self._layers // 16 else "Q4_K"
        if self._kind in ("Q4_K_M", "Q5_K_M") and self._deserves_more(layer):
            return "Q6_K"
        return default

    def _deserves_more(self, layer: int) -> bool:
        """The first and last eighth of the layers, and every third one between."""
        eighth = self._layers // 8
        return layer < eighth or layer >= 7 * self._layers // 8 or (layer - eighth) % 3 == 2


def _fits(kind: str, shape: tuple[int, ...]) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0


def _fitting(kind: str, shape: tuple[int, ...]) -> str:
    """The type, or what llama.cpp takes instead where rows are no whole number of its blocks."""
    for candidate in (kind, _FALLBACKS.get(kind, kind)):
        if _fits(candidate, shape):
            return candidate
    return "F16"
