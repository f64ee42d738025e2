"""Which machine this is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from keepsight.runtime.graphs.gpu import jetson_linux
from keepsight.runtime.sensors.meminfo import meminfo
from keepsight.runtime.sensors.sysfs import text

__all__ = ["JETPACKS", "Identity", "identity"]

# Release of Jetson Linux -> JetPack, by the names of NVIDIA's release notes. A newer revision of a line is its last JetPack.
JETPACKS = {
    "35.1": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "35.6.1": "5.1.5", "36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.5": "6.2.2",
    "38.2": "7.0", "38.4": "7.1", "39.2": "7.2",
}  # fmt: skip

# Compute capability of the chips whose GPU is part of them.
_CHIPS = {"tegra194": 72, "tegra234": 87, "tegra264": 110}

# What an Arm core says of itself, of those in Jetsons ("CPU part" of /proc/cpuinfo).
_ARM_PARTS = {"0x004": "NVIDIA Carmel", "0xd42": "Arm Cortex-A78AE", "0xd83": "Arm Neoverse-V3AE"}


@dataclass(frozen=True)
class Identity:
    """A machine. What is not known of it is None.

    Attributes:
        title: the board, as it calls itself: "NVIDIA Jetson AGX Orin Developer Kit"; a PC's model.
        l4t: release of Jetson Linux, such as "36.4.3"; None on a machine that is no Jetson.
        jetpack: the JetPack of that release, such as "6.2"; None where there is none, or we don't know it.
        processor: of its cores.
        cores: those that it has, switched off or not.
        memory: bytes that Linux sees.
        system: distribution and kernel.
        chip: of a Jetson: "tegra234".
        sm: compute capability of that chip's GPU as one number: 87 for 8.7.
    """

    title: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    processor: str | None = None
    cores: int | None = None
    memory: int | None = None
    system: str | None = None
    chip: str | None = None
    sm: int | None = None

    @property
    def is_jetson(self) -> bool:
        """Whether this is one of NVIDIA's Jetsons, by its chip or its system."""
        return self.chip is not None or self.l4t is not None


def identity(root: Path = Path("/")) -> Identity:
    """Say which machine this is. Never raises."""
    tree = root / "proc/device-tree"
    compatible = text(tree / "compatible") or text(root / "sys/firmware/devicetree/base/compatible") or ""
    chip = next((name for name in _CHIPS if f"nvidia,{name}" in compatible), None)
    l4t = jetson_linux(root / "etc/nv_tegra_release")
    return Identity(
        title=text(tree / "model") or text(root / "sys/firmware/devicetree/base/model") or _pc(root),
        l4t=l4t,
        jetpack=None if l4t is None else _jetpack(l4t),
        processor=_processor(root),
        cores=_cores(text(root / "sys/devices/system/cpu/present")),
        memory=meminfo(root).get("MemTotal"),
        system=_system(root),
        chip=chip,
        sm=None if chip is None else _CHIPS[chip],
    )


def _jetpack(l4t: str) -> str | None:
    """Of the newest release in the table that is not newer than this one, on the same line."""
    release = _numbers(l4t)
    line = [(_numbers(known), jetpack) for known, jetpack in JETPACKS.items() if _numbers(known)[0] == release[0]]
    older = [(known, jetpack) for known, jetpack in line if known <= release]
    return max(older)[1] if older else None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part)


def _pc(root: Path) -> str | None:
    folder = root / "sys/class/dmi/id"
    words = [text(folder / name) for name in ("sys_vendor", "product_name")]
    return " ".join(word for word in words if word) or None


def _processor(root: Path) -> str | None:
    try:
        content = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = dict(re.findall(r"^([^:\n]+?)[ \t]*:[ \t]*(\S.*?)[ \t]*$", content, re.MULTILINE))
    return _ARM_PARTS.get(fields.get("CPU part", "")) or fields.get("model name")


def _cores(present: str | None) -> int | None:
    """Of a list such as `0-5` or `0,2-3`."""
    ranges = [part.partition("-") for part in (present or "").split(",")]
    if not all(first.isdigit() and (last.isdigit() or not last) for first, _, last in ranges):
        return None
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _system(root: Path) -> str | None:
    try:
        release = (root / "etc/os-release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        release = ""
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)"?', release, re.MULTILINE)
    kernel = text(root / "proc/sys/kernel/osrelease")
    parts = ([name[1]] if name else []) + ([f"Linux {kernel}"] if kernel else [])
    return ", ".join(parts) or None
