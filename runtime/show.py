"""Answers with their evidence, and what a memory holds, on the terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

from keepsight.runtime.answer import NOTHING_REMEMBERED, Answer, AnswerStream
from keepsight.runtime.keyframes import write_key_frames
from keepsight.runtime.session import Session
from keepsight.runtime.timeline import Interval

__all__ = ["describe_memory", "notes", "show_answer", "show_timeline"]


def show_answer(answers: AnswerStream, folder: Path | None, *, as_json: bool) -> None:
    """Print an answer as it is written, then what it rests on; the key frames of that go to `folder`, if one is given.

    Raises:
        UsageError: the folder can't be written to.
    """
    if not as_json:
        for piece in answers:
            typer.echo(piece, nl=False)
        typer.echo()
    answer = answers.result
    frames = () if answer.evidence is None else answer.evidence.frames
    files = [] if folder is None else write_key_frames(frames, folder)
    if as_json:
        typer.echo(json.dumps(_with_files(answer.as_dict(), files), ensure_ascii=False))
        return
    for line in notes(answer):
        typer.echo(line, err=True)
    for path in files:
        typer.echo(path, err=True)
    if folder is not None and answer.evidence is None and answer.finish != NOTHING_REMEMBERED:
        typer.echo("no evidence: this bundle's replay graph does not tell where it looked; export the bundle again", err=True)


def notes(answer: Answer) -> list[str]:
    """What is said below an answer: where the Q-Former looked and what it cost, or what is remembered instead."""
    calendar = answer.calendar
    if calendar is not None and answer.finish == NOTHING_REMEMBERED:
        return ["remembered: " + ", ".join(calendar.written_interval(span) for span in answer.remembered)]
    lines = [str(answer.trace)]
    if calendar is not None and answer.evidence is not None:
        looked = (f"{calendar.written_interval(moment.interval)} ({moment.share:.0%})" for moment in answer.evidence.moments)
        lines.insert(0, "looked at " + ", ".join(looked))
    return lines


def _with_files(answer: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    evidence = answer.get("evidence")
    if evidence is not None and files:
        for frame, path in zip(evidence["frames"], files, strict=True):
            frame["file"] = str(path)
    return answer


def describe_memory(session: Session) -> dict[str, Any]:
    """What a session's visual memory holds: one row for each place in time, oldest first, over all visual tokens.

    Tokens merge on their own, so a row's tokens need not cover the same time: start and end are medians, `frames` is the median
    number of frames, and `agreement` the share of tokens whose slot of this row holds the middle of the row's span.
    """
    bank, calendar = session.qformer.bank, session.calendar
    order = bank.order[0]
    first_s, last_s, sizes = (
        np.take_along_axis(values[0], order, axis=0) for values in (bank.first_s, bank.last_s, bank.sizes)
    )
    rows = []
    for first, last, size in zip(first_s, last_s, sizes, strict=True):
        span = Interval(float(np.median(first)), float(np.median(last)))
        middle = (span.start_s + span.end_s) / 2
        half = calendar.tolerance_s / 2
        held = (first - half <= middle) & (middle <= last + half)
        frames = {"frames": float(np.median(size)), "least": int(size.min()), "most": int(size.max())}
        rows.append({**calendar.as_dict(span), **frames, "agreement": round(float(held.mean()), 4)})
    kept = session.key_frames
    times = [{"time_s": round(frame.time_s, 3), "time": calendar.iso(frame.time_s)} for frame in kept.frames]
    return {
        "frames_seen": session.frames_seen, "tokens": bank.tokens, "slots": rows, "bytes": bank.nbytes,
        "key_frames": times, "key_frame_bytes": kept.nbytes, "clock_jumps": session.clock.jumps,
    }  # fmt: skip


def show_timeline(session: Session, *, png: Path | None = None, key_frames: Path | None = None, as_json: bool = False) -> None:
    """Print what a session's memory holds; draw it to `png`, and write the key frames to a folder, if they are given.

    Raises:
        UsageError: a file or folder that can't be written to.
        MissingComponentError: Pillow is not installed.
    """
    report = describe_memory(session)
    if png is not None:
        from keepsight.runtime.memory_picture import save_picture

        save_picture(session, png)
        report["png"] = str(png)
    if key_frames is not None:
        for entry, path in zip(report["key_frames"], write_key_frames(session.key_frames.frames, key_frames), strict=True):
            entry["file"] = str(path)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print_timeline(session, report)


def _print_timeline(session: Session, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    calendar = session.calendar
    table = Table("slot", "from", "to", title=f"{report['frames_seen']} frames in {len(report['slots'])} slots")
    for name in ("frames", "tokens that agree"):
        table.add_column(name, justify="right")
    table.add_column("", min_width=16)
    longest = max(row["frames"] for row in report["slots"])
    for place, row in enumerate(report["slots"], start=1):
        spread = f"{row['frames']:g}" + (f" ({row['least']}-{row['most']})" if row["least"] != row["most"] else "")
        bar = "█" * max(1, round(16 * row["frames"] / longest))
        times = (calendar.written(row[name]) for name in ("start_s", "end_s"))
        table.add_row(str(place), *times, spread, f"{row['agreement']:.0%}", bar)
    console = Console()
    console.print(table)
    console.print(
        f"from, to and frames are medians over {report['tokens']} visual tokens, which merge on their own; "
        f"{report['bytes'] / 1e6:.2f} MB, {len(report['key_frames'])} key frames of {report['key_frame_bytes'] / 1e3:.0f} kB",
        highlight=False,
    )
