"""The GPU: its driver, the compiler, TensorRT and cuda-python."""

from __future__ import annotations

import re
from collections.abc import Iterator

from keepsight.runtime.doctor.board_checks import VENV
from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.support import support_of
from keepsight.runtime.sensors.sysfs import text

__all__ = ["compiler", "cuda_python", "driver", "tensorrt"]

_JETPACK = "sudo apt update && sudo apt install nvidia-jetpack"
_NVCC, _TOOLKIT = "/usr/local/cuda/bin/nvcc", "/usr/local/cuda/version.json"
_FIRST_TENSORRT = 10
_BINDINGS = ("/usr/lib/python3/dist-packages", "/usr/lib/python3.10/dist-packages", "/usr/lib/python3.12/dist-packages")


def driver(machine: Machine) -> Iterator[Finding]:
    """Whether the CUDA driver starts, and which GPU it finds."""
    gpus = machine.cuda.values.get("gpus", [])
    if gpus:
        names = ", ".join(f"{gpu['name']} (compute capability {gpu['sm'] / 10:.1f})" for gpu in gpus)
        yield Finding("cuda", "GPU", "ok", f"CUDA driver {machine.cuda.values['version']}: {names}")
        return
    reason = machine.cuda.failure or "the CUDA driver finds no GPU"
    if not machine.is_jetson:
        yield Finding("cuda", "GPU", "ok", f"no NVIDIA GPU that can be used: everything runs on the CPU ({reason})")
        return
    in_container = machine.path("/.dockerenv").exists()
    yield Finding(
        "cuda",
        "GPU",
        "error",
        "the GPU can't be used",
        f"{reason}. "
        + ("Start the container with --runtime nvidia." if in_container else "JetPack brings the driver's libraries."),
        None if in_container else _JETPACK,
    )


def compiler(machine: Machine) -> Iterator[Finding]:
    """On a Jetson: nvcc, without which llama.cpp is built for the CPU, and nothing says so."""
    if not machine.is_jetson:
        return
    if machine.path(_NVCC).exists():
        yield from _toolkit(machine)
        return
    yield Finding(
        "nvcc",
        "GPU",
        "warning",
        f"no CUDA compiler at {_NVCC}",
        "It runs nothing, but llama.cpp is built with it; without it a build ends well and serves the CPU alone.",
        _JETPACK,
    )


def tensorrt(machine: Machine) -> Iterator[Finding]:
    """Whether this Python can use TensorRT, and whether it is JetPack's."""
    has_gpu = bool(machine.cuda.values.get("gpus"))
    if not machine.is_jetson and not has_gpu:
        return
    outcome = machine.probe("tensorrt")
    if outcome.failure is not None:
        yield from _no_tensorrt(machine, outcome.failure)
        return
    version = outcome.values["version"]
    support = support_of(machine.identity.l4t) if machine.identity.l4t else None
    if int(version.split(".")[0]) < _FIRST_TENSORRT:
        yield Finding(
            "tensorrt",
            "GPU",
            "error",
            f"TensorRT {version} is too old",
            "Keepsight builds engines with what TensorRT 10 has. JetPack 6.1 is the first that brings it.",
        )
    elif support is not None and support.usable and not _is_one_of(version, support.tensorrt):
        yield Finding(
            "tensorrt",
            "GPU",
            "warning",
            f"TensorRT {version}, where JetPack {support.jetpack} brings {support.tensorrt[0]}",
            "Another one was installed beside it, or over it. It may work; engines that the other one built do not. "
            "JetPack's own:",
            "sudo apt install --reinstall python3-libnvinfer",
        )
    else:
        yield Finding("tensorrt", "GPU", "ok", f"TensorRT {version}")


def cuda_python(machine: Machine) -> Iterator[Finding]:
    """cuda-python, which runs the engines."""
    if not machine.is_jetson:
        return
    version = machine.versions.get("cuda-bindings")
    if version is None:
        yield Finding(
            "cuda-python",
            "GPU",
            "warning",
            "cuda-python is not installed",
            "`--backend tensorrt` runs engines with it.",
            'pip install "keepsight[tensorrt]"',
        )
    else:
        yield Finding("cuda-python", "GPU", "ok", f"cuda-python {version}")


def _toolkit(machine: Machine) -> Iterator[Finding]:
    found = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"(\d+\.\d+)', text(machine.path(_TOOLKIT)) or "")
    support = support_of(machine.identity.l4t) if machine.identity.l4t else None
    if found is None or support is None or not support.usable or found[1] == support.cuda:
        yield Finding("nvcc", "GPU", "ok", f"CUDA {found[1] + ' ' if found else ''}compiler at {_NVCC}")
        return
    yield Finding(
        "nvcc",
        "GPU",
        "warning",
        f"the CUDA {found[1]} compiler, where JetPack {support.jetpack} brings {support.cuda}",
        "What is built with it, llama.cpp for one, may need a newer driver than this board has. JetPack's own:",
        f"sudo apt install cuda-toolkit-{support.cuda.replace('.', '-')} && "
        f"sudo ln -sfn /usr/local/cuda-{support.cuda} /usr/local/cuda",
    )


def _is_one_of(version: str, known: tuple[str, ...]) -> bool:
    return any(f"{version}.".startswith(f"{one}.") for one in known)


def _no_tensorrt(machine: Machine, reason: str) -> Iterator[Finding]:
    if not machine.is_jetson:
        yield Finding(
            "tensorrt", "GPU", "note", "no TensorRT", f"Only `--backend tensorrt` needs it: {reason}", "pip install tensorrt"
        )
        return
    found = "this Python can't use TensorRT"
    if any((machine.path(folder) / "tensorrt").exists() for folder in _BINDINGS) and not machine.system_packages:
        yield Finding(
            "tensorrt",
            "GPU",
            "error",
            found,
            "JetPack's is installed, and this virtual environment does not see the system's packages. Make it anew:",
            VENV,
        )
        return
    yield Finding(
        "tensorrt",
        "GPU",
        "error",
        found,
        f"Without it the graphs run on the CPU: {reason}",
        "sudo apt install python3-libnvinfer",
    )
