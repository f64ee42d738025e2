"""What an answer is: its words, what it was about, and what every stage on the way cost."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

from keepsight.runtime.evidence import Evidence
from keepsight.runtime.language.llm import Answer as Written
from keepsight.runtime.language.llm import Generation
from keepsight.runtime.moments import Calendar
from keepsight.runtime.qformer import SoftPrompt
from keepsight.runtime.timeline import Interval
from keepsight.streams import Frame

Mode = Literal["standing", "replay"]
NOTHING_REMEMBERED = "nothing remembered"
"""`Answer.finish` where the memory holds nothing of the interval that was asked about: no model was run."""


@dataclass(frozen=True)
class FrameCost:
    """Milliseconds that a frame took, by stage."""

    vision_ms: float
    memory_ms: float
    step_ms: float


@dataclass(frozen=True)
class LatencyTrace:
    """Milliseconds of each stage behind one answer.

    Attributes:
        capture_age_ms: age of the newest frame in the memory when the question came.
        vision_ms: encoding that frame.
        memory_ms: its keys and values, and the update of the visual bank.
        qformer_ms: `replay`, or `answer` for a standing question (whose steps ran with each frame: `step_ms`).
        step_ms: one step of the standing question; 0 for a replay.
        prefill_ms: the LLM reading the prompt.
        first_token_ms: from the question to the first token.
        total_ms: from the question to the end of the answer.
        tokens, tokens_per_s: of the answer.
    """

    capture_age_ms: float
    vision_ms: float
    memory_ms: float
    qformer_ms: float
    step_ms: float
    prefill_ms: float
    first_token_ms: float
    total_ms: float
    tokens: int
    tokens_per_s: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        """The milliseconds on one line of 80 columns."""
        return (
            f"age {self.capture_age_ms:.0f} | vision {self.vision_ms:.0f} | memory {self.memory_ms:.0f} | "
            f"Q-Former {self.qformer_ms + self.step_ms:.0f} | prefill {self.prefill_ms:.0f} | "
            f"first token {self.first_token_ms:.0f} ms"
        )


@dataclass(frozen=True)
class Perceived:
    """What the Q-Former has made of a question at a moment: all that the language model answers from.

    Attributes:
        soft: the rows for the language model.
        question, mode, prompt: as it was asked; a prompt replaces both templates.
        frame, frames_seen, cost: the newest frame in the memory then, how many there have been, what that one took.
        asked: when the question came, in seconds of `time.perf_counter()`.
        qformer_ms: what making `soft` took.
    """

    soft: SoftPrompt
    question: str
    mode: Mode
    prompt: str | None
    frame: Frame
    frames_seen: int
    cost: FrameCost
    asked: float
    qformer_ms: float

    def trace(
        self, *, prefill_ms: float, first_token_ms: float, tokens: int = 0, tokens_per_s: float = 0.0
    ) -> LatencyTrace:
        """What it cost, at the end of the answer."""
        total_s = perf_counter() - self.asked
        return LatencyTrace(
            capture_age_ms=1000 * (time.monotonic() - total_s - self.frame.captured_at),
            vision_ms=self.cost.vision_ms,
            memory_ms=self.cost.memory_ms,
            qformer_ms=self.qformer_ms,
            step_ms=self.cost.step_ms if self.mode == "standing" else 0.0,
            prefill_ms=prefill_ms,
            first_token_ms=first_token_ms,
            total_ms=1000 * total_s,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
        )


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the words.
        question: as it was asked.
        mode: `standing` (carried along frame by frame) or `replay` (over the bank's slots, when asked).
        time_s: stream time of the newest frame that it is about.
        frames_seen: frames in the memory's history.
        finish: why the LLM stopped: its end token, a stop string, the length limit, or cancelled; or `NOTHING_REMEMBERED`.
        trace: what it cost.
        interval: that was asked about; None = all that is remembered.
        remembered: where nothing is remembered of `interval`, of what there is something.
        evidence: where the Q-Former looked; None if it was not asked for, or the bundle's `replay` does not tell.
        calendar: writes the times of this stream.
        degraded: what was left out when it was asked, because the machine was too hot, too full or too busy (`governor.py`).
    """

    text: str
    question: str
    mode: Mode
    time_s: float
    frames_seen: int
    finish: str
    trace: LatencyTrace
    interval: Interval | None = None
    remembered: tuple[Interval, ...] = ()
    evidence: Evidence | None = None
    calendar: Calendar | None = None
    degraded: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        plain = ("text", "question", "mode", "time_s", "frames_seen", "finish")
        result = {**{name: getattr(self, name) for name in plain}, "trace": self.trace.as_dict()}
        if self.calendar is not None:
            calendar = self.calendar
            result["interval"] = None if self.interval is None else calendar.as_dict(self.interval)
            result["evidence"] = None if self.evidence is None else self.evidence.as_dict(calendar)
            if self.finish == NOTHING_REMEMBERED:
                result["remembered"] = [calendar.as_dict(span) for span in self.remembered]
        if self.degraded:
            result |= {"level": len(self.degraded), "degraded": list(self.degraded)}
        return result


class AnswerStream(Iterator[str]):
    """An answer while it is written: iterate for pieces of text, then read `result`."""

    def __init__(self, generation: Generation, finish: Any) -> None:
        self._generation, self._finish = generation, finish
        self._result: Answer | None = None

    @classmethod
    def of(cls, answer: Answer) -> AnswerStream:
        """An answer that needed no model: its text in one piece."""

        def written() -> Generator[str, None, Written]:
            yield answer.text
            return Written(text=answer.text, finish="stop", tokens=0)

        return cls(Generation(written()), lambda _: answer)

    def __next__(self) -> str:
        return next(self._generation)

    @property
    def written(self) -> Written:
        """What the language model says of it, once `result` has been read."""
        return self._generation.result

    @property
    def result(self) -> Answer:
        """The finished answer; what has not been read yet is generated first."""
        if self._result is None:
            for _ in self._generation:
                pass
            self._result = self._finish(self._generation.result)
        assert self._result is not None
        return self._result
