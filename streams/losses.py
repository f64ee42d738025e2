"""Pictures that go into a decoder and never come out of it: GStreamer lets damaged ones go without a word."""

from __future__ import annotations

from collections import deque
from typing import Any

from keepsight.streams.gst import BRANCH_PREFIX, is_inside, load_gst
from keepsight.streams.padprobes import add_probe

__all__ = ["DecoderWatch", "Ledger"]

# A decoder holds pictures back for their order (16 at most) and for its threads: what has not come out after so many more went
# in never will.
_WINDOW = 64

# Of streams whose coded pictures bear no times, only numbers can be compared. Of those that reorder, a healthy decoder may keep
# its last ones (MPEG-4 with B-frames in AVI, FFmpeg's decoder: 2).
_KEPT_AT_END = 2

# Of interlaced video, two coded pictures closer than this part of the frames' interval may be the fields of one frame.
_ONE_FRAME = 0.75


class Ledger:
    """Coded pictures in, decoded ones out, matched by their presentation times: what is missing was lost in between.

    It claims no loss that it can't be sure of. Not counted are: pictures before the first key frame (a camera joined in
    mid-stream), pictures to be shown before that (of an open group), of interlaced video what may be the second field of a frame
    that was shown, and what is still inside. Times are in ns, of one segment.

    >>> ledger = Ledger()
    >>> for pts in (0, 40, 80, 120):
    ...     ledger.entered(pts, is_key=pts == 0)
    >>> for pts in (0, 40, 120):
    ...     ledger.left(pts)
    >>> ledger.ended()
    >>> ledger.lost, ledger.total
    (1, 4)
    """

    def __init__(self) -> None:
        self.shown = 0
        self.corrupted = 0  # decoded, and marked by the decoder as damaged
        self.interlaced = False
        self._lost = self._serial = self._dated = self._undated = self._strangers = 0
        self._begun = self._over = False
        self._first_pts: int | None = None
        self._inside: dict[int, int] = {}  # serial by time, in the order of decoding
        self._out: deque[int] = deque(maxlen=4 * _WINDOW)
        self._interval: int | None = None

    @property
    def lost(self) -> int:
        """Pictures that went in and did not come out; of streams without times, known only at their end."""
        if self._by_number:
            missing = self._dated + self._undated - self.shown
            return max(0, missing - _KEPT_AT_END) if self._over else 0
        # What came out with a time that never went in is one of those that seem to be missing.
        return max(0, self._lost - self._strangers)

    @property
    def total(self) -> int:
        """Pictures that should have come out so far."""
        return self.shown + self.lost

    def entered(self, pts: int | None, *, is_key: bool) -> None:
        """A coded picture that is to be shown goes into the decoder."""
        if not (self._begun or is_key):
            return
        if not self._begun:
            self._begun, self._first_pts = True, pts
        if pts is None:
            self._undated += 1
            return
        if pts in self._inside or (self._first_pts is not None and pts < self._first_pts):
            return
        self._dated += 1
        self._serial += 1
        self._inside[pts] = self._serial
        while self._inside and next(iter(self._inside.values())) <= self._serial - _WINDOW:
            self._judge(next(iter(self._inside)))

    def left(self, pts: int | None, *, corrupted: bool = False) -> None:
        """A decoded picture comes out."""
        self.shown += 1
        self.corrupted += corrupted
        if pts is None:
            return
        if self._out and pts > self._out[-1]:
            step = pts - self._out[-1]
            self._interval = step if self._interval is None else min(self._interval, step)
        self._out.append(pts)
        self._strangers += self._inside.pop(pts, None) is None

    def moved(self) -> None:
        """Times begin anew: a new segment."""
        self._first_pts = None

    def ended(self) -> None:
        """The stream is over, and the decoder has given all that it had."""
        for pts in list(self._inside):
            self._judge(pts)
        self._over = True

    @property
    def _by_number(self) -> bool:
        return self._undated > self._dated

    def _judge(self, pts: int) -> None:
        del self._inside[pts]
        near = 0 if self._interval is None or not self.interlaced else _ONE_FRAME * self._interval
        self._lost += not any(abs(pts - shown) < near for shown in self._out)


class DecoderWatch:
    """Keeps a `Ledger` of each video decoder that a pipeline has or comes to have; nothing is copied.

    To be made before the pipeline starts. It does not hold the pipeline.
    """

    def __init__(self, pipeline: Any) -> None:
        self._gst = load_gst()
        self._ledgers: list[Ledger] = []
        elements = pipeline.iterate_recurse()
        while (found := elements.next())[0] == self._gst.IteratorResult.OK:
            self._look(found[1])
        pipeline.connect("deep-element-added", self._on_added)

    @property
    def ledger(self) -> Ledger:
        """Of the decoder whose pictures are read: one that nobody reads stops at its first. An empty one if there is none."""
        return max(self._ledgers, key=lambda ledger: ledger.shown, default=_NOTHING)

    def _on_added(self, pipeline: Any, parent: Any, element: Any) -> None:
        self._look(element)

    def _look(self, element: Any) -> None:
        kinds = (element.get_metadata("klass") or "").split("/")
        of_pictures = "Decoder" in kinds and ("Video" in kinds or "Image" in kinds)
        if not of_pictures or isinstance(element, self._gst.Bin) or is_inside(element, BRANCH_PREFIX):
            return
        into, out_of = element.get_static_pad("sink"), element.get_static_pad("src")
        if into is None or out_of is None:
            return
        watched = _Watched()
        self._ledgers.append(watched.ledger)
        add_probe(into, watched.on_coded)
        add_probe(out_of, watched.on_decoded)


class _Watched:
    """What goes into one decoder, and what comes out of it. Its probes run for every picture: what events say is kept."""

    def __init__(self) -> None:
        gst = load_gst()
        self._none, self._kinds, self._time = gst.CLOCK_TIME_NONE, gst.EventType, gst.Format.TIME
        flags = gst.BufferFlags
        self._delta, self._unseen, self._corrupted = int(flags.DELTA_UNIT), int(flags.DECODE_ONLY), int(flags.CORRUPTED)
        self._start, self._stop = 0, self._none  # what is to be shown, in ns
        self._is_vp8 = False
        self.ledger = Ledger()

    def on_coded(self, buffer: Any, event: Any) -> bool:
        if buffer is None:
            self._read(event)
            return True
        pts: int = buffer.pts
        flags = buffer.flags
        # Outside of the segment it is decoded only for what follows.
        is_shown = pts == self._none or self._start <= pts < self._stop
        if is_shown and not flags & self._unseen and not (self._is_vp8 and _is_hidden(buffer.whole)):
            self.ledger.entered(None if pts == self._none else pts, is_key=not flags & self._delta)
        return True

    def on_decoded(self, buffer: Any, event: Any) -> bool:
        if buffer is not None:
            pts = buffer.pts
            self.ledger.left(None if pts == self._none else pts, corrupted=bool(buffer.flags & self._corrupted))
            return True
        if event.type == self._kinds.EOS:
            self.ledger.ended()
        elif event.type == self._kinds.CAPS:
            mode = event.parse_caps().get_structure(0).get_string("interlace-mode")
            self.ledger.interlaced = self.ledger.interlaced or mode not in (None, "progressive")
        return True

    def _read(self, event: Any) -> None:
        if event.type == self._kinds.CAPS:
            self._is_vp8 = event.parse_caps().get_structure(0).get_name() == "video/x-vp8"
        elif event.type == self._kinds.SEGMENT:
            segment = event.parse_segment()
            timed = segment.format == self._time
            self._start, self._stop = (segment.start, segment.stop) if timed else (0, self._none)
            self.ledger.moved()


_NOTHING = Ledger()


def _is_hidden(buffer: Any) -> bool:
    """Whether this is a picture of VP8 that others refer to and nobody sees: `show_frame` is 0 (RFC 6386, section 9.1)."""
    return buffer.get_size() > 0 and not buffer.extract_dup(0, 1)[0] & 0x10
