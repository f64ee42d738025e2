"""What got slower or bigger between two profiles, and how sure that is.

A stage's change is the ratio of its medians: of the geometric means, over the runs, of each run's median. Its 95 % interval is
a t interval over the logarithms of these (`spread`). Slower means that the whole interval lies above 1 + threshold; since many
stages are looked at, Holm's procedure over all of them must agree, which keeps the probability of any false alarm in a comparison
below 5 %. Memory and energy are single numbers, whose spread no report tells: they have a tolerance instead.

What all runs of a report share, no interval can hold: a machine that was busier, or hotter, when B was measured makes B slower.
That is what the threshold is for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES, Chain, Profile, Stage, read_profile
from keepsight.runtime.profiling.spread import Gap, gap, level, paired_gap, per_run
from keepsight.streams.errors import RegressionError, UsageError

__all__ = ["ALARMS", "FLOOR_MS", "UNSEEN", "WAITING", "Amount", "Change", "Comparison", "compare", "compare_command"]

ALARMS = 0.05
"""Of comparisons of equals, the share that may find any stage changed."""

FLOOR_MS = 0.01
"""A smaller change is never called one: it is what calling a clock twice may cost."""

UNSEEN = 0.03
"""Standard deviation allowed for between runs, of the logarithm, where both reports have a single one and can't tell. Runs of the
shipped bundle on a virtual PC with two cores differed by 0.01 to 0.025 while little else ran on it, by 0.1 to 0.4 beside other
work: under such load single runs tell nothing.
"""

WAITING = "wait"
"""The stage in which nothing is done."""

_MEMORY = {"read": 0.10, "counted": 0.01}
_LEAST_BYTES = 8e6  # what a process' resident memory differs by from start to start
_ENERGY = 0.10

Verdict = Literal["slower", "faster", "same", "unclear", "unknown"]
_CHAINS: dict[Chain, tuple[str, tuple[str, ...]]] = {"frame": ("frame", FRAME_STAGES), "question": ("answer", QUESTION_STAGES)}


@dataclass(frozen=True)
class Change:
    """A stage, or an end-to-end time, in both reports.

    Attributes:
        part: `whole`, from end to end; `stage`, a link of the chain; `other`, a part of a stage, or another measure.
        before_ms, after_ms: geometric means of the runs' medians; plain means where a median is not above 0.
        ratio: after over before; None where a median is not above 0.
        low, high: the 95 % interval of `ratio`, or of `difference_ms` where there is no ratio; None: too few samples.
        share: of the end-to-end time's change before it, as a share of that time: what this one adds to it.
        p: that a change beyond the threshold is seen where there is none, by Holm's procedure over all stages.
        verdict: `slower` and `faster` by more than the threshold; `same`: within it; `unclear`: the interval holds both;
            `unknown`: too few samples.
    """

    name: str
    path: Chain
    part: Literal["whole", "stage", "other"]
    inside: str | None
    before_ms: float
    after_ms: float
    ratio: float | None
    low: float | None
    high: float | None
    share: float
    p: float
    verdict: Verdict

    @property
    def difference_ms(self) -> float:
        """After less before."""
        return self.after_ms - self.before_ms

    @property
    def title(self) -> str:
        """Its name, and whose it is where both paths have one of that name."""
        return f"{self.name} of the {self.path}" if self.name == "other" else self.name


@dataclass(frozen=True)
class Amount:
    """A single number of both reports. `tolerance`: the increase that is allowed, as a share; None: it is not judged."""

    name: str
    unit: str
    before: float
    after: float
    tolerance: float | None = None
    least: float = 0.0

    @property
    def ratio(self) -> float | None:
        """After over before; None from nothing."""
        return self.after / self.before if self.before else None

    @property
    def grew(self) -> bool:
        """By more than its tolerance."""
        return self.tolerance is not None and self.after - self.before > max(self.least, self.tolerance * self.before)


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side. It is true if nothing got slower or bigger.

    Attributes:
        changes: of times, a path's end-to-end one first, then its chain in order, then the rest.
        forced: why the two are not comparable, if that was overruled.
        notes: what else differs, and what the intervals do not hold.
    """

    threshold: float
    runs: tuple[int, int]
    changes: tuple[Change, ...]
    amounts: tuple[Amount, ...]
    forced: tuple[str, ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.worst is None

    @property
    def slower(self) -> tuple[Change, ...]:
        """What got slower: first the stage that adds most to its end-to-end time, then others, then the end-to-end times.

        Waiting comes after all other stages: a queue is longer because something after it is slower, and by more than that.
        """
        parts = ("stage", "whole", "other")

        def rank(change: Change) -> tuple[int, bool, float]:
            return parts.index(change.part), change.name == WAITING, -change.share

        return tuple(sorted((c for c in self.changes if c.verdict == "slower"), key=rank))

    @property
    def bigger(self) -> tuple[Amount, ...]:
        """What grew beyond its tolerance, the largest ratio first."""
        return tuple(sorted((a for a in self.amounts if a.grew), key=lambda a: -(a.ratio or math.inf)))

    @property
    def worst(self) -> Change | Amount | None:
        """What to look at first; None if nothing got worse."""
        return self.slower[0] if self.slower else next(iter(self.bigger), None)

    def explained(self, change: Change) -> tuple[Change, float] | None:
        """The end-to-end time that a stage is a link of, and the share that it has of its increase, waiting apart."""
        whole = next((c for c in self.changes if (c.part, c.path) == ("whole", change.path)), None)
        if whole is None or change.part != "stage":
            return None
        waited = sum(c.difference_ms for c in self.changes if (c.name, c.path) == (WAITING, change.path) and c is not change)
        increase = whole.difference_ms - waited
        return (whole, change.difference_ms / increase) if increase > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        worst = self.worst
        return {
            "regression": worst is not None,
            "worst": None if worst is None else worst.title if isinstance(worst, Change) else worst.name,
            "slower": [change.title for change in self.slower],
            "bigger": [amount.name for amount in self.bigger],
            "threshold": self.threshold, "runs": list(self.runs),
            "changes": [{**asdict(c), "difference_ms": c.difference_ms} for c in self.changes],
            "amounts": [{**asdict(a), "ratio": a.ratio, "grew": a.grew} for a in self.amounts],
            "forced": list(self.forced), "notes": list(self.notes),
        }  # fmt: skip


def compare_command(
    a: Path, b: Path, *, threshold: float = 0.05, force: bool = False, paired: bool = False, as_json: bool = False
) -> None:
    """Compare two reports and print a table, or JSON.

    Raises:
        RegressionError: B is slower or bigger than A; it names what to look at first.
        UsageError: a file that is no report, two that are not comparable, a threshold that makes no sense.
    """
    found = compare(read_profile(a), read_profile(b), threshold=threshold, force=force, paired=paired)
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b), **found.as_dict()}, ensure_ascii=False))
    else:
        from rich.console import Console

        from keepsight.runtime.profiling.tables import print_comparison

        print_comparison(found, Console(), names=(str(a), str(b)))
    if not found:
        raise RegressionError(_alarm(found), fix=f"Compare the pages of both reports at that place; A is {a}, B is {b}.")


def compare(
    a: Profile, b: Profile, *, threshold: float = 0.05, force: bool = False, paired: bool = False
) -> Comparison:
    """What changed from report `a` to report `b`.

    Args:
        threshold: slower by no more than this share is no regression.
        force: compare although bundle, machine, power mode or backend differ.
        paired: run by run: both were made in turns, the first run of A beside the first of B, and so on. Then what the machine
            did beside them at that time is in none of the intervals.

    Raises:
        UsageError: they are not comparable, or the threshold is not in [0, 10]; pairs of runs that are not as many, or only one.
    """
    if not 0 <= threshold <= 10:
        raise UsageError(f"a threshold of {threshold:g} makes no sense.", fix="Give a share: 0.05 is 5 %.")
    apart = tuple(_not_comparable(a, b))
    if apart and not force:
        raise UsageError(
            f"these profiles are not comparable: {'; '.join(apart)}.",
            fix="Profile both alike, or give --force to compare them nevertheless.",
        )
    if paired and (a.runs != b.runs or a.runs < 2):
        raise UsageError(
            f"{a.runs} and {b.runs} runs make no pairs.",
            fix="Profile both in turns, as often one as the other, and join the reports of each with: keepsight profile merge",
        )
    changes = _holm([change for path in _CHAINS for change in _changes(a, b, path, threshold, paired)])
    notes = (*_spread_notes(a, b), *_reach(changes, threshold), *_notes(a, b))
    return Comparison(threshold, (a.runs, b.runs), tuple(changes), tuple(_amounts(a, b)), apart, notes)


def _alarm(found: Comparison) -> str:
    worst = found.worst
    assert worst is not None
    rest = [c.title for c in found.slower if c is not worst] + [amount.name for amount in found.bigger if amount is not worst]
    also = f" Also: {', '.join(rest)}." if rest else ""
    if isinstance(worst, Amount):
        grown = f"{worst.ratio:.2f} times" if worst.ratio is not None else "from nothing"
        return f"{worst.name} grew {grown} ({written(worst, worst.before)} to {written(worst, worst.after)}).{also}"
    size = times = f"{worst.before_ms:.4g} to {worst.after_ms:.4g} ms"
    if worst.ratio is not None:
        size = f"x {worst.ratio:.2f}, 95 % interval {worst.low:.2f} to {worst.high:.2f}, {times}"
    explained = found.explained(worst)
    links = [c for c in found.changes if (c.part, c.path) == ("stage", worst.path)]
    if worst.part == "whole" and links:
        most = max(links, key=lambda c: (c.name != WAITING, c.difference_ms))
        return f"{worst.title} is slower ({size}), most of it in {most.title} ({most.difference_ms:+.4g} ms).{also}"
    why = ""
    if explained is not None:
        apart = "" if worst.name == WAITING or not any(c.name == WAITING for c in links) else ", waiting apart"
        why = f" It is {explained[1]:.0%} of what {explained[0].name} takes longer{apart}."
    return f"{worst.title} is slower ({size}).{why}{also}"


def written(amount: Amount, value: float) -> str:
    """A number of it with its unit."""
    if amount.unit == "bytes":
        return f"{value / 1e6:.1f} MB"
    return f"{value:.4g} {amount.unit}".rstrip()


def _changes(a: Profile, b: Profile, path: Chain, threshold: float, paired: bool) -> list[Change]:
    """Of a path, with p not yet corrected."""
    end, chain = _CHAINS[path]
    whole = a.stage(end, path)
    base = float(np.median(whole.samples)) if whole is not None else 0.0
    names = [stage.name for stage in a.stages if stage.path == path and b.stage(stage.name, path) is not None]
    order = [end, *chain]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    found = []
    for name in names:
        before, after = a.stage(name, path), b.stage(name, path)
        assert before is not None and after is not None
        runs = per_run(a, before), per_run(b, after)
        change = _change(before, runs, after, threshold, (a.runs, b.runs), paired)
        part: Literal["whole", "stage", "other"] = "whole" if name == end else "stage" if name in chain else "other"
        found.append(replace(change, part=part, share=change.difference_ms / base if base else 0.0))
    return found


_Runs = tuple[np.ndarray[Any, np.dtype[np.float64]], ...]


def _change(
    before: Stage,
    runs: tuple[_Runs | None, _Runs | None],
    after: Stage,
    threshold: float,
    counts: tuple[int, int],
    paired: bool,
) -> Change:
    first, second = (found or (np.asarray(stage.samples),) for found, stage in zip(runs, (before, after), strict=True))
    log = min(float(np.median(run)) for run in (*first, *second)) > 0
    levels = level(first, log=log, seed=0), level(second, log=log, seed=1)
    centres = [math.exp(one.centre) if log else one.centre for one in levels]
    change = Change(
        before.name, before.path, "other", before.inside, centres[0], centres[1], centres[1] / centres[0] if log else None,
        None, None, 0.0, 1.0, "unknown",
    )  # fmt: skip
    known = None
    if None not in runs:
        known = paired_gap(first, second, log=log) if paired else gap(*levels)
    if known is None:
        return change
    low, high = known.interval()
    limits = (-math.log1p(threshold), math.log1p(threshold)) if log else _limits_ms(centres[0], threshold)
    judged = gap(*levels, unseen=UNSEEN * (1 if log else abs(centres[0]))) if counts == (1, 1) else known
    assert judged is not None
    p, verdict = _judge(judged, limits, (low, high))
    if abs(change.difference_ms) < FLOOR_MS:
        p, verdict = 1.0, "same"
    if log:
        low, high = math.exp(min(low, 700.0)), math.exp(min(high, 700.0))
    return replace(change, low=low, high=high, p=p, verdict=verdict)


def _limits_ms(before: float, threshold: float) -> tuple[float, float]:
    reach = max(FLOOR_MS, threshold * abs(before))
    return -reach, reach


def _judge(judged: Gap, limits: tuple[float, float], interval: tuple[float, float]) -> tuple[float, Verdict]:
    """p of a change within the limits, and the verdict if nothing significant comes of it.

    p is that of one side: a change on one limit is hardly ever seen beyond the other. Where the whole interval does not lie
    beyond a limit, it is 1.
    """
    if limits[0] <= interval[1] and interval[0] <= limits[1]:
        return 1.0, "same" if limits[0] <= interval[0] and interval[1] <= limits[1] else "unclear"
    return min(judged.tail(limits[1]), 1 - judged.tail(limits[0])), "unclear"


def _holm(changes: list[Change]) -> list[Change]:
    """Correct p for the number of stages, and call what remains significant (Holm 1979)."""
    tested = [change for change in changes if change.verdict != "unknown"]
    corrected: dict[int, float] = {}
    least = 0.0
    for place, change in enumerate(sorted(tested, key=lambda change: change.p)):
        least = max(least, min(1.0, change.p * (len(tested) - place)))
        corrected[id(change)] = least
    found = []
    for change in changes:
        p = corrected.get(id(change), 1.0)
        verdict = change.verdict
        if p < ALARMS:
            verdict = "slower" if change.difference_ms > 0 else "faster"
        found.append(replace(change, p=p, verdict=verdict))
    return found


def _amounts(a: Profile, b: Profile) -> Iterator[Amount]:
    after = {use.component: use for use in b.memory}
    for use in a.memory:
        if (other := after.get(use.component)) is not None:
            least = _LEAST_BYTES if use.basis == "read" else 0.0
            for name in ("steady", "peak"):
                numbers = getattr(use, name), getattr(other, name)
                yield Amount(f"{use.component}, {name} memory", "bytes", *numbers, _MEMORY[use.basis], least)
    if a.energy is not None and b.energy is not None:
        for name, words in (("per_frame", "a frame"), ("per_answer", "an answer")):
            numbers = getattr(a.energy, name), getattr(b.energy, name)
            if None not in numbers:
                yield Amount(f"energy of {words}", "J", *numbers, _ENERGY)
    yield Amount("throughput", "frames/s", a.fps, b.fps)
    for cause in sorted(a.drops.keys() | b.drops.keys()):
        yield Amount(f"drops, {cause}", "", a.drops.get(cause, 0), b.drops.get(cause, 0))


def _not_comparable(a: Profile, b: Profile) -> Iterator[str]:
    if a.fingerprint != b.fingerprint:
        yield f"they are of different bundles ({a.bundle} {a.fingerprint[:12]}, {b.bundle} {b.fingerprint[:12]})"
    for name, words in (("title", "machine"), ("processor", "processor"), ("cores", "number of cores"), ("gpu", "GPU")):
        yield from _differs(words, getattr(a.machine, name), getattr(b.machine, name))
    if None not in (a.machine.power_mode, b.machine.power_mode):
        yield from _differs("power mode", a.machine.power_mode, b.machine.power_mode)
    yield from _differs("backend", a.backend, b.backend)


def _differs(words: str, before: Any, after: Any) -> Iterator[str]:
    if before != after:
        yield f"another {words} ({_shown(before)}, then {_shown(after)})"


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _spread_notes(a: Profile, b: Profile) -> Iterator[str]:
    """What the intervals hold and what they don't."""
    if a.runs == b.runs == 1:
        yield (
            "one run each: the intervals hold only the spread within a run; for what runs differ by, which can't be seen, "
            f"verdicts allow {UNSEEN:.0%}. Measure 5 runs"
        )
    elif 1 in (a.runs, b.runs):
        yield f"{'A' if a.runs == 1 else 'B'} is of one run, which is taken to vary as those of the other do"
    elif min(a.runs, b.runs) < 4:
        yield f"{min(a.runs, b.runs)} runs tell little of how runs differ: intervals are wide; measure 5"
    for name, profile in (("A", a), ("B", b)):
        lost = [stage.name for stage in profile.stages if per_run(profile, stage) is None]
        if lost:
            yield f"{name} does not tell which run the samples of {', '.join(lost)} are of: not judged"


def _reach(changes: list[Change], threshold: float) -> Iterator[str]:
    """How wide the intervals are, if that is too wide to rule out much."""
    wide = [c for c in changes if c.part == "whole" and c.low is not None and c.high is not None and c.ratio is not None]
    for change in wide:
        assert change.low is not None and change.high is not None
        if change.high / change.low > (1 + 2 * threshold) ** 2:
            yield (
                f"{change.name} is known to ± {math.sqrt(change.high / change.low) - 1:.0%} only: smaller changes go unseen. "
                "Measure more runs, on a quieter machine"
            )


def _notes(a: Profile, b: Profile) -> Iterator[str]:
    machines = a.machine, b.machine
    if (machines[0].power_mode is None) != (machines[1].power_mode is None):
        yield "one report does not know its power mode"
    for name in ("variant", "language_model", "memory_policy", "source", "frames"):
        yield from _differs(name.replace("_", " ").replace("frames", "number of frames"), getattr(a, name), getattr(b, name))
    threads = [_threads(profile) for profile in (a, b)]
    yield from _differs("number of threads", *threads)
    for name in ("memory", "clocks_locked", "l4t", "jetpack", "system"):
        yield from _differs(name.replace("_", " "), *(getattr(machine, name) for machine in machines))
    for key in sorted(a.dims.keys() | b.dims.keys() - {"threads"}):
        yield from _differs(key, a.dims.get(key), b.dims.get(key))
    versions = [{"keepsight": profile.keepsight, **profile.machine.versions} for profile in (a, b)]
    for key in sorted(versions[0].keys() | versions[1].keys()):
        yield from _differs(f"version of {key}", versions[0].get(key), versions[1].get(key))
    yield from _missing(a, b)
    if a.questions and b.questions:
        if {question.text for question in a.questions} != {question.text for question in b.questions}:
            yield "the questions differ"
        tokens = [float(np.mean([question.tokens for question in profile.questions])) for profile in (a, b)]
        if not math.isclose(*tokens):
            yield f"an answer has {tokens[0]:.3g}, then {tokens[1]:.3g} tokens: `answer` and `tokens` change with that"
    for name, profile in (("A", a), ("B", b)):
        reasons = sorted({reason for moment in profile.timeline for reason in moment.throttled})
        if reasons:
            yield f"{name} was throttled while it was measured: {', '.join(reasons)}"


def _missing(a: Profile, b: Profile) -> Iterator[str]:
    """What only one of the reports has."""
    for name, one, other in (("A", a, b), ("B", b, a)):
        stages = [stage.name for stage in one.stages if other.stage(stage.name, stage.path) is None]
        components = {use.component for use in one.memory} - {use.component for use in other.memory}
        for words, names in (("stages", stages), ("memory", sorted(components))):
            if names:
                yield f"{words} in {name} alone: {', '.join(names)}"
        if one.energy is not None and other.energy is None:
            yield f"energy in {name} alone"


def _threads(profile: Profile) -> int | None:
    if isinstance(threads := profile.dims.get("threads"), int):
        return threads
    found = re.search(r"--threads[ =](\d+)", profile.command)
    return int(found[1]) if found else None
