"""A graph on TensorRT: an engine that `keepsight build` made, run on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.cuda import DeviceStream
from keepsight.runtime.engine import TensorSpec, check_feeds, check_finite
from keepsight.runtime.tensorrt_module import log_of, title_of
from keepsight.streams.errors import EngineError

__all__ = ["TensorRTEngine"]

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]

_NUMPY_OF_TENSORRT = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class TensorRTEngine:
    """An engine file, loaded. See :class:`~keepsight.runtime.engine.Engine`.

    Shapes are those of the engine's profiles, one per text bucket. Buffers are made once, for the largest; a run with
    another bucket than the last one switches the profile, and allocates nothing.
    """

    def __init__(self, path: str | Path, trt: Any, stream: DeviceStream) -> None:
        """Load an engine.

        Args:
            path: from `find_engine`, which has checked that the engine is for this machine.
            trt: the module `tensorrt`.
            stream: what the engine runs on. Several engines may share it; none of them closes it.

        Raises:
            EngineError: no such file, an engine that this TensorRT refuses, or too little memory.
        """
        self.path, self._stream = Path(path), stream
        self._title, self._log = title_of(trt), log_of(trt)
        stream.enter()
        self._runtime, engine = self._load(trt)
        context = engine.create_execution_context()
        if context is None:
            raise self._refusal("has no memory for the activations of")
        self._engine, self._context = engine, context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        specs = {name: self._spec(trt, name) for name in names}
        self.inputs: Mapping[str, TensorSpec] = {n: specs[n] for n in names if modes[n] == trt.TensorIOMode.INPUT}
        self.outputs: Mapping[str, TensorSpec] = {n: specs[n] for n in names if modes[n] == trt.TensorIOMode.OUTPUT}
        self._profiles = [self._profile(index) for index in range(engine.num_optimization_profiles)]
        self._current: int | None = None
        self._addresses: dict[str, int] = {}
        self._allocate()

    def __repr__(self) -> str:
        return f"TensorRTEngine({str(self.path)!r})"

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`Engine.run`. Further errors: shapes that no profile has."""
        if self._context is None:
            raise EngineError(f"{self.path.name} is closed.", fix="Load it again.")
        check_feeds(self.path.name, self.inputs, feeds)
        stream = self._stream
        stream.enter()
        self._use(self._profile_for(feeds))
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}  # alive until the stream is through
        for name, array in arrays.items():
            stream.copy_in(self._addresses[name], array)
        self._log.clear()
        if not self._context.execute_async_v3(stream.handle):
            raise self._refusal("can't run")
        results = {name: np.empty(self._shape(name), spec.dtype) for name, spec in self.outputs.items()}
        for name, array in results.items():
            stream.copy_out(array, self._addresses[name])
        stream.synchronize()
        check_finite(self.path.name, results)
        return results

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        if self._context is None:
            return
        self._stream.enter()
        for address in self._addresses.values():
            self._stream.free(address)
        self._addresses.clear()
        # In this order: each is made from the next.
        self._context = None
        self._engine = None
        self._runtime = None

    def _load(self, trt: Any) -> tuple[Any, Any]:
        if not self.path.is_file():
            raise EngineError(f"there is no engine at {self.path}.", fix="Build it with `keepsight build`.")
        self._log.clear()
        try:
            runtime = trt.Runtime(self._log.ilogger)
        except TypeError as error:  # how the bindings say that the factory gave nothing
            raise self._refusal("can't start for") from error
        engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            raise self._refusal("refuses")
        return runtime, engine

    def _spec(self, trt: Any, name: str) -> TensorSpec:
        engine = self._engine
        kinds = {getattr(trt.DataType, kind): np.dtype(dtype) for kind, dtype in _NUMPY_OF_TENSORRT.items()}
        kind = engine.get_tensor_dtype(name)
        if kind not in kinds:
            raise EngineError(f"{name!r} of {self.path.name} is a {kind}, which Keepsight does not handle.")
        shape = tuple(None if size == -1 else int(size) for size in engine.get_tensor_shape(name))
        return TensorSpec(name, shape, kinds[kind])

    def _profile(self, index: int) -> Shapes:
        """The shape of each input with a free axis; `keepsight build` makes minimum, optimum and maximum the same."""
        engine = self._engine
        free = [name for name, spec in self.inputs.items() if None in spec.shape]
        return {name: tuple(engine.get_tensor_profile_shape(name, index)[2]) for name in free}

    def _profile_for(self, feeds: Mapping[str, Array]) -> int:
        shapes = {name: feeds[name].shape for name in self._profiles[0]}
        if shapes in self._profiles:
            return self._profiles.index(shapes)
        raise EngineError(
            f"{self.path.name} was not built for {shapes}; its profiles are {self._profiles}.",
            fix="Use one of the bundle's text buckets, and a batch of one frame.",
        )

    def _use(self, index: int) -> None:
        """Switch to a profile, unless it is the current one."""
        if index == self._current:
            return
        self._current = None  # half switched is not switched
        context, stream = self._context, self._stream
        self._log.clear()
        if not context.set_optimization_profile_async(index, stream.handle):
            raise self._refusal(f"refuses profile {index} of")
        stream.synchronize()
        for name, shape in self._profiles[index].items():
            if not context.set_input_shape(name, shape):
                raise self._refusal(f"refuses the shape {list(shape)} of {name!r} of")
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"refuses the address of {name!r} of")
        self._current = index

    def _allocate(self) -> None:
        """A buffer for every input and output, as large as its largest profile."""
        sizes = dict.fromkeys([*self.inputs, *self.outputs], 0)
        for index in range(len(self._profiles)):
            self._use(index)
            for name in sizes:
                spec = self.inputs.get(name) or self.outputs[name]
                sizes[name] = max(sizes[name], int(np.prod(self._shape(name), dtype=np.int64)) * spec.dtype.itemsize)
        self._addresses = {name: self._stream.allocate(size) for name, size in sizes.items()}
        self._current = None  # so that the first run binds them

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of an input or output under the current profile."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the shape {list(shape)} of {name!r} of {self.path.name} depends on more than its inputs' shapes.")
        return shape

    def _refusal(self, verb: str) -> EngineError:
        return EngineError(
            f"{self._title} {verb} {self.path.name}: {self._log.complaints()}.",
            fix="Close what else uses the GPU's memory, or build the engine again on this machine with `keepsight build`.",
        )
