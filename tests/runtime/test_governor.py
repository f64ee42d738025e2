"""The governor: when steps are taken and taken back, what presses, and a live session that does less and then all again.

Sensors are doubles that play a script: this machine has no thermal zone to heat.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from keepsight.runtime import sensors
from keepsight.runtime.answer import FrameCost
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.governor import governor as governor_module
from keepsight.runtime.governor.governor import CAUSES, Cause, Governor, Limits, Pressure, Step, Transition
from keepsight.runtime.governor.live import CoreUse, LiveGovernor
from keepsight.runtime.governor.pressure import Gauge, Load
from keepsight.runtime.governor.steps import DEFAULT_STEPS, Knob, Knobs, parse_steps
from keepsight.runtime.live.cameras import CameraWatcher
from keepsight.runtime.sensors.reading import Reading, Temperature
from keepsight.runtime.session import Session
from keepsight.runtime.standing import Change
from keepsight.streams import Frame
from keepsight.streams.capture import Arrivals
from keepsight.streams.errors import LLMError, UsageError
from keepsight.streams.events import Event, State

from ..random_bundle import make_bundle, random_frames

STEPS = parse_steps("on")
MB = 1 << 20


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(governor: Governor, clock: Clock, pressures: Sequence[Pressure], every_s: float = 1.0) -> list[int]:
    """The level after each look."""
    levels = []
    for pressure in pressures:
        levels.append(governor.observe(pressure))
        clock.now += every_s
    return levels


def made(steps: Sequence[Step] = STEPS, limits: Limits | None = None) -> tuple[Governor, Clock]:
    clock = Clock()
    return Governor(steps, limits or Limits(), clock), clock


def presses(*causes: Cause) -> Pressure:
    return Pressure({cause: f"too much {cause}" for cause in causes})


# -- the state machine -----------------------------------------------------------------------------------------------


def test_heat_takes_its_steps_soon_and_gives_them_back_late_one_at_a_time() -> None:
    governor, clock = made()
    levels = run(governor, clock, [presses("heat")] * 20 + [Pressure()] * 80)
    assert levels[:3] == [0, 0, 0] and levels[3] == 1  # after 3 s
    assert levels[7] == 1 and levels[8] == 2  # no two changes within 5 s
    assert [step.name for step, _, _ in governor.on] == [] and max(levels) == 2  # the other steps do not help against heat
    assert levels.index(1, 9) == 20 + 30 and levels.index(0, 20) == 20 + 60  # calm for 30 s, each
    kinds = [(one.kind, str(one.step), one.cause) for one in governor.transitions]
    assert kinds == [
        ("degraded", "rate=1/2", "heat"), ("degraded", "rate=1/4", "heat"), ("exhausted", "None", "heat"),
        ("recovered", "rate=1/4", "heat"), ("recovered", "rate=1/2", "heat"),
    ]  # fmt: skip


def test_what_trembles_around_a_limit_moves_nothing() -> None:
    governor, clock = made()
    over, near = presses("memory"), Pressure(near={"memory": "close"})
    assert set(run(governor, clock, [over, near] * 100)) == {0}  # never long enough
    assert run(governor, clock, [over] * 4)[-1] == 1
    assert set(run(governor, clock, [near] * 500)) == {1}  # never calm
    assert set(run(governor, clock, ([Pressure()] * 25 + [near]) * 4)) == {1}  # never calm for long enough
    assert run(governor, clock, [Pressure()] * 31)[-1] == 0


def test_a_step_that_is_needed_again_and_again_stays_longer_each_time() -> None:
    governor, clock = made()
    stays = []
    for _ in range(7):
        while governor.observe(presses("cpu")) == 0:
            clock.now += 1
        start = clock.now
        while governor.observe(Pressure()) > 0:
            clock.now += 1
        stays.append(clock.now - start)
    assert stays == [30, 60, 120, 240, 480, 480, 480]
    clock.now += 10_000
    governor.observe(Pressure())
    run(governor, clock, [presses("cpu")] * 4)
    start = clock.now
    while governor.observe(Pressure()) > 0:
        clock.now += 1
    assert clock.now - start == 30  # long forgotten


def test_each_cause_takes_the_steps_that_help_against_it_and_names_itself() -> None:
    wanted = {"heat": ["rate=1/2", "rate=1/4"], "backlog": ["rate=1/2", "rate=1/4"], "memory": ["context=1/2", "memory=1/2"],
              "cpu": ["threads=1/2", "threads=1"]}  # fmt: skip
    for cause in CAUSES:
        governor, clock = made()
        run(governor, clock, [presses(cause)] * 30)
        assert [(step.name, by, why) for step, by, why in governor.on] == [
            (name, cause, f"too much {cause}") for name in wanted[cause]
        ]


def test_metrics_count_steps_by_cause_and_seconds_at_each_level() -> None:
    governor, clock = made()
    run(governor, clock, [presses("memory")] * 10 + [Pressure()] * 80)
    metrics = governor.metrics()
    assert metrics["level"] == 0 and metrics["levels"] == 6 and metrics["on"] == []
    assert metrics["degraded"] == {"heat": 0, "memory": 2, "backlog": 0, "cpu": 0} and metrics["recovered"] == 2
    assert metrics["seconds_at_level"][:3] == [22.0, 35.0, 32.0] and sum(metrics["seconds_at_level"]) == 89.0
    json.dumps(metrics)


def test_every_transition_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Transition] = []
    for tell, levels in ((None, ["WARNING", "INFO"]), (told.append, ["INFO", "INFO"])):
        clock = Clock()
        caplog.clear()
        with caplog.at_level(logging.INFO, "keepsight.governor"):
            run(Governor(STEPS, Limits(), clock, tell), clock, [presses("cpu")] * 4 + [Pressure()] * 40)
        assert [record.levelname for record in caplog.records] == levels  # on the screen once, whoever puts it there
    assert [record.getMessage() for record in caplog.records] == [str(one) for one in told]
    assert [str(one) for one in told] == [
        "[governor 1] threads=1/2 on, cpu: too much cpu", "[governor 0] threads=1/2 off, cpu: calm for 30 s"
    ]  # fmt: skip


def test_steps_and_times_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        Governor([*STEPS, STEPS[0]])
    with pytest.raises(UsageError, match="nothing"):
        Governor([Step("nap", frozenset())])
    with pytest.raises(UsageError, match="times"):
        Governor(STEPS, Limits(dwell_s=-1))


causes = st.sets(st.sampled_from(CAUSES))
moments = st.builds(lambda over, near: (over, near - over), causes, causes)
scripts = st.lists(st.tuples(moments, st.integers(1, 40)), min_size=1, max_size=12)
step_lists = st.lists(
    st.sets(st.sampled_from(CAUSES), min_size=1).map(frozenset), min_size=0, max_size=5
).map(lambda sets: [Step(f"step {index}", against) for index, against in enumerate(sets)])  # fmt: skip


def pressure_of(moment: tuple[set[Cause], set[Cause]]) -> Pressure:
    return Pressure(*({cause: cause for cause in group} for group in moment))


@settings(max_examples=300, deadline=None)
@given(steps=step_lists, script=scripts)
def test_whatever_presses_the_level_moves_by_one_and_comes_home(steps, script) -> None:
    """At most one step per dwell time, always within its range, and back to 0 after calm, however things were before."""
    governor, clock = made(steps)
    pressures = [pressure_of(moment) for moment, seconds in script for _ in range(seconds)]
    levels = run(governor, clock, pressures)
    assert all(0 <= level <= len(steps) for level in levels)
    changes = [index for index, (a, b) in enumerate(zip([0, *levels], levels, strict=False)) if a != b]
    assert all(abs(levels[index] - (levels[index - 1] if index else 0)) == 1 for index in changes)
    assert all(later - earlier >= 5 for earlier, later in pairwise(changes))
    assert len({step.name for step, _, _ in governor.on}) == governor.level
    for step, cause, _ in governor.on:
        assert cause in step.against
    assert sum(governor.metrics()["seconds_at_level"]) == max(0, len(pressures) - 1)
    calm = run(governor, clock, [Pressure()] * (1 + 30 * 16 * max(1, len(steps))))
    assert calm[-1] == 0 and calm == sorted(calm, reverse=True)


@settings(max_examples=300, deadline=None)
@given(steps=step_lists, less=moments, more=causes, seconds=st.integers(1, 120))
def test_more_pressure_is_never_answered_with_less(steps, less, more, seconds) -> None:
    """Of two pressures that last, the one that holds all of the other and more is at least as high at any time."""
    over, near = less
    first, second = made(steps), made(steps)
    low = run(*first, [pressure_of((over, near))] * seconds)
    high = run(*second, [pressure_of((over | more, near - more))] * seconds)
    assert all(a <= b for a, b in zip(low, high, strict=True))


@settings(max_examples=100, deadline=None)
@given(script=scripts)
def test_it_never_flaps(script) -> None:
    """A step that went off comes back no sooner than it takes to press, and went off no sooner than it takes to be calm."""
    governor, clock = made()
    run(governor, clock, [pressure_of(moment) for moment, seconds in script for _ in range(seconds)])
    went_on: dict[str, float] = {}
    for one in governor.transitions:
        if one.kind == "degraded":
            went_on[str(one.step)] = one.time_s
        if one.kind == "recovered":
            assert one.time_s - went_on[str(one.step)] >= 30


# -- what presses ----------------------------------------------------------------------------------------------------


def warm(celsius: float, throttles_at: float | None = 99.0, **rest: object) -> Reading:
    return Reading(0.0, (Temperature("cpu-thermal", 40.0, 99.0), Temperature("gpu-thermal", celsius, throttles_at)), **rest)  # type: ignore[arg-type]


def room(available: int, total: int = 8000 * MB) -> Reading:
    return Reading(0.0, memory_total=total, memory_available=available)


CPU = Load(cores=4, threads=4, full_threads=4)


@pytest.mark.parametrize(
    ("reading", "load", "over", "near"),
    [
        (Reading(0.0), Load(), {}, {}),  # no sensors, nothing seen yet
        (warm(97.5), Load(), {"heat": "gpu-thermal at 98 C, throttles at 99 C"}, {}),
        (warm(93.0), Load(), {}, {"heat": "gpu-thermal at 93 C"}),
        (warm(91.9), Load(), {}, {}),
        (warm(200.0, None), Load(), {}, {}),  # where it throttles is not said
        (warm(45.0, 30.0), Load(), {}, {}),  # a trip that firmware left as it was
        (warm(50.0, throttled=("cpu-throttle-alert",)), Load(), {"heat": "throttled (cpu-throttle-alert)"}, {}),
        (room(200 * MB), Load(), {"memory": "210 MB available; the floor is 336 MB"}, {}),
        (room(400 * MB), Load(), {}, {"memory": "419 MB available"}),
        (room(600 * MB), Load(), {}, {}),
        (room(600 * MB), Load(need_bytes=300 * MB), {"memory": "of which 315 MB may be needed"}, {}),
        (room(600 * MB), Load(full_bytes=300 * MB), {}, {"memory": "629 MB available"}),
        (room(200 * MB, 1000 * MB), Load(), {"memory": "the floor is 268 MB"}, {}),
        (room(1500 * MB, 64000 * MB), Load(), {}, {"memory": "the floor is 1.1 GB"}),
        (Reading(0.0), Load(frame_s=0.95), {"backlog": "a frame takes 0.95 s, with 1 s between frames"}, {}),
        (Reading(0.0), Load(frame_s=0.8), {}, {"backlog": "a frame takes"}),
        (Reading(0.0), Load(frame_s=0.6), {}, {}),
        (Reading(0.0), Load(frame_s=0.8, interval_s=2.0, milder_s=1.0), {}, {"backlog": "a frame takes"}),
        (Reading(0.0), Load(frame_s=0.6, interval_s=2.0, milder_s=1.0), {}, {}),
        (Reading(0.0), Load(frame_s=0.2, age_s=3.1), {"backlog": "a frame was 3.1 s old"}, {}),
        (Reading(0.0), Load(frame_s=0.2, age_s=2.9), {}, {}),
        (Reading(0.0), Load(frame_s=0.2, dropped=2), {"backlog": "2 frames dropped"}, {}),
        (Reading(0.0), replace(CPU, others=0.5), {"cpu": "other processes keep 0.5 of 4 cores busy"}, {}),
        (Reading(0.0), replace(CPU, others=0.3), {}, {"cpu": "the language model wants 4"}),
        (Reading(0.0), replace(CPU, others=0.1), {}, {}),
        (Reading(0.0), replace(CPU, others=2.0, threads=2), {}, {"cpu": "wants 2"}),  # would be over again at full
        (Reading(0.0), replace(CPU, others=4.0, threads=1), {}, {"cpu": "wants 1"}),  # none waits for another
        (Reading(0.0), replace(CPU, others=0.0, threads=9, full_threads=9), {}, {}),  # as its user wants it
        (Reading(0.0), replace(CPU, others=4.0, threads=0, full_threads=0), {}, {}),  # no language model
    ],
)  # fmt: skip
def test_pressures(reading: Reading, load: Load, over: dict[str, str], near: dict[str, str]) -> None:
    pressure = Gauge().pressure(reading, load)
    assert pressure.over.keys() == over.keys() and pressure.near.keys() == near.keys()
    for told, wanted in ((pressure.over, over), (pressure.near, near)):
        for cause, why in wanted.items():
            assert why in told[cause]  # type: ignore[index]


def test_swap_that_fills_presses_and_swap_that_is_full_does_not() -> None:
    gauge = Gauge()

    def at(second: int, used: int) -> Pressure:
        return gauge.pressure(Reading(float(second), swap_total=4000 * MB, swap_free=(4000 - used) * MB), Load())

    assert not any(at(second, 3000).over for second in range(20))
    found = [at(20 + second, 3000 + 5 * second) for second in range(20)]  # 5 MB a second: another process leaks
    assert [bool(pressure.over) for pressure in found] == [second >= 7 for second in range(20)]
    assert "swap grew by" in found[-1].over["memory"]
    after = [at(40 + second, 3095) for second in range(15)]
    assert not after[-1].over and not after[-1].near


def test_a_prefill_of_many_times_its_usual_time_counts_for_a_while() -> None:
    gauge, load = Gauge(), Load(threads=2, full_threads=2)

    def at(second: int, row_s: float | None, threads: int = 2) -> Pressure:
        return gauge.pressure(Reading(float(second)), replace(load, prefill_row_s=row_s, threads=threads))

    assert not at(0, 9.0).over  # what is usual is not known yet
    gauge = Gauge()
    for second, row_s in enumerate((0.002, 0.001, 0.001)):
        assert not at(second, row_s).over
    assert not at(3, 0.004).over
    assert "took 100 times its usual time" in at(4, 0.15).over["cpu"]
    assert at(13, None).over and not at(15, None).over
    assert at(16, 0.15).over and not at(17, None, threads=1).over


def proc_stat(root: Path, busy: dict[int, int]) -> None:
    (root / "proc").mkdir(exist_ok=True)
    lines = [f"cpu{core} {ticks} {ticks} {ticks} 999999 5 0 0 0 0 0" for core, ticks in busy.items()]
    (root / "proc/stat").write_text("\n".join(["cpu  1 1 1 1 1 0 0 0 0 0", *lines, "intr 1 2 3"]))


def test_cores_that_others_keep_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    now, own = [100.0], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "times", lambda: os.times_result((own[0], 0.0, 0.0, 0.0, 0.0)))
    proc_stat(tmp_path, {0: 1000, 1: 1000, 2: 5})
    use = CoreUse(tmp_path)
    assert use.cores == 2 and use.others() is None
    hertz = os.sysconf("SC_CLK_TCK")
    proc_stat(tmp_path, {0: 1000 + hertz // 2, 1: 1000, 2: 50_000})  # 1.5 s of core 0; core 2 is not ours
    now[0], own[0] = 102.0, 0.5
    assert use.others() == pytest.approx(0.5, abs=0.02)  # (1.5 - 0.5) / 2
    (tmp_path / "proc/stat").unlink()
    assert use.others() is None


# -- steps as they are spelled ---------------------------------------------------------------------------------------


def test_steps_are_spelled_in_order() -> None:
    steps = parse_steps(" rate=0.5, memory=10,context = 1024,rate=1/4,answer=8 ")
    assert [(step.knob, step.of(20)) for step in steps] == [
        ("rate", 10), ("memory", 10), ("context", 1024), ("rate", 5), ("answer", 8)
    ]  # fmt: skip
    assert parse_steps("off") == () and len(parse_steps("on")) == 6


def test_the_page_names_the_steps_and_causes_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs/governor.md").read_text()
    assert f"`on` is `{DEFAULT_STEPS}`" in page
    assert all(f"| `{cause}` |" in page for cause in CAUSES) and all(f"| `{knob}=" in page for knob in get_args(Knob))


@pytest.mark.parametrize(
    "spelling",
    ["", "fast", "rate", "rate=2", "rate=1", "rate=0", "speed=1/2", "memory=1.5", "memory=0", "memory=-3", "threads=1/0",
     "on,off", "rate=1/4,rate=1/2", "context=512,context=512"],
)  # fmt: skip
def test_steps_that_make_no_sense_are_refused(spelling: str) -> None:
    with pytest.raises(UsageError, match="--governor"):
        parse_steps(spelling)


# -- a session whose knobs are turned --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def session(path: Path) -> Iterator[Session]:
    with Session(Bundle.open(path)) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny_session() -> Iterator[Session]:
    with Session(Bundle.open("tiny"), threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def full(tiny_session: Session) -> Knobs:
    """As things are before any test."""
    return Knobs([tiny_session])


@pytest.fixture
def tiny(tiny_session: Session, full: Knobs) -> Iterator[Session]:
    tiny_session.forget()
    yield tiny_session
    full.turn((), [0.25])


def see(session: Session, seconds: Sequence[float]) -> None:
    size = session.bundle.manifest.dims.image_size
    rng = np.random.default_rng(0)
    for index, time_s in enumerate(seconds):
        session.see(Frame(rng.integers(0, 255, (size, size, 3), dtype=np.uint8), time_s, time.monotonic(), index))


def test_what_cannot_be_taken_here_is_refused_with_a_reason(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    governor = LiveGovernor(session, STEPS, Script([Reading(0.0)]), tell=told.append)
    assert [step.name for step in governor.governor.steps] == ["rate=1/2", "memory=1/2", "rate=1/4"]
    assert {str(step): why for step, why in governor.refused.items()} == dict.fromkeys(
        ["threads=1/2", "threads=1", "context=1/2"], "there is no language model"
    )
    assert told[0] == "[governor] without threads=1/2: there is no language model"
    assert told[-1].startswith("[governor] no sensor here tells") and len(told) == 4
    monkeypatch.setattr(type(session.qformer), "bank_on", "device")
    usable, refused, _ = Knobs([session]).sorted_out(parse_steps("rate=1/2,memory=2"))
    assert [str(step) for step in usable] == ["rate=1/2"] and "on the GPU" in refused[parse_steps("memory=2")[0]]


def test_steps_that_change_nothing_here_are_left_out(tiny: Session) -> None:
    usable, refused, idle = Knobs([tiny]).sorted_out(
        parse_steps("threads=1/2,threads=1,memory=10,memory=9,context=4096,context=1024,context=128,answer=99,answer=3")
    )
    assert [str(step) for step in usable] == ["threads=1/2", "memory=9", "context=1024", "answer=3"]
    assert [str(step) for step in idle] == ["threads=1", "memory=10", "context=4096", "answer=99"]
    assert [str(step) for step in refused] == ["context=128"]
    assert "a question and its answer may take" in next(iter(refused.values()))


def test_knobs_turn_down_and_back(tiny: Session) -> None:
    knobs = Knobs([tiny])
    standing = tiny.stand("what color is the shape?")
    see(tiny, [index / 4 for index in range(16)])
    assert tiny.frames_seen == 16
    steps = parse_steps("threads=1,rate=1/2,context=1/2,memory=1/2,answer=2")
    assert knobs.turn([(step, "memory") for step in steps], [0.25])
    assert tiny.llm.n_threads == 1 and tiny.llm.n_ctx == 1024
    see(tiny, [4 + index / 4 for index in range(16)])
    assert tiny.frames_seen == 24  # every other frame
    assert tiny.qformer.bank.used == 6 and standing.carried.bank.used == 6
    answer = tiny.ask("what color is the shape?").result
    assert answer.trace.tokens <= 2
    assert answer.as_dict()["level"] == 5 and answer.as_dict()["degraded"][1] == "rate=1/2 (memory)"
    ranked = tiny.rank(standing, ["red", "green"])
    assert ranked.as_dict()["level"] == 5
    change = Change(1, "a", "b", None, None, 0.0, 1, ranked.trace, ranked.degraded)
    assert change.as_dict()["degraded"] == list(tiny.degraded) and change.as_dict()["level"] == 5
    assert knobs.turn((), [0.25])
    assert tiny.llm.n_threads == 2 and tiny.llm.n_ctx == 2048 and tiny.answer_tokens is None
    see(tiny, [8 + index / 4 for index in range(16)])
    assert tiny.frames_seen == 40 and tiny.qformer.bank.used == 11
    plain = tiny.ask(standing).result.as_dict()
    assert "level" not in plain and "degraded" not in plain
    assert tiny.calendar.tolerance_s == 0.5  # some of what is remembered lies so far apart
    tiny.forget()
    assert tiny.calendar.tolerance_s == 0.25


def test_a_context_waits_for_an_answer_that_is_being_written(tiny: Session) -> None:
    see(tiny, [0.0])
    script = Script([Reading(0.0, memory_total=8000 * MB, memory_available=8000 * MB)])
    clock = Clock()
    governor = LiveGovernor(tiny, parse_steps("context=1024"), script, clock=clock, limits=Limits(degrade_after_s=0))
    writing = tiny.ask("what color is the shape?")
    next(writing)
    script.readings = [Reading(0.0, memory_total=8000 * MB, memory_available=100 * MB)]
    assert governor.look() == 1 and tiny.llm.n_ctx == 2048
    assert writing.result.text
    assert governor.look() == 1 and tiny.llm.n_ctx == 1024
    governor.close()


def test_a_knob_that_will_not_turn_is_told_once_and_tried_again(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    full = Reading(0.0, memory_total=8000 * MB, memory_available=100 * MB)
    limits, clock = Limits(degrade_after_s=0), Clock()
    governor = LiveGovernor(tiny, parse_steps("context=1024"), Script([full]), clock=clock, limits=limits, tell=told.append)
    resize = tiny.llm.resize

    def fails(_: int) -> bool:
        raise LLMError("no context today")

    monkeypatch.setattr(tiny.llm, "resize", fails)
    assert [governor.look() for _ in range(3)] == [1, 1, 1]
    assert [line for line in told if "today" in line] == ["[governor] no context today"]
    monkeypatch.setattr(tiny.llm, "resize", resize)
    governor.look()
    assert tiny.llm.n_ctx == 1024


# -- live ------------------------------------------------------------------------------------------------------------


class Script:
    """Sensors that play readings, and stay at the last."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)

    def read(self) -> Reading:
        reading = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        return replace(reading, time_s=time.monotonic())


HEALTHY = Reading(
    0.0, (Temperature("cpu-thermal", 50.0, 99.0),), memory_total=8000 * MB, memory_available=6000 * MB, swap_total=0
)
HOT = replace(HEALTHY, temperatures=(Temperature("cpu-thermal", 98.0, 99.0),))
FULL = replace(HEALTHY, memory_available=100 * MB)
QUICK = Limits(degrade_after_s=0.2, dwell_s=0.1, recover_after_s=0.6, patience=1, crowding_over=99, crowding_near=99,
               late_over=99, late_near=99, age_s=99, prefill_over=1e9)  # fmt: skip


@dataclass
class Hogs:
    """What keeps cores busy."""

    busy: float
    cores: int = 2

    def others(self) -> float:
        return self.busy


def until(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_live_session_gets_hot_and_full_and_recovers(tiny: Session) -> None:
    """From a camera, with questions all the way: fewer frames, a shorter bank and context, and all of it back."""
    script, told = Script([HEALTHY]), []
    steps = parse_steps("rate=1/4,memory=1/2,context=1/2")
    standing = tiny.stand("what shape is it?")
    source = tiny.source("test://ball?fps=30")
    with (
        tiny.watch(source) as watcher,
        LiveGovernor(tiny, steps, script, limits=QUICK, every_s=0.05, tell=told.append) as governor,
    ):
        times: list[float] = []
        tiny.observe(lambda _, frame: times.append(frame.time_s))
        watcher.wait(14, 60)
        assert tiny.ask(standing).result.degraded == () and governor.metrics()["level"] == 0

        script.readings = [HOT]
        until(lambda: tiny.degraded == ("rate=1/4 (heat)",))
        hot_from = len(times)
        until(lambda: len(times) >= hot_from + 5)
        assert min(np.diff(times[hot_from + 2 :])) > 0.9  # a frame a second, not four
        assert "rate=1/4, heat: cpu-thermal at 98 C" in "\n".join(governor.status())
        hot = tiny.ask("what color is the shape?").result
        assert hot.text and hot.as_dict()["level"] == 1

        script.readings = [FULL]
        until(lambda: tiny.llm.n_ctx == 1024 and tiny.qformer.bank.used <= 6 and standing.carried.bank.used <= 6)
        full = tiny.ask(standing).result
        assert full.text and {"memory=1/2 (memory)", "context=1/2 (memory)"} <= set(full.degraded)

        script.readings = [HEALTHY]
        until(lambda: tiny.degraded == ())
        cool_from = len(times)
        until(lambda: tiny.qformer.bank.used > 6 and len(times) > cool_from + 8)
        assert np.median(np.diff(times[cool_from + 1 :])) < 0.9
        assert tiny.llm.n_ctx == 2048
        assert tiny.ask("what color is the shape?").result.degraded == ()
        metrics = governor.metrics()
        assert metrics["degraded"] == {"heat": 1, "memory": 2, "backlog": 0, "cpu": 0} and metrics["recovered"] == 3
        assert not governor.blind and told[0].startswith("[governor 1] rate=1/4 on, heat: cpu-thermal at 98 C")


def test_an_encoder_that_is_late_remembers_less_often_and_stays_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame takes three of the bundle's intervals: a quarter of the frames is what it can do, and no more is tried."""
    encode, interval_s = session.qformer.encode, 1 / session.bundle.manifest.sample_fps
    monkeypatch.setattr(session.qformer, "encode", lambda images: (time.sleep(3 * interval_s), encode(images))[1])
    limits = replace(QUICK, late_over=0.9, late_near=0.7)
    governor = LiveGovernor(session, parse_steps("rate=1/2,rate=1/4"), Script([HEALTHY]), limits=limits, every_s=0.02)
    with session.watch(session.source("test://ball?fps=30")), governor:
        until(lambda: governor.governor.level == 2)
        assert {cause for _, cause, _ in governor.governor.on} == {"backlog"}
        until(lambda: governor.governor.since_s > 3 * limits.recover_after_s)
        assert governor.governor.level == 2  # a frame would not fit into half the time


def test_cameras_that_share_an_encoder_are_late_together(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 0.4 of its interval: two fit, three do not."""
    interval_s = 1 / session.bundle.manifest.sample_fps
    sessions = [session, session.beside(), session.beside()]
    monkeypatch.setattr(Session, "cost", FrameCost(400 * interval_s, 0.0, 0.0))
    for count, over in ((2, False), (3, True)):
        governor = LiveGovernor(sessions[:count], parse_steps("rate=1/2"), Script([HEALTHY]))
        for one in sessions[:count]:
            see(one, [one.time_s + 1.0])
        load = governor.load()
        assert load.frame_s == pytest.approx(0.4 * count * interval_s)
        assert ("backlog" in Gauge().pressure(Reading(0.0), load).over) == over


class Feed:
    """A camera of one frame, which is already so old when it is let go, with frames every 2 s; it has dropped some."""

    state: State = "live"
    arrivals = Arrivals(9, None, 2.0, None, None)

    def __init__(self, age_s: float, dropped: int) -> None:
        self.age_s, self.drops = age_s, Counter({"replaced": dropped})
        self.events: list[Event] = []
        self.let_go = threading.Event()

    def latest(self, timeout_s: float | None = None) -> Frame | None:
        if not self.let_go.wait(0.01):
            return None
        self.let_go.clear()
        return Frame(random_frames(1, seed=0)[0], 0.0, time.monotonic() - self.age_s, 0)

    def close(self) -> None: ...


def test_of_several_cameras_age_drops_and_rate_are_seen(session: Session) -> None:
    """The oldest frame counts, what all have dropped, and the rate of cameras that are slower than the bundle asks."""
    sessions = {"door": session, "yard": session.beside()}
    feeds = {"test://ball": Feed(0.2, 2), "test://snow": Feed(7.0, 3)}
    uris = dict(zip(sessions, feeds, strict=True))
    with CameraWatcher(sessions, uris, open_feed=lambda uri, **_: feeds[uri]) as watcher:
        governor = LiveGovernor(list(sessions.values()), parse_steps("rate=1/2"), Script([HEALTHY]))
        for feed in feeds.values():
            feed.let_go.set()
        watcher.wait(1, 30)
        load = governor.load()
        assert load.dropped == 5 and governor.load().dropped == 0
        assert load.age_s is not None and 7.0 <= load.age_s < 60
        assert load.interval_s == 2.0
        assert "a frame was" in Gauge().pressure(Reading(0.0), load).over["backlog"]
        feeds["test://snow"].drops["replaced"] += 4
        assert governor.load().dropped == 4


def test_processes_that_take_the_cores_leave_one_thread_to_the_language_model(tiny: Session) -> None:
    see(tiny, [0.0])
    clock = Clock()
    governor = LiveGovernor(tiny, parse_steps("threads=1"), Script([HEALTHY]), clock=clock)
    text = tiny.ask("what color is the shape?").result.text
    for hogs, seconds, wanted in ((0.0, 10, 2), (2.0, 10, 1), (0.5, 200, 1), (0.0, 40, 2)):
        governor._cores = Hogs(hogs)  # type: ignore[assignment]
        for _ in range(seconds):
            clock.now += 1
            governor.look()
        assert tiny.llm.n_threads == wanted
        assert tiny.ask("what color is the shape?").result.text == text
    assert governor.metrics()["degraded"]["cpu"] == governor.metrics()["recovered"] == 1


def test_a_governor_that_closes_turns_all_to_full(session: Session) -> None:
    with LiveGovernor(session, parse_steps("rate=1/2,memory=1/2"), Script([FULL]), limits=QUICK, every_s=0.02):
        until(lambda: session.qformer.limit == 2)
    assert session.qformer.limit == 4 and session.degraded == ()


# -- the command line ------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "from keepsight.runtime.cli import main; main()"]


def keepsight(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120, env=environment)


def test_run_shows_its_status() -> None:
    result = keepsight("run", "test://ball", "--threads", "1", stdin="/status\nwhat color is the shape?\n")
    assert result.returncode == 0, result.stderr
    assert re.search(r"level \d of \d, for \d+ s", result.stderr) and "without threads" not in result.stderr
    assert "GB available" in result.stderr
    assert result.stdout.strip()
    result = keepsight("run", "test://ball", "--threads", "1", "--governor", "off", stdin="/status\n")
    assert "no governor: start without --governor off" in result.stderr and "[governor" not in result.stderr


def test_steps_that_are_misspelled_are_one_line_and_an_exit_code() -> None:
    for command in (("run", "test://ball"), ("watch", "test://ball", "--question", "what?")):
        result = keepsight(*command, "--governor", "rate=7")
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert "rate=7" in result.stderr


def test_a_hot_board_is_told_in_the_summary_of_a_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "Sensors", lambda: Script([HOT]))
    monkeypatch.setattr(governor_module, "Limits", lambda: replace(QUICK, degrade_after_s=0.0))
    asked = ["test://ball", "--question", "what color?", "--every", "0", "--seconds", "3", "--json", "--governor", "rate=1/2"]
    result = CliRunner().invoke(app, ["watch", *asked, "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "[governor 1] rate=1/2 on, heat: cpu-thermal at 98 C, throttles at 99 C" in result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["governor"]["level"] == 1 and summary["governor"]["degraded"]["heat"] == 1
