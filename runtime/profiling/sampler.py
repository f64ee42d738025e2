"""A thread that reads the sensors and this process's memory a few times a second while a profile runs."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Protocol

from keepsight.runtime.profiling.report import Moment
from keepsight.runtime.sensors.reading import PowerMode, Reading

__all__ = ["Sampler", "SensorReader", "moment_of", "resident_quickly"]


class SensorReader(Protocol):
    """What a profile needs of `keepsight.runtime.sensors.Sensors`."""

    def read(self) -> Reading: ...

    def power_mode(self) -> PowerMode | None: ...

    def clocks_locked(self) -> bool | None: ...


class Sampler:
    """Reads every so often from `start` to `stop`; `moments` has what it read, `t` in seconds since the start; `available`, the
    bytes of memory that the whole system had left each time.

    Args:
        hz: readings a second.
        resident: bytes of this process that are in memory.
    """

    def __init__(self, sensors: SensorReader, *, hz: float = 2.0, resident: Callable[[], int] | None = None) -> None:
        self._sensors, self._every_s, self._resident = sensors, 1 / hz, resident or resident_quickly
        self.moments: list[Moment] = []
        self.available: list[int] = []
        self.began = perf_counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keepsight-sensors", daemon=True)

    def __enter__(self) -> Sampler:
        self.began = perf_counter()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def at(self, moment: float) -> float:
        """Seconds since the start, of a moment of `time.perf_counter()`."""
        return moment - self.began

    def _run(self) -> None:
        due = self.began
        while True:
            self._read()
            due = max(due + self._every_s, perf_counter())  # readings that are late are not made up for
            if self._stopped.wait(due - perf_counter()):
                break
        self._read()

    def _read(self) -> None:
        reading = self._sensors.read()
        self.moments.append(moment_of(reading, self.at(perf_counter()), self._resident()))
        if reading.memory_available is not None:
            self.available.append(reading.memory_available)


def moment_of(reading: Reading, t: float, resident: int) -> Moment:
    """A reading as a report has it; the processor's clock is the mean of its cores'."""
    return Moment(
        t=t,
        resident=resident,
        watts=reading.watts,
        rails={power.rail: power.watts for power in reading.powers},
        celsius={temperature.zone: temperature.celsius for temperature in reading.temperatures},
        gpu_hz=reading.gpu_hz,
        gpu_load=reading.gpu_load,
        cpu_hz=sum(reading.cpu_hz) / len(reading.cpu_hz) if reading.cpu_hz else None,
        throttled=reading.throttled,
    )


def resident_quickly() -> int:
    """Bytes of this process that are in memory, as the kernel counts along: exact to some pages a thread.

    `smaps_rollup` walks all page tables, which a process of gigabytes would notice.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0

