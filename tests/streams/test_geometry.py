"""Where pixels go: stretch and letterbox, square and other pixels, odd widths, phones held upright."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import Source, UsageError, write_video

SIDE = 224

SHAPES = [
    # width, height, pixel aspect ratio, rows and columns of the picture in a letterboxed square
    (320, 180, "1/1", 126, 224),  # wide
    (180, 320, "1/1", 224, 126),  # tall
    (160, 160, "1/1", 224, 224),  # square
    (320, 180, "16/11", 86, 224),  # pixels wider than high make it wider still
    (320, 180, "1/2", 224, 199),  # pixels higher than wide make it tall
    (180, 320, "16/11", 224, 183),
]


@pytest.fixture(params=SHAPES, ids=lambda row: f"{row[0]}x{row[1]} pixels {row[2]}")
def white_clip(
    request: pytest.FixtureRequest, tmp_path: Path, gst_run: Callable[[str, Path], Path]
) -> tuple[Path, int, int]:
    width, height, pixels, rows, columns = request.param
    path = gst_run(
        "videotestsrc pattern=white num-buffers=2 "
        f"! video/x-raw,format=I420,width={width},height={height},pixel-aspect-ratio={pixels},framerate=25/1 "
        "! x264enc ! h264parse ! mp4mux ! filesink name=out",
        tmp_path / "white.mp4",
    )
    return path, rows, columns


def test_stretch_fills_the_square_whatever_the_shape(white_clip: tuple[Path, int, int]) -> None:
    frame = next(Source(white_clip[0], size=(SIDE, SIDE), aspect="stretch"))
    assert frame.image.shape == (SIDE, SIDE, 3)
    assert frame.image.min() > 245


def test_letterbox_keeps_the_shape_seen_and_adds_black(white_clip: tuple[Path, int, int]) -> None:
    path, rows, columns = white_clip
    image = next(Source(path, size=(SIDE, SIDE), aspect="letterbox")).image
    white = image.min(axis=2) > 128
    assert (white.any(axis=1).sum(), white.any(axis=0).sum()) == (
        pytest.approx(rows, abs=2),
        pytest.approx(columns, abs=2),
    )
    top, left = (SIDE - rows) // 2, (SIDE - columns) // 2
    border = np.concatenate([image[: max(0, top - 2)].ravel(), image[:, : max(0, left - 2)].ravel()])
    assert border.size == 0 or border.max() < 10


@pytest.mark.parametrize("width", [97, 98, 99, 100])
@pytest.mark.parametrize("size", [None, (51, 37)])
def test_rows_padded_in_memory_do_not_shear_the_picture(
    tmp_path: Path, width: int, size: tuple[int, int] | None
) -> None:
    halves = np.zeros((80, width, 3), np.uint8)
    halves[:, width // 2 :] = 255
    write_video(tmp_path / "clip.mp4", [halves] * 2, fps=10)
    image = next(Source(tmp_path / "clip.mp4", size=size)).image
    assert image.shape[:2] == ((80, width) if size is None else (37, 51))
    edge = [int(np.argmax(row > 128)) for row in image[:, :, 0]]
    assert max(edge) - min(edge) <= 1
    assert image.flags.c_contiguous and image.flags.writeable


def test_a_phone_held_upright_is_turned(tmp_path: Path) -> None:
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, :64] = (255, 0, 0)  # stored with red at the left; turned by 90 degrees it is on top
    write_video(tmp_path / "clip.mp4", [frame] * 3, fps=10)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2
    one, minus_one, zero = (value.to_bytes(4, "big", signed=True) for value in (0x10000, -0x10000, 0))
    shift = (64 << 16).to_bytes(4, "big")
    rotated = zero + one + zero + minus_one + zero + zero + shift + zero + (0x40000000).to_bytes(4, "big")
    data[matrix : matrix + 36] = rotated
    (tmp_path / "turned.mp4").write_bytes(data)
    image = next(Source(tmp_path / "turned.mp4")).image
    assert image.shape == (128, 64, 3)
    assert image[10, 32, 0] > 200 and image[120, 32, 0] < 60


BAD_VIEWS = [
    ({"size": (0, 5)}, "is not a size"),
    ({"size": (5, -5)}, "is not a size"),
    ({"size": (5,)}, "is not a size"),
    ({"aspect": "crop"}, "aspect='crop'"),
    ({"pace": "fast"}, "pace='fast'"),
    ({"fps": 0}, "sampling rate"),
]


@pytest.mark.parametrize(("options", "says"), BAD_VIEWS)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source("test://ball", **options)  # type: ignore[arg-type]
