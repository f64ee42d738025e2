"""`keepsight stream probe`: watch a source for a while and say what came, how old it was, and what happened."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Arrivals
from keepsight.streams.errors import KeepsightError, NoFrameError, UsageError
from keepsight.streams.events import Event, EventLog
from keepsight.streams.frame import Frame
from keepsight.streams.live import LiveSource
from keepsight.streams.source import Source
from keepsight.streams.uri import SourceURI

__all__ = ["Report", "add_probe", "probe"]

_SIZE = (224, 224)
_AGES_KEPT = 100_000  # an hour at 27 frames/s


@dataclass
class Report:
    """What a source did while it was watched.

    Attributes:
        uri: without passwords.
        seconds: for how long it was watched.
        caps: what it decodes to: width, height, and the fps that it states, if any.
        frames: handed over.
        fps: of the frames that came, read or not, over the time in which they came.
        age_ms: p50 and p95 of the frames' age when they were handed over; None for a file read as fast as possible.
        drops: frames that came and were not handed over, by cause (see `live.Drop`).
        corrupted: frames that were handed over although the decoder had marked them as damaged.
        generations: connections that gave frames.
        state: at the end.
        events: from the start.
        error: what it failed with, or None.
    """

    uri: str
    seconds: float = 0.0
    caps: dict[str, Any] = field(default_factory=dict)
    frames: int = 0
    fps: float | None = None
    age_ms: dict[str, float] | None = None
    drops: dict[str, int] = field(default_factory=dict)
    corrupted: int = 0
    generations: int = 0
    state: str = "connecting"
    events: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def note(self, event: Event) -> None:
        self.events.append({"t": round(event.t, 3), "state": event.state, "reason": event.reason})


def add_probe(group: typer.Typer) -> None:
    """Add the command to the group `stream`."""

    @group.command("probe")
    def probe_command(
        uri: Annotated[str, typer.Argument(metavar="URI", help="A camera, a file, a test pattern.")],
        seconds: Annotated[float, typer.Option(help="How long to watch it.")] = 10.0,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    ) -> None:
        """Watch a source and say what comes: size, rate, age of the frames, drops, and every loss with its reason.

        A camera that is lost, or not there yet, is tried again until the time is over. If nothing ever came, the exit code
        tells why.
        """
        report, error = probe(uri, seconds, on_event=None if as_json else _tell)
        if as_json:
            typer.echo(json.dumps(asdict(report), indent=2))
        else:
            _show(report)
        if error is not None:
            raise error


def probe(uri: str, seconds: float, *, on_event: Any = None) -> tuple[Report, KeepsightError | None]:
    """Watch a source, a file in real time.

    Args:
        uri: as `Source` takes it.
        seconds: how long; a file's end is earlier.
        on_event: called with each event as it happens.

    Returns:
        The report, and what to raise because nothing came at all, or a file could not be read to its end.

    Raises:
        UsageError: an address that makes no sense, or no time to watch it in.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"--seconds {seconds} makes no sense.", fix="Give a number above 0.")
    address = SourceURI.parse(uri)
    report = Report(address.redacted)
    watch = _watch_live if address.is_camera else _watch_file
    error = watch(uri, seconds, report, on_event)
    if error is not None:
        report.error = {"kind": error.kind, "exit_code": error.exit_code, "message": str(error)}
    return report, error


def _watch_live(uri: str, seconds: float, report: Report, on_event: Any) -> KeepsightError | None:
    last: list[KeepsightError] = []

    def seen(event: Event) -> None:
        report.note(event)
        if on_event is not None:
            on_event(event)

    source = LiveSource(uri, size=_SIZE, reconnect=Reconnect(at_start="wait"), on_event=seen, on_loss=last.append)
    begun = time.monotonic()
    rate, error = _Rate(), None
    with source:
        try:
            rate.read(_until(source, begun + seconds), source)
        except KeepsightError as final:
            error = final
        report.seconds, report.state = round(time.monotonic() - begun, 3), source.state
        report.drops, report.generations = {**source.drops}, source.generation + (source.state in ("live", "stalled"))
        report.corrupted = source.corrupted
        report.caps = _caps(source.arrivals)
    rate.tell(report, came=rate.frames + source.dropped - rate.before)
    if error is None and rate.frames == 0:
        error = last[-1] if last else NoFrameError(f"{source.uri} gave no frame within {seconds:g} s.", fix="Wait longer.")
    return error


def _watch_file(uri: str, seconds: float, report: Report, on_event: Any) -> KeepsightError | None:
    """A file has no connection to lose: connecting, live, and lost where it is damaged."""
    rate, error = _Rate(), None

    def seen(event: Event) -> None:
        report.note(event)
        if on_event is not None:
            on_event(event)

    log = EventLog(on_event=seen)
    log.add("connecting", "started")
    begun = time.monotonic()
    source: Source | None = None
    try:
        source = Source(uri, size=_SIZE, pace="realtime")
        with source:
            rate.read(_while(_told(source, log), begun + seconds), source)
            report.caps = _caps(source.arrivals)
    except KeepsightError as damage:
        log.add("lost", damage.message)
        error = damage
    report.seconds, report.state = round(time.monotonic() - begun, 3), log.state
    if source is not None:
        report.drops, report.corrupted = {**source.drops}, source.corrupted
    report.generations = int(rate.frames > 0)
    rate.tell(report, came=rate.frames + sum(report.drops.values()) - rate.before)
    return error


def _told(source: Source, log: EventLog) -> Iterator[Frame]:
    for frame in source:
        if log.state != "live":
            log.add("live", "first frame")
        yield frame


def _while(frames: Iterator[Frame], until: float) -> Iterator[Frame]:
    for frame in frames:
        yield frame
        if time.monotonic() >= until:
            return


def _until(source: LiveSource, until: float) -> Iterator[Frame]:
    while (left := until - time.monotonic()) > 0:
        frame = source.latest(left)
        if frame is not None:
            yield frame


class _Rate:
    """Frames as they come: how many, how old, how fast."""

    def __init__(self) -> None:
        self.frames = 0
        self.before = 0  # frames replaced before the first was read
        self._ages: list[float] = []
        self._played_s = 0.0
        self._last: Frame | None = None

    def read(self, frames: Iterator[Frame], source: LiveSource | Source) -> None:
        for frame in frames:
            if self._last is None:
                self.before = source.dropped
            if len(self._ages) < _AGES_KEPT:
                self._ages.append(frame.age_ms)
            if self._last is not None and self._last.generation == frame.generation:  # an outage is no time of playing
                self._played_s += frame.time_s - self._last.time_s
            self.frames, self._last = self.frames + 1, frame

    def tell(self, report: Report, came: int) -> None:
        report.frames = self.frames
        intervals = came - max(1, report.generations)
        report.fps = round(intervals / self._played_s, 2) if self._played_s > 0 and intervals > 0 else None
        if self._ages:
            ordered = sorted(self._ages)
            report.age_ms = {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in _SHARES.items()}


_SHARES = {"p50": 0.5, "p95": 0.95}


def _caps(arrivals: Arrivals | None) -> dict[str, Any]:
    if arrivals is None or arrivals.size is None:
        return {}
    stated = arrivals.stated_interval_s
    return {"width": arrivals.size[0], "height": arrivals.size[1], "fps": None if stated is None else round(1 / stated, 3)}


def _tell(event: Event) -> None:
    typer.echo(f"{event.t:8.2f} s  {event.state:<10}  {event.reason}", err=True)


def _show(report: Report) -> None:
    size = f"{report.caps['width']}x{report.caps['height']}" if report.caps else "unknown size"
    stated = f", {report.caps['fps']:g} fps stated" if report.caps.get("fps") else ""
    came = "" if report.fps is None else f", {report.fps:g} fps came"
    typer.echo(f"{report.uri}: {size}{stated}{came}")
    causes = ", ".join(f"{count} {cause}" for cause, count in Counter(report.drops).items()) or "none"
    connections = f"{report.generations} connection{'' if report.generations == 1 else 's'}"
    typer.echo(f"{report.frames} frames in {report.seconds:.1f} s over {connections}; drops: {causes}")
    if report.age_ms is not None:
        typer.echo(f"age when handed over: p50 {report.age_ms['p50']:g} ms, p95 {report.age_ms['p95']:g} ms")
