"""GStreamer, cameras, and who may use them."""

from __future__ import annotations

from collections.abc import Iterator

from keepsight.runtime.doctor.finding import Finding
from keepsight.runtime.doctor.machine import Machine
from keepsight.runtime.sensors.sysfs import text

__all__ = ["argus", "cameras", "gstreamer", "groups"]

_ESSENTIAL = frozenset({"file", "test"})
_BINDINGS = "sudo apt install python3-gi python3-gst-1.0 gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0"
_ARGUS, _SOCKET = "/usr/sbin/nvargus-daemon", "/tmp/argus_socket"


def gstreamer(machine: Machine) -> Iterator[Finding]:
    """Whether it loads, and has what this board's pipelines are made of."""
    outcome = machine.probe("gstreamer", "jetson" if machine.is_jetson else "this")
    if outcome.failure is not None:
        yield Finding(
            "gstreamer",
            "video",
            "error",
            "GStreamer can't be used",
            f"No video can be read. {outcome.failure}",
            _BINDINGS,
        )
        return
    missing = outcome.values["missing"]
    if not missing:
        yield Finding("gstreamer", "video", "ok", f"{outcome.values['version']} has every element of this machine's pipelines")
        return
    packages = sorted({found["package"].split()[0] for found in missing.values() if found["package"]})
    kinds = sorted({kind for found in missing.values() for kind in found["sources"]})
    yield Finding(
        "gstreamer-elements",
        "video",
        "error" if _ESSENTIAL & set(kinds) else "warning",
        f"{outcome.values['version']} lacks {', '.join(sorted(missing))}",
        f"Without, these sources can't be read: {', '.join(kinds)}.",
        f"sudo apt install {' '.join(packages)}" if packages else None,
    )


def cameras(machine: Machine) -> Iterator[Finding]:
    """The V4L2 cameras, and whether they answer."""
    for camera in machine.cameras:
        if camera.problem is None:
            how = f", {len(camera.formats)} format{'s' * (len(camera.formats) > 1)}" if camera.formats else ""
            yield Finding("camera", "video", "ok", f"{camera.uri}: {camera.name}{how}")
        else:
            what, _, command = camera.problem.partition(": ")
            yield Finding(
                "camera",
                "video",
                "warning",
                f"{camera.uri}: {camera.name} can't be asked",
                f"{what.capitalize()}.",
                command.partition(",")[0] or f"fuser -v {camera.uri.removeprefix('v4l2://')}",
            )
    if not machine.cameras:
        yield Finding("camera", "video", "ok", "no V4L2 camera is plugged in; files and network cameras need none")


def groups(machine: Machine) -> Iterator[Finding]:
    """Whether this user may use cameras and, on a Jetson, the GPU."""
    if machine.is_root or not (machine.is_jetson or machine.cameras):
        return
    known = {line.partition(":")[0] for line in (text(machine.path("/etc/group")) or "").splitlines()}
    wanted = ("video", "render") if machine.is_jetson else ("video",)
    missing = [name for name in wanted if name in known and name not in machine.groups]
    if missing:
        yield Finding(
            "groups",
            "video",
            "warning",
            f"this user is not in the group{'s' if len(missing) > 1 else ''} {' and '.join(missing)}",
            "Cameras, and on a Jetson the GPU, are theirs alone. Then log in again.",
            f"sudo usermod -aG {','.join(missing)} $USER",
        )
    else:
        yield Finding("groups", "video", "ok", f"this user is in the groups {' and '.join(wanted)}")


def argus(machine: Machine) -> Iterator[Finding]:
    """The service behind CSI cameras."""
    if not machine.is_jetson:
        return
    if machine.path(_SOCKET).exists():
        yield Finding("argus", "video", "ok", "the service of CSI cameras (nvargus-daemon) listens")
    elif machine.path("/.dockerenv").exists():
        yield Finding(
            "argus",
            "video",
            "note",
            f"no {_SOCKET} in this container",
            f"CSI cameras (csi://0) are served by the board's daemon. Start the container with -v {_SOCKET}:{_SOCKET}.",
        )
    elif machine.path(_ARGUS).exists():
        yield Finding(
            "argus",
            "video",
            "warning",
            "the service of CSI cameras (nvargus-daemon) does not listen",
            f"There is no {_SOCKET}: csi://0 can't be opened.",
            "sudo systemctl restart nvargus-daemon",
        )
    else:
        yield Finding(
            "argus",
            "video",
            "note",
            "the service of CSI cameras (nvargus-daemon) is not installed",
            "Only csi:// needs it.",
            "sudo apt install nvidia-l4t-camera",
        )
