"""What the CUDA driver says of the GPU, through cuda-python over a double of the driver, and what /etc says of the board."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keepsight.runtime.graphs import cuda
from keepsight.runtime.graphs.gpu import Gpu, jetson_linux, this_gpu
from keepsight.runtime.graphs.tensorrt_build import this_target
from keepsight.streams.errors import EngineError, MissingComponentError

from .fake_cuda import HAS_DRIVER, load_driver
from .fake_tensorrt import fake_tensorrt


def test_the_gpu_is_named_by_the_driver() -> None:
    load_driver()
    assert this_gpu() == Gpu("Orin", 87)
    assert this_target(fake_tensorrt("10.3.0")).name == "orin-sm87-trt10.3.0"


def test_a_driver_without_a_gpu_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    refusing: Any = SimpleNamespace(CUresult=driver.CUresult, cuInit=lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,))
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: refusing)
    with pytest.raises(EngineError, match=r"refused cuInit \(CUDA_ERROR_NO_DEVICE\)\..*group `video`"):
        this_gpu()


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a CUDA driver")
def test_without_a_driver_the_error_says_where_engines_are_built() -> None:
    """In a process of its own: this one may have loaded the double."""
    program = "from keepsight.runtime.graphs.gpu import this_gpu\ntry: this_gpu()\nexcept ImportError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=dict(os.environ), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("there is no CUDA driver here (") and "a machine with an NVIDIA GPU" in done.stdout


def test_without_cuda_python_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingComponentError, match=r'cuda-python can\'t be loaded .*pip install "keepsight\[tensorrt\]"'):
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
