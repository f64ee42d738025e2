"""Where a profile was made: the machine and its software. What is not there is None."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from keepsight.runtime.graphs.gpu import this_gpu
from keepsight.runtime.profiling.report import Machine
from keepsight.runtime.profiling.sampler import SensorReader
from keepsight.runtime.sensors.board import identity
from keepsight.runtime.versions import installed
from keepsight.streams.gst import load_gst

__all__ = ["this_machine"]

_PACKAGES = (
    "keepsight", "numpy", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings",
)  # fmt: skip


def this_machine(sensors: SensorReader, *, gpu: bool, root: Path = Path("/")) -> Machine:
    """As the kernel, the sensors and the installed packages say.

    Args:
        gpu: ask the CUDA driver for the GPU's name.
    """
    known, mode = identity(root), sensors.power_mode()
    return Machine(
        title=known.title or platform.node() or "unknown",
        processor=known.processor or platform.machine(),
        cores=known.cores or len(os.sched_getaffinity(0)),
        memory=known.memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=known.system or f"{platform.system()} {platform.release()}",
        l4t=known.l4t,
        jetpack=known.jetpack,
        power_mode=None if mode is None else mode.name,
        clocks_locked=sensors.clocks_locked(),
        gpu=this_gpu().name if gpu else None,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    gstreamer = load_gst().version_string().removeprefix("GStreamer ")
    return {"python": sys.version.split()[0], "gstreamer": gstreamer, **installed(_PACKAGES)}
