"""Builds Jetson pipelines on a machine that has none: `python jetson_stand_ins.py` prints one line for each.

The stand-ins have the names, the properties that we set and the pads (with the memory and the formats) of NVIDIA's elements as
their documentation has them, and do nothing: GStreamer parses the pipeline, sets the properties and links every pair of pads
whose caps can meet. It shows that there are no slips of spelling and that memories fit; not that a picture would come out.
"""

from __future__ import annotations

import sys
from typing import Any

from keepsight.streams.boards import BOARDS
from keepsight.streams.branches import Branch
from keepsight.streams.errors import KeepsightError
from keepsight.streams.gst import launch, load_gst
from keepsight.streams.pipelines import build, recipe_for
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import View

DEVICE = "video/x-raw(memory:NVMM),format={I420,NV12,RGBA,BGRx,GRAY8}"
HOST = "video/x-raw,format={I420,NV12,RGBA,BGRx,GRAY8,UYVY,YUY2}"
CODED = "video/x-h264,stream-format=byte-stream;video/x-h265,stream-format=byte-stream;video/x-vp9;image/jpeg"

SWITCHES = {"insert-sps-pps"}

# name: caps of the sink pad, of the source pad, properties: whole numbers, or else switches
ELEMENTS = {
    "nvarguscamerasrc": (None, "video/x-raw(memory:NVMM),format=NV12", ("sensor-id",)),
    "nvvidconv": (f"{DEVICE};{HOST}", f"{DEVICE};{HOST}", ("flip-method", "interpolation-method")),
    "nvv4l2decoder": (CODED, "video/x-raw(memory:NVMM),format=NV12", ()),
    "nvjpegdec": ("image/jpeg", "video/x-raw(memory:NVMM),format=I420;video/x-raw,format=I420", ()),
    "nvv4l2h264enc": (
        "video/x-raw(memory:NVMM),format={I420,NV12}",
        "video/x-h264,stream-format=byte-stream",
        ("insert-sps-pps", "iframeinterval", "bitrate"),
    ),
}


def register(gst: Any, name: str, sink: str | None, source: str, properties: tuple[str, ...]) -> None:
    from gi.repository import GObject

    templates = [gst.PadTemplate.new("src", gst.PadDirection.SRC, gst.PadPresence.ALWAYS, gst.Caps.from_string(source))]
    if sink is not None:
        caps = gst.Caps.from_string(sink)
        templates.append(gst.PadTemplate.new("sink", gst.PadDirection.SINK, gst.PadPresence.ALWAYS, caps))

    def init(self: Any) -> None:
        gst.Element.__init__(self)
        for template in templates:
            self.add_pad(gst.Pad.new_from_template(template, template.name_template))

    body = {
        "__gtype_name__": f"StandIn{name}",
        "__gstmetadata__": (name, "Generic", "stand-in", "tests"),
        "__gsttemplates__": tuple(templates),
        "__gproperties__": {
            key: (int, key, key, 0, 2**31 - 1, 0, GObject.ParamFlags.READWRITE)
            if key not in SWITCHES
            else (bool, key, key, False, GObject.ParamFlags.READWRITE)
            for key in properties
        },
        "__init__": init,
        "do_set_property": lambda self, spec, value: None,
        "do_get_property": lambda self, spec: 0,
    }  # fmt: skip
    gst.Element.register(None, name, 0, type(f"StandIn{name}", (gst.Element,), body))


SOURCES = (
    "csi://0", "csi://1?width=1920&height=1080&flip=rotate-180", "v4l2:///dev/video0", "v4l2:///dev/video0?encoding=mjpeg&width=1280",
    "v4l2:///dev/video0?encoding=raw&fps=30", "v4l2:///dev/video0?encoding=h264", "rtsp://h/x", "rtsp://h/x?encoding=h264",
    "rtsp://h/x?encoding=h265&transport=udp", "rtsp://h/x?encoding=mjpeg", "rtp://@:5004", "rtp://@:5004?encoding=h265&flip=clockwise",
    "a.mp4", "http://h/a.mp4", "test://ball",
)  # fmt: skip


def main() -> None:
    gst = load_gst()
    for name, (sink, source, properties) in ELEMENTS.items():
        register(gst, name, sink, source, properties)
    try:  # what does not fit is refused: a camera's pictures are not in the host's memory
        launch("nvarguscamerasrc ! video/x-raw,format=I420 ! fakesink")
        sys.exit("the stand-ins link what can't be linked")
    except KeepsightError as error:
        print("refused:", error.message)
    branches = (Branch("coded", "fakesink"), Branch("decoded", "videoconvert ! fakesink"))
    for text in SOURCES:
        uri = SourceURI.parse(text)
        for delivery in ("newest", "every"):
            for beside in ((), branches):
                build(recipe_for(uri, View((224, 224)), delivery, beside, board=BOARDS["jetson"]))
        print("built:", text)


if __name__ == "__main__":
    main()
