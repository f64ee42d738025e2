"""The commands of `export/`. Torch is imported by the command that needs it, so that a board without it loses nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from keepsight.streams.errors import MissingComponentError


def commands(app: typer.Typer) -> None:
    """Add the export commands to `keepsight`."""
    app.command()(train)


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
