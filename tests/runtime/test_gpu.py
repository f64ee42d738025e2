"""What the CUDA driver says of the GPU, with a double of the driver, and what /etc says of the board."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keepsight.runtime.gpu import Gpu, jetson_linux, this_gpu
from keepsight.runtime.tensorrt_build import this_target
from keepsight.streams.errors import EngineError, MissingComponentError

from .fake_tensorrt import fake_tensorrt


def driver(*, init: int = 0) -> Any:
    """An Orin's driver: device 0, compute capability 8.7."""

    def attribute(value: Any, which: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[which]
        return 0

    def name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"Orin"
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: init,
        cuDeviceGet=lambda device, index: 0,
        cuDeviceGetName=name,
        cuDeviceGetAttribute=attribute,
    )


def test_the_gpu_is_named_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver())
    assert this_gpu() == Gpu("Orin", 87)
    assert this_target(fake_tensorrt("10.3.0")).name == "orin-sm87-trt10.3.0"


def test_a_driver_that_refuses_is_an_error_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver(init=100))  # CUDA_ERROR_NO_DEVICE
    with pytest.raises(EngineError, match=r"refused cuInit \(error 100\)"):
        this_gpu()


def test_without_a_driver_the_error_says_where_engines_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(MissingComponentError, match=r"no CUDA driver here .*run on a machine with an NVIDIA GPU"):
        this_gpu()


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n", "36.4.3"),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic\n", "38.2.0"),
        ("something else\n", None),
    ],
)
def test_the_release_of_jetson_linux(tmp_path: Path, text: str, release: str | None) -> None:
    (tmp_path / "nv_tegra_release").write_text(text)
    assert jetson_linux(tmp_path / "nv_tegra_release") == release


def test_a_machine_without_a_release_file_is_no_jetson(tmp_path: Path) -> None:
    assert jetson_linux(tmp_path / "nv_tegra_release") is None
