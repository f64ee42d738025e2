"""What running an engine takes of the CUDA driver, through cuda-python: one stream, memory, copies, and CUDA graphs.

TensorRT works in the device's primary context, and so does this. JetPack brings the driver.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import EngineError, MissingComponentError

__all__ = ["CudaEvent", "CudaGraph", "CudaStream", "DeviceEvent", "DeviceGraph", "DeviceStream", "call", "start_driver"]

Array = npt.NDArray[Any]


class DeviceGraph(Protocol):
    """Work that was captured once, and is launched as one piece."""

    def launch(self) -> None:
        """Enqueue it on the stream that it was captured from."""
        ...

    def close(self) -> None: ...


class DeviceEvent(Protocol):
    """A moment of a stream, as the device's own clock sees it."""

    def record(self) -> None:
        """The moment is when all that was enqueued on the stream before is done."""
        ...

    def ms_since(self, earlier: Any) -> float:
        """Milliseconds from another event of the stream; waits until this one has passed."""
        ...

    def close(self) -> None: ...


class DeviceStream(Protocol):
    """Work on a device, done in the order in which it is enqueued, and memory there. Addresses are those that TensorRT takes.

    Whoever enqueues holds the stream (`with stream:`): two engines whose kernels mixed would share their scratch memory, and a
    capture would take in another thread's work.
    """

    @property
    def handle(self) -> int: ...

    def __enter__(self) -> DeviceStream:
        """Wait for one's turn, and make the device's context that of the calling thread."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        ...

    def free(self, address: int) -> None: ...

    def copy_in(self, address: int, array: Array) -> None:
        """Enqueue a copy of a contiguous array to the device; the array must live until `synchronize`."""
        ...

    def copy_out(self, array: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous array."""
        ...

    def copy_within(self, to: int, source: int, size: int) -> None:
        """Enqueue a copy from one place on the device to another."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> DeviceGraph:
        """Record what a function enqueues, which is not run, as a graph."""
        ...

    def event(self) -> DeviceEvent:
        """A moment to be recorded."""
        ...

    def close(self) -> None: ...


class CudaStream:
    """A stream of the first GPU.

    Args:
        urgent: its kernels go first, as soon as a multiprocessor is free, where others of this process wait too (llama.cpp's).

    Raises:
        MissingComponentError: there is no CUDA driver, or no cuda-python.
        EngineError: there is no GPU, or the driver refuses; from every method.
    """

    def __init__(self, *, urgent: bool = False) -> None:
        self._driver = start_driver()
        self._turn = threading.RLock()
        self._device = call(self._driver, "cuDeviceGet", 0)
        self._context = call(self._driver, "cuDevicePrimaryCtxRetain", self._device)
        # The default stream would wait for llama.cpp's work, and it for ours.
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        with self:
            least, greatest = call(self._driver, "cuCtxGetStreamPriorityRange")
            self._stream: Any = call(
                self._driver, "cuStreamCreateWithPriority", int(flags), greatest if urgent else least
            )

    @property
    def handle(self) -> int:
        """For `execute_async_v3`.

        Raises:
            EngineError: the stream is closed.
        """
        return int(self._open())

    def __enter__(self) -> CudaStream:
        self._turn.acquire()
        call(self._driver, "cuCtxSetCurrent", self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._turn.release()

    def allocate(self, size: int) -> int:
        return int(call(self._driver, "cuMemAlloc", max(size, 1)))

    def free(self, address: int) -> None:
        call(self._driver, "cuMemFree", address)

    def copy_in(self, address: int, array: Array) -> None:
        self._copy("cuMemcpyHtoDAsync", address, _contiguous(array), array.nbytes)

    def copy_out(self, array: Array, address: int) -> None:
        self._copy("cuMemcpyDtoHAsync", _contiguous(array), address, array.nbytes)

    def copy_within(self, to: int, source: int, size: int) -> None:
        self._copy("cuMemcpyDtoDAsync", to, source, size)

    def synchronize(self) -> None:
        call(self._driver, "cuStreamSynchronize", self._open())

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """See :meth:`DeviceStream.capture`. What `enqueue` raises is raised again, and nothing is kept.

        Raises:
            EngineError: something that was enqueued can't be part of a graph.
        """
        # Of this thread alone: another one, llama.cpp's say, may do what a global capture would forbid it.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(self._driver, "cuStreamBeginCapture", self._open(), mode)
        try:
            enqueue()
        except Exception:
            self._driver.cuStreamEndCapture(self._open())  # an error of its own would hide the first
            raise
        graph = call(self._driver, "cuStreamEndCapture", self._open())
        try:
            return CudaGraph(self._driver, self._open(), call(self._driver, "cuGraphInstantiate", graph, 0))
        finally:
            call(self._driver, "cuGraphDestroy", graph)

    def event(self) -> CudaEvent:
        """See :meth:`DeviceStream.event`; the stream must be held."""
        return CudaEvent(self._driver, self._open())

    def close(self) -> None:
        """Free the stream; closing it twice is no error."""
        if self._stream is not None:
            with self:
                call(self._driver, "cuStreamDestroy", self._stream)
                call(self._driver, "cuDevicePrimaryCtxRelease", self._device)
                self._stream = None

    def _open(self) -> Any:
        if self._stream is None:
            raise EngineError("the CUDA stream is closed.")
        return self._stream

    def _copy(self, function: str, to: int, source: int, size: int) -> None:
        if size:
            call(self._driver, function, to, source, size, self._open())


class CudaGraph:
    """See :class:`DeviceGraph`; made by :meth:`CudaStream.capture`."""

    def __init__(self, driver: Any, stream: Any, executable: Any) -> None:
        self._driver, self._stream, self._executable = driver, stream, executable

    def launch(self) -> None:
        call(self._driver, "cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        call(self._driver, "cuGraphExecDestroy", self._executable)


class CudaEvent:
    """See :class:`DeviceEvent`; made by :meth:`CudaStream.event`. Whoever uses it holds the stream."""

    def __init__(self, driver: Any, stream: Any) -> None:
        self._driver, self._stream = driver, stream
        self._event: Any = call(driver, "cuEventCreate", 0)  # with its time, and no blocking of the host's thread

    def record(self) -> None:
        call(self._driver, "cuEventRecord", self._event, self._stream)

    def ms_since(self, earlier: CudaEvent) -> float:
        call(self._driver, "cuEventSynchronize", self._event)
        return float(call(self._driver, "cuEventElapsedTime", earlier._event, self._event))

    def close(self) -> None:
        """Free the event; closing it twice is no error."""
        if self._event is not None:
            call(self._driver, "cuEventDestroy", self._event)
            self._event = None


def start_driver() -> Any:
    """cuda-python's module of the driver's API, with the driver started.

    Raises:
        MissingComponentError: cuda-python, or the driver, is not on this machine.
        EngineError: the driver finds no GPU.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingComponentError(
            f"cuda-python can't be loaded ({error}).", fix='Install it with: pip install "keepsight[tensorrt]"'
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # from cuda-python's search for the library, at the first call
        raise MissingComponentError(
            f"there is no CUDA driver here ({error}).",
            fix="Engines are built and run on a machine with an NVIDIA GPU: a Jetson, whose JetPack brings the driver.",
        ) from error
    _check(driver, "cuInit", status)
    return driver


def call(driver: Any, function: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns what it gives: nothing, one value, or a tuple.

    Raises:
        EngineError: it refuses.
    """
    status, *values = getattr(driver, function)(*arguments)
    _check(driver, function, status)
    return values[0] if len(values) == 1 else tuple(values) or None


def _check(driver: Any, function: str, status: Any) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"the CUDA driver refused {function} ({status.name}).",
            fix="OUT_OF_MEMORY: close what else uses the GPU. NO_DEVICE: check that this user may use it (group `video`).",
        )


def _contiguous(array: Array) -> int:
    """The address of an array's values."""
    if not array.flags.c_contiguous:
        raise EngineError(f"an array {array.dtype} {list(array.shape)} is not contiguous and can't be copied as one piece.")
    return np.asarray(array).ctypes.data
