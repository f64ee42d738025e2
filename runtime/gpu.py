"""Which GPU this machine has, asked of the CUDA driver, and which Jetson Linux it runs."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.streams.errors import EngineError, MissingComponentError

__all__ = ["Gpu", "jetson_linux", "this_gpu"]

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_RELEASE = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The name as the driver gives it ("Orin"), and the compute capability as one number: 87 for 8.7, 110 for 11.0."""

    name: str
    sm: int


def this_gpu() -> Gpu:
    """The first GPU that the CUDA driver lists; a Jetson has one.

    Raises:
        MissingComponentError: there is no CUDA driver.
        EngineError: the driver finds no GPU, or refuses.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise MissingComponentError(
            f"there is no CUDA driver here ({error}).",
            fix="Engines are built on the machine that runs them: a Jetson, whose JetPack brings the driver.",
        ) from error
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    _call(driver, "cuInit", 0)
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(), 10 * major.value + minor.value)


def jetson_linux(release: Path = _RELEASE) -> str | None:
    """Release of Jetson Linux, such as "36.4.3" (JetPack 6.2); None on a machine that is no Jetson."""
    try:
        text = release.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def _call(driver: Any, function: str, *arguments: Any) -> None:
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise EngineError(
            f"the CUDA driver refused {function} (error {status}).",
            fix="Check that this user may use the GPU (group `video`) and that the driver is loaded.",
        )
