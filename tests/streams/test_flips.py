"""flip= in jetson-utils' names, and RTP from a real sender."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.streams import NoFrameError, Source, UsageError

FLIPS: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    # the name, and what it does to an array [H, W, 3]
    ("none", lambda image: image),
    ("rotate-180", lambda image: image[::-1, ::-1]),
    ("clockwise", lambda image: np.rot90(image, -1)),
    ("counterclockwise", lambda image: np.rot90(image)),
    ("horizontal", lambda image: image[:, ::-1]),
    ("vertical", lambda image: image[::-1]),
    ("upper-left-diagonal", lambda image: image.transpose(1, 0, 2)),
    ("upper-right-diagonal", lambda image: image[::-1, ::-1].transpose(1, 0, 2)),
]


@pytest.mark.parametrize(("name", "turn"), FLIPS)
def test_a_picture_is_flipped(tmp_path: Path, save_image: Any, name: str, turn: Callable[[np.ndarray], np.ndarray]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    save_image(tmp_path / "a.png", image)
    frame = next(Source(f"{tmp_path}/a.png?flip={name}"))
    assert np.array_equal(frame.image, turn(image))


def test_frames_of_an_array_are_not_flipped(tmp_path: Path) -> None:
    np.save(tmp_path / "n.npy", np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(UsageError, match=r"flip= is not for frames of a \.npy"):
        Source(f"{tmp_path}/n.npy?flip=vertical")


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(("encoding", "payload"), [("h264", 96), ("h265", 98)])
def test_rtp_is_received(gst: Any, encoding: str, payload: int) -> None:
    coder = {"h264": "x264enc tune=zerolatency key-int-max=10", "h265": "x265enc tune=zerolatency key-int-max=10"}[encoding]
    if gst.ElementFactory.find(coder.split()[0]) is None:
        pytest.skip(f"no {coder.split()[0]} to send with")
    port = free_port()
    sender = gst.parse_launch(
        "videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=160,height=120,framerate=30/1 "
        f"! {coder} ! {encoding}parse ! rtp{encoding}pay pt={payload} config-interval=-1 ! udpsink host=127.0.0.1 port={port}"
    )
    sender.set_state(gst.State.PLAYING)
    try:
        address = f"rtp://127.0.0.1:{port}?encoding={encoding}&payload={payload}"
        with Source(address, size=(64, 48), first_frame_timeout_s=20) as source:
            images = [next(source).image for _ in range(5)]
        assert source.is_live and images[-1].shape == (48, 64, 3) and images[-1].max() > 200
    finally:
        sender.set_state(gst.State.NULL)


def test_nobody_sends() -> None:
    with pytest.raises(NoFrameError, match=r"rtp://@:\d+ gave no frame within 0\.5 s"):
        next(Source(f"rtp://@:{free_port()}", first_frame_timeout_s=0.5))
