"""Several reports of the same thing as one, each of them its runs: where a machine's load drifts, profile two things in turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median

from keepsight.runtime.profiling.report import Energy, MemoryUse, Phase, Profile, Stage, Statistics
from keepsight.streams.errors import UsageError

__all__ = ["merge"]

_SAME = ("fingerprint", "variant", "backend", "memory_policy", "dims", "language_model", "machine", "source")


def merge(reports: Sequence[Profile]) -> Profile:
    """One report whose runs are those of all, in the order given.

    Samples, questions and runs follow each other. Cold start and the steady memory are medians, peaks the most of all; energy is
    the mean by frames and answers. The timeline, layers and contention are those of the first, which a note says.

    Raises:
        UsageError: no report, or they are not of the same bundle, machine, backend, options and source, or have not the same
            stages.
    """
    if not reports:
        raise UsageError("There is no report to merge.", fix="Give two or more.")
    first = reports[0]
    for other in reports[1:]:
        _check_same(first, other)
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    before = list(accumulate((report.runs for report in reports), initial=0))
    return first.model_copy(
        update={
            "frames": sum(report.frames for report in reports),
            "fps": sum(report.frames for report in reports) / sum(report.frames / report.fps for report in reports),
            "drops": {cause: sum(report.drops.get(cause, 0) for report in reports) for cause in first.drops},
            "runs": before[-1],
            "run_of_frame": _runs([report.run_of_frame for report in reports], before),
            "run_of_question": _runs([report.run_of_question for report in reports], before),
            "cold_start": tuple(_phase(found) for found in zip(*(report.cold_start for report in reports), strict=True)),
            "stages": tuple(_joined(found) for found in zip(*(report.stages for report in reports), strict=True)),
            "questions": tuple(question for report in reports for question in report.questions),
            "memory": tuple(_use(found) for found in zip(*(report.memory for report in reports), strict=True)),
            "energy": _energy(reports),
            "notes": (*notes, f"Of {len(reports)} reports; the timeline, layers and contention are those of the first."),
        }
    )


def _check_same(first: Profile, other: Profile) -> None:
    differ = [name for name in _SAME if getattr(first, name) != getattr(other, name)]
    names = ([(stage.name, stage.path) for stage in report.stages] for report in (first, other))
    uses = ([use.component for use in report.memory] for report in (first, other))
    phases = ([phase.name for phase in report.cold_start] for report in (first, other))
    for what, (one, two) in (("stages", names), ("memory", uses), ("cold start", phases)):
        if one != two:
            differ.append(what)
    if differ:
        raise UsageError(f"these reports differ in: {', '.join(differ)}.", fix="Merge reports of the same thing.")


def _runs(of: Sequence[tuple[int, ...]], before: Sequence[int]) -> tuple[int, ...]:
    return tuple(run + offset for runs, offset in zip(of, before, strict=False) for run in runs)


def _phase(found: Sequence[Phase]) -> Phase:
    return Phase(name=found[0].name, ms=median(phase.ms for phase in found))


def _joined(found: Sequence[Stage]) -> Stage:
    samples = tuple(sample for stage in found for sample in stage.samples)
    return found[0].model_copy(update={"samples": samples, "statistics": Statistics.of(samples)})


def _use(found: Sequence[MemoryUse]) -> MemoryUse:
    steady, peak = int(median(use.steady for use in found)), max(use.peak for use in found)
    return found[0].model_copy(update={"steady": steady, "peak": peak})


def _energy(reports: Sequence[Profile]) -> Energy | None:
    """None unless every report has it: a mean over some of them would be of another thing."""
    found = [report.energy for report in reports if report.energy is not None]
    if len(found) < len(reports):
        return None
    frames, answers = [report.frames for report in reports], [len(report.questions) for report in reports]
    return Energy(
        meter=found[0].meter,
        idle_watts=fmean(energy.idle_watts for energy in found),
        per_frame=_weighted([energy.per_frame for energy in found], frames),
        per_answer=_weighted([energy.per_answer for energy in found], answers),
        marginal_per_frame=_weighted([energy.marginal_per_frame for energy in found], frames),
        marginal_per_answer=_weighted([energy.marginal_per_answer for energy in found], answers),
    )


def _weighted(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known, weights) if len(known) == len(values) and any(weights) else None
