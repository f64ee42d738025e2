from __future__ import annotations

from pathlib import Path

import pytest

from keepsight.streams.containers import declared_size, lacks_index

CLIPS = ["plain.mp4", "fast.mp4", "clip.mkv", "clip.avi"]


@pytest.mark.parametrize("name", CLIPS)
def test_a_whole_file_is_as_long_as_its_headers_say(media: Path, name: str) -> None:
    assert declared_size(media / name) == (media / name).stat().st_size


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_cut_file_is_shorter_than_its_headers_say(media: Path, tmp_path: Path, name: str, share: float) -> None:
    data = (media / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(data[: int(len(data) * share)])
    declared = declared_size(cut)
    assert declared is not None and declared > cut.stat().st_size


UNKNOWN = [
    (b"", "empty"),
    (b"hello, this is text\n" * 10, "text"),
    (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff data", "Matroska of unknown size"),
    (b"RIFF\0\0\0\0AVI LIST", "AVI that was never closed"),
    (b"\x1a\x45\xdf\xa3", "Matroska that ends in its first header"),
]


@pytest.mark.parametrize("data", [row[0] for row in UNKNOWN], ids=[row[1] for row in UNKNOWN])
def test_a_file_without_sizes_says_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    assert declared_size(tmp_path / "file") is None


def test_a_box_with_a_64_bit_size_is_followed(tmp_path: Path) -> None:
    ftyp = (16).to_bytes(4, "big") + b"ftypisom\0\0\0\0"
    (tmp_path / "big.mp4").write_bytes(ftyp + b"\0\0\0\1mdat" + (5_000_000_000).to_bytes(8, "big"))
    assert declared_size(tmp_path / "big.mp4") == 5_000_000_016


def test_a_box_that_goes_to_the_end_promises_nothing_more(tmp_path: Path) -> None:
    ftyp = (16).to_bytes(4, "big") + b"ftypisom\0\0\0\0"
    (tmp_path / "open.mp4").write_bytes(ftyp + b"\0\0\0\0mdat" + b"x" * 50)
    assert declared_size(tmp_path / "open.mp4") == 16


def test_only_an_mp4_without_its_moov_box_lacks_its_index(media: Path, tmp_path: Path) -> None:
    for name in CLIPS:
        data = (media / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert not lacks_index(media / name)
        assert lacks_index(tmp_path / name) == (name == "plain.mp4")
