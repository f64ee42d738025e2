"""Efficiencies come from published figures, each held out of its own prediction."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from keepsight.runtime.planning import efficiency
from keepsight.runtime.planning.efficiency import bandwidth_factor, factor, figures, published, seconds_at

FOLDER = Path(__file__).parents[3] / "runtime" / "planning"
FILE = json.loads((FOLDER / "figures.json").read_text())


def test_every_figure_has_a_source_that_can_be_looked_up() -> None:
    for figure in FILE["figures"]:
        assert len(FILE["sources"][figure["source"]]) > 20
        assert figure["stage"] == "vision" or "measured" in figure or figure["weights"] in FILE["weight_bits"]
        known = FILE["vision_models"] if figure["stage"] == "vision" else FILE["language_models"]
        assert figure["model"] in known or "measured" in figure


def test_predictions_are_near_at_least_eight_figures_that_were_held_out() -> None:
    held = [one for one in published() if one.held_out and not one.figure.inferred]
    apart = sorted(max(one.ratio, 1 / one.ratio) for one in held)
    assert len(held) >= 50
    assert apart[len(apart) // 2] < 1.15 and apart[-1] < 1.6


def test_without_any_figure_of_its_source_a_prediction_is_still_near() -> None:
    ratios = [one.blind_s / one.figure.seconds for one in published() if one.blind_s is not None]
    apart = sorted(max(ratio, 1 / ratio) for ratio in ratios)
    assert len(apart) >= 8 and apart[len(apart) // 2] < 1.25 and apart[-1] < 1.7


def test_a_figure_takes_no_part_in_its_own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {one.figure.model + one.figure.source: one for one in published() if one.figure.engine == "llama.cpp"}
    wrong = [
        figure.model_copy(update={"value": figure.value * 3}) if figure.source == "minicpm" else figure for figure in figures()
    ]
    monkeypatch.setattr(efficiency, "figures", lambda: tuple(wrong))
    efficiency._points.cache_clear()
    after = {one.figure.model + one.figure.source: one for one in published() if one.figure.engine == "llama.cpp"}
    efficiency._points.cache_clear()
    own, other = "Qwen3-8Bminicpm", "Llama-2-7Bholohub"
    assert after[own].predicted_s == before[own].predicted_s  # its own value does not matter to it
    assert after[other].predicted_s != before[other].predicted_s  # and it matters to others


def test_a_figure_whose_mode_was_inferred_is_used_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = factor("vision", "8.7", engine="tensorrt"), bandwidth_factor()
    rest = tuple(figure for figure in figures() if not figure.inferred)
    assert len(rest) < len(figures())
    monkeypatch.setattr(efficiency, "figures", lambda: rest)
    efficiency._points.cache_clear()
    assert (factor("vision", "8.7", engine="tensorrt"), bandwidth_factor()) == before
    efficiency._points.cache_clear()


def test_efficiencies_are_shares_and_four_of_five_figures_lie_within_the_bar() -> None:
    for stage, engine in (("vision", "tensorrt"), ("decode", "llama.cpp")):
        found = factor(stage, "8.7", engine=engine)  # type: ignore[arg-type]
        assert 0.1 < found.value < 1 and found.figures >= 8
        own = [
            one for one in published()
            if (one.figure.stage, one.figure.engine, one.figure.inferred) == (stage, engine, False)
            and one.figure.board != "agx-thor"
        ]  # fmt: skip
        inside = sum(1 / found.bar <= one.ratio <= found.bar for one in own)
        assert inside >= 0.75 * len(own)


def test_what_nobody_has_measured_has_a_wider_bar() -> None:
    orin, thor = factor("prefill", "8.7", engine="llama.cpp"), factor("prefill", "11.0", engine="llama.cpp")
    assert thor.value == orin.value and thor.bar == pytest.approx(orin.bar**2)
    assert factor("vision", "11.0", engine="tensorrt").bar >= 1.3  # two figures of one source agree by chance


def test_half_the_efficiency_takes_twice_the_time_beyond_launches() -> None:
    figure = next(figure for figure in figures() if figure.model == "Qwen3-8B" and figure.engine == "llama.cpp")
    launches = efficiency.LAUNCH_S * efficiency.KERNELS_A_LAYER * 36
    fast, slow = seconds_at(figure, 0.8, 1.0), seconds_at(figure, 0.4, 1.0)
    assert slow - launches == pytest.approx(2 * (fast - launches))


def test_llama_7b_reads_what_its_file_holds() -> None:
    """4.06 GB of Q4_K_M for each token: its file less the embeddings, of which a token needs a row."""
    sizes = json.loads((FOLDER.parents[1] / "docs" / "full-size.json").read_text())
    file = sizes["LLaMA 7B, Q4_K_M"]["files"]["Q4_K_M.gguf"]
    bits = FILE["weight_bits"]["Q4_K_M"]
    shape = FILE["language_models"]["Llama-2-7B"]
    body = shape["layers"] * (4 * shape["hidden"] ** 2 + 3 * shape["hidden"] * shape["ffn"])
    head = shape["hidden"] * shape["vocab"]
    said = (body * bits["value"] + head * bits["head"]) / 8 + head * 4.5 / 8
    assert said == pytest.approx(file, rel=0.02)


def test_the_page_of_published_figures_is_up_to_date() -> None:
    page = (FOLDER.parents[1] / "docs" / "plan-published.md").read_text()
    for one in published():
        assert f"| {one.ratio:.2f} |" in page, one.figure
    assert page.count("\n| ") >= len(published())


def test_widening_keeps_the_value() -> None:
    found = factor("vision", "8.7", engine="tensorrt")
    assert found.widened() == replace(found, bar=found.bar**2)
    assert math.log(found.bar) > 0
