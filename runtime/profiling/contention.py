"""One processor, two engines: what the visual encoder and the language model take from each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, islice
from statistics import median
from time import perf_counter

from keepsight.runtime.language.llm import LLM
from keepsight.runtime.language.segments import Text
from keepsight.runtime.profiling.load import Loaded
from keepsight.runtime.profiling.report import Contention
from keepsight.runtime.session import Session
from keepsight.streams import Frame
from keepsight.streams.errors import UsageError

__all__ = ["competitor", "contend"]

_FRAMES = 16  # of the source, seen in turns
_TOKENS = 64  # decoded after each prefill of a short text
_PROMPT = "What has been seen so far, from the first moment on?"


@dataclass
class _Pace:
    """How often something was done, and how long each took, milliseconds."""

    per_s: float
    ms: float


def competitor(loaded: Loaded) -> LLM:
    """The language model.

    Raises:
        UsageError: there is none.
    """
    if loaded.llm is None:
        raise UsageError("There is no language model to compete with.", fix="Profile a bundle with one, or without --contention.")
    return loaded.llm


def contend(loaded: Loaded, address: str, *, seconds: float) -> Contention:
    """Frames that are seen, tokens that are written, each alone and then both at once, for so many seconds each.

    Raises:
        UsageError: the bundle has no language model.
    """
    llm, session = competitor(loaded), loaded.session
    with loaded.bundle.source(address) as source:
        frames = list(islice(source, _FRAMES))
    _see(session, frames, 0.5)
    _write(llm, 0.5)
    vision, language = _see(session, frames, seconds), _write(llm, seconds)
    both = _at_once(lambda: _see(session, frames, seconds), lambda: _write(llm, seconds))
    session.forget()
    return Contention(
        frames_per_s=(vision.per_s, both[0].per_s), tokens_per_s=(language.per_s, both[1].per_s),
        vision_ms=(vision.ms, both[0].ms), token_ms=(language.ms, both[1].ms),
    )  # fmt: skip


def _see(session: Session, frames: list[Frame], seconds: float) -> _Pace:
    session.forget()
    took, began = [], perf_counter()
    for index in count():
        cost = session.see(replace(frames[index % len(frames)], time_s=float(index), index=index))
        took.append(cost.vision_ms)
        if perf_counter() - began >= seconds:
            break
    return _Pace(len(took) / (perf_counter() - began), median(took))


def _write(llm: LLM, seconds: float) -> _Pace:
    took: list[float] = []
    began = perf_counter()
    while perf_counter() - began < seconds:
        for spent in llm.pace([Text(_PROMPT)], _TOKENS):
            took.append(1000 * spent)
            if perf_counter() - began >= seconds:
                break
    return _Pace(1000 * len(took) / sum(took), median(took))


def _at_once(*parts: Callable[[], _Pace]) -> list[_Pace]:
    """Each on a thread of its own; what one raises is raised here."""
    found: list[_Pace | BaseException] = [_Pace(0, 0)] * len(parts)

    def run(index: int, part: Callable[[], _Pace]) -> None:
        try:
            found[index] = part()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=pair, name=f"keepsight-contend-{pair[0]}") for pair in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paces = []
    for pace in found:
        if isinstance(pace, BaseException):
            raise pace
        paces.append(pace)
    return paces
