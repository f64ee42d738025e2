"""Temperatures, and why the kernel slows the machine down.

Thermal zones and cooling devices are Linux' own (Documentation/driver-api/thermal/sysfs-api.rst). A Jetson's cooling devices
`cpu-throttle-alert`, `gpu-throttle-alert`, `soc0-throttle-alert` and the like step above 0 while that part is slowed down.
`hot-surface-alert` is none of them: at 70 C an Orin says with it that its heat sink is hot to the touch, and goes on at full
speed until 99 C. Over-current and under-voltage are counted since the boot, in `oc1_event_cnt` and on: a count that grows
between two readings is a machine that was slowed down in between.
"""

from __future__ import annotations

from pathlib import Path

from keepsight.runtime.sensors.reading import Temperature
from keepsight.runtime.sensors.sysfs import named, number, text

__all__ = ["Alerts", "Thermometers"]

_MILLI = 1000.0
# A zone that is switched off says -256 C on some kernels. Nothing that runs is colder or hotter than these.
_COLDEST, _HOTTEST = -60.0, 200.0
_SURFACE = "surface-alert"
# Cooling devices that take speed away. A fan is one, too, and is none of these.
_SLOWING = ("throttle-alert", "cpufreq", "devfreq")
_OVER_CURRENT = {1: "under-voltage", 2: "average over-current", 3: "instantaneous over-current"}
_HWMON = {"coretemp": "Package id", "k10temp": "Tctl", "zenpower": "Tdie"}
"""Drivers of x86 processors, and how the label of the whole processor begins."""


class Thermometers:
    """The thermal zones, and an x86 processor's own sensor.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        self._places = [
            (name, zone / "temp", _throttles_at(zone))
            for zone in named(root / "sys/class/thermal", "thermal_zone*")
            if (name := text(zone / "type")) is not None
        ] + _of_processor(root)

    def read(self) -> tuple[Temperature, ...]:
        """Those that answer."""
        found = []
        for name, path, limit in self._places:
            value = number(path)
            if value is not None and _COLDEST < value / _MILLI < _HOTTEST:
                found.append(Temperature(name, value / _MILLI, limit))
        return tuple(found)


class Alerts:
    """What slows the machine down: cooling devices, and over-current events since the last reading.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        self._devices = [
            (name, device / "cur_state")
            for device in named(root / "sys/class/thermal", "cooling_device*")
            if (name := text(device / "type")) is not None and any(part in name for part in _SLOWING)
        ]
        self._counters = [
            (_event(counter), counter) for folder in _counter_folders(root) for counter in named(folder, "oc*_event_cnt")
        ]
        self._counted = {path: number(path) for _, path in self._counters}

    def read(self) -> tuple[str, ...]:
        """Names of the cooling devices that act, and of the events that were counted since the last reading."""
        acting = [name for name, path in self._devices if (number(path) or 0) > 0]
        for name, path in self._counters:
            before, now = self._counted[path], number(path)
            self._counted[path] = now
            if before is not None and now is not None and now > before:
                acting.append(name)
        return tuple(dict.fromkeys(acting))


def _throttles_at(zone: Path) -> float | None:
    """The lowest passive trip of a zone that something slows the machine down at, Celsius."""
    bound = _bound(zone)
    limits = []
    for path in named(zone, "trip_point_*_type"):
        trip = path.name.removeprefix("trip_point_").removesuffix("_type")
        value = number(zone / f"trip_point_{trip}_temp")
        if text(path) != "passive" or value is None or not 0 < value / _MILLI < _HOTTEST:
            continue
        devices = bound.get(trip, [])
        if not devices or any(not device.endswith(_SURFACE) for device in devices):
            limits.append(value / _MILLI)
    return min(limits, default=None)


def _bound(zone: Path) -> dict[str, list[str]]:
    """Types of the cooling devices of each trip."""
    found: dict[str, list[str]] = {}
    for path in named(zone, "cdev*_trip_point"):
        trip, device = text(path), text(zone / path.name.removesuffix("_trip_point") / "type")
        if trip is not None and device is not None:
            found.setdefault(trip, []).append(device)
    return found


def _of_processor(root: Path) -> list[tuple[str, Path, float | None]]:
    places: list[tuple[str, Path, float | None]] = []
    for folder in named(root / "sys/class/hwmon", "hwmon*"):
        begins = _HWMON.get(name := text(folder / "name") or "")
        if begins is None:
            continue
        for label in named(folder, "temp*_label"):
            said = text(label) or ""
            if said.startswith(begins):
                places.append((f"{name} {said}", folder / label.name.replace("_label", "_input"), None))
    return places


def _counter_folders(root: Path) -> list[Path]:
    folders = named(root / "sys/devices/platform/soctherm-oc-event/hwmon", "hwmon*")
    return folders or [folder for folder in named(root / "sys/class/hwmon", "hwmon*") if (folder / "oc1_event_cnt").exists()]


def _event(counter: Path) -> str:
    which = counter.name.removesuffix("_event_cnt")
    meaning = _OVER_CURRENT.get(int(which[2:] or 0) if which[2:].isdigit() else 0)
    return which if meaning is None else f"{which} ({meaning})"
