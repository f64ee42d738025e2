"""Jetson.md: what can run on a PC runs here, the rest is parsed; links resolve, quotes are in the source, figures have an origin.

A shell block of the page says in its fence what becomes of it here:

- `sh pc`: run, in a folder of its own, by bash, stopping at the first error.
- `sh pc-checked`: it would run on a PC, but needs a network, root or minutes. Its packages, extras, pins, make targets, scripts
  and options are looked up.
- `sh board`: needs a Jetson.

All of them are parsed by bash, and every line of Keepsight's in them by Keepsight's own command line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from keepsight.runtime.boards import boards
from keepsight.runtime.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "Jetson.md").read_text(encoding="utf-8")
KINDS = ("pc", "pc-checked", "board")
UNIT = ROOT / "packaging" / "systemd" / "keepsight@.service"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
# Programs that stand before another one in its line.
BEFORE = {"sudo": 0, "timeout": 1, "env": 0, "exec": 0}
# Options of other programs that the page's text names by themselves.
OTHERS_OPTIONS = {
    "--runtime", "--volume", "--group-add", "--device", "--network", "--user", "--gpus", "--upgrade", "--store", "--restore",
    "--system-site-packages", "--break-system-packages",
}  # fmt: skip
JETPACK_PACKAGES = {"python3-libnvinfer", "nvidia-jetpack", "nvidia-l4t-gstreamer"}
TOOLS = {"git", "make", "build-essential", "python3-venv", "v4l-utils"}


# -- the page, in parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its line in the page, what stands behind its fence, and its text."""

    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}"

    @property
    def kind(self) -> str:
        return self.info.removeprefix("sh").strip()


def split_page(page: str) -> tuple[list[Block], str]:
    """The fenced blocks, and the page with a blank line in the place of every line of theirs."""
    blocks: list[Block] = []
    prose: list[str] = []
    lines: list[str] = []
    start, info = 0, ""
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("```"):
            if start:
                blocks.append(Block(start, info, "\n".join(lines) + "\n"))
                start = 0
            else:
                start, info, lines = number, line[3:].strip(), []
            prose.append("")
        elif start:
            lines.append(line)
            prose.append("")
        else:
            prose.append(line)
    assert not start, f"the block of line {start} has no end"
    return blocks, "\n".join(prose)


BLOCKS, PROSE = split_page(PAGE)
SHELL = [block for block in BLOCKS if block.info.split()[0] == "sh"]


def blocks_of(*kinds: str) -> list[Block]:
    return [block for block in SHELL if block.kind in kinds]


def named(blocks: Sequence[Block]) -> list[Any]:
    return [pytest.param(block, id=f"line-{block.line}") for block in blocks]


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def spans(text: str) -> list[str]:
    """What is in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


# -- shell -----------------------------------------------------------------------------------------------------------


def commands_in(text: str) -> Iterator[list[str]]:
    """Every simple command of a shell text, as its words; assignments in front and redirections are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.commenters = "#"
        lexer.whitespace_split = True
        words: list[str] = []
        for token in lexer:
            if token and not set(token) - set("();|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(token)
        if words:
            yield words


def program_of(words: Sequence[str]) -> list[str]:
    """A command without the assignments and the programs that only start it."""
    rest = list(words)
    while rest and (re.match(r"^[A-Za-z_]\w*=", rest[0]) or rest[0] in BEFORE):
        rest = rest[1 + BEFORE.get(rest[0], 0) :]
    return rest


def keepsight_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every call of keepsight, also of one in a container."""
    for words in commands_in(text):
        words = program_of(words)
        if not words:
            continue
        if Path(words[0]).name == "keepsight":
            yield words[1:]
        elif words[:2] == ["docker", "run"] and "--entrypoint" not in words:
            yield words[next(index for index, word in enumerate(words) if re.match(r"^keepsight:\w+$", word)) + 1 :]


def parse_arguments(arguments: Sequence[str]) -> None:
    """Parse them as the command does, and run nothing.

    Raises:
        AssertionError: an unknown command or option, a value of the wrong kind, an argument that is missing.
    """
    command: Any = get_command(app)
    rest = list(arguments)
    path = ["keepsight"]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{' '.join(path)} has no command {rest[:1]}"
        path.append(rest[0])
        command = command.commands[rest.pop(0)]
    try:
        command.make_context(" ".join(path), rest)
    except Exception as error:  # click's, or the copy of it that newer typers carry
        raise AssertionError(f"{shlex.join(arguments)}: {getattr(error, 'message', '') or error!r}") from error


@cache
def all_options() -> frozenset[str]:
    """Of all commands of Keepsight's."""

    def walk(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        for child in getattr(command, "commands", {}).values():
            yield from walk(child)

    return frozenset(walk(get_command(app)))


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """Runs a text in bash, in a folder of its own, with this Python's keepsight."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    start = "from keepsight.runtime.cli import main; main()"
    (programs / "keepsight").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{start}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "150",
        "GGML_NO_BACKTRACE": "1",
    }  # fmt: skip

    def run(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def test_every_block_is_of_a_kind_that_is_looked_after() -> None:
    assert {block.info for block in BLOCKS} <= {*(f"sh {kind}" for kind in KINDS), "make"}
    assert all(blocks_of(kind) for kind in KINDS)


@pytest.mark.parametrize("block", named(SHELL))
def test_bash_can_read_a_block(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"^\s*[$>] ", block.text, re.MULTILINE), "prompts can't be copied"


@pytest.mark.parametrize("block", named(blocks_of("pc")))
def test_a_block_for_a_pc_runs(block: Block, shell: Any) -> None:
    for part, module in (("--target", "tensorrt_rtx"), ("keepsight quantize", "torch")):
        if part in block.text and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    done = shell(block.text)
    # The doctor may find that this machine is ill, and says so with its own code.
    assert done.returncode == 0 or ("keepsight doctor" in block.text and done.returncode == 17), done.stdout + done.stderr
    assert done.stdout.strip()
    if "llama_supports_gpu_offload" in block.text:
        assert done.stdout.strip() in ("True", "False")
    if "stream describe" in block.text:
        assert done.stdout.count("on a Jetson") == block.text.count("stream describe")


@pytest.mark.parametrize("block", named([block for block in SHELL if "keepsight" in block.text]))
def test_keepsights_lines_are_what_its_command_line_takes(block: Block) -> None:
    for arguments in keepsight_lines(block.text):
        parse_arguments(arguments)


def test_keepsights_lines_are_found() -> None:
    found = [arguments[:2] for block in SHELL for arguments in keepsight_lines(block.text)]
    assert len(found) > 25
    for example in (["stream", "describe"], ["inspect", "tiny"], ["run", "csi://0"], ["verify", "BUNDLE"]):
        assert example in found
    text = "sudo A=1 timeout 5 .venv/bin/keepsight build X | tail; docker run --rm \\\n -v keepsight:/data keepsight:jetpack6 run csi://0"
    assert list(keepsight_lines(text)) == [["build", "X"], ["run", "csi://0"]]


@pytest.mark.parametrize(
    "line", ["ask", "run csi://0 --no-such-option", "build X --workspace none", "strem describe X", "run csi://0 --backend gpu"]
)
def test_a_wrong_line_would_be_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        parse_arguments(line.split())


def test_options_and_commands_in_the_text_exist() -> None:
    for span in spans(PROSE):
        words = span.split()
        if words[0] == "keepsight" and len(words) > 1:
            command: Any = get_command(app)
            for word in words[1:]:
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, span
                command = command.commands[word]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in words if word.startswith("--")} <= known, span
        elif words[0].startswith("--"):
            assert words[0].split("=")[0] in all_options() | OTHERS_OPTIONS, span


def test_packages_are_those_of_the_set_up() -> None:
    script = (ROOT / "scripts" / "system-packages").read_text()
    found = re.search(r"usual_packages=\((.*?)\n\)", script, re.DOTALL)
    assert found is not None
    usual = set(re.sub(r"#.*", "", found[1]).split())
    pages = [packages_of(block.text) for block in blocks_of("pc-checked")]
    assert usual in pages, "the list for an installation by hand"
    assert set().union(*pages) == usual | TOOLS
    for block in blocks_of("board"):
        assert packages_of(block.text) <= JETPACK_PACKAGES


def packages_of(text: str) -> set[str]:
    """What a shell text installs with apt-get."""
    found = set()
    for words in map(program_of, commands_in(text)):
        if "apt-get" in words[:1] and "install" in words:
            found |= {word for word in words[words.index("install") + 1 :] if not word.startswith("-")}
    return found


def test_debian_knows_the_packages() -> None:
    wanted = set().union(*(packages_of(block.text) for block in blocks_of("pc-checked")))
    if shutil.which("apt-cache") is None:
        pytest.skip("no apt here")
    done = subprocess.run(["apt-cache", "show", "--no-all-versions", *wanted], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^Package: (\S+)$", done.stdout, re.MULTILINE))
    if "python3-gi" not in known:
        pytest.skip("apt has no package lists here")
    assert wanted - known == set()


def test_what_pip_installs_is_what_the_project_declares() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([\w-]+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE))
    asked = re.findall(r'["`](?:\.|keepsight)\[([\w,-]+)\]["`]', PAGE)
    assert asked and {extra for names in asked for extra in names.split(",")} <= extras
    pins = set(re.findall(r"llama-cpp-python==[\d.]+", PAGE))
    assert len(pins) == 1 and f'"{pins.pop()}"' in project


def test_scripts_targets_and_files_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell_text = "\n".join(block.text for block in SHELL) + "\n".join(spans(PROSE))
    assert {"demo", "setup", "clean"} <= set(re.findall(r"^\s*(?:\S+=\S+ )*make ([\w-]+)", shell_text, re.MULTILINE)) <= targets
    body = PAGE.split("\n## Sources\n")[0]
    for path in re.findall(r"(?<![\w/.~-])((?:scripts|docker|packaging|runtime|docs)/[\w@./-]*\w)", body):
        assert (ROOT / path).exists(), path


def test_settings_for_make_say_what_the_boards_are(tmp_path: Path) -> None:
    settings = [block for block in BLOCKS if block.info == "make"]
    architectures = set()
    for block in settings:
        (tmp_path / "local.mk").write_text(block.text)
        (tmp_path / "Makefile").write_text('include local.mk\nshow:\n\t@printf "%s\\n" "$$CUDACXX" "$$CMAKE_ARGS"\n')
        done = subprocess.run(["make", "-C", str(tmp_path), "-s", "show"], capture_output=True, text=True, check=True)
        compiler, options = done.stdout.splitlines()[-2:]
        assert compiler == "/usr/local/cuda/bin/nvcc" and "-DGGML_CUDA=on" in options
        architectures |= set(re.findall(r"CUDA_ARCHITECTURES=(\d+)-real", options))
    capabilities = {f"{board.compute_capability.value * 10:.0f}" for board in boards()}
    assert architectures == capabilities == set(re.findall(r"CUDA_ARCHITECTURES=(\d+)-real", PAGE))


# -- edits of a board's files, tried on files of their form -------------------------------------------------------------


def line_with(block_text: str, part: str) -> str:
    return next(line for line in block_text.splitlines() if part in line)


EXTLINUX = """TIMEOUT 30
DEFAULT primary

MENU TITLE L4T boot options

LABEL primary
      MENU LABEL primary kernel
      LINUX /boot/Image
      INITRD /boot/initrd
      APPEND ${cbootargs} root=PARTUUID=0-1 rw rootwait nospectre_bhb video=efifb:off console=tty0
# LABEL backup
#    APPEND ${cbootargs}
"""


@pytest.mark.parametrize("before", ["", " cma=512M"])
def test_the_contiguous_pool_is_set_once_and_nothing_else_changes(before: str, tmp_path: Path, shell: Any) -> None:
    line = line_with(section("Contiguous memory on 8 GB boards"), "cma=950M/").replace("sudo ", "")
    file = tmp_path / "extlinux.conf"
    file.write_text(EXTLINUX.replace(" rw", f"{before} rw"))
    for _ in range(2):
        assert shell(line.replace("/boot/extlinux/extlinux.conf", str(file))).returncode == 0
        assert file.read_text() == EXTLINUX.replace("console=tty0\n", "console=tty0 cma=950M\n")


@pytest.mark.parametrize(("modes", "number"), [("15W 25W MAXN_SUPER", "2"), ("MAXN_SUPER 10W 15W 25W 40W", "0")])
def test_a_power_mode_is_found_by_its_name(modes: str, number: str, tmp_path: Path, shell: Any) -> None:
    line = line_with(section("Power modes"), "NAME=MAXN_SUPER")
    file = tmp_path / "nvpmodel.conf"
    models = (f"< POWER_MODEL ID={index} NAME={name} >\nGPU MAX_FREQ -1\n" for index, name in enumerate(modes.split()))
    file.write_text("".join(models))
    done = shell(line.replace("sudo nvpmodel", "echo").replace("/etc/nvpmodel.conf", str(file)))
    assert done.stdout == f"-m {number}\n"


# -- links, marks, quotes ------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """GitHub's name for a heading's anchor."""
    text = unicodedata.normalize("NFC", re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors_of(page: str) -> set[str]:
    _, prose = split_page(page)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r'<a id="([^"]+)">', page))


def test_links_lead_somewhere() -> None:
    for target in [*re.findall(r"\]\(([^)\s]+)\)", PROSE), *re.findall(r"^\[S\d+\]: (\S+)$", PROSE, re.MULTILINE)]:
        if target.startswith("https://"):
            assert re.match(r"^https://[\w.-]+\.[a-z]+(/|$)", target), target
            continue
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).is_file(), target
        if anchor:
            assert anchor in anchors_of((ROOT / path).read_text(encoding="utf-8") if path else PAGE), target


def test_the_contents_list_every_chapter() -> None:
    listed = re.findall(r"^- \[(.*)\]\(#(.*)\)$", section("Contents"), re.MULTILINE)
    headings = [heading for heading in re.findall(r"^## (.*)$", PROSE, re.MULTILINE) if heading != "Contents"]
    assert listed == [(heading, slug(heading)) for heading in headings]


def test_sources_are_numbered_defined_and_used() -> None:
    body, sources = PROSE.split("\n## Sources\n")
    used = {int(number) for number in re.findall(r"\[S(\d+)\]", body)}
    listed = [int(number) for number in re.findall(r'^(\d+)\. <a id="s\1"></a>', sources, re.MULTILINE)]
    defined = [int(number) for number in re.findall(r"^\[S(\d+)\]: #s\1$", sources, re.MULTILINE)]
    assert listed == defined == list(range(1, len(listed) + 1))
    assert used == set(listed)


FIGURE = re.compile(r"\d\s?(W|MHz|GHz|GB|MB|GiB|MiB|kB|TFLOPS|TOPS|tokens/s|frames/s|ms|s|minutes?|%|GB/s|MB/s)\b(?!-)|\d %")
# "8 GB boards" and the like name a kind of board.
KIND_OF_BOARD = re.compile(r"\b(8|16|32|64) GB (boards?|Orin)|\b(with|from|on|within an?) (8|16) GB\b")
MARK = re.compile(r"\[S\d+\]|`\[(here|predicted|untried)\]`|\]\(runtime/boards\.json\)")


def paragraphs(prose: str) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines between blank ones; items of a list by themselves."""
    lines: list[str] = []
    for number, line in enumerate([*prose.splitlines(), ""], 1):
        if lines and (not line.strip() or (line.startswith("- ") and lines[0].startswith("- "))):
            yield number - len(lines), lines
            lines = []
        if line.strip() and not line.startswith(("#", "<!--", "- [")):
            lines.append(KIND_OF_BOARD.sub("", line))


def unmarked(prose: str) -> list[int]:
    """The lines of paragraphs and tables with figures of which nothing says where they come from.

    A table may have its origins in its rows or in the paragraph before or behind it.
    """
    parts = [(line, text, bool(MARK.search("\n".join(text)))) for line, text in paragraphs(prose)]
    found = []
    for index, (line, text, marked) in enumerate(parts):
        if text[0].startswith("|"):
            beside = [parts[at][2] for at in (index - 1, index + 1) if 0 <= at < len(parts)]
            rows = [row for row in text[2:] if FIGURE.search(row) and not MARK.search(row)]
            if rows and not any(beside):
                found.append(line)
        elif FIGURE.search("\n".join(text)) and not marked:
            found.append(line)
    return found


def test_every_figure_says_where_it_comes_from() -> None:
    assert unmarked(PROSE.split("\n## Sources\n")[0]) == []


def test_a_figure_without_origin_would_be_noticed() -> None:
    table = "| a |\n|---|\n| 3 ms |"
    assert unmarked(f"It takes 12 ms.\n\n- 5 GB [S4]\n- 7 W\n\n{table}\n\n`[here]` all.\n\n{table}") == [1, 4]
    assert unmarked(f"Words.\n\n{table}\n\nMore.") == [3]


@cache
def source_text() -> str:
    """All of the source, with what Python joins joined: f-strings over several lines are one text."""
    files = [*(ROOT / "runtime").rglob("*.py"), *(ROOT / "streams").rglob("*.py"), *(ROOT / "scripts").iterdir()]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return re.sub(r'["\']\s*\n\s*f?["\']', "", text)


def quoted_messages(page: str) -> list[str]:
    """What rows whose first cell is Keepsight quote."""
    rows = [cells(row) for row in page.splitlines() if row.startswith("| Keepsight |")]
    return [message for row in rows for message in spans(row[1])]


def is_ours(message: str) -> bool:
    """Whether every part between the dots, each long enough to mean something, is in the source."""
    parts = [part.strip() for part in message.replace("(No module named 'tensorrt')", "(").split("...")]
    return max(map(len, parts)) >= 12 and all(part in source_text() for part in parts)


def test_messages_that_are_called_ours_are_ours() -> None:
    messages = quoted_messages(section("Troubleshooting by error text"))
    assert len(messages) > 20
    assert [message for message in messages if not is_ours(message)] == []


@pytest.mark.parametrize("message", ["the CUDA driver rejected ...", "is not what was built: its size or sha512 differs", "a"])
def test_a_message_that_is_not_ours_would_be_noticed(message: str) -> None:
    assert not is_ours(message)


def test_the_page_does_not_promise_a_language_model_on_the_gpu() -> None:
    """Once a command loads it there, "What works today", "llama.cpp on the GPU" and the troubleshooting must say so."""
    loads_on_the_gpu = "n_gpu_layers" in (ROOT / "runtime" / "language" / "bundle_llm.py").read_text()
    assert ("**no `keepsight` command asks for it yet**" in PAGE) == (not loads_on_the_gpu)


# -- boards --------------------------------------------------------------------------------------------------------------


def table_below(title: str, column: str) -> list[list[str]]:
    """The rows, header first, of the first table of a chapter with a column of that name."""
    for table in re.findall(r"(?:^\|.*\n)+", section(title), re.MULTILINE):
        rows = [cells(row) for row in table.splitlines()]
        if any(column in cell for cell in rows[0]):
            return [rows[0], *rows[2:]]
    raise AssertionError(f"{title} has no table with {column}")


def test_boards_have_the_planners_names() -> None:
    known = {board.name for board in boards()}
    said = {span for span in spans(PROSE) if re.match(r"^(orin|agx|thor|jetson)-", span) and not span.startswith("jetson-io")}
    assert said - {"agx-orin-*"} == known
    for title, column in (("Support matrix", "`agx-thor`"), ("Power modes", "`agx-thor`")):
        assert set(spans(" ".join(table_below(title, column)[0]))) == known


def test_the_table_of_boards_is_that_of_the_planner() -> None:
    header, *rows = table_below("Support matrix", "`agx-thor`")
    by_title = {row[0]: row[1:] for row in rows}
    columns = [[board for board in boards() if f"`{board.name}`" in cell] for cell in header[1:]]
    for said, members in zip(by_title["bandwidth at most"], columns, strict=True):
        assert float(said.split()[0]) == max(board.bandwidth_gb_s.value for board in members)
    for said, members in zip(by_title["of that Linux sees"], columns, strict=True):
        for figure in re.findall(r"\d+\.\d+", said):
            digits = len(figure.split(".")[1])
            assert float(figure) in {round(board.total_bytes.value / 1e9, digits) for board in members}
    for said, members in zip(by_title["dense float16, tensor cores"], columns, strict=True):
        assert float(said.split()[0]) in {board.dense_fp16_tflops.value for board in members if board.dense_fp16_tflops}
    for said, members in zip(by_title["GPU, compute capability"], columns, strict=True):
        assert {float(said.split()[-1])} == {board.compute_capability.value for board in members}


def test_power_modes_are_those_of_the_planner() -> None:
    modes = json.loads((ROOT / "runtime" / "planning" / "modes.json").read_text())["boards"]
    header, *rows = table_below("Power modes", "`agx-thor`")
    for column, name in enumerate(header[1:], 1):
        wanted = {str(mode["number"]): mode for mode in modes[name.strip("`")]["modes"] if mode["number"] is not None}
        said = {row[0]: row[column] for row in rows if len(row) > column and row[column]}
        assert said.keys() == wanted.keys(), name
        for number, text in said.items():
            mode = wanted[number]
            assert spans(text)[0] == mode["name"], (name, number)
            assert ("default" in text) == mode.get("default", False), (name, number)
            if clock := re.search(r"(\d+)\**\s?\**MHz", text):
                assert float(clock[1]) == mode["gpu_mhz"], (name, number)
            if mode["tpcs"] is not None and ("as on" not in text or "TPCs" in text):
                parts = re.search(r"(\d+) of (\d+) TPCs", text)
                most = max(other["tpcs"] or 0 for other in wanted.values())
                assert mode["tpcs"] == (int(parts[1]) if parts else most), (name, number)
                assert parts is None or int(parts[2]) == most, (name, number)


def test_predictions_are_those_of_the_planner() -> None:
    """They change with its constants: `scripts/jetson-predictions` writes them again."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "jetson-predictions"), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- what the page offers as files -----------------------------------------------------------------------------------------


def verify_unit(text: str, folder: Path) -> str:
    """What systemd-analyze says of a unit, with a program that exists in the place of the installed one."""
    program = folder / "keepsight"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = folder / UNIT.name
    unit.write_text(text.replace("/opt/keepsight/bin/keepsight", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    about_ours = [line for line in done.stderr.splitlines() if "keepsight" in line]
    return "\n".join(about_ours) + (f"status {done.returncode}" if done.returncode and about_ours else "")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    text = UNIT.read_text()
    assert verify_unit(text, tmp_path) == ""
    for wrong in (text.replace("Restart=on-failure", "Restart=sometimes"), text.replace("MemoryMax=", "MemoryMost=")):
        assert verify_unit(wrong, tmp_path) != ""


def test_the_units_command_is_one_that_keepsight_takes() -> None:
    example = (UNIT.parent / "example.env").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE))
    start = re.search(r"^ExecStart=/opt/keepsight/bin/keepsight (.*)$", UNIT.read_text(), re.MULTILINE)
    assert start is not None
    arguments = []
    for word in start[1].split():
        if word.startswith("${"):
            arguments.append(values[word[2:-1]].strip('"'))
        elif word.startswith("$"):
            arguments += values[word[1:]].split()
        else:
            arguments.append(word)
    assert len(arguments) > 5
    parse_arguments(arguments)


def test_the_unit_keeps_what_cameras_need() -> None:
    lines = UNIT.read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if re.match(r"^\w+=", line))
    assert "nvargus-daemon.service" in settings["After"] and settings["Restart"] == "on-failure" and settings["MemoryMax"]
    assert settings["SupplementaryGroups"].split() == ["video", "render"]
    assert not {"PrivateTmp", "PrivateDevices", "DynamicUser", "MemoryDenyWriteExecute"} & settings.keys()


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and their arguments, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", "\n\x00")
    joined = [line for line in re.sub(r"\n\x00", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined)]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_copies_what_is_there_and_what_its_build_needs(dockerfile: Path, tmp_path: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in instructions(dockerfile):
        if word == "COPY":
            *origins, target = rest.split()
            for origin in origins:
                assert (ROOT / origin).exists() and origin in let_through, origin
                place = tmp_path / (target if len(origins) == 1 else f"{target}/{Path(origin).name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (ROOT / origin).is_dir() else shutil.copy
                copy(ROOT / origin, place)
    done = subprocess.run(["bash", "scripts/llama-wheel", "--key"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("0.3.36-"), done.stderr
    there = {path.name for path in tmp_path.iterdir()}
    assert {"pyproject.toml", "README.md", "LICENSE", "export", "runtime", "streams"} <= there


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_made_as_the_page_says(dockerfile: Path) -> None:
    parts = instructions(dockerfile)
    runs = [rest for word, rest in parts if word == "RUN"]
    for run in runs:
        done = subprocess.run(["bash", "-n"], input=run, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    installed = set().union(*(packages_of(run) for run in runs))
    usual = next(names for block in blocks_of("pc-checked") if "python3-gi" in (names := packages_of(block.text)))
    assert usual <= installed and installed - usual <= TOOLS | JETPACK_PACKAGES
    options = next(run for run in runs if "scripts/llama-wheel" in run)
    for option in ("-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURE}", "-DGGML_CUDA_NO_VMM=ON"):
        assert option in options
    assert ("ARG", "CUDA_ARCHITECTURE=87-real") in parts and ("USER", "10001") in parts
    assert "Not yet built or run" in dockerfile.read_text() and f"docker/{dockerfile.name}" in PAGE
    assert not any(word == "FROM" and rest.endswith(":latest") for word, rest in parts)


def test_what_has_not_run_is_said_first_and_last() -> None:
    assert "**Nothing on this page has run on a board.**" in PAGE.split("\n## ")[0]
    last = section("What has not run on a board")
    for part in ("llama.cpp's CUDA build", "--backend tensorrt", "FP8", "CSI cameras", "Dockerfiles", "systemd unit", "sh board"):
        assert part in last
