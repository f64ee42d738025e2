"""Cameras and what they can send. There is none on a test machine: the folders are made up, and so is what a driver answers."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import keepsight.streams.cli as cli
import keepsight.streams.listing as listing
from keepsight.streams import v4l2
from keepsight.streams.v4l2 import CameraFormat, found_cameras

CAPTURE, META, PER_NODE = 0x1, 0x00800000, 0x80000000

# node: driver, card, capabilities of the device and of the node, formats: {letters: [(size or range, [intervals])]}
CAMERAS = {
    "video0": ("uvcvideo", "HD Webcam", PER_NODE | CAPTURE | META, CAPTURE, {
        "YUYV": [((640, 480), [(1, 30), (1, 15)])],
        "MJPG": [((1920, 1080), [(1, 30), (1001, 30000)]), ((640, 480), [])],
    }),
    "video1": ("uvcvideo", "HD Webcam", PER_NODE | CAPTURE | META, META, {}),
    "video2": ("tegra-video", "vi-output, imx219", PER_NODE | CAPTURE, CAPTURE, {"RG10": [((3280, 2464), [(1, 21)])]}),
    "video3": ("old", "Grabber", CAPTURE, 0, {"UYVY": [(((48, 32), (720, 576)), ((1, 60), (1, 1)))]}),
    "video10": ("tegra-video", "vi-output, imx477", PER_NODE | CAPTURE, CAPTURE, {"RG10": [((4032, 3040), [(1, 30)])]}),
}  # fmt: skip


class Drivers:
    """Answers as videodev2.h says that drivers do, by the name of the node that the descriptor is open on."""

    def __call__(self, descriptor: int, request: int, buffer: bytearray) -> int:
        driver, card, all_caps, node_caps, formats = CAMERAS[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name]
        index, second, width, height = struct.unpack_from("4I", buffer)
        if request == 0x80685600:  # VIDIOC_QUERYCAP
            struct.pack_into("16s32s32sIII", buffer, 0, driver.encode(), card.encode(), b"usb-1", 0, all_caps, node_caps)
        elif request == 0xC0405602:  # VIDIOC_ENUM_FMT
            assert second == 1
            struct.pack_into("4s", buffer, 44, entry(list(formats), index).encode())
        elif request == 0xC02C564A:  # VIDIOC_ENUM_FRAMESIZES
            size, _ = entry(formats[struct.pack("I", second).decode()], index)
            if isinstance(size[0], int):
                struct.pack_into("3I", buffer, 8, 1, *size)
            else:
                (low_w, low_h), (high_w, high_h) = size
                struct.pack_into("7I", buffer, 8, 3, low_w, high_w, 2, low_h, high_h, 2)
        elif request == 0xC034564B:  # VIDIOC_ENUM_FRAMEINTERVALS
            rows = formats[struct.pack("I", second).decode()]
            intervals = next(
                rates for size, rates in rows if (width, height) == (size if isinstance(size[0], int) else size[1])
            )
            if isinstance(intervals, tuple):
                struct.pack_into("7I", buffer, 16, 3, *intervals[0], *intervals[1], 0, 1)
            else:
                struct.pack_into("3I", buffer, 16, 1, *entry(intervals, index))
        else:
            raise OSError(errno.ENOTTY, "what is that")
        return 0


def entry(rows: list, index: int):  # type: ignore[no-untyped-def,type-arg]
    if index >= len(rows):
        raise OSError(errno.EINVAL, "no more")
    return rows[index]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for node, (_, card, *_rest) in CAMERAS.items():
        (tmp_path / "class" / node).mkdir(parents=True)
        (tmp_path / "class" / node / "name").write_text(f"{card}\n")
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / node).touch()
    return tmp_path / "class", tmp_path / "dev"


def test_cameras_are_found_with_what_they_can_send(folders: tuple[Path, Path]) -> None:
    webcam, first, grabber, second = found_cameras(*folders, Drivers())
    assert (webcam.uri, webcam.name, webcam.driver) == (f"v4l2://{folders[1]}/video0", "HD Webcam", "uvcvideo")
    assert webcam.formats == (
        CameraFormat("YUYV", (640, 480), None, (30.0, 15.0)),
        CameraFormat("MJPG", (1920, 1080), None, (30.0, 29.97)),
        CameraFormat("MJPG", (640, 480), None, ()),
    )
    assert grabber.formats == (CameraFormat("UYVY", (720, 576), (48, 32), (60.0, 1.0)),)
    # A Jetson's CSI cameras are named by their sensors, not by their nodes.
    assert [(camera.uri, camera.name) for camera in (first, second)] == [
        ("csi://0", "vi-output, imx219"),
        ("csi://1", "vi-output, imx477"),
    ]


def test_a_camera_that_does_not_answer_is_listed_with_the_reason(folders: tuple[Path, Path]) -> None:
    def hangs(descriptor: int, request: int, buffer: bytearray) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert {camera.problem for camera in found_cameras(*folders, hangs)} == {"input/output error"}
    (folders[1] / "video0").unlink()
    gone = found_cameras(*folders, Drivers())[0]
    assert gone.problem == "no such file or directory" and gone.formats == ()


def test_a_driver_whose_list_never_ends_does_not_keep_us(folders: tuple[Path, Path]) -> None:
    def endless(descriptor: int, request: int, buffer: bytearray) -> int:
        if request == v4l2.ENUM_FRAMEINTERVALS:
            struct.pack_into("3I", buffer, 16, 1, 1, 30)
            return 0
        return Drivers()(descriptor, request, buffer)

    assert found_cameras(*folders, endless)[0].formats[0].fps == (30.0,)


def test_the_list_for_people_and_for_programs(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    cli.commands(app)
    monkeypatch.setattr(listing, "found_cameras", lambda: found_cameras(*folders, Drivers()))
    text = CliRunner().invoke(app, ["stream", "list"]).stdout
    assert "MJPG  1920x1080 at 30, 29.97 fps" in text and "UYVY  48x32 to 720x576 at 60, 1 fps" in text
    assert "csi://1  vi-output, imx477 (tegra-video, usb-1)" in text
    report = json.loads(CliRunner().invoke(app, ["stream", "list", "--json"]).stdout)
    assert report[0]["formats"][1]["size"] == [1920, 1080]
    monkeypatch.setattr(listing, "found_cameras", list)
    assert "No camera" in CliRunner().invoke(app, ["stream", "list"]).stdout
