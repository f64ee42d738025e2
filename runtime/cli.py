"""The command `keepsight`: what runs a bundle. Each folder brings its own commands; heavy imports wait for their command."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from keepsight.runtime.options import (
    BackendName,
    BackendOption,
    BundleOption,
    FeatureLogOption,
    GraphsOption,
    JsonOption,
    LogBytesOption,
    LogEveryOption,
    MemoryName,
    MemoryOption,
    ModeName,
    SaveEveryOption,
    SnapshotKVOption,
    SnapshotOption,
    ThreadsOption,
    VariantOption,
)
from keepsight.streams.errors import KeepsightError, UsageError

if TYPE_CHECKING:
    from keepsight.runtime.session import Session

INTERRUPTED = 130

app = typer.Typer(
    name="keepsight",
    help="Ask a live camera what it has seen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

@app.command()
def demo(
    scenes: Annotated[int, typer.Option(help="Scenes that the camera shows.")] = 10,
    seed: Annotated[int, typer.Option(help="Which scenes and questions.")] = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """A scripted live scene: ask about now and about the past while it plays."""
    from keepsight.runtime import demo as script

    report = script.play(script.Show(scenes=scenes, seed=seed), threads=threads, quiet=as_json)
    if as_json:
        _print_json(report)


@app.command()
def ask(
    source: Annotated[
        str, typer.Argument(help="A file, rtsp://, /dev/video0, test://ball, a directory of pictures, .npy; or a snapshot.")
    ],
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    bundle: BundleOption = "tiny",
    when: Annotated[float | None, typer.Option(help="Ask when a file reaches this second.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to watch a live source.")] = 10.0,
    mode: Annotated[
        ModeName, typer.Option(help="standing: carried along from the first frame; replay: asked at the end.")
    ] = "standing",
    prompt: Annotated[str | None, typer.Option(help="Replaces both templates; goes verbatim to both tokenizers.")] = None,
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a file to its end (or --when), or a live source for --seconds, then answer one question.

    A snapshot that `run --snapshot` saved is not watched but restored, and answers at once.
    """
    from keepsight.runtime.keep import ask_saved
    from keepsight.runtime.snapshot import Snapshot, is_snapshot
    from keepsight.runtime.watch import watch_until

    question = _one_of(question, prompt)
    saved = Snapshot.read(source) if is_snapshot(source) else None
    if saved is None:
        _refuse_missing(source)
    elif when is not None:
        raise UsageError("A snapshot has its own moment: --when can't be used with it.", fix="Leave it out.")
    with _session(bundle, variant, memory, threads, backend, cuda_graphs) as session:
        if saved is not None:
            put = ask_saved(session, saved, question, prompt=prompt, mode=mode)
        else:
            put = session.stand(question, prompt=prompt) if mode == "standing" else question
            with session.source(source) as frames:
                watch_until(session, frames, until_s=seconds if frames.is_live else when)
        answers = session.ask(put, prompt=prompt)
        if as_json:
            _print_json(answers.result.as_dict())
            return
        for piece in answers:
            typer.echo(piece, nl=False)
        typer.echo()
        typer.echo(str(answers.result.trace), err=True)


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="A camera, a stream, or a file that plays in real time as a camera.")],
    bundle: BundleOption = "tiny",
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    snapshot: SnapshotOption = None,
    save_every: SaveEveryOption = 300.0,
    snapshot_kv: SnapshotKVOption = False,
    feature_log: FeatureLogOption = None,
    log_every: LogEveryOption = 10.0,
    log_bytes: LogBytesOption = "2G",
) -> None:
    """Watch live and answer what you type; Ctrl-C or Ctrl-D leaves."""
    from keepsight.runtime.keep import kept, parse_bytes
    from keepsight.runtime.watch import converse

    _refuse_missing(source)
    budget = parse_bytes(log_bytes)
    with (
        _session(bundle, variant, memory, threads, backend, cuda_graphs) as session,
        kept(
            session, source, snapshot=snapshot, save_every_s=save_every, kv=snapshot_kv,
            log=feature_log, log_every_s=log_every, log_bytes=budget,
        ),
    ):  # fmt: skip
        converse(session, source)


@app.command("eval")
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    dataset: Annotated[str, typer.Argument(help="easy-vqa, easy-vqa-stream, or a file of JSON lines.")],
    limit: Annotated[int | None, typer.Option(help="Questions to ask.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions, and which streams.")] = 0,
    scenes: Annotated[int, typer.Option(help="Scenes of each generated stream.")] = 10,
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    mode: Annotated[ModeName, typer.Option(help="How questions are put.")] = "standing",
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of a bundle on a data set, through the whole deployed path."""
    from rich.console import Console
    from rich.progress import track

    from keepsight.runtime import evaluate as scoring
    from keepsight.runtime.datasets import open_dataset

    with _session(bundle, variant, memory, threads, backend, cuda_graphs) as session:
        manifest = session.bundle.manifest
        clips = open_dataset(
            dataset, limit=limit, seed=seed, scenes=scenes, fps=manifest.sample_fps, size=manifest.dims.image_size
        )
        results = scoring.evaluate(session, clips, mode)
        shown = track(results, f"{dataset} {memory} {mode}", total=limit, console=Console(stderr=True), transient=True)
        report = scoring.summary(shown)
    if as_json:
        _print_json(report)
    else:
        _print_scores(report)


@app.command()
def trace(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    source: Annotated[str, typer.Argument(help="A video, or a .npy of uint8 frames [T,H,W,3].")],
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    question: Annotated[str | None, typer.Option(help="A question, put into the bundle's template.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that goes verbatim to the Q-Former's tokenizer.")] = None,
    fps: Annotated[float | None, typer.Option(help="Dates the frames of a .npy; samples a video.")] = None,
    variant: VariantOption = None,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
) -> None:
    """Dump what the perception computed frame by frame: the golden file that a board is compared with."""
    from keepsight.runtime import trace as recording
    from keepsight.runtime.backends import open_engines
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.qformer import QFormer

    question = _one_of(question, prompt)
    opened = Bundle.open(bundle, variant=variant)
    rate = fps or (1.0 if source.lower().endswith(".npy") else opened.manifest.sample_fps)
    engines = open_engines(opened, backend, threads=threads or 1, cuda_graphs=cuda_graphs)
    qformer = QFormer(opened, engines=engines)
    with engines, opened.source(source, fps=rate) as frames:
        arrays = recording.record(qformer, frames, question, prompt=prompt)
    recording.save(out, arrays)
    for name, array in arrays.items():
        typer.echo(f"{name:14} {array.dtype!s:8} {list(array.shape)}" if array.ndim else f"{name:14} {array}")


@app.command()
def inspect(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")] = "tiny",
    as_json: JsonOption = False,
) -> None:
    """What is in a bundle: graphs, sizes, licences; every hash is checked."""
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.inspect import describe, print_report

    report = describe(Bundle.open(bundle))
    if as_json:
        _print_json(report)
    else:
        print_report(report)


@app.command()
def build(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    variant: Annotated[str | None, typer.Option(help="Which precision of the graphs [default: the bundle's].")] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="MiB of scratch memory [default: TensorRT's own limit].")] = None,
    target: Annotated[str | None, typer.Option(help="sm86, sm120, ...: a GPU that is not here, with TensorRT-RTX.")] = None,
) -> None:
    """Build the TensorRT engines of a bundle, on the machine that is to run them."""
    from keepsight.runtime import tensorrt_build as building
    from keepsight.runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    trt, aimed = building.tensorrt_for(target)
    folder = building.build_engines(
        opened, trt, aimed, variant=variant, workspace_mib=workspace, progress=lambda step: typer.echo(step, err=True)
    )
    typer.echo(folder)


def _one_of(question: str | None, prompt: str | None) -> str:
    if (question is None) == (prompt is None):
        raise UsageError("Give a question or --prompt, one of them.")
    return cast(str, question if prompt is None else prompt)


def _refuse_missing(source: str) -> None:
    """Say so at once if a source is not there, before a model is loaded for it."""
    from keepsight.streams import Source

    Source(source).close()


def _session(
    bundle: str, variant: str | None, memory: MemoryName, threads: int | None, backend: BackendName, cuda_graphs: bool
) -> Session:
    from keepsight.runtime.backends import open_engines
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.session import Session

    opened = Bundle.open(bundle, variant=variant)
    engines = open_engines(opened, backend, threads=threads or 1, cuda_graphs=cuda_graphs)
    return Session(opened, memory=memory, threads=threads, engines=engines)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _print_scores(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "right", "questions")
    for kind, row in report["by_kind"].items():
        table.add_row(kind, f"{row['accuracy']:.1%}", str(row["n"]))
    for name in ("past", "present", "accuracy"):
        if report[name] is not None:
            table.add_row(name if name != "accuracy" else "all", f"{report[name]:.1%}", "")
    table.add_row("always the most frequent answer", f"{report['majority']:.1%}", str(report["n"]))
    Console().print(table)


def _join_commands() -> None:
    """Let every folder add its commands; `export` needs torch, so without it one command says how to get it."""
    for folder in ("streams", "export"):
        try:
            found = importlib.util.find_spec(f"keepsight.{folder}.cli")
        except ImportError:
            found = None
        if found is not None:
            importlib.import_module(f"keepsight.{folder}.cli").commands(app)


_join_commands()


def main() -> None:
    """Run the command; one line on stderr and the kind's exit code for what we know of, a traceback for a bug."""
    try:
        app(standalone_mode=True)
    except KeepsightError as error:
        typer.secho(f"keepsight: {error}", fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
