"""Disks: room, and whether a bundle is on an SD card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.sensors.sysfs import text

__all__ = ["disk", "sd_card"]

_GB = 1e9
_LITTLE, _HARDLY_ANY = 5e9, 0.5e9  # a build of llama.cpp or of a bundle's engines takes some GB


def disk(machine: Machine, place: Path) -> Iterator[Finding]:
    """Room where the bundle is, or where the user works."""
    free = machine.free(place)
    if free is None:
        return
    found = f"{free / _GB:.1f} GB free on the disk of {place.absolute()}"
    if free >= _LITTLE:
        yield Finding("disk", "storage", "ok", found)
        return
    yield Finding(
        "disk",
        "storage",
        "error" if free < _HARDLY_ANY else "warning",
        found,
        "Engines, recordings, snapshots and builds are written there. What takes the room:",
        f"du -xh {place.absolute().anchor} 2>/dev/null | sort -h | tail -20",
    )


def sd_card(machine: Machine, place: Path) -> Iterator[Finding]:
    """Loading from an SD card takes long, and snapshots and recordings wear it out."""
    number = machine.device(place)
    if number is None:
        return
    block = machine.path(f"/sys/dev/block/{number[0]}:{number[1]}")
    # A partition's folder lies in that of its disk, which has the device.
    kinds = {text(folder / "device" / "type") for folder in (block, block.resolve().parent)}
    if "SD" in kinds:
        yield Finding(
            "sd-card",
            "storage",
            "warning",
            f"{place.absolute()} is on an SD card",
            "Models load slowly from it, and snapshots and recordings wear it out. Copy the bundle to an SSD; which disks there "
            "are:",
            "lsblk -o NAME,SIZE,TRAN,MOUNTPOINT",
        )
