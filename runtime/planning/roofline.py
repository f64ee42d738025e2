"""How long a stage takes on a board: its operations over what the board computes, or its bytes over what it moves, and launches.

`time = max(FLOPs / (peak x efficiency), bytes / (bandwidth x efficiency)) + kernels x launch`. Efficiencies are measured ones
(`efficiency.py`), each with an error bar: four of five measurements lie within a prediction times or divided by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from keepsight.runtime.manifest import Cost
from keepsight.runtime.planning.costs import Precision, fused_bytes, products
from keepsight.runtime.planning.efficiency import KERNELS_A_LAYER, LAUNCH_S, Factor, bandwidth_factor, factor
from keepsight.runtime.planning.hardware import Hardware, hardware
from keepsight.runtime.planning.language import LanguageWork

__all__ = ["BoardTarget", "Limit", "Stage", "StageKind", "Target", "is_convolutional", "total"]

Limit = Literal["compute", "bandwidth", "launches", "memory"]
StageKind = Literal["vision", "memory", "qformer", "prefill", "decode"]
"""Stages that share an efficiency, and that a profile calibrates together."""

_FUSED = 0.36  # of the exported graph's operators, those that are kernels of their own: ten of a ViT's block of 28
_UNMEASURED = 2.0  # an error bar to this power where only other graphs have been measured
_LAUNCH_BAR = 2.0  # of a stage that is mostly launches: their time is known to a factor
_OTHER_PRECISION = 1.5  # likewise for a visual encoder in another precision than FP16, which the factors are from


@dataclass(frozen=True)
class Stage:
    """A prediction.

    Attributes:
        ms: how long it takes.
        bar: four of five times it is within `ms` times or divided by this.
        limit: what binds it.
        flops, bytes: its work.
    """

    name: str
    ms: float
    bar: float
    limit: Limit
    flops: float
    bytes: float

    @property
    def low_ms(self) -> float:
        return self.ms / self.bar

    @property
    def high_ms(self) -> float:
        return self.ms * self.bar


class Target(Protocol):
    """What stages can be predicted for: a board in a power mode, or this machine."""

    @property
    def name(self) -> str: ...

    def graph(self, name: str, kind: StageKind, cost: Cost, precision: Precision) -> Stage:
        """One run of a graph.

        Raises:
            UsageError: the target has no such precision.
        """
        ...

    def prefill(self, work: LanguageWork, rows: int) -> Stage:
        """A prompt of so many rows."""
        ...

    def token(self, work: LanguageWork, context: int) -> Stage:
        """A token after so many positions."""
        ...


def total(name: str, stages: list[Stage]) -> Stage:
    """Stages one after the other. Their errors are taken to be one error: bars do not shrink by adding.

    The limit is that of the longest.
    """
    ms = sum(stage.ms for stage in stages)
    bar = sum(stage.high_ms for stage in stages) / ms
    longest = max(stages, key=lambda stage: stage.ms)
    return Stage(name, ms, bar, longest.limit, sum(s.flops for s in stages), sum(s.bytes for s in stages))


def is_convolutional(cost: Cost) -> bool:
    """Whether convolutions are most of a graph's work: no figure of such an encoder is among those of `efficiency.py`."""
    return 2 * sum(product.flops for product in products(cost) if product.convolution) > cost.flops


@dataclass(frozen=True)
class BoardTarget:
    """A Jetson: graphs as TensorRT engines, the language model in llama.cpp with all its layers on the GPU.

    Attributes:
        vision, bandwidth, prefill_factor, decode: efficiencies.
        calibrated: measured time over predicted time, and the bar that is left, by kind of stage: from profiles.
    """

    hardware: Hardware
    vision: Factor
    bandwidth: Factor
    prefill_factor: Factor
    decode: Factor
    calibrated: tuple[tuple[StageKind, float, float], ...] = ()

    @classmethod
    def of(cls, found: Hardware) -> BoardTarget:
        """With published efficiencies."""
        capability = found.compute_capability
        return cls(
            found,
            vision=factor("vision", capability, engine="tensorrt"),
            bandwidth=bandwidth_factor(),
            prefill_factor=factor("prefill", capability, engine="llama.cpp"),
            decode=factor("decode", capability, engine="llama.cpp"),
        )

    @property
    def name(self) -> str:
        return self.hardware.board.name

    def in_mode(self, mode: str) -> BoardTarget:
        """The same board in another power mode. What a profile has taught is of its programs and goes with it.

        Raises:
            UsageError: it has no such mode, or nobody knows its clocks.
        """
        return replace(self, hardware=hardware(self.name, mode))

    def graph(self, name: str, kind: StageKind, cost: Cost, precision: Precision) -> Stage:
        """See :meth:`Target.graph`."""
        moved = fused_bytes(cost, precision)
        compute = cost.flops / (self.hardware.peak(precision) * self.vision.value)
        bandwidth = moved / (self.hardware.bandwidth * self.bandwidth.value)
        bar = self.vision.bar if compute > bandwidth else self.bandwidth.bar
        if kind != "vision" or is_convolutional(cost):
            bar **= _UNMEASURED
        elif precision != "fp16" and compute > bandwidth:
            bar **= _OTHER_PRECISION
        launches = LAUNCH_S * max(1, round(_FUSED * cost.kernels))
        return self._stage(name, kind, compute, bandwidth, launches, bar, cost.flops, moved)

    def prefill(self, work: LanguageWork, rows: int) -> Stage:
        """See :meth:`Target.prefill`. Quantised weights are multiplied at float16's rate at best."""
        flops, moved = work.prefill_flops(rows), work.weight_bytes
        compute = flops / (self.hardware.peak("fp16") * self.prefill_factor.value)
        bandwidth = moved / (self.hardware.bandwidth * self.decode.value)
        bar = self.prefill_factor.bar if compute > bandwidth else self.decode.bar
        launches = LAUNCH_S * KERNELS_A_LAYER * work.layers
        return self._stage("prefill", "prefill", compute, bandwidth, launches, bar, flops, moved)

    def token(self, work: LanguageWork, context: int) -> Stage:
        """See :meth:`Target.token`."""
        flops, moved = work.token_flops(context), work.token_bytes(context)
        bandwidth = moved / (self.hardware.bandwidth * self.decode.value)
        launches = LAUNCH_S * KERNELS_A_LAYER * work.layers
        return self._stage("token", "decode", 0.0, bandwidth, launches, self.decode.bar, flops, moved)

    def _stage(
        self, name: str, kind: StageKind, compute: float, bandwidth: float, launches: float, bar: float, flops: float,
        moved: float,
    ) -> Stage:  # fmt: skip
        limit: Limit = "compute" if compute > bandwidth else "bandwidth"
        if launches > max(compute, bandwidth):
            limit, bar = "launches", max(bar, _LAUNCH_BAR)
        stage = Stage(name, 1e3 * (max(compute, bandwidth) + launches), bar, limit, flops, moved)
        for wanted, scale, left in self.calibrated:
            if wanted == kind:
                stage = replace(stage, ms=stage.ms * scale, bar=min(left, bar))
        return stage
