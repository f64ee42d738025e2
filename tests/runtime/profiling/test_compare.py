"""What got slower is found and named, equals are called equal, and what can't be compared is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepsight.runtime.profiling.compare import FLOOR_MS, Amount, Change, Comparison, _holm, compare, compare_command
from keepsight.runtime.profiling.report import MemoryUse, Moment, Profile, Stage, Statistics, write_profile
from keepsight.runtime.profiling.spread import gap, level, paired_gap, per_run
from keepsight.runtime.profiling.student import t_quantile, t_tail
from keepsight.streams.errors import RegressionError, UsageError

from .made_reports import FRAME_MS, QUESTION_MS, Made, Noise

QUIET = Noise(sample=0.02, run=0.005, stage=0.003)


def pair(factors: dict[str, float] | None = None, seed: int = 0, **made: Any) -> tuple[Profile, Profile]:
    base = Made(**made)
    return replace(base, seed=2 * seed).profile(), replace(base, seed=2 * seed + 1, factors=factors or {}).profile()


def change(found: Comparison, name: str, path: str = "frame") -> Change:
    return next(c for c in found.changes if (c.name, c.path) == (name, path))


def stage_of(samples: list[float], name: str = "wait", path: Any = "frame") -> Stage:
    return Stage(name=name, path=path, samples=tuple(samples), statistics=Statistics.of(samples))


# Student's t


@pytest.mark.parametrize("freedom", [1, 2, 4.7, 8, 30, 400])
def test_the_tail_is_the_integral_of_the_density(freedom: float) -> None:
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    t = np.linspace(0, 6, 200_001)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * (t[1] - t[0])])
    for index in (0, 1000, 40_000, 100_000, 200_000):
        assert t_tail(t[index], freedom) == pytest.approx(0.5 - below[index], abs=1e-8)
        assert t_tail(-t[index], freedom) == pytest.approx(0.5 + below[index], abs=1e-8)


def test_the_quantile_is_that_of_the_tables() -> None:
    for tail, freedom, t in ((0.025, 1, 12.7062), (0.025, 8, 2.3060), (0.05, 4, 2.1318), (0.0005, 10, 4.5869)):
        assert t_quantile(tail, freedom) == pytest.approx(t, abs=1e-4)


# What the spread is of


def test_with_several_runs_the_run_is_the_unit() -> None:
    """A thousand times the samples in each run tell nothing more of how runs differ."""
    medians = (10.0, 10.4, 9.8)
    few, many = (level(tuple(np.full(n, m) for m in medians), log=True) for n in (3, 3000))
    assert few == many and few.runs == 3 and few.freedom == 2
    assert few.variance == pytest.approx(np.log(medians).var(ddof=1), rel=1e-3)


def test_the_interval_of_as_many_runs_is_students() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 0.3, 5), rng.normal(11, 0.3, 5)
    found = gap(*(level(tuple(np.array([x]) for x in xs), log=False) for xs in (a, b)))
    assert found is not None
    error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 5)
    low, high = found.interval()
    assert (low + high) / 2 == pytest.approx(b.mean() - a.mean())
    assert (high - low) / 2 == pytest.approx(2.3060 * error, rel=1e-3)  # 8 degrees of freedom


def test_the_interval_of_unequal_numbers_of_runs_is_welchs() -> None:
    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.2, 3.1, 3.3, 2.9, 3.0])
    found = gap(*(level(tuple(np.array([x]) for x in xs), log=False) for xs in (a, b)))
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 6
    assert found is not None and found.error == pytest.approx(math.sqrt(va + vb))
    assert found.freedom == pytest.approx((va + vb) ** 2 / (va**2 / 2 + vb**2 / 5), rel=1e-4)


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_within_a_run_the_bootstrap_knows_of_neighbours(memory: float) -> None:
    """Its standard error is that which the median of many simulated runs has, which is more where neighbours are alike."""

    def run(seed: int) -> np.ndarray[Any, Any]:
        shocks = np.random.default_rng(seed).normal(0, math.sqrt(1 - memory**2), 600)
        values = [shocks[0]]
        for shock in shocks[1:]:
            values.append(memory * values[-1] + shock)
        return 100 + np.array(values)

    true = np.std([np.median(run(seed)) for seed in range(200)])
    claimed = [level((run(seed),), log=False).variance for seed in range(500, 506)]
    assert np.mean([math.sqrt(v or 0) for v in claimed]) == pytest.approx(true, rel=0.25)


def test_a_single_run_beside_several_varies_as_these_do() -> None:
    several = level(tuple(np.array([x]) for x in (10.0, 10.5, 9.5, 10.2)), log=False)
    single = level((np.full(50, 11.0),), log=False)
    found = gap(several, single)
    assert found is not None and found.freedom == 3
    assert found.error == pytest.approx(math.sqrt((several.variance or 0) * 1.25))


def test_samples_are_assigned_to_runs() -> None:
    made = Made(runs=3, frames=4, questions=2).profile()
    vision = made.stage("vision")
    assert vision is not None
    assert [run.tolist() for run in per_run(made, vision) or ()] == [list(vision.samples[i : i + 4]) for i in (0, 4, 8)]


def test_tokens_are_assigned_to_the_runs_of_their_answers() -> None:
    made = Made(runs=2, frames=4, questions=2).profile()
    questions = tuple(q.model_copy(update={"tokens": n}) for q, n in zip(made.questions, (1, 4, 2, 3), strict=True))
    made = made.model_copy(update={"questions": questions})
    later = per_run(made, stage_of([1, 2, 3, 4, 5, 6], "token", "question"))  # all but the first of each answer
    assert later is not None and [run.tolist() for run in later] == [[1, 2, 3], [4, 5, 6]]
    every = per_run(made, stage_of(list(range(10)), "token", "question"))
    assert every is not None and [len(run) for run in every] == [5, 5]
    assert per_run(made, stage_of([1, 2, 3, 4, 5], "token", "question")) is None


# Verdicts


@pytest.mark.parametrize("stage", [name for name, ms in (FRAME_MS | QUESTION_MS).items() if ms > 0.1])
def test_the_stage_that_got_slower_is_named(stage: str) -> None:
    found = compare(*pair({stage: 1.3}, noise=QUIET, frames=40))
    assert not found
    assert isinstance(found.worst, Change) and found.worst.name == stage and found.worst.verdict == "slower"
    names = {c.name for c in found.slower if c.part == "stage"}
    assert names == {stage}


def test_equals_are_not_called_changed() -> None:
    found = compare(*pair(seed=5))
    assert found and found.worst is None
    assert {c.verdict for c in found.changes} <= {"same", "unclear"}


def test_a_report_compared_with_itself_has_not_changed() -> None:
    made = Made(runs=3).profile()
    found = compare(made, made)
    assert found and all(c.ratio == pytest.approx(1) for c in found.changes)


def test_few_false_alarms_and_few_misses() -> None:
    """Quick; scripts/compare-alarms does it at length. Of 40 comparisons at 5 %, more than 6 alarms come once in 300 times."""
    edge = dict.fromkeys((*FRAME_MS, *QUESTION_MS), 1.05)
    alarms = sum(
        any(c.verdict in ("slower", "faster") for c in compare(*pair(edge, seed, frames=8, questions=4)).changes)
        for seed in range(40)
    )
    assert alarms <= 6
    worst = [compare(*pair({"vision": 1.2}, seed, frames=8, questions=4)).worst for seed in range(100, 115)]
    assert sum(isinstance(w, Change) and w.name == "vision" for w in worst) >= 13


def test_a_slow_down_within_the_threshold_is_none() -> None:
    a, b = pair({"vision": 1.2}, noise=QUIET)
    assert not compare(a, b, threshold=0.1)
    found = compare(a, b, threshold=0.3)
    assert found and change(found, "vision").verdict == "same"


def test_what_got_faster_is_no_regression() -> None:
    found = compare(*pair({"vision": 0.7}, noise=QUIET))
    assert found and change(found, "vision").verdict == change(found, "frame").verdict == "faster"


def test_the_largest_contribution_comes_first_not_the_largest_ratio() -> None:
    found = compare(*pair({"copy": 3.0, "vision": 1.3}, noise=QUIET))
    assert [c.name for c in found.slower[:2]] == ["vision", "copy"]
    whole, share = found.explained(found.slower[0]) or (None, 0.0)
    assert whole is not None and whole.name == "frame" and 0.85 < share < 1


def test_a_queue_that_grows_is_not_taken_for_its_cause() -> None:
    """Eight pictures wait for the session: a step that is slower by 4 ms makes each of them wait 32 ms longer."""
    made = Made(noise=QUIET, frames=30, frame_ms={**FRAME_MS, "wait": 200.0})
    found = compare(made.profile(), replace(made, seed=1, factors={"vision": 1.25, "wait": 1.18}).profile())
    assert [c.name for c in found.slower] == ["vision", "wait", "frame"]
    _, share = found.explained(found.slower[0]) or (None, 0.0)
    assert 0.9 < share < 1.1
    found = compare(made.profile(), replace(made, seed=1, factors={"wait": 1.3}).profile())
    assert [c.name for c in found.slower] == ["wait", "frame"]


def test_one_run_each_says_what_its_interval_holds_and_finds_only_what_is_large() -> None:
    a, b = pair({"vision": 1.5}, runs=1, frames=100)
    found = compare(a, b)
    assert isinstance(found.worst, Change) and found.worst.name == "vision"
    assert any("only the spread within a run" in note for note in found.notes)
    # Each differs by 3 %, which is nothing between runs, however well known it is within them.
    a, b = pair({"vision": 1.12}, runs=1, frames=1000, noise=Noise(sample=0.02, memory=0, run=0, stage=0))
    vision = change(compare(a, b), "vision")
    assert vision.low is not None and vision.low > 1.05 and vision.verdict == "unclear"


def test_too_few_samples_of_one_run_are_not_judged() -> None:
    found = compare(*pair({"prefill": 3.0}, runs=1, questions=2))
    prefill = change(found, "prefill", "question")
    assert (prefill.verdict, prefill.low, prefill.high) == ("unknown", None, None)


def test_a_wait_that_comes_from_nothing_is_found() -> None:
    a, b = pair(noise=QUIET, runs=4, frames=10)

    def waiting(made: Profile, ms: float) -> Profile:
        samples = [ms + 0.01 * (index % 3) if ms else 0.0 for index in range(40)]
        stages = tuple(stage_of(samples) if stage.name == "wait" else stage for stage in made.stages)
        return made.model_copy(update={"stages": stages})

    found = compare(waiting(a, 0.0), waiting(b, 3.0))
    wait = change(found, "wait")
    assert found.worst == wait and wait.ratio is None and wait.low is not None and wait.low > FLOOR_MS
    assert change(compare(waiting(a, 0.0), waiting(b, 0.0)), "wait").verdict == "same"


def test_holm_rejects_no_more_than_alone_and_no_less_than_bonferroni() -> None:
    found = compare(*pair({"vision": 1.12, "step": 1.15}, seed=3))
    tested = len(found.changes)
    for c in found.changes:
        assert c.low is not None and c.high is not None and c.ratio is not None
        if c.verdict == "slower":
            assert c.low > 1.05
        # The simultaneous interval of Bonferroni, from the 95 % one: the same centre and error, a larger quantile.
        reach = math.log(c.high / c.low) / 2 * t_quantile(0.05 / tested, 8) / t_quantile(0.025, 8)
        if math.log(c.ratio) - reach > math.log(1.05):
            assert c.verdict == "slower"


def test_p_is_corrected_as_holm_does() -> None:
    """The example of four tests at 0.01, 0.04, 0.03 and 0.005."""
    one = change(compare(*pair(runs=2, frames=3)), "vision")
    corrected = _holm([replace(one, p=p, verdict="unclear") for p in (0.01, 0.04, 0.03, 0.005)])
    assert [c.p for c in corrected] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ["unclear" if c.verdict == "unclear" else "called" for c in corrected] == ["called", "unclear", "unclear", "called"]


# Memory, energy and the rest


def test_memory_beyond_its_tolerance_is_a_regression_and_throughput_alone_is_none() -> None:
    made = Made(runs=3).profile()
    bank = MemoryUse(component="memory bank", steady=2_700_000, peak=2_600_000, basis="counted")
    process = MemoryUse(component="process", steady=650_000_000, peak=700_000_000, basis="read")
    more = made.model_copy(update={"memory": (process, bank), "fps": made.fps / 2, "drops": {"late": 100}})
    found = compare(made, more)
    assert [amount.name for amount in found.bigger] == ["memory bank, steady memory"]  # 7 % of what is read is noise
    assert found.worst == found.bigger[0] and isinstance(found.worst, Amount)
    assert any("memory in A alone: language model" in note for note in found.notes)


def test_energy_has_a_tolerance() -> None:
    made = Made(runs=3, sensors=True).profile()
    assert made.energy is not None
    for factor, names in ((1.05, []), (1.2, ["energy of a frame"])):
        energy = made.energy.model_copy(update={"per_frame": 0.31 * factor})
        assert [a.name for a in compare(made, made.model_copy(update={"energy": energy})).bigger] == names


# What is not comparable


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fingerprint": "ff"}, "different bundles"),
        ({"backend": "tensorrt"}, r"another backend \(cpu, then tensorrt\)"),
        ({"machine": {"title": "Another board"}}, "another machine"),
        ({"machine": {"cores": 12}}, "number of cores"),
        ({"machine": {"power_mode": "15W"}}, r"another power mode \(25W, then 15W\)"),
    ],
)
def test_what_is_not_comparable_is_refused_unless_forced(changed: dict[str, Any], words: str) -> None:
    made = Made(runs=2, frames=10, sensors=True).profile()
    if "machine" in changed:
        changed = {"machine": made.machine.model_copy(update=changed["machine"])}
    other = made.model_copy(update=changed)
    with pytest.raises(UsageError, match=words) as caught:
        compare(made, other)
    assert "--force" in str(caught.value)
    assert len(compare(made, other, force=True).forced) == 1


def test_smaller_differences_are_noted() -> None:
    made = Made(runs=2, frames=10).profile()
    hot = (Moment(t=0, resident=1, throttled=("gpu-throttle-alert",)),)
    stages = tuple(stage for stage in made.stages if stage.name != "scale")
    other = made.model_copy(
        update={
            "variant": "int8", "frames": 999, "command": "keepsight profile run tiny --threads 4", "timeline": hot,
            "dims": {"frames": 20, "queries": 32}, "stages": stages,
            "questions": tuple(q.model_copy(update={"tokens": 9, "text": "why?"}) for q in made.questions),
            "machine": made.machine.model_copy(update={"versions": {"onnxruntime": "1.21.0", "llama-cpp-python": "0.3.36"}}),
        }
    )  # fmt: skip
    notes = "\n".join(compare(made, other).notes)
    for words in (
        "variant (fp16, then int8)", "number of frames (20, then 999)", "number of threads (unknown, then 4)",
        "frames (10, then 20)", "version of onnxruntime", "stages in A alone: scale", "questions differ", "9 tokens",
        "B was throttled while it was measured: gpu-throttle-alert", "2 runs tell little",
    ):  # fmt: skip
        assert words in notes
    assert "queries" not in notes and "llama" not in notes


@pytest.mark.parametrize("threshold", [-0.1, 11, math.nan])
def test_a_threshold_that_makes_no_sense_is_refused(threshold: float) -> None:
    made = Made(runs=2, frames=5).profile()
    with pytest.raises(UsageError, match="threshold"):
        compare(made, made, threshold=threshold)


# The command


def test_the_command_names_the_worst_and_exits_16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for made, path in zip(pair({"vision": 1.2}, noise=QUIET), files, strict=True):
        write_profile(made, path)
    with pytest.raises(RegressionError, match=r"^vision is slower \(x 1\.[12]\d, 95 % interval .* of what frame takes") as caught:
        compare_command(*files, threshold=0.05, force=False, as_json=False)
    assert caught.value.exit_code == 16
    shown = capsys.readouterr().out
    assert "vision" in shown and "slower" in shown
    compare_command(files[0], files[0], threshold=0.05, force=False, as_json=False)


def test_a_slow_down_that_no_stage_shows_alone_is_named_with_what_adds_most(tmp_path: Path) -> None:
    """All stages vary so much that none is sure to be slower; the whole, made to vary less, is."""
    a, b = pair({"vision": 1.1, "step": 1.05}, seed=3, noise=Noise(sample=0.02, run=0, stage=0.06), runs=4)

    def steady(made: Profile, ms: float) -> Profile:
        whole = stage_of([ms + 0.01 * (index % 5) for index in range(240)], "frame")
        return made.model_copy(update={"stages": tuple(whole if s.name == "frame" else s for s in made.stages)})

    files = tmp_path / "a.json", tmp_path / "b.json"
    write_profile(steady(a, 30.0), files[0])
    write_profile(steady(b, 33.0), files[1])
    with pytest.raises(RegressionError, match=r"^frame is slower .* most of it in vision \(\+"):
        compare_command(*files)


def test_the_commands_json_is_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for made, path in zip(pair({"step": 1.4}, noise=QUIET, sensors=True), files, strict=True):
        write_profile(made, path)
    with pytest.raises(RegressionError):
        compare_command(*files, threshold=0.05, force=False, as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["regression"] and found["worst"] == "step" and found["slower"][0] == "step"
    assert {c["name"]: c["verdict"] for c in found["changes"]}["vision"] in ("same", "unclear")


def test_pairs_of_runs_are_students_paired_t() -> None:
    """By hand: medians 10, 20, 40 and 12, 22, 46 ms; the runs differ much from each other, the two of a pair hardly."""
    before = tuple(np.array([ms - 1, ms, ms + 1]) for ms in (10.0, 20.0, 40.0))
    after = tuple(np.array([ms - 1, ms, ms + 1]) for ms in (12.0, 22.0, 46.0))
    found = paired_gap(before, after, log=False)
    assert found is not None and found.difference == pytest.approx(10 / 3) and found.freedom == 2
    assert found.error == pytest.approx(math.sqrt(16 / 3 / 3), rel=1e-4)  # differences 2, 2, 6
    assert found.interval()[1] - found.difference == pytest.approx(4.30265 * found.error, rel=1e-4)
    ratio = paired_gap(before, after, log=True)
    assert ratio is not None and ratio.difference == pytest.approx(np.mean(np.log([1.2, 1.1, 1.15])))
    assert paired_gap(before, after[:2], log=True) is None and paired_gap(before[:1], after[:1], log=True) is None


def in_turns(slower: float) -> tuple[Profile, Profile]:
    """Both of 8 runs; each pair has a load of its own beside it, up to half as much again, and 1 % of noise for itself."""
    rng = np.random.default_rng(3)
    load = rng.uniform(1.0, 1.5, 8)

    def made(seed: int, factor: float) -> Profile:
        report = Made(seed=seed, runs=8, noise=Noise(run=0.0, stage=0.005)).profile()
        runs = {"frame": np.asarray(report.run_of_frame), "question": np.asarray(report.run_of_question)}
        stages = []
        for stage in report.stages:
            which = runs[stage.path]
            if len(which) != len(stage.samples):
                continue
            times = np.asarray(stage.samples) * load[which] * (factor if stage.name == "vision" else 1.0)
            stages.append(stage.model_copy(update={"samples": tuple(times), "statistics": Statistics.of(list(times))}))
        return report.model_copy(update={"stages": tuple(stages)})

    return made(1, 1.0), made(2, slower)


def test_pairs_find_on_a_machine_whose_load_drifts_what_unpaired_runs_do_not() -> None:
    a, b = in_turns(1.12)
    assert not compare(a, b).slower
    found = compare(a, b, paired=True)
    assert [change.name for change in found.slower][:1] == ["vision"]
    vision = next(change for change in found.changes if change.name == "vision")
    assert vision.low is not None and vision.high is not None and vision.low < 1.12 < vision.high < 1.2
    assert compare(*in_turns(1.0), paired=True)


@pytest.mark.parametrize(("runs", "others"), [(5, 4), (1, 1)])
def test_what_makes_no_pairs_is_refused(runs: int, others: int) -> None:
    with pytest.raises(UsageError, match=rf"^{runs} and {others} runs make no pairs\. Profile both in turns"):
        compare(Made(runs=runs).profile(), Made(runs=others).profile(), paired=True)
