"""Run a bundle: frames in, answers out. `Bundle`, `Session`, `MemoryBank` and `LLM` are the API; torch is never needed.

>>> from keepsight.runtime import Bundle, Session                                        # doctest: +SKIP
>>> with Session(Bundle.open("tiny")) as session:                                        # doctest: +SKIP
...     for frame in session.source("clip.mp4"):
...         session.see(frame)
...     print(session.ask("what shape was first?").result.text)
circle
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepsight.runtime.answer import Answer
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.cameras import CameraWatcher
    from keepsight.runtime.feature_log import FeatureLog
    from keepsight.runtime.llm import LLM
    from keepsight.runtime.memory import MemoryBank
    from keepsight.runtime.saver import Saver
    from keepsight.runtime.session import Session
    from keepsight.runtime.snapshot import Snapshot

__all__ = ["LLM", "Answer", "Bundle", "CameraWatcher", "FeatureLog", "MemoryBank", "Saver", "Session", "Snapshot"]

# Loaded when first named, so that `keepsight --help` does not wait for onnxruntime and llama.cpp.
_HOMES = {
    "Answer": "answer", "Bundle": "bundle", "CameraWatcher": "cameras", "FeatureLog": "feature_log", "LLM": "llm",
    "MemoryBank": "memory", "Saver": "saver", "Session": "session", "Snapshot": "snapshot",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
