"""An RTSP camera on 127.0.0.1 for the tests: `python rtsp_server.py PORT [locked]` prints its port when it is ready.

PORT 0 takes a free one. /ball is endless, /short ends after 20 frames; /fps1 and /half give 1 and 0.5 frames/s; /switch changes
its size from 160x120 to 320x240 and back every second; /hd is 720p30; /talk has sound, a tick each second. A locked server asks
for ann's password. SIGUSR1 makes it hang up on all its clients.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from keepsight.streams.gst import load_gst

USER, PASSWORD = "ann", "p@ss/w#rd"
_ROLE = "viewer"


def _factory(server: Any, frames: int = -1, *, fps: str = "30/1", size: tuple[int, int] = (160, 120), sound: str = "") -> Any:
    encoder = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10"
    if load_gst().ElementFactory.find("x264enc") is None:
        encoder = "openh264enc gop-size=10"
    made = server.RTSPMediaFactory.new()
    made.set_shared(True)
    made.set_launch(
        f"( videotestsrc is-live=true pattern=ball num-buffers={frames} "
        f"! capsfilter name=size caps=video/x-raw,format=I420,width={size[0]},height={size[1]},framerate={fps} "
        f"! {encoder} ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1 {sound} )"
    )
    return made


_TICKS = "audiotestsrc is-live=true wave=ticks ! audio/x-raw,rate=8000,channels=1 ! alawenc ! rtppcmapay name=pay1 pt=8"


def _switching(factory: Any, glib: Any) -> Any:
    gst = load_gst()

    def on_media(_: Any, media: Any) -> None:
        size = media.get_element().get_by_name("size")
        sizes = ["width=320,height=240", "width=160,height=120"]

        def switch() -> bool:
            sizes.reverse()
            size.set_property("caps", gst.Caps.from_string(f"video/x-raw,format=I420,{sizes[1]},framerate=30/1"))
            return True

        timer = glib.timeout_add(1000, switch)
        media.connect("unprepared", lambda _: glib.source_remove(timer))

    factory.connect("media-configure", on_media)
    return factory


def _lock(server: Any, rtsp: Any, factories: list[Any]) -> None:
    auth = rtsp.RTSPAuth.new()
    token = rtsp.RTSPToken.new()
    token.set_string("media.factory.role", _ROLE)
    auth.add_basic(rtsp.RTSPAuth.make_basic(USER, PASSWORD), token)
    server.set_auth(auth)
    for factory in factories:
        permissions = rtsp.RTSPPermissions.new()
        for permission in ("media.factory.access", "media.factory.construct"):
            permissions.add_permission_for_role(_ROLE, permission, True)
        factory.set_permissions(permissions)


def main(port: str, locked: bool) -> None:
    load_gst()
    import gi

    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, GstRtspServer

    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factories = {
        "/ball": _factory(GstRtspServer),
        "/short": _factory(GstRtspServer, 20),
        "/fps1": _factory(GstRtspServer, fps="1/1"),
        "/half": _factory(GstRtspServer, fps="1/2"),
        "/hd": _factory(GstRtspServer, size=(1280, 720)),
        "/talk": _factory(GstRtspServer, sound=_TICKS),
        "/switch": _switching(_factory(GstRtspServer), GLib),
    }
    if locked:
        _lock(server, GstRtspServer, list(factories.values()))
    for path, factory in factories.items():
        server.get_mount_points().add_factory(path, factory)
    server.attach(None)

    def hang_up() -> bool:
        server.client_filter(lambda *_: GstRtspServer.RTSPFilterResult.REMOVE)
        return True

    GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGUSR1, hang_up)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(sys.argv[1], "locked" in sys.argv[2:])
