"""Which JetPack brings what, and since when Keepsight can use it. The table of Jetson.md, as code needs it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Support", "apt_upgrade", "support_of"]


@dataclass(frozen=True)
class Support:
    """A line of Jetson Linux.

    Attributes:
        jetpack: its name.
        cuda: first numbers of its version.
        tensorrt: those of its own, and then of others that NVIDIA lets on it.
        usable: whether Keepsight's runtime, the GPU included, can work there.
        problem: if not, why.
        command: what brings a machine on this line to one that is usable.
    """

    jetpack: str
    cuda: str
    tensorrt: tuple[str, ...]
    usable: bool = True
    problem: str = ""
    command: str | None = None


_SOURCES = "/etc/apt/sources.list.d/nvidia-l4t-apt-source.list"


def apt_upgrade(old: str, new: str) -> str:
    """From one release of a line of Jetson Linux to a newer one."""
    return f"sudo sed -i 's/{old}/{new}/' {_SOURCES} && sudo apt update && sudo apt dist-upgrade"


# By the beginning of the release; the first that fits. Versions: NVIDIA's documentation and users' reports, the same as in
# Jetson.md.
_LINES: tuple[tuple[str, Support], ...] = (
    ("36.4", Support("6.1 or 6.2", "12.6", ("10.3", "10.7"))),
    ("36.5", Support("6.2.2", "12.6", ("10.3", "10.7"))),
    (
        "36.",
        Support(
            "6.0", "12.2", ("8.6",), usable=False,
            problem="its TensorRT 8.6 lacks what Keepsight builds engines with (10.3 is the first that has it)",
            command=apt_upgrade("r36.[23]", "r36.4"),
        ),
    ),
    ("38.", Support("7.0 or 7.1", "13.0", ("10.13",))),
    ("39.", Support("7.2", "13.2", ("10.16", "11.4"))),
    (
        "35.",
        Support(
            "5", "11.4", ("8.5",), usable=False,
            problem="its Python 3.8 and TensorRT 8.5 are older than what Keepsight needs (3.10 and 10.3). No upgrade leads from "
            "JetPack 5 to 6: flash JetPack 6.2 with NVIDIA's SDK Manager",
        ),
    ),
    (
        "32.",
        Support(
            "4", "10.2", ("8.2",), usable=False,
            problem="its Python 3.6 and TensorRT 8.2 are older than what Keepsight needs (3.10 and 10.3), and its boards (Nano, "
            "TX2, Xavier) get no JetPack that has them",
        ),
    ),
)  # fmt: skip


def support_of(l4t: str) -> Support | None:
    """What a release of Jetson Linux brings; None for one that the table does not know."""
    return next((support for start, support in _LINES if l4t.startswith(start)), None)
