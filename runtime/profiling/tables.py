"""A report, and a comparison of two, as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keepsight.runtime.profiling.compare import Change, Comparison, written

__all__ = ["print_comparison"]

_COLOURS = {"slower": "red", "faster": "green", "same": "", "unclear": "yellow", "unknown": "dim"}


def print_comparison(found: Comparison, console: Console, *, names: tuple[str, str] = ("A", "B")) -> None:
    """Print what changed: times with their intervals, then memory, energy and the like, then notes."""
    for letter, name, runs in zip("AB", names, found.runs, strict=True):
        console.print(Text(f"{letter}: {name} ({runs} run{'' if runs == 1 else 's'})"), highlight=False, soft_wrap=True)
    for reason in found.forced:
        console.print(Text(f"not comparable, but forced: {reason}", "yellow"))
    if found.changes:
        console.print(_change_table(found))
    if found.amounts:
        console.print(_amount_table(found))
    for note in found.notes:
        console.print(Text(f"note: {note}"), highlight=False)
    console.print(
        f"slower: by more than {found.threshold:.0%}, with 95 % confidence for all stages together (Holm)",
        style="dim", highlight=False,
    )  # fmt: skip


def _change_table(found: Comparison) -> Table:
    table = Table("time, median", box=None, pad_edge=False, header_style="bold")
    for name in ("A, ms", "B, ms", "B / A", "95 %", "adds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    path = None
    for change in found.changes:
        if path not in (None, change.path):
            table.add_section()
            table.add_row()
        path = change.path
        style = _COLOURS[change.verdict]
        bold = "bold " if change.part == "whole" else ""
        table.add_row(
            Text(("" if change.part == "whole" else "  ") + change.name, bold), _ms(change.before_ms), _ms(change.after_ms),
            "" if change.ratio is None else f"{change.ratio:.3f}", _interval(change),
            f"{change.share:+.1%}" if change.part == "stage" else "", Text(change.verdict, f"{bold}{style}".strip()),
        )  # fmt: skip
    return table


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return "-"
    if change.ratio is None:
        return f"{change.low:+.2f} to {change.high:+.2f} ms"
    return f"{change.low:.3f} to {_bounded(change.high)}"


def _bounded(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 100 else "> 100"


def _amount_table(found: Comparison) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in ("A", "B", "B / A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for amount in found.amounts:
        same = Text("not judged", "dim") if amount.tolerance is None else Text("same")
        verdict = Text("bigger", "red") if amount.grew else same
        ratio = "" if amount.ratio is None else f"{amount.ratio:.3f}"
        table.add_row(Text(amount.name), written(amount, amount.before), written(amount, amount.after), ratio, verdict)
    return table


def _ms(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
