"""What an answer is: its words, what it was about, and what every stage on the way cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from keepsight.runtime.llm import Generation

Mode = Literal["standing", "replay"]


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
class Answer:
    """A finished answer.

    Attributes:
        text: the words.
        question: as it was asked.
        mode: `standing` (carried along frame by frame) or `replay` (over the bank's slots, when asked).
        time_s: stream time of the newest frame that it is about.
        frames_seen: frames in the memory's history.
        finish: why the LLM stopped: its end token, a stop string, the length limit, or cancelled.
        trace: what it cost.
    """

    text: str
    question: str
    mode: Mode
    time_s: float
    frames_seen: int
    finish: str
    trace: LatencyTrace

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "trace": self.trace.as_dict()}


class AnswerStream(Iterator[str]):
    """An answer while it is written: iterate for pieces of text, then read `result`."""

    def __init__(self, generation: Generation, finish: Any) -> None:
        self._generation, self._finish = generation, finish
        self._result: Answer | None = None

    def __next__(self) -> str:
        return next(self._generation)

    @property
    def result(self) -> Answer:
        """The finished answer; what has not been read yet is generated first."""
        if self._result is None:
            for _ in self._generation:
                pass
            self._result = self._finish(self._generation.result)
        assert self._result is not None
        return self._result
