"""What a command hangs on its source beside the frames: a preview in the browser, a recording for evidence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import typer

from keepsight.runtime.storage.keep import parse_bytes
from keepsight.streams import SourceURI
from keepsight.streams.branches import Branch
from keepsight.streams.errors import UsageError
from keepsight.streams.preview import Preview, parse_address
from keepsight.streams.record import Recorder, RecordEvent

__all__ = ["beside", "beside_each"]

_ONLY = "camera"  # what a preview calls the only one


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
    if record is not None and not SourceURI.parse(uri).is_camera:
        raise UsageError("--record is for cameras: a file is there already.", fix="Leave --record out.")
    folders = {} if record is None else {_ONLY: record}
    with beside_each([_ONLY], preview, folders, parse_bytes(record_bytes)) as branches:
        yield branches[_ONLY]


@contextmanager
def beside_each(
    names: Sequence[str], preview: str | None, records: Mapping[str, Path], record_bytes: int
) -> Iterator[dict[str, tuple[Branch, ...]]]:
    """As `beside`, for several cameras: one preview shows them all, and each has a recording of its own.

    Args:
        names: of the cameras.
        preview: `[HOST:]PORT`, or None.
        records: the folders of their recordings, by name; none of those that are not recorded.
        record_bytes: the limit of all recordings together.

    Raises:
        UsageError: an address that can't be used; a limit that is too small.
        KeepsightError: a folder can't be written to.
    """
    branches: dict[str, tuple[Branch, ...]] = dict.fromkeys(names, ())
    with ExitStack() as close:
        for name, folder in records.items():
            told = partial(_tell, "" if len(names) == 1 else f"{name} ")
            recorder = close.enter_context(Recorder(folder, record_bytes // len(records), on_event=told))
            branches[name] += (recorder.branch,)
        if preview is not None:
            host, port = parse_address(preview)
            server = close.enter_context(Preview(port, host, max_clients=min(4 * len(names), 64)))
            for name in names:
                branches[name] += (server.branch(name),)
            reach = "anybody who reaches that port sees it, without a password" if server.is_public else "from this machine only"
            pages = "" if len(names) == 1 else f", or one camera at {server.url}{names[0]}"
            typer.echo(f"Preview at {server.url}{pages} ({reach}).", err=True)
        yield branches


def _tell(whose: str, event: RecordEvent) -> None:
    moment = time.strftime("%H:%M:%S", time.localtime(event.wall_time))
    typer.echo(f"[{moment} {whose}{event.state}] {event.reason}", err=True)
