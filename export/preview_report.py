"""A preview of an export, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from keepsight.export.preview import Preview
from keepsight.runtime.boards import Board

__all__ = ["describe_preview", "print_preview"]


def describe_preview(preview: Preview) -> dict[str, Any]:
    """Everything in a preview, as JSON takes it."""
    manifest = preview.manifest.model_dump(mode="json", exclude={"files"})
    if manifest["llm"] is not None:
        del manifest["llm"]["sha256"]  # nobody knows it yet
    return {
        "manifest": manifest,
        "precision": preview.precision,
        "language_model": None if preview.llm is None else asdict(preview.llm),
        "files": [asdict(file) for file in preview.files],
        "total_bytes": preview.total_bytes,
        "memory": [asdict(part) for part in preview.footprint.parts],
        "memory_bytes": preview.footprint.total,
        "boards": [
            {
                "name": fit.board.name, "usable_bytes": fit.board.usable_bytes, "free_bytes": fit.free_bytes,
                "fits": fit.fits, "change": preview.changes.get(fit.board.name),
            }
            for fit in preview.fits
        ],
    }  # fmt: skip


def print_preview(preview: Preview) -> None:
    """The same as tables on stdout."""
    console = Console()
    for line in _headings(preview):
        console.print(line)
    console.print(_sizes("file", preview.files, preview.total_bytes))
    console.print(_sizes("in memory, engines on a board", preview.footprint.parts, preview.footprint.total))
    console.print(_boards(preview))
    console.print("Nothing was written.")


def _headings(preview: Preview) -> list[str]:
    manifest, dims = preview.manifest, preview.manifest.dims
    model = preview.llm
    kind = "none" if model is None else f"{model.shape.layers} layers of {model.shape.hidden}, {model.kind or 'as it is'}"
    return [
        f"[bold]{manifest.name}[/] ({manifest.system}): visual encoder and Q-Former in {preview.precision}",
        f"{dims.tokens} visual tokens x {dims.channels}, Q-Former {dims.layers} x {dims.hidden} with {dims.queries} queries, "
        f"memory of {dims.memory_length} slots, {manifest.sample_fps:g} frames/s, positions {manifest.positions.policy!r}",
        f"language model: {kind}",
        "licences: the checkpoint's own" + ("" if manifest.llm is None else f"; language model: {manifest.llm.licence}"),
    ]


def _sizes(what: str, rows: Any, total: int) -> Table:
    table = Table(what, "MB", "known", title_justify="left")
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(row.name, f"{row.bytes / 1e6:,.1f}", row.basis)
    table.add_row("total", f"{total / 1e6:,.1f}", "", style="bold")
    return table


def _boards(preview: Preview) -> Table:
    table = Table("board", "usable GB", "free GB", "what to change")
    for column in table.columns[1:3]:
        column.justify = "right"
    for fit in preview.fits:
        style = "green" if fit.fits else "red"
        free = f"[{style}]{fit.free_bytes / 1e9:.1f}[/]"
        table.add_row(_title(fit.board), f"{fit.board.usable_bytes / 1e9:.1f}", free, preview.changes.get(fit.board.name, "fits"))
    return table


def _title(board: Board) -> str:
    return f"{board.title} ({board.name})"
