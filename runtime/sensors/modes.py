"""The power mode of a Jetson, by name: what `nvpmodel` wrote down, or says when asked. Neither needs root.

`/var/lib/nvpmodel/status` is `pmode:0002 fmode:quiet`; `/etc/nvpmodel.conf` has a line `< POWER_MODEL ID=2 NAME=MAXN_SUPER >`
for each mode. `nvpmodel -q` prints `NV Power Mode: MAXN_SUPER` and, on a line of its own, the number.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from keepsight.runtime.sensors.reading import PowerMode
from keepsight.runtime.sensors.sysfs import text

__all__ = ["modes", "parse_query", "power_mode"]

_MODE = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", re.MULTILINE)
_STATUS = re.compile(r"pmode:\s*(\d+)")
_NAME = re.compile(r"^\s*NV Power Mode\s*:\s*(\S+)", re.MULTILINE)
_NUMBER = re.compile(r"^\s*(\d+)\s*$", re.MULTILINE)
_PATIENCE_S = 5.0


def modes(root: Path = Path("/")) -> dict[int, str]:
    """The modes that this board has: number to name."""
    try:
        content = (root / "etc/nvpmodel.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {int(number): name for number, name in _MODE.findall(content)}


def power_mode(root: Path = Path("/")) -> PowerMode | None:
    """The mode that is set; None on a machine without modes. One that the board's list does not name is called by its number."""
    status = _STATUS.search(text(root / "var/lib/nvpmodel/status") or "")
    if status is not None:
        number = int(status[1])
        return PowerMode(modes(root).get(number, f"mode {number}"), number)
    program = root / "usr/sbin/nvpmodel"
    # Before the first `nvpmodel -m` there is no status. Another root's program is not for this machine.
    return _asked(program) if root == Path("/") and program.exists() else None


def parse_query(said: str) -> PowerMode | None:
    """What `nvpmodel -q` printed."""
    name, number = _NAME.search(said), _NUMBER.search(said)
    return None if name is None else PowerMode(name[1], None if number is None else int(number[1]))


def _asked(program: Path) -> PowerMode | None:
    try:
        done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return parse_query(done.stdout)
