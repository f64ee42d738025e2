"""Which versions of other packages are installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

__all__ = ["installed"]


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Versions by name, without those that are not installed; nothing is imported."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
