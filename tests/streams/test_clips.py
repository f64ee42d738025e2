"""Cuts of a recording whose pictures are sent in another order than they are shown: each clip holds what it says, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from keepsight.streams.clips import clip
from keepsight.streams.recorded import segment_name

FPS, FRAMES, KEY_EVERY, BEGUN_S = 30, 48, 15, 1000.0
_DEMUXERS = {".ts": "tsdemux", ".mp4": "qtdemux", ".mkv": "matroskademux"}


@dataclass(frozen=True)
class Content:
    """Of a file: the numbers of its coded pictures by their times, in the order of decoding, and the decoded pictures."""

    coded: list[int]
    shown: list[bytes]


def content(gst: Any, path: Path) -> Content:
    read = f"filesrc location={path} ! {_DEMUXERS[path.suffix]} ! h264parse ! video/x-h264,stream-format=byte-stream,alignment=au"
    coded, shown = (pulled(gst, f"{read} {rest} ! appsink name=out sync=false") for rest in ("", "! avdec_h264"))
    first = min(buffer.pts for buffer in coded)
    numbers = [round((buffer.pts - first) * FPS / gst.SECOND) for buffer in coded]
    return Content(numbers, [buffer.extract_dup(0, buffer.get_size()) for buffer in shown])


def pulled(gst: Any, description: str) -> list[Any]:
    pipeline = gst.parse_launch(description)
    pipeline.set_state(gst.State.PLAYING)
    buffers = []
    while (sample := pipeline.get_by_name("out").try_pull_sample(10 * gst.SECOND)) is not None:
        buffers.append(sample.get_buffer())
    assert pipeline.get_bus().pop_filtered(gst.MessageType.ERROR) is None
    pipeline.set_state(gst.State.NULL)
    return buffers


def recorded(gst_run: Callable[[str, Path], Path], folder: Path, b_frames: int, is_open: bool) -> Path:
    """A recording of one segment: MPEG-TS, a key frame every 15 pictures."""
    return gst_run(
        f"videotestsrc pattern=snow num-buffers={FRAMES} ! video/x-raw,format=I420,width=64,height=48,framerate={FPS}/1 "
        f"! x264enc bframes={b_frames} b-adapt=false key-int-max={KEY_EVERY} "
        f"option-string=scenecut=0:b-pyramid=normal:open-gop={int(is_open)} "
        "! h264parse config-interval=-1 ! mpegtsmux ! filesink name=out",
        folder / segment_name(0, BEGUN_S, ".ts"),
    )


def expected(coded: list[int], start: int, end: int) -> tuple[int, int]:
    """By the description, the first picture that a clip shows and the one behind its last: it begins with the key frame at or
    before its start, and ends where, in the order of decoding, nothing before the end or before what it shows is missing."""
    key = start // KEY_EVERY * KEY_EVERY
    for cut in range(1, len(coded) + 1):
        if not coded[cut:] or min(coded[cut:]) >= max(end, max(coded[:cut]) + 1):
            return key, max(coded[:cut]) + 1
    raise AssertionError


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("b_frames", [0, 1, 2, 3])
def test_a_clip_holds_the_pictures_that_it_says(
    gst: Any, gst_run: Callable[[str, Path], Path], tmp_path: Path, b_frames: int, is_open: bool
) -> None:
    whole = content(gst, recorded(gst_run, tmp_path, b_frames, is_open))
    assert sorted(whole.coded) == list(range(FRAMES)) and len(set(whole.shown)) == FRAMES
    assert (whole.coded != sorted(whole.coded)) == (b_frames > 0)
    for start, end in [(start, end) for start in (0, 7, 15) for end in range(28, 36)]:
        first, behind = expected(whole.coded, start, end)
        for suffix in (".mp4", ".mkv"):
            out = tmp_path / f"out{suffix}"
            made = clip(tmp_path, BEGUN_S + start / FPS + 0.001, BEGUN_S + (end - 0.5) / FPS, out)
            cut = content(gst, out)
            assert made.frames == len(cut.coded) == behind - first, (start, end, suffix, made, cut.coded)
            assert sorted(cut.coded) == list(range(behind - first)), (start, end, suffix)
            assert cut.shown == whole.shown[first:behind], (start, end, suffix)
            assert made.start_s == pytest.approx(BEGUN_S + first / FPS, abs=1e-3)
            assert made.end_s == pytest.approx(BEGUN_S + behind / FPS, abs=1e-3)
