"""`keepsight sources`: which cameras this machine has, which kinds of source it can read; and the group `keepsight stream`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.streams.clip_command import add_clip
from keepsight.streams.describe import add_describe
from keepsight.streams.errors import MissingComponentError
from keepsight.streams.gst import debian_package, has_element, load_gst
from keepsight.streams.listing import add_list
from keepsight.streams.probe import add_probe

__all__ = ["Camera", "cameras", "commands"]

# One row for a user: what it is good for, and any one of these elements does it.
_ABILITIES = (
    ("video files and pictures", ("decodebin",)),
    ("H.264", ("avdec_h264", "openh264dec", "nvv4l2decoder")),
    ("H.265", ("avdec_h265", "nvv4l2decoder")),
    ("USB cameras (v4l2)", ("v4l2src",)),
    ("network cameras (rtsp)", ("rtspsrc",)),
    ("RTP senders (rtp)", ("udpsrc",)),
    ("files and cameras over HTTP", ("souphttpsrc",)),
    ("HLS", ("hlsdemux",)),
    ("CSI cameras (Jetson only)", ("nvarguscamerasrc",)),
    ("test patterns", ("videotestsrc",)),
    ("writing video", ("x264enc", "openh264enc")),
)


@dataclass(frozen=True, slots=True)
class Camera:
    """A V4L2 capture device: its address as `Source` takes it, and the driver's name for it."""

    uri: str
    name: str


def cameras(devices: Path = Path("/sys/class/video4linux")) -> list[Camera]:
    """The V4L2 cameras of this machine, in the order of their numbers.

    A camera has several device nodes; those beyond the first (index 0) carry metadata, not pictures.
    """
    nodes = sorted(devices.glob("video*"), key=lambda node: int("0" + node.name.removeprefix("video")))
    return [
        Camera(f"v4l2:///dev/{node.name}", _read(node / "name") or node.name)
        for node in nodes
        if _read(node / "index") in ("", "0")
    ]


def commands(app: typer.Typer) -> None:
    """Add this part's commands to the application."""
    group = typer.Typer(help="Look at sources: their pipelines, their pictures, this machine's cameras.", no_args_is_help=True)
    for add in (add_describe, add_probe, add_list, add_clip):
        add(group)
    app.add_typer(group, name="stream")

    @app.command("sources")
    def sources(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    ) -> None:
        """List the cameras of this machine and the kinds of source it can read."""
        report = _report()
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            _show(report)


def _report() -> dict[str, Any]:
    found: dict[str, Any] = {"cameras": [asdict(camera) for camera in cameras()], "gstreamer": None, "abilities": []}
    try:
        found["gstreamer"] = load_gst().version_string()
    except MissingComponentError as error:
        found["problem"] = str(error)
        return found
    found["abilities"] = [_ability(what, elements) for what, elements in _ABILITIES]
    return found


def _ability(what: str, elements: tuple[str, ...]) -> dict[str, Any]:
    here = [element for element in elements if has_element(element)]
    packages = sorted({package for element in elements if (package := debian_package(element)) is not None})
    return {"what": what, "elements": here, "package": None if here else " or ".join(packages)}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for camera in report["cameras"]:
        console.print(f"{camera['uri']}  {camera['name']}", markup=False, highlight=False)
    if not report["cameras"]:
        console.print("No V4L2 camera (no /dev/video* that captures).")
    if report["gstreamer"] is None:
        console.print(report["problem"], markup=False)
        return
    table = Table("can read or write", "with", "missing: install", title=report["gstreamer"])
    for row in report["abilities"]:
        table.add_row(row["what"], ", ".join(row["elements"]) or "-", row["package"] or "")
    console.print(table)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
