"""One thing that `keepsight doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AREAS", "SEVERITIES", "Area", "Finding", "Severity"]

Area = Literal["board", "memory", "power", "GPU", "language model", "graphs", "video", "storage", "bundle", "Keepsight"]
AREAS: tuple[Area, ...] = (
    "board", "memory", "power", "GPU", "language model", "graphs", "video", "storage", "bundle", "Keepsight",
)  # fmt: skip

Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "error")
"""From nothing to do, over what is worth knowing and what costs speed or will fail, to what keeps it from working."""


@dataclass(frozen=True)
class Finding:
    """A finding.

    Attributes:
        id: its name, for programs: `swap`, `llama-gpu`. One examination may have several of a name (one for each camera).
        area: what it is about.
        severity: how bad it is.
        found: what was found, a sentence without its full stop.
        why: why it matters, and what to do where no command does it; empty for what is well.
        command: mends it, exactly so; None where nothing has to be done, or no command can.
    """

    id: str
    area: Area
    severity: Severity
    found: str
    why: str = ""
    command: str | None = None
