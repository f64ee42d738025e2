"""Two builds into one folder do not meet, and a killed one stands in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.build_lock import LOCK, only_builder
from keepsight.runtime.graphs.engine_store import Target, engine_folder
from keepsight.runtime.graphs.tensorrt_build import Progress, build_engines
from keepsight.streams.errors import EngineError

from ..random_bundle import make_bundle
from .fake_tensorrt import fake_tensorrt

ORIN = Target(gpu="Orin", sm=87, library="tensorrt", version="10.3.0")
HOLDER = """
import sys, time
from pathlib import Path
from keepsight.runtime.graphs.build_lock import only_builder
with only_builder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_build_is_refused_while_the_first_goes_on_and_works_after_it(tmp_path: Path) -> None:
    bundle, trt = Bundle.open(make_bundle(tmp_path / "bundle")), fake_tensorrt()
    folder = engine_folder(bundle, ORIN, bundle.manifest.variants[0])
    refused = []

    def meanwhile(step: Progress) -> None:
        with pytest.raises(EngineError, match="another process is building engines into") as caught:
            build_engines(bundle, trt, ORIN)
        refused.append(str(caught.value))

    assert build_engines(bundle, trt, ORIN, progress=meanwhile) == folder
    assert len(refused) == 2 * len(bundle.manifest.graphs) and str(folder) in refused[0]
    states: list[str] = []
    build_engines(bundle, trt, ORIN, progress=lambda step: states.append(step.state))
    assert set(states) == {"unchanged"}


def test_a_killed_build_gives_its_lock_back(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(EngineError), only_builder(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with only_builder(tmp_path):
        assert (tmp_path / LOCK).stat().st_size == 0


def test_an_error_while_building_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_builder(tmp_path):
        raise ZeroDivisionError
    with only_builder(tmp_path):
        pass


def test_a_folder_that_can_not_be_written_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> int:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "open", read_only)
    with only_builder(tmp_path):
        assert list(tmp_path.iterdir()) == []
