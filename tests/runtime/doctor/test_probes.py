"""Probes: what a library says, that a crash and a hang are outcomes, and real libraries tried."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keepsight.runtime.doctor import attempts
from keepsight.runtime.doctor.machine import this_machine
from keepsight.runtime.doctor.probes import MARK, Outcome, Prober


def run(program: str, limit_s: float = 20.0) -> Outcome:
    return Prober(limit_s)._run([sys.executable, "-c", program])


def test_an_answer_is_found_among_what_libraries_print() -> None:
    assert run(f"print('ggml_init: found a GPU'); print({MARK!r} + '{{\"a\": 1}}'); print('bye')") == Outcome({"a": 1})


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it crashed (SIGSEGV)"),
        ("import os; os.write(2, b'terminate called'); os.abort()", "it crashed (SIGABRT): terminate called"),
        ("import sys; sys.exit(3)", "it ended with exit code 3"),
        ("raise SystemExit('no such thing')", "it ended with exit code 1: no such thing"),
        (f"print({MARK!r} + '{{\"failure\": \"a\\\\nb\"}}')", "a b"),
        (f"print({MARK!r} + '{{}}'); import os; os._exit(4)", "it ended with exit code 4"),
        ("pass", "it ended with exit code 0"),
    ],
)  # fmt: skip
def test_every_end_is_an_outcome(program: str, failure: str) -> None:
    outcome = run(program)
    assert outcome == Outcome(failure=failure)


def test_one_that_hangs_is_ended() -> None:
    assert run("import time; time.sleep(60)", limit_s=0.5).failure == "it did not answer within 0.5 s"


def test_a_program_that_is_not_there_is_an_outcome() -> None:
    assert "can't be started" in str(Prober()._run(["/no/such/python"]).failure)


def test_a_question_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prober, asked = Prober(), []
    monkeypatch.setattr(prober, "_run", lambda command: asked.append(command) or Outcome())
    prober("provider", "A"), prober("provider", "A"), prober("provider", "B")
    assert [command[-2:] for command in asked] == [["provider", "A"], ["provider", "B"]]


def test_the_libraries_of_this_machine_answer() -> None:
    prober = Prober()
    llama, ort, gst = prober("llama"), prober("onnxruntime"), prober("gstreamer", "this")
    assert (llama.failure, ort.failure, gst.failure) == (None, None, None)
    assert llama.values["version"] == "0.3.36" and isinstance(llama.values["offload"], bool)
    assert "CPUExecutionProvider" in ort.values["providers"]
    assert gst.values["version"].startswith("GStreamer 1.")
    assert prober("provider", "CPUExecutionProvider") == Outcome()
    assert "CPUExecutionProvider" in str(prober("provider", "CUDAExecutionProvider").failure) or not ort.failure


def test_a_provider_that_falls_back_is_a_failure() -> None:
    with pytest.warns(UserWarning, match="not in available provider names"):
        answer = attempts.provider("NoSuchExecutionProvider")
    assert "CPUExecutionProvider" in answer["failure"]


def test_a_jetson_lacks_its_elements_on_a_pc() -> None:
    missing = attempts.gstreamer("jetson")["missing"]
    if not missing:
        pytest.skip("this is a Jetson")
    assert missing["nvarguscamerasrc"] == {"package": "nvidia-l4t-gstreamer (JetPack only)", "sources": ["csi"]}
    assert "rtsp" in missing["nvvidconv"]["sources"]


def test_an_attempt_that_raises_prints_its_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> attempts.Answer:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setitem(attempts.ATTEMPTS, "tensorrt", fail)
    monkeypatch.setattr(attempts.resource, "setrlimit", lambda *_: None)
    attempts.main("tensorrt")
    assert capsys.readouterr().out == f'\n{MARK}{{"failure": "libnvinfer.so.10: cannot open shared object file"}}\n'


def test_this_machine_is_described(tmp_path: Path) -> None:
    machine = this_machine()
    assert machine.python == sys.version_info[:2] and machine.pinned in (None, "0.3.36")
    assert machine.free(tmp_path / "not" / "yet" / "there") == machine.free(tmp_path)
    assert machine.device(tmp_path) is not None and "python" in " ".join(machine.processes)
    assert this_machine(tmp_path).identity.memory is None
