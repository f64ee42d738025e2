"""A report on a terminal: all of it, in 80 columns, with nothing cut, and nothing taken for markup."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from keepsight.runtime.profiling.compare import compare
from keepsight.runtime.profiling.report import Profile
from keepsight.runtime.profiling.tables import print_comparison, print_profile

from .made_reports import FRAME_MS, QUESTION_MS, Made


def printed(profile: Profile, width: int = 80) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_profile(profile, console)
    return capture.get()


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.split()[:1] == [name]).split()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_shown_and_fits(width: int) -> None:
    made = Made(sensors=True).profile(notes=("clocks are not locked",))
    text = printed(made, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for words in (
        *FRAME_MS, *QUESTION_MS, "keepsight-tiny", "25W", "A made-up board", "time_to_first_token", "visual_kv", "language model",
        "above idle", "cold start", "12 late", "tj-thermal", "throttled for 7.0 s", "cpu-throttle-alert", "block 11", "x 0.69",
        "note: clocks are not locked", "300 frames in 5 runs",
    ):  # fmt: skip
        assert words in " ".join(text.split()), words


def test_the_numbers_are_the_statistics() -> None:
    made = Made(runs=2).profile()
    vision = made.stage("vision")
    assert vision is not None
    found = vision.statistics
    cells = row(printed(made), "vision")
    assert [float(cell) for cell in cells[2:7]] == pytest.approx(
        [found.p50, found.p90, found.p95, found.p99, found.mean], rel=1e-3
    )
    whole = made.stage("frame")
    assert whole is not None and cells[1] == f"{sum(vision.samples) / sum(whole.samples):.0%}"


def test_what_is_inside_a_stage_stands_below_it() -> None:
    lines = printed(Made(runs=2).profile()).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    assert names.index("visual_kv") == names.index("memory", names.index("copy")) + 1
    assert next(line for line in lines if "visual_kv" in line).startswith("    visual_kv")


def test_one_frame_and_nothing_else() -> None:
    text = printed(Made(runs=1, frames=1, questions=0).profile(timeline=(), memory=(), cold_start=(), language_model=None))
    assert "1 frame," in text and "no language model" in text
    for words in ("a question", "memory, MB", "energy", "cold start", "throttled", "engine"):
        assert words not in text


def test_brackets_are_text_not_markup() -> None:
    made = Made(runs=1, sensors=True).profile(source="[bold]clip[/bold].mp4", notes=("a [red]note[/red]",))
    assert made.energy is not None
    made = made.model_copy(update={"energy": made.energy.model_copy(update={"meter": "[x]INA[/x]"})})
    text = printed(made)
    assert "[bold]clip[/bold].mp4" in text and "a [red]note[/red]" in text and "[x]INA[/x]" in text


def test_a_stage_timed_by_the_gpu_is_marked() -> None:
    made = Made(runs=1).profile()
    stages = tuple(s.model_copy(update={"clock": "device"}) if s.name == "vision" else s for s in made.stages)
    text = printed(made.model_copy(update={"stages": stages}))
    assert "vision*" in text and "by the GPU's own clock" in text and "step*" not in text


@pytest.mark.parametrize("made", [{"runs": 5}, {"runs": 1, "questions": 2}])
def test_a_comparison_fits_into_80_columns(made: dict[str, Any]) -> None:
    a, b = Made(seed=0, **made).profile(), Made(seed=1, factors={"vision": 40.0, "prefill": 30.0}, **made).profile()
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_comparison(compare(a, b), console, names=("a.json", "b.json"))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "slower" in text and "a.json" in text and "not judged" in text


def test_a_comparison_shows_memory_that_changed_and_counts_the_rest() -> None:
    a = Made(runs=2, frames=5).profile()
    bank = a.memory[2].model_copy(update={"peak": 5_200_000})
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        print_comparison(compare(a, a.model_copy(update={"memory": (*a.memory[:2], bank)})), console)
    text = capture.get()
    assert [line.split()[-1] for line in text.splitlines() if "memory bank, peak memory" in line] == ["bigger"]
    assert "5 figures of memory differ by less" in text and "language model" not in text
