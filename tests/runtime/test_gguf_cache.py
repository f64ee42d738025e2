"""Requantised models: made once, checked, made again when damaged, by any number of processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keepsight.runtime.language import gguf_cache
from keepsight.runtime.language.gguf_cache import default_cache_dir, quantise, requantised
from keepsight.runtime.language.llm import LLM
from keepsight.streams.errors import LLMError, MissingModelError, UsageError

from .smollm2 import smollm2_gguf


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return requantised(smollm2_gguf(), kind="Q8_0", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really made during the test."""
    targets: list[Path] = []
    make = gguf_cache._make
    monkeypatch.setattr(
        gguf_cache, "_make", lambda source, target, kind: (targets.append(target), make(source, target, kind))
    )
    return targets


def again(cached: Path) -> Path:
    return requantised(smollm2_gguf(), kind="Q8_0", cache_dir=cached.parent)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_copy_is_made_once_and_named_after_content_kind_and_version(cached: Path, made: list[Path]) -> None:
    assert again(cached) == cached and not made
    assert cached.name == f"{sha256(smollm2_gguf())[:16]}-Q8_0-llama0.3.36.gguf"
    assert cached.read_bytes()[:4] == b"GGUF" and cached.stat().st_size > smollm2_gguf().stat().st_size


def test_no_file_is_hashed_again_while_its_times_stay(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_cache, "_sha256", lambda path: pytest.fail(f"hashed {path}"))
    assert again(cached) == cached


def test_a_copy_that_was_only_touched_is_kept(cached: Path, made: list[Path]) -> None:
    os.utime(cached)
    assert again(cached) == cached and not made


@pytest.mark.parametrize("damage", ["short", "flipped", "gone", "unstamped"])
def test_a_damaged_copy_is_made_again(cached: Path, made: list[Path], damage: str) -> None:
    intact = sha256(cached)
    if damage == "short":
        os.truncate(cached, 1000)
    elif damage == "flipped":
        with cached.open("r+b") as file:
            file.seek(50_000_000)
            file.write(b"damaged")
    elif damage == "gone":
        cached.unlink()
    else:
        cached.with_suffix(".json").write_text("{")
    assert again(cached) == cached
    assert made == [cached] and sha256(cached) == intact


def test_two_processes_at_once_make_one_copy(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from keepsight.runtime.language.gguf_cache import requantised;"
        "path = requantised(pathlib.Path(sys.argv[1]), kind='Q8_0', cache_dir=pathlib.Path(sys.argv[2]));"
        "print(path, path.stat().st_ino)"
    )
    arguments = [sys.executable, "-c", program, str(smollm2_gguf()), str(tmp_path)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs[0] == outputs[1] and outputs[0].strip()  # one path and one inode: nobody wrote it twice
    assert not list(tmp_path.glob("*.partial"))


def test_f16_is_another_copy(tmp_path: Path, cached: Path) -> None:
    copy = requantised(smollm2_gguf(), kind="F16", cache_dir=tmp_path)
    assert "-F16-" in copy.name and copy.stat().st_size > cached.stat().st_size


def test_what_cannot_be_requantised_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingModelError, match=r"nowhere\.gguf"):
        requantised(tmp_path / "nowhere.gguf", kind="Q8_0", cache_dir=tmp_path)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(LLMError, match="not a GGUF file"):
        requantised(tmp_path / "text.gguf", kind="Q8_0", cache_dir=tmp_path)
    (tmp_path / "half.gguf").write_bytes(smollm2_gguf().read_bytes()[:5_000_000])
    with pytest.raises(LLMError, match=r"cannot requantise .*half\.gguf"):
        requantised(tmp_path / "half.gguf", kind="Q8_0", cache_dir=tmp_path)
    with pytest.raises(UsageError, match="Use one of Q8_0, F16"):
        requantised(smollm2_gguf(), kind="Q2_K", cache_dir=tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="KEEPSIGHT_CACHE"):
        requantised(smollm2_gguf(), kind="Q8_0", cache_dir=tmp_path / "file" / "cache")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEPSIGHT_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KEEPSIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "keepsight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "keepsight"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_quantised_files_load_and_are_smaller(kind: str, tmp_path: Path) -> None:
    quantise(requantised(smollm2_gguf(), kind="F16"), tmp_path / "small.gguf", kind)
    assert (tmp_path / "small.gguf").stat().st_size < 0.6 * requantised(smollm2_gguf(), kind="F16").stat().st_size
    with LLM(tmp_path / "small.gguf", n_ctx=64, n_threads=1) as model:
        assert model.n_embd == 576
    with pytest.raises(UsageError, match="'Q5_X' is unknown"):
        quantise(smollm2_gguf(), tmp_path / "none.gguf", "Q5_X")
