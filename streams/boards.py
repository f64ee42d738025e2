"""What decodes and scales pictures: on any machine, and on a Jetson with its own elements.

A Jetson's decoders and cameras leave pictures in device memory (NVMM). They stay there until one `nvvidconv` copies them into
the host's, once. No board has run these pipelines yet: they are tested as text, and built from stand-in elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from keepsight.streams.errors import UsageError
from keepsight.streams.gst import has_element
from keepsight.streams.uri import Flip
from keepsight.streams.view import View

__all__ = ["BOARDS", "AnyMachine", "Board", "Codec", "Decoding", "Jetson", "Memory", "Piece", "Stage", "this_board"]

Stage = Literal["origin", "parse", "decode", "to-host", "tail"]
Codec = Literal["h264", "h265", "mjpeg"]

Memory = Literal["host", "device", "either"]
"""Where decoded pictures lie; `either` if that shows only when the stream is there."""

DECODER = "decoder"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a pipeline.

    Attributes:
        stage: `origin` brings the stream in; `parse` cuts it into coded pictures; `decode` makes raw video of them; `to-host`
            brings that from a device's memory into the host's; `tail` scales, converts and hands out.
        launch: its elements in gst-launch's language.
        elements: what must be installed.
    """

    stage: Stage
    launch: str
    elements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """A piece that decodes, and where it leaves the pictures."""

    piece: Piece
    memory: Memory


class Board(Protocol):
    """What a kind of machine decodes and scales with."""

    name: str

    def decoding(self, codec: Codec | None) -> Decoding:
        """What decodes a parsed stream of a codec, or, for None, anything at all."""
        ...

    def to_host(self, memory: Memory, view: View, flip: Flip) -> Piece | None:
        """What brings pictures into the host's memory, turned and, if the view lets it, scaled; None where they are there.

        Raises:
            UsageError: the view asks for the scaler of the video hardware, and there is none, or none of that kind.
        """
        ...

    def encoder(self, memory: Memory) -> tuple[str, tuple[str, ...]]:
        """What makes H.264 of pictures for a recorder: gst-launch's language, and its elements."""
        ...


class AnyMachine:
    """GStreamer's own elements: decoders of FFmpeg, OpenH264 or whatever else is installed, by rank."""

    name = "this"

    def decoding(self, codec: Codec | None) -> Decoding:
        if codec == "mjpeg":
            return Decoding(Piece("decode", f"jpegdec name={DECODER}", ("jpegdec",)), "host")
        return Decoding(Piece("decode", f"decodebin name={DECODER}", ("decodebin",)), "host")

    def to_host(self, memory: Memory, view: View, flip: Flip) -> Piece | None:
        if view.hardware_scaling:
            raise UsageError(
                "hardware_scaling=True needs a Jetson's nvvidconv, which is not here.", fix="Leave it out: GStreamer scales."
            )
        return None

    def encoder(self, memory: Memory) -> tuple[str, tuple[str, ...]]:
        raw = "videoconvert ! video/x-raw,format=I420"
        if has_element("x264enc") or not has_element("openh264enc"):
            coder = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=30"
            return f"{raw} ! {coder} ! h264parse", ("videoconvert", "x264enc", "h264parse")
        return f"{raw} ! openh264enc gop-size=30 complexity=low ! h264parse", ("videoconvert", "openh264enc", "h264parse")


class Jetson:
    """NVIDIA's elements of JetPack 5 and later."""

    name = "jetson"

    def decoding(self, codec: Codec | None) -> Decoding:
        if codec == "mjpeg":
            return Decoding(Piece("decode", f"nvjpegdec name={DECODER} ! video/x-raw", ("nvjpegdec",)), "host")
        if codec is not None:
            return Decoding(Piece("decode", f"nvv4l2decoder name={DECODER}", ("nvv4l2decoder",)), "device")
        # decodebin takes nvv4l2decoder by its rank for what that can decode, and a software decoder for the rest.
        return Decoding(Piece("decode", f"decodebin name={DECODER}", ("decodebin",)), "either")

    def to_host(self, memory: Memory, view: View, flip: Flip) -> Piece | None:
        if memory == "host":
            if view.hardware_scaling:
                raise UsageError(
                    "hardware_scaling=True is for pictures in device memory, and these are decoded into the host's.",
                    fix="Leave it out for this source.",
                )
            return None
        method = "" if flip == "none" else f" flip-method={_FLIP_METHODS[flip]}"
        caps = "video/x-raw,format=I420" if memory == "device" else "video/x-raw"
        if view.hardware_scaling and view.size is not None:
            width, height = view.size
            method += f" interpolation-method={_interpolation(view)}"
            caps += f",width={width},height={height}"
        # nvvidconv takes pictures of both memories, but one of its ends must be the device's: so what may lie in either goes in
        # once, and out once. A software decoder's formats that it does not know, such as a PNG's RGB, are converted before;
        # pictures in device memory pass that videoconvert as they are.
        into = "videoconvert ! nvvidconv ! video/x-raw(memory:NVMM) ! " if memory == "either" else ""
        elements = ("videoconvert", "nvvidconv") if into else ("nvvidconv",)
        return Piece("to-host", f"{into}nvvidconv{method} ! {caps}", elements)

    def encoder(self, memory: Memory) -> tuple[str, tuple[str, ...]]:
        # An Orin Nano has no hardware encoder: there nvv4l2h264enc fails when it starts, and says so.
        into = "" if memory == "device" else "videoconvert ! nvvidconv ! video/x-raw(memory:NVMM) ! "
        coder = "nvv4l2h264enc insert-sps-pps=true iframeinterval=30 bitrate=4000000 ! h264parse"
        return into + coder, (*(() if memory == "device" else ("videoconvert", "nvvidconv")), "nvv4l2h264enc", "h264parse")


BOARDS: Mapping[str, Board] = {"this": AnyMachine(), "jetson": Jetson()}


def this_board() -> Board:
    """The board that this is: a Jetson has nvvidconv."""
    return BOARDS["jetson" if has_element("nvvidconv") else "this"]


# nvvidconv's numbers, the same as those of jetson-utils' names.
_FLIP_METHODS: Mapping[Flip, int] = {
    "none": 0,
    "counterclockwise": 1,
    "rotate-180": 2,
    "clockwise": 3,
    "horizontal": 4,
    "upper-right-diagonal": 5,
    "vertical": 6,
    "upper-left-diagonal": 7,
}

_INTERPOLATIONS = {"nearest": 0, "bilinear": 1}


def _interpolation(view: View) -> int:
    if view.aspect != "stretch" or view.scaler not in _INTERPOLATIONS:
        raise UsageError(
            f"the video hardware can't scale as aspect={view.aspect!r}, scaler={view.scaler!r} say.",
            fix=f"Use aspect='stretch' and scaler={' or '.join(map(repr, _INTERPOLATIONS))}, or no hardware_scaling.",
        )
    return _INTERPOLATIONS[view.scaler]
