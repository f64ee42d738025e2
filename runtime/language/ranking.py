"""A closed question: given options, ranked by how likely each is as the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from keepsight.runtime.answer import LatencyTrace, Mode
from keepsight.runtime.language.llm import RankedOption, Score
from keepsight.streams.errors import UsageError

__all__ = ["Ranking", "checked_options"]


@dataclass(frozen=True)
class Ranking(Sequence[RankedOption]):
    """Options, the likeliest first, each with its probability among them; equal ones stay in the order they were given.

    Attributes:
        options: with their log-probabilities, sums over tokens.
        score: what they are ranked by (`LLM.rank` defines each).
        question: as it was asked.
        mode: `standing` or `replay`.
        time_s: stream time of the newest frame that it is about.
        frames_seen: frames in the memory's history.
        trace: what it cost. Prefill and scoring are one figure, `prefill_ms`; no token is written.
        degraded: as of an `Answer`.
    """

    options: tuple[RankedOption, ...]
    score: Score
    question: str
    mode: Mode
    time_s: float
    frames_seen: int
    trace: LatencyTrace
    degraded: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> RankedOption: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RankedOption]: ...
    def __getitem__(self, index: int | slice) -> RankedOption | Sequence[RankedOption]:
        return self.options[index]

    def __len__(self) -> int:
        return len(self.options)

    @property
    def best(self) -> RankedOption:
        """The likeliest option."""
        return self.options[0]

    @property
    def log_normaliser(self) -> float:
        """What a score is reduced by to be a log-probability among the options: log of the sum of their exponentials.

        For `answer` its exponential is the probability that the model, left alone, would say one of the options.
        """
        scores = [item.logprob / (item.tokens if self.score == "mean" else 1) for item in self.options]
        return float(np.logaddexp.reduce(scores))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        degraded = {"level": len(self.degraded), "degraded": list(self.degraded)} if self.degraded else {}
        return {
            "question": self.question, "options": [item._asdict() for item in self.options], "score": self.score,
            "log_normaliser": self.log_normaliser, "mode": self.mode, "time_s": self.time_s,
            "frames_seen": self.frames_seen, "trace": self.trace.as_dict(), **degraded,
        }  # fmt: skip

    def __str__(self) -> str:
        """A line for each option; for `answer` also how much of what the model would say the options are."""
        width = max(len(item.option) for item in self.options)
        lines = [f"{item.option:{width}}  {item.probability:6.1%}  {item.logprob:8.2f}" for item in self.options]
        if self.score == "answer":
            lines.append(f"({math.exp(self.log_normaliser):.1%} of what it would say is one of these)")
        return "\n".join(lines)


def checked_options(options: Sequence[str]) -> tuple[str, ...]:
    """Options that can be ranked.

    Raises:
        UsageError: none, a blank one, or one that is given twice.
    """
    given = tuple(options)
    if not given or not all(option.strip() for option in given) or len(set(given)) < len(given):
        raise UsageError(
            f"{list(given)!r} are no options to choose from.", fix="Give at least one; none of them empty, none twice."
        )
    return given
