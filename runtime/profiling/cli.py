"""`keepsight profile`: where the time of a frame and of an answer goes on this machine, and what has changed since."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepsight.runtime.options import BackendOption, GraphsOption, JsonOption, MemoryOption, ThreadsOption, VariantOption
from keepsight.streams.errors import UsageError

if TYPE_CHECKING:
    from keepsight.runtime.profiling.run import Tell

__all__ = ["commands"]

_CONTENTION_S = 5.0


def commands(app: typer.Typer) -> None:
    """Add this part's commands to the application."""
    group = typer.Typer(help="Measure a bundle on this machine, stage by stage, and compare measurements.", no_args_is_help=True)
    group.command("run")(run)
    group.command("compare")(compare)
    group.command("merge")(merge)
    group.command("schema")(schema)
    app.add_typer(group, name="profile")


def run(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    source: Annotated[
        str | None, typer.Argument(help="What to watch: a file, rtsp://, /dev/video0... [default: a clip, the same every time]")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames that are counted in each run.")] = 60,
    warmup: Annotated[int | None, typer.Option(min=0, help="Frames before them [default: until the memory is full].")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Repeat all of it; a comparison takes its confidence from this.")] = 5,
    questions: Annotated[
        Path | None, typer.Option(help='One a line, or as {"question": "...", "mode": "standing"} [default: the clip\'s].')
    ] = None,
    contention: Annotated[
        bool, typer.Option("--contention", help="Vision and language model alone, then both at once, 5 s each.")
    ] = False,
    urgent: Annotated[
        bool, typer.Option("--urgent", help="TensorRT: let vision's kernels go before the language model's.")
    ] = False,
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure where the time of a frame and of an answer goes, what takes memory, and what it costs in energy."""
    from keepsight.runtime.profiling.load import Setup
    from keepsight.runtime.profiling.questions import read_questions
    from keepsight.runtime.profiling.report import write_profile
    from keepsight.runtime.profiling.run import Options, profile
    from keepsight.streams import Source

    if urgent and backend != "tensorrt":
        raise UsageError("--urgent is of a GPU's stream.", fix="Give --backend tensorrt with it.")
    asked = None if questions is None else tuple(read_questions(questions))
    if source is not None:
        Source(source).close()  # say so at once if it is not there
    for path in (out, html):
        _refuse_unwritable(path)
    options = Options(
        Setup(bundle, variant, memory, backend, cuda_graphs, threads, urgent), source, asked, frames, warmup, runs,
        _CONTENTION_S if contention else None, command=_typed(source),
    )  # fmt: skip
    with _progress() as tell:
        found = profile(options, tell)
    if out is not None:
        write_profile(found, out)
    if html is not None:
        from keepsight.runtime.profiling.page import page

        html.write_text(page(found), encoding="utf-8")
    if as_json:
        typer.echo(found.model_dump_json())
        return
    from rich.console import Console

    from keepsight.runtime.profiling.tables import print_profile

    print_profile(found, Console())


def compare(
    a: Annotated[Path, typer.Argument(help="The report before.")],
    b: Annotated[Path, typer.Argument(help="The report after.")],
    threshold: Annotated[float, typer.Option(help="A stage may get slower by this share.")] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Compare although bundle, machine or backend differ.")] = False,
    paired: Annotated[
        bool, typer.Option("--paired", help="Run by run: both were profiled in turns, and merged. Finds more on a busy machine.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What got slower or bigger from one report to another, and how sure that is; exit code 16 if anything did."""
    from keepsight.runtime.profiling.compare import compare_command

    compare_command(a, b, threshold=threshold, force=force, paired=paired, as_json=as_json)


def merge(
    reports: Annotated[list[Path], typer.Argument(help="Reports of the same thing.")],
    out: Annotated[Path, typer.Option(help="Write the one report here.")],
) -> None:
    """Make one report of several, with their runs: where a machine's load drifts, profile A and B in turns, then merge each."""
    from keepsight.runtime.profiling import merge as merging
    from keepsight.runtime.profiling.report import read_profile, write_profile

    _refuse_unwritable(out)
    write_profile(merging.merge([read_profile(report) for report in reports]), out)


def schema() -> None:
    """The JSON schema of a report."""
    from keepsight.runtime.profiling import report

    typer.echo(json.dumps(report.schema(), indent=2))


def _refuse_unwritable(path: Path | None) -> None:
    """Say so before minutes are spent on what can't be kept."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(f"{path} can't be written: it is a folder, or in none.", fix="Name a file in a folder that exists.")


def _typed(source: str | None) -> str:
    """The command as it was typed, without passwords."""
    from keepsight.streams import SourceURI

    words = [SourceURI.parse(word).redacted if word == source else word for word in sys.argv[1:]]
    return shlex.join(["keepsight", *words])


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on standard error, gone when it is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def tell(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield tell
