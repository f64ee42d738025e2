"""`keepsight bench memory`: its naive loop is MA-LMM's, its fast path equals it, its counts and its report are right.

Speed is printed by the command and asserted nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from keepsight.export import bench
from keepsight.export.bench import FastPath, Settings, bench_memory, compare, double_difference
from keepsight.export.bench_bundle import FULL_SIZE, random_qformer, video_features
from keepsight.export.bench_macs import ceiling, fast_macs, naive_macs, vision_macs
from keepsight.export.bench_naive import LINEARS, NaiveLoop
from keepsight.export.eva import EvaConfig, EvaVision
from keepsight.export.graphs import GRAPHS, example_inputs
from keepsight.export.qformer import QFormer
from keepsight.runtime.cli import app
from keepsight.runtime.graphs.backends import open_engines
from keepsight.streams.errors import UsageError

from ..random_bundle import random_qformer as wild_qformer
from .naive_malmm import NaiveMALMM

SMALL = replace(FULL_SIZE, layers=4, channels=48, hidden=64, ffn=128, heads=4, queries=6, n_embd=32)
# All widths are MA-LMM's, so every product has its length. Layers differ in weights alone: of four, two have cross-attention, one
# is banked with the layers before and after it, and one waits for the answer. Twelve would take three times as long.
WIDE = replace(FULL_SIZE, layers=4)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the command measures, at a size that takes no time."""
    settings = Settings(
        lengths=(6, 3), frames=14, config=SMALL, tokens=12, token_counts=(5,), long_stream=30, updates=(60, 120), double_length=3
    )
    return bench_memory(settings, tmp_path_factory.mktemp("graphs"))


# -- the naive loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("linear", "limit"), [("default", 1e-12), ("onednn", 1e-4)])
def test_the_naive_loop_is_the_plain_reference(linear: str, limit: float) -> None:
    """Merges included. oneDNN has no double: it is compared in float32, with the reference's choices forced."""
    if linear == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    qformer, text = without_positions(wild_qformer()), [7, 3, 21, 4]
    dtype = torch.float64 if linear == "default" else torch.float32
    plain = NaiveMALMM(qformer, text, length=4)
    loop = NaiveLoop(in_dtype(qformer, dtype), text, length=4, linear=linear)
    plain._position_rows = lambda: [([0] * 9, [0] * 9)] * len(plain.visual.rows)  # type: ignore[method-assign]
    plain.weights |= {name: torch.zeros(2, 1, 64, dtype=torch.float64) for name in ("position_key", "position_value")}
    stream, moment = video_features(9, 48), np.zeros(9)
    for t in range(11):
        features = next(stream)
        wanted = plain.see(features, moment + t, moment + t)
        merges = {index: choice for index, choice in enumerate(wanted.query_choice) if choice is not None}
        seen = loop.see(features, visual_merge=wanted.visual_choice, query_merge=merges)
        assert float((seen.query_output - wanted.query_output).abs().max()) < limit
        assert (seen.visual_choice is None) == (wanted.visual_choice is None) == (t < 4)
        if wanted.visual_choice is not None:
            np.testing.assert_array_equal(seen.visual_choice, wanted.visual_choice)
            np.testing.assert_array_equal(seen.query_choice[2], wanted.query_choice[2])
    assert loop.visual is not None
    assert (loop.visual.sizes.sum(0) == 11).all()
    torch.testing.assert_close(loop.visual.rows.double(), torch.stack(plain.visual.rows), rtol=0, atol=1e-5)


def test_the_naive_loop_refuses_positions() -> None:
    with pytest.raises(UsageError, match="no positions"):
        NaiveLoop(wild_qformer(), [1], length=2)


@pytest.mark.parametrize("name", LINEARS)
def test_both_libraries_multiply_alike(name: str) -> None:
    layer, x = torch.nn.Linear(1408, 768), torch.randn(33, 1408)
    with torch.no_grad():
        wanted = (x.double() @ layer.weight.double().T + layer.bias.double()).float()
        torch.testing.assert_close(LINEARS[name](x, layer), wanted, rtol=0, atol=1e-4)


# -- the fast path at full widths ------------------------------------------------------------------------------------------------


def test_the_fast_path_is_exact_in_double(tmp_path: Path) -> None:
    settings = Settings(config=WIDE, double_length=3)
    found = double_difference(settings, tmp_path, random_qformer(WIDE), progress=silent)
    assert found["frames"] == 7  # four merges in every bank
    assert found["largest"] < 1e-10
    assert found["largest_value"] > 1


def test_the_fast_path_rounds_as_float32_does_where_merges_are_forced(tmp_path: Path) -> None:
    settings = Settings(lengths=(3,), frames=8, config=WIDE)
    case, qformer = settings.case(tmp_path, length=3), random_qformer(WIDE)
    bundle = case.export(qformer, ("visual_kv", "prompt", "step", "answer"))
    with open_engines(bundle) as engines:
        found = compare(settings, case, qformer, bundle, engines, progress=silent)
    assert found["differences"]["forced"]["largest"] < 1e-3
    assert found["differences"]["free"]["equal_decisions_visual"] > 0.9


def test_forced_merges_are_the_naive_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they not, the limit on what float32 does would say nothing: force wrong ones, and see it broken."""
    settings = Settings(lengths=(3,), frames=9, config=SMALL, tokens=12)
    case, qformer = settings.case(tmp_path, length=3), random_qformer(SMALL)
    bundle, force = case.export(qformer, ("visual_kv", "prompt", "step", "answer")), bench._force

    def wrong(fast: FastPath, before: bench.Seen | None) -> None:
        if before is not None and before.visual_choice is not None:
            before = replace(before, visual_choice=(before.visual_choice + 1) % 3)
        force(fast, before)

    monkeypatch.setattr(bench, "_force", wrong)
    with open_engines(bundle) as engines:
        found = compare(settings, case, qformer, bundle, engines, progress=silent)
    assert found["differences"]["forced"]["largest"] > 1e-3


# -- multiply-adds -----------------------------------------------------------------------------------------------------------


def test_the_naive_count_is_what_pytorch_counts() -> None:
    qformer, text = random_qformer(WIDE), [5, 6, 7, 8, 9]
    loop, stream = NaiveLoop(qformer, text, length=2), video_features(33, WIDE.channels)
    for seen in (1, 2, 3, 3):
        features = next(stream)
        said = naive_macs(WIDE, tokens=33, text=len(text), seen=seen)
        assert said == pytest.approx(counted(lambda features=features: loop.see(features)), rel=0.001)


def test_the_fast_count_is_what_pytorch_counts() -> None:
    qformer = random_qformer(WIDE)
    inputs = example_inputs(qformer, slots=4, tokens=33, text=16)
    runs = [lambda name=name: GRAPHS[name][0](qformer)(*inputs[name].values()) for name in ("visual_kv", "step")]
    said = fast_macs(WIDE, tokens=33, text=16, slots=4)
    assert said == pytest.approx(sum(counted(run) for run in runs), rel=0.001)


def test_the_count_of_vit_g_is_what_pytorch_counts() -> None:
    config = EvaConfig(image_size=56, width=64, blocks=3, heads=4, mlp=160)
    frame = torch.zeros(1, 56, 56, 3, dtype=torch.uint8)
    assert vision_macs(config) == pytest.approx(counted(lambda: EvaVision(config)(frame)), rel=0.001)
    assert vision_macs() == pytest.approx(260.4e9, rel=1e-3)


def test_the_ceiling_of_ma_lmm() -> None:
    """What counting by hand gave for 20 slots before the bench was there, without padding."""
    size = {"tokens": 257, "text": 10, "bucket": 10, "length": 20}
    assert ceiling(FULL_SIZE, **size, frames=range(60)) == pytest.approx(8.5, abs=0.4)
    assert ceiling(FULL_SIZE, **size, frames=range(40, 60)) == pytest.approx(9.8, abs=0.1)
    assert ceiling(FULL_SIZE, **{**size, "bucket": 16}, frames=range(40, 60)) < 9.2  # padding costs the fast path alone


# -- the report --------------------------------------------------------------------------------------------------------------


def test_the_report_has_what_is_promised(report: dict[str, Any]) -> None:
    json.dumps(report)
    assert report["speedup"].keys() == report["max_abs_diff"].keys() == {"6"}
    assert report["per_frame_ms"].keys() == report["bytes"].keys() == {"6", "3"}
    assert report["bytes"]["6"] > report["bytes"]["3"]
    assert report["machine"].keys() >= {"processor", "cores", "threads", "torch", "onnxruntime"}
    assert report["by_tokens"].keys() == {"5", "12"}
    against = report["against_naive"]
    for row in (against["fast"], *against["naive"].values()):
        assert len(row["wall_ms"]) == len(row["processor_ms"]) == 14
    naive, fast = (np.array(row["wall_ms"]).sum() for row in (against["naive"]["default"], against["fast"]))
    assert report["speedup"]["6"] == pytest.approx(naive / fast, rel=1e-3)


def test_the_report_tells_how_far_outputs_are_apart(report: dict[str, Any]) -> None:
    apart = report["against_naive"]["differences"]
    assert apart["double"]["largest"] < 1e-10
    assert apart["forced"]["largest"] < 1e-3
    assert len(apart["free"]["by_frame"]) == 14
    assert 0.9 < apart["free"]["equal_decisions_query"] <= 1


def test_a_question_put_later_is_answered_alike_in_three_ways(report: dict[str, Any]) -> None:
    ask = report["ask"]
    assert ask["slots"] == 7
    assert {"replay", "step by step", "recomputed, default"} <= ask["ms"].keys() == ask["processor_ms"].keys()
    assert all(apart < 1e-3 for apart in ask["max_abs_diff"].values())
    assert ask["max_abs_diff"].keys() == {"replay", "step by step"}


def test_the_command_prints_json_and_draws(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Settings] = []
    monkeypatch.setattr(bench, "bench_memory", lambda settings, folder, progress: asked.append(settings) or report)
    plot = tmp_path / "memory.png"
    arguments = ["bench", "memory", "--memory-length", "6", "--frames", "30", "--threads", "2", "--plot", str(plot)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(done.stdout) == report
    assert (asked[0].lengths, asked[0].frames, asked[0].threads) == ((6,), 30, 2)
    assert plot.read_bytes().startswith(b"\x89PNG")
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments).stdout
    assert "of the ceiling" in told and "block-causal replay" in told and "equal merge decisions" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory-length", "0"], "at least one slot"),
        (["--memory-length", "5", "--memory-length", "5"], "named twice"),
        (["--frames", "10"], "10 frames fill a memory of 20"),
        (["--threads", "0"], "0 threads"),
        (["--plot", "/nowhere/memory.png"], "/nowhere is no directory"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "memory", *arguments])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


# -- small change ------------------------------------------------------------------------------------------------------------


def silent(what: str, done: int, total: int) -> None:
    """No progress bar."""


def counted(run: Callable[[], Any]) -> float:
    """Multiply-adds by PyTorch's own count, where each is two operations. It knows attention by its products only."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def without_positions(qformer: QFormer) -> QFormer:
    bare = QFormer(replace(qformer.config, slots=0, time_buckets=0))
    state = {name: value for name, value in qformer.state_dict().items() if not name.startswith("position_")}
    bare.load_state_dict(bare.state_dict() | state)
    return bare.eval()


def in_dtype(qformer: QFormer, dtype: torch.dtype) -> QFormer:
    other = QFormer(qformer.config)
    other.load_state_dict(qformer.state_dict())
    return other.to(dtype).eval()
