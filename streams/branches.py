"""Side branches of a pipeline: what a recorder or a preview hangs on it, kept from ever stopping the frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from keepsight.streams.errors import UsageError
from keepsight.streams.gst import BRANCH_PREFIX, is_inside, launch_bin, load_gst

__all__ = ["BRANCH_ELEMENTS", "SHIELD", "Branch", "Place", "attach"]

Point = Literal["coded", "decoded"]

# A branch too slow loses pictures here. Coded ones are small, and a recorder may wait for a disk; raw ones are large, and only
# the newest are worth anything.
_QUEUES = {
    "coded": "queue leaky=downstream max-size-buffers=0 max-size-bytes=16777216 max-size-time=5000000000",
    "decoded": "queue leaky=downstream max-size-buffers=2 max-size-bytes=0 max-size-time=0",
}


@dataclass(frozen=True, slots=True)
class Branch:
    """A side branch of a pipeline.

    It can't stop the frames: it lies behind a leaky queue, what its elements return is not passed on, and its errors are not
    the source's. After a gap that the queue left, the first buffer carries DISCONT: a recorder goes on at the next key frame.

    Attributes:
        point: where it begins. `coded`: the parsed elementary stream before the decoder, as it comes (H.264, H.265, JPEG...); of
            a source that has none (csi, raw v4l2, test) the pictures are encoded to H.264 for it. `decoded`: raw video in
            host memory, behind the decoder, in full size.
        launch: its elements in gst-launch's language; the first one's sink pad is linked, and no other pad may be left open. A
            tee gives only what all its branches take: begin a decoded one with `videoconvert`, which takes everything.
        elements: what must be installed for it.
        setup: called with the built, not yet started pipeline.
        on_error: called with GStreamer's sentence when an element of it fails, from a thread of GStreamer's.
        finish: called with the pipeline before it is stopped, for what is still to be written; it must return within a second
            or so, whatever hangs.
    """

    point: Point
    launch: str
    elements: tuple[str, ...] = ()
    setup: Callable[[Any], None] | None = None
    on_error: Callable[[str], None] | None = None
    finish: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        if self.point not in _QUEUES:
            raise UsageError(f"there is no branch point {self.point!r}.", fix="Use 'coded' or 'decoded'.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a recipe puts a branch.

    Attributes:
        branch: what hangs there.
        tee: name of the tee it hangs on.
        lead: elements between the queue and the branch, in gst-launch's language: an encoder, or a copy to host memory.
        lead_elements: what must be installed for it.
    """

    branch: Branch
    tee: str
    lead: str = ""
    lead_elements: tuple[str, ...] = ()

    @property
    def launch(self) -> str:
        """All its elements in gst-launch's language."""
        lead = f"{self.lead} ! " if self.lead else ""
        return f"{SHIELD} ! {_QUEUES[self.branch.point]} ! {lead}{self.branch.launch}"

    @property
    def elements(self) -> tuple[str, ...]:
        """What must be installed."""
        return (*self.lead_elements, *self.branch.elements)


# A tee passes on what any of its branches returns, and an error would end the stream for all.
SHIELD = "errorignore ignore-error=true ignore-eos=true ignore-notlinked=true ignore-notnegotiated=true convert-to=ok"
BRANCH_ELEMENTS = ("tee", "errorignore", "queue")


def attach(pipeline: Any, places: tuple[Place, ...]) -> None:
    """Hang branches on the tees of a built, not started pipeline."""
    gst = load_gst()
    for number, place in enumerate(places):
        side = launch_bin(place.launch)
        side.set_name(f"{BRANCH_PREFIX}{number}")
        _free_sinks(gst, side)
        pipeline.add(side)
        pipeline.get_by_name(place.tee).link(side)
        if place.branch.on_error is not None:
            _report_errors(pipeline.get_bus(), side.get_name(), place.branch.on_error)
    for place in places:
        if place.branch.setup is not None:
            place.branch.setup(pipeline)


def _free_sinks(gst: Any, side: Any) -> None:
    """The pipeline starts when all its sinks have a picture: not when one in a branch waits for a key frame."""
    sinks = side.iterate_sinks()
    while True:
        result, sink = sinks.next()
        if result != gst.IteratorResult.OK:
            return
        if sink.find_property("async") is not None:
            sink.set_property("async", False)


def _report_errors(bus: Any, name: str, on_error: Callable[[str], None]) -> None:
    def on_message(bus: Any, message: Any) -> None:
        if is_inside(message.src, name):
            on_error(message.parse_error()[0].message)

    bus.enable_sync_message_emission()
    bus.connect("sync-message::error", on_message)
