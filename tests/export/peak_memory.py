"""How far a piece of work raises a process's memory, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

_MEASURED = """
import torch, gguf, sentencepiece, safetensors
import re, sys
from pathlib import Path

def peak():  # ru_maxrss would not do: a new process starts with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

{prepare}
before = peak()
{work}
print((peak() - before) // 1024)
"""


def peak_mb(prepare: str, work: str, *arguments: object) -> int:
    """Megabytes by which `work` raises the peak, after `prepare`; Python that finds `arguments` in `sys.argv[1:]`."""
    code = _MEASURED.format(prepare=prepare, work=work)
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    return int(run.stdout)
