"""The demo: a scripted scene plays in real time through GStreamer, and questions about now and the past are asked meanwhile."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from keepsight.runtime.answer import Answer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.datasets import Question, stream_clip, stream_questions
from keepsight.runtime.evaluation.scenes import Scene, plan_scenes
from keepsight.runtime.session import Session
from keepsight.streams import Source

_PER_SCENE = 2  # questions asked while a scene is on, from the second scene on


@dataclass(frozen=True)
class Show:
    """What is shown: so many scenes of easy-VQA's test pictures, chosen by a seed."""

    scenes: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Cue:
    """Questions that are asked once the stream has reached a moment."""

    time_s: float
    scene: Scene
    questions: list[Question]


def play(show: Show, *, threads: int | None = None, quiet: bool = False) -> dict[str, Any]:
    """Play the show with the shipped bundle, print questions, answers and their latency, and sum up.

    Returns:
        `right`, `n`, `first_token_ms` and `frames_per_s` figures, `peak_memory_mb`, and every answer.

    Raises:
        KeepsightError: a part of the set-up is missing, or the stream fails.
    """
    console = Console(quiet=quiet, highlight=False)
    started = time.perf_counter()
    bundle = Bundle.open("tiny")
    with Session(bundle, threads=threads) as session, tempfile.TemporaryDirectory(prefix="keepsight-") as folder:
        clip = Path(folder) / "live.mp4"
        cues = _script(show, clip, session)
        _warm_up(session, clip)
        console.print(_opening(show, cues, time.perf_counter() - started))
        answers = _perform(session, clip, cues, console)
        report = _report(session, answers)
    console.print(_closing(report))
    return report


def _script(show: Show, clip: Path, session: Session) -> list[Cue]:
    """Make the video, and the cues: questions near the end of each scene, about what has been shown so far."""
    manifest = session.bundle.manifest
    rng = np.random.default_rng(show.seed)
    scenes = plan_scenes(easyvqa.pictures("test"), show.scenes, rng)
    own: dict[Path, list[tuple[str, str]]] = {}
    for row in easyvqa.load("test"):
        own.setdefault(row.picture.path, []).append((row.question, row.answer))
    stream_clip(scenes, clip, rng, fps=manifest.sample_fps, size=manifest.dims.image_size)
    cues, frame = [], 0
    for index, scene in enumerate(scenes):
        asked_at = (frame + scene.hold - 1) / manifest.sample_fps
        frame += scene.hold + scene.fade
        chosen: list[Question] = []
        if index:
            drawn = stream_questions(scenes[: index + 1], own[scene.picture.path], rng)
            present = next(question for question in drawn if not question.past)
            chosen = [*(question for question in drawn if question.past), present]
            chosen = [chosen[0], present] if index % 2 else chosen[:_PER_SCENE]
        cues.append(Cue(asked_at, scene, chosen))
    return cues


def _warm_up(session: Session, clip: Path) -> None:
    """Run every stage once, so that the first question of the show pays for no loading."""
    with session.source(str(clip)) as source:
        session.see(next(source))
    session.ask("what is this?").result  # noqa: B018
    session.forget()


def _perform(session: Session, clip: Path, cues: list[Cue], console: Console) -> list[tuple[Question, Answer]]:
    answers: list[tuple[Question, Answer]] = []
    source: Source = session.source(str(clip), realtime=True)
    watcher = session.watch(source)
    for cue in cues:
        watcher.wait_until(cue.time_s)
        console.print(_caption(cue))
        for question in cue.questions:
            console.print(f"  [bold]{question.text}[/]", end=" ")
            answer = session.ask(question.text).result
            answers.append((question, answer))
            console.print(_verdict(question, answer))
            console.print(Text(f"  {answer.trace}", style="dim"))
    watcher.join(30.0)
    return answers


def _caption(cue: Cue) -> Text:
    picture = cue.scene.picture
    return Text(f"{cue.time_s:5.1f} s  the camera shows a {picture.color} {picture.shape}", style="cyan")


def _verdict(question: Question, answer: Answer) -> Text:
    right = answer.text.strip().lower() == question.answer
    if right:
        return Text(f"{answer.text}  ✓", style="green")
    return Text(f"{answer.text}  ✗ (right: {question.answer})", style="red")


def _opening(show: Show, cues: list[Cue], ready_s: float) -> Rule:
    return Rule(f"keepsight-tiny, ready after {ready_s:.1f} s: {show.scenes} scenes, {cues[-1].time_s:.0f} s live")


def _report(session: Session, answers: list[tuple[Question, Answer]]) -> dict[str, Any]:
    first = np.array([answer.trace.first_token_ms for _, answer in answers] or [np.nan])
    frame_ms = np.median([answer.trace.vision_ms + answer.trace.memory_ms for _, answer in answers] or [np.nan])
    right = [answer.text.strip().lower() == question.answer for question, answer in answers]
    return {
        "right": int(sum(right)),
        "n": len(answers),
        "first_token_ms": {"p50": round(float(np.percentile(first, 50)), 1), "p95": round(float(np.percentile(first, 95)), 1)},
        "frames_per_s": round(1000 / float(frame_ms), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "memory_bank_mb": round(session.qformer.bank.nbytes / 2**20, 2),
        "frames_seen": session.frames_seen,
        "answers": [{**answer.as_dict(), "right_answer": question.answer} for question, answer in answers],
    }  # fmt: skip


def _closing(report: dict[str, Any]) -> Text:
    first = report["first_token_ms"]
    return Text(
        f"{report['right']} of {report['n']} right | first token after {first['p50']:.0f} ms (p95 {first['p95']:.0f}) | "
        f"vision and memory keep up with {report['frames_per_s']:.0f} frames/s | peak memory {report['peak_memory_mb']} MB, "
        f"of which the visual memory {report['memory_bank_mb']} MB, fixed",
        style="bold",
    )
