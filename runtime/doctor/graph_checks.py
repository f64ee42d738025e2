"""ONNX Runtime: the providers that work, not those that it lists."""

from __future__ import annotations

from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine

__all__ = ["onnxruntime"]

_CPU = "CPUExecutionProvider"
_REMOTE = frozenset({"AzureExecutionProvider"})  # runs models of a service, and nothing here
_PLAIN = "pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime"


def onnxruntime(machine: Machine) -> Iterator[Finding]:
    """Run a small graph on every provider that is listed."""
    outcome = machine.probe("onnxruntime")
    if outcome.failure is not None:
        yield Finding(
            "onnxruntime",
            "graphs",
            "error",
            "ONNX Runtime can't be loaded",
            f"{outcome.failure}.",
            _PLAIN,
        )
        return
    if {"onnxruntime", "onnxruntime-gpu"} <= machine.versions.keys():
        yield Finding(
            "onnxruntime-twice",
            "graphs",
            "warning",
            "onnxruntime and onnxruntime-gpu are both installed",
            "They have the same files: what runs is a mixture of two versions. Keep one.",
            _PLAIN,
        )
    version = outcome.values["version"]
    for provider in outcome.values["providers"]:
        if provider not in _REMOTE:
            yield _provider(machine, provider, version)


def _provider(machine: Machine, provider: str, version: str) -> Finding:
    name = provider.removesuffix("ExecutionProvider")
    failure = machine.probe("provider", provider).failure
    if failure is None:
        return Finding("ort-provider", "graphs", "ok", f"ONNX Runtime {version} computes on {name}")
    if provider == _CPU:
        return Finding("ort-provider", "graphs", "error", f"ONNX Runtime {version} can't compute", f"{failure}.", _PLAIN)
    if machine.is_jetson and "onnxruntime-gpu" in machine.versions:
        return Finding(
            "ort-provider",
            "graphs",
            "warning",
            f"ONNX Runtime {version} lists {name}, which does not work here",
            f"PyPI's onnxruntime-gpu has no code for a Jetson's GPU. Use TensorRT (`keepsight build`) and the plain one. "
            f"{failure}.",
            _PLAIN,
        )
    return Finding(
        "ort-provider",
        "graphs",
        "note",
        f"ONNX Runtime {version} lists {name}, which does not work here",
        f"A list says what was compiled in. Nothing is lost as long as you don't ask for it. {failure}.",
    )
