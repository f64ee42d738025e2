"""A report, and a comparison of two, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keepsight.runtime.profiling.compare import Change, Comparison, written
from keepsight.runtime.profiling.outline import PATHS, blocks, place, rows, throttled
from keepsight.runtime.profiling.report import Chain, Profile, Stage

__all__ = ["print_comparison", "print_profile"]

_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 12
_BLOCKS = 12

_COLOURS = {"slower": "red", "faster": "green", "same": "", "unclear": "yellow", "unknown": "dim"}


def print_profile(profile: Profile, console: Console) -> None:
    """Print a report: where, a frame's stages, a question's, memory, energy, what throttled, notes."""
    _print_title(profile, console)
    for path, words in PATHS:
        if any(stage.path == path for stage in profile.stages):
            console.print()
            console.print(_stage_table(profile, path, f"{words}, ms"))
    if profile.memory:
        console.print()
        console.print(_memory_table(profile))
    for table in filter(None, (_energy_table(profile), _contention_table(profile), _block_table(profile))):
        console.print()
        console.print(table)
    lines = list(_closing(profile))
    if lines:
        console.print()
    for words, style in lines:
        console.print(Text(words, style), highlight=False)


def _print_title(profile: Profile, console: Console) -> None:
    """What was measured, where, and how fast it was in all."""
    runs = f" in {profile.runs} runs" if profile.runs > 1 else ""
    frames = f"{profile.frames} frame{'' if profile.frames == 1 else 's'}"
    console.print(
        Text.assemble(
            (profile.bundle, "bold"), f", {profile.variant} on {profile.backend}, memory {profile.memory_policy}, ",
            profile.language_model or "no language model",
        )
    )  # fmt: skip
    console.print(Text(", ".join(f"{name} {value}" if name not in _PLAIN else value for name, value in place(profile)), "dim"))
    speed = f"{profile.fps:.3g} frames/s"
    token = profile.stage("token", "question")
    if token is not None and token.statistics.p50 > 0:
        speed += f", {1000 / token.statistics.p50:.3g} tokens/s"
    console.print(Text.assemble(f"{profile.source}: {frames}{runs}, ", (speed, "bold")))


_PLAIN = ("machine", "processor", "system")


def _stage_table(profile: Profile, path: Chain, words: str) -> Table:
    # No column may be cut: a terminal of 80 columns has room for all of them, and the name gives way.
    table = Table(words, box=None, pad_edge=False, header_style="bold")
    for name in ("share", "p50", "p90", "p95", "p99", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("up to p95", no_wrap=True, width=_SPARK_WIDTH)
    for row in rows(profile, path):
        found = row.stage.statistics
        numbers = (_ms(value) for value in (found.p50, found.p90, found.p95, found.p99, found.mean))
        share = "" if row.share is None else f"{row.share:.0%}"
        title = Text(("", "  ", "    ", "")[row.depth] + row.stage.name + ("*" if row.stage.clock == "device" else ""))
        table.add_row(title, share, *numbers, _spark(row.stage), style="bold" if row.depth == 0 else "")
    if any(stage.clock == "device" for stage in profile.stages if stage.path == path):
        table.caption, table.caption_justify = "* by the GPU's own clock", "left"
    return table


def _spark(stage: Stage) -> str:
    """The histogram in a line; nothing for a single sample."""
    values = np.asarray(stage.samples)
    if len(values) < 2:
        return ""
    low, high = values.min(), np.percentile(values, 95)
    counts, _ = np.histogram(values, bins=_SPARK_WIDTH, range=(low, high) if high > low else None)
    top = max(1, counts.max())
    return "".join(" " if count == 0 else _SPARK[int((len(_SPARK) - 1) * count / top)] for count in counts)


def _memory_table(profile: Profile) -> Table:
    table = Table("memory, MB", box=None, pad_edge=False, header_style="bold")
    for name in ("steady", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for use in profile.memory:
        table.add_row(Text(use.component), f"{use.steady / 1e6:.1f}", f"{use.peak / 1e6:.1f}", Text(use.basis, "dim"))
    return table


def _energy_table(profile: Profile) -> Table | None:
    if (energy := profile.energy) is None:
        return None
    table = Table("energy, J", box=None, pad_edge=False, header_style="bold")
    for name in ("in all", "above idle"):
        table.add_column(name, justify="right", no_wrap=True)
    for words, numbers in (
        ("a frame", (energy.per_frame, energy.marginal_per_frame)),
        ("an answer", (energy.per_answer, energy.marginal_per_answer)),
    ):
        table.add_row(words, *("-" if number is None else f"{number:.3g}" for number in numbers))
    table.caption, table.caption_justify = f"by {escape(energy.meter)}; idle {energy.idle_watts:.3g} W", "left"
    return table


def _contention_table(profile: Profile) -> Table | None:
    if (both := profile.contention) is None:
        return None
    table = Table("vision and language model", box=None, pad_edge=False, header_style="bold")
    for name in ("alone", "at once", "changes"):
        table.add_column(name, justify="right", no_wrap=True)
    for words, (alone, together) in (
        ("frames/s", both.frames_per_s), ("tokens/s", both.tokens_per_s),
        ("vision, ms a frame", both.vision_ms), ("language model, ms a token", both.token_ms),
    ):  # fmt: skip
        table.add_row(words, f"{alone:.3g}", f"{together:.3g}", f"x {together / alone:.2f}" if alone else "-")
    return table


def _block_table(profile: Profile) -> Table | None:
    found = sorted(blocks(profile), key=lambda block: -block.ms)
    if not found:
        return None
    table = Table("engine", "block, the slowest", box=None, pad_edge=False, header_style="bold")
    for name in ("layers", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = found if len(found) <= _BLOCKS + 1 else found[:_BLOCKS]
    for block in shown:
        table.add_row(Text(block.engine), Text(block.name), str(len(block.layers)), _ms(block.ms))
    if rest := found[len(shown) :]:
        layers, ms = str(sum(len(block.layers) for block in rest)), _ms(sum(block.ms for block in rest))
        table.add_row("", Text(f"{len(rest)} more", "dim"), layers, ms)
    return table


def _closing(profile: Profile) -> Iterator[tuple[str, str]]:
    """Lines with their style."""
    if profile.cold_start:
        total = sum(phase.ms for phase in profile.cold_start)
        parts = ", ".join(f"{phase.name} {_ms(phase.ms)}" for phase in profile.cold_start)
        yield f"cold start, ms: {_ms(total)} ({parts})", ""
    if profile.drops:
        yield "frames dropped: " + ", ".join(f"{count} {cause}" for cause, count in profile.drops.items()), ""
    zones: dict[str, float] = {}
    for moment in profile.timeline:
        for zone, celsius in moment.celsius.items():
            zones[zone] = max(celsius, zones.get(zone, celsius))
    if zones:
        hottest = max(zones, key=lambda zone: zones[zone])
        yield f"hottest: {hottest}, {zones[hottest]:.1f} °C", ""
    if spans := throttled(profile):
        seconds, why = sum(end - start for start, end, _ in spans), ", ".join(sorted({why for *_, why in spans}))
        yield f"throttled for {seconds:.1f} s while it was measured: {why}", "bold red"
    for note in profile.notes:
        yield f"note: {note}", ""


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
    path: Chain | None = None
    for change in found.changes:
        if path not in (None, change.path):
            table.add_section()
            table.add_row()
        path = change.path
        style = _COLOURS[change.verdict]
        indent = "  " if change.part == "stage" else "    " if change.inside else ""
        bold = "bold " if change.part == "whole" else ""
        table.add_row(
            Text(indent + change.name, bold), _ms(change.before_ms), _ms(change.after_ms),
            "" if change.ratio is None else _ratio(change.ratio), _interval(change),
            _percent(change.share) if change.part == "stage" else "", Text(change.verdict, f"{bold}{style}".strip()),
        )  # fmt: skip
    return table


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return "-"
    if change.ratio is None:
        return f"{change.low:+.2f} to {change.high:+.2f} ms"
    return f"{_ratio(change.low)} to {_ratio(change.high)}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 1000 else "> 999"


def _percent(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 1 else f"{share:+.0%}"


def _amount_table(found: Comparison) -> Table:
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for name in ("A", "B", "B / A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    shown = [a for a in found.amounts if a.grew or a.unit != "bytes" or abs((a.ratio or 1.0) - 1) >= 0.005]
    for amount in shown:
        same = Text("not judged", "dim") if amount.tolerance is None else Text("same")
        verdict = Text("bigger", "red") if amount.grew else same
        ratio = "" if amount.ratio is None else _ratio(amount.ratio)
        table.add_row(Text(amount.name), written(amount, amount.before), written(amount, amount.after), ratio, verdict)
    if hidden := len(found.amounts) - len(shown):
        table.caption, table.caption_justify = f"{hidden} figures of memory differ by less than 0.5 %", "left"
    return table


def _ms(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
