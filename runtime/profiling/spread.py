"""How far a stage's median may be off: from the runs of a profile, or within the only one there is.

The samples of one run are not independent: they share its clocks, its caches and what else the machine did. So where there are
several runs, the run is the unit, and its median the observation. Within one run only the spread from sample to sample can be
seen; neighbours are alike, so whole blocks of them are drawn (the moving-block bootstrap: Künsch 1989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.profiling.report import Profile, Stage
from keepsight.runtime.profiling.student import t_quantile, t_tail

__all__ = ["Gap", "Level", "gap", "level", "paired_gap", "per_run"]

_LEAST_SAMPLES = 4
_DRAWS = 2_000_000  # numbers drawn for a bootstrap, in all
_ROUNDED_MS = 0.001 / math.sqrt(12)  # reports hold milliseconds to the microsecond; two equal medians are not known to be equal


def per_run(profile: Profile, stage: Stage) -> tuple[NDArray[np.float64], ...] | None:
    """The samples of a stage, run by run; None if the report does not tell which run each is of."""
    samples = np.asarray(stage.samples, np.float64)
    if profile.runs == 1:
        return (samples,)
    runs = np.asarray(profile.run_of_frame if stage.path == "frame" else profile.run_of_question, np.int64)
    if len(runs) != len(samples) and stage.path == "question":
        runs = _runs_of_tokens(profile, runs, len(samples))
    names, counts = np.unique(runs, return_counts=True)
    if len(runs) == len(samples):
        return tuple(samples[runs == name] for name in names)
    if len(names) and (counts == counts[0]).all() and len(samples) % len(names) == 0:
        return tuple(np.split(samples, len(names)))  # as many samples in each run: they come in the order of the runs
    return None


def _runs_of_tokens(profile: Profile, runs: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Of samples that are one a token, all of them or all but each answer's first."""
    tokens = np.asarray([question.tokens for question in profile.questions], np.int64)
    if len(tokens) == len(runs):
        for counts in (tokens, np.maximum(tokens - 1, 0)):
            if counts.sum() == samples:
                return np.repeat(runs, counts)
    return runs


@dataclass(frozen=True)
class Level:
    """Where a stage's runs lie.

    Attributes:
        runs: how many there are.
        centre: the mean of the runs' medians, in milliseconds or as natural logarithms.
        variance: of one run's median; of a single run's, what the bootstrap tells; None with too few samples for that.
        freedom: degrees of freedom of `variance`.
    """

    runs: int
    centre: float
    variance: float | None
    freedom: float


def level(samples: tuple[NDArray[np.float64], ...], *, log: bool, seed: int = 0) -> Level:
    """Of a stage's samples, run by run; `log` needs medians above 0."""
    values, rounded = _observed(samples, log=log)
    if len(values) > 1:
        return Level(len(values), float(values.mean()), float(values.var(ddof=1)) + rounded, len(values) - 1)
    if len(samples[0]) < _LEAST_SAMPLES:
        return Level(1, float(values[0]), None, 0)
    within, blocks = _bootstrap(samples[0], log=log, seed=seed)
    return Level(1, float(values[0]), within + rounded, blocks - 1)


def _observed(samples: tuple[NDArray[np.float64], ...], *, log: bool) -> tuple[NDArray[np.float64], float]:
    """The median of each run, and the variance of its being rounded."""
    medians = np.array([np.median(run) for run in samples])
    rounded = float(np.mean((_ROUNDED_MS / medians) ** 2)) if log else _ROUNDED_MS**2
    return np.log(medians) if log else medians, rounded


def _bootstrap(samples: NDArray[np.float64], *, log: bool, seed: int) -> tuple[float, float]:
    """Variance of the median of one run, and of how many blocks it was made."""
    n = len(samples)
    length = max(1, min(_block_length(samples), n // _LEAST_SAMPLES))
    rng = np.random.default_rng(seed)
    draws = int(np.clip(_DRAWS // n, 100, 1000))
    blocks = -(-n // length)
    medians = np.empty(draws)
    for draw in range(draws):
        starts = rng.integers(0, n - length + 1, blocks)
        medians[draw] = np.median(samples[(starts[:, None] + np.arange(length)).ravel()[:n]])
    if log:
        medians = np.log(np.maximum(medians, np.finfo(float).tiny))
    return float(medians.var(ddof=1)), blocks


def _block_length(samples: NDArray[np.float64]) -> int:
    """Twice the time over which samples remember each other, and at least n^(1/3).

    The median depends on a sample only through the side of it that the sample is on, so that is what is correlated (Geyer's
    initial positive sequence: the sum ends where a pair of neighbouring lags is not above 0).
    """
    n = len(samples)
    sides = np.sign(samples - np.median(samples))
    sides -= sides.mean()
    power = float(sides @ sides)
    remembered = 1.0
    if power > 0:
        for lag in range(1, min(n // _LEAST_SAMPLES, 1000), 2):
            pair = sum(float(sides[:-k] @ sides[k:]) / power for k in (lag, lag + 1))
            if pair <= 0:
                break
            remembered += 2 * pair
    return max(round(n ** (1 / 3)), math.ceil(2 * remembered))


@dataclass(frozen=True)
class Gap:
    """The difference of two levels, `error` its standard error with `freedom` degrees of freedom."""

    difference: float
    error: float
    freedom: float

    def interval(self, share: float = 0.95) -> tuple[float, float]:
        """That holds the true difference in this share of the cases."""
        reach = t_quantile((1 - share) / 2, self.freedom) * self.error
        return self.difference - reach, self.difference + reach

    def tail(self, limit: float) -> float:
        """The probability of as large a difference if the true one is no larger than `limit`."""
        return t_tail((self.difference - limit) / self.error, self.freedom)


def gap(before: Level, after: Level, *, unseen: float = 0.0) -> Gap | None:
    """From one level to another; None if their spread is not known.

    With as many runs in both it is Student's t, whose standard error is right then whether or not both vary alike; with unequal
    numbers Welch's.

    A single run beside several is taken to vary as these do. Between two single runs only the spread within them is known:
    `unseen`, a standard deviation of runs, is added for what is not.
    """
    difference = after.centre - before.centre
    if (before.runs == 1) != (after.runs == 1):
        several = max(before, after, key=lambda one: one.runs)
        assert several.variance is not None
        return Gap(difference, math.sqrt(several.variance * (1 + 1 / several.runs)), several.freedom)
    if before.variance is None or after.variance is None:
        return None
    parts = [(before.variance / before.runs, before.freedom), (after.variance / after.runs, after.freedom)]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts)
    if before.runs == after.runs > 1:
        freedom = before.freedom + after.freedom
    return Gap(difference, math.sqrt(total + 2 * unseen**2), freedom)


def paired_gap(
    before: tuple[NDArray[np.float64], ...], after: tuple[NDArray[np.float64], ...], *, log: bool
) -> Gap | None:
    """From runs to other runs of which each was made in turns with the one of the same number: Student's paired t.

    What a pair has in common, such as another load on the machine at that time, is in no difference, and so in no interval.
    None unless there are as many of both, and at least two.
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    (first, rounded), (second, rounded_too) = _observed(before, log=log), _observed(after, log=log)
    differences = second - first
    variance = float(differences.var(ddof=1)) + rounded + rounded_too
    return Gap(float(differences.mean()), math.sqrt(variance / len(differences)), len(differences) - 1)
