"""The gate leaves frames that show nothing out of the memory, and no others."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime import Bundle, Session
from keepsight.runtime.cli import app
from keepsight.runtime.live.gate import FLAT_LEVELS, FrameGate
from keepsight.streams import Frame, write_video
from keepsight.streams.errors import UsageError


def level(red, green, blue, noise=0.0):
    rng = np.random.default_rng(0)
    return np.clip(np.rint(np.array([red, green, blue]) + noise * rng.standard_normal((224, 224, 3))), 0, 255).astype(np.uint8)


def half(image):
    """The frame with a lower half of grey: a picture that broke off while it was decoded."""
    image = image.copy()
    image[112:] = 128
    return image


SCENE = np.random.default_rng(1).integers(0, 255, (224, 224, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (level(128, 128, 128), "uniform"),  # a decoder without a key frame
        (level(0, 135, 0), "uniform"),  # YUV zeros
        (level(128, 128, 128, noise=0.5), "uniform"),  # the same, encoded once more
        (level(0, 0, 0), "black"),
        (level(16, 16, 16), "black"),  # black of limited range, taken for full
        (level(6, 6, 6, noise=4.0), None),  # a dark room through a noisy sensor
        ((SCENE * 0.05).astype(np.uint8), None),  # a scene in the dark
        (half(SCENE), None),
        (np.tile(np.linspace(120, 132, 224).astype(np.uint8)[:, None, None], (1, 224, 3)), None),  # fog
    ],
)
def test_only_flat_frames_are_refused_and_the_cause_is_counted(image, cause):
    gate = FrameGate()
    assert gate.admits(image) == (cause is None)
    assert dict(gate.dropped) == ({} if cause is None else {cause: 1})


def test_one_channel_with_a_picture_in_it_is_enough():
    image = level(128, 128, 128)
    image[..., 2] = SCENE[..., 2]
    assert FrameGate().admits(image)


def test_the_limit_is_the_standard_deviation_of_a_channel():
    image = level(100, 100, 100)
    image[:112] += 2 * int(FLAT_LEVELS) - 1  # halves 3 apart deviate by 1.5, 5 apart by 2.5
    assert not FrameGate().admits(image)
    image[:112] += 2
    assert FrameGate().admits(image)


def test_the_report_names_causes():
    gate = FrameGate()
    assert str(gate) == "0 frames left out of the memory"
    for image in (level(0, 0, 0), level(128, 128, 128), level(90, 90, 90), SCENE):
        gate.admits(image)
    assert str(gate) == "3 frames left out of the memory (1 black, 2 uniform)"


def frame(image, index, time_s):
    return Frame(image=image, time_s=time_s, captured_at=0.0, index=index)


def test_a_session_with_a_gate_remembers_a_disturbed_stream_as_the_undisturbed_one():
    scenes = [np.full((224, 224, 3), 40 * k, np.uint8) ^ (SCENE & 31) for k in range(1, 6)]
    clean = [(image, 0.25 * t) for t, image in enumerate(image for image in scenes for _ in range(4))]
    disturbed = [shot for image, t in clean for shot in ((image, t), (level(128, 128, 128), t))]
    softs, seen = [], []
    with Session(Bundle.open("tiny"), threads=1) as first:
        for shots, gate in ((clean, None), (disturbed, FrameGate()), (disturbed, None)):
            with Session(Bundle.open("tiny"), threads=1, llm=first.llm, gate=gate) as session:
                standing = session.stand("what color was first?")
                for index, (image, time_s) in enumerate(shots):
                    session.see(frame(image, index, time_s))
                softs.append([session.perceive(put).query_output for put in ("what color was first?", standing)])
                seen.append(session.frames_seen)
    assert seen == [20, 20, 40]
    assert np.array_equal(softs[0], softs[1])
    assert not np.allclose(softs[0], softs[2], atol=0.1)


def test_a_stream_of_nothing_leaves_nothing_to_ask_about():
    with Session(Bundle.open("tiny"), threads=1, gate=FrameGate()) as session:
        session.see(frame(level(128, 128, 128), 0, 0.0))
        assert session.frames_seen == 0
        with pytest.raises(UsageError, match="Nothing has been seen yet"):
            session.ask("what color was first?")


def test_ask_with_gate_says_what_a_video_lost_to_it(tmp_path):
    """Grey and black frames that went through an encoder, right after a busy picture, are still flat."""
    shots = [SCENE] * 3 + [level(128, 128, 128)] * 2 + [SCENE[::-1]] * 3 + [level(0, 0, 0)]
    write_video(tmp_path / "clip.mp4", iter(np.array(shots)), fps=4.0)
    result = CliRunner().invoke(app, ["ask", str(tmp_path / "clip.mp4"), "what color was first?", "--gate", "--threads", "1"])
    assert result.exit_code == 0
    assert "3 frames left out of the memory (1 black, 2 uniform)" in result.stderr
    assert result.stdout.strip()
