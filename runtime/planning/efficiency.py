"""What share of a board's peak real programs reach: from published measurements, `figures.json`, each with its source.

A figure's ideal time is its work over the board's peak: operations for a visual encoder and for reading a prompt, bytes for
generating a token. What the measured time is longer by, launches taken off, is the efficiency. A factor is the geometric mean
over the figures of its class, and its error bar comes from predicting each figure by all others.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from keepsight.runtime.planning.costs import fused_bytes
from keepsight.runtime.planning.hardware import Hardware, hardware
from keepsight.runtime.planning.language import LanguageWork, llama_work
from keepsight.runtime.planning.shapes import VisionShape, vision_cost

__all__ = [
    "KERNELS_A_LAYER", "LAUNCH_S", "Factor", "Figure", "Published", "bandwidth_factor", "factor", "figures", "published",
    "seconds_at",
]  # fmt: skip

StageClass = Literal["vision", "prefill", "decode"]

LAUNCH_S = 5e-6
"""Of a kernel: Edge-LLM's time for a token grows less than its bytes from Qwen3-0.6B to 8B, by 60 to 100 us for each of 28 to 36
layers of about a dozen kernels, on AGX Orin and Orin NX."""
KERNELS_A_BLOCK = 10
"""Of a vision transformer's block as TensorRT runs it: two norms, four products with their biases and Gelu, attention."""
KERNELS_A_LAYER = 12
_COVERED = 1.28  # standard deviations: four of five
_ONE_SOURCE = 1.3  # the least bar of a class that only one has measured: its figures share whatever is odd about it
_NO_FIGURE = 2.0  # the bar of a class is as wide as this many of its own where nothing like it has been measured


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Measured(_Data):
    """Of a model whose layers are not plain: what is known of it. `parameters` that a row is multiplied by; bytes of its file."""

    parameters: float
    bytes: float
    layers: int


class Figure(_Data):
    """A published measurement.

    Attributes:
        mode: the board's power mode; None where the source does not say, and the fastest is taken.
        inferred: that the mode follows from another figure, not from the source: never used for a factor.
        rows: of a prompt.
        measured: size of a model that is not in `language_models`.
    """

    stage: StageClass
    model: str
    board: str
    mode: str | None
    inferred: bool = False
    engine: str
    weights: str | None = None
    rows: int = 1
    measured: _Measured | None = None
    value: Annotated[float, Field(gt=0)]
    unit: Literal["ms", "per_s", "rows_per_s"]
    source: str

    @property
    def seconds(self) -> float:
        """Of one frame, one prompt or one token."""
        return {"ms": self.value / 1e3, "per_s": 1 / self.value, "rows_per_s": self.rows / self.value}[self.unit]


class _VisionModel(_Data):
    tokens: int
    width: int
    blocks: int
    heads: int
    mlp: int
    patch: int


class _LanguageModel(_Data):
    layers: int
    hidden: int
    ffn: int
    heads_width: int
    kv_width: int
    vocab: int


class _Bits(_Data):
    value: float
    head: float
    source: str


class _File(_Data):
    schema_version: Literal[1]
    sources: dict[str, str]
    vision_models: dict[str, _VisionModel]
    language_models: dict[str, _LanguageModel]
    weight_bits: dict[str, _Bits]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Factor:
    """An efficiency.

    Attributes:
        value: share of the peak.
        bar: four of five measurements lie within a prediction times or divided by this.
        figures: how many it is from.
        sources: where those are from.
    """

    value: float
    bar: float
    figures: int
    sources: tuple[str, ...] = ()

    def widened(self, by: float = _NO_FIGURE) -> Factor:
        """The same for something that it was not measured with."""
        return Factor(self.value, self.bar**by, self.figures, self.sources)


@dataclass(frozen=True)
class Published:
    """A figure, and what is predicted for it from all other figures of its class.

    Attributes:
        predicted_s: from all other figures.
        blind_s: from the figures of other sources alone; None if there are none.
        held_out: False where the figure takes part in a constant that the prediction uses.
    """

    figure: Figure
    predicted_s: float
    blind_s: float | None
    source: str
    held_out: bool

    @property
    def ratio(self) -> float:
        """Predicted over published time."""
        return self.predicted_s / self.figure.seconds


@dataclass(frozen=True)
class _Point:
    """A figure's ideal: `seconds = launch_s + max(ideal_s / efficiency, floor_s / the bandwidth's efficiency)`."""

    figure: Figure
    ideal_s: float
    launch_s: float
    floor_s: float
    family: str


def figures() -> tuple[Figure, ...]:
    """All published figures."""
    return _read().figures


def factor(stage: StageClass, capability: str, *, engine: str, without: Sequence[Figure] = ()) -> Factor:
    """The efficiency of a stage on boards of a compute capability.

    Where nobody has measured it on such a board, it is that of the other boards, with a wider error bar.

    Args:
        engine: tensorrt, llama.cpp, ...
        without: figures to leave out.
    """
    family = _family(stage, capability, engine)
    points = [point for point in _points() if point.family == family and not point.figure.inferred]
    if not points:
        other = next(name for name in ("8.7", "11.0") if any(p.family == _family(stage, name, engine) for p in _points()))
        return factor(stage, other, engine=engine, without=without).widened()
    return _fitted([point for point in points if point.figure not in without])


def bandwidth_factor(*, without: Sequence[Figure] = ()) -> Factor:
    """Of the memory's bandwidth, what kernels reach that only read weights: every engine's tokens but llama.cpp's."""
    points = [p for p in _points() if p.figure.stage == "decode" and p.figure.engine != "llama.cpp" and not p.figure.inferred]
    return _fitted([point for point in points if point.figure not in without])


def published() -> tuple[Published, ...]:
    """Every figure beside what all others of its class predict for it."""
    data, found = _read(), []
    for point in _points():
        figure = point.figure
        others = [p for p in _points() if p.family == point.family and p.figure != figure and not p.figure.inferred]
        if not others:
            continue
        launch = figure.model == "Qwen3-0.6B"  # LAUNCH_S is from these
        strangers = [p for p in others if p.figure.source != figure.source]
        same = [p.figure for p in _points() if p.figure.source == figure.source]
        blind = _predicted(point, strangers, same) if strangers else None
        found.append(Published(figure, _predicted(point, others, [figure]), blind, data.sources[figure.source], not launch))
    return tuple(found)


def seconds_at(figure: Figure, efficiency: float, bandwidth: float) -> float:
    """What a figure would be at an efficiency, and at one of the memory's bandwidth."""
    return _seconds(_point(figure), efficiency, bandwidth)


def _predicted(point: _Point, others: Sequence[_Point], without: Sequence[Figure]) -> float:
    bandwidth = bandwidth_factor(without=without).value
    return _seconds(point, _mean(_efficiencies(others, bandwidth)), bandwidth)


def _family(stage: StageClass, capability: str, engine: str) -> str:
    """Figures that share a factor: tokens are bound by memory, which is alike on all boards; operations are not."""
    return f"{stage} {engine}" + ("" if stage == "decode" else f" {capability}")


def _fitted(points: Sequence[_Point]) -> Factor:
    bandwidth = 1.0 if points[0].figure.stage != "vision" else bandwidth_factor().value
    efficiencies = _efficiencies(points, bandwidth)
    value, count = _mean(efficiencies), len(points)
    residuals = [
        math.log(_seconds(point, _mean([*efficiencies[:i], *efficiencies[i + 1 :]]), bandwidth) / point.figure.seconds)
        for i, point in enumerate(points)
        if count > 1
    ]
    spread = math.sqrt(sum(r * r for r in residuals) / len(residuals)) if residuals else math.log(2)
    small = 1 + 2 / count  # few figures say little of their own spread
    sources = dict.fromkeys(_read().sources[point.figure.source] for point in points)
    bar = math.exp(_COVERED * small * spread)
    return Factor(value, bar if len(sources) > 1 else max(bar, _ONE_SOURCE), count, tuple(sources))


def _efficiencies(points: Iterable[_Point], bandwidth: float) -> list[float]:
    """Of each point whose time its operations explain; what is bound by bandwidth says nothing of them."""
    found = []
    for point in points:
        left = point.figure.seconds - point.launch_s
        if point.figure.stage != "vision" or point.floor_s / bandwidth < 0.6 * left:
            found.append(min(1.0, point.ideal_s / left))
    return found


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _seconds(point: _Point, efficiency: float, bandwidth: float) -> float:
    floor = point.floor_s / bandwidth if point.figure.stage == "vision" else 0.0
    return point.launch_s + max(point.ideal_s / efficiency, floor)


@cache
def _points() -> tuple[_Point, ...]:
    return tuple(_point(figure) for figure in figures())


def _point(figure: Figure) -> _Point:
    board = hardware(figure.board, figure.mode)
    family = _family(figure.stage, board.compute_capability, figure.engine)
    if figure.stage == "vision":
        return _vision_point(figure, board, family)
    work = _language_work(figure)
    launch = LAUNCH_S * KERNELS_A_LAYER * work.layers
    if figure.stage == "prefill":
        return _Point(figure, work.prefill_flops(figure.rows) / board.peak("fp16"), launch, 0.0, family)
    return _Point(figure, work.token_bytes(_CONTEXT) / board.bandwidth, launch, 0.0, family)


_CONTEXT = 256  # positions read with a token, where a source does not say


def _vision_point(figure: Figure, board: Hardware, family: str) -> _Point:
    model = _read().vision_models[figure.model]
    side = round(math.sqrt(model.tokens))  # what `VisionShape` makes tokens of; only patches depend on it
    shape = VisionShape(side * model.patch, model.patch, model.width, model.blocks, model.heads, model.mlp)
    cost = vision_cost(shape)
    scale = model.tokens / shape.tokens
    flops, moved = cost.flops * scale, fused_bytes(cost, "fp16")
    launch = LAUNCH_S * KERNELS_A_BLOCK * model.blocks
    return _Point(figure, flops / board.peak("fp16"), launch, moved / board.bandwidth, family)


def _language_work(figure: Figure) -> LanguageWork:
    if figure.measured is not None:
        known = figure.measured
        return LanguageWork(known.layers, 0, 0, known.bytes, known.parameters, 0.0)
    data = _read()
    model, bits = data.language_models[figure.model], data.weight_bits[figure.weights or ""]
    return llama_work(
        layers=model.layers, hidden=model.hidden, ffn=model.ffn, heads_width=model.heads_width, kv_width=model.kv_width,
        vocab=model.vocab, bits=bits.value, head_bits=bits.head,
    )  # fmt: skip


@cache
def _read() -> _File:
    content = importlib.resources.files("keepsight.runtime.planning").joinpath("figures.json").read_text(encoding="utf-8")
    return _File.model_validate_json(content)
