"""TensorRT engines inside a bundle: `engines/<machine>-<variant>/*.engine` and the engine.json that says what they are.

An engine belongs to one GPU, one TensorRT and one set of graph files. Whatever does not match is refused, never tried.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.onnx_weights import external_files
from keepsight.runtime.manifest import BundleFile, Sha256, Size, sha256_of
from keepsight.streams.errors import BundleError, EngineError, UsageError

__all__ = [
    "BUILD_FLAGS",
    "ENGINE_JSON",
    "EngineRecord",
    "EngineSet",
    "Recipe",
    "Target",
    "damage_of",
    "engine_folder",
    "find_engine",
    "read_engine_set",
    "recipe_of",
    "variant_of",
    "write_atomically",
    "write_engine_set",
]

ENGINE_JSON = "engine.json"

# Precision is in the graph alone. Not told otherwise, TensorRT lets float32 products run in TF32, with 10 bits of mantissa.
BUILD_FLAGS = ("STRONGLY_TYPED", "no TF32")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Target(_Part):
    """What engines are built for and with.

    Attributes:
        gpu: its name as the driver gives it; None where engines are built for a GPU that is not there.
        sm: compute capability as one number: 87 for 8.7, 110 for 11.0.
        library: which of the two TensorRTs.
        version: of that library.
    """

    gpu: str | None
    sm: Annotated[int, Field(ge=10)]
    library: Literal["tensorrt", "tensorrt-rtx"]
    version: str

    @property
    def name(self) -> str:
        """Such as `orin-sm87-trt10.3.0`: a directory's name, without the variant."""
        gpu = "" if self.gpu is None else re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-").removeprefix("nvidia-") + "-"
        return f"{gpu}sm{self.sm}-{'trt' if self.library == 'tensorrt' else 'rtx'}{self.version}"


class Recipe(_Part):
    """Everything but the target that decides what an engine is. Equal recipes: nothing to build.

    Attributes:
        onnx: sha256 of the graph's file.
        weights: sha256 of its external weight files, by name inside the bundle.
        flags: the builder's.
        sizes: per text bucket, the size of each axis that the graph may have left free: batch, text, rows.
        workspace_mib: limit of the scratch memory that a tactic may use; None = TensorRT's own.
    """

    onnx: Sha256
    weights: dict[BundleFile, Sha256]
    flags: tuple[str, ...]
    sizes: tuple[dict[str, int], ...]
    workspace_mib: Size | None = None


class EngineRecord(_Part):
    """One engine.

    Attributes:
        file: beside engine.json.
        sha256, bytes: of that file.
        profiles: per optimisation profile, the one shape of each input with a free axis; empty for a static graph.
        recipe: what it was built from.
        build_seconds: how long that took.
    """

    file: BundleFile
    sha256: Sha256
    bytes: Size
    profiles: tuple[dict[str, tuple[int, ...]], ...]
    recipe: Recipe
    build_seconds: Annotated[float, Field(ge=0)]


class EngineSet(_Part):
    """The content of an engine.json.

    Attributes:
        target: machine and TensorRT.
        variant: of the bundle's graphs.
        jetson_linux: release that the machine ran, if it is a Jetson. For people; not compared.
        graphs: by the graph's name.
    """

    schema_version: Literal[1] = 1
    target: Target
    variant: str
    jetson_linux: str | None = None
    graphs: dict[str, EngineRecord] = {}


def variant_of(bundle: Bundle, variant: str | None) -> str:
    """The variant, or the bundle's default one.

    Raises:
        UsageError: the bundle has no such variant.
    """
    variants = bundle.manifest.variants
    if variant is not None and variant not in variants:
        raise UsageError(f"bundle {bundle.manifest.name} has no variant {variant!r}.", fix=f"It has {', '.join(variants)}.")
    return variants[0] if variant is None else variant


def engine_folder(bundle: Bundle, target: Target, variant: str) -> Path:
    """Where the engines of a variant lie, for a target."""
    return bundle.path / "engines" / f"{target.name}-{variant}"


def recipe_of(bundle: Bundle, graph: str, variant: str, *, workspace_mib: int | None = None) -> Recipe:
    """What an engine of this graph is built from. The hashes are the manifest's, which `Bundle.open` has checked.

    Raises:
        BundleError: the graph can't be read, or refers to a weight file that the manifest does not list.
        UsageError: a graph or variant that the bundle does not have.
    """
    path, listed, dims = bundle.graph_path(graph, variant), bundle.manifest.files, bundle.manifest.dims
    folder = path.parent.relative_to(bundle.path)
    weights = sorted((folder / name).as_posix() for name in external_files(path))
    for name in weights:
        if name not in listed:
            raise BundleError(f"{path} refers to the weights {name}, which the manifest does not list.", fix="Export it again.")
    return Recipe(
        onnx=listed[path.relative_to(bundle.path).as_posix()],
        weights={name: listed[name] for name in weights},
        flags=BUILD_FLAGS,
        sizes=tuple({"batch": 1, "text": text, "rows": dims.queries + text} for text in dims.text_buckets),
        workspace_mib=workspace_mib,
    )


def find_engine(
    bundle: Bundle, graph: str, target: Target, variant: str | None = None, *, verify: bool = True
) -> tuple[Path, EngineRecord]:
    """The engine of a graph for this machine, and what engine.json says of it.

    Args:
        target: this machine, from `this_target`.
        variant: by default the bundle's.
        verify: hash the engine; without it, only compare its size.

    Raises:
        EngineError: there is none, or it was built for, with or from something else, or is damaged; the fix names the command.
        UsageError: a graph or variant that the bundle does not have.
    """
    variant = variant_of(bundle, variant)
    wanted = recipe_of(bundle, graph, variant)
    folder = engine_folder(bundle, target, variant)
    found = read_engine_set(folder) if folder.is_dir() else None
    reason = _absent(bundle, folder) if found is None else _mismatch(found, graph, target, variant, wanted)
    if found is not None and reason is None:
        record = found.graphs[graph]
        reason = damage_of(folder / record.file, record, verify=verify)
        if reason is None:
            return folder / record.file, record
    raise EngineError(
        f"bundle {bundle.manifest.name} has no engine of {graph} that this machine can use: {reason}.",
        fix=f"Run `keepsight build {bundle.path} --variant {variant}` on this machine.",
    )


def damage_of(path: Path, record: EngineRecord, *, verify: bool = True) -> str | None:
    """What is wrong with an engine's file, or None; without `verify`, its size alone is compared."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != record.bytes or (verify and sha256_of(path) != record.sha256):
        return f"{path} is not what was built: its size or sha256 differs from engine.json's"
    return None


def read_engine_set(folder: Path) -> EngineSet | None:
    """What engine.json says; None if there is none or it can't be understood, so that its engines count as not built."""
    try:
        return EngineSet.model_validate_json((folder / ENGINE_JSON).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def write_engine_set(folder: Path, engines: EngineSet) -> None:
    """Write engine.json; a reader sees the old one or the new one."""
    text = json.dumps(engines.model_dump(mode="json"), indent=2, sort_keys=True)
    write_atomically(folder / ENGINE_JSON, f"{text}\n".encode())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside the file and rename: no one ever reads half of it, not even after a power cut.

    Raises:
        EngineError: the disk is full, or the directory can't be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise EngineError(
            f"{path} can't be written ({error.strerror}).",
            fix="Engines are kept inside the bundle: copy it to a directory that you may write, on a disk with room.",
        ) from error
    finally:
        with suppress(OSError):  # gone by its renaming, or never there
            partial.unlink()


def _absent(bundle: Bundle, folder: Path) -> str:
    if folder.is_dir():
        return f"{folder / ENGINE_JSON} is missing or can't be understood"
    others = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
    return f"it needs {folder.name}, and " + (f"there is {', '.join(others)}" if others else "none has been built")


def _mismatch(found: EngineSet, graph: str, target: Target, variant: str, wanted: Recipe) -> str | None:
    """Why these engines don't fit, or None."""
    if found.target != target:
        return f"engine.json says that they are for {found.target.name}, this machine is {target.name}"
    if found.variant != variant:
        return f"engine.json says that they are of the variant {found.variant}"
    if graph not in found.graphs:
        return f"{graph} was not built"
    had = found.graphs[graph].recipe
    if had.onnx != wanted.onnx or had.weights != wanted.weights:
        return "it was built from another export of the graph (the sha256 of its files differs)"
    if had.sizes != wanted.sizes:
        return f"it was built for the sizes {list(had.sizes)}, the bundle needs {list(wanted.sizes)}"
    if had.flags != wanted.flags:
        return f"it was built with {', '.join(had.flags)}, this Keepsight builds with {', '.join(wanted.flags)}"
    return None
