"""What is in a bundle, for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.streams.errors import MissingModelError


def describe(bundle: Bundle) -> dict[str, Any]:
    """The manifest, the size of every file, and whether the language model is there. `Bundle.open` has checked the hashes."""
    manifest = bundle.manifest
    sizes = {name: (bundle.path / name).stat().st_size for name in sorted(manifest.files)}
    return {
        "path": str(bundle.path),
        "manifest": manifest.model_dump(mode="json"),
        "bytes": sizes,
        "total_bytes": sum(sizes.values()),
        "language_model": _language_model(bundle),
    }


def _language_model(bundle: Bundle) -> dict[str, Any]:
    """Path and size of the GGUF, or why it is not there."""
    info = bundle.manifest.llm
    if info is None:
        return {"status": "none"}
    try:
        path = bundle.llm_path()
    except MissingModelError as error:
        return {"status": "missing", "reason": str(error)}
    return {"status": "checked", "path": str(path), "bytes": path.stat().st_size, "quantise": info.quantise}


def _memory(manifest: Any) -> str:
    """Where the visual memory is."""
    if MEMORY in manifest["graphs"]:
        return "the visual memory is on the GPU with TensorRT, else on the host"
    return "no graph `memory`: the visual memory is on the host with every backend (an export of this version writes one)"


def print_report(report: dict[str, Any]) -> None:
    """`describe`'s report as tables."""
    manifest, console = report["manifest"], Console()
    dims = manifest["dims"]
    console.print(f"[bold]{manifest['name']}[/] ({manifest['system']}) at {report['path']}")
    console.print(
        f"{dims['tokens']} visual tokens x {dims['channels']}, Q-Former {dims['layers']} x {dims['hidden']} with "
        f"{dims['queries']} queries, memory of {dims['memory_length']} slots, {manifest['sample_fps']:g} frames/s, "
        f"positions {manifest['positions']['policy']!r}"
    )
    console.print(f"graphs: {', '.join(manifest['graphs'])}; {_memory(manifest)}")
    files = Table("file", "bytes", "sha256")
    for name, size in report["bytes"].items():
        files.add_row(name, f"{size:,}", manifest["files"][name][:16] + "… checked")
    files.add_row("total", f"{report['total_bytes']:,}", "")
    console.print(files)
    model = report["language_model"]
    where = model.get("path") or model.get("reason", "")
    console.print(f"language model: {model['status']} {where}")
    licences = Table("part", "licence", "from")
    for licence in manifest["licences"]:
        licences.add_row(licence["part"], licence["spdx"], licence["source"] or "")
    console.print(licences)
