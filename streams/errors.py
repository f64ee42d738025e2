"""The exception tree of Keepsight: everything that can go wrong, with its exit code.

```
KeepsightError                                         1  internal
├── UsageError            (ValueError)                 2  usage
├── SourceNotFoundError   (FileNotFoundError)          3  source-not-found
├── SourceUnreadableError (ValueError)                 4  source-unreadable
├── NoFrameError          (TimeoutError)               5  no-frame
├── SourceLostError       (ConnectionError)            6  source-lost
├── MissingComponentError (ImportError)                7  missing-component
├── BundleError           (ValueError)                 8  bundle
│   └── MissingModelError (FileNotFoundError)          9  missing-model
├── EngineError           (RuntimeError)              10  engine
├── LLMError              (RuntimeError)              11  llm
├── DatasetError          (ValueError)                12  dataset
├── CheckpointError       (ValueError)                13  checkpoint
├── ParityError           (ArithmeticError)           14  parity
├── SnapshotError         (ValueError)                15  snapshot
├── RegressionError       (RuntimeError)              16  regression
└── UnhealthyError        (RuntimeError)              17  unhealthy
```

The built-in beside each name is its second base, so code that knows only Python can still catch it. The number is
`exit_code`, what the `keepsight` command returns; the word is `kind`, what `--json` prints. 130 is Ctrl-C.

It lives in `streams` because `runtime` and `export` may both import `streams`, and never the other way round.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BundleError",
    "CheckpointError",
    "DatasetError",
    "EngineError",
    "KeepsightError",
    "LLMError",
    "MissingComponentError",
    "MissingModelError",
    "NoFrameError",
    "ParityError",
    "RegressionError",
    "SnapshotError",
    "SourceLostError",
    "SourceNotFoundError",
    "SourceUnreadableError",
    "UnhealthyError",
    "UsageError",
]


class KeepsightError(Exception):
    """Anything Keepsight itself refuses or detects.

    Args:
        message: what happened, with the name, shape or value it happened to.
        fix: what to do about it, a full sentence. `str(error)` is the message followed by the fix.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "internal"

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        # One argument for every base: OSError and ImportError would read a second one as something of their own.
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The default would rebuild the error from `args` alone and lose the keyword-only fix on its way
        # through a process pool.
        return _rebuild, (type(self), self.message, self.fix)


def _rebuild(cls: type[KeepsightError], message: str, fix: str | None) -> KeepsightError:
    return cls(message, fix=fix)


class UsageError(KeepsightError, ValueError):
    """The request itself makes no sense: an unknown option, a bad URI, a size of zero."""

    exit_code: ClassVar[int] = 2
    kind: ClassVar[str] = "usage"


class SourceNotFoundError(KeepsightError, FileNotFoundError):
    """There is nothing at this address: a missing file, no such camera, a host or a path that can't be reached."""

    exit_code: ClassVar[int] = 3
    kind: ClassVar[str] = "source-not-found"


class SourceUnreadableError(KeepsightError, ValueError):
    """Something is there, but it is not a video we can decode: text, empty, truncated, audio only, no decoder."""

    exit_code: ClassVar[int] = 4
    kind: ClassVar[str] = "source-unreadable"


class NoFrameError(KeepsightError, TimeoutError):
    """The source opened, but its first frame did not come in time."""

    exit_code: ClassVar[int] = 5
    kind: ClassVar[str] = "no-frame"


class SourceLostError(KeepsightError, ConnectionError):
    """A live source that was delivering frames ended or stalled."""

    exit_code: ClassVar[int] = 6
    kind: ClassVar[str] = "source-lost"


class MissingComponentError(KeepsightError, ImportError):
    """Something that must be installed is not: GStreamer, one of its elements, a Python package."""

    exit_code: ClassVar[int] = 7
    kind: ClassVar[str] = "missing-component"


class BundleError(KeepsightError, ValueError):
    """A bundle is missing, corrupt, or of another version."""

    exit_code: ClassVar[int] = 8
    kind: ClassVar[str] = "bundle"


class MissingModelError(BundleError, FileNotFoundError):
    """A bundle refers to a model file, such as its language model, that is not on this machine."""

    exit_code: ClassVar[int] = 9
    kind: ClassVar[str] = "missing-model"


class EngineError(KeepsightError, RuntimeError):
    """A graph can't run as asked: another provider, a wrong shape or dtype, NaN or infinity in an output."""

    exit_code: ClassVar[int] = 10
    kind: ClassVar[str] = "engine"


class LLMError(KeepsightError, RuntimeError):
    """The language model's library refused: loading, decoding, a full context, a failed self-check."""

    exit_code: ClassVar[int] = 11
    kind: ClassVar[str] = "llm"


class DatasetError(KeepsightError, ValueError):
    """A data set for evaluation or training is missing or malformed."""

    exit_code: ClassVar[int] = 12
    kind: ClassVar[str] = "dataset"


class CheckpointError(KeepsightError, ValueError):
    """A checkpoint to export is missing, unsafe to read, or does not hold what its model needs."""

    exit_code: ClassVar[int] = 13
    kind: ClassVar[str] = "checkpoint"


class ParityError(KeepsightError, ArithmeticError):
    """A bundle does not compute what it was made from, or not what another machine computed."""

    exit_code: ClassVar[int] = 14
    kind: ClassVar[str] = "parity"


class SnapshotError(KeepsightError, ValueError):
    """A saved memory is damaged, of another bundle or of a newer version, or can't be written."""

    exit_code: ClassVar[int] = 15
    kind: ClassVar[str] = "snapshot"


class RegressionError(KeepsightError, RuntimeError):
    """A profile is slower or bigger than the one it was compared with."""

    exit_code: ClassVar[int] = 16
    kind: ClassVar[str] = "regression"


class UnhealthyError(KeepsightError, RuntimeError):
    """`keepsight doctor` found something that keeps this machine from working."""

    exit_code: ClassVar[int] = 17
    kind: ClassVar[str] = "unhealthy"
