"""The command as a user meets it: every failure is one clear line and the exit code of its kind."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.streams import errors, write_video
from keepsight.streams.errors import KeepsightError

from ..random_bundle import make_bundle

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def keepsight(*arguments: str | Path, before: str = "", stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `before` is Python that runs first."""
    program = f"{before}\nfrom keepsight.runtime.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT, input=stdin,
    )  # fmt: skip


def _missing(folder: Path) -> list[str | Path]:
    return ["ask", folder / "nothing.mp4", "what is this?"]


def _text_as_video(folder: Path) -> list[str | Path]:
    (folder / "text.mp4").write_text("this is no video\n" * 200)
    return ["ask", folder / "text.mp4", "what is this?"]


def _truncated(folder: Path) -> list[str | Path]:
    whole = folder / "whole.mp4"
    rng = np.random.default_rng(0)
    write_video(whole, rng.integers(0, 255, (40, 96, 96, 3)).astype(np.uint8), fps=10)
    (folder / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return ["ask", folder / "half.mp4", "what is this?"]


def _no_camera(_: Path) -> list[str | Path]:
    return ["ask", "/dev/video99", "what is this?"]


def _bundle_with(folder: Path, change: Callable[[Path], None]) -> Path:
    copy = folder / "bundle"
    shutil.copytree(Bundle.open("tiny").path, copy)
    change(copy)
    return copy


def _one_byte(bundle: Path) -> None:
    path = bundle / "qformer.weights"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_package(bundle: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["llm"]["package"] = "no_such_package"
    path.write_text(json.dumps(manifest))


def _corrupt(folder: Path) -> list[str | Path]:
    return ["ask", "test://ball", "what is this?", "--bundle", _bundle_with(folder, _one_byte)]


def _no_gguf(folder: Path) -> list[str | Path]:
    return ["ask", "test://ball", "what is this?", "--bundle", _bundle_with(folder, _other_package)]


def _no_bundle(folder: Path) -> list[str | Path]:
    return ["inspect", folder / "nowhere"]


def _no_dataset(_: Path) -> list[str | Path]:
    return ["eval", "tiny", "nonesuch"]


def _no_question(_: Path) -> list[str | Path]:
    return ["ask", "test://ball"]


def _empty_question(_: Path) -> list[str | Path]:
    return ["ask", "test://ball", " "]


def _unknown_gpu(_: Path) -> list[str | Path]:
    return ["build", "tiny", "--target", "orin"]


def _long_question(_: Path) -> list[str | Path]:
    return ["ask", "test://ball", "what shape " * 40]


@pytest.mark.parametrize(
    "make, code, says",
    [
        (_missing, 3, "nothing.mp4"),
        (_text_as_video, 4, "text.mp4"),
        (_truncated, 4, "truncated"),
        (_no_camera, 3, "/dev/video99"),
        (_corrupt, 8, "qformer.weights"),
        (_no_gguf, 9, "no_such_package"),
        (_no_bundle, 8, "nowhere"),
        (_no_dataset, 12, "nonesuch"),
        (_no_question, 2, "--prompt"),
        (_empty_question, 2, "empty"),
        (_unknown_gpu, 2, "sm86"),
        (_long_question, 2, "64"),  # tokens that fit
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(
    tmp_path: Path, make: Callable[[Path], list[str | Path]], code: int, says: str
) -> None:
    result = keepsight(*make(tmp_path))
    assert result.returncode == code, result.stderr
    assert says in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_missing_gstreamer_names_the_packages() -> None:
    hidden = "import sys; sys.modules['gi'] = None"  # an import of it now fails, as where it is not installed
    result = keepsight("ask", "test://ball", "what is this?", before=hidden)
    assert result.returncode == 7, result.stderr
    assert "apt" in result.stderr and "python3-gi" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "module", "says"),
    [((), "tensorrt", "apt install python3-libnvinfer"), (("--target", "sm86"), "tensorrt_rtx", "keepsight[trt-rtx]")],
)
def test_build_without_tensorrt_says_where_it_comes_from(options: tuple[str, ...], module: str, says: str) -> None:
    result = keepsight("build", "tiny", *options, before=f"import sys; sys.modules[{module!r}] = None")
    assert result.returncode == 7, result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr


def test_build_prints_the_directory_and_says_what_it_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = make_bundle(tmp_path / "bundle", layers=2)
    first = keepsight("build", bundle, "--target", "sm86")
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert folder.parent == bundle / "engines" and (folder / "engine.json").is_file()
    assert "step: built in" in first.stderr
    again = keepsight("build", bundle, "--target", "sm86")
    assert again.stdout == first.stdout and again.stderr.count("unchanged") == 7


def test_no_first_frame_is_an_error_of_its_own() -> None:
    """A server that accepts and never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = keepsight("ask", f"rtsp://127.0.0.1:{port}/cam", "what is this?")
    assert result.returncode == 5, result.stderr


def test_ask_answers_about_a_live_source_as_json() -> None:
    result = keepsight("ask", "test://ball", "what color is the shape?", "--seconds", "1", "--threads", "1", "--json")
    answer = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert answer["mode"] == "standing" and answer["frames_seen"] >= 3 and answer["text"]
    assert answer["trace"]["first_token_ms"] > 0 and answer["trace"]["vision_ms"] > 0


def test_ask_when_a_file_reaches_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, [np.full((64, 64, 3), 128, np.uint8)] * 24, fps=4)
    result = keepsight("ask", path, "what is this?", "--when", "2", "--mode", "replay", "--threads", "1", "--json")
    answer = json.loads(result.stdout)
    assert (answer["time_s"], answer["frames_seen"], answer["mode"]) == (2.0, 9, "replay")


def test_run_answers_typed_lines_and_leaves_at_their_end() -> None:
    typed = "what color is the shape?\n\nwhat shape was first?\n"
    result = keepsight("run", "test://ball", "--threads", "1", stdin=typed)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) == 2


def test_inspect_lists_every_file_of_the_shipped_bundle() -> None:
    report = json.loads(keepsight("inspect", "tiny", "--json").stdout)
    assert report["language_model"]["status"] == "checked"
    assert report["total_bytes"] < 25e6
    assert {"vision.onnx", "step.onnx", "replay.onnx"} <= set(report["bytes"])


def test_a_help_page_shows_what_is_in_brackets() -> None:
    """Defaults, and names of extras: not taken for markup."""
    shown = 0
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        page = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"}).output
        for bracket in re.findall(r"\[[^]]+\]", " ".join(str(getattr(option, "help", "")) for option in command.params)):
            assert bracket in page, (name, bracket)
            shown += 1
    assert shown > 10


def _kinds() -> list[type[KeepsightError]]:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    return [value for value in classes if issubclass(value, KeepsightError)]


def test_exit_codes_differ_by_kind_and_the_readme_lists_them() -> None:
    chapter = (ROOT / "README.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| (\d+) \| `([\w-]+)` \|", chapter, re.MULTILINE))
    codes = {str(kind.exit_code): kind.kind for kind in _kinds()}
    assert len(codes) == len(_kinds())
    assert {code: name for code, name in table.items() if code not in ("0", "130")} == codes
    assert {"0", "130"} <= table.keys()
