"""What is planned: a bundle, by the costs in its manifest, or a model of full size that nobody has exported, by its shapes."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from keepsight.runtime.bundle import SHIPPED, Bundle
from keepsight.runtime.footprint import LanguageShape
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.graphs.onnx_weights import weight_bytes
from keepsight.runtime.language.gguf_sizes import file_bytes
from keepsight.runtime.manifest import MANIFEST, Cost, Dims, OrderInfo
from keepsight.runtime.planning.costs import BYTES, Precision, cost_of, products
from keepsight.runtime.planning.language import LanguageModel, language_model, llama_shapes, llama_work, requantised
from keepsight.runtime.planning.shapes import QFormerShape, VisionShape, memory_cost, qformer_costs, vision_cost
from keepsight.streams.errors import MissingModelError, UsageError

__all__ = ["MODELS", "PlannedModel", "open_model"]

_TEXT_BUCKETS, _CROSS_LAYERS, _LAYERS = (16, 32, 64, 128), tuple(range(0, 12, 2)), 12
_FFN, _VOCAB, _MAX_TEXT = 3072, 30523, 512
_DEFAULT_LENGTH = 20
_DEFAULT_KIND = "Q4_K_M"


@dataclass(frozen=True)
class PlannedModel:
    """A model to plan with.

    Attributes:
        precision: what its graphs compute in, unless planned otherwise.
        vision: cost of a frame of the visual encoder.
        graphs: costs of the other graphs, by name, at the text bucket that is planned with.
        text: that bucket.
        weight_values: values of weights that each graph reads whole, for the memory that engines take.
        table_bytes: of the text's embeddings, of which a run reads rows: float32 in every precision.
        qformer: its shape, for other memory lengths.
        moving_positions: whether its position table has a row for each slot.
        llm: None for a model that ends at the soft prompt, or whose language model is not on this machine.
        notes: what a reader of the plan should know.
    """

    name: str
    dims: Dims
    precision: Precision
    vision: Cost
    graphs: Mapping[str, Cost]
    text: int
    weight_values: Mapping[str, int]
    table_bytes: int
    qformer: QFormerShape
    moving_positions: bool
    sample_fps: float
    llm: LanguageModel | None
    bundle: Bundle | None = None
    notes: tuple[str, ...] = ()

    def with_memory(self, length: int) -> PlannedModel:
        """The same with another number of slots, its graphs counted from sizes."""
        dims = self.dims.model_copy(update={"memory_length": length})
        rows = self.qformer.position_rows + (length - self.dims.memory_length if self.moving_positions else 0)
        qformer = QFormerShape(dims, self.qformer.ffn, rows)
        graphs = {name: cost for name, cost in qformer_costs(qformer, self.text).items() if name in self.graphs}
        return replace(self, dims=dims, qformer=qformer, graphs=graphs)

    def with_llm(self, kind: str) -> PlannedModel:
        """The same with its language model in another quantisation.

        Raises:
            UsageError: it has none, or the quantisation is unknown.
        """
        if self.llm is None:
            raise UsageError(f"{self.name} has no language model to quantise.", fix="Leave --llm-quant out.")
        return replace(self, llm=requantised(self.llm, kind))

    def weights(self, vision: Precision, qformer: Precision) -> dict[str, int]:
        """Bytes of weights that each graph reads in these precisions, by its name."""
        sizes = {name: values * BYTES[vision if name == "vision" else qformer] for name, values in self.weight_values.items()}
        return {**sizes, "prompt": sizes["prompt"] + self.table_bytes}


def open_model(name: str, *, text: int | None = None) -> PlannedModel:
    """A bundle's directory, a shipped bundle's name, or a model's.

    Args:
        text: rows of text to plan with; by default the second smallest bucket, which takes a question of some twenty words.

    Raises:
        UsageError: there is no such bundle and no such model.
        BundleError: a bundle that does not open, or whose graphs nobody has counted.
    """
    if name in MODELS:
        return _named(name, text)
    if name in SHIPPED or (Path(name) / MANIFEST).is_file() or Path(name).is_dir():
        return _bundled(Bundle.open(name, verify=False), text)
    known = ", ".join(MODELS)
    raise UsageError(f"there is no bundle and no model {name!r}.", fix=f"Give a bundle's directory, tiny, or {known}.")


def _bucket(dims: Dims, text: int | None) -> int:
    buckets = dims.text_buckets
    if text is None:
        return buckets[min(1, len(buckets) - 1)]
    fitting = [bucket for bucket in buckets if bucket >= text]
    if not fitting:
        raise UsageError(f"no text bucket takes {text} rows; the largest has {buckets[-1]}.")
    return fitting[0]


def _bundled(bundle: Bundle, text: int | None) -> PlannedModel:
    manifest, dims = bundle.manifest, bundle.manifest.dims
    chosen = _bucket(dims, text)
    graphs = {name: cost_of(manifest, name, chosen) for name in manifest.graphs if name != "vision"}
    vision, notes = cost_of(manifest, "vision"), []
    if MEMORY not in graphs:
        graphs[MEMORY] = memory_cost(dims)
        notes.append("the bundle has no graph `memory`; it is planned as if it were exported by this version")
    first = manifest.variants[0]
    precision: Precision = "fp16" if first == "fp16" else "fp32"
    weights = {name: cost.weights for name, cost in graphs.items() if name != MEMORY} | {"vision": vision.weights}
    stored = weight_bytes(bundle.graph_path("prompt", first)) - BYTES[precision] * weights["prompt"]
    llm, more = _bundled_llm(bundle)
    return PlannedModel(
        name=manifest.name, dims=dims, precision=precision, vision=vision, graphs=graphs, text=chosen,
        weight_values=weights, table_bytes=max(0, stored),
        qformer=_shape_of(dims, graphs["step"]), moving_positions=isinstance(manifest.positions, OrderInfo),
        sample_fps=manifest.sample_fps, llm=llm, bundle=bundle, notes=(*notes, *more),
    )  # fmt: skip


def _bundled_llm(bundle: Bundle) -> tuple[LanguageModel | None, list[str]]:
    info = bundle.manifest.llm
    if info is None:
        return None, ["the bundle ends at the soft prompt: no language model is planned"]
    try:
        path = bundle.llm_path(verify=False)
    except MissingModelError as error:
        return None, [f"no language model is planned: {error}"]
    return language_model(path, kind=info.quantise), []


def _shape_of(dims: Dims, step: Cost) -> QFormerShape:
    """The sizes that a manifest does not name, from the products of its `step`."""
    found = list(products(step))
    ffn = max(p.n for p in found if p.weights and p.batch == 1 and p.m == dims.queries and p.k == dims.hidden)
    depth = dims.hidden // dims.heads
    rows = [p.n for p in found if p.weights and (p.batch, p.m, p.k) == (dims.heads, dims.queries, depth)]
    return QFormerShape(dims, ffn, rows[0] if rows else 0)


def _named(name: str, text: int | None) -> PlannedModel:
    entry, vision = MODELS[name], VisionShape()
    language = dict(entry["llm"])
    gated = language.pop("gated")
    dims = Dims(
        image_size=vision.image_size, tokens=vision.tokens, channels=vision.width, queries=32, hidden=768, layers=_LAYERS,
        cross_layers=_CROSS_LAYERS, heads=12, n_embd=language["hidden"], memory_length=_DEFAULT_LENGTH,
        text_buckets=_TEXT_BUCKETS if entry["text"] else (0,), position_buckets=1,
    )  # fmt: skip
    chosen = _bucket(dims, text)
    qformer = QFormerShape(dims, _FFN)
    graphs, cost = qformer_costs(qformer, chosen), vision_cost(vision)
    weights = {graph: one.weights for graph, one in graphs.items() if graph != MEMORY} | {"vision": cost.weights}
    shapes = llama_shapes(**language, gated=gated)
    shape = LanguageShape(language["layers"], language["hidden"], language["kv_width"], language["vocab"])
    work = llama_work(**language, heads_width=language["hidden"], bits=16, head_bits=16)
    llm = LanguageModel(name, "F16", file_bytes(shapes, "F16", head_bytes=0, grouping=1), shape, work, shapes)
    tables = 4 * (_VOCAB + _MAX_TEXT) * dims.hidden if entry["text"] else 0
    return PlannedModel(
        name=name, dims=dims, precision="fp16", vision=cost, graphs=graphs, text=chosen, weight_values=weights,
        table_bytes=tables, qformer=qformer, moving_positions=False, sample_fps=1.0, llm=requantised(llm, _DEFAULT_KIND),
        notes=("counted from shapes: nobody has exported it for this plan",),
    )  # fmt: skip


@cache
def _read() -> dict[str, Any]:
    content = importlib.resources.files("keepsight.runtime.planning").joinpath("models.json").read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(content)["models"]
    return models


MODELS: Mapping[str, Any] = _read()
"""Models of full size that can be planned without a bundle: name -> shapes."""
