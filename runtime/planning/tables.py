"""A plan on a terminal: what fits, what each stage takes, what binds, what to change; and boards side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from keepsight.runtime.planning.plan import Plan
from keepsight.runtime.planning.roofline import Stage

__all__ = ["print_plan", "print_plans"]

WIDTH = 100
_VERDICTS = {True: "[green]keeps up[/]", False: "[red]does not keep up[/]", None: "[yellow]may not keep up[/]"}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """All of a plan, at most 100 columns wide."""
    console = console or Console(width=min(WIDTH, Console().width))
    for line in _heading(plan):
        console.print(line)
    console.print(_stages(plan))
    for line in _summary(plan):
        console.print(line)
    if len(plan.modes) > 1:
        console.print(_modes(plan))
    if plan.suggestions:
        console.print("[bold]What to change[/], each planned again:")
    for suggestion in plan.suggestions:
        console.print(f"  {suggestion.change}: {suggestion.gain}")
    for note in plan.notes:
        console.print(f"[dim]- {note}[/]")


def print_plans(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Boards and precisions, a row each, at most 100 columns wide."""
    console = console or Console(width=min(WIDTH, Console().width))
    first = plans[0]
    asked = first.fps * first.request.cameras
    cameras = f"{first.request.cameras} camera{'s' * (first.request.cameras > 1)} at {first.fps:g} frames/s"
    console.print(
        f"[bold]{first.model}[/], memory of {first.memory_length} slots, language model {first.llm_kind or 'as it is'}, "
        f"{cameras}, {_standing(first)}"
    )
    heads = ("board", "graphs", "free GB", "vision ms", "frames/s", "x/÷", "1st token ms", "tokens/s")
    table = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for column in (table.columns[0], table.columns[4], table.columns[7]):
        column.no_wrap = True
    for plan, before in zip(plans, (None, *plans), strict=False):
        if before is not None and before.target != plan.target:
            table.add_section()
        vision = next(stage for stage in plan.stages if stage.name == "vision")
        free = "" if plan.fit is None else f"[{'green' if plan.fits else 'red'}]{plan.fit.free_bytes / 1e9:.1f}[/]"
        most = plan.most_fps * plan.request.cameras
        colour = {True: "green", False: "red", None: "yellow"}[plan.keeps_up]
        table.add_row(
            plan.target, plan.precision, free, _ms(vision.ms), f"[{colour}]{most:.1f}[/]", f"{plan.frame.bar:.2f}",
            "" if plan.first_token is None else f"{plan.first_token.ms:.0f}",
            "" if plan.tokens_per_s is None else f"{plan.tokens_per_s:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"[dim]Each board in its fastest mode; asked for: {asked:g} frames/s. Predictions: four of five published figures lie "
        "within x/÷ of theirs. Green fits, or keeps up; red does not; yellow may.[/]"
    )


def _heading(plan: Plan) -> list[str]:
    where = plan.target if plan.mode is None else f"{plan.target} in mode {plan.mode} (nvpmodel -m {plan.mode_number})"
    lines = [
        f"[bold]{plan.model}[/] on [bold]{where}[/]: graphs in {plan.precision}, language model {plan.llm_kind or 'as it is'}, "
        f"memory of {plan.memory_length} slots, {_standing(plan)}"
    ]
    if plan.fit is not None and plan.footprint is not None:
        need, usable = plan.footprint.total / 1e9, plan.fit.board.usable_bytes / 1e9
        verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
        lines.append(f"memory: {verdict}, {need:.1f} GB of {usable:.1f} usable, {plan.fit.free_bytes / 1e9:+.1f} left")
    return lines


def _standing(plan: Plan) -> str:
    count = plan.request.standing
    return f"{count} standing question{'s' * (count != 1)}"


def _stages(plan: Plan) -> Table:
    table = Table("stage", "ms", "from", "to", "GFLOP", "MB", "bound by")
    for column in table.columns[1:6]:
        column.justify = "right"
    for stage in plan.stages:
        _row(table, stage)
    table.add_section()
    for total in (plan.frame, plan.first_token, plan.replay_token):
        if total is not None:
            _row(table, total, bold=True)
    return table


def _row(table: Table, stage: Stage, *, bold: bool = False) -> None:
    table.add_row(
        stage.name, _ms(stage.ms), _ms(stage.low_ms), _ms(stage.high_ms), f"{stage.flops / 1e9:,.1f}",
        f"{stage.bytes / 1e6:,.0f}", stage.limit, style="bold" if bold else None,
    )  # fmt: skip


def _summary(plan: Plan) -> list[str]:
    cameras = plan.request.cameras
    what = "a camera" if cameras == 1 else f"{cameras} cameras"
    lines = [
        f"frames: {what} at {plan.fps:g} frames/s {_VERDICTS[plan.keeps_up]}, busy {plan.duty:.0%} of the time; "
        f"at most {plan.most_fps * cameras:.1f} frames/s in all (x/÷ {plan.frame.bar:.2f}), bound by {plan.frame.limit}"
    ]
    if plan.first_token is not None and plan.replay_token is not None and plan.token is not None:
        lines.append(
            f"answers: first token after {plan.first_token.ms:.0f} ms (a standing question) or {plan.replay_token.ms:.0f} ms (a "
            f"new one, by replay), then {plan.tokens_per_s:.1f} tokens/s (x/÷ {plan.token.bar:.2f}), bound by {plan.token.limit}"
        )
    return lines


def _modes(plan: Plan) -> Table:
    table = Table("power mode", "nvpmodel -m", "frames/s", "tokens/s", title="in other modes", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for effect in plan.modes:
        tokens = "" if effect.tokens_per_s is None else f"{effect.tokens_per_s:.1f}"
        style = "bold" if effect.mode == plan.mode else None
        table.add_row(effect.mode, str(effect.number), f"{effect.frames_per_s:.1f}", tokens, style=style)
    return table


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
