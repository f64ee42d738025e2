"""The commands of `export/`. Torch is imported by the command that needs it, so that a board without it loses nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keepsight.runtime.options import BackendOption, GraphsOption, MemoryName, VariantOption
from keepsight.streams.errors import MissingComponentError, ParityError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from keepsight.export.checkpoints import Checkpoint
    from keepsight.export.convert import Conversion
    from keepsight.export.merges import Agreement
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.evaluation.parity import PixelParity, Report
    from keepsight.runtime.graphs.backends import Engines

QUESTIONS = (
    "what is the color of the shape?",
    "what was there first?",
    "is there a circle?",
    "how many colors were there?",
    "what happened before the end?",
)
"""What is asked where the user names no question of his own."""


def commands(app: typer.Typer) -> None:
    """Add the export commands to `keepsight`."""
    app.command()(export)
    app.command()(quantize)
    app.command()(verify)
    app.command()(train)
    app.command()(count)
    bench = typer.Typer(help="Measure the fast paths beside the plain ones.", no_args_is_help=True)
    bench.command("memory")(bench_memory)
    app.add_typer(bench, name="bench")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder, or LAVIS's instruct_blip_vicuna7b_trimmed.pth.")],
    out: Annotated[Path, typer.Option(help="The bundle's directory.")],
    llm: Annotated[
        str | None, typer.Option(help="A LLaMA's folder, a GGUF file, or `none` [default: the one inside CHECKPOINT].")
    ] = None,
    llm_type: Annotated[
        str, typer.Option(help="Of a converted LLaMA: F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, Q3_K_M, Q2_K.")
    ] = "F16",
    lora: Annotated[
        Path | None,
        typer.Option(help="A PEFT folder, or a checkpoint with LoRA pairs inside (TimeChat's), to merge into the LLaMA."),
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of every pair [default: what the PEFT folder says; a checkpoint needs it].")
    ] = None,
    system: Annotated[
        Literal["malmm"], typer.Option(help="Whose memory and loop the bundle follows; so far there is MA-LMM's.")
    ] = "malmm",
    fine_tuned: Annotated[Path | None, typer.Option(help="MA-LMM's checkpoint_best.pth, over the checkpoint.")] = None,
    vision: Annotated[Path | None, typer.Option(help="eva_vit_g.pth, for LAVIS's files.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="bert-base-uncased's folder, tokenizer.json or vocab.txt, where it is not in CHECKPOINT.")
    ] = None,
    memory_length: Annotated[int, typer.Option(help="Slots of the memory.")] = 20,
    sample_fps: Annotated[float, typer.Option(help="Frames per second that go into the memory.")] = 1.0,
    precision: Annotated[Literal["fp32", "fp16"], typer.Option(help="Of the graphs' matrix products.")] = "fp32",
    prompt: Annotated[
        str, typer.Option(help="How a question is put; MA-LMM's QA checkpoints: 'Question: {question} Short answer:'.")
    ] = "{question}",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; say what would be written, its size, and on which boards it fits.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --dry-run: print it as JSON.")] = False,
) -> None:
    """Turn an InstructBLIP, BLIP-2 or MA-LMM checkpoint into a bundle of ONNX graphs."""
    _need("torch", "onnx", "transformers", "safetensors", "sentencepiece")
    from keepsight.export.convert import FLOAT32, Conversion, convert, language_source

    model = _open(checkpoint, vision, fine_tuned)
    options = Conversion(
        system=system, memory_length=memory_length, sample_fps=sample_fps, prompt=prompt,
        llm=language_source(model, llm, lora=lora, lora_alpha=lora_alpha), llm_type=llm_type, precision=precision,
        tokenizer=tokenizer,
    )  # fmt: skip
    if dry_run:
        _preview(model, out, options, json=json)
        return
    if json:
        raise UsageError("--json is for --dry-run.", fix="Look at a finished bundle with: keepsight inspect BUNDLE --json.")
    with _shown() as progress:
        manifest = convert(model, out, options, progress=progress)
    typer.echo(f"{out}: {manifest.name}, {len(manifest.files)} files, positions {manifest.positions.policy!r}")
    if isinstance(large := manifest.provenance.get(FLOAT32), list):
        typer.echo(f"in float32, because float16 can't hold their weights: {', '.join(map(str, large))}")


def _preview(model: Checkpoint, out: Path, options: Conversion, *, json: bool) -> None:
    from json import dumps

    from keepsight.export.preview import preview
    from keepsight.export.preview_report import describe_preview, print_preview

    found = preview(model, out, options)
    if json:
        typer.echo(dumps(describe_preview(found), indent=2, ensure_ascii=False))
    else:
        print_preview(found)


def quantize(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory; it gets the new variant.")],
    calibrate: Annotated[list[str], typer.Option(help="A video or directory of pictures; may be given several times.")],
    variant: Annotated[
        Literal["int8", "fp8"], typer.Option(help="Explicit Q/DQ in int8, or in fp8 for GPUs that have it: Thor, not Orin.")
    ] = "int8",
    tool: Annotated[
        Literal["onnxruntime", "modelopt"],
        typer.Option("--with", help="What calibrates: ONNX Runtime, or NVIDIA ModelOpt (keepsight[modelopt])."),
    ] = "onnxruntime",
    frames: Annotated[int, typer.Option(min=1, help="Frames to take of each source at most.")] = 128,
    least_cosine: Annotated[
        float, typer.Option(help="What the features must keep; the first operators stay as they are for it.")
    ] = 0.98,
) -> None:
    """Give a bundle a variant whose visual encoder computes in 8 bits. The Q-Former keeps its precision."""
    _need("onnx")
    from keepsight.export.quantize import quantize_vision
    from keepsight.runtime.bundle import SHIPPED, Bundle

    if bundle in SHIPPED:
        raise UsageError(f"{bundle} is the shipped bundle.", fix="Copy its directory (keepsight inspect names it) and give that.")
    opened = Bundle.open(bundle)
    pictures = [picture for source in calibrate for picture in _read_clip(opened, source, frames)]
    with _shown() as progress:
        done = quantize_vision(
            opened, pictures, variant=variant, tool=tool, least_cosine=least_cosine, progress=progress
        )
    typer.echo(
        f"{variant}: {done.operators[0]} of {done.operators[1]} convolutions and products in 8 bits, cosine {done.cosine:.4f}, "
        f"{done.file_bytes[0] / 1e6:.1f} MB (before: {done.file_bytes[1] / 1e6:.1f})"
    )
    _print_memory(done.memory, len(pictures))


def count(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory; its manifest gets the costs.")],
) -> None:
    """Count what a run of each graph costs, for `keepsight plan`: exports of this version have it, older ones get it."""
    _need("onnx")
    from keepsight.export.costs import count_bundle
    from keepsight.runtime.bundle import SHIPPED, Bundle

    if bundle in SHIPPED:
        raise UsageError(f"{bundle} is the shipped bundle, and has been counted.", fix=f"Look: keepsight plan {bundle} --all")
    opened = Bundle.open(bundle)
    for name, graph in count_bundle(opened.path).graphs.items():
        typer.echo(f"{name:10} {(graph.flops or 0) / 1e9:10.3f} GFLOP {(graph.bytes or 0) / 1e6:10.1f} MB")


def _print_memory(memory: Agreement, frames: int) -> None:
    """What 8 bits did to the memory over the calibration frames."""
    for bank, share in (("visual", memory.visual), ("query", memory.query)):
        said = "none was due; give more frames to see" if share is None else f"{share:.2%}"
        typer.echo(f"merge decisions of the {bank} bank that agree over {frames} frames: {said}")
    typer.echo(f"soft prompt after them: cosine {memory.soft_prompt:.4f}")


def verify(
    bundle: Annotated[str, typer.Argument(help="A bundle's directory, or `tiny`.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that it is from (`tiny` carries its own), or a trace.npz of another machine."),
    ] = None,
    fine_tuned: Annotated[Path | None, typer.Option(help="As it was exported with.")] = None,
    vision: Annotated[Path | None, typer.Option(help="As it was exported with.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="A video or directory of pictures [default: synthetic scenes]; with a trace, its source.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to use at most [default: 5 memory lengths].")] = None,
    question: Annotated[list[str] | None, typer.Option(help="To ask; may be given several times.")] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Measure what each scaler, aspect and colorimetry does to the model; needs --clip.")
    ] = False,
    variant: VariantOption = None,
    backend: BackendOption = "cpu",
    cuda_graphs: GraphsOption = True,
    out: Annotated[Path, typer.Option(help="Where parity.json and parity.html go.")] = Path("."),
) -> None:
    """Compare a bundle with what it was made from: every graph, the memory over a stream, and the answers.

    On another backend than the CPU, and without --against, its engines are compared with its ONNX files.
    """
    from keepsight.export.asked_questions import refuse_blank
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.evaluation.parity import write_report
    from keepsight.runtime.graphs.backends import open_engines

    # Hashes are not checked here: the question is what the files compute.
    _check_pixels(pixels, against, clip, backend)
    refuse_blank(question or ())
    opened = Bundle.open(bundle, variant=variant, verify=False)
    with open_engines(opened, backend, cuda_graphs=cuda_graphs) as engines:
        if against is not None and against.suffix == ".npz":
            report = _against_trace(opened, engines, against, clip)
        elif against is None and backend != "cpu":
            report = _against_onnx(opened, engines, backend, clip, frames, (question or QUESTIONS)[0])
        else:
            _need("torch", "onnx", "transformers", "safetensors")
            checkpoint = None if against is None else _open(against, vision, fine_tuned)
            report = _against_source(opened, engines, checkpoint, clip, frames, question or QUESTIONS)
    if pixels and clip is not None:
        report.pixels = _compare_pixels(opened, clip, frames, question or QUESTIONS)
    written = write_report(report, out)
    _print_parity(report)
    typer.echo(f"written to {written[0]} and {written[1].name}")
    if not report.passed:
        more = f" ({len(report.failures)} in all)" if len(report.failures) > 1 else ""
        raise ParityError(f"{opened.manifest.name} is not what it was made from: {report.failures[0]}{more}.")


def _check_pixels(pixels: bool, against: Path | None, clip: str | None, backend: str) -> None:
    if pixels and clip is None:
        raise UsageError("--pixels needs a clip of its own size to scale.", fix="Name a video or pictures: --clip.")
    if pixels and against is not None and against.suffix == ".npz":
        raise UsageError("--pixels compares with the reference's pixels, not with a trace.", fix="Leave --against out.")
    if pixels and backend != "cpu":
        raise UsageError(f"--pixels runs the bundle on the CPU, not on {backend}.", fix="Leave --backend out.")


def _compare_pixels(bundle: Bundle, clip: str, frames: int | None, questions: Sequence[str]) -> list[PixelParity]:
    from keepsight.export.pixels import compare_pixels

    count = frames or 5 * bundle.manifest.dims.memory_length
    with _shown() as progress:
        return compare_pixels(bundle, clip, questions, count=count, progress=progress)


def _against_source(
    bundle: Bundle,
    engines: Engines,
    checkpoint: Checkpoint | None,
    clip: str | None,
    frames: int | None,
    questions: Sequence[str],
) -> Report:
    from keepsight.export import verify as check

    source = check.source_of(bundle, checkpoint)
    pictures, name = _pictures(bundle, clip, frames)
    with _shown() as progress:
        return check.verify(bundle, source, pictures, questions, clip=name, engines=engines, progress=progress)


def _against_onnx(
    bundle: Bundle, engines: Engines, backend: str, clip: str | None, frames: int | None, question: str
) -> Report:
    """Without PyTorch: this runs on the board."""
    from keepsight.runtime.graphs.engine_check import check_engines
    from keepsight.streams import Frame

    pictures, name = _pictures(bundle, clip, frames)
    fps = bundle.manifest.sample_fps
    shown = [Frame(image, index / fps, 0.0, index) for index, image in enumerate(pictures)]
    return check_engines(bundle, engines, shown, question, clip=name, backend=backend)


def _pictures(bundle: Bundle, clip: str | None, frames: int | None) -> tuple[NDArray[np.uint8], str]:
    """The frames to compare on, uint8 `[T, S, S, 3]`, and what to call them."""
    from keepsight.runtime.clips import synthetic_clip
    from keepsight.runtime.position_table import most_frames

    dims = bundle.manifest.dims
    count = frames or min(5 * dims.memory_length, most_frames(bundle.manifest))
    pictures = synthetic_clip(count, dims.image_size) if clip is None else _read_clip(bundle, clip, count)
    return pictures, f"{len(pictures)} frames of {clip or 'synthetic scenes'}"


def _against_trace(bundle: Bundle, engines: Engines, path: Path, clip: str | None) -> Report:
    """Without PyTorch: this runs on the board."""
    from keepsight.runtime.evaluation.trace_check import check_trace, read_trace

    trace = read_trace(path)
    if clip is None:
        return check_trace(bundle, trace, against=path.name, engines=engines)
    rate = 1.0 if clip.lower().endswith(".npy") else bundle.manifest.sample_fps
    with bundle.source(clip, fps=rate) as source:
        return check_trace(bundle, trace, source, against=path.name, engines=engines)


def _read_clip(bundle: Bundle, clip: str, count: int) -> NDArray[np.uint8]:
    """The first frames of a clip, scaled and sampled as the manifest says."""
    import numpy as np

    with bundle.source(clip) as source:
        return np.stack([frame.image for frame in islice(source, count)])


def _print_parity(report: Report) -> None:
    """The report's figures as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "largest difference", "limit", "cosine")
    rows = [(f"{name}: {out}", apart) for name, graph in report.graphs.items() for out, apart in graph.outputs.items()]
    rows += [(f"soft prompt after {row.frames} frames, merges forced", row.forced) for row in report.drift]
    for what, apart in rows:
        style = None if apart.passed else "bold red"
        table.add_row(what, f"{apart.largest:.1e}", f"{apart.limit:.0e}", f"{apart.cosine:.7f}", style=style)
    for row in report.drift:
        table.add_row(f"soft prompt after {row.frames} frames, free", f"{row.free.largest:.1e}", "-", f"{row.free.cosine:.7f}")
    console = Console()
    console.print(table)
    for bank, share in report.merges.items():
        console.print(f"merge decisions of the {bank} bank that agree: {share:.2%}")
    if report.language is not None:
        console.print(f"next token: KL {report.language.mean_kl:.1e} nats; answers that agree: {report.language.agreement:.0%}")
    if report.pixels:
        console.print(_pixel_table(report.pixels))
    console.print("[green]passed[/]" if report.passed else "[bold red]failed[/]")


def _pixel_table(pixels: list[PixelParity]) -> Table:
    from rich.table import Table

    table = Table("frames made by", "mean", "max", "cosine", "least", "merges", "answers", "CPU", title="pixels before the graph")
    for row in pixels:
        shares = ("-" if share is None else f"{share:.0%}" for share in (row.merges, row.answers))
        table.add_row(
            f"{row.name} (this bundle)" if row.own else row.name, f"{row.mean:.2f}", str(row.largest), f"{row.cosine:.4f}",
            f"{row.least_cosine:.3f}", *shares, f"{row.cost:.1f}", style="bold" if row.own else None,
        )  # fmt: skip
    return table


def _open(checkpoint: Path, vision: Path | None, fine_tuned: Path | None) -> Checkpoint:
    from keepsight.export import checkpoints

    if checkpoint.is_dir() and vision is not None:
        raise UsageError(
            f"{checkpoint} is a Hugging Face folder, with a visual encoder of its own.", fix="Leave --vision out."
        )
    model = checkpoints.load_huggingface(checkpoint) if checkpoint.is_dir() else checkpoints.load_lavis(checkpoint, vision)
    return model if fine_tuned is None else checkpoints.with_fine_tuned(model, fine_tuned)


@contextmanager
def _shown() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for each part that is written."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def train(
    out: Annotated[Path, typer.Option(help="The bundle's directory.")] = Path("work/keepsight-tiny"),
    work: Annotated[Path, typer.Option(help="Features, checkpoints, loss curve; a run resumes here.")] = Path("work/training"),
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: torch's choice].")] = None,
    policy: Annotated[MemoryName, typer.Option(help="How the memory that is trained for makes room.")] = "mbc",
) -> None:
    """Train keepsight-tiny from the packaged weights and easy-VQA's train split, and write its bundle (about 1 h on 2 cores).

    Ask weights that were trained for another policy than mbc with `--memory` of the same name.
    """
    _need("torch", "onnx", "transformers", "PIL")
    from keepsight.export.tiny import train_tiny

    train_tiny(work, out, seed=seed, threads=threads, policy=policy)


def bench_memory(
    memory_length: Annotated[
        list[int] | None, typer.Option(help="Slots of the memory; may be given several times [default: 20, 10, 40].")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames that the naive loop and the fast path see in turns.")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads of PyTorch and of ONNX Runtime.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="A PNG to write.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """The memory at full size, random weights: times, bytes and differences, beside a naive loop in PyTorch.

    The naive loop runs at 20 slots, or at the first length given where 20 is not among them. Needs 2 GB of disk in the
    temporary directory and 6 GB of memory.
    """
    _need("torch", "onnx", "matplotlib")
    from json import dumps
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from keepsight.export.bench import Settings
    from keepsight.export.bench import bench_memory as measure
    from keepsight.export.bench_report import draw, print_memory

    if plot is not None and not plot.parent.is_dir():
        raise UsageError(f"{plot.parent} is no directory to write {plot.name} to.", fix="Name a file in one that exists.")
    settings = Settings(lengths=tuple(memory_length or Settings.lengths), frames=frames, threads=threads)
    with TemporaryDirectory(prefix="keepsight-bench-") as folder, _shown() as progress:
        found = measure(settings, Path(folder), progress=progress)
    if plot is not None:
        draw(found, plot)
    if json:
        typer.echo(dumps(found))
    else:
        print_memory(found, Console())


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingComponentError(
                f"this command needs {module}, which is not installed.", fix='Install it with: pip install "keepsight[export]"'
            )
