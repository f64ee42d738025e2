"""Fake roots of boards: text files that are unfolded into a directory.

A line `/path = value` is a file; `/path <<` begins one of several lines, up to a line with a dot alone. `!unreadable` is a file
that answers every read with an error, as a sensor of a switched-off part does with EAGAIN. `#` begins a comment.
"""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
BOARDS = ("orin-nano-super-jp6.2", "agx-orin-jp5.1.2", "agx-orin-jp6.1", "agx-thor-jp7.1", "pc")


def unfold(name: str, root: Path) -> Path:
    """Lay out a board's files under a directory; gives the directory."""
    lines = iter((FIXTURES / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        if line.endswith(" <<"):
            content = []
            for inner in lines:
                if inner == ".":
                    break
                content.append(inner)
            put(root, line.removesuffix(" <<"), "\n".join(content))
        else:
            path, _, value = line.partition(" = ")
            put(root, path, value)
    return root


def put(root: Path, path: str, value: str) -> None:
    """Write one file of a fake root, over the one that is there; `!unreadable` and `!gone` are as they say."""
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        file.rmdir()
    file.unlink(missing_ok=True)
    if value == "!unreadable":
        file.mkdir()  # reading a directory fails in read(), as a sensor does, not in open()
    elif value != "!gone":
        file.write_text(value.replace("\\0", "\0") + "\n", encoding="utf-8")
