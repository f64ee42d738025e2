"""`keepsight doctor` as a user meets it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from keepsight.runtime.cli import app
from keepsight.runtime.doctor import machine as machines
from keepsight.runtime.doctor.cli import print_findings
from keepsight.runtime.doctor.examine import examine
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.probes import Outcome
from keepsight.streams.errors import UnhealthyError

from .healthy import agx_orin, change, nano, pc

CPU_ONLY = {("llama",): Outcome({"version": "0.3.36", "offload": False, "about": "CPU : NEON = 1 |"})}


def run(monkeypatch: pytest.MonkeyPatch, machine: Machine, *arguments: str) -> Any:
    monkeypatch.setattr(machines, "this_machine", lambda root: machine)
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_machine_without_errors_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, pc(tmp_path))
    assert result.exit_code == 0
    assert "0 errors, 0 warnings, 0 notes" in result.stdout


def test_an_error_is_the_exit_code_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, change(agx_orin(tmp_path), answers=CPU_ONLY))
    assert isinstance(result.exception, UnhealthyError) and result.exception.exit_code == 17
    assert str(result.exception) == "1 error: llama-gpu."


def test_json_has_every_finding_and_nothing_else_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = change(agx_orin(tmp_path), answers=CPU_ONLY)
    result = run(monkeypatch, machine, "--json")
    found = json.loads(result.stdout)["findings"]
    assert [one["id"] for one in found] == [finding.id for finding in examine(machine)]
    (error,) = [one for one in found if one["severity"] == "error"]
    assert error.keys() == {"id", "area", "severity", "found", "why", "command"} and "87-real" in error["command"]
    assert isinstance(result.exception, UnhealthyError)


def test_it_fits_80_columns_and_commands_stay_in_one_line(tmp_path: Path) -> None:
    machine = change(nano(tmp_path), answers=CPU_ONLY, clock_synchronised=False)
    out = io.StringIO()
    found = print_findings(examine(machine), Console(file=out, width=80, highlight=False))
    commands = {finding.command for finding in found if finding.command}
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines if line.strip() not in commands) <= 80
    assert commands <= {line.strip() for line in lines}, "each can be copied whole"


def test_another_root_is_looked_at(tmp_path: Path) -> None:
    machine = nano(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--root", str(tmp_path), "--json"])
    found = {one["id"]: one for one in json.loads(result.stdout)["findings"]}
    assert machine.identity.title is not None and machine.identity.title in found["board"]["found"]
    assert found["power-mode"]["found"] == "power mode MAXN_SUPER (number 2 on this board)"


def test_help_does_not_show_the_root() -> None:
    assert "--root" not in CliRunner().invoke(app, ["doctor", "--help"]).stdout
