"""The little of the CUDA driver's API that running an engine takes: memory, copies and one stream, through ctypes.

JetPack brings the driver; no Python package of CUDA's is needed. TensorRT works in the device's primary context, as this does.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import EngineError, MissingComponentError

__all__ = ["CudaStream", "DeviceStream", "call", "load_driver"]

Array = npt.NDArray[Any]

_DRIVER = "libcuda.so.1"
_NON_BLOCKING = 1  # cuda.h: CU_STREAM_NON_BLOCKING. The default stream would wait for llama.cpp's work, and it for ours


class DeviceStream(Protocol):
    """A stream of work on a device, and memory there. Addresses are those that TensorRT takes."""

    @property
    def handle(self) -> int: ...

    def enter(self) -> None:
        """Make the device's context that of the calling thread."""
        ...

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

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done."""
        ...

    def close(self) -> None: ...


class CudaStream:
    """A stream of the first GPU.

    Raises:
        MissingComponentError: there is no CUDA driver.
        EngineError: there is no GPU, or the driver refuses; from every method.
    """

    def __init__(self) -> None:
        self._driver = load_driver()
        self._device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        call(self._driver, "cuInit", 0)
        call(self._driver, "cuDeviceGet", ctypes.byref(self._device), 0)
        call(self._driver, "cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()
        call(self._driver, "cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._stream: ctypes.c_void_p | None = stream

    @property
    def handle(self) -> int:
        """For `execute_async_v3`.

        Raises:
            EngineError: the stream is closed.
        """
        if self._stream is None or self._stream.value is None:
            raise EngineError("the CUDA stream is closed.")
        return self._stream.value

    def enter(self) -> None:
        call(self._driver, "cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        call(self._driver, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        call(self._driver, "cuMemFree_v2", ctypes.c_uint64(address))

    def copy_in(self, address: int, array: Array) -> None:
        self._copy("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(_contiguous(array)), array.nbytes)

    def copy_out(self, array: Array, address: int) -> None:
        self._copy("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(_contiguous(array)), ctypes.c_uint64(address), array.nbytes)

    def synchronize(self) -> None:
        call(self._driver, "cuStreamSynchronize", ctypes.c_void_p(self.handle))

    def close(self) -> None:
        """Free the stream; closing it twice is no error."""
        if self._stream is not None:
            call(self._driver, "cuStreamDestroy_v2", self._stream)
            call(self._driver, "cuDevicePrimaryCtxRelease_v2", self._device)
            self._stream = None

    def _copy(self, function: str, to: Any, source: Any, size: int) -> None:
        if size:
            call(self._driver, function, to, source, ctypes.c_size_t(size), ctypes.c_void_p(self.handle))


def load_driver() -> Any:
    """The CUDA driver's library.

    Raises:
        MissingComponentError: it is not on this machine.
    """
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise MissingComponentError(
            f"there is no CUDA driver here ({error}).",
            fix="Engines are built and run on a machine with an NVIDIA GPU: a Jetson, whose JetPack brings the driver.",
        ) from error


def call(driver: Any, function: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        EngineError: it does not return success; the number is a `CUresult` of cuda.h.
    """
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise EngineError(
            f"the CUDA driver refused {function} (error {status}).",
            fix="2 is out of memory; 100 and 999 are no device: check that this user may use the GPU (group `video`).",
        )


def _contiguous(array: Array) -> int:
    """The address of an array's values."""
    if not array.flags.c_contiguous:
        raise EngineError(f"an array {array.dtype} {list(array.shape)} is not contiguous and can't be copied as one piece.")
    return np.asarray(array).ctypes.data
