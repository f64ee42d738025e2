"""An engine that does not match the machine or the bundle is refused, with the reason and the command that rebuilds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine_store import Target, engine_folder, find_engine, recipe_of, write_atomically
from keepsight.runtime.graphs.tensorrt_build import build_engines
from keepsight.runtime.manifest import write_manifest
from keepsight.streams.errors import BundleError, EngineError, UsageError

from ..random_bundle import make_bundle
from .fake_tensorrt import fake_tensorrt

ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_bundle(tmp_path_factory.mktemp("built") / "bundle")
    build_engines(Bundle.open(path), fake_tensorrt(), ORIN)
    return path


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Bundle:
    """A bundle of its own, with engines for ORIN."""
    shutil.copytree(built_once, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (ORIN, "orin-sm87-trt10.3.0"),
        (Target(gpu="NVIDIA Thor", sm=110, library="tensorrt", version="10.13.3.9"), "thor-sm110-trt10.13.3.9"),
        (Target(gpu="NVIDIA GeForce RTX 3060", sm=86, library="tensorrt", version="11.4.0"), "geforce-rtx-3060-sm86-trt11.4.0"),
        (Target(gpu=None, sm=86, library="tensorrt-rtx", version="1.7.1.116"), "sm86-rtx1.7.1.116"),
    ],
)
def test_a_directory_says_what_its_engines_are_for(target: Target, name: str) -> None:
    assert target.name == name


def test_the_engine_of_this_machine_is_found(built: Bundle) -> None:
    path, record = find_engine(built, "step", ORIN)
    assert path == built.path / "engines" / "orin-sm87-trt10.3.0-fp32" / "step.engine"
    assert path.stat().st_size == record.bytes and len(record.profiles) == 3


def test_engines_built_with_a_limit_of_memory_are_found_too(built: Bundle) -> None:
    build_engines(built, fake_tensorrt(), ORIN, workspace_mib=32)
    assert find_engine(built, "step", ORIN)[1].recipe.workspace_mib == 32


def in_json(change: Callable[[Any], None]) -> Callable[[Bundle], None]:
    def edit(bundle: Bundle) -> None:
        path = engine_folder(bundle, ORIN, "fp32") / "engine.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def in_folder(change: Callable[[Path], Any]) -> Callable[[Bundle], None]:
    return lambda bundle: change(engine_folder(bundle, ORIN, "fp32"))


def flip_a_byte(folder: Path) -> None:
    path = folder / "step.engine"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_folder(shutil.rmtree), "it needs orin-sm87-trt10.3.0-fp32, and none has been built"),
        (
            in_folder(lambda folder: folder.rename(folder.with_name("orin-sm87-trt10.7.0-fp32"))),
            "it needs orin-sm87-trt10.3.0-fp32, and there is orin-sm87-trt10.7.0-fp32",
        ),
        (in_folder(lambda folder: (folder / "engine.json").unlink()), "engine.json is missing or can't be understood"),
        (in_folder(lambda folder: (folder / "engine.json").write_text("{")), "engine.json is missing or can't be understood"),
        (in_json(lambda said: said.update(schema_version=2)), "engine.json is missing or can't be understood"),
        (in_folder(lambda folder: (folder / "step.engine").unlink()), "step.engine is missing"),
        (in_folder(flip_a_byte), "step.engine is not what was built: its size or sha256 differs from engine.json's"),
        (
            in_json(lambda said: said["target"].update(version="10.7.0")),
            "engine.json says that they are for orin-sm87-trt10.7.0, this machine is orin-sm87-trt10.3.0",
        ),
        (in_json(lambda said: said["target"].update(sm=110)), "they are for orin-sm110-trt10.3.0"),
        (in_json(lambda said: said.update(variant="fp16")), "they are of the variant fp16"),
        (in_json(lambda said: said["graphs"].pop("step")), "step was not built"),
        (in_json(lambda said: said["graphs"]["step"]["recipe"].update(onnx="0" * 64)), "built from another export of the graph"),
        (
            in_json(lambda said: said["graphs"]["step"]["recipe"].update(weights={"qformer.weights": "0" * 64})),
            "built from another export of the graph",
        ),
        (in_json(lambda said: said["graphs"]["step"]["recipe"]["sizes"].pop()), "built for the sizes [{'batch': 1, 'rows': 20"),
        (
            in_json(lambda said: said["graphs"]["step"]["recipe"].update(flags=["FP16"])),
            "built with FP16, this Keepsight builds with STRONGLY_TYPED, no TF32",
        ),
    ],
)
def test_an_engine_that_does_not_match_is_refused(built: Bundle, change: Callable[[Bundle], None], reason: str) -> None:
    change(built)
    with pytest.raises(EngineError) as refused:
        find_engine(built, "step", ORIN)
    assert reason in str(refused.value)
    assert str(refused.value).startswith("bundle random has no engine of step that this machine can use: ")
    assert refused.value.fix == f"Run `keepsight build {built.path} --variant fp32` on this machine."


def test_another_graph_of_the_bundle_is_still_found(built: Bundle) -> None:
    flip_a_byte(engine_folder(built, ORIN, "fp32"))
    assert find_engine(built, "vision", ORIN)


def test_a_graph_or_variant_that_the_bundle_lacks_is_a_wrong_request(built: Bundle) -> None:
    with pytest.raises(UsageError, match="has no graph 'ghost'"):
        find_engine(built, "ghost", ORIN)
    with pytest.raises(UsageError, match="has no variant 'fp8'"):
        find_engine(built, "step", ORIN, "fp8")


def test_a_recipe_holds_the_hashes_of_the_graph_and_of_its_weights(built: Bundle) -> None:
    files = built.manifest.files
    assert recipe_of(built, "step", "fp32").onnx == files["step.onnx"]
    assert recipe_of(built, "step", "fp32").weights == {"qformer.weights": files["qformer.weights"]}
    assert recipe_of(built, "vision", "fp32").weights == {}


def test_weights_that_the_manifest_does_not_list_are_refused(built: Bundle) -> None:
    (built.path / "qformer.weights").unlink()
    write_manifest(built.path, built.manifest)
    with pytest.raises(BundleError, match=r"refers to the weights qformer\.weights, which the manifest does not list"):
        recipe_of(Bundle.open(built.path), "step", "fp32")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.json"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EngineError, match=r"can't be written \(No space left on device\)"):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("engine.json", b"old")]
