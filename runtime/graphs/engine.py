"""Engines run one graph: named arrays in, named arrays out, and an error rather than a silent fallback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepsight.runtime.graphs.device import DeviceTensor
from keepsight.streams.errors import EngineError, MissingComponentError

__all__ = ["Engine", "OnnxRuntimeEngine", "Tensor", "TensorSpec", "check_feeds", "check_finite"]

Array = npt.NDArray[Any]
Tensor = Array | DeviceTensor
"""What goes into an engine: an array, or one that another engine on the same device has kept there."""

_NUMPY_OF_ONNX = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

# They take a Clip or Relu out where the quantisation after it cuts anyway, and fail on an FP8 one (onnxruntime 1.32).
_NOT_FOR_FP8 = ("ClipQuantRewrite", "ReluQuantRewrite")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of a graph's input or output. A size of None is free: a batch, a text bucket."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} [{sizes}]"

    def fits(self, array: Tensor) -> bool:
        """Whether an array has this dtype, rank, and every fixed size."""
        return (
            array.dtype == self.dtype
            and array.ndim == len(self.shape)
            and all(want in (None, got) for want, got in zip(self.shape, array.shape, strict=True))
        )


class Engine(Protocol):
    """One graph, ready to run. Two backends are two classes behind this protocol."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """Run the graph once on exactly its inputs; every output by name.

        Raises:
            EngineError: a missing or unknown input, a wrong dtype or shape, a failed run, nan or inf in an output.
        """
        ...

    def enqueue(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As `run`, but outputs stay where they were computed, for the next graph. They last until this engine's next run.

        np.asarray brings one to the host. What is not finite is not noticed here.
        """
        ...

    def place(self, name: str, value: Array) -> Tensor:
        """Bring an input to where this engine reads it, once for many runs: feed what is returned. It lasts until another
        value is placed or fed under that name.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Running it afterwards is an error; closing it twice is not."""
        ...


class OnnxRuntimeEngine:
    """An ONNX graph on ONNX Runtime.

    ONNX Runtime goes on with another provider when the one that was asked for can't be had, at most with a warning,
    both when a session is made and when a run fails. This class refuses both.
    """

    def __init__(
        self, path: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 1
    ) -> None:
        """Load a graph.

        Args:
            path: an .onnx file.
            providers: execution providers by falling priority; the first is the one that must be used.
            threads: threads inside one operator, on the CPU.

        Raises:
            EngineError: no such file, a file that is no ONNX graph, or a provider that this machine does not have.
            MissingComponentError: onnxruntime is not installed.
        """
        self.path = Path(path)
        self.providers = tuple(providers)
        self._session: Any = _load(self.path, self.providers, threads)
        self.inputs: Mapping[str, TensorSpec] = _specs(self.path, self._session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = _specs(self.path, self._session.get_outputs())

    def __repr__(self) -> str:
        return f"OnnxRuntimeEngine({str(self.path)!r}, providers={self.providers})"

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See :meth:`Engine.run`."""
        if self._session is None:
            raise EngineError(f"{self.path.name} is closed.", fix="Load it again.")
        check_feeds(self.path.name, self.inputs, feeds)
        names = list(self.outputs)
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:  # ONNX Runtime's own errors share no base but this
            raise EngineError(f"{self.path.name} failed: {error}") from error
        results = dict(zip(names, values, strict=True))
        check_finite(self.path.name, results)
        return results

    def enqueue(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See :meth:`Engine.enqueue`; the outputs are arrays on the host."""
        return self.run(feeds)

    def place(self, name: str, value: Array) -> Array:
        """See :meth:`Engine.place`; arrays are read where they are."""
        return value

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._session = None


def check_feeds(
    name: str, inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Tensor], *, kinds: tuple[type, ...] = (np.ndarray,)
) -> None:
    """Refuse feeds that are not exactly a graph's inputs; `name` is the graph's, for the message.

    Args:
        kinds: of array that the engine can read.

    Raises:
        EngineError: a missing or unknown input, a wrong dtype or shape.
    """
    if feeds.keys() != inputs.keys():
        missing, unknown = sorted(inputs.keys() - feeds.keys()), sorted(feeds.keys() - inputs.keys())
        raise EngineError(
            f"{name} got other inputs than it has: missing {missing}, unknown {unknown}.",
            fix=f"Its inputs are {', '.join(inputs)}.",
        )
    for key, spec in inputs.items():
        array = feeds[key]
        if not isinstance(array, kinds) or not spec.fits(array):
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, kinds) else type(array).__name__
            raise EngineError(f"input {key!r} of {name} must be {spec}, got {got}.")


def check_finite(name: str, results: Mapping[str, Array]) -> None:
    """Refuse outputs with nan or inf; `name` is the graph's, for the message.

    Raises:
        EngineError: an output that is not finite.
    """
    for key, value in results.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = np.count_nonzero(~np.isfinite(value))
            raise EngineError(
                f"output {key!r} of {name} has {bad} of {value.size} values that are nan or inf.",
                fix="Look for such values in the inputs; if there are none, the graph overflows at this precision.",
            )


def _load(path: Path, providers: tuple[str, ...], threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingComponentError(
            f"onnxruntime cannot be loaded ({error}).", fix="Install it with `pip install onnxruntime`."
        ) from error
    if not path.is_file():
        raise EngineError(f"there is no graph at {path}.")
    available = onnxruntime.get_available_providers()
    missing = [provider for provider in providers if provider not in available]
    if missing or not providers:
        raise EngineError(
            f"this onnxruntime has no {', '.join(missing) or 'unnamed provider'}; it has {', '.join(available)}.",
            fix="Ask for one of those, or install the onnxruntime build for your accelerator.",
        )
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            sess_options=_options(onnxruntime, threads),
            providers=list(providers),
            disabled_optimizers=list(_NOT_FOR_FP8),
        )
    except Exception as error:  # ONNX Runtime's own errors share no base but this
        raise EngineError(f"{path} can't be loaded: {error}", fix="Export the bundle again.") from error
    session.disable_fallback()  # or a run that fails on one provider is repeated on another
    used = session.get_providers()
    if used[0] != providers[0]:
        raise EngineError(
            f"{path.name} was asked to run on {providers[0]} and onnxruntime took {used[0]} instead.",
            fix="Its log above says why; often a CUDA or cuDNN library of another version.",
        )
    return session


def _options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Idle threads would otherwise spin, and take the cores from the decoder and the language model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: everything else that matters is checked here
    return options


def _specs(path: Path, nodes: Sequence[Any]) -> dict[str, TensorSpec]:
    specs = {}
    for node in nodes:
        if node.type not in _NUMPY_OF_ONNX:
            raise EngineError(f"{node.name!r} of {path.name} is a {node.type}, which Keepsight does not handle.")
        shape = tuple(size if isinstance(size, int) else None for size in node.shape)
        specs[node.name] = TensorSpec(node.name, shape, np.dtype(_NUMPY_OF_ONNX[node.type]))
    return specs
