"""A file of named arrays is whole or refused, and the old one outlives every failed write."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keepsight.runtime.storage import sections
from keepsight.runtime.storage.sections import MAGIC, checksum, is_section_file, read_sections, write_sections
from keepsight.streams.errors import SnapshotError

ARRAYS = {
    "features": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
    "order": np.arange(6, dtype=np.int32)[::-1],
    "seen": np.array(2**40, np.int64),
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "none": np.zeros((2, 0, 3)),
    "mask": np.array([[True, False]]),
}
META = {"bundle": "großer Bündel", "time_s": 0.1 + 0.2, "source": None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_sections(tmp_path / "a.keepsight", META, ARRAYS)
    return tmp_path / "a.keepsight"


def assert_is_what_was_written(path: Path) -> None:
    meta, arrays = read_sections(path)
    assert meta == META and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()


def test_what_is_written_is_read(file: Path) -> None:
    assert is_section_file(file) and not list(file.parent.glob(".*"))
    assert_is_what_was_written(file)
    assert write_sections(file, META, ARRAYS) == file.stat().st_size


def test_the_format_is_what_its_description_says(file: Path) -> None:
    """Read with nothing of ours: little-endian, in C order, without gaps, wherever it was written."""
    content = file.read_bytes()
    magic, version, header_bytes, total = struct.unpack_from("<16sIIQ", content)
    assert (magic, version, total) == (b"\x89keepsight-snap\n", 1, len(content))
    header = json.loads(content[64 : 64 + header_bytes])
    assert header["meta"] == META
    place = 64 + header_bytes
    for entry in header["sections"]:
        assert entry["dtype"][0] in "<|"
        size = int(np.prod(entry["shape"])) * int(entry["dtype"][2:])
        stored = np.frombuffer(content[place : place + size], entry["dtype"]).reshape(entry["shape"])
        assert np.array_equal(stored, ARRAYS[entry["name"]])
        place += size
    assert place == len(content)


def test_big_endian_and_strided_arrays_are_written_little_endian_in_c_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=">f8").reshape(3, 4).T
    write_sections(tmp_path / "b", {}, {"x": array})
    stored = read_sections(tmp_path / "b")[1]["x"]
    assert np.array_equal(stored, array) and stored.dtype == np.float64


def test_objects_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not numbers"):
        write_sections(tmp_path / "o", {}, {"x": np.array([{"a": 1}], dtype=object)})


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for size in [*range(0, len(content), 3), 63, 64, len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(SnapshotError, match="truncated" if size else "no snapshot"):
            read_sections(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(SnapshotError, match="1 bytes more"):
        read_sections(file)


def test_a_flipped_bit_anywhere_is_refused_and_its_place_named(file: Path) -> None:
    content = file.read_bytes()
    header_end = 64 + struct.unpack_from("<I", content, 20)[0]
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        where = "first bytes" if place < 16 else "first 64" if place < 64 else "header" if place < header_end else "section '"
        with pytest.raises(SnapshotError, match=where):
            read_sections(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_changed_at_random_are_refused(file: Path, data: st.DataObject) -> None:
    content = sections_of(file)
    start = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(min_size=1, max_size=40))
    damaged = content[:start] + new + content[start + len(new) :]
    if damaged == content:
        return
    other = file.with_name("damaged")
    other.write_bytes(damaged)
    with pytest.raises(SnapshotError):
        read_sections(other)


def sections_of(file: Path) -> bytes:
    return file.read_bytes()


def test_a_newer_version_says_so(file: Path) -> None:
    content = file.read_bytes()
    start = content[:16] + struct.pack("<I", 2) + content[20:48]
    file.write_bytes(start + checksum(start) + content[64:])
    with pytest.raises(SnapshotError, match="version 2, this Keepsight reads up to 1"):
        read_sections(file)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" * 20, bytes(200)])
def test_other_files_are_not_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert not is_section_file(tmp_path / "x")
    with pytest.raises(SnapshotError, match="no snapshot"):
        read_sections(tmp_path / "x")


def test_a_missing_file_is_no_section_file(tmp_path: Path) -> None:
    assert not is_section_file(tmp_path / "x") and not is_section_file(tmp_path) and not is_section_file("rtsp://a/b")
    with pytest.raises(SnapshotError, match="No such file"):
        read_sections(tmp_path / "x")


class _FullDisk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self._room:
            self._file.write(bytes(memoryview(data).cast("B"))[: self._room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= size
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 10, 70, 300, -1])
def test_a_full_disk_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    room %= file.stat().st_size
    write = sections._write
    monkeypatch.setattr(sections, "_write", lambda to, *rest: write(_FullDisk(to, room), *rest))
    with pytest.raises(SnapshotError, match="No space left"):
        write_sections(file, META, ARRAYS)
    assert_is_what_was_written(file)
    assert not list(file.parent.glob(".*"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(SnapshotError, match="Input/output error"):
            write_sections(file, {"new": True}, ARRAYS)
    assert_is_what_was_written(file)


def test_data_is_on_the_disk_before_the_name_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_sections(file, META, ARRAYS)
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_what_a_killed_process_left_is_overwritten(file: Path) -> None:
    (file.parent / ".a.keepsight.partial").write_bytes(b"half a snapshot" * 1000)
    write_sections(file, META, ARRAYS)
    assert_is_what_was_written(file)


def test_two_writers_of_one_file_do_not_mix(file: Path) -> None:
    partial = file.parent / ".a.keepsight.partial"
    with sections._only_writer(partial) as held:
        held.write(b"the other's")
        with pytest.raises(SnapshotError, match="another process"):
            write_sections(file, META, ARRAYS)
        held.flush()
        assert partial.read_bytes() == b"the other's"
    assert_is_what_was_written(file)


def test_the_magic_is_no_text() -> None:
    assert len(MAGIC) == 16 and not MAGIC.isascii()
