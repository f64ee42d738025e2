"""Sound of files and test sources: its rate, its channels, its times, and what is refused."""

from __future__ import annotations

import itertools
import time
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.streams import (
    KeepsightError,
    MissingComponentError,
    Reconnect,
    SourceLostError,
    SourceNotFoundError,
    SourceUnreadableError,
    UsageError,
    tracks,
)
from keepsight.streams.audio import Audio
from keepsight.streams.gst import load_gst
from keepsight.streams.microphone import Microphone

GstRun = Callable[[str, Path], Path]


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """16-bit PCM of samples `[n, channels]`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def write_chunks(path: Path, chunks: Sequence[tuple[float, np.ndarray]], rate: int, chain: str = "matroskamux") -> Path:
    """Chunks of mono sound with times of their own, in Matroska, which keeps them to a millisecond."""
    gst = load_gst()
    pipeline = gst.parse_launch(
        f"appsrc name=in format=time caps=audio/x-raw,format=S16LE,rate={rate},channels=1,layout=interleaved "
        f"! audioconvert ! {chain} ! filesink name=out"
    )
    pipeline.get_by_name("out").set_property("location", str(path))
    pipeline.set_state(gst.State.PLAYING)
    for time_s, samples in chunks:
        buffer = gst.Buffer.new_wrapped((samples * 32767).astype("<i2").tobytes())
        buffer.pts, buffer.duration = round(time_s * gst.SECOND), round(len(samples) / rate * gst.SECOND)
        pipeline.get_by_name("in").push_buffer(buffer)
    pipeline.get_by_name("in").end_of_stream()
    message = pipeline.get_bus().timed_pop_filtered(10 * gst.SECOND, gst.MessageType.EOS | gst.MessageType.ERROR)
    pipeline.set_state(gst.State.NULL)
    assert message is not None and message.type == gst.MessageType.EOS, message and message.parse_error()
    return path


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_mixed_to_their_mean(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(channels)
    stored = rng.integers(-30000, 30000, (16000, channels))
    samples, start_s = Audio(write_wav(tmp_path / "noise.wav", stored, 16000)).read()
    assert samples.dtype == np.float32 and start_s == 0
    assert np.allclose(samples, (stored / 32768).mean(axis=1), atol=2e-6)


def test_resampling_neither_delays_nor_loses(tmp_path: Path) -> None:
    t = np.arange(48000 * 2) / 48000
    stored = (20000 * np.sin(2 * np.pi * 440 * t))[:, None]
    stored[48000] = 32000  # a click at exactly 1 s
    samples, _ = Audio(write_wav(tmp_path / "tone.wav", stored, 48000)).read()
    wanted = 20000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    assert samples.shape == (32000,)
    assert np.argmax(np.abs(samples - wanted)[100:-100]) + 100 == 16000
    # audioresample is a twelfth of a sample late, 5 microseconds
    assert np.allclose(samples[100:15900], wanted[100:15900], atol=0.01)
    assert Audio(tmp_path / "tone.wav", rate=22050).read()[0].shape == (44100,)


GAPS = [0.008, 0.020, 0.030, 0.300, -0.008, -0.030, -0.300]


@pytest.mark.parametrize("gap_s", GAPS)
@pytest.mark.parametrize("rate", [16000, 48000])
def test_what_comes_after_a_gap_or_an_overlap_is_at_its_time(tmp_path: Path, gap_s: float, rate: int) -> None:
    # 20 chunks of 50 ms, then 20 more that begin later or earlier than they should; a click 400 ms into those
    length = rate // 20
    chunks = [(index * 0.05, np.full(length, 0.1)) for index in range(20)]
    chunks += [(1.0 + gap_s + index * 0.05, np.full(length, 0.1)) for index in range(20)]
    chunks[28][1][0] = 1.0
    with Audio(write_chunks(tmp_path / "gap.mkv", chunks, rate)) as audio:
        samples, _ = audio.read()
        assert len(samples) == pytest.approx(round((2.0 + gap_s) * 16000), abs=1)
        assert np.argmax(samples) == pytest.approx(round((1.4 + gap_s) * 16000), abs=1)
        assert audio.silence == pytest.approx(max(0, round(gap_s * 16000)), abs=1)
        assert audio.cut == pytest.approx(max(0, round(-gap_s * 16000)), abs=1)
    if gap_s > 0:
        assert np.all(samples[16040 : round((1.0 + gap_s) * 16000) - 40] == 0)


def test_rounded_time_stamps_make_no_cracks(tmp_path: Path) -> None:
    # chunks of 21.33 ms, as AAC's, which Matroska stamps 21 or 22 ms apart
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1024 * 100) / 48000)
    chunks = [(index * 1024 / 48000, tone[index * 1024 : (index + 1) * 1024]) for index in range(100)]
    with Audio(write_chunks(tmp_path / "tone.mkv", chunks, 48000)) as audio:
        samples, _ = audio.read()
        assert (audio.silence, audio.cut) == (0, 0)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16000)
    assert np.allclose(samples[100:-100], wanted[100:-100], atol=0.01)


@pytest.mark.parametrize(("declared", "silence"), [(True, 48), (False, 0)])
def test_a_small_gap_counts_only_if_the_stream_declares_it(
    monkeypatch: pytest.MonkeyPatch, declared: bool, silence: int
) -> None:
    gst = load_gst()

    class Late(tracks._Marker):  # 3 ms more from the 50th buffer of 10 ms on
        count = 0

        def _see(self, buffer: Any) -> None:
            self.count += 1
            if self.count >= 50:
                buffer.pts += 3 * gst.MSECOND
            if self.count == 50 and declared:
                buffer.set_flags(gst.BufferFlags.DISCONT)
            super()._see(buffer)

    monkeypatch.setattr(tracks, "_Marker", Late)
    with Audio("test://ball?frames=60", pace="offline") as audio:
        assert len(audio.read()[0]) == 32000 + silence
        assert audio.silence == silence


def test_a_lost_opus_packet_is_silence_of_its_length(tmp_path: Path) -> None:
    gst = load_gst()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    tone[38400:38404] = 1.0  # a click at 0.8 s
    path = write_chunks(tmp_path / "whole.mkv", [(0.0, tone)], 48000, "opusenc frame-size=20 ! matroskamux")
    dropping = gst.parse_launch(f"filesrc location={path} ! matroskademux ! opusparse name=at ! matroskamux ! filesink name=out")
    dropping.get_by_name("out").set_property("location", str(tmp_path / "lost.mkv"))
    packets = iter(range(1000))

    def drop(pad: Any, info: Any) -> Any:
        return gst.PadProbeReturn.DROP if next(packets) in (20, 21) else gst.PadProbeReturn.OK

    dropping.get_by_name("at").get_static_pad("src").add_probe(gst.PadProbeType.BUFFER, drop)
    dropping.set_state(gst.State.PLAYING)
    dropping.get_bus().timed_pop_filtered(10 * gst.SECOND, gst.MessageType.EOS | gst.MessageType.ERROR)
    dropping.set_state(gst.State.NULL)
    whole, _ = Audio(path).read()
    with Audio(tmp_path / "lost.mkv") as audio:
        sounds = list(audio)
    lost, heard = np.concatenate([s.samples for s in sounds]), np.concatenate([s.mask for s in sounds])
    assert (~heard).sum() / 16 == pytest.approx(40, abs=1)  # ms
    assert np.all(lost[~heard] == 0)
    assert np.argmax(np.abs(lost)) == pytest.approx(np.argmax(np.abs(whole)), abs=16)  # Matroska's millisecond


def test_the_sound_of_a_video_is_read_without_its_pictures(media: Path) -> None:
    with Audio(media / "long_sound.mp4") as audio:
        samples, start_s = audio.read()
        decoders = [element.get_name() for element in audio._tracks._pipeline.iterate_recurse()]  # type: ignore[union-attr]
    assert start_s == 0 and len(samples) / 16000 == pytest.approx(10, abs=0.1)
    assert np.std(samples) > 0.1
    assert not [name for name in decoders if "h264" in name and "dec" in name]


def test_a_test_source_ticks(gst: Any) -> None:
    with Audio("test://ball") as audio:  # live
        pieces = [next(audio) for _ in range(30)]
    assert pieces[0].start_s == 0 and audio.is_live
    for before, after in itertools.pairwise(pieces):
        assert after.start_s == pytest.approx(before.start_s + len(before.samples) / 16000)


def test_sound_goes_on_after_a_loss_and_so_does_its_time(rtsp_server: Any) -> None:
    with Audio(rtsp_server.url("/talk"), reconnect=Reconnect()) as audio:
        pieces = [next(audio) for _ in range(20)]
        rtsp_server.stop()
        time.sleep(1.2)
        rtsp_server.start()
        while pieces[-1].generation == 0 or len(pieces) < 60:
            pieces.append(next(audio))
        states = [event.state for event in audio.events]
    ends = [piece.start_s + len(piece.samples) / 16000 for piece in pieces]
    gaps = [after.start_s - end for end, after in zip(ends, pieces[1:], strict=False)]
    cut = [piece.generation for piece in pieces].index(1)
    assert gaps[cut - 1] > 1.0 and np.abs(np.delete(gaps, cut - 1)).max() < 1e-6
    assert states[:3] == ["connecting", "live", "lost"] and states[-1] == "live" == audio.state
    assert audio.silence < 16000  # the outage is no silence


def test_without_reconnect_a_loss_is_an_error_and_an_event(rtsp_server: Any) -> None:
    with Audio(rtsp_server.url("/talk")) as audio:
        next(audio)
        rtsp_server.stop()
        with pytest.raises(SourceLostError):
            list(audio)
    assert [event.state for event in audio.events] == ["live", "lost"]


def test_a_microphone_that_is_not_there_yet_is_waited_for() -> None:
    with Audio("pulse://nobody", reconnect=Reconnect(at_start="wait", give_up_after_s=1.0)) as audio:
        with pytest.raises(KeepsightError):
            next(audio)
        assert audio.state == "lost"


BAD = [
    ("plain.mp4", SourceUnreadableError, "has no sound in it"),
    ("missing.mp4", SourceNotFoundError, "there is no file"),
    ("text.mp4", SourceUnreadableError, "is not a video"),
    ("cut.mp4", SourceUnreadableError, "truncated"),
    ("", UsageError, "directory"),
]


@pytest.mark.parametrize(("name", "error", "says"), BAD)
def test_what_cannot_be_heard_is_refused_in_one_line(
    media: Path, tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 100)
    (tmp_path / "plain.mp4").write_bytes((media / "plain.mp4").read_bytes())
    data = (media / "long_sound.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(error, match=says):
        Audio(tmp_path / name).read()


def test_a_camera_is_not_read_offline_and_a_csi_camera_has_no_sound() -> None:
    with pytest.raises(UsageError, match="can't be read offline"):
        Audio("rtsp://camera/door", pace="offline")
    with pytest.raises(SourceUnreadableError, match="no sound in it"):
        next(Audio("csi://0"))


MICROPHONES = [
    ("mic://", Microphone("mic")),
    ("alsa://hw:1,0", Microphone("alsa", "hw:1,0")),
    ("ALSA://", Microphone("alsa")),
    ("pulse://alsa_input.usb-C920", Microphone("pulse", "alsa_input.usb-C920")),
]


@pytest.mark.parametrize(("address", "parsed"), MICROPHONES)
def test_microphones_have_addresses(address: str, parsed: Microphone) -> None:
    assert Microphone.parse(address) == parsed
    assert Microphone.parse(str(parsed)) == parsed


@pytest.mark.parametrize("address", ["mic://hw:1", "v4l2:///dev/video0", "alsa", "alsa:hw:0"])
def test_what_is_no_microphone_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"microphone|takes no name"):
        Microphone.parse(address)


def test_a_microphone_that_is_not_there_is_one_clear_error() -> None:
    # no sound server and no sound card here: whichever element is installed says so, or is itself missing
    with pytest.raises((SourceNotFoundError, SourceUnreadableError, MissingComponentError)) as caught:
        next(Audio("pulse://nobody"))
    assert "pulse" in str(caught.value)
