"""When a silence is a stall, when to try again, and when a port is open again."""

from __future__ import annotations

import itertools
import random
import socket

import pytest

from keepsight.streams import Reconnect, SourceURI, UsageError
from keepsight.streams.backoff import Backoff
from keepsight.streams.capture import Arrivals, _interval_s
from keepsight.streams.presence import is_reachable
from keepsight.streams.supervisor import _Edge
from keepsight.streams.watchdog import Watchdog

LOOK_S = 0.1  # what a look may be late, generously


def seen(count: int, interval_s: float | None = None, stated_s: float | None = None) -> Arrivals:
    return Arrivals(count, 0.0 if count else None, interval_s, stated_s, (64, 48))


@pytest.mark.parametrize("fps", [60, 30, 5, 2, 1])
@pytest.mark.parametrize("stated", [True, False])
def test_a_hang_of_one_frame_a_second_and_more_is_seen_within_2_5_s(fps: int, stated: bool) -> None:
    limit = Watchdog().limit_s(seen(9, 1 / fps, 1 / fps if stated else None))
    assert 2.0 <= limit <= 2.5 - LOOK_S  # and one missing frame at 1 fps is no stall


@pytest.mark.parametrize("fps", [0.8, 0.5, 0.2])
def test_a_hang_of_a_slower_source_is_seen_within_three_intervals(fps: float) -> None:
    assert 2 / fps < Watchdog().limit_s(seen(9, 1 / fps)) <= 3 / fps - LOOK_S


def test_the_rate_is_the_streams_own_and_not_what_it_says() -> None:
    """A camera that states 30 fps exposes 5 s for each frame in the dark; odd first intervals prove nothing."""
    assert Watchdog().limit_s(seen(9, 5.0, 1 / 30)) == pytest.approx(14.5)
    assert Watchdog().limit_s(seen(3, 1.4, 1.0)) < 2.5
    assert Watchdog().limit_s(seen(2, 5.0, 1 / 30)) == pytest.approx(14.5)


@pytest.mark.parametrize(
    ("times", "interval"),
    [
        ([(0.0, 0.0)], None),
        ([(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)], 5.0),
        ([(9.8, 0.0), (9.9, 5.0), (10.0, 10.0), (10.1, 15.0)], 5.0),  # a burst, of what was taken in 15 s
        ([(0.0, None), (5.0, None), (10.0, None)], 5.0),  # no stamps
        ([(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)], 1.0),  # stamps that stand still
        ([(0.0, 0.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)], 1.0),  # one odd interval at the start
    ],
)
def test_how_often_frames_come(times: list[tuple[float, float | None]], interval: float | None) -> None:
    assert _interval_s(times) == interval


def test_after_a_single_frame_the_stated_rate_or_the_last_connection_tells() -> None:
    assert Watchdog(unknown_s=10.0).limit_s(seen(1)) == 10.0
    assert Watchdog().limit_s(seen(1, None, 0.04)) < 2.5
    dog = Watchdog()
    dog.learn(seen(9, 4.0), stalled=False)
    assert dog.limit_s(seen(1, None, 0.04)) == pytest.approx(11.6)


def test_a_source_that_gives_one_frame_for_each_connection_gets_more_and_more_time() -> None:
    dog = Watchdog()
    limits = []
    for _ in range(4):
        limits.append(dog.limit_s(seen(1, None, 1 / 30)))
        dog.learn(seen(1, None, 1 / 30), stalled=True)
    assert limits == pytest.approx([2.2, 4.4, 8.8, 17.6])
    dog.learn(seen(2, 6.0, 1 / 30), stalled=False)
    assert dog.limit_s(seen(1, None, 1 / 30)) == pytest.approx(17.4)


def test_a_limit_of_ones_own_is_kept_to() -> None:
    dog = Watchdog(0.7)
    assert dog.limit_s(seen(9, 5.0)) == 0.7 and dog.grace_s(seen(9, 5.0)) == 0.0


def pauses(policy: Reconnect, outage_s: float, tries: int, seed: int = 0) -> list[float]:
    backoff = Backoff(policy, random.Random(seed))
    return [backoff.pause_s(outage_s) for _ in range(tries)]


@pytest.mark.parametrize("seed", range(20))
def test_pauses_double_up_to_the_cap_and_never_beyond(seed: int) -> None:
    first, *rest = pauses(Reconnect(), 100.0, 12, seed)
    assert first == 0.0
    for count, pause in enumerate(rest):
        longest = min(0.25 * 2**count, 5.0)
        assert 0.6 * longest <= pause <= longest
    assert len(set(rest)) == len(rest)  # jitter: no two cameras in step


@pytest.mark.parametrize("seed", range(20))
def test_in_a_short_outage_no_pause_is_longer_than_the_time_there_is_to_recover(seed: int) -> None:
    """1.5 s from the server's return to frames, of which the connection itself takes up to half a second."""
    outage, tries = 0.0, Backoff(Reconnect(), random.Random(seed))
    while outage < 5.0:
        pause = tries.pause_s(outage)
        assert pause <= 0.6
        outage += pause + 0.05
    assert outage < 7


def test_who_is_refused_waits_the_cap_at_once() -> None:
    assert Backoff(Reconnect(cap_s=7.0)).pause_s(0.0, refused=True) == 7.0


def test_a_settled_connection_ends_the_growth() -> None:
    backoff = Backoff(Reconnect())
    assert [backoff.pause_s(100.0) for _ in range(9)][-1] > 2.9
    backoff.settle()
    assert backoff.pause_s(100.0) == 0.0 and backoff.pause_s(100.0) <= 0.25


@pytest.mark.parametrize("options", [{"cap_s": -1.0}, {"first_s": float("nan")}, {"at_start": "maybe"}])
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Reconnect(**options)  # type: ignore[arg-type]


def test_a_port_that_opens_is_found_and_one_that_was_open_is_no_news() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = SourceURI.parse(f"rtsp://127.0.0.1:{port}/x")
    clock = itertools.count(0.0, 1.0)
    edge = _Edge(uri)
    assert is_reachable(uri) is False and not edge.rose(next(clock)) and not edge.rose(next(clock))
    with socket.create_server(("127.0.0.1", port)):
        assert is_reachable(uri) is True and edge.rose(next(clock))
        fresh = _Edge(uri)
        assert not any(fresh.rose(next(clock)) for _ in range(3))
    assert is_reachable(SourceURI.parse("test://ball")) is None and is_reachable(SourceURI.parse("/dev/video99")) is False
