"""`keepsight plan`: what a board will do with a model, before anyone has the board."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from keepsight.runtime.options import JsonOption
from keepsight.streams.errors import UsageError

__all__ = ["commands"]

THIS = "this"


def commands(app: typer.Typer) -> None:
    """Add this part's command to the application."""
    app.command()(plan)


def plan(
    model: Annotated[str, typer.Argument(help="A bundle's directory, `tiny`, or a model such as instructblip-vicuna-7b.")],
    board: Annotated[
        str | None, typer.Option(help="orin-nano-8gb-super, orin-nx-16gb, agx-orin-64gb, agx-thor, ... or `this`.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="A power mode, by the name that nvpmodel -q prints [default: the fastest].")
    ] = None,
    cameras: Annotated[int, typer.Option(help="How many, each with a memory of its own.")] = 1,
    fps: Annotated[float | None, typer.Option(help="Frames per second of each camera [default: the model's].")] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "fp8"] | None, typer.Option(help="Of the visual encoder [default: the model's].")
    ] = None,
    llm_quant: Annotated[str | None, typer.Option(help="Plan with the language model in Q8_0, Q4_K_M, ...")] = None,
    standing: Annotated[int, typer.Option(help="Questions that are carried along with each camera.")] = 1,
    context: Annotated[int, typer.Option(help="Positions of the language model's context.")] = 2048,
    memory_length: Annotated[int | None, typer.Option(help="Plan with so many slots [default: the model's].")] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="A profile of this board and mode to learn from; may be given several times.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Compare all boards in all precisions.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the comparison of --all.")] = None,
    html: Annotated[Path | None, typer.Option(help="The same as a page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what a board does with a model: whether it fits, how long each stage takes, what binds, what to change.

    A roofline: operations over what the board computes or bytes over what its memory moves, times an efficiency that somebody has
    measured. Every prediction has an error bar; `--calibrate` narrows it with profiles of the board.
    """
    from keepsight.runtime.boards import boards
    from keepsight.runtime.planning.models import open_model
    from keepsight.runtime.planning.picture import save_html, save_png
    from keepsight.runtime.planning.plan import Request, make_plan, plan_all
    from keepsight.runtime.planning.tables import print_plan, print_plans

    _check_options(every, board, mode, precision, calibrate, png, html)
    request = Request(cameras=cameras, fps=fps, precision=precision, standing=standing, context=context)
    request.check()
    opened = open_model(model)
    if llm_quant is not None:
        opened = opened.with_llm(llm_quant)
    if memory_length is not None:
        if memory_length < 1:
            raise UsageError(f"a memory of {memory_length} slots remembers nothing.", fix="Give at least 1.")
        opened = opened.with_memory(memory_length)
    if every:
        plans = plan_all(opened, boards(), request)
        for path, save in ((png, save_png), (html, save_html)):
            if path is not None:
                save(plans, path)
        if as_json:
            typer.echo(json.dumps([one.as_dict() for one in plans], ensure_ascii=False))
        else:
            print_plans(plans)
        return
    from keepsight.runtime.planning.targets import open_target

    target = open_target(board or "", mode, opened, calibrate or [])
    found = make_plan(opened, target, request)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    else:
        print_plan(found)


def _check_options(
    every: bool, board: str | None, mode: str | None, precision: str | None, calibrate: list[str] | None, png: Path | None,
    html: Path | None,
) -> None:  # fmt: skip
    from keepsight.runtime.boards import boards

    known = ", ".join([*(one.name for one in boards()), THIS])
    if every and any(value is not None for value in (board, mode, precision, calibrate)):
        raise UsageError("--all is of all boards, in their fastest modes and all precisions.", fix="Leave the others out.")
    if not every and board is None:
        raise UsageError("no board is named.", fix=f"Give --board, one of {known}; or --all.")
    if not every and (png is not None or html is not None):
        raise UsageError("--png and --html draw the comparison of --all.", fix="Add --all.")
