"""What a pipeline does with each picture, and when: pad probes that are there only while somebody profiles.

A probe notes a picture's presentation time and the clock, nothing else: no picture is mapped, copied or held. Points are matched
by presentation time, since a decoder may hand pictures out in another order than it got them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from keepsight.streams.gst import load_gst
from keepsight.streams.padprobes import add_probe
from keepsight.streams.pipelines import FRAMES, TAP

__all__ = ["PictureTimes", "PipelineTiming"]

# Pictures on their way at once: queues and decoders hold tens. Those that a sampler refused are forgotten as newer ones come.
_KEPT = 512
_INSIDE = 64  # in a decoder alone


@dataclass(frozen=True, slots=True)
class PictureTimes:
    """A picture's way through a pipeline. Moments are seconds of `time.perf_counter()`, spans milliseconds.

    Attributes:
        entered: the encoded picture went into the decoder; of a source that has none, the picture came from it.
        decoded: out of the decoder.
        scaling: out of the queue in front of the scaler, which only what is live has; else as `decoded`.
        scaled: at the pipeline's end, upright, scaled and converted.
        taken: the reader took it from there.
        copied: in memory of its own.
        done: ready for the reader, scaled by software where the view asks for that.
        held_ms: of the time in the decoder, what its thread spent behind it, on other pictures: where a full queue stopped it.
    """

    entered: float
    decoded: float
    scaling: float
    scaled: float
    taken: float
    copied: float
    done: float
    held_ms: float = 0.0

    @property
    def decode_ms(self) -> float:
        return 1000 * (self.decoded - self.entered) - self.held_ms

    @property
    def scale_ms(self) -> float:
        return 1000 * (self.scaled - self.scaling + self.done - self.copied)

    @property
    def copy_ms(self) -> float:
        return 1000 * (self.copied - self.taken)

    @property
    def wait_ms(self) -> float:
        """In queues, before and behind the scaler, and in the decoder while its thread was elsewhere."""
        return 1000 * (self.scaling - self.decoded + self.taken - self.scaled) + self.held_ms


class _Moments:
    """When a point saw a picture, by its presentation time; the oldest are forgotten."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}

    def note(self, pts: int, now: float, *, first: bool = False) -> None:
        at = self._at
        if first and pts in at:
            return
        at.pop(pts, None)  # so that what is seen again is the newest
        at[pts] = now
        if len(at) > _KEPT:
            del at[next(iter(at))]

    def of(self, pts: int) -> float | None:
        return self._at.get(pts)


class PipelineTiming:
    """Times every picture of the pipelines that it is attached to, one after the other.

    Give it to a `Source`; ask `of` for each frame as it comes.

    Attributes:
        attached: whether there was a pipeline; pictures and arrays that lie ready have none.
        decodes: whether a decoder has been seen in it; a raw camera and a test pattern have none.
        unmatched: pictures that were read and of which a point was missed.
    """

    def __init__(self) -> None:
        self.attached, self.unmatched = False, 0
        self._clear()

    def _clear(self) -> None:
        self.decodes = False
        self._entered, self._decoded, self._scaling, self._scaled = (_Moments() for _ in range(4))
        self._room = 0  # pictures that the sink holds before it stops the decoder's thread; 0 = it never does
        self._arrived = self._read = 0
        self._behind: deque[tuple[int, float, float]] = deque(maxlen=_INSIDE)  # which arrival, decoded when, scaled when
        self._takes: deque[float] = deque(maxlen=_KEPT)
        self._done: dict[int, PictureTimes] = {}

    def attach(self, pipeline: Any) -> None:
        """Put probes on a built, not started pipeline of `pipelines.recipe_for`."""
        self._clear()
        self.attached = True
        gst = load_gst()
        tap, sink = pipeline.get_by_name(TAP), pipeline.get_by_name(FRAMES)
        _on_buffers(tap.get_static_pad("sink"), self._decoded.note)
        if tap.get_factory().get_name() == "queue":  # a thread of its own scales
            _on_buffers(tap.get_static_pad("src"), self._scaling.note)
            _on_buffers(sink.get_static_pad("sink"), self._scaled.note)
        else:
            self._scaling = self._decoded
            self._room = 0 if sink.get_property("drop") else sink.get_property("max-buffers")
            _on_buffers(sink.get_static_pad("sink"), self._arrives)
        elements = pipeline.iterate_recurse()
        while True:
            result, element = elements.next()
            if result != gst.IteratorResult.OK:
                break
            self._watch_decoder(element)
        pipeline.connect("deep-element-added", lambda _pipeline, _bin, element: self._watch_decoder(element))

    def taken(self, pts: int | None, taken: float, copied: float, done: float) -> None:
        """The reader has a picture: it took, copied, and finished it at these moments."""
        self._takes.append(taken)
        self._read += 1
        times = None if pts is None else self._times(pts, taken, copied, done)
        if times is None or pts is None:
            self.unmatched += 1
            return
        self._done[pts] = times
        if len(self._done) > _KEPT:
            del self._done[next(iter(self._done))]

    def of(self, pts: int | None) -> PictureTimes | None:
        """The times of a picture that was read, once; None where one of its points was missed."""
        return None if pts is None else self._done.pop(pts, None)

    def _times(self, pts: int, taken: float, copied: float, done: float) -> PictureTimes | None:
        decoded, scaling, scaled = (moments.of(pts) for moments in (self._decoded, self._scaling, self._scaled))
        entered = self._entered.of(pts) if self.decodes else decoded
        if entered is None or decoded is None or scaling is None or scaled is None:
            return None
        return PictureTimes(entered, decoded, scaling, scaled, taken, copied, done, 1000 * self._held_s(entered, decoded))

    def _arrives(self, pts: int, now: float) -> None:
        began = self._decoded.of(pts)
        self._scaled.note(pts, now)
        if began is not None:
            self._behind.append((self._arrived, began, now))
        self._arrived += 1

    def _held_s(self, entered: float, decoded: float) -> float:
        """Seconds that the decoder's thread was behind the decoder between two moments: scaling, or stopped by a full sink."""
        held, next_start = 0.0, decoded
        for number, start, scaled in reversed(self._behind.copy()):
            end = min(max(scaled, self._let_in(number)), next_start)  # the reader's clock runs a little behind the thread
            if end < entered:
                break
            held += max(0.0, end - max(start, entered))
            next_start = min(start, decoded)
        return held

    def _let_in(self, number: int) -> float:
        """When a full sink had room for an arrival: when so many pictures before it were taken as it does not hold."""
        take = number - self._room  # which take, of all
        index = take - (self._read - len(self._takes))
        return self._takes[index] if self._room and take >= 0 and 0 <= index < len(self._takes) else 0.0

    def _watch_decoder(self, element: Any) -> None:
        factory = element.get_factory()
        kind = "" if factory is None else factory.get_metadata("klass")
        if "Decoder" not in kind or not ("Video" in kind or "Image" in kind):
            return
        pad = element.get_static_pad("sink")
        if pad is not None:
            self.decodes = True
            # Of a decoder within a decoder, the outer one's moment counts.
            _on_buffers(pad, lambda pts, now: self._entered.note(pts, now, first=True))


def _on_buffers(pad: Any, note: Callable[[int, float], None]) -> None:
    def on_data(buffer: Any, _event: Any) -> bool:
        if buffer is not None:
            note(buffer.pts, perf_counter())
        return True

    add_probe(pad, on_data)
