"""Standing questions on a stream: several over one memory, asked again and again, told when an answer changes.

All are carried along frame by frame (`Session.stand`), so each answer is exactly MA-LMM's online loop up to that frame. Vision,
visual bank and cross-attention keys and values are computed once a frame, whatever the number of questions; each question costs
one `step` a frame, and an answer of the language model whenever it is asked. Nothing of the language model's work is shared
between questions: a prompt begins with the question's own soft prompt, and what comes after it depends on that.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keepsight.runtime.answer import Answer, LatencyTrace
from keepsight.runtime.language.llm import Score
from keepsight.runtime.language.ranking import Ranking, checked_options
from keepsight.runtime.live.watch import Camera
from keepsight.runtime.session import Session, Standing
from keepsight.streams import Frame, Source
from keepsight.streams.branches import Branch
from keepsight.streams.errors import UsageError
from keepsight.streams.sampling import Sampler

__all__ = ["Change", "Question", "Round", "StandingQuestions", "Summary", "follow_camera", "follow_file", "parse_question"]

_LOOK_S = 0.1  # how often a camera is checked while nothing is due
_CHOICE = re.compile(r"^(?P<text>.*?)\s*\[(?P<options>[^\[\]]*)\]\s*$", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """What to ask. With options the answer is the likeliest of them, without any it is written freely."""

    text: str
    options: tuple[str, ...] = ()


def parse_question(spelling: str) -> Question:
    """A question as the command line spells it: `is there a fire?`, or `is there a fire? [yes|no]` with its options.

    Raises:
        UsageError: no question, or brackets at its end that hold fewer than two options, a blank one, or one twice.

    >>> parse_question("is there a fire? [yes|no]")
    Question(text='is there a fire?', options=('yes', 'no'))
    """
    found = _CHOICE.match(spelling)
    text = (found["text"] if found else spelling).strip()
    if not text:
        raise UsageError(f"{spelling!r} asks nothing.", fix="Write a question.")
    if found is None:
        return Question(text)
    options = [option.strip() for option in found["options"].split("|")]
    if len(options) < 2:
        raise UsageError(f"{spelling!r} gives one answer to choose from.", fix="Give at least two: [yes|no].")
    return Question(text, checked_options(options))


@dataclass(frozen=True)
class Change:
    """A question's answer that is not what it was.

    Attributes:
        question: its number, from 1.
        text: the question.
        answer, previous: now, and before; `previous` is None for the first answer.
        probability: of the answer among the options; None for a question without options.
        time_s: stream time of the newest frame that the answer is about.
        frames_seen: frames in the memory's history.
        trace: what the answer cost.
        degraded: as of an `Answer`.
    """

    question: int
    text: str
    answer: str
    previous: str | None
    probability: float | None
    time_s: float
    frames_seen: int
    trace: LatencyTrace
    degraded: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        plain = {"event": "change", **asdict(self), "trace": self.trace.as_dict()}
        degraded = plain.pop("degraded")
        return {**plain, "level": len(degraded), "degraded": list(degraded)} if degraded else plain

    def __str__(self) -> str:
        sure = "" if self.probability is None else f" ({self.probability:.0%})"
        return f"{self.time_s:9.2f} s  {self.question}. {self.text}  {self.answer}{sure}"


@dataclass(frozen=True)
class Round:
    """All questions, asked once. `changes` are those whose answers are new."""

    answers: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Summary:
    """What a watch came to.

    Attributes:
        frames: in the memory's history.
        frames_dropped: that a newer one replaced before they could be seen (live only).
        rounds: times that all questions were asked.
        rounds_dropped: that were due, and gave way to a newer one because answers took longer than the interval (live only).
        answers: of the language model.
        changes: answers that differed from the one before, each question's first included.
    """

    frames: int
    frames_dropped: int
    rounds: int
    rounds_dropped: int
    answers: int
    changes: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"event": "summary", **asdict(self)}

    def __str__(self) -> str:
        return (
            f"{self.frames} frames ({self.frames_dropped} dropped), {self.answers} answers in {self.rounds} rounds "
            f"({self.rounds_dropped} dropped), {self.changes} changes"
        )


class StandingQuestions:
    """Questions carried along by a session, and what was answered last.

    One thread asks; `due` may be called by another, which sees frames.

    Args:
        session: it carries the questions from its next frame on.
        questions: at least one.
        tell: called with every change, in the order of the questions.
        every_s: stream seconds from one round to the next; 0 asks after every frame.
        score: what options are ranked by (`LLM.rank`).

    Raises:
        UsageError: no question, one that is too long, or an interval below 0.
    """

    def __init__(
        self,
        session: Session,
        questions: Sequence[Question],
        tell: Callable[[Change], None],
        *,
        every_s: float = 1.0,
        score: Score = "answer",
    ) -> None:
        if not questions:
            raise UsageError("There is nothing to ask.", fix="Give a question.")
        if not every_s >= 0:
            raise UsageError(f"an interval of {every_s} s makes no sense.", fix="Give 0 or more seconds.")
        self.session, self._tell, self._score = session, tell, score
        self._carried: list[tuple[Question, Standing]] = [(one, session.stand(one.text)) for one in questions]
        self._said: list[str | None] = [None] * len(questions)
        self._sampler = Sampler(1 / every_s) if every_s else None
        self._due = self._rounds = self._last_rounds = self._answers = self._changes = 0
        self._asked_at = 0  # frames seen by every answer of the last round
        self.frames_dropped = 0

    def due(self, frame: Frame) -> bool:
        """Whether a round is due after this frame: the first at or after each multiple of the interval. Call it once a frame."""
        if self._sampler is not None and not self._sampler.take(frame.time_s):
            return False
        self._due += 1
        return True

    def ask(self, *, due: bool = True) -> Round:
        """Ask every question about the newest state of the memory.

        Args:
            due: False for a round at the end of the stream, which no interval asked for.

        Raises:
            UsageError: no frame has been seen yet.
            KeepsightError: a graph or the language model fails.
        """
        self._rounds += 1
        self._last_rounds += not due
        self._asked_at = sys.maxsize
        changes = [change for index in range(len(self._carried)) if (change := self._ask(index)) is not None]
        return Round(len(self._carried), tuple(changes))

    @property
    def behind(self) -> bool:
        """Whether frames have come that not every answer of the last round has seen."""
        return self.session.frames_seen > self._asked_at

    @property
    def summary(self) -> Summary:
        """Up to now; one that is due at this moment counts as dropped."""
        dropped = self._due - (self._rounds - self._last_rounds)
        return Summary(
            self.session.frames_seen, self.frames_dropped, self._rounds, dropped, self._answers, self._changes
        )

    def _ask(self, index: int) -> Change | None:
        question, standing = self._carried[index]
        told: Ranking | Answer
        if question.options:
            told = self.session.rank(standing, question.options, score=self._score)
            answer, probability = told.best.option, told.best.probability
        else:
            told = self.session.ask(standing).result
            answer, probability = told.text, None
        self._answers += 1
        self._asked_at = min(self._asked_at, told.frames_seen)
        previous, self._said[index] = self._said[index], answer
        if answer == previous:
            return None
        self._changes += 1
        change = Change(
            index + 1, question.text, answer, previous, probability, told.time_s, told.frames_seen, told.trace, told.degraded
        )
        self._tell(change)
        return change


def follow_file(standing: StandingQuestions, source: Source, *, until_s: float | None = None) -> None:
    """See every frame, and ask at exact frames: those that `due` names, and the last one.

    Raises:
        UsageError: the stream ends before it has shown anything.
        KeepsightError: what the source raises.
    """
    session = standing.session
    for frame in source:
        if until_s is not None and frame.time_s > until_s and session.frames_seen:
            break
        session.see(frame)
        if standing.due(frame):
            standing.ask()
    if not session.frames_seen:
        raise UsageError(f"{source!r} has no frame to ask about.")
    if standing.behind:
        standing.ask(due=False)


def follow_camera(
    standing: StandingQuestions, uri: str, *, until_s: float | None = None, branches: Sequence[Branch] = ()
) -> None:
    """Watch live, or a file in real time, on a thread of its own, and ask on this one: frames never wait for an answer.

    Rounds are due at the same frames as offline. One that is due while another is being answered waits for it, and gives way
    to a newer one. A lost camera is opened again, with the memory kept.

    Raises:
        KeepsightError: what stopped a file; a graph or the language model fails.
    """
    ready = threading.Event()
    session = standing.session

    def seen(frame: Frame) -> None:
        if standing.due(frame):
            ready.set()

    camera = Camera(session, uri, on_frame=seen, branches=branches)
    try:
        camera.wait()
        while True:
            over = camera.ended or (until_s is not None and session.time_s >= until_s)
            if ready.wait(0 if over else _LOOK_S):
                ready.clear()  # before asking: what becomes due meanwhile is another round
                if standing.behind:  # the last round may have begun after this frame was seen, before it was called due
                    standing.ask()
            elif over and standing.behind:
                standing.ask(due=False)
            if over:
                break
            camera.check()
    finally:
        camera.close()
        standing.frames_dropped = camera.dropped
