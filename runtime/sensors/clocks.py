"""Clocks of GPU, CPU and memory, and how busy the GPU is.

Files of devfreq and cpufreq (Linux' Documentation/ABI/testing/sysfs-class-devfreq and admin-guide/pm/cpufreq.rst). The GPU is
`17000000.ga10b` on JetPack 5, `17000000.gpu` on JetPack 6 and on an Orin's JetPack 7, `gpu-gpc-0` on a Thor, which does not
say in sysfs how busy it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from keepsight.runtime.sensors.sysfs import named, number, text

__all__ = ["CpuClocks", "GpuClocks", "MemoryClock"]

_GPU = re.compile(r"(^|\.)(gpu|ga10b|gv11b|gp10b|gm20b|gb10b)$|^gpu-gpc-0$")
_KILO = 1000.0
_PER_MILLE = 1000
_LOADS = ("platform/gpu.0/load", "gpu.0/load", "platform/bus@0/17000000.gpu/load", "platform/17000000.gpu/load",
          "platform/17000000.ga10b/load", "17000000.ga10b/load")  # fmt: skip
# The first needs no root: Thor's kernel has it. The others do: debugfs.
_MEMORY = ("sys/class/devfreq/bwmgr/cur_freq", "sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/clk/emc/clk_rate")


class GpuClocks:
    """A Jetson's GPU.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        devices = [folder for folder in named(root / "sys/class/devfreq", "*") if _GPU.search(folder.name)]
        self._device = devices[0] if devices else None
        loads = [root / "sys/devices" / place for place in _LOADS]
        if self._device is not None:
            loads.insert(0, self._device / "device" / "load")
        self._load = next((path for path in loads if path.exists()), None)

    def hz(self) -> float | None:
        """Now; None where it stands still."""
        return self._frequency("cur_freq")

    def max_hz(self) -> float | None:
        """The highest that the power mode allows."""
        return self._frequency("max_freq")

    def load(self) -> float | None:
        """Share of the time that it was busy, 0 to 1."""
        value = number(self._load)
        return value / _PER_MILLE if value is not None and 0 <= value <= _PER_MILLE else None

    def locked(self) -> bool | None:
        """Whether it may not run slower than at its highest clock."""
        lowest, highest = self._frequency("min_freq"), self._frequency("max_freq")
        return None if lowest is None or highest is None else lowest >= highest

    def _frequency(self, name: str) -> float | None:
        value = None if self._device is None else number(self._device / name)
        return float(value) if value is not None and value > 0 else None


class CpuClocks:
    """The cores, in the order of their numbers; one that is off is left out.

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        self._cores = [core / "cpufreq" for core in named(root / "sys/devices/system/cpu", "cpu[0-9]*")]

    def hz(self) -> tuple[float, ...]:
        """Now."""
        return self._frequencies("scaling_cur_freq")

    def max_hz(self) -> tuple[float, ...]:
        """The highest that the power mode allows."""
        return self._frequencies("scaling_max_freq")

    def locked(self) -> bool | None:
        """Whether none may run slower than at its highest clock."""
        lowest, highest = self._frequencies("scaling_min_freq"), self.max_hz()
        if not highest or len(lowest) != len(highest):
            return None
        return all(low >= high for low, high in zip(lowest, highest, strict=True))

    def _frequencies(self, name: str) -> tuple[float, ...]:
        values = (number(core / name) for core in self._cores)
        return tuple(value * _KILO for value in values if value is not None and value > 0)


class MemoryClock:
    """The external memory controller (EMC).

    Args:
        root: of the file system.
    """

    def __init__(self, root: Path) -> None:
        self._path = next((root / place for place in _MEMORY if text(root / place) is not None), None)

    def hz(self) -> float | None:
        """Now; None without the right to read it, which on JetPack 5 and 6 only root has."""
        value = number(self._path)
        return float(value) if value is not None and value > 0 else None
