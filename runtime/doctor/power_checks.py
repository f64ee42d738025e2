"""Power mode, clocks, throttling and the power meter."""

from __future__ import annotations

from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.sensors import Sensors
from keepsight.runtime.sensors.modes import modes

__all__ = ["clocks", "meters", "mode", "throttling"]

_FASTEST = ("MAXN_SUPER", "MAXN")


def mode(machine: Machine) -> Iterator[Finding]:
    """The power mode, by name: its number means another mode on another board."""
    if not machine.is_jetson:
        return
    now, known = Sensors(machine.root).power_mode(), modes(machine.root)
    if now is None:
        yield Finding(
            "power-mode",
            "power",
            "note",
            "the power mode is not known",
            "No figure means anything without it. `sudo nvpmodel -m` with the number of a mode sets one; start a container with "
            "-v /var/lib/nvpmodel:/var/lib/nvpmodel:ro -v /etc/nvpmodel.conf:/etc/nvpmodel.conf:ro. Which modes there are:",
            "grep 'POWER_MODEL ID' /etc/nvpmodel.conf",
        )
        return
    number = "" if now.number is None else f" (number {now.number} on this board)"
    fastest = next((key for name in _FASTEST for key, said in known.items() if said == name), None)
    if now.name in _FASTEST or fastest is None:
        yield Finding("power-mode", "power", "ok", f"power mode {now.name}{number}")
        return
    yield Finding(
        "power-mode",
        "power",
        "note",
        f"power mode {now.name}{number}",
        f"{known[fastest]} is faster, takes more power and makes more heat. Some changes of mode ask for a restart.",
        f"sudo nvpmodel -m {fastest}",
    )


def clocks(machine: Machine) -> Iterator[Finding]:
    """Whether clocks are held, as a measurement wants them."""
    locked = Sensors(machine.root).clocks_locked()
    if not machine.is_jetson or locked is None:
        return
    if locked:
        yield Finding("clocks", "power", "ok", "GPU and CPU are held at the mode's highest clocks")
        return
    yield Finding(
        "clocks",
        "power",
        "note",
        "clocks follow the load",
        "Right for use. A measurement wants them held: the first frames after a pause are slow otherwise.",
        "sudo jetson_clocks",
    )


def throttling(machine: Machine) -> Iterator[Finding]:
    """Whether the kernel slows the machine down just now."""
    reading = Sensors(machine.root).read()
    hottest = max(reading.temperatures, key=lambda zone: zone.celsius, default=None)
    where = "" if hottest is None else f"; the hottest zone, {hottest.zone}, has {hottest.celsius:.0f} C"
    if reading.throttled:
        yield Finding(
            "throttling",
            "power",
            "warning",
            f"throttled: {', '.join(reading.throttled)}{where}",
            "The kernel slows the machine down. Cool it, or choose a power mode that it can bear; which there are:",
            "grep 'POWER_MODEL ID' /etc/nvpmodel.conf" if machine.is_jetson else None,
        )
    elif hottest is not None:
        yield Finding("throttling", "power", "ok", f"not throttled{where}")


def meters(machine: Machine) -> Iterator[Finding]:
    """Whether power can be read."""
    if not machine.is_jetson:
        return
    reading = Sensors(machine.root).read()
    if reading.watts is not None:
        rails = ", ".join(power.rail for power in reading.powers if power.whole_board)
        yield Finding("power-meter", "power", "ok", f"{reading.watts:.1f} W now ({rails})")
        return
    yield Finding(
        "power-meter",
        "power",
        "note",
        "the board's power can't be read",
        "Profiles will have no energy. The module's meter is under /sys/class/hwmon; start a container with -v /sys:/sys:ro.",
    )
