"""Plans: what fits, what binds, what a change does; and that they answer as the numbers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepsight.runtime.boards import boards
from keepsight.runtime.cli import app
from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.runtime.planning.hardware import hardware
from keepsight.runtime.planning.language import llama_shapes
from keepsight.runtime.planning.models import MODELS, PlannedModel, open_model
from keepsight.runtime.planning.picture import save_html, save_png
from keepsight.runtime.planning.plan import Plan, Request, make_plan, plan_all
from keepsight.runtime.planning.roofline import BoardTarget, Stage, total
from keepsight.streams.errors import KeepsightError, UsageError

SIZES = json.loads((Path(__file__).parents[3] / "docs" / "full-size.json").read_text())


@pytest.fixture(scope="module")
def vicuna() -> PlannedModel:
    return open_model("instructblip-vicuna-7b")


@pytest.fixture(scope="module")
def tiny() -> PlannedModel:
    return open_model("tiny")


def planned(model: PlannedModel, board: str, mode: str | None = None, **asked: object) -> Plan:
    return make_plan(model, BoardTarget.of(hardware(board, mode)), Request(**asked))  # type: ignore[arg-type]


def stage(plan: Plan, name: str) -> Stage:
    return next(one for one in plan.stages if one.name == name)


def test_a_model_of_full_size_takes_what_its_real_files_do(vicuna: PlannedModel) -> None:
    real = SIZES["visual half, fp16"]["weights"]
    said = vicuna.weights("fp16", "fp16")
    assert said == pytest.approx(real, rel=0.06) and said.keys() == real.keys()
    for kind in QUANTISATIONS:
        llm = vicuna.with_llm(kind).llm
        assert llm is not None and llm.bytes == pytest.approx(SIZES[f"LLaMA 7B, {kind}"]["files"][f"{kind}.gguf"], rel=0.01)
        assert llm.work.weight_bytes < llm.bytes  # the embeddings are not read


def test_the_readmes_fit_is_the_plans(vicuna: PlannedModel) -> None:
    small, large = planned(vicuna, "orin-nano-8gb-super"), planned(vicuna, "orin-nx-16gb")
    assert (small.fits, large.fits) == (False, True)
    assert small.limit == "memory" and large.fit is not None and large.fit.free_bytes == pytest.approx(2.5e9, abs=0.1e9)


def test_a_stage_takes_its_work_over_what_the_board_does(vicuna: PlannedModel) -> None:
    target = BoardTarget.of(hardware("orin-nx-16gb"))
    plan = make_plan(vicuna, target, Request())
    vision, token = stage(plan, "vision"), stage(plan, "token")
    compute = vision.flops / (target.hardware.peak("fp16") * target.vision.value)
    assert vision.limit == "compute" and vision.ms == pytest.approx(1e3 * compute, rel=0.05)  # and launches
    assert vision.flops == pytest.approx(2 * 260.4e9, rel=0.01)
    moved = token.bytes / (target.hardware.bandwidth * target.decode.value)
    assert token.limit == "bandwidth" and token.ms == pytest.approx(1e3 * moved, rel=0.06)


def test_a_power_mode_slows_what_it_limits(vicuna: PlannedModel) -> None:
    fast, slow = planned(vicuna, "orin-nx-16gb", "MAXN_SUPER"), planned(vicuna, "orin-nx-16gb", "25W")
    assert stage(slow, "vision").ms / stage(fast, "vision").ms == pytest.approx(1173 / 408, rel=0.03)
    assert stage(slow, "token").ms == stage(fast, "token").ms  # memory is as fast there
    assert (slow.mode, slow.mode_number) == ("25W", 3)
    assert {effect.mode for effect in slow.modes} == {"MAXN_SUPER", "10W", "15W", "25W", "40W"}


def test_cameras_and_questions_add_up(vicuna: PlannedModel) -> None:
    one = planned(vicuna, "agx-orin-64gb", standing=1, fps=2.0)
    more = planned(vicuna, "agx-orin-64gb", standing=3, cameras=4, fps=2.0)
    assert more.frame.ms - one.frame.ms == pytest.approx(2 * stage(one, "step").ms)
    assert more.duty == pytest.approx(4 * 2 * more.frame.ms / 1e3)
    assert more.most_fps == pytest.approx(2 / more.duty)
    assert one.footprint is not None and more.footprint is not None
    bank = 229e6 * 2  # of MA-LMM's memory at M = 20, and the copy that an update writes (`export/memory_graph.py`)
    parts = {part.name: part.bytes for part in more.footprint.parts}
    assert parts["visual memories of 3 more cameras"] == pytest.approx(3 * bank, rel=0.02)
    assert parts["memory of 3 standing questions"] > 11 * 0.4e9  # 12 query banks of 0.41 GB


@pytest.mark.parametrize(("fps", "verdict"), [(1.0, True), (11.0, None), (40.0, False)])
def test_it_says_whether_it_keeps_up_where_the_bar_allows(fps: float, verdict: bool | None, vicuna: PlannedModel) -> None:
    assert planned(vicuna, "orin-nx-16gb", fps=fps).keeps_up is verdict


def test_suggestions_are_planned_again_and_say_the_truth(vicuna: PlannedModel) -> None:
    plan = planned(vicuna, "orin-nx-16gb", "25W", standing=4)
    changes = {one.change: one for one in plan.suggestions}
    faster = changes["sudo nvpmodel -m 0, mode MAXN_SUPER"]
    real = planned(vicuna, "orin-nx-16gb", "MAXN_SUPER", standing=4)
    assert faster.times == pytest.approx(plan.frame.ms / real.frame.ms)
    assert f"{real.most_fps:.1f} frames/s" in faster.gain
    fewer = planned(vicuna, "orin-nx-16gb", "25W", standing=2)
    assert changes["--standing 2"].times == pytest.approx(plan.frame.ms / fewer.frame.ms)
    assert not any("fp8" in change or "mode 10W" in change for change in changes)  # not there, and slower
    gains = [one.times for one in plan.suggestions if "fits" not in one.gain]
    assert gains == sorted(gains, reverse=True)


def test_what_does_not_fit_is_told_what_would(vicuna: PlannedModel) -> None:
    model = replace(vicuna.with_llm("F16"))
    plan = planned(model, "orin-nx-16gb")
    (change,) = [one for one in plan.suggestions if "fits" in one.gain]
    kind = change.change.removeprefix("--llm-quant ")
    assert planned(model.with_llm(kind), "orin-nx-16gb").fits
    assert plan.suggestions[0] is change
    better = QUANTISATIONS[QUANTISATIONS.index(kind) - 1]
    assert not planned(model.with_llm(better), "orin-nx-16gb").fits  # the first that fits: it costs the answers least


def test_a_precision_that_a_board_lacks_is_refused(vicuna: PlannedModel) -> None:
    with pytest.raises(UsageError, match="no fp8 units"):
        planned(vicuna, "orin-nx-16gb", precision="fp8")
    half, eight = planned(vicuna, "agx-orin-64gb", precision="fp16"), planned(vicuna, "agx-orin-64gb", precision="int8")
    assert stage(eight, "vision").ms < 0.6 * stage(half, "vision").ms
    assert stage(eight, "step").ms == stage(half, "step").ms  # the Q-Former keeps its precision
    assert stage(eight, "vision").bar > stage(half, "vision").bar  # nobody has measured a ViT in 8 bits


def test_an_encoder_of_convolutions_has_a_wider_bar(tiny: PlannedModel, vicuna: PlannedModel) -> None:
    plan = planned(tiny, "orin-nx-16gb")
    assert stage(plan, "vision").bar == pytest.approx(stage(planned(vicuna, "orin-nx-16gb"), "vision").bar ** 2)
    assert any("convolutions" in note for note in plan.notes)


def test_a_bundle_with_another_memory_is_counted_like_one_of_that_size(tiny: PlannedModel) -> None:
    again = tiny.with_memory(tiny.dims.memory_length)
    assert {name: cost.products for name, cost in again.graphs.items()} == {n: c.products for n, c in tiny.graphs.items()}
    longer = tiny.with_memory(20)
    assert longer.graphs["step"].flops > 1.3 * tiny.graphs["step"].flops
    assert longer.graphs["visual_kv"].products == tiny.graphs["visual_kv"].products


def test_the_shipped_bundle_is_planned_with_its_own_language_model(tiny: PlannedModel) -> None:
    assert tiny.llm is not None and tiny.llm.kind == "F16"  # as it is requantised before use
    assert tiny.llm.bytes == pytest.approx(271e6, rel=0.02)
    assert tiny.llm.work.weight_bytes == pytest.approx(269e6, rel=0.01)  # tied embeddings are the head, too
    assert tiny.text == 32 and tiny.qformer.ffn == 512 and tiny.qformer.position_rows == 43


def test_all_boards_in_all_precisions_are_compared(vicuna: PlannedModel, tmp_path: Path) -> None:
    plans = plan_all(vicuna, boards(), Request())
    assert {plan.target for plan in plans} == {board.name for board in boards()}
    assert {plan.precision for plan in plans if plan.target == "agx-thor"} == {"fp32", "fp16", "int8", "fp8"}
    assert {plan.precision for plan in plans if plan.target == "orin-nx-8gb"} == {"fp32", "fp16", "int8"}
    save_png(plans, tmp_path / "plan.png")
    save_html(plans, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")  # needs nothing else
    for plan in plans:
        assert f"{plan.most_fps:.1f} frames/s" in page
    with pytest.raises(UsageError, match="can't be written"):
        save_html(plans, tmp_path / "absent" / "plan.html")


def test_stages_add_up_with_their_bars() -> None:
    stages = [Stage("a", 10.0, 1.5, "compute", 1.0, 2.0), Stage("b", 30.0, 1.1, "bandwidth", 3.0, 4.0)]
    both = total("both", stages)
    assert (both.ms, both.flops, both.bytes, both.limit) == (40.0, 4.0, 6.0, "bandwidth")
    assert both.high_ms == pytest.approx(15.0 + 33.0)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_named_model_can_be_planned(name: str) -> None:
    plan = planned(open_model(name), "agx-thor")
    assert plan.fits and plan.tokens_per_s is not None and plan.first_token is not None
    assert plan.as_dict()["stages"][0]["ms"] > 0


def test_a_decoder_without_a_gate_has_two_matrices_in_its_net() -> None:
    sizes = {"layers": 2, "hidden": 64, "ffn": 256, "kv_width": 64, "vocab": 100}
    gated, plain = llama_shapes(**sizes), llama_shapes(**sizes, gated=False)
    assert len(gated) - len(plain) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "no board is named.*orin-nx-16gb.*this"),
        (["tiny", "--board", "pi-5"], "no board 'pi-5'.*agx-thor, this"),
        (["nothing", "--board", "agx-thor"], "no bundle and no model 'nothing'.*instructblip-vicuna-7b"),
        (["tiny", "--board", "orin-nano-8gb-super", "--mode", "MAXN"], "no power mode 'MAXN'"),
        (["tiny", "--board", "agx-thor", "--all"], "--all is of all boards"),
        (["tiny", "--board", "agx-thor", "--png", "x.png"], "--png and --html"),
        (["tiny", "--board", "agx-thor", "--cameras", "0"], "--cameras 0"),
        (["tiny", "--board", "agx-thor", "--fps", "0"], "at 0 frames per second"),
        (["tiny", "--board", "agx-thor", "--llm-quant", "Q9"], "'Q9' is unknown"),
        (["tiny", "--board", "agx-thor", "--memory-length", "0"], "remembers nothing"),
        (["tiny", "--board", "this", "--mode", "MAXN"], "no Jetson, and has no power modes"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, KeepsightError)
    assert result.exception.exit_code == 2
    with pytest.raises(UsageError, match=said):
        raise result.exception


def test_the_command_prints_a_plan_and_json() -> None:
    arguments = ["plan", "instructblip-vicuna-7b", "--board", "orin-nx-16gb", "--mode", "25W", "--cameras", "2"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for words in ("fits", "nvpmodel -m 3", "tokens/s", "keeps up", "bandwidth", "What to change"):
        assert words in shown.output
    assert max(map(len, shown.output.splitlines())) <= 100
    said = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert (said["board"], said["nvpmodel"], said["cameras"], said["fits"]) == ("orin-nx-16gb", 3, 2, True)
    assert {one["name"] for one in said["stages"]} >= {"vision", "memory", "step", "replay", "prefill", "token"}
    assert all(one["low_ms"] < one["ms"] < one["high_ms"] for one in said["stages"])


def test_the_comparison_is_at_most_100_columns_wide() -> None:
    shown = CliRunner().invoke(app, ["plan", "instructblip-vicuna-7b", "--all"])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 100
    assert all(board.name in shown.output for board in boards())
