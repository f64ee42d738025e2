"""A camera's video recorded as it comes, and clips cut out of it: against a real RTSP server, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from keepsight.streams import Frame, LiveSource, Source, SourceNotFoundError, UsageError
from keepsight.streams.clip_command import add_clip
from keepsight.streams.clips import clip, parse_moment
from keepsight.streams.record import Recorder, RecordEvent
from keepsight.streams.recorded import segment_name, segments_in

if TYPE_CHECKING:
    from conftest import RtspServer

SIZE = (80, 60)


def watch(
    uri: str, recorder: Recorder, until: Callable[[list[Frame]], bool], timeout_s: float = 30.0
) -> tuple[list[Frame], LiveSource]:
    """The frames of a camera that is recorded."""
    frames: list[Frame] = []
    begun = time.monotonic()
    with LiveSource(uri, size=SIZE, branches=(recorder.branch,)) as source:
        while not until(frames):
            assert time.monotonic() - begun < timeout_s, (recorder, source)
            frame = source.latest(0.5)
            frames += [] if frame is None else [frame]
    return frames, source


def centre(image: np.ndarray) -> np.ndarray:
    """Where the ball is, (x, y)."""
    bright = image.sum(2) > 380
    return np.argwhere(bright).mean(0)[::-1] if bright.any() else np.full(2, np.nan)


def shown_at(clip_frames: list[Frame], start_s: float, wall_s: float) -> Frame:
    return min(clip_frames, key=lambda frame: abs(start_s + frame.time_s - wall_s))


def test_a_clip_shows_at_each_moment_what_the_live_frames_showed(rtsp_server: RtspServer, tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", 10_000_000, segment_s=1.0) as recorder:
        frames, _ = watch(rtsp_server.url("/ball"), recorder, lambda seen: bool(seen) and seen[-1].time_s > 5)
    assert len(recorder.segments) >= 4 and recorder.state == "stopped"
    walls = [frame.wall_time for frame in frames if frame.wall_time is not None]
    asked = (walls[0] + 1.2, walls[0] + 3.4)  # across segments
    made = clip(tmp_path / "r", *asked, tmp_path / "out.mp4")
    assert made.start_s <= asked[0] + 0.04 and made.start_s > asked[0] - 1.0  # key frames come every third of a second
    assert made.end_s == pytest.approx(asked[1], abs=0.08) and made.gaps == ()
    cut = list(Source(tmp_path / "out.mp4", size=SIZE))
    assert len(cut) == made.frames == pytest.approx((made.end_s - made.start_s) * 30, abs=2)
    compared = 0
    for frame in frames:
        assert frame.wall_time is not None
        if asked[0] + 0.1 < frame.wall_time < asked[1] - 0.1:
            same = shown_at(cut, made.start_s, frame.wall_time)
            here, there = centre(frame.image), centre(same.image)
            # The ball moves by about 1.5 pixels a frame at this size; one frame of difference in time is rounding.
            assert np.abs(here - there).max() < 4, (frame, same, here, there)
            near = [other for other in cut if abs(other.index - same.index) <= 1]
            assert min(np.abs(frame.image.astype(int) - other.image).max() for other in near) == 0  # the same coded picture
            compared += 1
    assert compared > 20


def test_the_limit_is_held_by_deleting_the_oldest(tmp_path: Path) -> None:
    limit = 300_000
    largest = 0

    with Recorder(tmp_path, limit, segment_s=0.5) as recorder:

        def enough(frames: list[Frame]) -> bool:
            nonlocal largest
            largest = max(largest, sum(segment.size for segment in recorder.segments))
            return recorder.deleted >= 3

        watch("test://snow?width=32&height=32&fps=30", recorder, enough)
        left = recorder.segments
    assert limit / 4 < largest <= limit
    assert left[0].number >= 3 and [segment.number for segment in left] == list(range(left[0].number, left[-1].number + 1))


KILLED = """
    import sys, time
    from keepsight.streams import LiveSource
    from keepsight.streams.record import Recorder
    recorder = Recorder(sys.argv[2], 10_000_000, segment_s=1.5)
    with LiveSource(sys.argv[1], size=(32, 32), branches=(recorder.branch,)) as source:
        for frame in source:
            print(frame.wall_time, flush=True)
"""


def test_what_a_killed_recorder_has_written_plays_and_the_next_one_goes_on_behind_it(
    rtsp_server: RtspServer, tmp_path: Path
) -> None:
    url = rtsp_server.url("/ball")
    killed = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), url, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    walls = [float(killed.stdout.readline())]
    while walls[-1] - walls[0] < 4:
        walls.append(float(killed.stdout.readline()))
    with pytest.raises(UsageError, match="another recorder"):
        Recorder(tmp_path / "r", 10_000_000)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    before = segments_in(tmp_path / "r")
    made = clip(tmp_path / "r", walls[0] - 5, walls[-1] + 5, tmp_path / "all.mp4")
    assert len(before) >= 2 and made.frames == len(list(Source(tmp_path / "all.mp4", size=SIZE)))
    # The last group of pictures is lost, a third of a second here.
    assert walls[-1] - 1.0 < made.end_s <= walls[-1] + 0.5
    with Recorder(tmp_path / "r", 10_000_000) as recorder:  # the lock went with the process
        watch(url, recorder, lambda seen: len(recorder.segments) > len(before))
    numbers = [segment.number for segment in segments_in(tmp_path / "r")]
    assert numbers == sorted(set(numbers)) and len(numbers) > len(before)


def test_an_outage_begins_a_new_segment_and_is_told_as_a_gap(rtsp_server: RtspServer, tmp_path: Path) -> None:
    events: list[RecordEvent] = []
    with Recorder(tmp_path / "r", 10_000_000, segment_s=60, on_event=events.append) as recorder:
        frozen: list[tuple[float, int]] = []  # when, and in which connection

        def back(frames: list[Frame]) -> bool:
            if len(frames) > 40 and not frozen:
                frozen.append((time.monotonic(), frames[-1].generation))
                rtsp_server.process.send_signal(signal.SIGSTOP)
            if not frozen or time.monotonic() - frozen[0][0] <= 5:
                return False
            rtsp_server.process.send_signal(signal.SIGCONT)
            found = recorder.segments  # a group of pictures is written at its end
            return frames[-1].generation > frozen[0][1] and len(found) > 1 and found[-1].size > 20_000

        frames, _ = watch(rtsp_server.url("/ball"), recorder, back, timeout_s=60)
    # A busy machine may lose its camera once more: each connection is a segment, and is told.
    assert len(recorder.segments) == len(events) >= 2 and {event.state for event in events} == {"recording"}
    first, last = frames[0].wall_time, frames[-1].wall_time
    assert first is not None and last is not None
    made = clip(tmp_path / "r", first, last, tmp_path / "out.mkv")
    gap = max(made.gaps, key=lambda one: one[1] - one[0])
    assert gap[1] - gap[0] > 3 and min(abs(gap[1] - segment.start_s) for segment in recorder.segments[1:]) < 0.01


FULL = """
    import resource, signal, sys, time
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # a write beyond that fails, as on a full disk
    from keepsight.streams import LiveSource
    from keepsight.streams.record import Recorder
    events = []
    recorder = Recorder(sys.argv[1], 10_000_000, on_event=lambda event: events.append((event.state, event.reason)))
    after = 0
    with LiveSource("test://snow?width=160&height=120&fps=30", size=(32, 32), branches=(recorder.branch,)) as source:
        for frame in source:
            after += recorder.state == "stopped"
            if after == 60 or frame.time_s > 25:
                break
        print(after, [state for state, _ in events], source.generation, source.state)
    print(events[-1][1])
"""


def test_a_disk_that_takes_no_more_stops_the_recording_once_and_never_the_frames(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)], capture_output=True, text=True, timeout=60)
    lines = ran.stdout.splitlines()
    assert lines and lines[0] == "60 ['recording', 'stopped'] 0 live", (ran.stdout, ran.stderr)
    assert "writ" in lines[1].lower()


AGAIN = """
    import resource, signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    from keepsight.streams import LiveSource
    from keepsight.streams.record import Recorder
    states = []
    recorder = Recorder(sys.argv[1], 10_000_000, on_event=lambda event: states.append(event.state), retry_s=0.5)
    began = time.monotonic()
    with LiveSource("test://snow?width=160&height=120&fps=30", size=(32, 32), branches=(recorder.branch,)) as source:
        for frame in source:
            if recorder.failures and frame.time_s > 4:  # the disk has room again
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            big = [segment for segment in recorder.segments if segment.size > 100_000]
            if (big and recorder.state == "recording") or frame.time_s > 45:  # it is told at the key frame after
                break
        print(source.generation, len(big), states[0], states[-1], states.count("recording") - states.count("stopped"))
    recorder.close()
"""


def test_writing_begins_again_when_the_disk_has_room_though_the_camera_never_went_away(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(AGAIN), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines() == ["0 1 recording recording 1"], (ran.stdout, ran.stderr)
    last = segments_in(tmp_path)[-1]
    made = clip(tmp_path, last.start_s, last.start_s + 60, tmp_path / "out.mkv")
    assert made.frames == len(list(Source(tmp_path / "out.mkv", size=SIZE))) > 30


def test_closing_a_camera_loses_nothing_of_its_recording(rtsp_server: RtspServer, tmp_path: Path) -> None:
    for tries in range(3):  # key frames come every third of a second: somewhere in between
        with Recorder(tmp_path / str(tries), 10_000_000) as recorder:
            frames, _ = watch(rtsp_server.url("/ball"), recorder, lambda seen: len(seen) > 45 and seen[-1].time_s > 2)
        last = frames[-1].wall_time
        assert last is not None
        made = clip(tmp_path / str(tries), last - 60, last + 60, tmp_path / f"{tries}.mkv")
        assert made.end_s > last - 0.01, (tries, last - made.end_s)


class Deaf(threading.Event):
    def set(self) -> None: ...


def test_closing_waits_for_a_recording_that_hangs_for_a_second_at_most(
    rtsp_server: RtspServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recorder(tmp_path / "r", 10_000_000) as recorder:
        source = LiveSource(rtsp_server.url("/ball"), size=SIZE, branches=(recorder.branch,))
        with source:
            while not any(segment.size for segment in recorder.segments):
                source.latest(0.5)
            (writer,) = recorder._writers.values()
            monkeypatch.setattr(writer, "_over", Deaf())  # never hears that all is written
            begun = time.monotonic()
        assert 0.9 < time.monotonic() - begun < 3.0 and source.stuck_teardowns == 0


def test_other_coded_video_is_recorded_as_it_comes_too(media: Path, tmp_path: Path) -> None:
    # At its own speed: read as fast as a busy machine can, a file overruns the queue of its recorder, which may not hold it up.
    recorder = Recorder(tmp_path / "r", 10_000_000)
    with recorder, Source(media / "clip.avi", pace="realtime", branches=(recorder.branch,)) as source:
        frames = list(source)
    (segment,) = recorder.segments
    assert segment.path.suffix == ".mkv"
    made = clip(tmp_path / "r", segment.start_s - 1, segment.start_s + 60, tmp_path / "out.mkv")
    cut = list(Source(tmp_path / "out.mkv"))
    assert len(cut) == made.frames == 100
    # Not encoded again, and nothing lost at its end: all that was read while it was recorded is in the clip bit for bit.
    recorded = {frame.image.tobytes() for frame in cut}
    assert len(frames) > 20 and all(frame.image.tobytes() in recorded for frame in frames)


def test_pictures_sent_out_of_order_are_cut_in_order(gst: object, tmp_path: Path, gst_run: Callable[[str, Path], Path]) -> None:
    whole = gst_run(
        "videotestsrc pattern=ball num-buffers=120 ! video/x-raw,format=I420,width=160,height=120,framerate=30/1 "
        "! x264enc bframes=2 b-adapt=false key-int-max=15 ! h264parse ! mp4mux ! filesink name=out",
        tmp_path / "b.mp4",
    )
    with Recorder(tmp_path / "r", 10_000_000, segment_s=1.0) as recorder:
        frames = list(Source(whole, size=SIZE, pace="realtime", branches=(recorder.branch,)))
    start_s = recorder.segments[0].start_s
    made = clip(tmp_path / "r", start_s + 1, start_s + 3, tmp_path / "out.mp4")
    cut = list(Source(tmp_path / "out.mp4", size=SIZE))
    assert len(cut) == made.frames and made.end_s - made.start_s == pytest.approx(2.25, abs=0.35)
    order = [min(frames, key=lambda frame, seen=shown: np.abs(frame.image.astype(int) - seen.image).sum()).index for shown in cut]
    assert order == sorted(order)


def test_what_was_not_recorded_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no recording"):
        clip(tmp_path / "none", 0, 1, tmp_path / "out.mp4")
    (tmp_path / segment_name(3, 1000.5, ".ts")).write_bytes(b"")
    with pytest.raises(UsageError, match="nothing is recorded"):
        clip(tmp_path, 1000, 2000, tmp_path / "out.mp4")
    with pytest.raises(UsageError, match="earlier moment first"):
        clip(tmp_path, 2, 1, tmp_path / "out.mp4")
    with pytest.raises(UsageError, match=r"mp4 or \.mkv"):
        clip(tmp_path, 1, 2, tmp_path / "out.avi")
    assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out.mp4.part").exists()


def test_the_names_of_segments_are_the_index(tmp_path: Path) -> None:
    # By number, not by time: the clock of the second run was set back.
    for number, start_s in ((1, 1_795_520_346.7534), (0, 1_795_520_999.9996), (12, 5.0)):
        (tmp_path / segment_name(number, start_s, ".ts")).write_bytes(bytes(number))
    (tmp_path / "notes.txt").write_text("not a segment")
    found = segments_in(tmp_path)
    assert [(segment.number, segment.start_s, segment.size) for segment in found] == [
        (0, 1_795_521_000.0, 0), (1, 1_795_520_346.753, 1), (12, 5.0, 12),
    ]  # fmt: skip
    assert found[1].path.name == "00000001-20261124T113906.753Z.ts"


def test_moments_are_read_as_they_are_typed() -> None:
    now = parse_moment("2026-11-24T14:10:00")
    assert parse_moment("14:05", now) == now - 300 and parse_moment("14:05:30", now) == now - 270
    assert parse_moment("14:20", now) == pytest.approx(now + 600 - 86400)  # of yesterday: it is not yet 14:20
    assert parse_moment("1970-01-01T00:01:00Z") == 60
    with pytest.raises(UsageError, match="no time"):
        parse_moment("teatime")


def test_the_command_says_what_it_cut(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", 10_000_000, segment_s=1.0) as recorder:
        watch("test://ball?width=64&height=64", recorder, lambda seen: len(recorder.segments) > 2)
    app = typer.Typer()
    add_clip(app)
    app.callback()(lambda: None)
    start_s = recorder.segments[0].start_s
    between = [time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(start_s + after)) for after in (0, 2)]
    out = tmp_path / "clip.mp4"
    result = CliRunner().invoke(app, ["clip", str(tmp_path / "r"), "--between", *between, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "pictures" in result.stdout and os.path.getsize(out) > 1000


@pytest.mark.parametrize(("limit", "segment_s", "message"), [(10, 1.0, "too few"), (10**9, 0.0, "no sense")])
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, limit: int, segment_s: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recorder(tmp_path, limit, segment_s=segment_s)
