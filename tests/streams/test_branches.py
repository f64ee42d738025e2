"""Side branches of a real file and of a real RTSP camera: they deliver beside the frames and never stop them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from keepsight.streams import SourceURI, UsageError
from keepsight.streams.branches import Branch
from keepsight.streams.capture import Timeouts
from keepsight.streams.gst import first_error, sample_to_array
from keepsight.streams.pipelines import FRAMES, Delivery, build, recipe_for
from keepsight.streams.view import View

if TYPE_CHECKING:
    from conftest import RtspServer

SMALL = View((64, 48))
PATIENCE = Timeouts(first_frame_s=20, stall_s=20)


class Watched:
    """A branch that ends in an appsink, whose samples are counted."""

    def __init__(self, point: Any, lead: str = "", *, element: str | None = None) -> None:
        self.errors: list[str] = []
        self.sink: Any = None
        tail = element or f"appsink name=side-{point} sync=false max-buffers=1000"
        self.name = None if element else f"side-{point}"
        self.branch = Branch(point, lead + tail, ("appsink",), self._find, self.errors.append)

    def _find(self, pipeline: Any) -> None:
        self.sink = pipeline.get_by_name(self.name) if self.name else None

    def samples(self, gst: Any, at_least: int, within_s: float = 20) -> list[Any]:
        found: list[Any] = []
        until = time.monotonic() + within_s
        while len(found) < at_least and time.monotonic() < until:
            sample = self.sink.try_pull_sample(gst.SECOND // 10)
            if sample is not None:
                found.append(sample)
        return found


def play(gst: Any, uri: str | Path, branches: list[Watched], delivery: Delivery, wanted: int) -> tuple[Any, list[Any]]:
    """Play until that many frames have come, or the source ends; the pipeline goes on."""
    pipeline = build(recipe_for(SourceURI.parse(uri), SMALL, delivery, [watched.branch for watched in branches]))
    pipeline.set_state(gst.State.PLAYING)
    sink, frames, until = pipeline.get_by_name(FRAMES), [], time.monotonic() + 20
    while len(frames) < wanted and time.monotonic() < until and not sink.get_property("eos"):
        sample = sink.try_pull_sample(gst.SECOND // 20)
        if sample is not None:
            frames.append(sample)
        error = first_error(pipeline.get_bus())
        assert error is None, error.parse_error()
    return pipeline, frames


def kinds(samples: list[Any]) -> set[str]:
    return {sample.get_caps().get_structure(0).get_name() for sample in samples}


@pytest.mark.parametrize("name", ["plain.mp4", "clip.mkv", "long_sound.mp4"])
def test_a_file_hands_out_its_coded_and_its_decoded_pictures_beside_the_frames(gst: Any, media: Path, name: str) -> None:
    coded, decoded = Watched("coded"), Watched("decoded")
    pipeline, frames = play(gst, media / name, [coded, decoded], "every", 100)
    try:
        assert len(frames) == 100
        packets = coded.samples(gst, 100)
        assert len(packets) == 100 and kinds(packets) == {"video/x-h264"}
        # The decoded branch keeps two pictures at most when it is not read quickly: the newest are there.
        pictures = decoded.samples(gst, 3)
        assert kinds(pictures) == {"video/x-raw"}
        assert pictures[0].get_caps().get_structure(0).get_value("width") == 160  # in full size
    finally:
        pipeline.set_state(gst.State.NULL)


def test_the_frames_are_the_same_with_branches_and_without(gst: Any, media: Path) -> None:
    plain, alone = play(gst, media / "plain.mp4", [], "every", 30)
    both, beside = play(gst, media / "plain.mp4", [Watched("coded"), Watched("decoded")], "every", 30)
    plain.set_state(gst.State.NULL)
    both.set_state(gst.State.NULL)
    assert [s.get_buffer().pts for s in alone] == [s.get_buffer().pts for s in beside]
    assert all((sample_to_array(a) == sample_to_array(b)).all() for a, b in zip(alone, beside, strict=True))


def test_a_camera_hands_out_its_coded_and_its_decoded_pictures(gst: Any, rtsp_server: RtspServer) -> None:
    coded, decoded = Watched("coded"), Watched("decoded")
    pipeline, frames = play(gst, rtsp_server.url("/ball"), [coded, decoded], "newest", 10)
    try:
        assert len(frames) == 10
        assert kinds(coded.samples(gst, 10)) == {"video/x-h264"}
        assert kinds(decoded.samples(gst, 10)) == {"video/x-raw"}
    finally:
        pipeline.set_state(gst.State.NULL)


def test_a_source_without_a_coded_stream_is_encoded_for_the_branch(gst: Any) -> None:
    coded = Watched("coded")
    pipeline, frames = play(gst, "test://ball?width=160&height=120", [coded], "newest", 10)
    try:
        assert len(frames) == 10 and kinds(coded.samples(gst, 10)) == {"video/x-h264"}
    finally:
        pipeline.set_state(gst.State.NULL)


FAILING = [
    ("decoded", "identity error-after=2 ! fakesink"),
    ("coded", "identity error-after=2 ! fakesink"),
]


@pytest.mark.parametrize(("point", "element"), FAILING)
def test_a_branch_that_fails_does_not_end_the_frames(gst: Any, media: Path, point: str, element: str) -> None:
    failing = Watched(point, element=element)
    pipeline, frames = play(gst, media / "plain.mp4", [failing], "every", 100)
    pipeline.set_state(gst.State.NULL)
    assert len(frames) == 100 and failing.errors


def test_a_branch_that_is_never_read_does_not_stall_the_frames(gst: Any, media: Path) -> None:
    unread = [Watched(point, element="appsink sync=false max-buffers=1") for point in ("coded", "decoded")]
    pipeline, frames = play(gst, media / "plain.mp4", unread, "every", 100)
    pipeline.set_state(gst.State.NULL)
    assert len(frames) == 100


def test_no_branch_no_tee() -> None:
    recipe = recipe_for(SourceURI.parse("a.mp4"), SMALL, "every")
    assert "tee" not in recipe.elements and "parsebin" not in recipe.elements and not recipe.places


def test_a_branch_begins_at_a_point_that_there_is() -> None:
    with pytest.raises(UsageError, match="no branch point 'scaled'"):
        Branch("scaled", "fakesink")  # type: ignore[arg-type]
