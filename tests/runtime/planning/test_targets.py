"""`--board this` on a Jetson is that board in its own power mode; boards are laid out as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepsight.runtime.planning import targets, this_machine
from keepsight.runtime.planning.here import board_here
from keepsight.runtime.planning.roofline import BoardTarget
from keepsight.streams.errors import UsageError

from ..sensors.fake_root import put, unfold


@pytest.mark.parametrize(
    ("files", "board", "mode"),
    [("orin-nano-super-jp6.2", "orin-nano-8gb-super", "25W"), ("agx-orin-jp6.1", "agx-orin-64gb", "MAXN")],
)
def test_a_jetson_is_planned_in_the_mode_that_it_is_in(files: str, board: str, mode: str, tmp_path: Path) -> None:
    found = targets._this(None, unfold(files, tmp_path))
    assert isinstance(found, BoardTarget)
    assert (found.name, found.hardware.mode.name) == (board, mode)
    other = targets._this("15W" if board.startswith("orin") else "MODE_15W", tmp_path)
    assert isinstance(other, BoardTarget) and "15W" in other.hardware.mode.name


def test_a_mode_whose_clocks_nobody_knows_is_not_planned_as_another(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="clocks of agx-thor in mode 120W are not published"):
        targets._this(None, unfold("agx-thor-jp7.1", tmp_path))


def test_a_pc_is_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "this_machine", lambda: "measured")
    root = unfold("pc", tmp_path)
    assert board_here(root) is None
    assert targets._this(None, root) == "measured"
    with pytest.raises(UsageError, match="has no power modes"):
        targets._this("MAXN", root)


def test_a_jetson_that_nobody_knows_is_refused_with_those_that_are(tmp_path: Path) -> None:
    root = unfold("orin-nano-super-jp6.2", tmp_path)
    put(root, "/proc/meminfo", "MemTotal:        3900000 kB")
    with pytest.raises(UsageError, match=r"Orin Nano.* with 4\.0 GB.*orin-nano-8gb-super"):
        targets._this(None, root)
