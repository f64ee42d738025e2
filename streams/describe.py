"""`keepsight stream describe`: the pipeline of a source, what is missing for it, and what is worth knowing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from keepsight.streams.boards import BOARDS, Board, this_board
from keepsight.streams.errors import UsageError
from keepsight.streams.gst import debian_package, has_element
from keepsight.streams.pipelines import ORIGIN, Delivery, Recipe, recipe_for
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import View

__all__ = ["Description", "Element", "add_describe", "describe"]


@dataclass(frozen=True, slots=True)
class Element:
    """An element or a filter of caps, as gst-launch spells it, and the stage of the pipeline it belongs to."""

    stage: str
    launch: str


@dataclass(frozen=True, slots=True)
class Description:
    """What reads a source.

    Attributes:
        uri: the source, without its secrets.
        board: `this` machine's own elements, or `jetson`.
        elements: the pipeline, in the order of the stream.
        missing: elements that are not installed here, each with the package that has it, if we know.
        notes: what is worth knowing.
    """

    uri: str
    board: str
    elements: tuple[Element, ...]
    missing: Mapping[str, str | None]
    notes: tuple[str, ...]


def describe(uri: SourceURI, view: View, delivery: Delivery, board: Board | None = None) -> Description:
    """Say what reads a source. Nothing is opened.

    Args:
        uri: the source.
        view: how its pictures are wanted.
        delivery: as for `pipelines.recipe_for`.
        board: what it is to run on; None for this machine.

    Raises:
        UsageError: no such test pattern.
        MissingComponentError: GStreamer is not installed.
    """
    board = board or this_board()
    recipe = recipe_for(uri, view, delivery, board=board)
    missing = {name: debian_package(name) for name in recipe.elements if not has_element(name)}
    return Description(str(uri), board.name, _elements(uri, recipe), missing, _notes(uri, view, delivery, recipe, board))


def _elements(uri: SourceURI, recipe: Recipe) -> tuple[Element, ...]:
    found = [Element(piece.stage, launch) for piece in recipe.pieces for launch in piece.launch.split(" ! ")]
    properties = "".join(f" {name}={_shown(uri, name, value)}" for name, value in recipe.origin.items())
    first = found[0]
    assert f"name={ORIGIN}" in first.launch  # a recipe's properties are for it
    return (Element(first.stage, first.launch + properties), *found[1:])


def _shown(uri: SourceURI, name: str, value: Any) -> str:
    if name == "user-pw":
        return "***"
    text = uri.redact(str(value))
    return json.dumps(text, ensure_ascii=False) if set(text) & set(" !\"'") else text


def _notes(uri: SourceURI, view: View, delivery: Delivery, recipe: Recipe, board: Board) -> tuple[str, ...]:
    notes = []
    device = any(piece.stage == "to-host" for piece in recipe.pieces)
    if board.name == "jetson":
        notes.append("No Jetson has run this pipeline yet: it is tested as text and with stand-in elements.")
    if "decodebin" in recipe.elements:
        notes.append("decodebin finds the codec when the stream is there, and takes the installed decoder of the highest rank.")
    if board.name == "jetson" and "decodebin" in recipe.elements and uri.kind in ("rtsp", "v4l2"):
        how = "h264 or h265" if uri.kind == "rtsp" else "raw, mjpeg or h264"
        notes.append(f"encoding={how} in the address saves a copy in device memory.")
    if device and view.size is not None and not view.hardware_scaling:
        notes.append(
            "Pictures are copied to the host in full size and scaled there, by the scaler that other machines have. "
            "hardware_scaling=True scales before the copy, for aspect='stretch' with scaler='nearest' or 'bilinear'; its pixels "
            "differ from what a bundle's manifest asks for."
        )
    if view.scales_in_software:
        notes.append(f"scaler={view.scaler!r} is not GStreamer's: pictures come in full size and streams/bicubic.py scales them.")
    if delivery == "newest":
        notes.append("Live: a picture that nobody has read when the next one comes is replaced by it.")
    if uri.options.get("loop") is not None:
        notes.append("At its end the file is opened again; time goes on.")
    return tuple(notes)


def add_describe(group: typer.Typer) -> None:
    """Add `describe` to a group of commands."""

    @group.command("describe")
    def describe_command(
        uri: Annotated[str, typer.Argument(help="A path, file://, csi://, v4l2://, rtsp://, rtp://, http:// or test://.")],
        size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the frames, such as 224x224.")] = None,
        board: Annotated[str, typer.Option(help="What it is to run on: `this` machine, or a `jetson`.")] = "",
        hardware_scaling: Annotated[bool, typer.Option("--hardware-scaling", help="Scale in a Jetson's video hardware.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    ) -> None:
        """Print the pipeline that reads a source, what is missing for it, and what is worth knowing. Nothing is opened."""
        source = SourceURI.parse(uri)
        view = View(None if size is None else _size(size), hardware_scaling=hardware_scaling)
        delivery: Delivery = "newest" if source.is_camera else "every"
        description = describe(source, view, delivery, _board(board))
        typer.echo(json.dumps(asdict(description), indent=2) if as_json else _text(description))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(part.isascii() and part.isdigit() and len(part) < 6 and int(part) for part in (width, height)):
        raise UsageError(f"--size {text} is not a size.", fix="Write --size 224x224.")
    return int(width), int(height)


def _board(name: str) -> Board | None:
    if not name:
        return None
    if name not in BOARDS:
        raise UsageError(f"--board {name} is not known.", fix=f"Write --board {' or --board '.join(BOARDS)}.")
    return BOARDS[name]


def _text(description: Description) -> str:
    width = max(len(element.stage) for element in description.elements)
    lines = [f"{description.uri} on {'a Jetson' if description.board == 'jetson' else 'this machine'}", ""]
    stage = ""
    for number, element in enumerate(description.elements):
        label = element.stage if element.stage != stage else ""
        stage = element.stage
        lines.append(f"{label:{width}}  {'! ' if number else '  '}{element.launch}")
    if description.missing:
        lines += ["", "Missing here:"]
        lines += [f"  {name}: {package or 'no package that we know'}" for name, package in description.missing.items()]
    lines += ["", *description.notes] if description.notes else []
    return "\n".join(lines)
