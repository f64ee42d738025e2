"""What a command hangs on its source beside the frames: a preview in the browser, a recording for evidence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import typer

from keepsight.runtime.keep import parse_bytes
from keepsight.streams import SourceURI
from keepsight.streams.branches import Branch
from keepsight.streams.errors import UsageError
from keepsight.streams.preview import Preview, parse_address
from keepsight.streams.record import Recorder, RecordEvent

__all__ = ["beside"]


@contextmanager
def beside(uri: str, preview: str | None, record: Path | None, record_bytes: str = "2GB") -> Iterator[tuple[Branch, ...]]:
    """The side branches that the options of a command ask for; what is behind them is closed at the end, after the source.

    Args:
        uri: of the source.
        preview: `[HOST:]PORT`, or None.
        record: the folder of a recording, or None.
        record_bytes: its limit.

    Raises:
        UsageError: an address that can't be used; a file, which needs no recording; a limit that is too small.
        KeepsightError: the folder can't be written to.
    """
    with ExitStack() as close:
        branches = []
        if record is not None:
            if not SourceURI.parse(uri).is_camera:
                raise UsageError("--record is for cameras: a file is there already.", fix="Leave --record out.")
            branches.append(close.enter_context(Recorder(record, parse_bytes(record_bytes), on_event=_tell)).branch)
        if preview is not None:
            host, port = parse_address(preview)
            server = close.enter_context(Preview(port, host))
            branches.append(server.branch())
            reach = "anybody who reaches that port sees it, without a password" if server.is_public else "from this machine only"
            typer.echo(f"Preview at {server.url} ({reach}).", err=True)
        yield tuple(branches)


def _tell(event: RecordEvent) -> None:
    moment = time.strftime("%H:%M:%S", time.localtime(event.wall_time))
    typer.echo(f"[{moment} {event.state}] {event.reason}", err=True)
