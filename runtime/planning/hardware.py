"""What a board computes and moves in each of its power modes: `modes.json`, every clock and every factor with its source."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from keepsight.runtime.boards import Board, Constant, board
from keepsight.runtime.planning.costs import Precision
from keepsight.streams.errors import UsageError

__all__ = ["Hardware", "Mode", "hardware", "modes"]

_SMS_OF_A_TPC = 2
_RATE = 2  # transfers in a clock of the memory


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mode(_Data):
    """A power mode of a board.

    Attributes:
        name: as `nvpmodel -q` prints it. The same name has other clocks on another board.
        number: for `nvpmodel -m`; None for one that no board has today. The same number is another mode on another board.
        gpu_mhz, tpcs, emc_mhz: highest clock of the GPU, its texture-processor clusters that are on (two SMs each), and the
            memory's clock; None where nobody has published them.
        default: whether a board comes in it.
    """

    name: str
    number: int | None
    gpu_mhz: Annotated[float, Field(gt=0)] | None
    tpcs: Annotated[int, Field(gt=0)] | None
    emc_mhz: Annotated[float, Field(gt=0)] | None
    default: bool = False
    source: str


class _Modes(_Data):
    bus_bytes: Annotated[int, Field(gt=0)]
    modes: tuple[Mode, ...]


class _File(_Data):
    schema_version: Literal[1]
    sources: dict[str, str]
    gpus: dict[str, Constant]
    precisions: dict[str, dict[Precision, Constant | None]]
    boards: dict[str, _Modes]


@dataclass(frozen=True)
class Hardware:
    """A board in a power mode.

    Attributes:
        flops: dense operations of the GPU in a second, by precision; None where it has no such units.
        bandwidth: of its memory, bytes in a second.
    """

    board: Board
    mode: Mode
    flops: dict[Precision, float | None]
    bandwidth: float

    @property
    def compute_capability(self) -> str:
        return f"{self.board.compute_capability.value:.1f}"

    def peak(self, precision: Precision) -> float:
        """Operations in a second.

        Raises:
            UsageError: the board does not have this precision.
        """
        found = self.flops[precision]
        if found is None:
            raise UsageError(
                f"{self.board.name} has no {precision} units: its GPU is of compute capability {self.compute_capability}, "
                "and they came with 8.9.",
                fix="Plan with --precision int8 or fp16.",
            )
        return found


def modes(name: str) -> tuple[Mode, ...]:
    """The power modes of a board that `nvpmodel` can set, the fastest first.

    Raises:
        UsageError: no such board.
    """
    board(name)
    return tuple(mode for mode in _read().boards[name].modes if mode.number is not None)


def hardware(name: str, mode: str | None = None) -> Hardware:
    """A board in a power mode, by default the fastest.

    Raises:
        UsageError: no such board or mode, or a mode whose clocks nobody has published.
    """
    found, data = board(name), _read()
    entry = data.boards[name]
    chosen = next((one for one in entry.modes if one.name == (mode or entry.modes[0].name)), None)
    known = ", ".join(f"{one.name} (nvpmodel -m {one.number})" for one in entry.modes if one.number is not None)
    if chosen is None:
        raise UsageError(f"{name} has no power mode {mode!r}.", fix=f"It has {known}. Names are what nvpmodel -q prints.")
    if chosen.gpu_mhz is None or chosen.tpcs is None or chosen.emc_mhz is None:
        raise UsageError(
            f"the clocks of {name} in mode {chosen.name} are not published, so it can't be planned.",
            fix=f"Plan with --mode {entry.modes[0].name}.",
        )
    capability = f"{found.compute_capability.value:.1f}"
    half = chosen.tpcs * _SMS_OF_A_TPC * data.gpus[capability].value * chosen.gpu_mhz * 1e6
    rates = data.precisions[capability]
    flops = {precision: None if rate is None else half * rate.value for precision, rate in rates.items()}
    return Hardware(found, chosen, flops, _RATE * chosen.emc_mhz * 1e6 * entry.bus_bytes)


@cache
def _read() -> _File:
    content = importlib.resources.files("keepsight.runtime.planning").joinpath("modes.json").read_text(encoding="utf-8")
    return _File.model_validate_json(content)
