"""A graph on TensorRT: an engine that `keepsight build` made, run on the GPU of this machine."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.graphs.cuda import DeviceGraph, DeviceStream
from keepsight.runtime.graphs.device import DeviceBuffer, DeviceTensor
from keepsight.runtime.graphs.engine import Tensor, TensorSpec, check_feeds, check_finite
from keepsight.runtime.graphs.tensorrt_module import TensorRTLog, log_of, title_of
from keepsight.streams.errors import EngineError

__all__ = ["Plan", "TensorRTEngine", "load_plan"]

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]

_ALIGNMENT = 256  # of every address that TensorRT is given (IExecutionContext.set_tensor_address)

_TURNS = 2  # places that an input comes from in turn, each with a CUDA graph: a bank's two halves

_NUMPY_OF_TENSORRT = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True, eq=False)
class Plan:
    """An engine file, deserialised: its weights are on the device.

    Attributes:
        scratch_bytes: what its activations take while it runs. Engines that run one after another can share this.
    """

    path: Path
    trt: Any
    runtime: Any
    engine: Any

    @property
    def scratch_bytes(self) -> int:
        engine = self.engine
        return int(engine.device_memory_size_v2)


def load_plan(path: str | Path, trt: Any) -> Plan:
    """Read an engine file; the device's context must be the thread's (`with stream:`).

    Args:
        path: from `find_engine`, which has checked that the engine is for this machine.
        trt: the module `tensorrt`.

    Raises:
        EngineError: no such file, or an engine that this TensorRT refuses.
    """
    path, log = Path(path), log_of(trt)
    if not path.is_file():
        raise EngineError(f"there is no engine at {path}.", fix="Build it with `keepsight build`.")
    log.clear()
    try:
        runtime = trt.Runtime(log.ilogger)
    except TypeError as error:  # how the bindings say that the factory gave nothing
        raise _refusal(trt, path, "can't start for") from error
    # Mapped, not read: an encoder's engine is gigabytes, and the device gets its own copy of them.
    with path.open("rb") as file:
        engine = runtime.deserialize_cuda_engine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if engine is None:
        raise _refusal(trt, path, "refuses")
    return Plan(path, trt, runtime, engine)


@dataclass(eq=False)
class _Bucket:
    """One optimisation profile with an execution context of its own, whose shapes never change: a CUDA graph holds addresses
    and scratch memory as they were when it was captured.

    Attributes:
        shapes: of every input and output.
        bound: address by name, as the context has them.
        graphs: by the addresses that they were captured at, the latest used last; None = has run there once, without a graph.
            TensorRT may do work in that first run that no graph should repeat.
    """

    context: Any
    shapes: Shapes
    bound: dict[str, int] = field(default_factory=dict)
    graphs: dict[tuple[int, ...], DeviceGraph | None] = field(default_factory=dict)

    def forget_graphs(self, but: int = 0) -> None:
        """Close all but so many, the latest used."""
        while len(self.graphs) > but:
            graph = self.graphs.pop(next(iter(self.graphs)))
            if graph is not None:
                graph.close()


class TensorRTEngine:
    """An engine, ready to run. See :class:`~keepsight.runtime.graphs.engine.Engine`.

    Shapes are those of the engine's profiles, one per text bucket. Each has a context of its own, bound once to buffers that
    are made once, for the largest; a run allocates nothing. From a bucket's second run on, its kernels are launched as one CUDA
    graph, until an input comes from elsewhere. Two places that take turns (a bank's two halves) have a graph each.

    Attributes:
        clock: is entered before a run's kernels are enqueued and left behind them; a profile's, if there is one.
    """

    def __init__(
        self,
        plan: Plan,
        stream: DeviceStream,
        *,
        scratch: int | None = None,
        cuda_graphs: bool = True,
        buffers: Mapping[str, DeviceBuffer] | None = None,
    ) -> None:
        """Prepare an engine to run.

        Args:
            plan: from :func:`load_plan`.
            stream: what the engine runs on. Several engines may share it; none of them closes it.
            scratch: address of `plan.scratch_bytes` on the device, which engines on the same stream can share; None = its own.
            cuda_graphs: launch each bucket's kernels as one graph.
            buffers: of another engine, to read or write in place of its own, by name of this one's input or output; not closed.

        Raises:
            EngineError: too little memory, or a tensor of a type that Keepsight does not handle.
        """
        self.path, self._plan, self._stream, self._graphs = plan.path, plan, stream, cuda_graphs
        self.clock: AbstractContextManager[Any] = nullcontext()
        self._log: TensorRTLog = log_of(plan.trt)
        self._closed, self._turns = False, _TURNS
        self._own_scratch: int | None = None
        self._buffers: dict[str, DeviceBuffer] = dict(buffers or {})
        self._lent = frozenset(self._buffers)
        self._buckets: list[_Bucket] = []
        self.inputs, self.outputs = _specs(plan)
        try:
            with stream:
                self._prepare(scratch)
        except EngineError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"TensorRTEngine({str(self.path)!r})"

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """What it was made of."""
        return self._plan

    @property
    def stream(self) -> DeviceStream:
        """What it runs on."""
        return self._stream

    @property
    def buffers(self) -> Mapping[str, DeviceBuffer]:
        """Where its inputs and outputs lie, by name."""
        return self._buffers

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Array]:
        """See :meth:`Engine.run`. Further errors: shapes that no profile has, a tensor that has been overwritten."""
        with self._stream:
            bucket, fed = self._enqueue(feeds)
            results = {name: np.empty(bucket.shapes[name], spec.dtype) for name, spec in self.outputs.items()}
            for name, array in results.items():
                self._stream.copy_out(array, self._buffers[name].address)
            self._stream.synchronize()
        del fed
        check_finite(self.path.name, results)
        return results

    def enqueue(self, feeds: Mapping[str, Tensor]) -> dict[str, DeviceTensor]:
        """See :meth:`Engine.enqueue`; returns when the work is done, so that its time can be told."""
        with self._stream:
            bucket, fed = self._enqueue(feeds)
            self._stream.synchronize()
        del fed
        return {name: self._tensor(self._buffers[name], bucket.shapes[name], spec) for name, spec in self.outputs.items()}

    def place(self, name: str, value: Array) -> DeviceTensor:
        """See :meth:`Engine.place`.

        Raises:
            EngineError: no such input, or another dtype or shape than it has.
        """
        self._check_open()
        check_feeds(self.path.name, {key: spec for key, spec in self.inputs.items() if key == name}, {name: value})
        array, buffer = np.ascontiguousarray(value), self._buffers[name]
        with self._stream:
            buffer.fill(array)
            self._stream.synchronize()
        return self._tensor(buffer, array.shape, self.inputs[name])

    def read_in_turns(self, *, by: int) -> None:
        """Keep so many CUDA graphs more: its inputs come from as many more places in turn, those of another bank."""
        self._turns += by

    @contextmanager
    def profiled(self, profiler: Any) -> Iterator[None]:
        """Let every run report its layers to a profiler (`trt.IProfiler`) meanwhile. TensorRT waits for the device to do that,
        which no CUDA graph can hold, so that there are none.
        """
        graphs, self._graphs = self._graphs, False
        self._report_to(profiler)
        try:
            yield
        finally:
            self._report_to(None)
            self._graphs = graphs

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        if self._closed:
            return
        self._closed = True
        with self._stream:
            for bucket in self._buckets:
                bucket.forget_graphs()
            for name, buffer in self._buffers.items():
                if name not in self._lent:
                    buffer.close()
            if self._own_scratch is not None:
                self._stream.free(self._own_scratch)
        self._buckets.clear()  # the contexts, before the engine that they are of
        del self._plan

    # -- a run -------------------------------------------------------------------------------------------------------

    def _enqueue(self, feeds: Mapping[str, Tensor]) -> tuple[_Bucket, list[Array]]:
        """Enqueue the copies of what is on the host, and the kernels; returns what must live until the stream is through."""
        self._check_open()
        check_feeds(self.path.name, self.inputs, feeds, kinds=(np.ndarray, DeviceTensor))
        bucket = self._bucket_for(feeds)
        staged = {name: self._bring(name, feeds[name]) for name in self.inputs}
        outputs = {name: self._buffers[name].address for name in self.outputs}
        self._bind(bucket, {name: address for name, (address, _) in staged.items()} | outputs)
        for name in self.outputs:
            self._buffers[name].writes += 1
        with self.clock:
            self._launch(bucket)
        return bucket, [array for _, array in staged.values() if array is not None]

    def _bring(self, name: str, value: Tensor) -> tuple[int, Array | None]:
        """Where an input is to be read, and the host's array if the stream is still to copy it."""
        buffer = self._buffers[name]
        if not isinstance(value, DeviceTensor):
            array = np.ascontiguousarray(value)
            buffer.fill(array)
            return buffer.address, array
        if value.stream is not self._stream:
            raise EngineError(f"{name!r} of {self.path.name} was kept on another stream.", fix="Open both engines on one.")
        address = value.address
        # An entry of a tensor whose entries are no multiples of the alignment; or what this run is to write over.
        if address % _ALIGNMENT or value.buffer in (self._buffers[output] for output in self.outputs):
            buffer.writes += 1
            self._stream.copy_within(buffer.address, address, value.nbytes)
            return buffer.address, None
        return address, None

    def _bind(self, bucket: _Bucket, addresses: Mapping[str, int]) -> None:
        changed = {name: address for name, address in addresses.items() if bucket.bound.get(name) != address}
        for name, address in changed.items():
            context = bucket.context
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"refuses the address of {name!r} of")
            bucket.bound[name] = address

    def _launch(self, bucket: _Bucket) -> None:
        place = tuple(bucket.bound.values())
        has_run, graph = place in bucket.graphs, bucket.graphs.pop(place, None)
        if has_run and self._graphs and graph is None:
            graph = self._capture(bucket)
        bucket.graphs[place] = graph
        bucket.forget_graphs(but=self._turns)
        if graph is not None:
            graph.launch()
        else:
            self._execute(bucket)

    def _capture(self, bucket: _Bucket) -> DeviceGraph:
        try:
            return self._stream.capture(lambda: self._execute(bucket))
        except EngineError as error:
            raise EngineError(
                f"{self.path.name} can't be captured as a CUDA graph: {error}", fix="Run it with --no-cuda-graphs."
            ) from error

    def _report_to(self, profiler: Any) -> None:
        with self._stream:
            for bucket in self._buckets:
                bucket.forget_graphs()
                context = bucket.context
                context.profiler = profiler

    def _execute(self, bucket: _Bucket) -> None:
        self._log.clear()
        context = bucket.context
        if not context.execute_async_v3(self._stream.handle):
            raise self._refusal("can't run")

    # -- what is made once -------------------------------------------------------------------------------------------

    def _prepare(self, scratch: int | None) -> None:
        engine = self._plan.engine
        if scratch is None:
            scratch = self._own_scratch = self._stream.allocate(self._plan.scratch_bytes)
        for index in range(engine.num_optimization_profiles):
            self._buckets.append(self._bucket(index, scratch))
        for name in (*self.inputs, *self.outputs):
            if name not in self._lent:
                self._buffers[name] = DeviceBuffer(name, self._stream, self._largest(name))

    def _bucket(self, index: int, scratch: int) -> _Bucket:
        """A context for a profile, with its shapes set."""
        engine, trt = self._plan.engine, self._plan.trt
        self._log.clear()
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._refusal("has no memory for")
        context.set_device_memory(scratch, self._plan.scratch_bytes)
        if not context.set_optimization_profile_async(index, self._stream.handle):
            raise self._refusal(f"refuses profile {index} of")
        self._stream.synchronize()
        for name, spec in self.inputs.items():
            if None in spec.shape:
                # `keepsight build` makes minimum, optimum and maximum the same.
                shape = tuple(engine.get_tensor_profile_shape(name, index)[2])
                if not context.set_input_shape(name, shape):
                    raise self._refusal(f"refuses the shape {list(shape)} of {name!r} of")
        return _Bucket(context, {name: self._shape(context, name) for name in (*self.inputs, *self.outputs)})

    def _shape(self, context: Any, name: str) -> tuple[int, ...]:
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the shape {list(shape)} of {name!r} of {self.path.name} depends on more than its inputs' shapes.")
        return shape

    def _largest(self, name: str) -> int:
        """Bytes of an input or output in its largest bucket."""
        spec = self.inputs.get(name) or self.outputs[name]
        return max(int(np.prod(bucket.shapes[name], dtype=np.int64)) for bucket in self._buckets) * spec.dtype.itemsize

    def _bucket_for(self, feeds: Mapping[str, Tensor]) -> _Bucket:
        free = [name for name, spec in self.inputs.items() if None in spec.shape]
        for bucket in self._buckets:
            if all(feeds[name].shape == bucket.shapes[name] for name in free):
                return bucket
        built: Sequence[Shapes] = [{name: bucket.shapes[name] for name in free} for bucket in self._buckets]
        raise EngineError(
            f"{self.path.name} was not built for {({name: feeds[name].shape for name in free})}; its profiles are {built}.",
            fix="Use one of the bundle's text buckets, and a batch of one frame.",
        )

    def _tensor(self, buffer: DeviceBuffer, shape: tuple[int, ...], spec: TensorSpec) -> DeviceTensor:
        return DeviceTensor(buffer, shape, spec.dtype, 0, buffer.writes)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.path.name} is closed.", fix="Load it again.")

    def _refusal(self, verb: str) -> EngineError:
        return _refusal(self._plan.trt, self.path, verb)


def _specs(plan: Plan) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of an engine, by name."""
    engine, trt = plan.engine, plan.trt
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    specs = {name: _spec(plan, name) for name in names}
    inputs, outputs = (
        {name: specs[name] for name in names if modes[name] == mode} for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
    )
    return inputs, outputs


def _spec(plan: Plan, name: str) -> TensorSpec:
    engine, trt = plan.engine, plan.trt
    kinds = {getattr(trt.DataType, kind): np.dtype(dtype) for kind, dtype in _NUMPY_OF_TENSORRT.items()}
    kind = engine.get_tensor_dtype(name)
    if kind not in kinds:
        raise EngineError(f"{name!r} of {plan.path.name} is a {kind}, which Keepsight does not handle.")
    shape = tuple(None if size == -1 else int(size) for size in engine.get_tensor_shape(name))
    return TensorSpec(name, shape, kinds[kind])


def _refusal(trt: Any, path: Path, verb: str) -> EngineError:
    return EngineError(
        f"{title_of(trt)} {verb} {path.name}: {log_of(trt).complaints()}.",
        fix="Close what else uses the GPU's memory, or build the engine again on this machine with `keepsight build`.",
    )
