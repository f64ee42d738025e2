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
    AtOption,
    BackendName,
    BackendOption,
    BetweenOption,
    BundleOption,
    CameraOption,
    EvidenceOption,
    FeatureLogOption,
    GateOption,
    GovernorOption,
    GraphsOption,
    JsonOption,
    LogBytesOption,
    LogEveryOption,
    MemoryOption,
    ModeName,
    OfflineMemoryName,
    OfflineMemoryOption,
    PreviewOption,
    RecordBytesOption,
    RecordOption,
    SaveEveryOption,
    ScoreName,
    ScoreOption,
    SinceOption,
    SnapshotKVOption,
    SnapshotOption,
    ThreadsOption,
    VariantOption,
)
from keepsight.streams.errors import KeepsightError, UsageError

if TYPE_CHECKING:
    from keepsight.runtime.moments import TypedInterval
    from keepsight.runtime.session import Session
    from keepsight.runtime.storage.feature_history import FeatureHistory

INTERRUPTED = 130

app = typer.Typer(
    name="keepsight",
    help="Ask a live camera what it has seen.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # as Rich markup, "[default: its first]" would be a style, and vanish
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
        str,
        typer.Argument(help="A file, rtsp://, /dev/video0, test://ball, a folder of pictures, .npy; a snapshot; a feature log."),
    ],
    question: Annotated[str | None, typer.Argument(help="The question.")] = None,
    bundle: BundleOption = "tiny",
    when: Annotated[float | None, typer.Option(help="Ask when a file reaches this second.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to watch a live source.")] = 10.0,
    mode: Annotated[
        ModeName | None,
        typer.Option(help="standing: carried along from the first frame [default]; replay: asked at the end, as intervals are."),
    ] = None,
    since: SinceOption = None,
    at: AtOption = None,
    between: BetweenOption = None,
    evidence: EvidenceOption = None,
    prompt: Annotated[str | None, typer.Option(help="Replaces both templates; goes verbatim to both tokenizers.")] = None,
    options: Annotated[
        str | None, typer.Option(help="Answers to choose from, such as 'red,green,blue'; prints the probability of each.")
    ] = None,
    score: ScoreOption = "answer",
    variant: VariantOption = None,
    memory: OfflineMemoryOption = "mbc",
    gate: GateOption = False,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch a file to its end (or --when), or a live source for --seconds, then answer one question.

    A snapshot that `run --snapshot` saved is not watched but restored, and answers at once. Of a folder that `run --feature-log`
    writes, the exact memory of the interval is built again (without an interval: of all of it).
    """
    from keepsight.runtime.live.watch import watch_until
    from keepsight.runtime.moments import typed_interval
    from keepsight.runtime.show import show_answer
    from keepsight.runtime.storage.feature_history import is_feature_log
    from keepsight.runtime.storage.keep import ask_saved
    from keepsight.runtime.storage.snapshot import Snapshot, is_snapshot

    question = _one_of(question, prompt)
    choices = None if options is None else _choices(options)
    typed = typed_interval(since, at, between)
    if is_feature_log(source):
        _refuse_for_log(when=when, mode=mode, evidence=evidence, memory=memory, gate=gate)
        history = _history(source, bundle, variant)
        with _session(bundle, variant, memory, threads, backend, cuda_graphs) as session:
            _ask_log(session, history, question, typed, prompt=prompt, choices=choices, score=score, as_json=as_json)
        return
    put_as: ModeName = mode or ("standing" if typed is None else "replay")
    _refuse_mixed(typed, put_as, choices, evidence)
    saved = Snapshot.read(source) if is_snapshot(source) else None
    if saved is None:
        _refuse_missing(source)
        if memory == "concat":
            _refuse_for_concat(source, put_as)
    else:
        _refuse_for_snapshot(when, memory)
    with _session(bundle, variant, memory, threads, backend, cuda_graphs, gate) as session:
        if saved is not None:
            put = ask_saved(session, saved, question, prompt=prompt, mode=put_as)
        else:
            put = session.stand(question, prompt=prompt) if put_as == "standing" else question
            with session.source(source) as frames:
                watch_until(session, frames, until_s=seconds if frames.is_live else when)
        _tell_gate(session)
        if choices is not None:
            ranking = session.rank(put, choices, prompt=prompt, score=score)
            typer.echo(json.dumps(ranking.as_dict(), ensure_ascii=False) if as_json else str(ranking))
            return
        interval = None if typed is None else session.calendar.interval(typed)
        answers = session.ask(put, prompt=prompt, interval=interval, evidence=evidence is not None)
        show_answer(answers, evidence, as_json=as_json)


@app.command("memory")
def show_memory(
    source: Annotated[
        str, typer.Argument(help="A file, watched to its end; a live source, for --seconds; a snapshot; a feature log.")
    ],
    bundle: BundleOption = "tiny",
    seconds: Annotated[float, typer.Option(help="How long to watch a live source.")] = 10.0,
    png: Annotated[Path | None, typer.Option(help="Draw it: what each visual token keeps of every time.")] = None,
    key_frames: Annotated[Path | None, typer.Option(help="Folder to write the key frames to.")] = None,
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    gate: GateOption = False,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is remembered after a source, in a snapshot or in a feature log: the timeline as a table, JSON or picture.

    The picture of a feature log is that of the memory built from all of it.
    """
    from keepsight.runtime.live.watch import watch_until
    from keepsight.runtime.memory_picture import save_picture
    from keepsight.runtime.show import show_timeline
    from keepsight.runtime.storage.far_past import recall
    from keepsight.runtime.storage.feature_history import is_feature_log
    from keepsight.runtime.storage.history_report import show_history
    from keepsight.runtime.storage.snapshot import Snapshot, is_snapshot

    if is_feature_log(source):
        _refuse_for_log(key_frames=key_frames, memory=memory, gate=gate)
        history = _history(source, bundle, variant)
        if png is not None:
            with _session(bundle, variant, memory, threads, backend, cuda_graphs, llm=False) as session:
                save_picture(recall(session, history), png)
        show_history(history, png=png, as_json=as_json)
        return
    saved = Snapshot.read(source) if is_snapshot(source) else None
    if saved is None:
        _refuse_missing(source)
    with _session(bundle, variant, memory, threads, backend, cuda_graphs, gate, llm=False) as session:
        if saved is not None:
            session.restore(saved)
        else:
            with session.source(source) as frames:
                watch_until(session, frames, until_s=seconds if frames.is_live else None)
        _tell_gate(session)
        show_timeline(session, png=png, key_frames=key_frames, as_json=as_json)


@app.command()
def run(
    source: Annotated[
        str | None, typer.Argument(help="A camera, a stream, or a file that plays in real time as a camera.", show_default=False)
    ] = None,
    camera: CameraOption = None,
    bundle: BundleOption = "tiny",
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    gate: GateOption = False,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    snapshot: SnapshotOption = None,
    save_every: SaveEveryOption = 300.0,
    snapshot_kv: SnapshotKVOption = False,
    feature_log: FeatureLogOption = None,
    log_every: LogEveryOption = 10.0,
    log_bytes: LogBytesOption = "2G",
    preview: PreviewOption = None,
    record: RecordOption = None,
    record_bytes: RecordBytesOption = "2GB",
    governor: GovernorOption = "on",
) -> None:
    """Watch live and answer what you type; Ctrl-C or Ctrl-D leaves.

    With `--camera door=rtsp://... --camera yard=/dev/video1` each camera has a memory of its own, and a line for one begins with
    its name: `door: what is there?`. Snapshots, logs and recordings are then of each camera, in the folder that is named.
    """
    from keepsight.runtime.governor.live import governed
    from keepsight.runtime.governor.steps import parse_steps
    from keepsight.runtime.live.cameras_run import converse_with_cameras, folders, kept_each, parse_cameras, sessions_for
    from keepsight.runtime.live.side import beside, beside_each
    from keepsight.runtime.live.watch import converse
    from keepsight.runtime.storage.keep import kept, parse_bytes

    budget = parse_bytes(log_bytes)
    parse_steps(governor)
    keep: dict[str, Any] = {"snapshot": snapshot, "save_every_s": save_every, "kv": snapshot_kv}
    keep |= {"log": feature_log, "log_every_s": log_every, "log_bytes": budget}
    if camera or source is None:
        uris = parse_cameras(camera or [], source)
        with _session(bundle, variant, memory, threads, backend, cuda_graphs, gate) as first:
            sessions = sessions_for(first, list(uris))
            with (
                kept_each(sessions, uris, **keep) as logs,
                beside_each(list(uris), preview, folders("--record", record, list(uris)), parse_bytes(record_bytes)) as branches,
                governed(list(sessions.values()), governor, _tell) as at_work,
            ):
                status = None if at_work is None else at_work.status
                converse_with_cameras(sessions, uris, logs=logs, branches=branches, status=status)
            for name, session in sessions.items():
                _tell_gate(session, f"{name}: ")
        return
    _refuse_missing(source)
    with (
        _session(bundle, variant, memory, threads, backend, cuda_graphs, gate) as session,
        kept(session, source, **keep),
        beside(source, preview, record, record_bytes) as branches,
        governed(session, governor, _tell) as at_work,
    ):  # fmt: skip
        converse(session, source, log=feature_log, branches=branches, status=None if at_work is None else at_work.status)
        _tell_gate(session)


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="A camera, a stream, or a file, of which every frame is seen.")],
    question: Annotated[
        list[str], typer.Option(help="What to ask; may be given several times. With answers to choose from: 'fire? [yes|no]'.")
    ],
    every: Annotated[float, typer.Option(min=0, help="Seconds of the stream between two answers; 0 = every frame.")] = 1.0,
    seconds: Annotated[float | None, typer.Option(help="Stop when the stream reaches this second.")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Let a file play as a camera.")] = False,
    score: ScoreOption = "answer",
    bundle: BundleOption = "tiny",
    variant: VariantOption = None,
    memory: MemoryOption = "mbc",
    gate: GateOption = False,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    preview: PreviewOption = None,
    governor: GovernorOption = "on",
    as_json: JsonOption = False,
) -> None:
    """Carry questions along and print an answer whenever it changes; Ctrl-C leaves with a summary."""
    from keepsight.runtime.governor.live import governed
    from keepsight.runtime.governor.steps import parse_steps
    from keepsight.runtime.live.side import beside
    from keepsight.runtime.standing import StandingQuestions, follow_camera, follow_file, parse_question

    asked = [parse_question(spelling) for spelling in question]
    parse_steps(governor)
    degraded: dict[str, Any] = {}
    _refuse_missing(source)
    with _session(bundle, variant, memory, threads, backend, cuda_graphs, gate) as session:
        standing = StandingQuestions(
            session, asked, lambda change: typer.echo(json.dumps(change.as_dict(), ensure_ascii=False) if as_json else change),
            every_s=every, score=score,
        )  # fmt: skip
        frames = session.source(source)
        try:
            if realtime or frames.is_live:
                with beside(source, preview, None) as branches, governed(session, governor, _tell) as at_work:
                    try:
                        follow_camera(standing, source, until_s=seconds, branches=branches)
                    finally:
                        if at_work is not None and at_work.governor.transitions:
                            degraded["governor"] = at_work.metrics()
            elif preview is not None:
                raise UsageError("--preview of a file needs --realtime.", fix="Add --realtime.")
            else:
                with frames:
                    follow_file(standing, frames, until_s=seconds)
        except KeyboardInterrupt:
            typer.echo(err=True)
        if as_json:
            _print_json(standing.summary.as_dict() | degraded)
        else:
            typer.echo(str(standing.summary), err=True)
        _tell_gate(session)


@app.command("eval")
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    dataset: Annotated[str, typer.Argument(help="easy-vqa, easy-vqa-stream, or a file of JSON lines.")],
    limit: Annotated[int | None, typer.Option(help="Questions to ask.")] = None,
    seed: Annotated[int, typer.Option(help="Which questions, and which streams.")] = 0,
    scenes: Annotated[int, typer.Option(help="Scenes of each generated stream.")] = 10,
    variant: VariantOption = None,
    memory: OfflineMemoryOption = "mbc",
    gate: GateOption = False,
    mode: Annotated[ModeName, typer.Option(help="How questions are put.")] = "standing",
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy of a bundle on a data set, through the whole deployed path."""
    from rich.console import Console
    from rich.progress import track

    from keepsight.runtime.evaluation import evaluate as scoring
    from keepsight.runtime.evaluation.datasets import open_dataset

    if memory == "concat":
        _refuse_for_concat(None, mode)
    with _session(bundle, variant, memory, threads, backend, cuda_graphs, gate) as session:
        manifest = session.bundle.manifest
        clips = open_dataset(
            dataset, limit=limit, seed=seed, scenes=scenes, fps=manifest.sample_fps, size=manifest.dims.image_size
        )
        results = scoring.evaluate(session, clips, mode)
        shown = track(results, f"{dataset} {memory} {mode}", total=limit, console=Console(stderr=True), transient=True)
        report = scoring.summary(shown)
        _tell_gate(session)
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
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.evaluation import trace as recording
    from keepsight.runtime.graphs.backends import open_engines
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
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.graphs import tensorrt_build as building

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


def _choices(options: str) -> tuple[str, ...]:
    """The answers between the commas, refused before a model is loaded if they make no sense."""
    from keepsight.runtime.language.ranking import checked_options

    return checked_options([option.strip() for option in options.split(",")])


def _refuse_mixed(typed: TypedInterval | None, mode: ModeName, choices: tuple[str, ...] | None, evidence: Path | None) -> None:
    """Ways to ask that exclude each other."""
    if typed is not None and mode == "standing":
        raise UsageError(
            "A standing question has mixed all times it has seen, and can't be limited to some.", fix="Use --mode replay."
        )
    if choices is not None and (typed is not None or evidence is not None):
        raise UsageError("--options can't be used with an interval or --evidence.", fix="Ask without --options.")


def _refuse_for_snapshot(when: float | None, memory: OfflineMemoryName) -> None:
    """What a saved memory can't be asked with."""
    if when is not None:
        raise UsageError("A snapshot has its own moment: --when can't be used with it.", fix="Leave it out.")
    if memory == "concat":
        raise UsageError("A snapshot is of a memory; concat has none.", fix="Leave --memory out.")


def _refuse_missing(source: str) -> None:
    """Say so at once if a source is not there, before a model is loaded for it."""
    from keepsight.streams import Source

    Source(source).close()


def _refuse_for_concat(source: str | None, mode: ModeName) -> None:
    """Refuse what the memory `concat` can't do, before a model is loaded for it."""
    from keepsight.streams import Source

    if mode != "standing":
        raise UsageError("--memory concat answers only questions that are known before the first frame.", fix="Leave --mode out.")
    if source is None:
        return
    opened = Source(source)
    opened.close()
    if opened.is_live:
        raise UsageError(
            f"{opened.uri} is live, and --memory concat grows with every frame.", fix="Give a file, or another memory."
        )


def _refuse_for_log(**options: object) -> None:
    """Refuse what a feature log does not have, before a model is loaded for it."""
    from keepsight.runtime.storage.far_past import refuse_options

    refuse_options(options)


def _ask_log(
    session: Session,
    history: FeatureHistory,
    question: str,
    typed: TypedInterval | None,
    *,
    prompt: str | None,
    choices: tuple[str, ...] | None,
    score: ScoreName,
    as_json: bool,
) -> None:
    from keepsight.runtime.show import show_answer
    from keepsight.runtime.storage.far_past import ask_far_past, rank_far_past

    if choices is None:
        show_answer(ask_far_past(session, history, question, typed, prompt=prompt), None, as_json=as_json)
        return
    ranking = rank_far_past(session, history, question, choices, typed, prompt=prompt, score=score)
    typer.echo(json.dumps(ranking.as_dict(), ensure_ascii=False) if as_json else str(ranking))


def _history(folder: str, bundle: str, variant: str | None) -> FeatureHistory:
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.storage.feature_history import FeatureHistory

    return FeatureHistory(folder, Bundle.open(bundle, variant=variant))


def _session(
    bundle: str,
    variant: str | None,
    memory: OfflineMemoryName,
    threads: int | None,
    backend: BackendName,
    cuda_graphs: bool,
    gate: bool = False,
    *,
    llm: bool = True,
) -> Session:
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.graphs.backends import open_engines
    from keepsight.runtime.live.gate import FrameGate
    from keepsight.runtime.session import Session

    opened = Bundle.open(bundle, variant=variant)
    if not llm:
        opened = Bundle(opened.path, opened.manifest.model_copy(update={"llm": None}), opened.variant)
    engines = open_engines(opened, backend, threads=threads or 1, cuda_graphs=cuda_graphs)
    return Session(opened, memory=memory, threads=threads, engines=engines, gate=FrameGate() if gate else None)


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _tell_gate(session: Session, whose: str = "") -> None:
    """Say on stderr what the gate left out, if there is a gate."""
    if session.gate is not None:
        typer.echo(f"{whose}{session.gate}", err=True)


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
    """Let every part add its commands; `export` needs torch, so without it one command says how to get it."""
    parts = ("streams", "runtime.profiling", "runtime.planning", "runtime.doctor", "export")
    for name in (f"keepsight.{part}.cli" for part in parts):
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is not None:
            importlib.import_module(name).commands(app)


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
