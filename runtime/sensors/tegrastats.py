"""A line of `tegrastats`, read: for logs that users recorded, and for what sysfs does not tell.

NVIDIA documents the fields ("tegrastats Utility" in the Jetson Linux Developer Guide,
https://docs.nvidia.com/jetson/archives/r38.4/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html); how they are
spelled was read from lines that users published. JetPack 5 writes
`CPU@48.5C`, `GR3D_FREQ 0%@305` and `VDD_IN 5299mW/5299mW`; JetPack 6 `cpu@48.5C`, one GPU clock for each cluster,
`GR3D_FREQ 0%@[305,305]`, and without root no clock at all; JetPack 7 a second number behind each temperature,
`cpu@50C/50C`, a third behind each rail, and on a Thor, at first, clocks without a load, `GR3D_FREQ @[314,314,314]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

from keepsight.runtime.sensors.power import whole_board
from keepsight.runtime.sensors.reading import Power, Reading, Temperature

__all__ = ["completed", "parse", "parse_log"]

_MEMORY = re.compile(r"\b(RAM|SWAP) (\d+)/(\d+)([kKMG]?)B")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")
_GPU = re.compile(r"\bGR3D_FREQ(?: (\d+)%)?(?: ?@\[?(\d+))?")
_EMC = re.compile(r"\bEMC_FREQ(?: \d+%)?(?: ?@(\d+))?")
_ZONE = re.compile(r"\b([A-Za-z][A-Za-z0-9_]*)@(-?\d+(?:\.\d+)?)C\b")
# Milliwatts, said or not; what is followed by another unit, as memory is, is no rail.
_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]+) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?=[\s/]|$)")
_TIME = re.compile(r"^(\d\d-\d\d-\d{4} \d\d:\d\d:\d\d)\b")
_UNITS = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20, "G": 2**30}
_NO_RAILS = frozenset({"RAM", "SWAP", "IRAM"})
_MEGA, _COLDEST = 1e6, -60.0


def parse(line: str, time_s: float = 0.0) -> Reading | None:
    """Read one line.

    Args:
        line: as `tegrastats` printed it, with its time or without.
        time_s: when that was.

    Returns:
        What it says; None for a line that is not one of tegrastats'. A CPU that is off is left out; memory that is in use, which
        tegrastats counts without caches, is taken to be all that is not available.
    """
    memory = {name: (int(used) * _UNITS[unit], int(total) * _UNITS[unit]) for name, used, total, unit in _MEMORY.findall(line)}
    if "RAM" not in memory:
        return None
    used, total = memory["RAM"]
    swap_used, swap_total = memory.get("SWAP", (None, None))
    gpu, emc = _GPU.search(line), _EMC.search(line)
    # A line that was cut off may end within its memory, before the unit.
    powers = {name: int(milliwatts) / 1000 for name, milliwatts in _RAIL.findall(line) if name not in _NO_RAILS}
    whole = whole_board(list(powers))
    return Reading(
        time_s=time_s,
        temperatures=tuple(
            Temperature(name, float(degrees)) for name, degrees in _ZONE.findall(line) if float(degrees) > _COLDEST
        ),
        powers=tuple(Power(name, watts, name in whole) for name, watts in powers.items()),
        gpu_hz=None if gpu is None else _hz(gpu[2]),
        gpu_load=None if gpu is None or gpu[1] is None else min(int(gpu[1]) / 100, 1.0),
        cpu_hz=_cpus(line),
        emc_hz=None if emc is None else _hz(emc[1]),
        memory_total=total,
        memory_available=max(total - used, 0),
        swap_total=swap_total,
        swap_free=None if swap_total is None or swap_used is None else max(swap_total - swap_used, 0),
    )


def parse_log(lines: Iterable[str], interval_s: float = 1.0) -> list[Reading]:
    """Read a log; lines that are not tegrastats' are left out.

    Args:
        lines: in the order of their times.
        interval_s: from one line to the next, for logs whose lines don't begin with their time. Those that do say it in whole
            seconds, counted here from the first.
    """
    found: list[Reading] = []
    first: datetime | None = None
    for line in lines:
        stamp = _stamp(line.strip())
        first = first or stamp
        since = interval_s * len(found) if stamp is None or first is None else (stamp - first).total_seconds()
        reading = parse(line.strip(), since)
        if reading is not None:
            found.append(reading)
    return found


def completed(reading: Reading, other: Reading) -> Reading:
    """The reading, with what it lacks taken from another one; its time stays."""
    missing: dict[str, Any] = {
        field.name: getattr(other, field.name) for field in fields(Reading) if getattr(reading, field.name) in (None, ())
    }
    return replace(reading, **missing)


def _cpus(line: str) -> tuple[float, ...]:
    listed = _CPU.search(line)
    clocks = [] if listed is None else [_hz(core.partition("@")[2]) for core in listed[1].split(",")]
    return tuple(clock for clock in clocks if clock is not None)


def _hz(megahertz: str | None) -> float | None:
    """A clock; None where it is not said, or stands still."""
    return float(megahertz) * _MEGA if megahertz and megahertz.isdigit() and int(megahertz) else None


def _stamp(line: str) -> datetime | None:
    found = _TIME.match(line)
    try:
        return None if found is None else datetime.strptime(found[1], "%m-%d-%Y %H:%M:%S")
    except ValueError:
        return None
