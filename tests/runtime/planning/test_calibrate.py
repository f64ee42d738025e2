"""A plan learns from profiles of its board, and refuses those of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepsight.runtime.planning.calibrate import calibrated
from keepsight.runtime.planning.hardware import hardware
from keepsight.runtime.planning.models import PlannedModel, open_model
from keepsight.runtime.planning.plan import Plan, Request, make_plan
from keepsight.runtime.planning.roofline import BoardTarget
from keepsight.runtime.planning.targets import open_target
from keepsight.runtime.profiling.report import Machine, Profile, Question, Stage, Statistics, write_profile
from keepsight.runtime.storage.snapshot import fingerprint
from keepsight.streams.errors import UsageError

NANO = Machine(
    title="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", processor="ARMv8", cores=6, memory=7_990_149_120,
    system="Linux", power_mode="25W",
)  # fmt: skip
SLOWER = {"vision": 2.0, "memory": 1.5, "step": 0.5, "prefill": 1.2, "token": 1.1}


@pytest.fixture(scope="module")
def tiny() -> PlannedModel:
    return open_model("tiny")


def plan_of(model: PlannedModel, target: Any) -> Plan:
    return make_plan(model, target, Request(), advise=False)


def stage_ms(plan: Plan) -> dict[str, float]:
    found = {stage.name: stage.ms for stage in plan.stages}
    return {**found, "memory": found["memory"] + found["visual_kv"]}


def profile_of(model: PlannedModel, path: Path, *, machine: Machine = NANO, standing: int = 1, **changes: Any) -> str:
    """As a Nano in mode 25W would have written it, slower than predicted by `SLOWER`."""
    assert model.bundle is not None
    said = stage_ms(plan_of(model, BoardTarget.of(hardware("orin-nano-8gb-super", "25W"))))
    stages = []
    for name, slower in SLOWER.items():
        ms = said[name] * slower * (standing if name == "step" else 1)
        samples = tuple(ms * factor for factor in (0.97, 1.0, 1.0, 1.0, 1.03))
        kind = "question" if name in ("prefill", "token") else "frame"
        stages.append(Stage(name=name, path=kind, samples=samples, statistics=Statistics.of(samples)))  # type: ignore[arg-type]
    questions = [Question(text=f"what {n}?", answer="", mode="standing", stages=(), tokens=1) for n in range(standing)] * 2
    content: dict[str, Any] = {
        "keepsight": "0", "made_at": "2026-11-24", "command": "keepsight profile run tiny", "bundle": model.name,
        "fingerprint": fingerprint(model.bundle), "variant": "fp32", "backend": "tensorrt", "memory_policy": "mbc", "dims": {},
        "language_model": None, "machine": machine, "source": "clip", "frames": 5, "fps": 1.0, "stages": tuple(stages),
        "questions": tuple(questions),
    }  # fmt: skip
    write_profile(Profile(**{**content, **changes}), path)
    return str(path)


def test_stages_become_what_was_measured_and_their_bars_narrower(tiny: PlannedModel, tmp_path: Path) -> None:
    bare = BoardTarget.of(hardware("orin-nano-8gb-super", "25W"))
    taught = calibrated(bare, tiny, [profile_of(tiny, tmp_path / "p.json")])
    before, after = plan_of(tiny, bare), plan_of(tiny, taught)
    for name, slower in SLOWER.items():
        assert stage_ms(after)[name] == pytest.approx(slower * stage_ms(before)[name], rel=0.01), name
    bars = {stage.name: stage.bar for stage in after.stages}
    assert all(bars[stage.name] <= stage.bar for stage in before.stages)
    assert min(bars["vision"], bars["token"]) == 1.2  # samples hardly differ, other models will


def test_several_standing_questions_are_a_frames_step_together(tiny: PlannedModel, tmp_path: Path) -> None:
    bare = BoardTarget.of(hardware("orin-nano-8gb-super", "25W"))
    taught = calibrated(bare, tiny, [profile_of(tiny, tmp_path / "p.json", standing=3)])
    assert stage_ms(plan_of(tiny, taught))["step"] == pytest.approx(0.5 * stage_ms(plan_of(tiny, bare))["step"], rel=0.01)


def test_a_profile_of_the_shipped_bundle_teaches_about_a_large_model(tiny: PlannedModel, tmp_path: Path) -> None:
    model = open_model("instructblip-vicuna-7b")
    bare = BoardTarget.of(hardware("orin-nano-8gb-super", "25W"))
    taught = open_target("orin-nano-8gb-super", "25W", model, [profile_of(tiny, tmp_path / "p.json")])
    assert stage_ms(plan_of(model, taught))["vision"] == pytest.approx(2 * stage_ms(plan_of(model, bare))["vision"], rel=0.01)
    assert isinstance(taught, BoardTarget)
    slow = stage_ms(plan_of(model, taught.in_mode("15W")))["vision"]
    assert slow == pytest.approx(2 * stage_ms(plan_of(model, bare.in_mode("15W")))["vision"], rel=0.01)  # it goes with the board


def test_profiles_that_disagree_leave_a_wider_bar(tiny: PlannedModel, tmp_path: Path) -> None:
    bare = BoardTarget.of(hardware("orin-nano-8gb-super", "25W"))
    one = profile_of(tiny, tmp_path / "a.json")
    slower = [Stage(name="vision", path="frame", samples=(9.0, 9.0), statistics=Statistics.of((9.0, 9.0)))]
    other = profile_of(tiny, tmp_path / "b.json", stages=tuple(slower))
    ((kind, _, bar),) = [found for found in calibrated(bare, tiny, [one, other]).calibrated if found[0] == "vision"]
    assert kind == "vision" and bar > 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": NANO.model_copy(update={"power_mode": "MAXN_SUPER"})}, "in mode MAXN_SUPER, and the plan is for 25W"),
        ({"machine": NANO.model_copy(update={"power_mode": None})}, "a power mode that it does not name"),
        ({"machine": NANO.model_copy(update={"title": "NVIDIA Jetson Orin NX Developer Kit"})}, "made on NVIDIA"),
        ({"machine": NANO.model_copy(update={"memory": 16_416_505_856})}, "16.4 GB"),
        ({"machine": NANO.model_copy(update={"title": "a PC"})}, "made on a PC"),
        ({"backend": "cpu"}, "backend cpu"),
        ({"fingerprint": "0" * 64}, "neither the planned one nor a shipped one"),
    ],
)
def test_a_profile_of_something_else_is_refused(changes: dict[str, Any], said: str, tiny: PlannedModel, tmp_path: Path) -> None:
    file = profile_of(tiny, tmp_path / "p.json", **changes)
    with pytest.raises(UsageError, match=said):
        calibrated(BoardTarget.of(hardware("orin-nano-8gb-super", "25W")), tiny, [file])


@pytest.mark.parametrize(
    ("title", "memory", "board"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 65_893_564_416, "agx-orin-64gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 131_881_500_672, "agx-thor"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super", 16_416_505_856, "orin-nx-16gb"),
    ],
)
def test_a_board_is_known_by_title_and_memory(title: str, memory: int, board: str, tiny: PlannedModel, tmp_path: Path) -> None:
    target = BoardTarget.of(hardware(board))
    machine = NANO.model_copy(update={"title": title, "memory": memory, "power_mode": target.hardware.mode.name})
    file = profile_of(tiny, tmp_path / "p.json", machine=machine)
    assert isinstance(calibrated(target, tiny, [file]), BoardTarget)
    with pytest.raises(UsageError, match="made on NVIDIA"):
        calibrated(BoardTarget.of(hardware("orin-nx-8gb")), tiny, [file])


def test_this_machine_is_not_calibrated_by_profiles(tiny: PlannedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibrate is for boards"):
        calibrated(object(), tiny, [profile_of(tiny, tmp_path / "p.json")])  # type: ignore[arg-type]
