"""Accuracy of a bundle on a data set, through the whole deployed path: video, GStreamer, graphs, memory, llama.cpp."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from keepsight.runtime.answer import Mode
from keepsight.runtime.evaluation.datasets import Clip, Question
from keepsight.runtime.session import Session, Standing


@dataclass(frozen=True)
class Result:
    """One question and what was answered."""

    question: Question
    answer: str

    @property
    def right(self) -> bool:
        """Exact match, letter case and surrounding space aside."""
        return self.answer.strip().lower() == self.question.answer.strip().lower()


def evaluate(session: Session, clips: Iterable[Clip], mode: Mode) -> Iterator[Result]:
    """Watch every clip from its start and ask each question at its time."""
    for clip in clips:
        session.forget()
        yield from _watch(session, clip, mode)


def _watch(session: Session, clip: Clip, mode: Mode) -> Iterator[Result]:
    asked: list[tuple[Question, str | Standing]] = [
        (question, session.stand(question.text) if mode == "standing" else question.text) for question in clip.questions
    ]
    waiting = sorted(asked, key=lambda pair: float("inf") if pair[0].time_s is None else pair[0].time_s)
    with session.source(str(clip.path)) as source:
        for frame in source:
            # A question put at time t is about the last frame that was there at t.
            while waiting and waiting[0][0].time_s is not None and waiting[0][0].time_s < frame.time_s:
                yield _answer(session, *waiting.pop(0))
            session.see(frame)
    for pair in waiting:
        yield _answer(session, *pair)


def _answer(session: Session, question: Question, ask: str | Standing) -> Result:
    return Result(question, session.ask(ask).result.text)


def summary(results: Iterable[Result]) -> dict[str, Any]:
    """`accuracy`, `n`, `past`, `present`, `majority` (always the most frequent answer), and `by_kind`.

    `past` and `present` are None where no such question was asked.
    """
    rows = list(results)
    kinds = sorted({row.question.kind for row in rows})
    most = Counter(row.question.answer for row in rows).most_common(1)
    return {
        "accuracy": _share(rows),
        "n": len(rows),
        "past": _share([row for row in rows if row.question.past]),
        "present": _share([row for row in rows if not row.question.past]),
        "majority": round(most[0][1] / len(rows), 4) if rows else None,
        "by_kind": {
            kind: {"accuracy": _share(mine), "n": len(mine)}
            for kind in kinds
            if (mine := [row for row in rows if row.question.kind == kind])
        },
    }


def _share(rows: list[Result]) -> float | None:
    return round(sum(row.right for row in rows) / len(rows), 4) if rows else None
