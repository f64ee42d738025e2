"""The boards' constants: valid, with a source each, and what the file says of a board is what is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from keepsight.runtime import boards
from keepsight.streams.errors import UsageError

CONTENT = json.loads((Path(__file__).parents[2] / "runtime" / "boards.json").read_text())


def test_boards_are_named_once_and_sorted_by_memory() -> None:
    names = [board.name for board in boards.boards()]
    assert len(set(names)) == len(names)
    assert {"orin-nano-8gb-super", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "agx-thor"} <= set(names)
    totals = [board.total_bytes.value for board in boards.boards()]
    assert totals == sorted(totals)


def test_no_board_has_more_memory_than_its_name_says() -> None:
    for name, gib in (("orin-nano-8gb-super", 8), ("orin-nx-16gb", 16), ("agx-orin-32gb", 32), ("agx-orin-64gb", 64)):
        board = boards.board(name)
        assert 0.9 * gib * 2**30 < board.total_bytes.value < gib * 2**30
        assert 0 < board.usable_bytes < board.total_bytes.value


def test_an_8_gb_board_has_the_5_2_gb_that_were_published() -> None:
    assert boards.board("orin-nano-8gb-super").usable_bytes == 5_200_000_000


@pytest.mark.parametrize("source", ["", "   ", "unknown"])
def test_a_constant_without_a_source_is_refused(source: str) -> None:
    boards.Constant(value=1, basis="specified", source="a page of NVIDIA's")
    with pytest.raises(ValidationError, match="source"):
        boards.Constant(value=1, basis="specified", source=source)


def test_every_constant_of_the_file_has_value_basis_and_source() -> None:
    constants = [value for board in CONTENT["boards"] for value in board.values() if isinstance(value, dict)]
    for constant in [*constants, *CONTENT["process"].values()]:
        assert set(constant) == {"value", "basis", "source"}
    assert len(constants) >= 4 * len(CONTENT["boards"])


def test_a_board_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"'pi-5'.*orin-nx-16gb"):
        boards.board("pi-5")
