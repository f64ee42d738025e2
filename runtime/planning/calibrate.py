"""A plan taught by profiles: what a board really took for a stage, over what was predicted for it, by kind of stage.

A profile counts only where it was made on the board and in the power mode that is planned, with the backend that is planned
for, and of a bundle whose work is known: the planned one, or a shipped one. What it teaches is the board's share of its peak, so
a profile of a small model narrows the plan of a large one; how far it goes there is not known, and bars stay at 1.2 or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keepsight.runtime.bundle import SHIPPED
from keepsight.runtime.planning.costs import BYTES, Precision
from keepsight.runtime.planning.here import is_board
from keepsight.runtime.planning.models import PlannedModel, open_model
from keepsight.runtime.planning.plan import Plan, Request, make_plan
from keepsight.runtime.planning.roofline import BoardTarget, StageKind, Target
from keepsight.runtime.profiling.report import Chain, Profile, Stage, read_profile
from keepsight.runtime.storage.snapshot import fingerprint
from keepsight.streams.errors import UsageError

__all__ = ["Residual", "calibrated"]

_LEAST_BAR = 1.2  # other models on the same board differ, and prompts by their lengths
_COVERED = 1.28
# Stage of a profile: its path, the kind that it teaches, and the planned stages that it is.
_STAGES: tuple[tuple[str, Chain, StageKind, tuple[str, ...]], ...] = (
    ("vision", "frame", "vision", ("vision",)),
    ("memory", "frame", "memory", ("visual_kv", "memory")),
    ("step", "frame", "qformer", ("step",)),
    ("prefill", "question", "prefill", ("prefill",)),
    ("token", "question", "decode", ("token",)),
)


@dataclass(frozen=True)
class Residual:
    """One stage of one profile: measured over predicted, and how much its samples differ among themselves (a factor)."""

    kind: StageKind
    ratio: float
    noise: float


def calibrated(target: Target, model: PlannedModel, files: Sequence[str | Path]) -> Target:
    """The target with what profiles say of it.

    Raises:
        UsageError: a profile that can't be read, of another machine, power mode or backend, or of a bundle that is not here.
    """
    if not isinstance(target, BoardTarget):
        raise UsageError(
            "--calibrate is for boards: this machine is measured each time its processor changes.", fix="Leave --calibrate out."
        )
    residuals: list[Residual] = []
    for file in files:
        profile = read_profile(file)
        _check(profile, target, str(file))
        residuals += _residuals(profile, target, _profiled(profile, model, str(file)))
    if not residuals:
        raise UsageError("these profiles hold no stage that a plan has.", fix="Profile with frames and with questions.")
    return replace(target, calibrated=tuple(_fitted(residuals)))


def _check(profile: Profile, target: BoardTarget, file: str) -> None:
    machine, board, mode = profile.machine, target.hardware.board, target.hardware.mode
    total = board.total_bytes.value
    if not is_board(machine.title, machine.memory, board):
        raise UsageError(
            f"{file} was made on {machine.title or 'an unknown machine'} with {machine.memory / 1e9:.1f} GB, "
            f"and {board.name} is a {board.title} with {total / 1e9:.1f} GB.",
            fix="Give a profile of the board that is planned.",
        )
    if machine.power_mode != mode.name:
        said = f"in mode {machine.power_mode}" if machine.power_mode else "in a power mode that it does not name"
        raise UsageError(
            f"{file} was made {said}, and the plan is for {mode.name}.",
            fix=f"Plan with --mode {machine.power_mode}." if machine.power_mode else "Profile again: sudo nvpmodel -q names it.",
        )
    if profile.backend != "tensorrt":
        raise UsageError(
            f"{file} was made with the backend {profile.backend}, and plans of boards are for tensorrt.",
            fix="Profile with --backend tensorrt.",
        )


def _profiled(profile: Profile, model: PlannedModel, file: str) -> PlannedModel:
    """The bundle of a profile."""
    candidates = [model, *(open_model(name) for name, folder in SHIPPED.items() if profile.bundle == folder)]
    for candidate in candidates:
        if candidate.bundle is not None and fingerprint(candidate.bundle) == profile.fingerprint:
            return candidate
    raise UsageError(
        f"{file} is of the bundle {profile.bundle}, and neither the planned one nor a shipped one is that.",
        fix=f"Plan {profile.bundle} with it, or profile {model.name} or tiny.",
    )


def _residuals(profile: Profile, target: BoardTarget, model: PlannedModel) -> Iterator[Residual]:
    plan = make_plan(model, replace(target, calibrated=()), Request(precision=_precision(profile)), advise=False)
    standing = len({question.text for question in profile.questions if question.mode == "standing"})
    for name, path, kind, parts in _STAGES:
        stage = profile.stage(name, path)
        predicted = _predicted(plan, parts)
        if stage is None or predicted is None:
            continue
        times = max(1, standing) if name == "step" else 1  # a frame's step is of all standing questions
        yield Residual(kind, stage.statistics.p50 / (times * predicted), _noise(stage))


def _precision(profile: Profile) -> Precision | None:
    return next((known for known in BYTES if known == profile.variant), None)


def _predicted(plan: Plan, parts: Sequence[str]) -> float | None:
    found = [stage.ms for stage in plan.stages if stage.name in parts]
    return sum(found) if len(found) == len(parts) else None


def _noise(stage: Stage) -> float:
    samples = np.asarray(stage.samples)
    return float(np.exp(np.std(np.log(np.maximum(samples, 1e-6))))) if len(samples) > 1 else 1.5


def _fitted(residuals: Sequence[Residual]) -> Iterator[tuple[StageKind, float, float]]:
    for kind in dict.fromkeys(residual.kind for residual in residuals):
        own = [residual for residual in residuals if residual.kind == kind]
        logs = [math.log(residual.ratio) for residual in own]
        noise = max(math.log(residual.noise) for residual in own)
        spread = float(np.std(logs, ddof=1)) if len(own) > 1 else noise
        yield kind, math.exp(sum(logs) / len(logs)), max(_LEAST_BAR, math.exp(_COVERED * max(spread, noise)))
