"""`keepsight verify --pixels`: the reference's pixels bit for bit, and a table that tells good ways of making them from bad."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from keepsight.export import pixels
from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import Conversion, convert
from keepsight.export.pixels import Choice, choices, compare_pixels, reference_pixels
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.evaluation.parity import PixelParity
from keepsight.streams import write_video
from keepsight.streams.errors import UsageError

from ..random_bundle import make_bundle
from . import hf_models

FRAMES = 8  # M = 4, so three merges


def scenes(count: int = FRAMES, height: int = 90, width: int = 160) -> np.ndarray:
    """Frames of hard-edged coloured patches, 16:9, with a little noise; uint8 `[T, H, W, 3]`."""
    rng = np.random.default_rng(4)
    patches = rng.choice(np.array([0, 60, 200, 255]), (count // 2 + 1, height // 10, width // 10, 3)).repeat(10, 1).repeat(10, 2)
    frames = patches[np.arange(count) // 2] + rng.integers(-6, 7, (count, height, width, 3))
    return frames.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, scenes(), fps=4)
    return str(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("random") / "bundle"))


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a frame costs is not judged here."""
    monkeypatch.setattr(pixels, "_ROUNDS", 1)


def compared(bundle: Bundle, clip: str) -> dict[str, PixelParity]:
    rows = compare_pixels(bundle, clip, ["what was there first?"], count=FRAMES)
    return {row.name: row for row in rows}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what lies outside uint8 is defined on no machine, and wraps on x86")
@pytest.mark.parametrize("size", [(24, 24), (224, 224)])
def test_the_references_pixels_are_those_of_its_own_operation(size: tuple[int, int]) -> None:
    frames = scenes()
    whole = torch.from_numpy(frames).permute(3, 0, 1, 2).float()  # [C, T, H, W], as MA-LMM's transforms have it
    values = F.interpolate(whole, size=size[::-1], mode="bicubic", align_corners=False)
    wanted = values.to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.array_equal([reference_pixels(frame, size) for frame in frames], wanted)
    over, under = (values >= 256), (values <= -1)
    assert over.any() and under.any()
    assert (values.to(torch.uint8)[over] < 100).all() and (values.to(torch.uint8)[under] > 150).all()


def test_the_wrap_around_is_all_that_tells_the_two_references_apart() -> None:
    frame = scenes(1)[0]
    wrapped, cut_off = (reference_pixels(frame, (24, 24), wrap=wrap).astype(int) for wrap in (True, False))
    apart = wrapped != cut_off
    assert apart.any() and not apart.all()
    assert set(np.unique(cut_off[apart])) == {0, 255}


def test_every_scaler_has_a_row_and_the_bundles_own_is_marked(bundle: Bundle, clip: str) -> None:
    rows = compared(bundle, clip)
    assert [name for name, row in rows.items() if row.own] == ["bilinear"]
    ways = choices(Choice("bilinear"))
    assert len(rows) == 2 + len(ways) and len(set(ways)) == len(ways)
    first = rows["reference: MA-LMM's bicubic, which wraps"]
    assert (first.mean, first.largest, first.merges) == (0, 0, 1) and first.cosine == pytest.approx(1)
    assert all(row.answers is None and row.cost > 0 for row in rows.values())


def test_the_table_orders_the_ways_as_they_are(bundle: Bundle, clip: str) -> None:
    rows = compared(bundle, clip)
    deployed = rows["bicubic-wrap"]
    assert deployed.mean < 0.05 and deployed.cosine > 0.9999 and deployed.merges == 1
    cut_off = rows["reference, overshoot cut off"]
    assert cut_off.largest > 200 and rows["bicubic"].mean == pytest.approx(cut_off.mean, abs=0.05)
    worse = [row for name, row in rows.items() if name not in ("bicubic-wrap", next(iter(rows)))]
    assert all(row.mean > deployed.mean and row.cosine < deployed.cosine for row in worse)
    assert rows["bilinear, letterbox"].cosine < rows["bilinear"].cosine - 0.05
    # This clip is small, so its own matrix is BT.601.
    assert rows["bilinear, read as BT.601"].mean == rows["bilinear"].mean < rows["bilinear, read as BT.709"].mean


def test_red_and_blue_swapped_show(bundle: Bundle, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compared(bundle, clip)["bicubic-wrap"]
    stacked = pixels._stacked
    calls: list[int] = []

    def swapped(images: Iterator[np.ndarray]) -> np.ndarray:
        calls.append(len(calls))
        frames = stacked(images)
        return frames[..., ::-1] if len(calls) > 2 else frames  # the first two are the references'

    monkeypatch.setattr(pixels, "_stacked", swapped)
    wrong = compared(bundle, clip)["bicubic-wrap"]
    assert right.cosine > 0.9999 and wrong.cosine < 0.8 and wrong.mean > 30
    assert wrong.merges is not None and wrong.merges < 1


def test_answers_are_compared_with_the_references(bundle: Bundle, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a language model that says where the soft prompt, in steps of a tenth, lies."""

    def answer(_: Bundle, __: Any, question: str, rows: np.ndarray) -> str:
        return question if question == "always the same?" else str(np.round(rows, 1).tolist())

    monkeypatch.setattr(pixels, "greedy_answer", answer)
    monkeypatch.setattr(pixels, "load_llm", lambda *_: nullcontext())
    monkeypatch.setattr(Bundle, "has_llm", True)
    rows = {row.name: row for row in compare_pixels(bundle, clip, ["always the same?", "what was there first?"], count=FRAMES)}
    assert rows["reference: MA-LMM's bicubic, which wraps"].answers == 1
    assert rows["bilinear, letterbox"].answers == 0.5


def test_pixels_need_a_clip_and_no_trace(tmp_path: Path) -> None:
    for arguments, says in ((["--pixels"], "needs a clip"), (["--pixels", "--clip", "x.mp4", "--against", "x.npz"], "trace")):
        result = CliRunner().invoke(app, ["verify", "tiny", *arguments, "--out", str(tmp_path)])
        assert isinstance(result.exception, UsageError) and says in str(result.exception)


def test_a_converted_bundle_comes_with_the_closest_scaler_and_the_report_shows_it(tmp_path: Path, clip: str) -> None:
    torch.manual_seed(5)
    folder = hf_models.save(hf_models.instructblip(), tmp_path / "hf")
    manifest = convert(load_huggingface(folder), tmp_path / "bundle", Conversion(memory_length=3, sample_fps=4.0))
    assert manifest.preprocessing.scaler == "bicubic-wrap"
    result = CliRunner().invoke(
        app,
        ["verify", str(tmp_path / "bundle"), "--against", str(folder), "--clip", clip, "--pixels", "--frames", "6",
         "--question", hf_models.QUESTION, "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows: list[Mapping[str, Any]] = json.loads((tmp_path / "parity.json").read_text())["pixels"]
    assert [row["name"] for row in rows if row["own"]] == ["bicubic-wrap"]
    mean = {row["name"]: row["mean"] for row in rows[2:]}
    assert mean["bicubic-wrap"] == min(mean.values()) and mean["bicubic-wrap, 8-bit colours"] > mean["bicubic-wrap"] + 1
    page = (tmp_path / "parity.html").read_text()
    HTMLParser().feed(page)
    assert "bicubic-wrap (this bundle)" in page and "Pixels before the graph" in page
    assert "pixels before the graph" in result.output
