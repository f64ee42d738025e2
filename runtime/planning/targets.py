"""What a plan is for, by name: a board in a power mode, as profiles have taught it, or this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keepsight.runtime.boards import boards
from keepsight.runtime.planning.calibrate import calibrated
from keepsight.runtime.planning.hardware import hardware
from keepsight.runtime.planning.models import PlannedModel
from keepsight.runtime.planning.roofline import BoardTarget, Target
from keepsight.streams.errors import UsageError

__all__ = ["THIS", "open_target"]

THIS = "this"


def open_target(name: str, mode: str | None, model: PlannedModel, profiles: Sequence[str]) -> Target:
    """The target of a name. `this` is a Jetson in the power mode that it is in, or else this machine's processor.

    Raises:
        UsageError: there is no such board or mode, or a profile does not belong to it.
    """
    target = _this(mode) if name == THIS else _board(name, mode)
    return calibrated(target, model, profiles) if profiles else target


def _board(name: str, mode: str | None) -> BoardTarget:
    if name not in {board.name for board in boards()}:
        known = ", ".join([*(board.name for board in boards()), THIS])
        raise UsageError(f"no board {name!r} is known.", fix=f"Known are {known}.")
    return BoardTarget.of(hardware(name, mode))


def _this(mode: str | None, root: Path = Path("/")) -> Target:
    from keepsight.runtime.planning.here import board_here
    from keepsight.runtime.planning.this_machine import this_machine
    from keepsight.runtime.sensors.modes import power_mode

    board = board_here(root)
    if board is not None:
        now = power_mode(root)
        return _board(board.name, mode or (None if now is None else now.name))
    if mode is not None:
        raise UsageError("this machine is no Jetson, and has no power modes.", fix="Leave --mode out.")
    return this_machine()
