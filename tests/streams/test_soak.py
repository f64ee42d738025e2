"""Nothing is left of a connection that is over. `make soak` does this for an hour."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from keepsight.streams import LiveSource, Reconnect

if TYPE_CHECKING:
    from conftest import RtspServer

PATIENCE_S = 30.0


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is only freed when Python looks for cycles counts as left over: its sockets stay open until then."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_kb() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def lose(server: RtspServer, source: LiveSource, *, kill: bool) -> tuple[int, int, int]:
    """Read a frame of a new connection, then end it; returns descriptors, threads and memory while it was live."""
    end = time.monotonic() + PATIENCE_S
    before = source.generation
    while True:
        frame = source.latest(1.0)
        if frame is not None and frame.generation == before:
            break
        assert time.monotonic() < end, source.events
    found = descriptors(), threading.active_count(), resident_kb()
    if kill:
        server.stop()
        server.start()
    else:
        server.process.send_signal(signal.SIGUSR1)
    while source.generation == before:
        source.latest(0.02)
        assert time.monotonic() < end, source.events
    return found


def test_thirty_reconnections_leave_nothing_behind(rtsp_server: RtspServer, no_collector: None) -> None:
    policy = Reconnect(first_s=0.02, eager_pause_s=0.05)
    open_before, threads_before = descriptors(), threading.active_count()
    seen: list[tuple[int, int, int]] = []
    with LiveSource(rtsp_server.url("/ball"), size=(224, 224), reconnect=policy) as source:
        for count in range(30):
            seen.append(lose(rtsp_server, source, kill=count % 10 == 5))
    assert source.generation == 30 and source.stuck_teardowns == 0
    # A thread that closes an old connection, or its socket, may still be on its way out.
    early, late = seen[5:15], seen[20:]
    assert max(fds for fds, _, _ in late) <= max(fds for fds, _, _ in early) + 3
    assert max(threads for _, threads, _ in late) <= max(threads for _, threads, _ in early) + 1
    assert late[-1][2] - early[0][2] < 8 * 1024
    end = time.monotonic() + PATIENCE_S
    while descriptors() > open_before + 3 or threading.active_count() > threads_before:  # GLib keeps one wake-up of its own
        assert time.monotonic() < end, (open_before, descriptors(), threads_before, threading.enumerate())
        time.sleep(0.05)


def test_gstreamer_knows_of_no_object_that_outlived_its_connection() -> None:
    """As GStreamer's own tracer of leaks has it, over six connections."""
    script = """
import gc
from keepsight.streams import LiveSource, Reconnect
from keepsight.streams.gst import load_gst

with LiveSource("test://ball?frames=3", size=(32, 32), reconnect=Reconnect(first_s=0, eager_pause_s=0)) as source:
    while source.generation < 6:
        source.latest(1.0)
gc.collect()
load_gst().deinit()
"""
    environment = {**os.environ, "GST_TRACERS": "leaks", "GST_DEBUG": "GST_TRACER:7", "GST_DEBUG_NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "GST_TRACER" in done.stderr, done.stderr[-2000:]
    alive = [line for line in done.stderr.splitlines() if "object-alive, type-name" in line and "%s" not in line]
    assert not alive, "\n".join(alive)
