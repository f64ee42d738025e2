"""A bundle on this machine: whole, with engines that fit, and small enough."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.footprint import Footprint, LanguageShape, banks, engines, language, program
from keepsight.runtime.graphs.engine_store import Target, engine_folder, find_engine, read_engine_set
from keepsight.runtime.graphs.onnx_weights import weight_bytes
from keepsight.runtime.language.gguf_rows import matrix_shapes
from keepsight.runtime.sensors.meminfo import meminfo
from keepsight.streams.errors import KeepsightError

__all__ = ["built_engines", "language_model", "opened", "room"]

_GIB = 2**30


def opened(name: str) -> tuple[Bundle | None, list[Finding]]:
    """The bundle, if it is whole."""
    try:
        bundle = Bundle.open(name)
    except KeepsightError as error:
        return None, [Finding("bundle", "bundle", "error", f"{name} can't be used", str(error))]
    manifest = bundle.manifest
    return bundle, [Finding("bundle", "bundle", "ok", f"{manifest.name}, whole; variants: {', '.join(manifest.variants)}")]


def language_model(bundle: Bundle) -> Iterator[Finding]:
    """Whether its language model is there."""
    if not bundle.has_llm:
        return
    try:
        path = bundle.llm_path()
    except KeepsightError as error:
        yield Finding("bundle-llm", "bundle", "error", "its language model is missing", error.message, _command_in(error.fix))
        return
    yield Finding("bundle-llm", "bundle", "ok", f"its language model is {path.name}")


def built_engines(machine: Machine, bundle: Bundle) -> Iterator[Finding]:
    """Engines of this machine: built and current; and those of others."""
    target = _target(machine)
    folders = sorted(path for path in (bundle.path / "engines").glob("*") if path.is_dir())
    own = set() if target is None else {engine_folder(bundle, target, variant) for variant in bundle.manifest.variants}
    if target is not None:
        for variant in bundle.manifest.variants:
            if variant == bundle.variant or engine_folder(bundle, target, variant) in folders:
                yield _engines_of(bundle, target, variant)
    for folder in folders:
        if folder not in own:
            found = read_engine_set(folder)
            whose = "engine.json can't be read" if found is None else f"built for {found.target.name}"
            yield Finding(
                "engines-foreign",
                "bundle",
                "note",
                f"engines that this machine can't use: {folder.name}",
                f"They are {whose}." if found else f"Its {whose}.",
                f"rm -r {shlex.quote(str(folder))}",
            )


def room(machine: Machine, bundle: Bundle) -> Iterator[Finding]:
    """Whether what it takes is free."""
    available = meminfo(machine.root).get("MemAvailable")
    if available is None:
        return
    try:
        footprint = _footprint(machine, bundle)
    except KeepsightError as error:
        yield Finding("bundle-memory", "bundle", "note", "what it takes in memory can't be told", str(error))
        return
    found = f"it takes about {footprint.total / _GIB:.1f} GiB, and {available / _GIB:.1f} GiB are available"
    if footprint.total <= available:
        yield Finding("bundle-memory", "bundle", "ok", found)
        return
    largest = max(footprint.parts, key=lambda part: part.bytes)
    yield Finding(
        "bundle-memory",
        "bundle",
        "warning",
        found,
        f"Most of it is the {largest.name} ({largest.bytes / _GIB:.1f} GiB). A smaller language model, a lower precision or a "
        "shorter memory make it fit; or end what takes memory now:",
        "ps -eo rss,comm --sort=-rss | head",
    )


def _target(machine: Machine) -> Target | None:
    """What engines of this machine are built for and with; None where none can be."""
    gpus, outcome = machine.cuda.values.get("gpus") or [], None
    if gpus:
        outcome = machine.probe("tensorrt")
    if outcome is None or outcome.failure is not None:
        return None
    return Target(gpu=gpus[0]["name"], sm=gpus[0]["sm"], library="tensorrt", version=outcome.values["version"])


def _engines_of(bundle: Bundle, target: Target, variant: str) -> Finding:
    command = f"keepsight build {shlex.quote(str(bundle.path))} --variant {variant}"
    reasons = {}
    for graph in bundle.manifest.graphs:
        try:
            find_engine(bundle, graph, target, variant, verify=False)
        except KeepsightError as error:
            reasons[graph] = error.message.partition(" can use: ")[2].rstrip(".") or error.message
    if not reasons:
        return Finding("engines", "bundle", "ok", f"engines of {variant} are built for this machine, and current")
    if not engine_folder(bundle, target, variant).is_dir():
        return Finding(
            "engines", "bundle", "note", f"no engines of {variant} for this machine", "`--backend tensorrt` needs them.", command
        )
    first, reason = next(iter(reasons.items()))
    others = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return Finding("engines", "bundle", "warning", f"engines of {variant} are stale: {first}{others}", f"{reason}.", command)


def _footprint(machine: Machine, bundle: Bundle) -> Footprint:
    """As on a board: TensorRT and llama.cpp in one process. On a CPU the graphs take about the same, without CUDA's share."""
    manifest = bundle.manifest
    weights = {name: weight_bytes(bundle.graph_path(name)) for name in manifest.graphs if name != "memory"}
    parts = [*program(), *engines(manifest.dims, weights), *banks(manifest.dims)]
    if bundle.has_llm:
        path = bundle.llm_path(verify=False)
        parts += language(path.stat().st_size, LanguageShape.of(matrix_shapes(path)))
    if not machine.is_jetson:
        parts = [part for part in parts if "CUDA" not in part.name]
    return Footprint(tuple(parts))


def _command_in(fix: str | None) -> str | None:
    """What stands in back-quotes in an error's advice."""
    pieces = (fix or "").split("`")
    return pieces[1] if len(pieces) > 2 else None
