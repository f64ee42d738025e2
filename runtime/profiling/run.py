"""A profile: everything opened, a source watched and questions asked in repeated runs, and all of it put into one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING

from keepsight.runtime.profiling.energy import Span, energy_of
from keepsight.runtime.profiling.load import Loaded, Setup, load
from keepsight.runtime.profiling.questions import Put, shipped_clip
from keepsight.runtime.profiling.report import Contention, Layer, MemoryUse, Moment, Phase, Profile, Question
from keepsight.runtime.profiling.sampler import Sampler, SensorReader
from keepsight.runtime.sensors import Sensors
from keepsight.streams import SourceURI
from keepsight.streams.errors import UsageError

if TYPE_CHECKING:
    from keepsight.runtime.profiling.stages import Sample

__all__ = ["Options", "profile"]

Tell = Callable[[str, int, int], None]
"""Called with what is done now, and with how many steps of how many are done."""


@dataclass(frozen=True)
class Options:
    """What is profiled, and how often.

    Attributes:
        setup: the bundle, and what runs it.
        source: None for the shipped clip.
        questions: None for those of the shipped clip.
        frames: counted in each run; a file is played over and over until they are there.
        warmup: frames before them that are not counted, in each run; None = until the memory is full.
        runs: times that all of it is repeated, each with an empty memory.
        contention: seconds for each part of vision against language model; None = not measured.
        idle_s: seconds that the meter is read before anything is loaded, if there is a meter.
        sensor_hz: readings of sensors and memory a second.
        command: as it was typed.
    """

    setup: Setup
    source: str | None = None
    questions: tuple[Put, ...] | None = None
    frames: int = 60
    warmup: int | None = None
    runs: int = 5
    contention: float | None = None
    idle_s: float = 3.0
    sensor_hz: float = 2.0
    command: str = "keepsight profile run"


@dataclass
class Measured:
    """What was measured beside the sensors; spans are in seconds of `time.perf_counter()`.

    Attributes:
        frames, answers: samples, in their order.
        seen: frames in the spans.
        dropped: live frames that newer ones replaced.
        unmatched: frames that a point of the pipeline did not see.
        resident: bytes, at the end of each run.
    """

    phases: list[Phase]
    frames: list[Sample] = field(default_factory=list)
    answers: list[Sample] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    frame_spans: list[Span] = field(default_factory=list)
    answer_spans: list[Span] = field(default_factory=list)
    seen: int = 0
    dropped: int = 0
    unmatched: int = 0
    live: bool = False
    resident: list[int] = field(default_factory=list)
    components: list[MemoryUse] = field(default_factory=list)
    contention: Contention | None = None
    layers: list[Layer] = field(default_factory=list)

    @property
    def fps(self) -> float:
        """Frames a second of the spans."""
        return self.seen / sum(end - start for start, end in self.frame_spans)


def profile(
    options: Options,
    tell: Tell = lambda what, done, of: None,
    *,
    sensors: SensorReader | None = None,
    prepare: Callable[[Loaded], None] = lambda loaded: None,
) -> Profile:
    """Open everything and measure it.

    Args:
        tell: for a progress bar.
        sensors: this machine's by default.
        prepare: called when everything is loaded, before anything is measured.

    Raises:
        UsageError: numbers that make no sense; a source that ends before a frame is counted.
        KeepsightError: what opening, watching or asking raises.
    """
    _check(options)
    sensors = Sensors() if sensors is None else sensors
    idle_watts, meter = _idle(sensors, options.idle_s)
    with ExitStack() as stack:
        with Sampler(sensors, hz=options.sensor_hz) as sampler:
            loaded = stack.enter_context(load(options.setup))
            prepare(loaded)
            with _source_and_questions(options, loaded) as (address, questions):
                measured = _measure(options, loaded, address, questions, tell)
        head = _head(options, loaded, sensors)
    return _report(options, head, measured, sampler, idle_watts, meter, shown=_shown(options.source))


def _check(options: Options) -> None:
    if options.frames < 1 or options.runs < 1 or (options.warmup or 0) < 0:
        raise UsageError(
            f"{options.runs} runs of {options.frames} frames after {options.warmup} can't be measured.",
            fix="Give at least one run, one frame, and no negative warm-up.",
        )


def _idle(sensors: SensorReader, seconds: float) -> tuple[float | None, str]:
    """Mean watts of the whole board before anything is loaded, and the rails that are summed for it."""
    reading = sensors.read()
    if reading.watts is None:
        return None, ""
    meter = " + ".join(power.rail for power in reading.powers if power.whole_board)
    watts = [reading.watts]
    until = perf_counter() + seconds
    while perf_counter() < until:
        time.sleep(0.1)
        watts += [found for found in (sensors.read().watts,) if found is not None]
    return fmean(watts), meter


def _shown(source: str | None) -> str:
    return "the shipped clip" if source is None else SourceURI.parse(source).redacted


@contextmanager
def _source_and_questions(options: Options, loaded: Loaded) -> Iterator[tuple[str, tuple[Put, ...]]]:
    """The address to watch and what to ask; the shipped clip is made for them where none is given."""
    with TemporaryDirectory(prefix="keepsight-") as folder:
        source, questions = options.source, options.questions
        if source is None or (questions is None and loaded.bundle.has_llm):
            clip, shipped = shipped_clip(Path(folder), fps=loaded.bundle.manifest.sample_fps)
            source, questions = source or str(clip), questions or tuple(shipped)
        yield _played_over(source), questions or ()


def _played_over(source: str) -> str:
    """A file that is played for as long as frames are wanted."""
    uri = SourceURI.parse(source)
    if uri.kind != "file" or "loop" in uri.options:
        return source
    return f"{source}{'&' if uri.options else '?'}loop=0"


def _measure(options: Options, loaded: Loaded, address: str, questions: tuple[Put, ...], tell: Tell) -> Measured:
    from keepsight.runtime.profiling.contention import competitor, contend
    from keepsight.runtime.profiling.layers import layer_times
    from keepsight.runtime.profiling.memory import components, resident
    from keepsight.runtime.profiling.passes import ask_all, stand_all, start_cold, watch

    if options.contention is not None:
        competitor(loaded)  # refused before minutes are spent
    warmup = loaded.bundle.manifest.dims.slots if options.warmup is None else options.warmup
    steps = options.runs * (warmup + options.frames + len(questions))
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        tell(what, done, steps)

    tell("first frame, first answer", 0, steps)
    measured = Measured([*loaded.phases, *start_cold(loaded, address)])
    for run in range(options.runs):
        standing = stand_all(loaded, questions)
        ring_bytes = watch(loaded, address, measured, run, warmup, options.frames, lambda: step("frames"))
        ask_all(loaded, questions, standing, measured, run, lambda: step("questions"))
        measured.resident.append(resident())
        measured.components = components(loaded, loaded.session.standing, ring_bytes=ring_bytes)
        loaded.session.forget()
    measured.layers = layer_times(loaded, address)
    if options.contention is not None:
        tell("vision against language model", steps, steps)
        measured.contention = contend(loaded, address, seconds=options.contention)
    return measured


def _head(options: Options, loaded: Loaded, sensors: SensorReader) -> dict[str, object]:
    """What a report says of the bundle and the machine."""
    from keepsight.runtime.profiling.machine import this_machine
    from keepsight.runtime.storage.snapshot import fingerprint

    manifest, setup = loaded.bundle.manifest, options.setup
    machine = this_machine(sensors, gpu=setup.backend != "cpu")
    return {
        "keepsight": machine.versions.get("keepsight", "unknown"),
        "bundle": manifest.name,
        "fingerprint": fingerprint(loaded.bundle),
        "variant": loaded.bundle.variant,
        "backend": setup.backend,
        "memory_policy": setup.memory,
        "dims": {**manifest.dims.model_dump(mode="json"), "threads": setup.threads},
        "language_model": _language_model(loaded),
        "machine": machine,
    }


def _language_model(loaded: Loaded) -> str | None:
    """The file's name, and what it was requantised to: a requantised file is called after its hash."""
    info = loaded.bundle.manifest.llm
    if info is None:
        return None
    return Path(info.file).name + (f" as {info.quantise}" if info.quantise else "")


def _report(
    options: Options,
    head: dict[str, object],
    measured: Measured,
    sampler: Sampler,
    idle_watts: float | None,
    meter: str,
    *,
    shown: str,
) -> Profile:
    from keepsight.runtime.profiling.memory import process_use, system_use
    from keepsight.runtime.profiling.stages import stages_of

    def spans(of: Sequence[Span]) -> list[Span]:
        return [(sampler.at(start), sampler.at(end)) for start, end in of]

    energy = energy_of(
        sampler.moments, idle_watts, meter=meter, frames=measured.seen, frame_spans=spans(measured.frame_spans),
        answers=len(measured.answers), answer_spans=spans(measured.answer_spans),
    )  # fmt: skip
    return Profile(
        **head,  # type: ignore[arg-type]
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=options.command,
        source=shown,
        frames=len(measured.frames),
        fps=measured.fps,
        drops={"replaced by a newer frame": measured.dropped} if measured.live else {},
        runs=options.runs,
        run_of_frame=tuple(sample.run for sample in measured.frames),
        run_of_question=tuple(sample.run for sample in measured.answers),
        cold_start=tuple(measured.phases),
        stages=(*stages_of(measured.frames, "frame"), *stages_of(measured.answers, "question")),
        questions=tuple(measured.questions),
        memory=(
            process_use(measured.resident, sampler.moments),
            *(system_use(sampler.available) if options.setup.backend != "cpu" else ()),
            *measured.components,
        ),
        timeline=tuple(sampler.moments),
        energy=energy,
        layers=tuple(measured.layers),
        contention=measured.contention,
        notes=tuple(_notes(options, measured, sampler.moments)),
    )


def _notes(options: Options, measured: Measured, timeline: Sequence[Moment]) -> Iterator[str]:
    if not measured.live:
        yield "A file is read as fast as it goes: its pictures wait for the session, and `wait` says how long."
    yield "Files were cached or not, as the cold start found them."
    if measured.unmatched:
        yield f"{measured.unmatched} frames were not counted: a point of the pipeline did not see them."
    slow = [moment.throttled for moment in timeline if moment.throttled]
    if slow:
        causes = ", ".join(sorted({cause for found in slow for cause in found}))
        yield f"The machine was slowed down in {len(slow)} of {len(timeline)} readings: {causes}."
    if not measured.answers:
        yield "No question was answered."
    if options.setup.urgent:
        yield "The graphs ran on a stream that goes before the language model's."
