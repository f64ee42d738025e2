"""`keepsight doctor`: what is wrong with this machine, and the command that mends it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepsight.runtime.options import JsonOption
from keepsight.streams.errors import UnhealthyError

if TYPE_CHECKING:
    from rich.console import Console

    from keepsight.runtime.doctor.finding import Finding

__all__ = ["commands", "print_findings"]

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_INDENT = 9  # of what stands beside the longest severity


def commands(app: typer.Typer) -> None:
    """Add this part's command to the application."""

    @app.command("doctor")
    def doctor(
        bundle: Annotated[str | None, typer.Argument(help="A bundle to look at, too: a directory, or `tiny`.")] = None,
        as_json: JsonOption = False,
        root: Annotated[Path, typer.Option(hidden=True)] = Path("/"),
    ) -> None:
        """What is wrong with this machine, and the command that mends it. Nothing is changed."""
        from rich.console import Console

        from keepsight.runtime.doctor.examine import examine
        from keepsight.runtime.doctor.machine import this_machine

        findings = examine(this_machine(root), bundle)
        if as_json:
            found = list(findings)
            typer.echo(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=2, ensure_ascii=False))
        else:
            found = print_findings(findings, Console(highlight=False))
        errors = [finding for finding in found if finding.severity == "error"]
        if errors:
            raise UnhealthyError(f"{_count(len(errors), 'error')}: {', '.join(dict.fromkeys(error.id for error in errors))}.")


def print_findings(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Print findings as they come, grouped by area, and then how many there are of each severity; gives them back."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    found, area = [], None
    for finding in findings:
        found.append(finding)
        if finding.area != area:
            console.print(Text(("" if area is None else "\n") + finding.area[0].upper() + finding.area[1:], style="bold"))
            area = finding.area
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_INDENT - 2)
        row.add_column()
        row.add_row(Text(finding.severity, style=_COLOURS[finding.severity]), Text(finding.found))
        console.print(row)
        if finding.why:
            console.print(Padding(Text(finding.why, style="dim"), (0, 0, 0, _INDENT)))
        if finding.command is not None:
            # In one line, however long: it is there to be copied.
            console.print(Text(" " * _INDENT + finding.command, style="cyan"), soft_wrap=True)
    counted = Counter(finding.severity for finding in found)
    console.print(Text("\n" + ", ".join(_count(counted[name], name) for name in ("error", "warning", "note", "ok"))))
    return found


def _count(number: int, severity: str) -> str:
    return f"{number} {severity}{'s' if number != 1 and severity != 'ok' else ''}"
