"""This machine's processor: probes are what they say, coefficients are found again, the cache is kept. Speed is not asserted."""

from __future__ import annotations

import json
from itertools import product as all_pairs
from pathlib import Path

import numpy as np
import onnx
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.planning import probes as probing
from keepsight.runtime.planning import this_machine as machines
from keepsight.runtime.planning.costs import Product, cost_of, products
from keepsight.runtime.planning.probes import CONVOLUTIONS, OVERHEAD_NODES, PRODUCTS, WORK_VALUES, Probes, model_bytes
from keepsight.runtime.planning.this_machine import Rates, ThisMachine, fit_rates, processor, this_machine
from keepsight.streams.errors import UsageError

RATES = Rates(
    products={
        "weights": (2e-11, 3e-11, 4e-11, 5e-11, 6e-7), "activations": (3e-11, 1e-10, 1e-10, 1e-10, 2e-6),
        "convolution": (4e-11, 0.0, 0.0, 1e-10, 1e-6), "depthwise": (1e-10, 2e-10, 0.0, 2e-10, 1e-7),
    },
    work={"map": 1e-10, "gelu": 4e-10, "softmax": 3e-10, "norm": 2e-10, "reduce": 1e-10, "move": 1.5e-10},
    run=2e-5, call=1e-6, bandwidth=2e10, peak=1e11, bar=1.3,
)  # fmt: skip


class Known(Probes):
    """Probes of a processor whose rates are known."""

    def __post_init__(self) -> None:
        machine = ThisMachine(RATES, "known")
        taken = {str(product): machine.product_seconds(product) for product in PRODUCTS}
        taken |= {f"conv {shape}": machine.product_seconds(machines._convolution(shape)) for shape in CONVOLUTIONS}
        for kind, sizes in WORK_VALUES.items():
            values = int(np.prod(sizes))
            moved = {"map": 3 * values, "reduce": values + values // sizes[-1]}.get(kind, 2 * values)
            taken[kind] = RATES.work[kind] * moved
        taken |= {"run": RATES.run, "nodes": RATES.run + RATES.call * OVERHEAD_NODES, "bandwidth": 1.0}
        self.seconds = {name: [seconds, seconds, 50 * seconds] for name, seconds in taken.items()}  # one round was disturbed
        self._memory = np.zeros(10)


def test_a_processors_rates_are_found_again() -> None:
    found = fit_rates(Known())
    machine, true = ThisMachine(found, "found"), ThisMachine(RATES, "true")
    assert found.call == pytest.approx(RATES.call) and found.work == pytest.approx(RATES.work)
    for text in ("100x300x500 w", "50x1000x200 w", "16*70x48x900", "conv 1000x100x60 w", "conv 200*500x9x1 w"):
        product = Product.parse(text)
        assert machine.product_seconds(product) == pytest.approx(true.product_seconds(product), rel=0.02), text
    assert found.bar == pytest.approx(1.25)  # the least: the fit is exact


def test_a_product_takes_time_for_arithmetic_for_each_matrix_and_for_each_of_its_batch() -> None:
    machine = ThisMachine(RATES, "known")
    mkn, mk, kn, mn, each = RATES.products["activations"]
    wanted = 7 * 3 * (4 * 5 * 6 * mkn + 4 * 5 * mk + 5 * 6 * kn + 4 * 6 * mn + each)
    assert machine.product_seconds(Product.parse("3*4x5x6", 7)) == pytest.approx(wanted)


def test_a_stage_is_the_sum_of_its_products_its_other_work_and_its_calls() -> None:
    cost = cost_of(Bundle.open("tiny").manifest, "step", 32)
    machine = ThisMachine(RATES, "known")
    stage = machine.graph("step", "qformer", cost, "fp32")
    seconds = sum(machine.product_seconds(one) for one in products(cost))
    seconds += sum(RATES.work[kind] * values for kind, values in cost.other_values.items())
    seconds += RATES.run + RATES.call * (cost.kernels + cost.views)
    assert stage.ms == pytest.approx(1e3 * seconds)
    assert (stage.flops, stage.limit) == (cost.flops, "compute")
    with pytest.raises(UsageError, match="not planned on a processor"):
        machine.graph("step", "qformer", cost, "int8")


def test_solutions_are_never_negative_and_best() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        terms, wanted = rng.normal(size=(12, 4)) + 0.5, rng.normal(size=12)
        found = machines._non_negative(terms, wanted)
        assert (found >= 0).all()
        least = min(_error(terms, wanted, kept) for kept in all_pairs([False, True], repeat=4))
        assert np.linalg.norm(terms @ found - wanted) == pytest.approx(least, rel=1e-6)


def _error(terms: np.ndarray, wanted: np.ndarray, kept: tuple[bool, ...]) -> float:
    """Of the best solution with some coefficients alone, if none of them is negative: there is no other way but to try all."""
    chosen = np.array(kept)
    if not chosen.any():
        return float(np.linalg.norm(wanted))
    solution = np.linalg.lstsq(terms[:, chosen], wanted, rcond=None)[0]
    return float(np.linalg.norm(terms[:, chosen] @ solution - wanted)) if (solution >= 0).all() else np.inf


def test_every_probe_is_a_graph_that_onnx_reads_and_that_computes_what_it_says() -> None:
    onnx.checker.check_model(onnx.load_from_string(probing._chain_graph(np.random.default_rng(0), 3)[0]), full_check=True)
    for text in ("4x5x6 w", "3*4x5x6"):
        model, feeds = probing._product_graph(Product.parse(text), np.random.default_rng(0))
        loaded = onnx.load_from_string(model)
        onnx.checker.check_model(loaded, full_check=True)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
        (got,) = probing._session(model, 1).run(None, feeds)
        np.testing.assert_allclose(got, feeds["x"] @ {**feeds, **weights}["w"], rtol=1e-5)
    for kind, sizes in WORK_VALUES.items():
        model, feeds = probing._work_graph(kind, sizes, np.random.default_rng(0))
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
        assert np.isfinite(probing._session(model, 1).run(None, feeds)[0]).all()
    for shape in CONVOLUTIONS:
        model, feeds = probing._convolution_graph(shape, np.random.default_rng(0))
        (got,) = probing._session(model, 1).run(None, feeds)
        said = machines._convolution(shape)
        assert got.shape[2] * got.shape[3] == said.m and got.shape[1] == said.n * said.batch


def test_numbers_above_seven_bits_are_written_as_onnx_reads_them() -> None:
    model = onnx.load_from_string(model_bytes([("Add", ["x", "x"], "y", {})], {"x": (300, 70000)}, "y", (300, 70000), {}))
    assert [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim] == [300, 70000]
    assert model.opset_import[0].version == 17


def test_a_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(machines, "measure", lambda: measured.append(1) or RATES)
    assert this_machine(tmp_path).rates == this_machine(tmp_path).rates == RATES
    assert measured == [1]
    (file,) = tmp_path.iterdir()
    file.write_text("{broken")
    assert this_machine(tmp_path).rates == RATES and len(measured) == 2
    monkeypatch.setattr(machines, "processor", lambda: "another processor")
    this_machine(tmp_path)
    assert len(measured) == 3


def test_the_processor_has_a_name() -> None:
    assert len(processor()) > 8 and processor() == processor()


def test_probes_run() -> None:
    found = Probes()
    found.round()
    found.forget()
    found.round()
    rates = fit_rates(found)
    assert set(found.medians()) >= {*map(str, PRODUCTS), *WORK_VALUES, "run", "nodes", "bandwidth"}
    assert rates.peak > 0 and all(value > 0 for value in rates.work.values())


def test_the_measured_figures_are_of_models_that_were_not_calibrated_with_and_near() -> None:
    record = json.loads((Path(__file__).parents[3] / "docs" / "plan-check.json").read_text())
    judged = [row for row in record["stages"] if row["judged"]]
    for row in judged:
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"], abs=0.01)
    off = {row["model"] for row in judged if abs(row["ratio"] - 1) > 0.25}
    models = {row["model"] for row in record["stages"]}
    assert len(models - off) == record["summary"]["models_within_25_percent"] >= 6
    assert record["summary"]["worst_error"] == pytest.approx(max(abs(row["ratio"] - 1) for row in judged), abs=0.001)


def test_no_product_of_the_shipped_bundle_is_among_the_probes() -> None:
    manifest = Bundle.open("tiny").manifest
    shapes = {str(one) for name in manifest.graphs for one in products(cost_of(manifest, name))}
    assert not shapes & {*map(str, PRODUCTS), *(str(machines._convolution(shape)) for shape in CONVOLUTIONS)}
