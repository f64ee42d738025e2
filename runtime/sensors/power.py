"""Power, rail by rail: the INA3221 and INA238 of a Jetson, and the energy counters (RAPL) of an x86 processor.

The drivers are Linux' own (Documentation/hwmon/ina3221.rst, ina238.rst). An INA3221 has three channels of a label, `inN_input`
(mV) and `currN_input` (mA); what lies beyond channel 3 are shunt voltages and sums of these three. An INA238 has one,
`power1_input` (uW). Hwmon numbers change between boots, so chips are found by their names.
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from keepsight.runtime.sensors.reading import Power
from keepsight.runtime.sensors.sysfs import named, number, text

__all__ = ["Meters", "whole_board"]

_CHANNELS = 3
_ABSENT = frozenset({"", "NC"})  # a channel that is not connected has one of these for a label
_CHIPS = frozenset({"ina3221", "ina238", "ina226", "ina219"})

# Which rails are the whole: the first of these sets that a board has all of.
# - VIN: the input of an AGX Thor's board, module and carrier, metered by an INA238 (NVIDIA,
#   https://forums.developer.nvidia.com/t/question-about-power-monitor-with-additional-load-on-jetson-thor/366461; public
#   tegrastats logs of JetPack 7: 25.5 W beside 19.9 W on the three rails of the module).
# - VDD_IN: the total power of an Orin NX's or Orin Nano's module ("VDD_IN is the total power of module": NVIDIA,
#   https://forums.developer.nvidia.com/t/interpretation-of-jetson-nx-power-rail/200883).
# - An AGX Orin meters no input. Its rails side by side are these three: GPU and SoC; CPU and CV; the 5 V rail of everything
#   else. VDDQ_VDD2_1V8AO, the memory's, is included in VIN_SYS_5V0 (NVIDIA's table of these rails, Jetson Linux Developer
#   Guide, "Jetson Orin Nano Series, Jetson Orin NX Series and Jetson AGX Orin Series", as quoted in public repositories):
#   adding it would count it twice. The carrier board is in none of them.
# - An AGX Thor whose input's meter is missing, likewise.
_WHOLE = (
    frozenset({"VIN"}),
    frozenset({"VDD_IN"}),
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),
    frozenset({"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}),
)
_MICRO = 1e-6
_SHORTEST = 1e-3  # seconds between two looks at an energy counter


class Meters:
    """The power meters.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        self._rails = [rail for chip in _chips(root) for rail in _rails(chip)]
        self._counters = [_Counter(folder) for folder in named(root / "sys/class/powercap", "intel-rapl:*") if _top(folder)]

    def read(self) -> tuple[Power, ...]:
        """The rails that answer. A counter of energy gives the mean power since it was last read."""
        watts = {name: value for name, first, second in self._rails if (value := _watts(first, second)) is not None}
        for counter in self._counters:
            value = counter.watts()
            if value is not None:
                watts[counter.name] = value
        # From the rails that exist, not those that answer: a sum must not shrink to what is left of it.
        whole = whole_board([label for label, *_ in self._rails])
        if not whole <= watts.keys():
            whole = frozenset()
        return tuple(Power(label, value, label in whole or label == "psys") for label, value in watts.items())


def whole_board(labels: list[str] | tuple[str, ...]) -> frozenset[str]:
    """Which rails of a board add up to all that it takes; none if that is not known of it."""
    return next((rails for rails in _WHOLE if rails <= set(labels)), frozenset())


def _chips(root: Path) -> list[Path]:
    found = [folder for folder in named(root / "sys/class/hwmon", "hwmon*") if text(folder / "name") in _CHIPS]
    if found:
        return found
    # NVIDIA's documents lead here; a container may have this and not the other.
    drivers = root / "sys/bus/i2c/drivers"
    return [folder for name in sorted(_CHIPS) for folder in named(drivers / name, "*/hwmon/hwmon*")]


def _rails(chip: Path) -> list[tuple[str, Path, Path | None]]:
    """Label and file of the power, or label and files of voltage and current."""
    found: list[tuple[str, Path, Path | None]] = []
    if (chip / "power1_input").exists():
        label = text(chip / "power1_label") or text(chip / "in1_label") or text(chip / "label")
        return [] if label is None or label in _ABSENT else [(label, chip / "power1_input", None)]
    for channel in range(1, _CHANNELS + 1):
        label = text(chip / f"in{channel}_label")
        if label is not None and label not in _ABSENT:
            found.append((label, chip / f"in{channel}_input", chip / f"curr{channel}_input"))
    return found


def _watts(first: Path, second: Path | None) -> float | None:
    if second is None:
        power = number(first)
        return None if power is None else power * _MICRO
    millivolts, milliamperes = number(first), number(second)
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes * _MICRO


def _top(folder: Path) -> bool:
    """Whether it is a package or platform, not a part of one (`intel-rapl:0:1`)."""
    return folder.name.count(":") == 1


class _Counter:
    """A counter of energy in microjoules that begins anew at its end. Since Linux 5.10 only root may read it."""

    def __init__(self, folder: Path) -> None:
        self.name = text(folder / "name") or folder.name
        self._path, self._range = folder / "energy_uj", number(folder / "max_energy_range_uj")
        self._energy, self._time = number(self._path), monotonic()

    def watts(self) -> float | None:
        energy, time = number(self._path), monotonic()
        before, since = self._energy, time - self._time
        if since < _SHORTEST:
            return None
        self._energy, self._time = energy, time
        if energy is None or before is None:
            return None
        used = energy - before
        if used < 0:
            if self._range is None:
                return None
            used += self._range
        return used * _MICRO / since
