"""What a feature log holds, on the terminal and as JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer

from keepsight.runtime.storage.feature_history import FeatureHistory
from keepsight.runtime.timeline import Interval

__all__ = ["describe_history", "show_history"]


def describe_history(history: FeatureHistory) -> dict[str, Any]:
    """First and last time, stretches and the gaps between them, bytes, and what can't be read."""
    calendar, stretches = history.calendar, history.stretches()
    gaps = [Interval(one.interval.end_s, two.interval.start_s) for one, two in pairwise(stretches)]
    return {
        "log": str(history.folder), "every_s": history.every_s, "live": history.clock.dated,
        "records": history.records, "bytes": history.nbytes, **calendar.as_dict(Interval(*history.covers_s)),
        "stretches": [{**calendar.as_dict(one.interval), "records": one.records} for one in stretches],
        "gaps": [calendar.as_dict(gap) for gap in gaps],
        "runs": history.runs, "clock_jumps": history.clock.jumps, "damaged": [str(error) for error in history.damaged],
    }  # fmt: skip


def show_history(history: FeatureHistory, *, png: Path | None = None, as_json: bool = False) -> None:
    """Print what a feature log holds. `png` is the picture that has been drawn of it, to be named in the JSON."""
    if as_json:
        report = describe_history(history)
        typer.echo(json.dumps(report if png is None else {**report, "png": str(png)}, ensure_ascii=False))
        return
    _print_stretches(history)
    for error in history.damaged:
        typer.echo(str(error), err=True)


def _print_stretches(history: FeatureHistory) -> None:
    from rich.console import Console
    from rich.table import Table

    calendar, stretches = history.calendar, history.stretches()
    table = Table("from", "to", title=f"{history.records} records, one every {history.every_s:g} s")
    for name in ("seconds", "records", "gap after, s"):
        table.add_column(name, justify="right")
    for stretch, following in zip(stretches, [*stretches[1:], None], strict=True):
        start_s, end_s = stretch.interval.start_s, stretch.interval.end_s
        gap = "" if following is None else f"{following.interval.start_s - end_s:.1f}"
        table.add_row(calendar.written(start_s), calendar.written(end_s), f"{end_s - start_s:.1f}", str(stretch.records), gap)
    console = Console()
    console.print(table)
    first, last = map(calendar.written, history.covers_s)
    gaps = len(stretches) - 1
    jumps = f", {history.clock.jumps} jumps of the clock" if history.clock.jumps else ""
    console.print(
        f"{first} to {last}, {gaps} gap{'' if gaps == 1 else 's'}; {history.nbytes / 1e6:.2f} MB, written by "
        f"{history.runs} run{'' if history.runs == 1 else 's'}{jumps}",
        highlight=False,
    )
