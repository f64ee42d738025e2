from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keepsight.streams import Source, SourceUnreadableError

Save = Callable[[Path, np.ndarray], Path]


def noise(frames: int = 5, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], Path]:
    def save(array: object) -> Path:
        np.save(tmp_path / "frames.npy", array)
        return tmp_path / "frames.npy"

    return save


def test_every_frame_of_an_array_comes_bit_for_bit_once_a_second(saved: Callable[[object], Path]) -> None:
    frames = noise()
    with Source(saved(frames)) as source:
        seen = list(source)
        assert source.duration_s == 5
        assert not source.is_live and source.dropped == 0
    assert [(frame.time_s, frame.index) for frame in seen] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert np.array_equal([frame.image for frame in seen], frames)
    assert all(frame.image.flags.owndata and frame.image.flags.c_contiguous for frame in seen)
    seen[0].image[:] = 0  # own memory: writing to it is allowed, and the file keeps its frames
    assert np.array_equal(np.load(str(source.uri)), frames)


@pytest.mark.parametrize("fps", [0.5, 4, 100])
def test_the_rate_dates_the_frames_and_drops_none(saved: Callable[[object], Path], fps: float) -> None:
    seen = list(Source(str(saved(noise())), fps=fps))
    assert [frame.time_s for frame in seen] == [index / fps for index in range(5)]


@pytest.mark.parametrize("aspect", ["stretch", "letterbox"])
def test_frames_of_the_wanted_size_are_not_touched(saved: Callable[[object], Path], aspect: str) -> None:
    frames = noise()
    seen = list(Source(saved(frames), size=(60, 40), aspect=aspect))  # type: ignore[arg-type]
    assert np.array_equal([frame.image for frame in seen], frames)


@pytest.mark.parametrize("aspect", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(32, 24), (51, 33), (90, 90)])
def test_frames_of_another_size_are_scaled_as_a_picture_file_is(
    tmp_path: Path, saved: Callable[[object], Path], save_image: Save, size: tuple[int, int], aspect: str
) -> None:
    frames = noise(3)
    (tmp_path / "pictures").mkdir()
    for index, image in enumerate(frames):
        save_image(tmp_path / "pictures" / f"{index}.png", image)
    view = {"size": size, "aspect": aspect}
    expected = [frame.image for frame in Source(tmp_path / "pictures", **view)]  # type: ignore[arg-type]
    assert np.array_equal([frame.image for frame in Source(saved(frames), **view)], expected)  # type: ignore[arg-type]


def test_a_width_that_gstreamer_pads_is_scaled_right(saved: Callable[[object], Path]) -> None:
    frames = np.zeros((1, 10, 7, 3), np.uint8)
    frames[0, :, :, 0] = 200
    (frame,) = Source(saved(frames), size=(14, 20))
    assert np.array_equal(frame.image, np.broadcast_to(np.array([200, 0, 0], np.uint8), (20, 14, 3)))


def test_an_array_stored_by_columns_is_read_right(saved: Callable[[object], Path]) -> None:
    frames = noise()
    seen = [frame.image for frame in Source(saved(np.asfortranarray(frames)))]
    assert np.array_equal(seen, frames)
    assert all(image.flags.c_contiguous for image in seen)


def test_an_array_as_a_camera_drops_what_is_late(saved: Callable[[object], Path]) -> None:
    with Source(saved(noise(10)), fps=20, pace="realtime") as source:
        times = []
        for frame in source:
            times.append(frame.time_s)
            time.sleep(0.12)
    assert len(times) + source.dropped == 10
    assert 2 <= len(times) <= 6 and times[-1] == pytest.approx(0.45)


def test_closing_from_another_thread_ends_the_frames(saved: Callable[[object], Path]) -> None:
    source = Source(saved(noise()), size=(32, 32), fps=0.1, pace="realtime")
    next(source)  # the next one is 10 s away
    threading.Timer(0.05, source.close).start()
    assert list(source) == []


REFUSED = [
    # what is saved, what the error says
    (noise().astype(np.float32), r"float32 \[5, 40, 60, 3\], not frames of uint8 \[T, H, W, 3\]"),
    (noise()[..., 0], r"uint8 \[5, 40, 60\], not"),
    (noise()[0], r"uint8 \[40, 60, 3\], not"),
    (np.moveaxis(noise(), 3, 1), r"uint8 \[5, 3, 40, 60\], not"),
    (np.uint8(3), r"uint8 \[\], not"),
    (noise(0), r"no frames: its shape is \[0, 40, 60, 3\]"),
    (noise(2, 0, 60), r"no frames: its shape is \[2, 0, 60, 3\]"),
    (np.array([{"a": 1}], dtype=object), "not an array that can be read"),
]


@pytest.mark.parametrize(("array", "says"), REFUSED)
def test_an_array_that_holds_no_frames_is_refused_when_it_is_opened(
    saved: Callable[[object], Path], array: object, says: str
) -> None:
    with pytest.raises(SourceUnreadableError, match=says) as error:
        Source(saved(array))
    assert "frames.npy" in str(error.value) and "numpy.save" in str(error.value)


def test_what_is_no_array_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    text, cut, archive = (tmp_path / name for name in ("text.npy", "cut.npy", "archive.npy"))
    text.write_text("not an array\n" * 100)
    np.save(cut, noise())
    cut.write_bytes(cut.read_bytes()[:-1000])
    with archive.open("wb") as file:
        np.savez(file, frames=noise())
    for path, says in ((text, "not an array"), (cut, "not an array"), (archive, "archive of arrays")):
        with pytest.raises(SourceUnreadableError, match=says) as error:
            Source(path)
        assert path.name in str(error.value)
