"""llama.cpp: the pinned version, built for this GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine

__all__ = ["llama", "rebuild_command"]

_ARCHITECTURES = re.compile(r"\bARCHS\s*=\s*([\d,]+)")


def llama(machine: Machine) -> Iterator[Finding]:
    """Whether it loads, is the one that Keepsight was written for, and uses the GPU."""
    outcome, command = machine.probe("llama"), rebuild_command(machine)
    if outcome.failure is not None:
        yield Finding(
            "llama",
            "language model",
            "error",
            "llama-cpp-python can't be loaded",
            f"No question can be answered. {_illegal(outcome.failure)}",
            command,
        )
        return
    version, pinned = outcome.values["version"], machine.pinned
    if pinned is not None and version != pinned:
        yield Finding(
            "llama-version",
            "language model",
            "error",
            f"llama-cpp-python {version}, where Keepsight needs {pinned}",
            "Its structures follow one revision of llama.cpp: with another one, memory is read wrongly, or the process ends.",
            command,
        )
    else:
        yield Finding("llama-version", "language model", "ok", f"llama-cpp-python {version}")
    yield from _gpu(machine, outcome.values, command)


def rebuild_command(machine: Machine) -> str:
    """What builds the pinned llama-cpp-python for this machine's GPU, or for the CPU where there is none."""
    wanted = f"llama-cpp-python=={machine.pinned}" if machine.pinned else "llama-cpp-python"
    install = f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python {wanted}"
    options = ["-DLLAVA_BUILD=OFF"]
    if not machine.is_jetson or machine.sm is None:
        return f'CMAKE_ARGS="{options[0]}" {install}'
    options = ["-DGGML_CUDA=on", f"-DCMAKE_CUDA_ARCHITECTURES={machine.sm}-real", *options]
    jobs = ""
    if machine.is_small:
        options.append("-DGGML_CUDA_NO_VMM=ON")  # reserving 32 GB of addresses fails there
        jobs = "CMAKE_BUILD_PARALLEL_LEVEL=2 "  # each nvcc takes a GB or more
    return f'CUDACXX=/usr/local/cuda/bin/nvcc {jobs}CMAKE_ARGS="{" ".join(options)}" {install}'


def _gpu(machine: Machine, values: dict[str, object], command: str) -> Iterator[Finding]:
    if not values["offload"]:
        if machine.is_jetson:
            yield Finding(
                "llama-gpu",
                "language model",
                "error",
                "llama.cpp was built for the CPU alone",
                "The language model does not use the GPU. This is what a build without nvcc gives, silently. Build it again "
                "(it takes minutes):",
                command,
            )
        else:
            yield Finding("llama-gpu", "language model", "ok", "llama.cpp runs on the CPU")
        return
    built = _ARCHITECTURES.search(str(values["about"]))
    architectures = {int(number) // 10 for number in built[1].split(",") if number} if built else set()
    if machine.is_jetson and architectures and machine.sm not in architectures:
        listed = ", ".join(f"{one / 10:.1f}" for one in sorted(architectures))
        yield Finding(
            "llama-gpu",
            "language model",
            "warning",
            f"llama.cpp was built for compute capability {listed}, not for this GPU's",
            'Its GPU code is compiled anew at the first start, if it can be, or fails with "no kernel image". Build it for this '
            "one:",
            command,
        )
        return
    yield Finding("llama-gpu", "language model", "ok", "llama.cpp uses the GPU")


def _illegal(reason: str) -> str:
    if "SIGILL" in reason:
        return f"{reason}: it was built on another processor. Build it here:"
    return reason
