"""What the manifest says of pixels reaches every frame: scaler, aspect, colorimetry; by session, trace and verify alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.export import cli as export_cli
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.session import Session
from keepsight.streams import Source, write_video
from keepsight.streams.errors import BundleError, ParityError

from ..random_bundle import IMAGE_SIZE, make_bundle

CHOICES: list[dict[str, Any]] = [
    {},
    {"scaler": "bicubic-wrap"},
    {"scaler": "lanczos"},
    {"aspect": "letterbox"},
    {"colorimetry": "bt709"},
    {"scaler": "bicubic", "aspect": "letterbox", "colorimetry": "bt709"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("pixels") / "bundle")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide, coloured, with hard edges: no two of the choices make the same pixels of it."""
    rng = np.random.default_rng(2)
    frames = rng.choice(np.array([0, 120, 255], np.uint8), (4, 9, 16, 3)).repeat(10, 1).repeat(10, 2)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames, fps=2)
    return path


def told(bundle: Path, **changes: Any) -> Path:
    """Make the bundle's manifest say something else of its preprocessing."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["preprocessing"] = {"width": IMAGE_SIZE, "height": IMAGE_SIZE, **changes}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_manifests_choice_makes_the_frames(bundle: Path, clip: Path, choice: dict[str, Any], tmp_path: Path) -> None:
    opened = Bundle.open(told(bundle, **choice))
    fps = opened.manifest.sample_fps
    wanted = [frame.image for frame in Source(clip, size=(IMAGE_SIZE, IMAGE_SIZE), fps=fps, **choice)]
    others = [next(Source(clip, size=(IMAGE_SIZE, IMAGE_SIZE), **other)).image for other in CHOICES if other != choice]
    assert not any(np.array_equal(wanted[0], other) for other in others)
    assert np.array_equal([frame.image for frame in opened.source(clip)], wanted)
    with Session(opened) as session:
        assert np.array_equal([frame.image for frame in session.source(str(clip))], wanted)
    assert np.array_equal(export_cli._read_clip(opened, str(clip), 2), wanted[:2])
    trace = tmp_path / "trace.npz"
    run("trace", str(bundle), str(clip), "--question", "what was there first?", "--out", str(trace))
    assert same_features(bundle, trace, clip)
    assert not same_features(told(bundle, **next(other for other in CHOICES if other != choice)), trace, clip)


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 or isinstance(result.exception, ParityError), result.output


def same_features(bundle: Path, trace: Path, clip: Path) -> bool:
    """Whether `verify` gets the trace's features out of the clip."""
    run("verify", str(bundle), "--against", str(trace), "--clip", str(clip), "--out", str(trace.parent))
    features = json.loads((trace.parent / "parity.json").read_text())["graphs"]["vision"]["outputs"]["features"]
    return bool(features["largest"] <= features["limit"])


@pytest.mark.parametrize("choice", [{"scaler": "area"}, {"aspect": "crop"}, {"colorimetry": "bt2020"}, {"conversion": "8-bit"}])
def test_what_the_pipeline_does_not_offer_is_refused(bundle: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=f"preprocessing.{next(iter(choice))}"):
        Bundle.open(told(bundle, **choice))
