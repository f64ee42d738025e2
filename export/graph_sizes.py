"""Sizes of the graphs of a bundle, and of the weights that each reads, from the shapes of the two networks alone.

Weights follow the rules of `export/streamed.py`, `export/weights.py` and `export/half.py`; the text of a graph is estimated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from keepsight.export.convert import Precision
from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.graphs import GRAPHS
from keepsight.export.onnxfile import HALF_MIN_ELEMENTS
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.weights import INDEX, WEIGHTS
from keepsight.runtime.footprint import Basis

__all__ = ["File", "GraphSizes"]

_ALIGN = 64  # of weights in external files
# Bytes of a graph without its weights: of any, and for each block, layer or cross-attention layer. Measured on exported graphs.
_TEXT: Mapping[str, tuple[int, int]] = {
    "vision": (4_200, 16_400), "visual_kv": (200, 1_040), "prompt": (14_000, 0), "step": (-29_500, 23_600),
    "answer": (15_000, 0), "replay": (-7_200, 21_500),
}  # fmt: skip
_CASTS = 1.14  # and with the casts of float16


@dataclass(frozen=True)
class File:
    """A file of a bundle."""

    name: str
    bytes: int
    basis: Basis


class GraphSizes:
    """What the files of the two networks hold, and what each graph reads of it.

    A weight that float16 can't hold stays float32 in an export; that takes its value to know, and is left out here.
    """

    def __init__(self, vision: EvaConfig, qformer: QFormerConfig, precision: Precision) -> None:
        self._vision, self._qformer, self._precision = vision, qformer, precision
        self._tower = _parameters(_hollow(EvaVision, vision), precision)
        self._parameters = _parameters(_hollow(QFormer, qformer), precision)
        self._reads = _reads(qformer, list(self._parameters))

    def weights(self) -> dict[str, int]:
        """Bytes of weights that each graph reads, by its name."""
        sizes = {"vision": sum(parameter.bytes for parameter in self._tower.values())}
        return sizes | {graph: sum(self._parameters[name].bytes for name in names) for graph, names in self._reads.items()}

    def files(self) -> Iterator[File]:
        """All files that hold graphs and weights."""
        yield File("vision.onnx", self._text("vision", self._vision.blocks), "estimated")
        yield File("vision.weights", _packed(parameter.bytes for parameter in self._tower.values()), "exact")
        layers, crosses = self._qformer.layers, len(self._qformer.cross_layers)
        for graph in GRAPHS:
            read = [self._parameters[name] for name in self._reads[graph]]
            inside = sum(parameter.bytes for parameter in read if parameter.small)
            yield File(f"{graph}.onnx", self._text(graph, crosses if graph == "visual_kv" else layers) + inside, "estimated")
        yield File(WEIGHTS, self._shared(), "estimated")
        yield File(INDEX, self._index(), "estimated")

    def _text(self, graph: str, parts: int) -> int:
        fixed, each = _TEXT[graph]
        return round((fixed + each * parts) * (_CASTS if self._precision == "fp16" else 1))

    def _shared(self) -> int:
        """As `store_weights`: large weights once, then what no graph reads as one large piece.

        The latter are float32 here, which halves what it can without loss: that takes their values to know.
        """
        read = dict.fromkeys(name for names in self._reads.values() for name in names)
        large = [name for name in read if not self._parameters[name].small]
        appended = (4 * parameter.elements for name, parameter in self._parameters.items() if name not in large)
        return _packed(self._parameters[name].bytes for name in large) + sum(appended)

    def _index(self) -> int:
        place = {"offset": self._shared(), "dtype": "float32", "shape": [self._qformer.hidden] * 2, "transposed": False}
        return len(json.dumps({"config": vars(self._qformer), "parameters": dict.fromkeys(self._parameters, place)}))


@dataclass(frozen=True)
class _Parameter:
    elements: int
    bytes: int

    @property
    def small(self) -> bool:
        """Whether it stays inside the graphs that read it."""
        return self.elements < HALF_MIN_ELEMENTS


def _hollow(build: type[EvaVision] | type[QFormer], config: EvaConfig | QFormerConfig) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = build(config)  # type: ignore[arg-type]
    return module


def _parameters(module: nn.Module, precision: Precision) -> dict[str, _Parameter]:
    """In fp16, those of products and convolutions are halves."""
    found = {}
    for owner_name, owner in module.named_modules():
        size = 2 if precision == "fp16" and isinstance(owner, (nn.Linear, nn.Conv2d)) else 4
        for name, parameter in owner.named_parameters(prefix=owner_name, recurse=False):
            found[name] = _Parameter(parameter.numel(), size * parameter.numel())
    return found


def _packed(sizes: Iterable[int]) -> int:
    end = 0
    for size in sizes:
        end = -(-end // _ALIGN) * _ALIGN + size
    return end


def _reads(config: QFormerConfig, names: list[str]) -> dict[str, list[str]]:
    """The parameters that each graph reads."""
    last = f"layers.{config.layers - 1}."

    def of(*starts: str) -> list[str]:
        return [name for name in names if name.startswith(starts)]

    tables = of("position_key", "position_value") if config.position_rows else []
    cross_kv = [name for name in names if ".cross.key." in name or ".cross.value." in name]
    # After layer 0's self-attention, which is `prompt`'s, and up to the last layer's keys and values.
    step = [name for name in of("layers.") if name not in cross_kv and not name.startswith(("layers.0.attention.", last))]
    step += of(f"{last}attention.key", f"{last}attention.value")
    ends = [f"{last}{part}" for part in ("attention.query", "attention.dense", "attention.norm", "cross", "query_ffn")]
    end = [name for name in of(*ends, "llm_proj") if name not in cross_kv]
    return {
        "visual_kv": cross_kv,
        "prompt": of("query_tokens", "word_embeddings", "position_embeddings", "embedding_norm", "layers.0.attention."),
        "step": step + tables,
        "answer": end + (tables if config.layers - 1 in config.cross_layers else []),
        "replay": step + end + tables,
    }
