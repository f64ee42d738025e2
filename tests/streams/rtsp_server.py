"""An RTSP camera on 127.0.0.1 for the tests: `python rtsp_server.py PORT [locked]` prints its port when it is ready.

PORT 0 takes a free one. /ball is endless, /short ends after 20 frames. A locked server asks for ann's password.
"""

from __future__ import annotations

import sys
from typing import Any

from keepsight.streams.gst import load_gst

USER, PASSWORD = "ann", "p@ss/w#rd"
_ROLE = "viewer"


def _factory(server: Any, frames: int) -> Any:
    encoder = "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10"
    if load_gst().ElementFactory.find("x264enc") is None:
        encoder = "openh264enc gop-size=10"
    made = server.RTSPMediaFactory.new()
    made.set_shared(True)
    made.set_launch(
        f"( videotestsrc is-live=true pattern=ball num-buffers={frames} "
        f"! video/x-raw,format=I420,width=160,height=120,framerate=30/1 ! {encoder} ! h264parse "
        "! rtph264pay name=pay0 pt=96 config-interval=-1 )"
    )
    return made


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
    factories = {"/ball": _factory(GstRtspServer, -1), "/short": _factory(GstRtspServer, 20)}
    if locked:
        _lock(server, GstRtspServer, list(factories.values()))
    for path, factory in factories.items():
        server.get_mount_points().add_factory(path, factory)
    server.attach(None)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(sys.argv[1], "locked" in sys.argv[2:])
