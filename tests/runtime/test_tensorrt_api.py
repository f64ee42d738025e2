"""Every name of TensorRT's Python API that the code uses exists in each version that a JetPack may bring.

The bindings are the real ones, from PyPI. They need only a handful of functions from TensorRT's libraries to be imported, and
those are put there by a few lines of C, so nothing can be built with them; classes, methods and enums are all there.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import keepsight.runtime.graphs.tensorrt_network
from keepsight.runtime.graphs.tensorrt_engine import _NUMPY_OF_TENSORRT
from keepsight.runtime.language.gguf_cache import default_cache_dir

from . import fake_tensorrt

VERSIONS = ("10.3.0", "10.7.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
RUNTIME = Path(keepsight.runtime.graphs.tensorrt_network.__file__).parent
SOURCES = sorted(RUNTIME.glob("tensorrt_*.py"))

# The code's names for TensorRT's objects. One that is missing here fails `test_every_object_of_tensorrt_is_known`.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "_config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
}
# Used for TensorRT-RTX alone: in this function, and it is only called where `is_rtx(trt)` holds.
ONLY_RTX = "_aim"

C_STUB = """
#include <stddef.h>
void *createInferBuilder_INTERNAL(void *logger, int version) { return NULL; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return NULL; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return NULL; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return NULL; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return NULL; }
void *getBuilderPluginRegistry(int capability) { return NULL; }
void *getPluginRegistry(void) { return NULL; }
int getInferLibVersion(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *name) { return 0; }
"""

PROBE = """
import json, sys
from pathlib import Path
import tensorrt_bindings as trt
from keepsight.runtime.graphs.tensorrt_module import is_rtx, log_of, title_of
from keepsight.runtime.graphs.tensorrt_network import parse
from keepsight.streams.errors import EngineError

def found(name):
    value = trt
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True

try:
    parse(trt, Path("graph.onnx"))
except EngineError as error:
    refused = str(error)
log_of(trt).clear()
log_of(trt).ilogger.log(trt.ILogger.Severity.WARNING, "a warning")
log_of(trt).ilogger.log(trt.ILogger.Severity.ERROR, "an error")
def signatures(name):
    owner, method = name.split(".")
    text = getattr(getattr(trt, owner), method, None)
    return (text.__doc__ or "").splitlines() if text is not None else []

print(json.dumps({
    "signatures": {name: signatures(name) for name in sys.argv[1:] if name.count(".") == 1},
    "complaints": log_of(trt).complaints(),
    "title": title_of(trt),
    "missing": [name for name in sys.argv[1:] if not found(name)],
    "strongly_typed": int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "rtx": is_rtx(trt),
    "refused": refused,
}))
"""


class Use(NamedTuple):
    """A name of TensorRT's, such as `IBuilderConfig.clear_flag`, and the function that uses it."""

    name: str
    function: str
    place: str


def uses(path: Path) -> Iterator[Use]:
    """What a source file uses of TensorRT, `trt.X.Y` and attributes of the objects in `CLASSES`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                name = _name(node)
                if name is not None:
                    yield Use(name, function.name, f"{path.name}:{node.lineno}")  # type: ignore[attr-defined]


def _name(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Attribute):
        return None
    parts: list[str] = []
    value: ast.AST = node
    while isinstance(value, ast.Attribute):
        if value is not node and value.attr in CLASSES:
            return ".".join([CLASSES[value.attr], *reversed(parts)])
        parts.append(value.attr)
        value = value.value
    if not isinstance(value, ast.Name):
        return None
    if value.id == "trt":
        return None if parts[-1] in ("__name__", "__version__") else ".".join(reversed(parts))
    return ".".join([CLASSES[value.id], *reversed(parts)]) if value.id in CLASSES else None


ALL = [use for path in SOURCES for use in uses(path)]
NAMES = sorted(
    {use.name for use in ALL if use.function != ONLY_RTX and not use.name.startswith("ComputeCapability")}
    | {f"DataType.{kind}" for kind in _NUMPY_OF_TENSORRT}
)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of stand-ins for TensorRT's libraries."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make stand-ins for TensorRT's libraries")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "stub.c").write_text(C_STUB)
    for major in (10, 11):
        for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
            library = f"{name}.so.{major}"
            command = [compiler, "-shared", "-fPIC", "-o", library, f"-Wl,-soname,{library}", "stub.c"]
            subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder


def bindings(version: str) -> Path:
    """The unpacked wheel of a version's bindings, downloaded once (about 1.2 MB each)."""
    folder = default_cache_dir() / "tensorrt-bindings" / f"{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    if not (folder / "tensorrt_bindings").is_dir():
        partial = folder.with_suffix(f".{os.getpid()}.partial")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(partial), f"tensorrt-cu12-bindings=={version}"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        wheels = list(partial.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"pip finds no bindings of TensorRT {version} for this machine: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(partial)
        wheels[0].unlink()
        if folder.exists():
            shutil.rmtree(partial)  # another process was faster
        else:
            partial.rename(folder)
    return folder


def probe(version: str, libraries: Path, *names: str) -> dict[str, Any]:
    """Import the bindings of a version in a process of its own, and look the names up."""
    paths = os.pathsep.join(filter(None, [str(bindings(version)), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *names], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists(version: str, libraries: Path) -> None:
    result = probe(version, libraries, *NAMES)
    assert result["missing"] == []
    assert result["title"] == f"TensorRT {version}" and not result["rtx"]
    assert result["strongly_typed"] == (1 if version.startswith("10.") else 0)
    assert result["complaints"] == "an error"
    assert result["refused"].startswith(f"TensorRT {version} can't start")  # the stand-ins give no builder


# The double's classes, by the class of TensorRT's that each stands for.
DOUBLES = {
    "Builder": fake_tensorrt._Builder,
    "IBuilderConfig": fake_tensorrt._Config,
    "OnnxParser": fake_tensorrt._Parser,
    "Runtime": fake_tensorrt.fake_tensorrt().Runtime,
    "ICudaEngine": fake_tensorrt._Engine,
    "IExecutionContext": fake_tensorrt._Context,
    "EngineInspector": fake_tensorrt._Inspector,
}


def offered() -> dict[str, list[str] | None]:
    """What the double offers: parameters of each public method, None for a property."""
    return {
        f"{owner}.{name}": list(inspect.signature(member).parameters)[1:] if inspect.isfunction(member) else None
        for owner, double in DOUBLES.items()
        for name, member in vars(double).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }


def parameters(line: str) -> list[tuple[str, bool]]:
    """Name, and whether it has a default, of the parameters but `self` in a signature as pybind11 writes it."""
    inner = re.sub(r"\[[^\]]*\]", "", line[line.index("(") + 1 : line.rindex(") ->")])  # types' own commas
    named = [part.strip() for part in inner.split(", ") if ":" in part]
    return [(part.split(":")[0], "=" in part) for part in named if not part.startswith("self")]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_double_offers_what_the_bindings_have_and_takes_the_same_parameters(version: str, libraries: Path) -> None:
    double = offered()
    assert len(double) > 20
    result = probe(version, libraries, *double)
    assert result["missing"] == []
    for name, mine in double.items():
        if mine is None:
            continue
        signature = re.compile(rf"(\d+\. )?{name.split('.')[1]}\(.*->")
        real = [parameters(line) for line in result["signatures"][name] if signature.match(line)]
        assert any(
            [theirs for theirs, _ in one][: len(mine)] == mine and all(has_default for _, has_default in one[len(mine) :])
            for one in real
        ), (name, mine, real)


def test_a_name_that_a_version_lacks_is_found_out(libraries: Path) -> None:
    names = ["BuilderFlag.FP16", "IBuilderConfig.set_compute_capability", "ITensor.shape"]
    assert probe("10.3.0", libraries, *names)["missing"] == names[1:2]
    assert probe("11.4.0.106", libraries, *names)["missing"] == names[:2]


def test_the_scan_sees_what_the_code_uses() -> None:
    assert set(NAMES) > {
        "Builder",
        "Builder.build_serialized_network",
        "BuilderFlag.TF32",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.set_timing_cache",
        "EngineInspector.get_engine_information",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.profiler",
        "ILogger",
        "INetworkDefinition.get_input",
        "IOptimizationProfile.set_shape",
        "IProfiler",
        "ITensor.get_dimension_name",
        "ITimingCache.serialize",
        "MemoryPoolType.WORKSPACE",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "ParserError.node_name",
    }


def test_every_object_of_tensorrt_is_known() -> None:
    """What a call into TensorRT gives is looked at through a name in `CLASSES`, but for plain values."""
    calls = [
        (ast.unparse(node.targets[0]), name)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and (name := _name(node.value.func))
    ]
    assert len(calls) >= 7
    assert {(variable, name) for variable, name in calls if variable not in CLASSES} == {
        ("plan", "Builder.build_serialized_network"),  # only its buffer
        ("kind", "ICudaEngine.get_tensor_dtype"),  # a member of an enum
        ("name", "ITensor.get_dimension_name"),  # a string
    }


def test_no_builder_flag_sets_a_precision() -> None:
    """Precision is in the graph; such flags are gone from TensorRT 11, too."""
    assert [name for name in NAMES if name.startswith("BuilderFlag.")] == ["BuilderFlag.TF32"]


def test_what_only_tensorrt_rtx_has_is_guarded() -> None:
    """`ComputeCapability` and its like are used in one function, whose only call stands under `if is_rtx(trt)`."""
    special = {use.function for use in ALL if "ompute_capabilit" in use.name or use.name.startswith("ComputeCapability")}
    assert special == {ONLY_RTX}
    calls = guarded = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            calls += isinstance(node, ast.Call) and ast.unparse(node.func) == ONLY_RTX
            guarded += (
                isinstance(node, ast.If)
                and ast.unparse(node.test) == "is_rtx(trt)"
                and ast.unparse(node.body[0]).startswith(f"{ONLY_RTX}(")
            )
    assert calls == guarded == 1
