"""The boards that a model may have to fit on, and what else a process takes: `boards.json`, every constant with its source."""

from __future__ import annotations

import importlib.resources
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from keepsight.streams.errors import UsageError

__all__ = ["Board", "Constant", "Process", "board", "boards", "process"]

Bytes = Annotated[int, Field(ge=1)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Constant(_Data):
    """A number, how it is known, and from where.

    Attributes:
        basis: `specified` by the maker, `measured` by the source, or `estimated`, with the reason as the source.
    """

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    basis: Literal["specified", "measured", "estimated"]
    source: Annotated[str, StringConstraints(strip_whitespace=True, min_length=10)]


class Board(_Data):
    """A board or module.

    Attributes:
        name: as `--board` takes it.
        title: NVIDIA's name.
        total_bytes: memory that Linux sees; CPU and GPU share it.
        os_bytes: what the operating system with its desktop keeps of that.
        bandwidth_gb_s: of the memory, at the highest power mode.
        dense_fp16_tflops: of the GPU, at the highest power mode; None where nobody gave a figure.
        largest_allocation_bytes: what one allocation of the GPU has been seen to be refused above; None where nobody has looked.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$")]
    title: str
    total_bytes: Constant
    os_bytes: Constant
    bandwidth_gb_s: Constant
    compute_capability: Constant
    dense_fp16_tflops: Constant | None
    largest_allocation_bytes: Constant | None = None

    @property
    def usable_bytes(self) -> int:
        """What is left for a program."""
        return int(self.total_bytes.value - self.os_bytes.value)


class Process(_Data):
    """What a process takes without any model.

    Attributes:
        program_bytes: Python and the libraries.
        cuda_bytes: the CUDA context and the kernels in it.
    """

    program_bytes: Constant
    cuda_bytes: Constant


class _File(_Data):
    schema_version: Literal[1]
    boards: Annotated[tuple[Board, ...], Field(min_length=1)]
    process: Process


def boards() -> tuple[Board, ...]:
    """All boards, the smallest first."""
    return _read().boards


def board(name: str) -> Board:
    """The board of a name.

    Raises:
        UsageError: there is none.
    """
    found = next((board for board in boards() if board.name == name), None)
    if found is None:
        raise UsageError(f"no board {name!r} is known.", fix=f"Known are {', '.join(board.name for board in boards())}.")
    return found


def process() -> Process:
    """What a process takes without any model."""
    return _read().process


@cache
def _read() -> _File:
    content = importlib.resources.files("keepsight.runtime").joinpath("boards.json").read_text(encoding="utf-8")
    return _File.model_validate_json(content)
