"""TensorRT's Python module: where it comes from, and the one logger that it gets."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from keepsight.streams.errors import MissingComponentError

__all__ = ["TensorRTLog", "import_tensorrt", "import_tensorrt_rtx", "is_rtx", "log_of", "title_of"]

_log = logging.getLogger("keepsight.tensorrt")
_REPEATED = 3  # messages that an error repeats
_logs: dict[str, TensorRTLog] = {}


def import_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        MissingComponentError: it is not installed, or its libraries can't be loaded.
    """
    return _import(
        "tensorrt",
        "On a Jetson it comes with JetPack: `sudo apt install python3-libnvinfer`, and the environment must see the system's "
        "packages (`/usr/bin/python3 -m venv --system-site-packages .venv`).",
    )


def import_tensorrt_rtx() -> Any:
    """The module `tensorrt_rtx`, which parses and builds on a machine without a GPU.

    Raises:
        MissingComponentError: it is not installed, or its libraries can't be loaded.
    """
    return _import("tensorrt_rtx", 'Install it, on x86-64, with `pip install "keepsight[trt-rtx]"`.')


def is_rtx(trt: Any) -> bool:
    """Whether this is TensorRT-RTX: the one that builds for a GPU it is told, and has no timing cache."""
    return hasattr(trt, "ComputeCapability")


def title_of(trt: Any) -> str:
    """Name and version for messages: "TensorRT 10.3.0", "TensorRT-RTX 1.7.1.116"."""
    return f"TensorRT{'-RTX' if is_rtx(trt) else ''} {trt.__version__}"


class TensorRTLog:
    """What TensorRT says: kept, so that an error can repeat it, and passed on to `logging` as "keepsight.tensorrt".

    Attributes:
        ilogger: the `trt.ILogger` that TensorRT's classes take.
    """

    def __init__(self, trt: Any) -> None:
        self._errors: list[str] = []
        self._warnings: list[str] = []
        self.ilogger = _ilogger(trt, self)

    def keep(self, severity: int, message: str) -> None:
        """Take one message; severities are those of `trt.ILogger.Severity`, 0 = internal error to 4 = verbose."""
        if severity <= 2:
            kept = self._warnings if severity == 2 else self._errors
            if len(kept) < _REPEATED and message not in kept:
                kept.append(message)
        _log.log(logging.INFO if severity <= 2 else logging.DEBUG, "%s", message)

    def clear(self) -> None:
        """Forget what was said, before the next operation."""
        self._errors.clear()
        self._warnings.clear()

    def complaints(self) -> str:
        """The first errors since `clear`: later ones mostly follow from them. Without any, the first warnings."""
        said = [" ".join(text.split()) for text in self._errors or self._warnings]
        return " | ".join(said) or "it did not say why"


def log_of(trt: Any) -> TensorRTLog:
    """The log of this process for a TensorRT module. One: TensorRT ignores every later logger that it is given."""
    if trt.__name__ not in _logs:
        _logs[trt.__name__] = TensorRTLog(trt)
    return _logs[trt.__name__]


def _ilogger(trt: Any, log: TensorRTLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base's own

        def log(self, severity: Any, message: str) -> None:
            log.keep(int(severity), message)

    return Logger()


def _import(name: str, fix: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingComponentError(f"{name} can't be loaded ({error}).", fix=fix) from error
