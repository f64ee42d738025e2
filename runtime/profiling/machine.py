"""Where a profile was made: the machine and its software. What is not there is None."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from keepsight.runtime.profiling.report import Machine
from keepsight.runtime.profiling.sampler import SensorReader
from keepsight.streams.gst import load_gst

__all__ = ["this_machine"]

_PACKAGES = (
    "keepsight", "numpy", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings",
)  # fmt: skip


def this_machine(sensors: SensorReader, root: Path = Path("/")) -> Machine:
    """As the kernel, the sensors and the installed packages say."""
    mode = sensors.power_mode()
    return Machine(
        title=_line(root / "proc/device-tree/model") or platform.node() or "unknown",
        processor=_processor(root),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        power_mode=None if mode is None else mode.name,
        clocks_locked=sensors.clocks_locked(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "gstreamer": load_gst().version_string().removeprefix("GStreamer ")}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor(root: Path) -> str:
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Hardware", "Model"):
            return value.strip()
    return platform.machine()


def _line(path: Path) -> str | None:
    text = _text(path)
    return None if text is None else text.strip("\0 \n") or None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
