"""A whole profile: of the shipped bundle with made-up sensors, from the command line, and of what can't be profiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime.cli import app
from keepsight.runtime.profiling.load import Setup
from keepsight.runtime.profiling.memory import peak_resident, process_use, resident, system_use
from keepsight.runtime.profiling.questions import Put
from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES, Moment, Profile, read_profile, schema, write_profile
from keepsight.runtime.profiling.run import Options, _played_over, profile
from keepsight.runtime.profiling.sampler import Sampler, moment_of
from keepsight.runtime.sensors import Power, PowerMode, Reading, Temperature
from keepsight.streams import write_video
from keepsight.streams.errors import KeepsightError, UsageError

from ...random_bundle import make_bundle, random_frames
from .made_reports import Made

QUESTIONS = (Put("what was the first shape?", "standing"), Put("is there a red circle?"))
ENVIRONMENT = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "130"}


class MadeUpSensors:
    """A board that takes 9 W, and slows down in every tenth reading."""

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> Reading:
        self.readings += 1
        return Reading(
            time.monotonic(),
            temperatures=(Temperature("gpu-thermal", 51.5),),
            powers=(Power("VDD_IN", 9.0, whole_board=True), Power("VDD_CPU_GPU_CV", 4.0)),
            gpu_hz=612e6, gpu_load=0.5, cpu_hz=(1.5e9, 0.5e9),
            throttled=("cpu-throttle-alert",) if self.readings % 10 == 9 else (),
        )  # fmt: skip

    def power_mode(self) -> PowerMode:
        return PowerMode("15W", 0)

    def clocks_locked(self) -> bool:
        return False


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, random_frames(12, size=240), fps=4)
    return path


@pytest.fixture(scope="module")
def found(clip: Path) -> Profile:
    """Of the shipped bundle: two runs of 15 frames of a clip of 12, with sensors, and vision against language model."""
    told: list[tuple[str, int, int]] = []
    options = Options(
        Setup("tiny", threads=1), str(clip), QUESTIONS, frames=15, warmup=2, runs=2, contention=0.3, idle_s=0.2, sensor_hz=10,
        command="keepsight profile run tiny",
    )  # fmt: skip
    made = profile(options, lambda what, done, of: told.append((what, done, of)), sensors=MadeUpSensors())
    assert [done for _, done, _ in told[1:-1]] == list(range(1, 2 * 19 + 1)) and {of for *_, of in told} == {38}
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights without a language model."""
    return make_bundle(tmp_path_factory.mktemp("bare") / "bundle")


def test_every_stage_is_there_and_they_add_up_in_every_sample(found: Profile) -> None:
    for path, chain, whole, count in (("frame", FRAME_STAGES, "frame", 30), ("question", QUESTION_STAGES, "answer", 4)):
        stages = [stage for stage in found.stages if stage.path == path and stage.name in chain]
        assert tuple(stage.name for stage in stages) == chain
        total = found.stage(whole, path)  # type: ignore[arg-type]
        assert total is not None
        np.testing.assert_allclose(np.sum([stage.samples for stage in stages], axis=0), total.samples)
        assert all(len(stage.samples) == count for stage in stages)
        assert min(min(stage.samples) for stage in stages) >= 0
    assert {stage.name: stage.inside for stage in found.stages if stage.inside} == {
        "visual_kv": "memory", "bank": "memory", "answer_graph": "qformer", "prompt": "qformer", "replay": "qformer",
        "llama_prefill": "prefill", "llama_tokens": "tokens",
    }  # fmt: skip


def test_every_sample_says_which_run_it_is_of(found: Profile) -> None:
    assert (found.runs, found.frames) == (2, 30)
    assert found.run_of_frame == (0,) * 15 + (1,) * 15 and found.run_of_question == (0, 0, 1, 1)
    assert found.fps > 0 and found.drops == {}


def test_each_question_has_its_answer_and_a_timeline(found: Profile) -> None:
    assert [(question.text, question.mode) for question in found.questions] == 2 * [(put.text, put.mode) for put in QUESTIONS]
    for question in found.questions:
        assert question.answer
        assert [name for name, *_ in question.stages] == ["qformer", "prefill", "first_token", "tokens"]
        ends = [start + ms for _, start, ms in question.stages]
        assert all(end <= start + 1e-6 for end, (_, start, _) in zip(ends, question.stages[1:], strict=False))
    token = found.stage("token", "question")
    assert token is not None and len(token.samples) == sum(question.tokens - 1 for question in found.questions)


def test_the_cold_start_is_told_step_by_step_apart_from_the_samples(found: Profile) -> None:
    names = [phase.name for phase in found.cold_start]
    assert names[:2] == ["import libraries", "open bundle"]
    assert {f"load {graph}" for graph in ("vision", "visual_kv", "step", "replay", "language model")} < set(names)
    assert names[-3:] == ["first frame", "first answer", "warm-up"]
    assert all(phase.ms >= 0 for phase in found.cold_start)


def test_memory_is_that_of_the_process_and_of_each_component(found: Profile) -> None:
    uses = {use.component: use for use in found.memory}
    assert uses["process"].basis == "read" and uses["process"].peak >= uses["process"].steady > 100e6
    assert {use.basis for name, use in uses.items() if name != "process"} == {"counted"}
    assert uses["language model"].steady > 200e6 and uses["language model's keys and values"].steady > 1e6
    assert uses["weights of vision"].steady > 5e6
    assert uses["visual memory"].steady > 11 * 49 * 1280 * 4  # its features alone
    assert uses["frame slots"].steady % (224 * 224 * 3) == 0 and uses["frame slots"].steady > 0
    assert uses["query memories"].steady > 0


def test_what_the_sensors_said_is_there_with_energy_and_throttling(found: Profile) -> None:
    assert found.machine.power_mode == "15W" and found.machine.clocks_locked is False
    assert found.timeline[0].t < found.timeline[-1].t and all(moment.resident > 0 for moment in found.timeline)
    moment = found.timeline[0]
    assert (moment.watts, moment.rails["VDD_CPU_GPU_CV"], moment.celsius["gpu-thermal"]) == (9.0, 4.0, 51.5)
    assert (moment.cpu_hz, moment.gpu_hz, moment.gpu_load) == (1e9, 612e6, 0.5)
    energy = found.energy
    assert energy is not None and (energy.meter, energy.idle_watts) == ("VDD_IN", 9.0)
    assert energy.per_frame is not None and energy.per_answer is not None
    assert energy.per_frame == pytest.approx(9.0 / found.fps, rel=1e-6)  # a steady 9 W
    assert energy.marginal_per_frame == pytest.approx(0, abs=1e-9) and energy.marginal_per_answer == pytest.approx(0, abs=1e-9)
    answers = found.stage("answer", "question")
    assert answers is not None and energy.per_answer >= 0.95 * 9.0 * answers.statistics.mean / 1000


def test_vision_and_language_model_are_measured_alone_and_at_once(found: Profile) -> None:
    contention = found.contention
    assert contention is not None
    for figures in (contention.frames_per_s, contention.tokens_per_s, contention.vision_ms, contention.token_ms):
        assert min(figures) > 0


def test_a_report_is_read_as_it_was_written_and_fits_its_schema(found: Profile, tmp_path: Path) -> None:
    write_profile(found, tmp_path / "report.json")
    again = read_profile(tmp_path / "report.json")
    assert again.run_of_frame == found.run_of_frame and again.machine == found.machine and again.questions[0].text
    for mine, theirs in zip(found.stages, again.stages, strict=True):
        np.testing.assert_allclose(mine.samples, theirs.samples, atol=6e-4)
    assert set(schema()["required"]) <= json.loads((tmp_path / "report.json").read_text()).keys()


def test_a_bundle_without_a_language_model_has_frames_alone(bare: Path, clip: Path) -> None:
    made = profile(Options(Setup(str(bare), threads=1), str(clip), frames=3, runs=1, idle_s=0.1), sensors=MadeUpSensors())
    assert made.language_model is None and made.questions == () and made.frames == 3
    assert made.stage("vision") is not None and made.stage("answer", "question") is None
    assert made.dims["memory_length"] == 4 and "No question was answered." in made.notes
    assert made.energy is not None and made.energy.per_answer is None


def test_a_live_source_drops_frames_and_says_how_old_they_are(bare: Path) -> None:
    options = Options(Setup(str(bare), threads=1), "test://ball", frames=2, warmup=0, runs=1, idle_s=0.1)
    made = profile(options, sensors=MadeUpSensors())
    assert set(made.drops) == {"replaced by a newer frame"}
    age = made.stage("capture_age")
    assert age is not None and len(age.samples) == 2 and made.stage("scale") is not None


def test_pictures_that_lie_ready_count_as_decoding(bare: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", random_frames(4))
    made = profile(Options(Setup(str(bare), threads=1), str(tmp_path / "frames.npy"), frames=6, warmup=1, runs=1))
    assert made.frames == 6 and made.stage("decode") is not None and made.stage("wait") is None


def test_a_source_that_ends_too_early_is_an_error(bare: Path, clip: Path) -> None:
    with pytest.raises(UsageError, match="ended after 12 frames, and 20 are to warm up"):
        profile(Options(Setup(str(bare), threads=1), f"{clip}?loop=1", frames=5, warmup=20, runs=1))
    with pytest.raises(UsageError, match="can't be measured"):
        profile(Options(Setup(str(bare)), str(clip), frames=0))


def test_a_source_without_any_frame_is_an_error(bare: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 24, 24, 3), np.uint8))
    with pytest.raises(KeepsightError, match="frame"):
        profile(Options(Setup(str(bare), threads=1), str(tmp_path / "none.npy")))


def test_contention_needs_a_language_model_which_is_told_before_anything_is_measured(bare: Path, clip: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="no language model to compete with"):
        options = Options(Setup(str(bare), threads=1), str(clip), frames=1, warmup=0, runs=1, contention=0.1)
        profile(options, lambda what, done, of: told.append(what))
    assert told == []


def test_only_files_are_played_over() -> None:
    assert _played_over("clip.mp4") == "clip.mp4?loop=0"
    assert _played_over("clip.mp4?loop=2") == "clip.mp4?loop=2"
    assert _played_over("clip.mp4?flip=horizontal") == "clip.mp4?flip=horizontal&loop=0"
    assert _played_over("test://ball") == "test://ball"


def test_throttling_is_a_note(found: Profile) -> None:
    slow = sum(bool(moment.throttled) for moment in found.timeline)
    assert 0 < slow < len(found.timeline)
    assert f"The machine was slowed down in {slow} of {len(found.timeline)} readings: cpu-throttle-alert." in found.notes


def test_a_sampler_reads_from_its_start_to_its_end() -> None:
    sensors = MadeUpSensors()
    with Sampler(sensors, hz=50, resident=lambda: 7) as sampler:
        while len(sampler.moments) < 3:
            time.sleep(0.01)
        end = time.perf_counter()
    assert len(sampler.moments) == sensors.readings >= 4
    assert sampler.moments[-1].t >= sampler.at(end) and {moment.resident for moment in sampler.moments} == {7}
    count = sensors.readings
    time.sleep(0.05)
    assert sensors.readings == count  # it has stopped


def test_a_reading_of_nothing_is_nothing() -> None:
    assert moment_of(Reading(0.0), 1.5, 3) == Moment(t=1.5, resident=3)


def test_resident_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "smaps_rollup").write_text("ab-cd ---p 00000000 00:00 0 [rollup]\nRss:   2048 kB\nPss:  1 kB\n")
    (tmp_path / "status").write_text("VmPeak:  9999 kB\nVmHWM:   4096 kB\nVmRSS: 1 kB\n")
    assert (resident(tmp_path), peak_resident(tmp_path)) == (2 << 20, 4 << 20)
    assert (resident(tmp_path / "none"), peak_resident(tmp_path / "none")) == (0, 0)
    held = np.ones(30 << 20, np.uint8)
    use = process_use([resident(), resident()], [Moment(t=0.0, resident=10**12)])
    assert use.peak == 10**12 and use.steady > held.nbytes


def test_what_the_whole_system_took_counts_from_before_loading() -> None:
    (use,) = system_use([900, 700, 300, 400, 420, 410])
    assert (use.steady, use.peak, use.basis) == (490, 600, "read")
    assert system_use([900]) == []
    assert system_use([900, 950, 950])[0].steady == 0  # somebody else gave memory back


# -- the command -------------------------------------------------------------------------------------------------------


def keepsight(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from keepsight.runtime.cli import main\nmain()", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip


def test_the_command_writes_a_report_and_prints_json_alone(bare: Path, clip: Path, tmp_path: Path) -> None:
    words = ["profile", "run", bare, clip, "--frames", "3", "--runs", "1", "--threads", "1"]
    done = keepsight(*words, "--out", tmp_path / "a.json", "--json")
    assert done.returncode == 0, done.stderr
    printed = Profile.model_validate_json(done.stdout)
    written = read_profile(tmp_path / "a.json")
    assert printed.made_at == written.made_at and printed.bundle == "random"
    assert written.command.startswith("keepsight profile run ") and "--frames 3" in written.command
    shown = keepsight(*words)
    assert shown.returncode == 0 and "vision" in shown.stdout and "ms" in shown.stdout


def test_the_schema_is_printed() -> None:
    done = CliRunner().invoke(app, ["profile", "schema"])
    assert done.exit_code == 0 and json.loads(done.stdout) == schema()


def test_two_reports_are_compared_by_the_command_and_its_exit_code_tells(tmp_path: Path) -> None:
    write_profile(Made(seed=1).profile(), tmp_path / "a.json")
    write_profile(Made(seed=2, factors={"vision": 1.5}).profile(), tmp_path / "b.json")
    assert keepsight("profile", "compare", tmp_path / "a.json", tmp_path / "a.json").returncode == 0
    done = keepsight("profile", "compare", tmp_path / "a.json", tmp_path / "b.json", "--threshold", "0.1", "--json")
    assert done.returncode == 16 and done.stderr.startswith("keepsight: vision is slower")
    assert json.loads(done.stdout)["worst"] == "vision"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nothing-here", "clip.mp4"], 3, "clip.mp4"),
        (["no-such-bundle"], 8, "no-such-bundle"),
        (["tiny", "--questions", "none.txt"], 2, "none.txt can't be read"),
        (["tiny", "--out", "no/such/folder/report.json"], 2, "can't be written"),
        (["tiny", "--urgent"], 2, "--urgent is of a GPU's stream"),
    ],
)
def test_users_mistakes_have_their_exit_code_and_say_what_is_wrong(words: list[str], code: int, said: str) -> None:
    error = CliRunner().invoke(app, ["profile", "run", *words]).exception
    assert isinstance(error, KeepsightError) and error.exit_code == code and said in str(error)


def test_passwords_are_not_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from keepsight.runtime.profiling.cli import _typed

    source = "rtsp://ann:secret@10.0.0.5/door"
    monkeypatch.setattr(sys, "argv", ["keepsight", "profile", "run", "tiny", source, "--runs", "2"])
    assert _typed(source) == "keepsight profile run tiny 'rtsp://ann:***@10.0.0.5/door' --runs 2"
