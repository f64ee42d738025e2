"""`keepsight stream clip`: cut a clip out of what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepsight.streams.clips import clip, moment_text, parse_moment

__all__ = ["add_clip"]


def add_clip(group: typer.Typer) -> None:
    """Add the command to the group `stream`."""

    @group.command("clip")
    def clip_command(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that was given to --record.")],
        between: Annotated[tuple[str, str], typer.Option(metavar="START END", help="Two moments: 14:00 14:05, or ISO dates.")],
        out: Annotated[Path, typer.Option(help="The .mp4 or .mkv to write.")],
    ) -> None:
        """Cut a clip out of a recording, as it was recorded: from the key frame before the start on."""
        start_s, end_s = between
        made = clip(folder, parse_moment(start_s), parse_moment(end_s), out)
        typer.echo(f"{made.path}: {moment_text(made.start_s)} to {moment_text(made.end_s)}, {made.frames} pictures")
        for gap in made.gaps:
            typer.echo(f"nothing was recorded from {moment_text(gap[0])} to {moment_text(gap[1])}")
