"""Native libraries, tried in processes of their own: one that crashes or hangs is a finding, and not the end of the doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Outcome", "Probe", "Prober"]

MARK = "keepsight-probe "
"""Begins the line of a probe's answer: libraries print to stdout, too."""

_LIMIT_S = 30.0
_LONGEST = 300  # characters of a complaint


@dataclass(frozen=True)
class Outcome:
    """What a probe gave.

    Attributes:
        values: by name; empty where it failed.
        failure: why; None where it did not.
    """

    values: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


Probe = Callable[..., Outcome]
"""A probe's name and its arguments, all text, to its outcome."""


class Prober:
    """Runs `keepsight.runtime.doctor.attempts` in processes; each question is asked once.

    Args:
        limit_s: seconds that a probe may take.
    """

    def __init__(self, limit_s: float = _LIMIT_S) -> None:
        self._limit_s = limit_s
        self._known: dict[tuple[str, ...], Outcome] = {}

    def __call__(self, name: str, *arguments: str) -> Outcome:
        """Ask."""
        asked = (name, *arguments)
        if asked not in self._known:
            self._known[asked] = self._run([sys.executable, "-m", "keepsight.runtime.doctor.attempts", *asked])
        return self._known[asked]

    def _run(self, command: list[str]) -> Outcome:
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=self._limit_s, check=False, stdin=subprocess.DEVNULL, env=environment
            )
        except subprocess.TimeoutExpired:
            return Outcome(failure=f"it did not answer within {self._limit_s:g} s")
        except OSError as error:
            return Outcome(failure=f"it can't be started: {error}")
        said = done.stdout.decode("utf-8", "replace").splitlines()
        answers = [line.removeprefix(MARK) for line in said if line.startswith(MARK)]
        if done.returncode == 0 and answers:
            return _outcome(json.loads(answers[-1]))
        return Outcome(failure=_death(done.returncode, done.stderr.decode("utf-8", "replace")))


def _outcome(answer: dict[str, Any]) -> Outcome:
    failure = answer.pop("failure", None)
    return Outcome(answer) if failure is None else Outcome(failure=shortened(failure))


def _death(code: int, complaint: str) -> str:
    how = f"it ended with exit code {code}"
    if code < 0:
        try:
            how = f"it crashed ({signal.Signals(-code).name})"
        except ValueError:
            how = f"it was ended by signal {-code}"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return f"{how}: {shortened(lines[-1])}" if lines else how


def shortened(text: str) -> str:
    """One line, of a length that a terminal bears."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
