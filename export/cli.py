"""The commands of `export/`. Torch is imported by the command that needs it, so that a board without it loses nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from keepsight.streams.errors import MissingComponentError


def commands(app: typer.Typer) -> None:
    """Add the export commands to `keepsight`."""
    app.command()(export)
    app.command()(train)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder, or LAVIS's instruct_blip_vicuna7b_trimmed.pth.")],
    out: Annotated[Path, typer.Option(help="The bundle's directory.")],
    llm: Annotated[
        str | None, typer.Option(help="A LLaMA's folder, a GGUF file, or `none` [default: the one inside CHECKPOINT].")
    ] = None,
    llm_type: Annotated[
        str, typer.Option(help="Of a converted LLaMA: F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, Q3_K_M, Q2_K.")
    ] = "F16",
    fine_tuned: Annotated[Path | None, typer.Option(help="MA-LMM's checkpoint_best.pth, over the checkpoint.")] = None,
    vision: Annotated[Path | None, typer.Option(help="eva_vit_g.pth, for LAVIS's files.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="bert-base-uncased's folder, tokenizer.json or vocab.txt, where it is not in CHECKPOINT.")
    ] = None,
    memory_length: Annotated[int, typer.Option(help="Slots of the memory.")] = 20,
    sample_fps: Annotated[float, typer.Option(help="Frames per second that go into the memory.")] = 1.0,
    prompt: Annotated[
        str, typer.Option(help="How a question is put; MA-LMM's QA checkpoints: 'Question: {question} Short answer:'.")
    ] = "{question}",
) -> None:
    """Turn an InstructBLIP, BLIP-2 or MA-LMM checkpoint into a bundle of ONNX graphs (float32)."""
    _need("torch", "onnx", "transformers", "safetensors", "sentencepiece")
    from keepsight.export import checkpoints
    from keepsight.export.convert import Conversion, convert, language_source

    if checkpoint.is_dir():
        model = checkpoints.load_huggingface(checkpoint)
    else:
        model = checkpoints.load_lavis(checkpoint, vision)
    if fine_tuned is not None:
        model = checkpoints.with_fine_tuned(model, fine_tuned)
    options = Conversion(
        memory_length=memory_length, sample_fps=sample_fps, prompt=prompt, llm=language_source(model, llm), llm_type=llm_type,
        tokenizer=tokenizer,
    )  # fmt: skip
    with _shown() as progress:
        manifest = convert(model, out, options, progress=progress)
    typer.echo(f"{out}: {manifest.name}, {len(manifest.files)} files, positions {manifest.positions.policy!r}")


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
) -> None:
    """Train keepsight-tiny from the packaged weights and easy-VQA's train split, and write its bundle (about 1 h on 2 cores)."""
    _need("torch", "onnx", "transformers", "PIL")
    from keepsight.export.tiny import train_tiny

    train_tiny(work, out, seed=seed, threads=threads)


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingComponentError(
                f"this command needs {module}, which is not installed.", fix='Install it with: pip install "keepsight[export]"'
            )
