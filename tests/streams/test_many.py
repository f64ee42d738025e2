"""Many cameras for one consumer: fair shares, budgets, and faults that stay where they are."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from keepsight.streams import Frame, SourceNotFoundError, UsageError
from keepsight.streams.backoff import Reconnect
from keepsight.streams.capture import Arrivals
from keepsight.streams.events import Event, State
from keepsight.streams.many import Batch, Budget, Cameras, jain_index

if TYPE_CHECKING:
    from conftest import RtspServer

SMALL = (32, 32)


class Always:
    """A camera that always has another frame: what is measured is the sharing, not this machine."""

    state: State = "live"
    arrivals: Arrivals | None = None

    def __init__(self, uri: str, **_: Any) -> None:
        self.events: list[Event] = []
        self.drops: Counter[str] = Counter()
        self.given = 0
        self._closed = threading.Event()

    def latest(self, timeout_s: float | None = None) -> Frame | None:
        if self._closed.wait(0.001):
            return None
        self.given += 1
        return Frame(np.zeros((1, 1, 3), np.uint8), self.given / 1000, time.monotonic(), self.given - 1)

    def close(self) -> None:
        self._closed.set()


class Rarely(Always):
    """One that has a frame only now and then."""

    def latest(self, timeout_s: float | None = None) -> Frame | None:
        return None if self._closed.wait(0.2) else super().latest()


def shares(cameras: Cameras, frames: int, pause_s: float = 0.005) -> Counter[str]:
    """Who is served, by a consumer that takes frames one by one and is slower than any camera."""
    served: Counter[str] = Counter()
    until = time.monotonic() + 60
    while served.total() < frames and time.monotonic() < until:
        served.update(name for name, _ in cameras.batch(5.0))
        time.sleep(pause_s)
    return served


def settled(cameras: Cameras, is_done: Callable[[], bool], timeout_s: float = 20.0) -> list[Batch]:
    batches = []
    until = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < until, cameras
        batches.append(cameras.batch(0.2))
    return batches


def test_cameras_that_all_have_frames_get_equal_shares() -> None:
    with Cameras(dict.fromkeys("abcd", "test://ball"), batch=1, open_feed=Always) as cameras:
        served = shares(cameras, 200)
    assert set(served) == set("abcd") and jain_index([*map(float, served.values())]) > 0.99


def test_shares_go_by_weight() -> None:
    budgets = {"a": Budget(weight=3.0)}
    with Cameras({"a": "test://ball", "b": "test://ball"}, batch=1, budgets=budgets, open_feed=Always) as cameras:
        served = shares(cameras, 200)
    assert served["a"] / served["b"] == pytest.approx(3, rel=0.2)


def test_a_camera_with_few_frames_loses_none_to_those_with_many() -> None:
    feeds: dict[str, Always] = {}

    def open_feed(uri: str, **options: Any) -> Always:
        feeds[uri] = Rarely(uri) if uri == "test://ball" else Always(uri)
        return feeds[uri]

    uris = {"rare": "test://ball", "a": "test://snow", "b": "test://smpte"}
    with Cameras(uris, batch=1, open_feed=open_feed) as cameras:
        waits = []
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            for name, frame in cameras.batch(1.0):
                if name == "rare":
                    waits.append(frame.age_ms)
            time.sleep(0.02)
        assert cameras.cameras["rare"].drops["replaced"] == 0
    assert len(waits) >= feeds["test://ball"].given - 1 >= 3


def test_a_camera_that_had_nothing_for_long_does_not_lock_the_others_out_when_it_has() -> None:
    released = threading.Event()

    class Later(Always):
        def latest(self, timeout_s: float | None = None) -> Frame | None:
            return super().latest() if released.wait(0.05) else None

    def open_feed(uri: str, **options: Any) -> Always:
        return Later(uri) if uri == "test://ball" else Always(uri)

    with Cameras({"late": "test://ball", "a": "test://snow"}, batch=1, open_feed=open_feed) as cameras:
        assert shares(cameras, 100)["late"] == 0
        released.set()
        time.sleep(0.2)
        served = shares(cameras, 40)
    assert served["a"] == pytest.approx(20, abs=3)


def test_a_batch_has_one_frame_of_a_camera_and_not_more_than_asked() -> None:
    with Cameras(dict.fromkeys("abcde", "test://ball"), batch=3, gather_s=5.0, open_feed=Always) as cameras:
        for _ in range(5):
            batch = next(cameras)
            assert len(batch) == len({name for name, _ in batch}) == 3


def test_a_budget_limits_the_rate_and_what_it_leaves_out_is_counted_as_such() -> None:
    uri = "test://ball?fps=30&width=64&height=64"
    with Cameras({"a": uri, "b": uri}, size=SMALL, budgets={"a": Budget(fps=5)}) as cameras:
        settled(cameras, lambda: min(camera.served for camera in cameras.cameras.values()) > 0)
        before, begun = cameras.cameras["a"].served, time.monotonic()
        settled(cameras, lambda: time.monotonic() - begun > 3)
        taken_s = time.monotonic() - begun
        drops = cameras.cameras["a"].drops
        assert (cameras.cameras["a"].served - before) / taken_s <= 5.5
        assert drops["over-budget"] > 3 * drops["replaced"]
        assert cameras.cameras["b"].served > 2 * cameras.cameras["a"].served


def test_faults_of_some_cameras_are_not_felt_by_the_others(rtsp_server: RtspServer, silent_port: int) -> None:
    uris = {
        "good": rtsp_server.url("/ball"),
        "wrong-path": rtsp_server.url("/nope"),
        "silent": f"rtsp://127.0.0.1:{silent_port}/x",
        "unknown": "rtsp://no-such-host.invalid/x",
        "absent": "/dev/video99",
        "test": "test://ball",
    }
    seen: set[str] = set()
    with Cameras(uris, size=SMALL, on_event=lambda name, event: seen.add(name)) as cameras:
        named = cameras.cameras
        settled(cameras, lambda: named["good"].served > 20 and named["test"].served > 20)
        for name in set(uris) - {"good", "test"}:
            assert named[name].served == 0 and named[name].state in ("connecting", "lost"), named[name]
        assert named["good"].state == named["test"].state == "live"
        assert seen == set(uris)
        begun = time.monotonic()
    assert time.monotonic() - begun < 8


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


def test_a_camera_that_hangs_is_stalled_and_comes_back_while_the_other_goes_on(rtsp_server: RtspServer) -> None:
    with Cameras({"hangs": rtsp_server.url("/ball"), "other": "test://ball"}, size=SMALL) as cameras:
        hangs, other = cameras.cameras["hangs"], cameras.cameras["other"]
        settled(cameras, lambda: hangs.served > 5 and other.served > 5)
        rtsp_server.process.send_signal(signal.SIGSTOP)
        before = other.served
        settled(cameras, lambda: hangs.state in ("stalled", "lost"))
        assert other.served > before + 10
        rtsp_server.process.send_signal(signal.SIGCONT)
        stopped = hangs.served
        settled(cameras, lambda: hangs.served > stopped + 5 and hangs.state == "live")


def test_the_end_of_all_cameras_is_told_and_the_end_of_one_is_not() -> None:
    options = {"reconnect": Reconnect(at_start="fail")}
    with Cameras({"gone": "/dev/video99", "test": "test://ball"}, size=SMALL, options=options) as cameras:
        settled(cameras, lambda: cameras.cameras["gone"].error is not None and cameras.cameras["test"].served > 3)
        assert cameras.cameras["gone"].state == "lost"
    with Cameras({"gone": "/dev/video99"}, options=options) as cameras, pytest.raises(SourceNotFoundError):
        cameras.batch(20.0)


def test_closing_ends_the_iteration_from_any_thread() -> None:
    cameras = Cameras({"slow": "test://ball?fps=1/10"}, size=SMALL)
    batches: list[int] = []
    reader = threading.Thread(target=lambda: batches.extend(len(batch) for batch in cameras))
    reader.start()
    time.sleep(0.5)
    cameras.close()
    reader.join(10)
    assert not reader.is_alive() and sum(batches) <= 1
    assert not [thread.name for thread in threading.enumerate() if thread.name == "keepsight-camera-slow"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uris": {}}, "no camera"),
        ({"uris": {"a": "test://ball"}, "batch": 0}, "batch of 0"),
        ({"uris": {"a:b": "test://ball"}}, "no name for a camera"),
        ({"uris": {"a": "test://ball"}, "budgets": {"b": Budget()}}, "no such camera"),
        ({"uris": {"a": "clip.mp4"}}, "not live"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Cameras(**arguments)
    with pytest.raises(UsageError, match="weight"):
        Budget(weight=0)


def test_jain_index() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1) and jain_index([5.0, 0.0]) == pytest.approx(0.5)
