"""The weights of an ONNX graph, their files and their size, read from the file itself: boards have no `onnx` package."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from keepsight.streams.errors import BundleError

__all__ = ["external_files", "weight_bytes"]

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types of protocol buffers
_FIXED = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}

# onnx.proto: message -> field number -> message in it. Only the ways that lead to tensors.
_WAYS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_EXTERNAL_DATA, _KEY, _VALUE = 13, 1, 2  # TensorProto.external_data; StringStringEntryProto.key and .value
_VALUES = (4, 9)  # TensorProto.float_data and .raw_data: where weights lie inside the file


def external_files(path: Path) -> frozenset[str]:
    """Names of the files, relative to the graph's own directory, that hold its external weights.

    Nothing is loaded: the file is mapped, and weights inside it are stepped over.

    Raises:
        BundleError: the file can't be read, or is no ONNX model.
    """
    return frozenset(file for file, _ in _weights(path) if file is not None)


def weight_bytes(path: Path) -> int:
    """Bytes of the weights that a graph reads, inside its file and outside.

    Raises:
        BundleError: as `external_files`.
    """
    return sum(size for _, size in _weights(path))


def _weights(path: Path) -> list[tuple[str | None, int]]:
    """Of every tensor in a file, the external file that holds it, if one does, and its bytes."""
    try:
        with path.open("rb") as file:
            # Not closed by hand: views into it may outlive an error here.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return [_weight(tensor) for tensor in _tensors(memoryview(content), "Model")]
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}).", fix="Restore or export the bundle again.") from error
    except (IndexError, KeyError, ValueError) as error:  # mmap refuses an empty file with a ValueError
        raise BundleError(f"{path} is not an ONNX model.", fix="Restore or export the bundle again.") from error


def _tensors(message: memoryview, kind: str) -> Iterator[memoryview]:
    if kind == "Tensor":
        yield message
        return
    for number, value in _fields(message):
        if inner := _WAYS[kind].get(number):
            yield from _tensors(value, inner)


def _weight(tensor: memoryview) -> tuple[str | None, int]:
    place, inside = {}, 0
    for number, value in _fields(tensor):
        if number == _EXTERNAL_DATA:
            entry = {key: bytes(text) for key, text in _fields(value)}
            place[entry[_KEY]] = entry[_VALUE].decode()
        elif number in _VALUES:
            inside += len(value)
    return place.get(b"location"), int(place.get(b"length", inside))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message, by number; the others are stepped over."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == _LENGTH:
            size, place = _varint(message, place)
            if place + size > len(message):
                raise ValueError("a field reaches past its message")
            yield number, message[place : place + size]
            place += size
        elif wire == _VARINT:
            _, place = _varint(message, place)
        elif wire in _FIXED:
            place += _FIXED[wire]
        else:
            raise ValueError(f"unknown wire type {wire}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number at `place` and the place after it: seven bits a byte, lowest first."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
