"""The board, its JetPack, Python, and the clock."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.support import support_of

__all__ = ["VENV", "board", "clock", "jetpack", "python", "system_python"]

_OLDEST, _NEWEST = (3, 10), (3, 12)
VENV = "/usr/bin/python3 -m venv --system-site-packages .venv"


def board(machine: Machine) -> Iterator[Finding]:
    """Which machine this is."""
    one = machine.identity
    memory = None if one.memory is None else f"{one.memory / 2**30:.1f} GiB"
    cores = None if one.cores is None else f"{one.cores} cores"
    release = None if one.l4t is None else f"Jetson Linux {one.l4t}" + (f" (JetPack {one.jetpack})" if one.jetpack else "")
    parts = [part for part in (one.title, one.processor, cores, memory, one.system, release) if part]
    kind = "" if machine.is_jetson else "; no Jetson, so its checks are left out"
    yield Finding("board", "board", "ok", ", ".join(parts) + kind if parts else f"an unknown machine{kind}")


def jetpack(machine: Machine) -> Iterator[Finding]:
    """Whether Keepsight can work on this JetPack."""
    if not machine.is_jetson:
        return
    l4t = machine.identity.l4t
    if l4t is None:
        yield Finding(
            "jetpack",
            "board",
            "warning",
            "a Jetson without /etc/nv_tegra_release",
            "Its release of Jetson Linux can't be told, nor what fits it. Start a container with "
            "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro.",
        )
        return
    support = support_of(l4t)
    if support is None:
        yield Finding(
            "jetpack",
            "board",
            "warning",
            f"Jetson Linux {l4t} is not in Keepsight's table",
            "It may work: Keepsight knows the lines 36.4 to 39.2 (JetPack 6.1 to 7.2).",
        )
    elif not support.usable:
        yield Finding(
            "jetpack",
            "board",
            "error",
            f"JetPack {support.jetpack} (Jetson Linux {l4t}) is too old",
            f"Keepsight's GPU path can't run there: {support.problem}.",
            support.command,
        )
    else:
        yield Finding("jetpack", "board", "ok", f"JetPack {machine.identity.jetpack or support.jetpack} is supported")


def python(machine: Machine) -> Iterator[Finding]:
    """Whether this Python is one of those that Keepsight is for."""
    version = ".".join(map(str, machine.python))
    if _OLDEST <= machine.python <= _NEWEST:
        yield Finding("python", "board", "ok", f"Python {version}")
        return
    yield Finding(
        "python",
        "board",
        "error",
        f"Python {version}",
        "Keepsight is for Python 3.10 to 3.12.",
        VENV if machine.is_jetson else "python3.12 -m venv .venv",
    )


def system_python(machine: Machine) -> Iterator[Finding]:
    """On a Jetson: whether this Python is the system's, for which TensorRT's and GStreamer's bindings are compiled."""
    system = _system_version(machine)
    if not machine.is_jetson or system is None:
        return
    if machine.python != system:
        yield Finding(
            "system-python",
            "board",
            "error",
            f"this is Python {_dotted(machine.python)}, the system's is {_dotted(system)}",
            "JetPack's TensorRT and the GStreamer bindings are compiled for the system's Python alone.",
            VENV,
        )
    elif not machine.system_packages:
        yield Finding(
            "system-python",
            "board",
            "warning",
            "this virtual environment does not see the system's packages",
            "JetPack's TensorRT is one of them. Keepsight finds GStreamer's bindings by itself, not TensorRT.",
            VENV,
        )
    else:
        yield Finding("system-python", "board", "ok", "the system's Python, with its packages")


def clock(machine: Machine) -> Iterator[Finding]:
    """Whether the wall clock is right: answers carry times."""
    if machine.clock_synchronised is None:
        return
    if machine.clock_synchronised:
        yield Finding("clock", "board", "ok", "the clock is synchronised")
        return
    yield Finding(
        "clock",
        "board",
        "warning",
        "the clock is not synchronised",
        "Answers, recordings and questions about a time (--at 14:05) go by the wall clock. A board without a battery starts in "
        "the past.",
        "sudo timedatectl set-ntp true",
    )


def _system_version(machine: Machine) -> tuple[int, int] | None:
    link = machine.path("/usr/bin/python3")
    try:
        found = re.search(r"python(\d+)\.(\d+)$", os.readlink(link))
    except OSError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
