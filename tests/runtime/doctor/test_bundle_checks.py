"""What the doctor says of a bundle: whole or not, its engines, its language model, its memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.doctor.examine import examine
from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.graphs.engine_store import ENGINE_JSON, Target
from keepsight.runtime.graphs.tensorrt_build import build_engines
from keepsight.runtime.manifest import LLMInfo

from ...random_bundle import make_bundle
from ..fake_tensorrt import fake_tensorrt
from .healthy import agx_orin, change, pc, put

ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")
XAVIER = Target(gpu="Xavier", sm=72, library="tensorrt", version="8.5.2")
FOLDER = "orin-sm87-trt10.3.0-fp32"


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_bundle(tmp_path_factory.mktemp("built") / "bundle")
    build_engines(Bundle.open(path), fake_tensorrt(), ORIN)
    return path


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(built_once, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return agx_orin(tmp_path / "root")


def about(machine: Machine, bundle: Path) -> list[Finding]:
    return [finding for finding in examine(machine, str(bundle)) if finding.area == "bundle"]


def bad(machine: Machine, bundle: Path) -> list[tuple[str, str]]:
    return [(finding.id, finding.severity) for finding in about(machine, bundle) if finding.severity != "ok"]


def test_a_bundle_with_engines_of_this_machine_is_well(machine: Machine, built: Path) -> None:
    assert bad(machine, built) == []
    assert [finding.id for finding in about(machine, built)] == ["bundle", "engines", "bundle-memory"]


def test_a_bundle_that_is_none_is_an_error(machine: Machine, tmp_path: Path) -> None:
    assert bad(machine, tmp_path / "nowhere") == [("bundle", "error")]


def test_a_damaged_file_is_an_error_that_names_it(machine: Machine, built: Path) -> None:
    (built / "vision.onnx").write_bytes(b"damaged")
    (finding,) = about(machine, built)
    assert finding.severity == "error" and "vision.onnx" in finding.why


def test_without_engines_the_command_that_builds_them_is_given(machine: Machine, built: Path) -> None:
    shutil.rmtree(built / "engines")
    (finding,) = [finding for finding in about(machine, built) if finding.severity != "ok"]
    assert (finding.id, finding.severity, finding.command) == ("engines", "note", f"keepsight build {built} --variant fp32")


def _another_export(folder: Path) -> None:
    record = json.loads((folder / ENGINE_JSON).read_text())
    record["graphs"]["step"]["recipe"]["onnx"] = "0" * 64
    (folder / ENGINE_JSON).write_text(json.dumps(record))


def _lost(folder: Path) -> None:
    (folder / "step.engine").unlink()


def _unreadable(folder: Path) -> None:
    (folder / ENGINE_JSON).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "found", "why"),
    [
        (_another_export, "stale: step", "another export"),
        (_lost, "stale: step", "missing"),
        (_unreadable, "answer and 6 more", "can't be understood"),
    ],
)
def test_stale_engines_are_a_warning_with_the_reason(machine: Machine, built: Path, spoil: Any, found: str, why: str) -> None:
    spoil(built / "engines" / FOLDER)
    (finding,) = [finding for finding in about(machine, built) if finding.severity != "ok"]
    assert (finding.id, finding.severity) == ("engines", "warning")
    assert found in finding.found and why in finding.why and "keepsight build" in str(finding.command)


def test_engines_of_another_machine_may_go(machine: Machine, built: Path) -> None:
    build_engines(Bundle.open(built), fake_tensorrt(), XAVIER)
    (finding,) = [finding for finding in about(machine, built) if finding.severity != "ok"]
    folder = built / "engines" / "xavier-sm72-trt8.5.2-fp32"
    assert (finding.id, finding.severity, finding.command) == ("engines-foreign", "note", f"rm -r {folder}")
    assert folder.is_dir(), "the doctor changes nothing"


def test_on_a_pc_all_engines_are_foreign(tmp_path: Path, built: Path) -> None:
    assert bad(pc(tmp_path / "root"), built) == [("engines-foreign", "note")]


def test_more_than_is_free_is_a_warning(machine: Machine, built: Path) -> None:
    put(machine.root, "/proc/meminfo", "MemTotal: 64349760 kB\nMemAvailable: 300000 kB")
    (finding,) = [finding for finding in about(change(machine), built) if finding.severity != "ok"]
    assert (finding.id, finding.severity) == ("bundle-memory", "warning")
    assert "0.3 GiB are available" in finding.found
    on_cpu = [finding.found for finding in about(pc(machine.root.parent / "pc"), built) if finding.id == "bundle-memory"]
    assert on_cpu[0].startswith("it takes about 0.1 GiB"), "no CUDA there"


def test_a_language_model_that_is_not_there_is_an_error(machine: Machine, tmp_path: Path) -> None:
    info = LLMInfo(package="no_such_package", file="model.gguf", sha256="0" * 64, licence="any")
    bundle = make_bundle(tmp_path / "llm", llm=info)
    found = {finding.id: finding for finding in about(machine, bundle)}
    assert found["bundle-llm"].severity == "error" and "no_such_package" in f"{found['bundle-llm']}"
    assert found["bundle-memory"].severity == "note", "what it takes can't be told without the file"
