"""A process killed at any moment loses at most what came since its last save, and answers as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..random_bundle import make_bundle

SCRIPT = Path(__file__).parents[2] / "scripts" / "restart-test"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize(("kv", "kills"), [("--kv", 5), ("--no-kv", 1)])
def test_killed_at_random_it_answers_as_a_run_that_nothing_stopped(bundle: Path, kv: str, kills: int) -> None:
    """A few lives of `scripts/restart-test`, which does 50 with the shipped bundle."""
    command = [sys.executable, str(SCRIPT), "--kills", str(kills), "--bundle", str(bundle), kv, "--json"]
    command += ["--frames", "400", "--life", "0.4", "--save-every", "0.01"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr + result.stdout
    report = json.loads(result.stdout)
    assert report["kills"] == kills and report["restored"] >= kills - report["before_first_save"] + 1
    assert report["max_abs_diff"] == 0 if kv == "--kv" else report["max_abs_diff"] < 1e-3
