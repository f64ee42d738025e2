"""Memory for frames: copied right for every width, used again only when nobody can see it any more."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.streams import Source, UsageError
from keepsight.streams.gst import load_gst, sample_to_array
from keepsight.streams.ring import FrameRing

SHAPE = (3, 5, 3)


def padded_sample(width: int, height: int, stride: int, offset: int, seed: int) -> tuple[Any, np.ndarray]:
    """A sample of random RGB in rows of that many bytes from an offset on; and what it shows, row by row."""
    gst = load_gst()
    from gi.repository import GstVideo

    data = np.random.default_rng(seed).integers(0, 256, offset + stride * height, np.uint8).tobytes()
    buffer = gst.Buffer.new_wrapped(data)
    caps = gst.Caps.from_string(f"video/x-raw,format=RGB,width={width},height={height},framerate=1/1")
    if (stride, offset) != ((3 * width + 3) // 4 * 4, 0):  # as hardware does, and says on the buffer
        kind = (GstVideo.VideoFrameFlags.NONE, GstVideo.VideoFormat.RGB)
        GstVideo.buffer_add_video_meta_full(buffer, *kind, width, height, 1, [offset, 0, 0, 0], [stride, 0, 0, 0])
    rows = [list(data[offset + y * stride : offset + y * stride + 3 * width]) for y in range(height)]
    return gst.Sample.new(buffer, caps, None, None), np.array(rows, np.uint8).reshape(height, width, 3)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 40), st.integers(0, 64), st.integers(0, 99))
def test_every_width_and_every_padding_is_copied_right(width: int, height: int, more: int, offset: int, seed: int) -> None:
    ring = FrameRing(2)
    for stride, start in (((3 * width + 3) // 4 * 4, 0), (3 * width + more, offset)):
        sample, wanted = padded_sample(width, height, stride, start, seed)
        for image in (sample_to_array(sample, ring), sample_to_array(sample)):
            assert np.array_equal(image, wanted) and image.flags.c_contiguous and image.flags.writeable


@pytest.mark.parametrize("width", [1, 2, 3, 5, 223, 854])
def test_gstreamers_own_pictures_are_copied_right(gst: Any, width: int) -> None:
    # The same picture in RGBA, whose rows are never padded.
    pipeline = gst.parse_launch(
        f"videotestsrc num-buffers=1 pattern=smpte ! video/x-raw,format=RGBA,width={width},height=7 ! tee name=t "
        "t. ! queue ! videoconvert ! video/x-raw,format=RGB ! appsink name=rgb t. ! queue ! appsink name=rgba"
    )
    pipeline.set_state(gst.State.PLAYING)
    rgb, rgba = (pipeline.get_by_name(name).try_pull_sample(5 * gst.SECOND) for name in ("rgb", "rgba"))
    pipeline.set_state(gst.State.NULL)
    buffer = rgba.get_buffer()
    plain = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8).reshape(7, width, 4)
    assert np.array_equal(sample_to_array(rgb, FrameRing(1)), plain[..., :3])


def address(image: np.ndarray) -> int:
    return image.ctypes.data


def test_a_slot_is_used_again_when_its_array_is_gone() -> None:
    ring = FrameRing(2)
    first = ring.take(SHAPE)
    place = address(first)
    del first
    assert address(ring.take(SHAPE)) == place and ring.exhausted == 0


VIEWS = [
    lambda image: image[1:],
    lambda image: image[0, 0],
    lambda image: image.reshape(-1)[2:7],
    lambda image: image.T[:, 1],
    lambda image: image.view(np.int8),
    lambda image: memoryview(image),
    lambda image: np.frombuffer(image, np.uint8),
    lambda image: np.broadcast_to(image, (4, *SHAPE)),
    lambda image: np.lib.stride_tricks.as_strided(image, (2,), (1,)),
    lambda image: image[1:][0][1:][:1],
]


@pytest.mark.parametrize("look", VIEWS)
def test_a_view_keeps_the_slot(look: Any) -> None:
    ring = FrameRing(1)
    image = ring.take(SHAPE)
    image[:] = 7
    view = look(image)
    del image
    gc.collect()
    ring.take(SHAPE)[:] = 9
    assert ring.exhausted == 1 and np.all(np.asarray(view).view(np.uint8) == 7)
    del view
    gc.collect()
    ring.take(SHAPE)
    assert ring.exhausted == 1


def test_held_frames_get_memory_of_their_own_beyond_the_bound() -> None:
    ring = FrameRing(3)
    held = [ring.take(SHAPE) for _ in range(10)]
    for number, image in enumerate(held):
        image[:] = number
    assert ring.exhausted == 7 and [image[0, 0, 0] for image in held] == list(range(10))
    assert len({address(image) for image in held}) == 10


def test_a_slot_of_the_old_shape_never_serves_the_new_one() -> None:
    ring = FrameRing(1)
    small = ring.take((2, 2, 3))
    large = ring.take((20, 20, 3))
    large[:] = 5
    del small
    gc.collect()
    again = ring.take((20, 20, 3))
    again[:] = 6
    assert (large == 5).all() and again.shape == (20, 20, 3) and ring.exhausted == 1


def test_slots_let_go_in_other_threads_come_back_whole() -> None:
    ring, wrong = FrameRing(4), []

    def hold(image: np.ndarray, number: int) -> None:
        if not (image == number).all():
            wrong.append(number)

    for number in range(200):
        image = ring.take((50, 50, 3))
        image[:] = number
        thread = threading.Thread(target=hold, args=(image, number))
        thread.start()
        del image
        if number % 3 == 0:
            thread.join()
    assert not wrong and ring.taken == 200


def test_slots_outlive_their_ring() -> None:
    image = FrameRing(1).take(SHAPE)
    image[:] = 3
    gc.collect()
    assert (image == 3).all()


def test_frames_that_are_kept_stay_what_they_were_and_others_share_slots(numbered: Any) -> None:
    with Source(numbered) as source:
        kept = [frame.image[:, ::2] for frame in source if frame.index % 2]
    assert [round(image.mean() / 4) for image in kept] == list(range(1, 60, 2))
    with Source(numbered) as source:
        places = {address(frame.image) for frame in source}
    assert len(places) < 6


def test_a_ring_has_slots() -> None:
    with pytest.raises(UsageError, match="holds nothing"):
        FrameRing(0)
