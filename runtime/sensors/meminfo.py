"""Memory and swap, from /proc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keepsight.runtime.sensors.sysfs import text

__all__ = ["Swap", "meminfo", "swaps"]

_KIB = 1024


@dataclass(frozen=True)
class Swap:
    """One place to swap to. `compressed`: zram, which lies in memory itself."""

    device: str
    bytes: int
    used: int

    @property
    def compressed(self) -> bool:
        return "zram" in self.device


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes, by its names: MemTotal, MemAvailable, SwapTotal, CmaTotal. Empty if it can't be read."""
    found = {}
    for line in (text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isascii() and words[0].isdigit():
            found[name] = int(words[0]) * _KIB
    return found


def swaps(root: Path = Path("/")) -> tuple[Swap, ...]:
    """What is swapped to."""
    found = []
    for line in (text(root / "proc/swaps") or "").splitlines()[1:]:
        words = line.split()
        if len(words) >= 4 and words[2].isdigit() and words[3].isdigit():
            found.append(Swap(words[0], int(words[2]) * _KIB, int(words[3]) * _KIB))
    return tuple(found)
