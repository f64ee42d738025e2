"""All sensors of a machine, read at once."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from keepsight.runtime.sensors.clocks import CpuClocks, GpuClocks, MemoryClock
from keepsight.runtime.sensors.meminfo import meminfo
from keepsight.runtime.sensors.modes import power_mode
from keepsight.runtime.sensors.power import Meters
from keepsight.runtime.sensors.reading import PowerMode, Reading
from keepsight.runtime.sensors.thermal import Alerts, Thermometers

__all__ = ["Sensors"]


class Sensors:
    """What the machine says about itself. Where its sensors are is looked for once, here; a reading only reads.

    Nothing needs root but the clock of the memory on JetPack 5 and 6, and the energy counters of an x86 processor: without, they
    are left out. Over-current events and energy counters are told from one reading to the next: one reader has one object.

    Args:
        root: of the file system; another one for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._thermometers, self._alerts = Thermometers(root), Alerts(root)
        self._meters = Meters(root)
        self._gpu, self._cpu, self._memory = GpuClocks(root), CpuClocks(root), MemoryClock(root)

    def read(self) -> Reading:
        """Every sensor, now. Never raises: a sensor that does not answer is None, or left out."""
        memory = meminfo(self._root)
        return Reading(
            time_s=monotonic(),
            temperatures=self._thermometers.read(),
            powers=self._meters.read(),
            gpu_hz=self._gpu.hz(),
            gpu_max_hz=self._gpu.max_hz(),
            gpu_load=self._gpu.load(),
            cpu_hz=self._cpu.hz(),
            cpu_max_hz=self._cpu.max_hz(),
            emc_hz=self._memory.hz(),
            memory_total=memory.get("MemTotal"),
            memory_available=memory.get("MemAvailable"),
            swap_total=memory.get("SwapTotal"),
            swap_free=memory.get("SwapFree"),
            throttled=self._alerts.read(),
        )

    def power_mode(self) -> PowerMode | None:
        """What `nvpmodel` is set to; None on a machine that is no Jetson."""
        return power_mode(self._root)

    def clocks_locked(self) -> bool | None:
        """Whether GPU and CPU are held at the highest clock of the power mode, as `jetson_clocks` does; None = not known."""
        known = [locked for locked in (self._gpu.locked(), self._cpu.locked()) if locked is not None]
        return all(known) if known else None
