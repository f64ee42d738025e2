"""What a plan is for, by name: a board in a power mode, as profiles have taught it, or this machine."""

from __future__ import annotations

from collections.abc import Sequence

from keepsight.runtime.boards import boards
from keepsight.runtime.planning.calibrate import calibrated
from keepsight.runtime.planning.hardware import hardware
from keepsight.runtime.planning.models import PlannedModel
from keepsight.runtime.planning.roofline import BoardTarget, Target
from keepsight.streams.errors import UsageError

__all__ = ["THIS", "open_target"]

THIS = "this"


def open_target(name: str, mode: str | None, model: PlannedModel, profiles: Sequence[str]) -> Target:
    """The target of a name.

    Raises:
        UsageError: there is no such board or mode, or a profile does not belong to it.
    """
    if name == THIS:
        from keepsight.runtime.planning.this_machine import this_machine

        target: Target = this_machine()
    else:
        if name not in {board.name for board in boards()}:
            known = ", ".join([*(board.name for board in boards()), THIS])
            raise UsageError(f"no board {name!r} is known.", fix=f"Known are {known}.")
        target = BoardTarget.of(hardware(name, mode))
    return calibrated(target, model, profiles) if profiles else target
