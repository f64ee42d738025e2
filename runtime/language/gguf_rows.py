"""Reads the shapes of a GGUF file's matrices and single rows of one, without parsing its vocabulary or reading the matrix.

`gguf.GGUFReader` turns every string of the vocabulary into numpy arrays: 2.9 s for 49,152 tokens. Skipping them takes
milliseconds, and eight rows of an embedding table are a few kilobytes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from keepsight.streams.errors import LLMError, MissingModelError

__all__ = ["GGUFMatrix", "find_matrix", "matrix_bytes", "matrix_shapes"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a metadata value, by GGUF value type: u8 i8 u16 i16 u32 i32 f32 bool, then u64 i64 f64.
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFMatrix:
    """A matrix inside a GGUF file, its rows stored one after the other in one of ggml's types."""

    path: Path
    rows: int
    width: int
    ggml_type: int
    offset: int

    def read(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        """The rows at `indices`, dequantised: float32 `[len(indices), width]`."""
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self.ggml_type)
        row_bytes = int(quant_shape_to_byte_shape((self.rows, self.width), kind)[1])
        packed = np.empty((len(indices), row_bytes), np.uint8)
        with self.path.open("rb") as file:
            for out, index in zip(packed, indices, strict=True):
                file.seek(self.offset + index * row_bytes)
                if file.readinto(memoryview(out.data)) != row_bytes:
                    raise LLMError(
                        f"{self.path} ends before row {index}.", fix="The file is cut short: fetch it again."
                    )
        return np.asarray(dequantize(packed, kind), dtype=np.float32)


def find_matrix(path: Path, name: str) -> GGUFMatrix:
    """Where the matrix `name` lies in a GGUF file, for example `token_embd.weight`.

    Raises:
        MissingModelError: there is no such file.
        LLMError: it is not a GGUF file, is cut short, or holds no such matrix.
    """
    found = _matrices(path).get(name)
    if found is None:
        raise LLMError(f"{path} is not a readable GGUF file (it holds no matrix {name!r}).", fix="Fetch or convert it again.")
    return found


def matrix_shapes(path: Path) -> dict[str, tuple[int, int]]:
    """Rows and width of every matrix in a GGUF file, by name.

    Raises:
        MissingModelError, LLMError: as `find_matrix`.
    """
    return {name: (matrix.rows, matrix.width) for name, matrix in _matrices(path).items()}


def matrix_bytes(path: Path) -> dict[str, int]:
    """Bytes of every matrix in a GGUF file, by name.

    Raises:
        MissingModelError, LLMError: as `find_matrix`.
    """
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    return {
        name: prod(quant_shape_to_byte_shape((matrix.rows, matrix.width), GGMLQuantizationType(matrix.ggml_type)))
        for name, matrix in _matrices(path).items()
    }


def _matrices(path: Path) -> dict[str, GGUFMatrix]:
    if not path.is_file():
        raise MissingModelError(f"There is no GGUF file at {path}.", fix="Check the path.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).matrices()
    except (ValueError, struct.error, KeyError) as error:
        raise LLMError(f"{path} is not a readable GGUF file ({error}).", fix="Fetch or convert it again.") from error


class _Header:
    """A cursor over the header of a GGUF file: counts, metadata, then one record per tensor."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 4
        if data[:4] != _MAGIC or (version := self._u32()) not in _VERSIONS:
            raise ValueError("no GGUF magic" if data[:4] != _MAGIC else f"GGUF version {version}")
        self._tensors, self._values = self._u64(), self._u64()

    def matrices(self) -> dict[str, GGUFMatrix]:
        alignment = self._skip_metadata()
        found = []
        for _ in range(self._tensors):
            name = self._string().decode()
            shape = [self._u64() for _ in range(self._u32())]
            found.append((name, shape, self._u32(), self._u64()))
        base = -(-self._at // alignment) * alignment
        return {
            name: GGUFMatrix(self._path, prod(shape[1:]), shape[0], kind, base + offset)
            for name, shape, kind, offset in found
            if len(shape) > 1
        }

    def _skip_metadata(self) -> int:
        """Moves past the key-value pairs and returns the alignment of tensor data, in bytes."""
        alignment = 32
        for _ in range(self._values):
            key, kind = self._string(), self._u32()
            if key == b"general.alignment":
                alignment = _U32.unpack_from(self._data, self._at)[0]
            self._skip_value(kind)
        return alignment

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            item, count = self._u32(), self._u64()
            if item == _STRING:
                self._skip_strings(count)
            elif item == _ARRAY:
                for _ in range(count):
                    self._skip_value(_ARRAY)
            else:
                self._at += _SCALAR_BYTES[item] * count
        else:
            self._at += _SCALAR_BYTES[kind]

    def _skip_strings(self, count: int) -> None:
        # The one hot loop: a vocabulary and its merges are 100,000 to 500,000 strings.
        at, data, unpack = self._at, self._data, _U64.unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._at)[0]
        self._at += 4
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._at)[0]
        self._at += 8
        return value

    def _string(self) -> bytes:
        length = self._u64()
        value = self._data[self._at : self._at + length]
        self._at += length
        return value
