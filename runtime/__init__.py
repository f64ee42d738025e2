"""Run a bundle: frames in, answers out. `Bundle`, `Session`, `MemoryBank` and `LLM` are the API; torch is never needed.

>>> from keepsight.runtime import Bundle, Session                                        # doctest: +SKIP
>>> with Session(Bundle.open("tiny")) as session:                                        # doctest: +SKIP
...     for frame in session.source("clip.mp4"):
...         session.see(frame)
...     print(session.ask("what shape was first?").result.text)
circle

Here are the bundle, the memory, its times, the Q-Former and the session that joins them. Around them:

- `graphs`: what runs a graph, ONNX Runtime or TensorRT, and its devices; `language`: the language model on llama.cpp;
- `live`: cameras that are watched; `governor`: doing less when the machine can't do all; `storage`: what outlives the process;
- `evaluation`: scores and traces; `profiling`, `planning`, `doctor`, `sensors`: what a machine does, will do, lacks and says.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepsight.runtime.answer import Answer
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.language.llm import LLM
    from keepsight.runtime.live.cameras import CameraWatcher
    from keepsight.runtime.memory import MemoryBank
    from keepsight.runtime.session import Session
    from keepsight.runtime.storage.feature_log import FeatureLog
    from keepsight.runtime.storage.saver import Saver
    from keepsight.runtime.storage.snapshot import Snapshot

__all__ = ["LLM", "Answer", "Bundle", "CameraWatcher", "FeatureLog", "MemoryBank", "Saver", "Session", "Snapshot"]

# Loaded when first named, so that `keepsight --help` does not wait for onnxruntime and llama.cpp.
_HOMES = {
    "Answer": "answer", "Bundle": "bundle", "CameraWatcher": "live.cameras", "FeatureLog": "storage.feature_log",
    "LLM": "language.llm", "MemoryBank": "memory", "Saver": "storage.saver", "Session": "session", "Snapshot": "storage.snapshot",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
