"""One look at the sensors, and what they mean. What a machine does not have is None or empty, never zero."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Power", "PowerMode", "Reading", "Temperature"]


@dataclass(frozen=True)
class Temperature:
    """A thermal zone.

    Attributes:
        zone: the kernel's name of it: `cpu-thermal`, `gpu-thermal`, `tj-thermal`.
        celsius: now.
        throttles_at: where the kernel begins to slow the machine down (its lowest passive trip), Celsius; None = not stated.
    """

    zone: str
    celsius: float
    throttles_at: float | None = None


@dataclass(frozen=True)
class Power:
    """A rail of an INA3221, or another meter.

    Attributes:
        rail: its label: `VDD_IN`, `VDD_CPU_GPU_CV`, `VIN_SYS_5V0`.
        watts: now.
        whole_board: whether this is what goes into the module or board, the other rails being part of it.
    """

    rail: str
    watts: float
    whole_board: bool = False


@dataclass(frozen=True)
class PowerMode:
    """What `nvpmodel` is set to. Numbers differ between boards (0 is 15 W on an Orin Nano Super): compare names."""

    name: str
    number: int | None


@dataclass(frozen=True)
class Reading:
    """All sensors at one moment.

    Attributes:
        time_s: `time.monotonic()`.
        temperatures, powers: by their places; a zone that is switched off is left out.
        gpu_hz, gpu_max_hz, cpu_hz, cpu_max_hz, emc_hz: clocks, and the highest that the power mode allows; CPU ones by core.
        gpu_load: share of the time that the GPU was busy, 0 to 1.
        memory_total, memory_available, swap_total, swap_free: bytes, of CPU and GPU together on a Jetson.
        throttled: why the machine is slowed down right now, in words of the kernel (`cpu-throttle-alert`); empty = it is not.
    """

    time_s: float
    temperatures: tuple[Temperature, ...] = ()
    powers: tuple[Power, ...] = ()
    gpu_hz: float | None = None
    gpu_max_hz: float | None = None
    gpu_load: float | None = None
    cpu_hz: tuple[float, ...] = ()
    cpu_max_hz: tuple[float, ...] = ()
    emc_hz: float | None = None
    memory_total: int | None = None
    memory_available: int | None = None
    swap_total: int | None = None
    swap_free: int | None = None
    throttled: tuple[str, ...] = ()

    @property
    def watts(self) -> float | None:
        """What the whole board takes; None without a meter of that."""
        whole = [power.watts for power in self.powers if power.whole_board]
        return sum(whole) if whole else None
