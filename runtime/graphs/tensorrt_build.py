"""Build the TensorRT engines of a bundle: what is missing or changed, graph by graph."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.build_lock import only_builder
from keepsight.runtime.graphs.engine_store import (
    EngineRecord,
    EngineSet,
    Recipe,
    Target,
    damage_of,
    engine_folder,
    read_engine_set,
    recipe_of,
    variant_of,
    write_atomically,
    write_engine_set,
)
from keepsight.runtime.graphs.gpu import jetson_linux, this_gpu
from keepsight.runtime.graphs.tensorrt_module import import_tensorrt, import_tensorrt_rtx, is_rtx, title_of
from keepsight.runtime.graphs.tensorrt_network import build_plan, parse, profiles_of
from keepsight.streams.errors import EngineError, UsageError

__all__ = ["Progress", "build_engines", "target_of", "tensorrt_for", "this_target"]

_TIMING_CACHE = "timing.cache"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a build is: `index` of `total` graphs (from 1), and what was done; bytes and seconds once it is done."""

    graph: str
    index: int
    total: int
    state: Literal["building", "built", "unchanged"]
    bytes: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        done = "" if self.bytes is None else f", {self.bytes / 1e6:.1f} MB"
        taken = f" in {self.seconds:.1f} s" if self.state == "built" else ""
        return f"[{self.index}/{self.total}] {self.graph}: {self.state}{taken}{done}"


def tensorrt_for(target: str | None) -> tuple[Any, Target]:
    """TensorRT and this machine; or, for a GPU that is not here (`sm86`), TensorRT-RTX and that GPU.

    Raises:
        UsageError: not a compute capability.
        MissingComponentError: that TensorRT, or the CUDA driver, is not installed.
        EngineError: there is no GPU.
    """
    if target is None:
        trt = import_tensorrt()
        return trt, this_target(trt)
    found = re.fullmatch(r"sm(\d{2,3})", target)
    if found is None:
        raise UsageError(f"{target!r} is not a GPU to build for.", fix="Write its compute capability: sm86 for 8.6.")
    trt = import_tensorrt_rtx()
    return trt, target_of(trt, int(found[1]))


def this_target(trt: Any) -> Target:
    """This machine's GPU and this TensorRT.

    Raises:
        MissingComponentError: there is no CUDA driver.
        EngineError: there is no GPU.
    """
    gpu = this_gpu()
    return Target(gpu=gpu.name, sm=gpu.sm, library="tensorrt-rtx" if is_rtx(trt) else "tensorrt", version=trt.__version__)


def target_of(trt: Any, sm: int) -> Target:
    """A GPU that need not be there, by its compute capability (86 for 8.6): only TensorRT-RTX builds for one.

    Raises:
        EngineError: another TensorRT, which builds for the GPU that it finds.
    """
    if not is_rtx(trt):
        raise EngineError(
            f"{title_of(trt)} builds for the GPU that it runs on, not for sm{sm}.",
            fix="Leave out --target, and build on the machine that runs the engines.",
        )
    return Target(gpu=None, sm=sm, library="tensorrt-rtx", version=trt.__version__)


def build_engines(
    bundle: Bundle,
    trt: Any,
    target: Target,
    *,
    variant: str | None = None,
    workspace_mib: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Build what is missing or changed of a variant's engines. A broken-off build goes on where it stopped.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        target: from `this_target` or `target_of`.
        variant: by default the bundle's.
        workspace_mib: limit of the scratch memory that a tactic may use; None = TensorRT's own, all of the GPU's memory.
        progress: called before and after each graph.

    Returns:
        The directory of the engines and their engine.json.

    Raises:
        EngineError: a graph that does not parse or build, with TensorRT's reason; a directory that can't be written, or that
            another process builds into.
        BundleError: a graph that can't be read.
        UsageError: a variant that the bundle does not have.
    """
    variant = variant_of(bundle, variant)
    folder = engine_folder(bundle, target, variant)
    with only_builder(folder):
        _build_missing(bundle, trt, target, variant, folder, workspace_mib, progress or (lambda _: None))
    return folder


def _build_missing(
    bundle: Bundle,
    trt: Any,
    target: Target,
    variant: str,
    folder: Path,
    workspace_mib: int | None,
    report: Callable[[Progress], None],
) -> None:
    engines = _start(folder, target, variant)
    names = list(bundle.manifest.graphs)
    for index, name in enumerate(names, start=1):
        recipe = recipe_of(bundle, name, variant, workspace_mib=workspace_mib)
        record = engines.graphs.get(name)
        if record is not None and record.recipe == recipe and damage_of(folder / record.file, record) is None:
            report(Progress(name, index, len(names), "unchanged", record.bytes, record.build_seconds))
            continue
        report(Progress(name, index, len(names), "building"))
        record = _build(trt, bundle.graph_path(name, variant), folder / f"{name}.engine", target, recipe)
        engines = engines.model_copy(update={"graphs": {**engines.graphs, name: record}})
        write_engine_set(folder, engines)
        report(Progress(name, index, len(names), "built", record.bytes, record.build_seconds))


def _start(folder: Path, target: Target, variant: str) -> EngineSet:
    """What is built already and for this target, or nothing yet."""
    found = read_engine_set(folder)
    if found is not None and (found.target, found.variant) == (target, variant):
        return found
    return EngineSet(target=target, variant=variant, jetson_linux=None if target.gpu is None else jetson_linux())


def _build(trt: Any, onnx: Path, file: Path, target: Target, recipe: Recipe) -> EngineRecord:
    started = time.monotonic()
    parsed = parse(trt, onnx)
    profiles = profiles_of(parsed, recipe.sizes)
    timing_cache = file.with_name(_TIMING_CACHE)
    plan = build_plan(
        trt, parsed, profiles, target=target, workspace_mib=recipe.workspace_mib, timing_cache=timing_cache
    )
    content = memoryview(plan)
    write_atomically(file, content)
    return EngineRecord(
        file=file.name,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=content.nbytes,
        profiles=tuple(dict(profile) for profile in profiles),
        recipe=recipe,
        build_seconds=round(time.monotonic() - started, 3),
    )
