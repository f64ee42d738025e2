"""Reports of the same thing become one that has all their runs, and others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepsight.runtime.cli import app
from keepsight.runtime.profiling.merge import merge
from keepsight.runtime.profiling.report import Energy, MemoryUse, Profile, Statistics, read_profile, write_profile
from keepsight.runtime.profiling.spread import per_run
from keepsight.streams.errors import UsageError

from .made_reports import Made


@pytest.fixture(scope="module")
def reports() -> list[Profile]:
    return [Made(seed=seed, sensors=True).profile() for seed in range(3)]


def test_samples_follow_each_other_and_every_run_is_told_apart(reports: list[Profile]) -> None:
    merged = merge(reports)
    assert merged.runs == sum(report.runs for report in reports)
    assert sorted(set(merged.run_of_frame)) == sorted(set(merged.run_of_question)) == list(range(merged.runs))
    assert merged.frames == sum(report.frames for report in reports) == len(merged.run_of_frame)
    for index, stage in enumerate(merged.stages):
        samples = tuple(sample for report in reports for sample in report.stages[index].samples)
        assert stage.samples == samples and stage.statistics == Statistics.of(samples)
        mine = per_run(merged, stage)
        apart = [run for report in reports for run in per_run(report, report.stages[index]) or ()]
        assert mine is not None and [list(run) for run in mine] == [list(run) for run in apart]
    assert len(merged.questions) == sum(len(report.questions) for report in reports)


def test_the_frame_rate_is_that_of_all_the_time_and_memory_the_median_and_the_most(reports: list[Profile]) -> None:
    uses = [MemoryUse(component="process", steady=steady, peak=peak, basis="read") for steady, peak in ((5, 9), (7, 8), (6, 30))]
    changed = [
        report.model_copy(update={"memory": (use,), "fps": fps, "frames": frames})
        for report, use, fps, frames in zip(reports, uses, (10.0, 20.0, 5.0), (100, 100, 50), strict=True)
    ]
    merged = merge(changed)
    assert merged.memory == (MemoryUse(component="process", steady=6, peak=30, basis="read"),)
    assert merged.fps == pytest.approx(250 / (10 + 5 + 10))


def test_energy_is_a_mean_by_frames_and_none_unless_all_have_it(reports: list[Profile]) -> None:
    energy = Energy(
        meter="VDD_IN", idle_watts=4.0, per_frame=0.1, per_answer=2.0, marginal_per_frame=0.1, marginal_per_answer=None
    )
    changed = [
        report.model_copy(update={"frames": frames, "energy": energy.model_copy(update={"per_frame": joules})})
        for report, frames, joules in zip(reports, (10, 30, 60), (1.0, 2.0, 3.0), strict=True)
    ]
    merged = merge(changed).energy
    assert merged is not None and merged.per_frame == pytest.approx((10 + 60 + 180) / 100)
    assert merged.per_answer == pytest.approx(2.0) and merged.marginal_per_answer is None
    assert merge([*changed, reports[0].model_copy(update={"energy": None})]).energy is None


def test_one_report_is_itself_but_for_a_note(reports: list[Profile]) -> None:
    merged = merge(reports[:1])
    assert merged.model_copy(update={"notes": reports[0].notes, "fps": reports[0].fps, "energy": reports[0].energy}) == reports[0]


def test_others_are_refused_with_what_differs(reports: list[Profile]) -> None:
    other = reports[1].model_copy(update={"backend": "cuda", "stages": reports[1].stages[1:]})
    with pytest.raises(UsageError, match="differ in: backend, stages"):
        merge([reports[0], other])
    with pytest.raises(UsageError, match="no report"):
        merge([])


def test_the_command_merges_files(reports: list[Profile], tmp_path: Path) -> None:
    for number, report in enumerate(reports):
        write_profile(report, tmp_path / f"{number}.json")
    files = [str(tmp_path / f"{number}.json") for number in range(3)]
    done = CliRunner().invoke(app, ["profile", "merge", *files, "--out", str(tmp_path / "all.json")])
    assert done.exit_code == 0 and read_profile(tmp_path / "all.json").runs == sum(report.runs for report in reports)
