"""`keepsight stream list`: the cameras of this machine, with what each can send."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from keepsight.streams.v4l2 import CameraFormat, FoundCamera, found_cameras

__all__ = ["add_list"]


def add_list(group: typer.Typer) -> None:
    """Add `list` to a group of commands."""

    @group.command("list")
    def list_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
        """List the cameras of this machine, with their formats, sizes and rates."""
        cameras = found_cameras()
        typer.echo(json.dumps([asdict(camera) for camera in cameras], indent=2) if as_json else _text(cameras))


def _text(cameras: list[FoundCamera]) -> str:
    if not cameras:
        return "No camera (no /dev/video* that captures). Network cameras are named by their address: rtsp://user:password@host/path."
    return "\n\n".join(_camera(camera) for camera in cameras)


def _camera(camera: FoundCamera) -> str:
    behind = ", ".join(filter(None, (camera.driver, camera.bus)))
    lines = [f"{camera.uri}  {camera.name}" + (f" ({behind})" if behind else "")]
    lines += [f"  can't be asked: {camera.problem}"] if camera.problem else [f"  {_format(one)}" for one in camera.formats]
    return "\n".join(lines)


def _format(one: CameraFormat) -> str:
    size = f"{one.size[0]}x{one.size[1]}"
    if one.smallest is not None:
        size = f"{one.smallest[0]}x{one.smallest[1]} to {size}"
    rates = ", ".join(f"{rate:g}" for rate in one.fps)
    return f"{one.pixel_format:5} {size}" + (f" at {rates} fps" if rates else "")
