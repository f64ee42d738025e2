"""Memory: how much, swap, memory in one piece, and what keeps some of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.support import apt_upgrade
from keepsight.runtime.sensors.meminfo import meminfo, swaps
from keepsight.runtime.sensors.sysfs import text

__all__ = ["contiguous", "desktop", "memory", "nvmap", "swap"]

_GIB, _MIB = 2**30, 2**20
_LITTLE = 512 * _MIB
# What `cma=950M` gives, rounded up by the kernel: 960 MiB. No more fits in one piece below 4 GiB of an Orin's addresses
# (https://hokwangchoi.com/blog/vlm-benchmarks/, notes on TensorRT Edge-LLM).
_ENOUGH_CMA = 900 * _MIB
_CMA = "950M"
_EXTLINUX = "/boot/extlinux/extlinux.conf"
_DESKTOPS = ("gnome-shell", "Xorg", "Xwayland", "lxsession", "lxqt-session", "xfce4-session", "plasmashell", "weston")


def memory(machine: Machine) -> Iterator[Finding]:
    """What there is, and what is free."""
    said = meminfo(machine.root)
    total, available = said.get("MemTotal"), said.get("MemAvailable")
    if total is None or available is None:
        return
    found = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if available < _LITTLE:
        yield Finding(
            "memory",
            "memory",
            "warning",
            found,
            "A model will hardly load. End what takes it; the largest programs first:",
            "ps -eo rss,comm --sort=-rss | head",
        )
    else:
        yield Finding("memory", "memory", "ok", found)


def swap(machine: Machine) -> Iterator[Finding]:
    """Swap spoils a measurement; a build may need it."""
    places = swaps(machine.root)
    if places:
        kinds = sorted({"zram" if place.compressed else "a disk" for place in places})
        size = sum(place.bytes for place in places) / _GIB
        used = sum(place.used for place in places) / _MIB
        yield Finding(
            "swap",
            "memory",
            "warning" if machine.is_jetson or used >= 1 else "note",
            f"swap is on: {size:.1f} GiB on {' and '.join(kinds)}, {used:.0f} MiB of it used",
            "Good for builds. For a measurement switch it off: a model that is swapped out reads as a slow one. Until the next "
            "start:",
            "sudo swapoff -a",
        )
    elif machine.is_jetson and machine.is_small:
        yield Finding(
            "swap",
            "memory",
            "note",
            "swap is off",
            "Right for a measurement. Building llama.cpp or an engine on 8 GB may need it:",
            "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile",
        )
    else:
        yield Finding("swap", "memory", "ok", "swap is off")


def contiguous(machine: Machine) -> Iterator[Finding]:
    """Memory in one piece (CMA), which TensorRT's builder wants on a small board."""
    said = meminfo(machine.root)
    total, free = said.get("CmaTotal"), said.get("CmaFree")
    if not machine.is_jetson or total is None:
        return
    left = "" if free is None else f", {free / _MIB:.0f} MiB of it free"
    found = f"{total / _MIB:.0f} MiB of contiguous memory (CMA){left}"
    if not machine.is_small or total >= _ENOUGH_CMA:
        yield Finding("cma", "memory", "ok", found)
        return
    yield Finding(
        "cma",
        "memory",
        "warning",
        found,
        "Building an engine with a large matrix wants more in one piece: on 8 GB and with 256 MiB, one ended in "
        f"NvMapMemAllocInternalTagged, error 12, and was built with cma={_CMA} (hokwangchoi.com). It takes a restart:",
        _cma_command(machine),
    )


def nvmap(machine: Machine) -> Iterator[Finding]:
    """The release that gives a small board's GPU less than is free."""
    l4t = machine.identity.l4t
    if l4t is None or not machine.is_small or machine.identity.chip != "tegra234":
        return
    if l4t.startswith("36.4.7"):
        yield Finding(
            "nvmap",
            "memory",
            "warning",
            "Jetson Linux 36.4.7 on 8 GB",
            "Users report that this release refuses the GPU large allocations while memory is free (NvMap, error 12), and that "
            "36.5 (JetPack 6.2.2) mends it.",
            f"{apt_upgrade('r36.4', 'r36.5')} && sudo reboot",
        )


def desktop(machine: Machine) -> Iterator[Finding]:
    """A desktop on 8 GB takes what a model lacks."""
    if not machine.is_jetson or not machine.is_small:
        return
    running = [name for name in _DESKTOPS if name in machine.processes]
    if running:
        yield Finding(
            "desktop",
            "memory",
            "warning",
            f"a graphical desktop is running ({', '.join(running)})",
            "It keeps 100 to 800 MB (users' reports) of the 8 GB that CPU and GPU share. Without it, now and after every start:",
            "sudo systemctl set-default multi-user.target && sudo systemctl isolate multi-user.target",
        )
    else:
        yield Finding("desktop", "memory", "ok", "no graphical desktop is running")


def _cma_command(machine: Machine) -> str:
    if re.search(r"\bcma=\S+", text(machine.path("/proc/cmdline")) or ""):
        return f"sudo sed -i 's/\\bcma=[^ ]*/cma={_CMA}/' {_EXTLINUX} && sudo reboot"
    return f"sudo sed -i '/^[[:space:]]*APPEND/ s/$/ cma={_CMA}/' {_EXTLINUX} && sudo reboot"
