"""A network camera on 127.0.0.1: watched, killed, frozen, locked, absent."""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from keepsight.streams import NoFrameError, Source, SourceLostError, SourceNotFoundError, SourceUnreadableError

if TYPE_CHECKING:
    from conftest import RtspServer

PASSWORD = "p@ss/w#rd"  # of rtsp_server.py


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_is_watched(rtsp_server: RtspServer, transport: str) -> None:
    with Source(rtsp_server.url(f"/ball?transport={transport}"), size=(64, 48)) as source:
        ages = []
        for frame in source:
            ages.append(frame.age_ms)
            if frame.time_s > 1.5:
                break
        assert frame.image.shape == (48, 64, 3) and frame.image.max() > 200
    assert frame.index > 20
    assert sorted(ages)[len(ages) // 2] < 150


def test_a_killed_camera_is_lost_at_once(rtsp_server: RtspServer) -> None:
    source = Source(rtsp_server.url("/ball"), size=(64, 48))
    next(source)
    rtsp_server.stop()
    begun = time.monotonic()
    with pytest.raises(SourceLostError, match="is lost"):
        list(source)
    assert time.monotonic() - begun < 3


def test_a_frozen_camera_is_lost_after_the_stall_time(rtsp_server: RtspServer) -> None:
    with Source(rtsp_server.url("/ball"), size=(64, 48), stall_timeout_s=1.0) as source:
        next(source)
        rtsp_server.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(SourceLostError, match="no frame for"):
            list(source)
        assert 0.7 < time.monotonic() - begun < 3
    assert time.monotonic() - begun < 4  # closing does not wait for it either


def test_a_camera_that_ends_is_lost(rtsp_server: RtspServer) -> None:
    with pytest.raises(SourceLostError, match="ended"):
        list(Source(rtsp_server.url("/short"), size=(64, 48)))


def test_a_path_the_camera_does_not_have(rtsp_server: RtspServer) -> None:
    with pytest.raises(SourceNotFoundError, match="no such path"):
        next(Source(rtsp_server.url("/nope")))


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SourceNotFoundError, match="refused"):
        next(Source(f"rtsp://127.0.0.1:{port}/x"))


def test_an_unknown_host() -> None:
    with pytest.raises(SourceNotFoundError, match="can't be reached") as caught:
        next(Source("rtsp://ann:tops3cret@no-such-host.invalid/x"))
    assert "tops3cret" not in str(caught.value) and "ann:***@" in str(caught.value)


def test_a_server_that_accepts_and_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(NoFrameError, match=r"no frame within 0\.7 s"):
            next(Source(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x", first_frame_timeout_s=0.7))
        assert time.monotonic() - begun < 3


def test_a_locked_camera(locked_rtsp_server: RtspServer) -> None:
    typed = f"ann:{quote(PASSWORD, safe='')}@"
    frame = next(Source(locked_rtsp_server.url("/ball", typed), size=(64, 48)))
    assert frame.image.shape == (48, 64, 3)
    with pytest.raises(SourceUnreadableError, match="user:password"):
        next(Source(locked_rtsp_server.url("/ball")))
    with pytest.raises(SourceUnreadableError, match="password") as caught:
        next(Source(locked_rtsp_server.url("/ball", "ann:wr0ng-one@")))
    assert "wr0ng-one" not in str(caught.value)
