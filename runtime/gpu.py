"""Which GPU this machine has, asked of the CUDA driver, and which Jetson Linux it runs."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from keepsight.runtime.cuda import call, load_driver

__all__ = ["Gpu", "jetson_linux", "this_gpu"]

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
    driver = load_driver()
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    call(driver, "cuInit", 0)
    call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    call(driver, "cuDeviceGetName", name, len(name), device)
    call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(), 10 * major.value + minor.value)


def jetson_linux(release: Path = _RELEASE) -> str | None:
    """Release of Jetson Linux, such as "36.4.3" (JetPack 6.2); None on a machine that is no Jetson."""
    try:
        text = release.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None
