"""Which GPU this machine has, asked of the CUDA driver, and which Jetson Linux it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from keepsight.runtime.graphs.cuda import call, start_driver

__all__ = ["Gpu", "jetson_linux", "this_gpu"]

_LONGEST_NAME = 256
_RELEASE = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The name as the driver gives it ("Orin"), and the compute capability as one number: 87 for 8.7, 110 for 11.0."""

    name: str
    sm: int


def this_gpu() -> Gpu:
    """The first GPU that the CUDA driver lists; a Jetson has one.

    Raises:
        MissingComponentError: there is no CUDA driver, or no cuda-python.
        EngineError: the driver finds no GPU, or refuses.
    """
    driver = start_driver()
    device = call(driver, "cuDeviceGet", 0)
    name: bytes = call(driver, "cuDeviceGetName", _LONGEST_NAME, device)
    asked = driver.CUdevice_attribute
    major = call(driver, "cuDeviceGetAttribute", asked.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver, "cuDeviceGetAttribute", asked.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.split(b"\0")[0].decode(), 10 * major + minor)


def jetson_linux(release: Path = _RELEASE) -> str | None:
    """Release of Jetson Linux, such as "36.4.3" (JetPack 6.2); None on a machine that is no Jetson."""
    try:
        text = release.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None
