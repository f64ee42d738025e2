"""A camera that is kept up: killed, frozen, hung up on, gone at the start, switching its size; and what is dropped."""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from keepsight.streams import (
    Event,
    Frame,
    LiveSource,
    MissingComponentError,
    NoFrameError,
    Reconnect,
    SourceLostError,
    SourceNotFoundError,
    SourceUnreadableError,
    SourceURI,
    UsageError,
)
from keepsight.streams.capture import Capture, Timeouts
from keepsight.streams.events import EventLog
from keepsight.streams.gst import has_element
from keepsight.streams.supervisor import Supervisor
from keepsight.streams.view import View
from keepsight.streams.watchdog import Watchdog

if TYPE_CHECKING:
    from conftest import RtspServer

WAIT = Reconnect(at_start="wait")
PATIENCE_S = 30.0  # for the machine, not for the source


def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def frame_of(source: LiveSource, generation: int) -> Frame:
    """The first frame of a connection."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        frame = source.latest(1.0)
        if frame is not None and frame.generation >= generation:
            return frame
    raise AssertionError(f"no frame of connection {generation}: {source.events}")


def states(source: LiveSource) -> list[str]:
    """Without what is only said of a connection that a busy machine makes slowly."""
    return [event.state for event in source.events if "no frame yet" not in event.reason]


def test_a_killed_camera_is_found_again_and_time_goes_on(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48)) as source:
        before = frame_of(source, 0)
        rtsp_server.stop()
        assert until(lambda: source.state == "lost")
        time.sleep(0.5)
        rtsp_server.start()
        after = frame_of(source, 1)
        assert after.generation == 1 and after.index > before.index and after.image.shape == (48, 64, 3)
        for earlier, later in ((before.time_s, after.time_s), (before.captured_at, after.captured_at)):
            assert later - earlier > 0.5
        # The gap is as long inside as outside, and the wall clock tells the same.
        assert after.time_s - before.time_s == pytest.approx(after.captured_at - before.captured_at, abs=0.01)
        assert before.wall_time is not None and after.wall_time == pytest.approx(time.time(), abs=2.0)
        assert after.wall_time - before.wall_time == pytest.approx(after.captured_at - before.captured_at, abs=0.1)
        assert after.running_time_s is not None and after.running_time_s < after.time_s + 5  # a pipeline of its own
        assert until(lambda: source.state == "live")
    seen = states(source)
    assert seen[:3] == ["connecting", "live", "lost"] and seen[-1] == "live" and "connecting" in seen[3:]
    assert [event.t for event in source.events] == sorted(event.t for event in source.events)
    assert any("refused" in event.reason for event in source.events)
    assert "again" in source.events[-1].reason


def test_a_frozen_camera_is_stalled_then_lost_and_comes_back(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48), stall_timeout_s=0.7) as source:
        frame_of(source, 0)
        rtsp_server.process.send_signal(signal.SIGSTOP)
        # GStreamer itself notices after 25 s or more.
        assert until(lambda: source.state == "connecting" and source.generation == 1, 15.0)
        rtsp_server.process.send_signal(signal.SIGCONT)
        frame_of(source, 1)
    assert "stalled" in states(source) and "lost" in states(source)
    assert source.stuck_teardowns == 0


def test_a_short_freeze_needs_no_new_connection(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48)) as source:
        frame_of(source, 0)
        rtsp_server.process.send_signal(signal.SIGSTOP)
        assert until(lambda: source.state == "stalled")
        rtsp_server.process.send_signal(signal.SIGCONT)
        assert until(lambda: source.state == "live")
        assert frame_of(source, 0).generation == 0
    assert "lost" not in states(source)


def test_a_reader_that_never_asks_delays_no_repair(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48)) as source:
        for count in (1, 2, 3):
            assert until(lambda count=count: states(source).count("live") == count)  # type: ignore[misc]
            rtsp_server.process.send_signal(signal.SIGUSR1)
        assert until(lambda: source.generation == 3)
        frame = frame_of(source, 3)
    assert frame.index == 0 and frame.generation == 3 and source.drops["replaced"] > 0


def test_a_live_source_that_ends_is_opened_again() -> None:
    with LiveSource("test://ball?frames=5&fps=30", size=(32, 32)) as source:
        assert frame_of(source, 2).generation >= 2
    assert any(event.state == "lost" and "ended" in event.reason for event in source.events)


def test_a_camera_that_switches_its_size_goes_on_at_the_size_asked_for(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/switch"), size=(64, 48)) as source:
        sizes, generations = set(), set()
        end = time.monotonic() + PATIENCE_S
        while len(sizes) < 2 and time.monotonic() < end:
            frame = source.latest(1.0)
            if frame is not None and source.arrivals is not None:
                assert frame.image.shape == (48, 64, 3) and frame.image.max() > 150
                sizes.add(source.arrivals.size)
                generations.add(frame.generation)
    assert sizes == {(160, 120), (320, 240)} and generations == {0}


def test_frames_have_the_cameras_own_size_where_none_was_asked_for(rtsp_server: RtspServer) -> None:
    shapes = set()
    with LiveSource(rtsp_server.url("/switch")) as source:
        end = time.monotonic() + PATIENCE_S
        while len(shapes) < 2 and time.monotonic() < end:
            frame = source.latest(1.0)
            if frame is not None:
                shapes.add(frame.image.shape)
    assert shapes == {(120, 160, 3), (240, 320, 3)}


# -- at the start --------------------------------------------------------------------------------------------------


def test_an_absent_camera_fails_at_once_unless_it_is_waited_for(rtsp_server: RtspServer) -> None:
    rtsp_server.stop()
    url = rtsp_server.url("/ball")
    with pytest.raises(SourceNotFoundError, match="refused"):
        next(LiveSource(url, size=(64, 48)))
    told: list[Event] = []
    with LiveSource(url, size=(64, 48), reconnect=WAIT, on_event=told.append) as source:
        assert source.latest(0.5) is None and source.state in ("lost", "connecting")
        rtsp_server.start()
        assert frame_of(source, 0).index == 0
    assert told == source.events and any("refused" in event.reason for event in told)


def test_each_try_of_a_wrong_path_is_an_event_with_its_reason(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/bal"), size=(64, 48), reconnect=WAIT) as source:
        assert until(lambda: states(source).count("lost") >= 3)
    assert all("no such path" in event.reason for event in source.events if event.state == "lost")


def test_a_wrong_password_is_not_tried_fast(locked_rtsp_server: RtspServer) -> None:
    with LiveSource(locked_rtsp_server.url("/ball", "ann:wr0ng-one@"), reconnect=WAIT) as source:
        assert until(lambda: source.state == "lost")
        time.sleep(2.0)
        assert states(source) == ["connecting", "lost"]
    reason = source.events[-1].reason
    assert "lock accounts" in reason and "5.0 s" in reason and "wr0ng-one" not in repr(source.events)
    with pytest.raises(SourceUnreadableError, match="password"):
        next(LiveSource(locked_rtsp_server.url("/ball", "ann:wr0ng-one@")))


def test_a_server_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(NoFrameError, match="accepts connections, and says nothing"):
            next(LiveSource(uri, first_frame_timeout_s=0.7))
        with LiveSource(uri, first_frame_timeout_s=0.7, reconnect=WAIT) as source:
            assert until(lambda: states(source).count("lost") >= 2)


def test_what_no_camera_mends_is_raised_even_when_waiting() -> None:
    with pytest.raises(UsageError, match="smpte"):
        next(LiveSource("test://nosuch", reconnect=WAIT))
    if not has_element("nvarguscamerasrc"):
        with pytest.raises(MissingComponentError, match="JetPack"):
            next(LiveSource("csi://0", reconnect=WAIT))


def test_a_device_that_is_not_there_yet_is_waited_for() -> None:
    with pytest.raises(SourceNotFoundError, match="no camera /dev/video99"):
        next(LiveSource("/dev/video99"))
    with LiveSource("/dev/video99", reconnect=WAIT) as source:
        assert until(lambda: states(source).count("lost") >= 2)
    assert "no camera /dev/video99" in source.events[-1].reason or source.events[-1].state == "connecting"


def test_a_source_that_stays_away_is_given_up_if_that_was_asked_for() -> None:
    policy = Reconnect(at_start="wait", give_up_after_s=0.5)
    with pytest.raises(SourceNotFoundError, match="refused"):
        list(LiveSource("rtsp://127.0.0.1:9/x", reconnect=policy))


def test_a_file_is_not_live(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not live"):
        LiveSource(tmp_path / "a.mp4")


# -- drops, times ----------------------------------------------------------------------------------------------------


def test_a_slow_reader_gets_the_newest_and_what_was_replaced_is_counted() -> None:
    with LiveSource("test://ball?fps=50&width=64&height=64") as source:
        frames = []
        for frame in source:
            assert frame.age_ms < 500  # a backlog would grow by 80 ms each time
            frames.append(frame)
            time.sleep(0.1)
            if len(frames) == 10:
                break
        first, last = frames[0].pts_ns, frames[-1].pts_ns
        assert first is not None and last is not None
        between = round((last - first) / 1e9 * 50) - 9
        assert source.drops["replaced"] == pytest.approx(between, abs=2) and source.drops["stale"] == 0
        assert source.dropped == source.drops.total()


def test_what_the_rate_leaves_out_is_no_drop() -> None:
    with LiveSource("test://ball?fps=50&width=64&height=64", fps=5) as source:
        times = []
        for frame in source:
            times.append(frame.time_s)
            time.sleep(0.05)  # 2 or 3 frames are replaced meanwhile, none of which was wanted
            if len(times) == 6:
                break
    assert times == pytest.approx([k / 5 for k in range(6)], abs=0.15)
    assert source.drops["replaced"] <= 1


def test_a_reader_too_slow_for_the_rate_it_asked_for_is_told() -> None:
    with LiveSource("test://ball?fps=50&width=64&height=64", fps=10) as source:
        frames = []
        for frame in source:
            frames.append(frame)
            time.sleep(0.35)  # three moments pass meanwhile
            if len(frames) == 4:
                break
    assert 6 <= source.drops["replaced"] <= 12


def test_each_third_frame_and_frames_that_differ() -> None:
    uri = "test://ball?fps=50&width=64&height=64"
    with LiveSource(uri, every=3) as source:
        stamps = [frame.pts_ns for frame, _ in zip(source, range(5), strict=False)]
    apart = np.diff(np.array(stamps, np.float64)) / 20e6
    assert (apart > 2.5).all()
    with LiveSource("test://black?fps=50&width=64&height=64", change=3) as source:
        next(source)
        threading.Timer(1.0, source.close).start()
        assert list(source) == []  # nothing changes
        assert source.latest(0.1) is None
    with pytest.raises(UsageError, match="fps and every"):
        LiveSource(uri, fps=1, every=2)


def test_a_frame_older_than_the_budget_is_not_handed_over(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48), stale_after_s=0.3) as source:
        assert frame_of(source, 0).age_ms < 400
        assert until(lambda: source.state == "live")
        time.sleep(0.2)
        rtsp_server.process.send_signal(signal.SIGSTOP)  # the newest frame grows old in its place
        time.sleep(1.0)
        assert source.latest(0.2) is None and source.drops["stale"] == 1
    with pytest.raises(UsageError, match="stale_after_s"):
        LiveSource("test://ball", stale_after_s=0.0)


def test_without_a_budget_an_old_frame_says_how_old_it_is(rtsp_server: RtspServer) -> None:
    with LiveSource(rtsp_server.url("/ball"), size=(64, 48)) as source:
        frame_of(source, 0)
        time.sleep(0.2)
        rtsp_server.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        frame = source.latest(0.2)
        assert frame is not None and 800 < frame.age_ms < 5000


# -- closing ---------------------------------------------------------------------------------------------------------


def test_closing_ends_an_iteration_in_another_thread() -> None:
    source = LiveSource("rtsp://127.0.0.1:9/x", reconnect=WAIT)
    counted: list[int] = []
    reader = threading.Thread(target=lambda: counted.append(len(list(source))))
    reader.start()
    time.sleep(0.3)
    source.close()
    reader.join(5)
    assert counted == [0]
    source.close()
    assert list(source) == []


def test_a_source_nobody_closed_ends_with_its_last_reference() -> None:
    source = LiveSource("test://ball?fps=30", size=(32, 32))
    next(source)
    supervisor = source._supervisor
    del source
    gc.collect()
    assert supervisor.closed and supervisor._thread is not None
    assert until(lambda: not supervisor._thread.is_alive())  # type: ignore[union-attr]


def test_a_source_may_be_closed_by_its_own_callback(rtsp_server: RtspServer) -> None:
    def closes(event: Event) -> None:
        if event.state == "lost":
            source.close()

    source = LiveSource(rtsp_server.url("/short"), size=(64, 48), on_event=closes)
    frames = list(source)
    assert 1 <= len(frames) <= 20 and states(source) == ["connecting", "live", "lost"]


def test_a_callback_that_fails_takes_nothing_down(caplog: pytest.LogCaptureFixture) -> None:
    def fails(event: Event) -> None:
        raise RuntimeError("no room for a log")

    with LiveSource("test://ball?fps=30", size=(32, 32), on_event=fails) as source:
        assert next(source).image.shape == (32, 32, 3)
    assert "no room for a log" in caplog.text


# -- a driver that blocks: nothing here can make a real one do so, so it is put in front of a real pipeline ----------


class Blocking(Capture):
    """A capture of a test pattern whose driver does not return from closing until it is let go."""

    let_go = threading.Event()

    def close(self) -> None:
        self.let_go.wait(PATIENCE_S)
        super().close()


def supervised(connect: Callable[[], Capture], log: EventLog, first_frame_s: float = 10.0) -> Supervisor:
    uri = SourceURI.parse("test://ball")
    return Supervisor(uri, connect, log, reconnect=WAIT, watchdog=Watchdog(), first_frame_s=first_frame_s)


def test_a_driver_that_hangs_in_closing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepsight.streams.supervisor._TEARDOWN_S", 0.3)
    ended = SourceURI.parse("test://ball?frames=3")
    opened: list[Capture] = []

    def connect() -> Capture:
        kind = Capture if opened else Blocking
        opened.append(kind(ended, View((32, 32)), "newest", Timeouts()))
        return opened[-1]

    log = EventLog()
    supervisor = supervised(connect, log)
    supervisor.start()
    try:
        assert until(lambda: supervisor.generations >= 2)
        assert supervisor.stuck_teardowns == 1
        assert any("left behind (1 so far)" in event.reason for event in log.events)
    finally:
        Blocking.let_go.set()
        supervisor.close()


def test_a_driver_that_hangs_in_opening_is_reported_and_its_late_pipeline_closed() -> None:
    late = threading.Event()
    opened: list[Capture] = []

    def connect() -> Capture:
        hangs = not opened and not late.is_set()
        if hangs:
            late.wait(PATIENCE_S)
        opened.append(Capture(SourceURI.parse("test://ball"), View((32, 32)), "newest", Timeouts()))
        return opened[-1]

    log = EventLog()
    supervisor = supervised(connect, log, first_frame_s=0.3)
    supervisor.start()
    try:
        assert until(lambda: any("driver hangs" in event.reason for event in log.events))
        late.set()
        assert until(lambda: log.state == "live")
        assert until(lambda: sum(capture._closed.is_set() for capture in opened) == len(opened) - 1)
    finally:
        supervisor.close()


def test_a_source_lost_for_good_raises_where_it_is_read() -> None:
    opened: list[int] = []

    def connect() -> Capture:
        opened.append(1)
        if len(opened) > 1:
            raise SourceLostError("it is gone.", fix="Look for it.")
        return Capture(SourceURI.parse("test://ball?frames=3"), View((32, 32)), "newest", Timeouts())

    policy = Reconnect(give_up_after_s=0.4)
    uri = SourceURI.parse("test://ball")
    supervisor = Supervisor(uri, connect, EventLog(), reconnect=policy, watchdog=Watchdog(), first_frame_s=10.0)
    supervisor.start()
    with pytest.raises(SourceLostError, match="it is gone"):
        while True:
            supervisor.current(1.0)
            time.sleep(0.02)
    assert len(opened) > 2
    supervisor.close()


def test_pictures_of_a_live_source_are_as_a_source_gives_them() -> None:
    from keepsight.streams import Source

    with LiveSource("test://smpte?fps=30", size=(64, 48)) as live, Source("test://smpte?fps=30", size=(64, 48)) as plain:
        ours, theirs = next(live).image, next(plain).image
    assert np.abs(ours[:30].astype(int) - theirs[:30].astype(int)).max() == 0  # below lies noise
