"""The fast path in double: the host code of the runtime, with banks of float64, around the graphs' own modules in float64.

ONNX Runtime's CPU has no Gelu in double, so PyTorch runs what the graphs are exported from. Where this equals the naive loop
to 1e-10, cached and merged keys and values, incremental similarities and orders of slots are exact, and what float32 differs by
is rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch

from keepsight.export.bench_bundle import Case
from keepsight.export.graphs import GRAPHS, example_inputs
from keepsight.export.qformer import QFormer
from keepsight.runtime.bank import Bank
from keepsight.runtime.graphs.backends import Engines
from keepsight.runtime.graphs.engine import Array, Tensor, TensorSpec
from keepsight.runtime.memory import MemoryBank, Rider
from keepsight.runtime.qformer import QFormer as DeployedQFormer
from keepsight.runtime.qformer import StandingQuestion

__all__ = ["TorchEngine", "double_path"]


class TorchEngine:
    """A graph's module behind the protocol of an engine; see :class:`~keepsight.runtime.graphs.engine.Engine`."""

    def __init__(self, name: str, qformer: QFormer) -> None:
        graph, self._outputs = GRAPHS[name]
        self._module = graph(qformer)
        self._order = list(example_inputs(qformer, slots=2, tokens=1, text=1)[name])
        self._dtype = qformer.query_tokens.dtype

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, (), np.dtype(np.float64)) for name in self._order}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(name, (), np.dtype(np.float64)) for name in self._outputs}

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        tensors = [torch.from_numpy(np.array(feeds[name])) for name in self._order]
        values = self._module(*(one.to(self._dtype) if one.is_floating_point() else one for one in tensors))
        several = values if isinstance(values, tuple) else (values,)
        return {name: value.numpy() for name, value in zip(self._outputs, several, strict=True)}

    def enqueue(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.run(feeds)

    def place(self, name: str, value: Array) -> Tensor:
        return value

    def close(self) -> None:
        """Nothing is held."""


def double_path(qformer: QFormer, case: Case) -> tuple[DeployedQFormer, StandingQuestion]:
    """The runtime's Q-Former and a standing question in float64, with the weights of `qformer` in float32 or float64."""
    wide = copy.deepcopy(qformer).double()
    deployed = DeployedQFormer(case.bundle(), engines=Engines({name: TorchEngine(name, wide) for name in GRAPHS}))
    standing = deployed.stand(deployed.prompt(case.question))
    deployed.bank, standing.bank = _in_double(deployed.bank), _in_double(standing.bank)
    return deployed, standing


def _in_double(bank: Bank) -> MemoryBank:
    """An empty bank of the same shape in float64."""
    assert isinstance(bank, MemoryBank)
    riders = {name: Rider(values.shape[0], values.shape[-1]) for name, values in bank.riders.items()}
    return MemoryBank(
        length=bank.length, tokens=bank.tokens, channels=bank.channels, groups=bank.groups, riders=riders,
        policy=bank.policy, current_outside=bank.current_outside, dtype=np.float64,
    )  # fmt: skip
