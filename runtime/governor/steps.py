"""The steps that a live session can take to do less: how they are spelled, what they help against, and how they are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from keepsight.runtime.governor.governor import Cause, Step
from keepsight.runtime.language.llm import LLM
from keepsight.runtime.session import Session
from keepsight.streams.errors import UsageError

__all__ = ["DEFAULT_STEPS", "Knob", "Knobs", "Turn", "parse_steps"]

DEFAULT_STEPS = "threads=1/2,threads=1,rate=1/2,context=1/2,memory=1/2,rate=1/4"
"""The steps, in order, where none are named."""

Knob = Literal["rate", "memory", "context", "answer", "threads"]
"""What can be turned down:

- rate: frames that are remembered, of those that the bundle asks for;
- memory: slots of the visual bank, and of the bank of every standing question;
- context: positions of the language model's context;
- answer: tokens of an answer;
- threads: CPU threads of the language model.
"""

_AGAINST: Mapping[Knob, frozenset[Cause]] = {
    "rate": frozenset({"heat", "backlog"}),
    "memory": frozenset({"memory"}),
    "context": frozenset({"memory"}),
    "answer": frozenset({"heat", "backlog"}),
    "threads": frozenset({"cpu"}),
}


@dataclass(frozen=True)
class Turn(Step):
    """A step that turns one knob down.

    Attributes:
        knob: which.
        to: a share of what it is at full, below 1; or a number from 1 on.
    """

    knob: Knob
    to: Fraction

    def of(self, full: int) -> int:
        """The setting, where the knob is at `full` without the step."""
        return int(self.to) if self.to >= 1 else max(1, int(self.to * full))


def parse_steps(spelling: str) -> tuple[Turn, ...]:
    """Steps as the command line spells them: `rate=1/2,memory=10,context=1024`, in the order in which they are taken.

    A number below 1 (`1/2`, `0.5`) is a share of what there is without the step, one from 1 on is that many slots, positions,
    tokens or threads; `rate` takes shares alone. `on` means the default steps, `off` none.

    Raises:
        UsageError: a knob that is not known, a number that makes no sense, or a knob that is turned up again by a later step.

    >>> [str(step) for step in parse_steps("rate=1/2, memory=10")]
    ['rate=1/2', 'memory=10']
    """
    spelling = spelling.strip()
    if spelling == "off":
        return ()
    steps = tuple(_parsed(part.strip()) for part in (DEFAULT_STEPS if spelling == "on" else spelling).split(","))
    for index, step in enumerate(steps):
        for earlier in steps[:index]:
            if earlier.knob == step.knob and (earlier.to >= 1) == (step.to >= 1) and step.to >= earlier.to:
                raise UsageError(f"--governor {spelling!r}: {step} does not go further than {earlier}.", fix="Order them.")
    return steps


def _parsed(part: str) -> Turn:
    found = re.fullmatch(r"(\w+)\s*=\s*(\d+/[1-9]\d*|\d*\.\d+|\d+)", part)
    if found is None or found[1] not in get_args(Knob):
        raise UsageError(
            f"--governor: {part!r} is no step.",
            fix=f"Write on, off, or steps such as {DEFAULT_STEPS!r}; knobs are {', '.join(get_args(Knob))}.",
        )
    knob: Knob = found[1]  # type: ignore[assignment]
    to = Fraction(found[2])
    if to <= 0 or (to > 1 and to.denominator != 1) or (knob == "rate" and to >= 1):
        raise UsageError(
            f"--governor: {part!r} makes no sense.",
            fix="Give a share below 1" + ("." if knob == "rate" else ", or a whole number from 1 on."),
        )
    return Turn(f"{knob}={found[2]}", _AGAINST[knob], knob, to)


class Knobs:
    """Turns the knobs of sessions on one machine; together they may share a language model.

    Args:
        sessions: as they are now, at full.

    Attributes:
        full_ctx, full_threads: of each language model, without any step.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = tuple(sessions)
        self.models: tuple[LLM, ...] = tuple({id(one.llm): one.llm for one in sessions if one.has_llm}.values())
        self.full_ctx = [model.n_ctx for model in self.models]
        self.full_threads = [model.n_threads for model in self.models]

    def sorted_out(self, steps: Sequence[Turn]) -> tuple[list[Turn], dict[Turn, str], list[Turn]]:
        """The steps that can be taken on this machine; those that can't, each with why; and those that would change nothing."""
        usable: list[Turn] = []
        refused: dict[Turn, str] = {}
        idle: list[Turn] = []
        for step in steps:
            why = self.why_not(step)
            if why is not None:
                refused[step] = why
            elif all(now >= before for now, before in zip(self._settings(step), self._settings(step, usable), strict=True)):
                idle.append(step)
            else:
                usable.append(step)
        return usable, refused, idle

    def _settings(self, step: Turn, earlier: Sequence[Turn] | None = None) -> list[Fraction]:
        """What the knob of a step is set to by it, or by the last of earlier ones; of each session or language model."""
        full: Sequence[int]
        if step.knob == "rate":
            chosen = [one.to for one in earlier if one.knob == "rate"] if earlier is not None else [step.to]
            return [min(chosen, default=Fraction(1))]
        if step.knob == "memory":
            full = [one.qformer.dims.memory_length for one in self.sessions]
        elif step.knob == "answer":
            full = [_tokens(one) for one in self.sessions]
        else:
            full = self.full_ctx if step.knob == "context" else self.full_threads
        turns = [step] if earlier is None else [one for one in earlier if one.knob == step.knob]
        return [Fraction(min([most, *(one.of(most) for one in turns)])) for most in full]

    def why_not(self, step: Turn) -> str | None:
        """Why a step can't be taken on this machine; None if it can."""
        if step.knob in ("context", "answer", "threads") and not self.models:
            return "there is no language model"
        if step.knob == "memory":
            return self._why_not_memory(step)
        if step.knob == "context":
            room = max(_room(one) for one in self.sessions)
            wanted = min(step.of(full) for full in self.full_ctx)
            if wanted < room:
                return f"a question and its answer may take {room} of {wanted} positions"
        return None

    def _why_not_memory(self, step: Turn) -> str | None:
        if any(one.qformer.bank_on == "device" for one in self.sessions):
            return "the memory is on the GPU, whose tensors have one size: fewer slots would give nothing back"
        return "this memory has one slot" if all(one.qformer.policy in ("average", "last") for one in self.sessions) else None

    def turn(self, on: Sequence[tuple[Turn, Cause]], every_s: Sequence[float]) -> bool:
        """Set every knob as the steps that are on say; those without a step to full.

        Args:
            on: with their causes, the later ones of a knob go further.
            every_s: from one frame to the next without any step, of each session.

        Returns:
            False if a language model's context has to wait until an answer that is being written is finished.

        Raises:
            LLMError: a context could not be opened.
        """
        turned = {step.knob: step for step, _ in on}
        reasons = tuple(f"{step} ({cause})" for step, cause in on)
        rate, memory, answer = turned.get("rate"), turned.get("memory"), turned.get("answer")
        for one, usual_s in zip(self.sessions, every_s, strict=True):
            one.thin(None if rate is None else usual_s / float(rate.to))
            length = one.qformer.dims.memory_length
            limit = length if memory is None else min(length, memory.of(length))
            if limit != one.qformer.limit:
                one.remember_at_most(limit)
            one.answer_tokens = None if answer is None else answer.of(_tokens(one))
            one.degraded = reasons
        done = True
        context, threads = turned.get("context"), turned.get("threads")
        for model, full_ctx, full_threads in zip(self.models, self.full_ctx, self.full_threads, strict=True):
            wanted = full_threads if threads is None else min(full_threads, threads.of(full_threads))
            if wanted != model.n_threads:
                model.set_threads(wanted)
            positions = full_ctx if context is None else min(full_ctx, -(-context.of(full_ctx) // 256) * 256)
            if positions != model.n_ctx:
                done &= model.resize(positions)
        return done


def _tokens(session: Session) -> int:
    return session.bundle.manifest.decoding.max_tokens


def _room(session: Session) -> int:
    """Positions that a question may take, with its answer: a generous bound, since tokenizers differ."""
    manifest = session.bundle.manifest
    template = len(manifest.templates.llm.encode())
    return manifest.dims.queries + template + 2 * max(manifest.dims.text_buckets) + _tokens(session) * manifest.decoding.beams
