"""Which of the known boards a machine is: by what it calls itself, and by its memory."""

from __future__ import annotations

from pathlib import Path

from keepsight.runtime.boards import Board, boards
from keepsight.runtime.sensors.board import identity
from keepsight.streams.errors import UsageError

__all__ = ["board_here", "is_board"]

_NEAR = 0.05  # of the memory: kernels reserve more or less of it
_FAMILIES = ("agx", "orin", "nx", "nano", "thor")


def is_board(title: str, memory: int, board: Board) -> bool:
    """Whether a machine is a board. `NVIDIA Jetson Orin NX Engineering Reference Developer Kit` is an Orin NX 8GB or 16GB."""
    words, wanted = set(title.lower().split()), set(board.title.lower().split())
    alike = all((family in words) == (family in wanted) for family in _FAMILIES)
    total = board.total_bytes.value
    return alike and abs(memory - total) <= _NEAR * total


def board_here(root: Path = Path("/")) -> Board | None:
    """The board that this machine is; None if it is no Jetson.

    Raises:
        UsageError: it is a Jetson that is not among the known ones.
    """
    known = identity(root)
    if not known.is_jetson:
        return None
    found = next((board for board in boards() if is_board(known.title or "", known.memory or 0, board)), None)
    if found is None:
        raise UsageError(
            f"this is {known.title or 'a Jetson'} with {(known.memory or 0) / 1e9:.1f} GB, which is not among the known boards.",
            fix=f"Name the one that is most like it: --board {', '.join(board.name for board in boards())}.",
        )
    return found
