"""docs/doctor.md lists every finding that the code can make, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from keepsight.runtime.doctor.finding import SEVERITIES

ROOT = Path(__file__).parents[3]


def findings() -> dict[str, set[str]]:
    """Identifiers and severities in the sources: the constants among a `Finding`'s first arguments."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "runtime" / "doctor").glob("*_checks.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                name, severity = node.args[0], node.args[2]
                assert isinstance(name, ast.Constant) and isinstance(name.value, str)
                words = {inner.value for inner in ast.walk(severity) if isinstance(inner, ast.Constant)}
                found.setdefault(name.value, set()).update(words & set(SEVERITIES))
    return found


def test_the_page_lists_every_finding_with_its_worst_severity() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| (\w+) \|", page, re.MULTILINE))
    assert listed == {name: max(said, key=SEVERITIES.index) for name, said in findings().items()}
