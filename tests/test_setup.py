"""The set-up scripts: what they decide, and what they say when something is missing. Nothing is installed here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"CMAKE_ARGS", "PYTHON", "SKIP_APT"}}
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def put_commands(folder: Path, **scripts: str) -> str:
    """Writes stand-ins for system commands; returns a PATH that finds them first."""
    folder.mkdir()
    for name, body in scripts.items():
        command = folder / name.replace("_", "-")
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def wheel_key(**environment: str) -> str:
    done = run_script("llama-wheel", "--key", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_wheel_is_cached_by_version_and_build_options() -> None:
    assert wheel_key() == wheel_key()
    assert wheel_key() != wheel_key(CMAKE_ARGS="-DGGML_CUDA=on")
    assert wheel_key().startswith("0.3.36-")


def test_a_cached_wheel_is_taken_without_a_build(tmp_path: Path) -> None:
    entry = tmp_path / "wheels" / wheel_key()
    entry.mkdir(parents=True)
    wheel = entry / "llama_cpp_python-0.3.36-py3-none-any.whl"
    wheel.touch()
    done = run_script("llama-wheel", KEEPSIGHT_CACHE=str(tmp_path), PYTHON="/bin/false")
    assert (done.returncode, done.stdout.strip()) == (0, str(wheel))


def test_a_build_is_reported_by_tenths_and_cached(tmp_path: Path) -> None:
    put_commands(
        tmp_path / "bin",
        python="""
            for step in $(seq 140); do echo "  [$step/140] g++ -c file$step.cpp"; done
            while [ "$1" != --wheel-dir ]; do shift; done
            touch "$2/llama_cpp_python-0.3.36-py3-none-any.whl"
        """,
    )
    cache = {"KEEPSIGHT_CACHE": str(tmp_path), "PYTHON": str(tmp_path / "bin" / "python")}
    first = run_script("llama-wheel", **cache)
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).is_file()
    assert [line.split()[-2:] for line in first.stderr.splitlines() if "compiling" in line] == [
        [f"{percent}", "%"] for percent in range(10, 101, 10)
    ]
    again = run_script("llama-wheel", **cache)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    (entry,) = (path for path in (tmp_path / "wheels").iterdir() if path.is_dir())
    assert "CMAKE_ARGS -DGGML_NATIVE=ON" in (entry / "build.txt").read_text()


def test_a_failed_build_leaves_no_cache_entry_and_names_its_log(tmp_path: Path) -> None:
    done = run_script("llama-wheel", KEEPSIGHT_CACHE=str(tmp_path), PYTHON="/bin/false")
    assert done.returncode == 1
    assert "llama.cpp could not be built" in done.stderr
    (log,) = (tmp_path / "wheels").glob("*.log")
    assert str(log) in done.stderr
    assert [path for path in (tmp_path / "wheels").iterdir() if path.is_dir()] == []


def test_cuda_without_its_compiler_is_refused_before_the_build(tmp_path: Path) -> None:
    done = run_script(
        "llama-wheel", KEEPSIGHT_CACHE=str(tmp_path), CMAKE_ARGS="-DGGML_CUDA=on", CUDACXX="/no/such/nvcc"
    )
    assert done.returncode == 1
    assert "no nvcc (/no/such/nvcc)" in done.stderr


@pytest.mark.parametrize(("library", "status"), [("libggml-cuda.so", 0), ("libggml-cpu.so", 1)])
def test_a_wheel_that_was_to_serve_cuda_is_kept_only_if_it_does(tmp_path: Path, library: str, status: int) -> None:
    put_commands(
        tmp_path / "bin",
        nvcc="exit 0",
        python=f"""
            if [ "$2" = zipfile ]; then echo llama_cpp/lib/{library}; seq 100000; exit; fi
            while [ "$1" != --wheel-dir ]; do shift; done
            touch "$2/llama_cpp_python-0.3.36-py3-none-any.whl"
        """,
    )
    done = run_script(
        "llama-wheel",
        KEEPSIGHT_CACHE=str(tmp_path),
        CMAKE_ARGS="-DGGML_CUDA=on",
        CUDACXX=str(tmp_path / "bin" / "nvcc"),
        PYTHON=str(tmp_path / "bin" / "python"),
    )
    assert done.returncode == status, done.stderr
    assert ("no CUDA backend" in done.stderr) == bool(status)
    assert any(path.is_dir() for path in (tmp_path / "wheels").iterdir()) != bool(status)


def test_missing_packages_without_root_name_the_apt_line(tmp_path: Path) -> None:
    path = put_commands(
        tmp_path / "bin",
        dpkg_query="echo 'installed python3-gi'; exit 1",  # as it does when it has never heard of one of them
        apt_get="echo called; exit 9",
        id="echo 1000",
        sudo="exit 1",
    )
    done = run_script("system-packages", PATH=path, KEEPSIGHT_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "apt-get install -y --no-install-recommends python3-gst-1.0 " in done.stderr
    assert "called" not in done.stdout + done.stderr


def test_packages_that_are_there_need_neither_root_nor_apt(tmp_path: Path) -> None:
    path = put_commands(
        tmp_path / "bin",
        dpkg_query='shift 2; for package in "$@"; do echo "installed $package"; done',
        apt_get="exit 9",
        id="echo 1000",
        sudo="exit 1",
    )
    done = run_script("system-packages", PATH=path, KEEPSIGHT_CACHE=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_python_of_the_environment_can_load_gstreamer() -> None:
    done = run_script("find-python")
    assert done.returncode == 0, done.stderr
    version = subprocess.run(
        [done.stdout.strip(), "-c", "import sys; print(*sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(map(int, version.stdout.split())) == sys.version_info[:2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'is Python 3.9; Keepsight needs 3.10, 3.11 or 3.12'; exit 1", "is Python 3.9"),
        ("exit 127", "old-python"),
    ],
)
def test_a_python_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, body: str, reason: str) -> None:
    put_commands(tmp_path / "bin", old_python=body)
    done = run_script("find-python", PYTHON=str(tmp_path / "bin" / "old-python"))
    assert done.returncode == 1
    assert reason in done.stderr
    assert "python3-venv" in done.stderr  # the fix
