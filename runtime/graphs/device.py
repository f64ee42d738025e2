"""Tensors that stay on the device between graphs, and what they lie in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from keepsight.runtime.graphs.cuda import DeviceStream
from keepsight.streams.errors import EngineError

__all__ = ["DeviceBuffer", "DeviceTensor"]

Array = npt.NDArray[Any]


class DeviceBuffer:
    """Memory of an input or output of an engine: allocated once, written by every run.

    Attributes:
        name: of what it holds, for messages.
        address: on the device.
        writes: how often it was written; what was kept of an earlier time is no longer there.
    """

    def __init__(self, name: str, stream: DeviceStream, size: int) -> None:
        self.name, self.stream = name, stream
        self.address = stream.allocate(size)
        self.writes = 0

    def fill(self, array: Array) -> None:
        """Enqueue a copy of a contiguous array; it must live until the stream is through."""
        self.writes += 1
        self.stream.copy_in(self.address, array)

    def close(self) -> None:
        """Free the memory; tensors in it are stale from then on."""
        self.writes += 1
        self.stream.free(self.address)


@dataclass(frozen=True, eq=False)
class DeviceTensor:
    """An array on the device, in an engine's buffer, until that buffer is written again.

    `np.asarray` copies it to the host. It can be fed to any engine on the same stream, which then reads it where it is.

    Attributes:
        shape, dtype: as numpy's.
        offset: bytes from the buffer's start.
        written: which of the buffer's writes made it.
    """

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    written: int

    @property
    def address(self) -> int:
        """On the device.

        Raises:
            EngineError: the buffer has been written again since.
        """
        if self.buffer.writes != self.written:
            raise EngineError(
                f"{self.buffer.name!r} was kept on the device, and a later run has overwritten it.",
                fix="Copy it with np.asarray before that run.",
            )
        return self.buffer.address + self.offset

    @property
    def stream(self) -> DeviceStream:
        return self.buffer.stream

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceTensor:
        """One entry along the first axis; nothing is copied.

        Raises:
            IndexError: there is none.
        """
        count, *rest = self.shape
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range for {count}")
        part = replace(self, shape=tuple(rest))
        return replace(part, offset=self.offset + index % count * part.nbytes)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        array = np.empty(self.shape, self.dtype)
        with self.stream:
            self.stream.copy_out(array, self.address)
            self.stream.synchronize()
        return array if dtype is None else array.astype(dtype, copy=False)
