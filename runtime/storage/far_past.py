"""Asking the far past: an exact memory of an interval, built again from a feature log, or what the log has instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import typer

from keepsight.runtime.answer import NOTHING_REMEMBERED, Answer, AnswerStream, LatencyTrace
from keepsight.runtime.language.llm import Score
from keepsight.runtime.language.ranking import Ranking
from keepsight.runtime.moments import TypedInterval
from keepsight.runtime.session import Session
from keepsight.runtime.storage.feature_history import FeatureHistory
from keepsight.runtime.timeline import Interval
from keepsight.streams.errors import UsageError

__all__ = ["ask_far_past", "rank_far_past", "recall", "refuse_options"]

_REFUSED: dict[str, tuple[Callable[[object], bool], str, str]] = {
    "when": (lambda value: value is not None, "A feature log has its own times: --when can't be used with it.", "Use --between."),
    "mode": (lambda value: value == "standing", "A feature log is asked by replay.", "Leave --mode out."),
    "evidence": (lambda value: value is not None, "A feature log has no pictures to show as --evidence.", "Leave it out."),
    "key_frames": (lambda value: value is not None, "A feature log has no --key-frames.", "Leave it out."),
    "memory": (lambda value: value == "concat", "A feature log may be of any length; concat is for clips.", "Use mbc."),
    "gate": (bool, "A feature log has no pictures for --gate to look at.", "Leave it out: the gate works while it is written."),
}  # fmt: skip


def refuse_options(options: Mapping[str, object]) -> None:
    """Refuse options of a command that make no sense for a feature log.

    Raises:
        UsageError: the first of them.
    """
    for name, value in options.items():
        senseless, why, fix = _REFUSED[name]
        if senseless(value):
            raise UsageError(why, fix=fix)


def recall(session: Session, history: FeatureHistory, interval: Interval | None = None) -> Session:
    """A session over the exact memory of an interval of a log (None: of all of it), and a line on stderr about it.

    Raises:
        UsageError, SnapshotError: as `Session.recall`.
    """
    covered = Interval(*history.covers_s) if interval is None else interval
    start = perf_counter()
    recalled = session.recall(history, covered.start_s, covered.end_s)
    took_s = perf_counter() - start
    newest = recalled.time_s
    seen = history.calendar.written_interval(Interval(max(covered.start_s, history.covers_s[0]), newest))
    typer.echo(f"{history.folder}: {recalled.frames_seen} records, {seen}, remembered again in {took_s:.2f} s.", err=True)
    return recalled


def ask_far_past(
    session: Session,
    history: FeatureHistory,
    question: str,
    typed: TypedInterval | None = None,
    *,
    prompt: str | None = None,
) -> AnswerStream:
    """Answer from the exact memory of what was typed, by replay; or say that nothing is there from then, and what is.

    Args:
        session: whose graphs and language model answer; its own memory is left alone.
        history: the log.
        question: in words.
        typed: None = all of the log.
        prompt: replaces both templates.

    Raises:
        UsageError: what was typed is no time; the question is empty or too long.
        SnapshotError: a record of the interval is damaged.
    """
    interval = None if typed is None else history.calendar.interval(typed)
    if interval is not None and not history.count(interval):
        return AnswerStream.of(_nothing_from(history, interval, question))
    return recall(session, history, interval).ask(question, prompt=prompt, interval=interval)


def rank_far_past(
    session: Session,
    history: FeatureHistory,
    question: str,
    options: Sequence[str],
    typed: TypedInterval | None = None,
    *,
    prompt: str | None = None,
    score: Score = "answer",
) -> Ranking:
    """Choose among given answers, from the exact memory of what was typed. Arguments as of `ask_far_past` and `Session.rank`.

    Raises:
        UsageError: nothing is there from then, and as `ask_far_past`.
        SnapshotError: a record of the interval is damaged.
    """
    interval = None if typed is None else history.calendar.interval(typed)
    if interval is not None and not history.count(interval):
        there = ", ".join(history.calendar.written_interval(stretch.interval) for stretch in history.stretches())
        raise UsageError(f"nothing remembered from then; {history.folder} has {there}.", fix="Ask about another time.")
    return recall(session, history, interval).rank(question, options, prompt=prompt, score=score)


def _nothing_from(history: FeatureHistory, interval: Interval, question: str) -> Answer:
    spans = tuple(stretch.interval for stretch in history.stretches())
    trace = LatencyTrace(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
    return Answer(
        "nothing remembered from then", question, "replay", history.covers_s[1], 0, NOTHING_REMEMBERED, trace,
        interval, spans, None, history.calendar,
    )  # fmt: skip
