"""The V4L2 cameras of a machine, with their formats, sizes and rates: asked of the driver, without GStreamer.

From Linux' `include/uapi/linux/videodev2.h`: VIDIOC_QUERYCAP, _ENUM_FMT, _ENUM_FRAMESIZES and _ENUM_FRAMEINTERVALS.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["CameraFormat", "FoundCamera", "found_cameras"]

Ioctl = Callable[[int, int, bytearray], int]

_CAPTURE, _CAPTURE_MPLANE, _DEVICE_CAPS = 0x1, 0x1000, 0x80000000
_READ, _WRITE = 2, 1

# Sizes in bytes of the structures, and where in them what we read lies. None of them holds a pointer or a long, so they are the
# same on every machine.
_CAPABILITY, _FMTDESC, _FRMSIZEENUM, _FRMIVALENUM = 104, 64, 44, 52
_DISCRETE, _CONTINUOUS = 1, 2

_TEGRA = "tegra-video"  # the driver of a Jetson's CSI cameras

_MOST = 256  # entries of a list: a driver that never ends one must not keep us


def _request(direction: int, number: int, size: int) -> int:
    """The number of an ioctl of V4L2, as `asm-generic/ioctl.h` makes it."""
    return direction << 30 | size << 16 | ord("V") << 8 | number


QUERYCAP = _request(_READ, 0, _CAPABILITY)
ENUM_FMT = _request(_READ | _WRITE, 2, _FMTDESC)
ENUM_FRAMESIZES = _request(_READ | _WRITE, 74, _FRMSIZEENUM)
ENUM_FRAMEINTERVALS = _request(_READ | _WRITE, 75, _FRMIVALENUM)


@dataclass(frozen=True, slots=True)
class CameraFormat:
    """A way that a camera can send pictures.

    Attributes:
        pixel_format: V4L2's four letters, such as `MJPG` or `YUYV`.
        size: (width, height); for a range of sizes, the largest.
        smallest: the smallest of a range of sizes; None for a single size.
        fps: rates, frames per second, the highest first; of a range, its ends. Empty if the driver does not say.
    """

    pixel_format: str
    size: tuple[int, int]
    smallest: tuple[int, int] | None
    fps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FoundCamera:
    """A camera: its address as `Source` takes it, the driver's names for it, what it can send, and why it can't be asked."""

    uri: str
    name: str
    driver: str
    bus: str
    formats: tuple[CameraFormat, ...]
    problem: str | None = None


def found_cameras(
    devices: Path = Path("/sys/class/video4linux"),
    dev: Path = Path("/dev"),
    ioctl: Ioctl | None = None,
) -> list[FoundCamera]:
    """The cameras of this machine, in the order of their numbers. Nodes that carry metadata or take pictures are none.

    Args:
        devices: where the kernel lists them.
        dev: where their nodes are.
        ioctl: `fcntl.ioctl`, or what stands for it: fills the buffer, raises OSError.
    """
    if ioctl is None:
        import fcntl

        ioctl = fcntl.ioctl
    nodes = sorted(devices.glob("video*"), key=lambda node: int("0" + node.name.removeprefix("video")))
    found = (_asked(node, dev / node.name, ioctl) for node in nodes)
    return _csi_by_sensor([camera for camera in found if camera is not None])


def _csi_by_sensor(cameras: list[FoundCamera]) -> list[FoundCamera]:
    """The same, with a Jetson's CSI cameras by their sensor's number: their nodes give raw Bayer pictures, csi:// gives video.

    That Argus numbers sensors in the order of their nodes is usual, and not checked on a board.
    """
    sensors = [camera for camera in cameras if camera.driver == _TEGRA]
    return [
        replace(camera, uri=f"csi://{sensors.index(camera)}") if camera.driver == _TEGRA else camera for camera in cameras
    ]


def _asked(listed: Path, node: Path, ioctl: Ioctl) -> FoundCamera | None:
    uri, name = f"v4l2://{node}", _read(listed / "name") or listed.name
    try:
        descriptor = os.open(node, os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        return FoundCamera(uri, name, "", "", (), _problem(error)) if _read(listed / "index") in ("", "0") else None
    try:
        capability = bytearray(_CAPABILITY)
        ioctl(descriptor, QUERYCAP, capability)
        driver, card, bus, _, of_all, of_node = struct.unpack_from("16s32s32sIII", capability)
        if not (of_node if of_all & _DEVICE_CAPS else of_all) & (_CAPTURE | _CAPTURE_MPLANE):
            return None
        kind = 1 if (of_node if of_all & _DEVICE_CAPS else of_all) & _CAPTURE else 9  # V4L2_BUF_TYPE_VIDEO_CAPTURE(_MPLANE)
        return FoundCamera(uri, _text(card) or name, _text(driver), _text(bus), tuple(_formats(descriptor, kind, ioctl)))
    except OSError as error:
        return FoundCamera(uri, name, "", "", (), _problem(error))
    finally:
        os.close(descriptor)


def _formats(descriptor: int, kind: int, ioctl: Ioctl) -> Iterator[CameraFormat]:
    for entry in _entries(descriptor, ENUM_FMT, _FMTDESC, (kind,), ioctl):
        (code,) = struct.unpack_from("I", entry, 44)
        letters = struct.pack("<I", code & 0x7FFFFFFF).decode("ascii", "replace")
        for size in _entries(descriptor, ENUM_FRAMESIZES, _FRMSIZEENUM, (code,), ioctl):
            (how,) = struct.unpack_from("I", size, 8)
            if how == _DISCRETE:
                width, height = struct.unpack_from("II", size, 12)
                smallest = None
            else:
                least_w, width, _, least_h, height, _ = struct.unpack_from("6I", size, 12)
                smallest = (least_w, least_h)
            yield CameraFormat(letters, (width, height), smallest, _rates(descriptor, code, width, height, ioctl))
            if how != _DISCRETE:  # a range is its only entry
                break


def _rates(descriptor: int, code: int, width: int, height: int, ioctl: Ioctl) -> tuple[float, ...]:
    rates: set[float] = set()
    for entry in _entries(descriptor, ENUM_FRAMEINTERVALS, _FRMIVALENUM, (code, width, height), ioctl):
        (how,) = struct.unpack_from("I", entry, 16)
        intervals = struct.unpack_from("4I", entry, 20)
        pairs = [intervals[:2]] if how == _DISCRETE else [intervals[:2], intervals[2:]]
        rates |= {round(below / above, 3) for above, below in pairs if above}
        if how != _DISCRETE:
            break
    return tuple(sorted(rates, reverse=True))


def _entries(
    descriptor: int, request: int, size: int, asked: tuple[int, ...], ioctl: Ioctl
) -> Iterator[bytearray]:
    """What a driver lists, entry by entry, until it says that there is no more (EINVAL) or that it has no such list (ENOTTY)."""
    for index in range(_MOST):
        entry = bytearray(size)
        struct.pack_into(f"{1 + len(asked)}I", entry, 0, index, *asked)
        try:
            ioctl(descriptor, request, entry)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTTY):
                return
            raise
        yield entry


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _problem(error: OSError) -> str:
    what = (error.strerror or str(error)).lower()
    return f"{what}: sudo usermod -aG video $USER, then log in again" if error.errno == errno.EACCES else what


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
