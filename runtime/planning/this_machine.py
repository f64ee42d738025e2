"""This machine as one more board: its processor is measured with probes, once, and predicts what graphs take on ONNX Runtime.

A product takes `a x MKN + b x MK + c x KN + d x MN + e` for each of its batch, every coefficient at least 0, fitted to the
probes' shapes: arithmetic, what is read and written, and the call. So a product's rate depends on its size as the processor's
does: one with few rows is held up by its second matrix. What is no product takes a time for each value, by its kind.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keepsight.runtime.language.gguf_cache import default_cache_dir
from keepsight.runtime.manifest import Cost, Work
from keepsight.runtime.planning.costs import Precision, Product, products, total_bytes
from keepsight.runtime.planning.language import LanguageWork
from keepsight.runtime.planning.probes import CONVOLUTIONS, OVERHEAD_NODES, PRODUCTS, WORK_VALUES, Probes
from keepsight.runtime.planning.roofline import Limit, Stage, StageKind
from keepsight.streams.errors import UsageError

__all__ = ["Rates", "ThisMachine", "fit_rates", "measure", "processor", "this_machine"]

_ROUNDS = 15
_LEAST_BAR = 1.25
_LANGUAGE_BAR = 2.0  # llama.cpp's kernels are not among the probes
_COVERED = 1.28
Kind = Literal["weights", "activations", "convolution", "depthwise"]
Coefficients = tuple[float, float, float, float, float]


class Rates(BaseModel):
    """What a processor takes.

    Attributes:
        products: by kind, seconds for each MKN, MK, KN, MN of a product, and for each of its batch.
        work: seconds for each value read or written, by the kind of work.
        run, call: seconds to run a graph, and for each of its operators.
        bandwidth: bytes in a second, read and written together.
        peak: floating-point operations in a second of the fastest product probed.
        bar: four of five probes are within the fit times or divided by this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    products: dict[Kind, Coefficients]
    work: dict[Work, Annotated[float, Field(gt=0)]]
    run: Annotated[float, Field(ge=0)]
    call: Annotated[float, Field(ge=0)]
    bandwidth: Annotated[float, Field(gt=0)]
    peak: Annotated[float, Field(gt=0)]
    bar: Annotated[float, Field(ge=1)]


@dataclass(frozen=True)
class ThisMachine:
    """What `--board this` plans for: ONNX Runtime on this processor, with one thread."""

    rates: Rates
    title: str

    @property
    def name(self) -> str:
        return "this"

    def graph(self, name: str, kind: StageKind, cost: Cost, precision: Precision) -> Stage:
        """See :meth:`Target.graph`. float16 is computed as float32 with casts, which is not planned.

        Raises:
            UsageError: another precision than fp32.
        """
        if precision != "fp32":
            raise UsageError(f"graphs in {precision} are not planned on a processor.", fix="Plan with --precision fp32.")
        arithmetic = sum(self.product_seconds(product) for product in products(cost))
        moving = sum(self.rates.work[kind] * values for kind, values in cost.other_values.items())
        calls = self.rates.run + self.rates.call * (cost.kernels + cost.views)
        limits: dict[Limit, float] = {"compute": arithmetic, "bandwidth": moving, "launches": calls}
        longest = max(limits, key=lambda limit: limits[limit])
        ms = 1e3 * sum(limits.values())
        return Stage(name, ms, max(_LEAST_BAR, self.rates.bar), longest, cost.flops, total_bytes(cost, precision))

    def product_seconds(self, product: Product) -> float:
        """Of all of a product's count."""
        coefficients = self.rates.products[_kind(product)]
        return product.count * float(np.dot(_terms(product), coefficients))

    def prefill(self, work: LanguageWork, rows: int) -> Stage:
        """See :meth:`Target.prefill`: at the rate of the fastest product."""
        flops = work.prefill_flops(rows)
        seconds = max(flops / self.rates.peak, work.weight_bytes / self.rates.bandwidth)
        return Stage("prefill", 1e3 * seconds, _LANGUAGE_BAR, "compute", flops, work.weight_bytes)

    def token(self, work: LanguageWork, context: int) -> Stage:
        """See :meth:`Target.token`: as fast as memory is copied."""
        moved = work.token_bytes(context)
        return Stage("token", 1e3 * moved / self.rates.bandwidth, _LANGUAGE_BAR, "bandwidth", work.token_flops(context), moved)


def this_machine(cache: Path | None = None) -> ThisMachine:
    """This processor, measured in some seconds the first time; afterwards from the cache.

    Args:
        cache: a folder; by default `plan` in Keepsight's cache.
    """
    title = processor()
    folder = cache or default_cache_dir() / "plan"
    key = hashlib.sha256(f"{title} {version('onnxruntime')} {PRODUCTS} {CONVOLUTIONS} {WORK_VALUES}".encode()).hexdigest()[:16]
    path = folder / f"{key}.json"
    try:
        return ThisMachine(Rates.model_validate_json(path.read_text(encoding="utf-8")), title)
    except (OSError, ValidationError):
        rates = measure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rates.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"what this machine does can't be kept in {folder} ({error.strerror}).", fix="Point KEEPSIGHT_CACHE at a folder."
        ) from error
    return ThisMachine(rates, title)


def measure(rounds: int = _ROUNDS) -> Rates:
    """Time the probes now, on one thread."""
    probes = Probes()
    probes.round()
    probes.forget()
    for _ in range(rounds):
        probes.round()
    return fit_rates(probes)


def fit_rates(probes: Probes) -> Rates:
    """Rates from the medians of the rounds that probes have run."""
    taken = probes.medians()
    run = taken["run"]
    call = max(0.0, taken["nodes"] - run) / OVERHEAD_NODES
    shapes = [(product, taken[str(product)]) for product in PRODUCTS]
    shapes += [(_convolution(shape), taken[f"conv {shape}"]) for shape in CONVOLUTIONS]
    found: dict[Kind, Coefficients] = {}
    residuals: list[float] = []
    for kind in ("weights", "activations", "convolution", "depthwise"):
        own = [(product, seconds) for product, seconds in shapes if _kind(product) == kind]
        terms = np.array([_terms(product) for product, _ in own])
        seconds = np.array([one for _, one in own])
        coefficients = _non_negative(terms / seconds[:, None], np.ones(len(own)))
        found[kind] = tuple(map(float, coefficients))  # type: ignore[assignment]
        residuals += list(np.log(np.maximum(terms @ coefficients, 1e-12) / seconds))
    work: dict[Work, float] = {}
    for name, sizes in WORK_VALUES.items():
        values = math.prod(sizes)
        moved = {"map": 3 * values, "reduce": values + values // sizes[-1]}.get(name, 2 * values)
        work[name] = taken[name] / moved
    peak = max(product.flops / seconds for product, seconds in shapes)
    bar = math.exp(_COVERED * float(np.sqrt(np.mean(np.square(residuals)))))
    return Rates(
        products=found, work=work, run=run, call=call, bandwidth=probes.copied_bytes / taken["bandwidth"], peak=peak,
        bar=max(_LEAST_BAR, bar),
    )  # fmt: skip


def processor() -> str:
    """What the kernel calls this processor."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return "unknown"
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "flags", "Features")
    said = [fields[name] for name in names if name in fields]
    short = fields.get("model name") or fields.get("CPU part") or "unknown"
    return f"{short} ({hashlib.sha256(' '.join(said).encode()).hexdigest()[:8]})"


def _kind(product: Product) -> Kind:
    if product.convolution:
        return "depthwise" if product.batch > 1 else "convolution"
    return "weights" if product.weights else "activations"


def _terms(product: Product) -> tuple[float, float, float, float, float]:
    batch, m, k, n = product.batch, product.m, product.k, product.n
    return (batch * m * k * n, batch * m * k, batch * k * n, batch * m * n, batch)


def _convolution(shape: tuple[int, int, int, int, int, int]) -> Product:
    channels, filters, kernel, stride, groups, side = shape
    pad = kernel // 2 if stride < kernel <= 5 else 0
    out = (side + 2 * pad - kernel) // stride + 1
    inside = channels // groups * kernel**2
    return Product(groups, out * out, inside, filters // groups, convolution=True, weights=True)


def _non_negative(terms: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 for which terms @ x is closest to what is wanted (Lawson and Hanson 1974): columns are scaled first."""
    scale = np.linalg.norm(terms, axis=0)
    scaled = terms / np.where(scale > 0, scale, 1)
    solution, active = np.zeros(terms.shape[1]), np.zeros(terms.shape[1], bool)
    for _ in range(10 * terms.shape[1]):
        gradient = scaled.T @ (wanted - scaled @ solution)
        gradient[active] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-9:
            break
        active[best] = True
        while True:
            trial = np.zeros_like(solution)
            trial[active] = np.linalg.lstsq(scaled[:, active], wanted, rcond=None)[0]
            if (trial[active] > 0).all():
                solution = trial
                break
            falling = active & (trial <= 0)
            step = np.min(solution[falling] / np.maximum(solution[falling] - trial[falling], 1e-15))
            solution = solution + step * (trial - solution)
            active &= solution > 1e-12
    return np.asarray(solution / np.where(scale > 0, scale, 1))
