"""Power modes by name: what a board computes and moves in each, and what it does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepsight.runtime.boards import boards
from keepsight.runtime.planning.hardware import hardware, modes
from keepsight.streams.errors import UsageError

FOLDER = Path(__file__).parents[3] / "runtime" / "planning"
MODES = json.loads((FOLDER / "modes.json").read_text())


@pytest.mark.parametrize(
    ("board", "mode", "tflops", "gb_s"),
    [
        # Dense float16 and the memory's bandwidth: a quarter of the GPU's sparse INT8 TOPS in NVIDIA's specifications.
        ("orin-nano-8gb-super", "MAXN_SUPER", 67 / 4, 102.4),
        ("orin-nano-8gb-super", "15W", 40 / 4, 68.3),
        ("orin-nx-16gb", None, 77 / 4, 102.4),
        ("agx-orin-64gb", "MAXN", 171 / 4, 204.8),
        ("agx-orin-64gb", "MODE_50W", 109 / 4, 204.8),
        ("agx-orin-64gb", "MODE_30W", 41 / 4, 204.8),
        ("agx-thor", None, 258.5, 273),
    ],
)
def test_a_mode_gives_what_is_specified(board: str, mode: str | None, tflops: float, gb_s: float) -> None:
    found = hardware(board, mode)
    assert found.peak("fp16") == pytest.approx(1e12 * tflops, rel=0.03)
    assert found.bandwidth == pytest.approx(1e9 * gb_s, rel=0.01)


def test_the_fastest_mode_of_a_board_is_what_its_own_entry_says() -> None:
    for board in boards():
        found = hardware(board.name)
        assert found.bandwidth == pytest.approx(1e9 * board.bandwidth_gb_s.value, rel=0.01)
        if board.dense_fp16_tflops is not None:
            assert found.peak("fp16") == pytest.approx(1e12 * board.dense_fp16_tflops.value, rel=0.03)


def test_numbers_of_modes_differ_between_boards() -> None:
    numbers = {board: {mode.number: mode.name for mode in modes(board)} for board in ("orin-nano-8gb-super", "orin-nx-16gb")}
    assert numbers["orin-nano-8gb-super"][0] == "15W"
    assert numbers["orin-nx-16gb"][0] == "MAXN_SUPER"
    assert all(mode.number is not None for mode in modes("orin-nano-8gb-super"))  # the old 15 W mode can't be set any more


def test_every_board_has_modes_with_a_source_and_one_default() -> None:
    assert MODES["boards"].keys() == {board.name for board in boards()}
    for entry in MODES["boards"].values():
        assert {mode["source"] for mode in entry["modes"]} <= MODES["sources"].keys()
        assert sum(mode.get("default", False) for mode in entry["modes"]) == 1
        names = [mode["name"] for mode in entry["modes"]]
        assert len(set(names)) == len(names)


def test_float32_runs_on_the_cuda_cores_because_engines_are_built_without_tf32() -> None:
    assert hardware("agx-orin-64gb").peak("fp32") == pytest.approx(2048 * 2 * 1.3e9, rel=0.01)  # 2,048 cores at 1,300 MHz
    assert hardware("agx-thor").peak("fp32") == pytest.approx(2560 * 2 * 1.575e9, rel=0.01)


def test_int8_is_twice_float16_and_an_orin_has_no_fp8() -> None:
    orin = hardware("agx-orin-64gb")
    assert orin.peak("int8") == 2 * orin.peak("fp16")
    with pytest.raises(UsageError, match=r"no fp8 units.*8\.7.*--precision int8"):
        orin.peak("fp8")
    assert hardware("agx-thor").peak("fp8") == pytest.approx(517e12, rel=0.01)


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(UsageError, match=r"no power mode 'MAXN'.*MAXN_SUPER \(nvpmodel -m 2\)"):
        hardware("orin-nano-8gb-super", "MAXN")
    with pytest.raises(UsageError, match="clocks of agx-thor in mode 90W are not published"):
        hardware("agx-thor", "90W")
    with pytest.raises(UsageError, match=r"'pi-5'.*orin-nx-16gb"):
        hardware("pi-5")
