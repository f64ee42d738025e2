"""Stages on moments that are made up: each link is its own time, what is left over is `other`, and all of it adds up."""

from __future__ import annotations

import pytest

from keepsight.runtime.answer import Answer, FrameCost, LatencyTrace
from keepsight.runtime.language.llm import Answer as Written
from keepsight.runtime.language.llm import Perf
from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES
from keepsight.runtime.profiling.stages import Sample, frame_sample, question_sample, stages_of
from keepsight.streams.timing import PictureTimes

TIMES = PictureTimes(100.0, 100.010, 100.012, 100.015, 100.020, 100.021, 100.022, held_ms=3.0)


def frame(run: int = 0, **changes: object) -> Sample:
    usual = {
        "times": TIMES, "asked": 100.005, "got": 100.0225, "remembered": 100.060, "cost": FrameCost(25.0, 4.0, 8.0),
        "graphs": {"vision": 24.5, "visual_kv": 3.0, "step": 7.5},
    }  # fmt: skip
    return frame_sample(run, **{**usual, **changes})  # type: ignore[arg-type]


def question(run: int = 0, *, written: Written | None = None, live: bool = False) -> Sample:
    trace = LatencyTrace(30.0, 0.0, 0.0, 9.0, 0.0, 100.0, 112.0, 151.0, 3, 0.0)
    answer = Answer("red", "what?", "replay", 1.0, 4, "eog", trace)
    written = written or Written(
        text="red", finish="eog", tokens=3, prefill_s=0.1, first_token_s=0.101, token_s=(0.001, 0.012, 0.011, 0.013)
    )
    graphs = {"prompt": 0.5, "replay": 8.0, "answer": 0.0}
    return question_sample(
        run, answer=answer, written=written, total_ms=152.0, graphs=graphs, perf=Perf(98.0, 40, 33.0, 3), live=live
    )


def test_a_frames_links_and_what_is_left_over_are_its_way_from_the_decoder_to_remembered() -> None:
    sample = frame()
    assert sample.whole == pytest.approx(60)
    assert sample.links == pytest.approx(
        {"decode": 7.0, "scale": 4.0, "copy": 1.0, "wait": 10.0, "vision": 25.0, "memory": 4.0, "step": 8.0}
    )
    assert sample.other == pytest.approx(1.0)


def test_pictures_that_lay_ready_count_from_when_they_were_asked_for() -> None:
    sample = frame(times=None)
    assert sample.whole == pytest.approx(55)
    assert sample.links["decode"] == pytest.approx(17.5) and "wait" not in sample.links
    assert sample.other == pytest.approx(55 - 17.5 - 37)


def test_graphs_are_told_inside_their_stage_and_the_bank_is_what_is_left_of_the_memory() -> None:
    assert frame().parts == {"visual_kv": ("memory", 3.0), "bank": ("memory", 1.0)}
    timed = frame(graphs={"vision": 24.5, "vision_device": 22.0, "visual_kv": 3.0, "memory": 0.9, "memory_device": 0.7})
    assert timed.parts == {
        "vision_device": ("vision", 22.0), "visual_kv": ("memory", 3.0), "memory_graph": ("memory", 0.9),
        "memory_graph_device": ("memory", 0.7), "bank": ("memory", 1.0),
    }  # fmt: skip


def test_an_answers_links_are_the_q_former_the_prefill_and_the_tokens() -> None:
    sample = question()
    assert sample.links == pytest.approx({"qformer": 9.0, "prefill": 100.0, "first_token": 1.0, "tokens": 36.0})
    assert sample.other == pytest.approx(6.0)
    assert sample.tokens == pytest.approx((12.0, 11.0, 13.0))
    assert sample.beside == {"time_to_first_token": 112.0}
    assert question(live=True).beside["capture_age"] == 30.0
    assert sample.parts["llama_prefill"] == ("prefill", 98.0) and sample.parts["llama_tokens"] == ("tokens", 33.0)
    assert sample.parts["answer_graph"] == ("qformer", 0.0)  # `answer` is the whole path


def test_a_beam_search_is_all_first_token() -> None:
    sample = question(written=Written(text="red", finish="eog", tokens=3, prefill_s=0.1, first_token_s=0.14))
    assert sample.links["first_token"] == pytest.approx(40.0) and sample.links["tokens"] == 0 and sample.tokens == ()


def test_stages_come_in_the_order_of_the_chain_one_sample_a_frame_and_add_up_sample_by_sample() -> None:
    frames = stages_of([frame(), frame(1, remembered=100.090), frame(1, graphs={})], "frame")
    links = [stage for stage in frames if stage.name in FRAME_STAGES]
    assert frames[0].name == "frame" and tuple(stage.name for stage in links) == FRAME_STAGES
    for index, whole in enumerate(frames[0].samples):
        assert sum(stage.samples[index] for stage in links) == pytest.approx(whole)
    assert all(len(stage.samples) == 3 for stage in frames)
    kept = {stage.name: stage for stage in frames if stage.inside}
    assert set(kept) == {"visual_kv", "bank"} and kept["visual_kv"].samples == (3.0, 3.0, 0.0)

    answers = stages_of([question(), question(1)], "question")
    links = [stage for stage in answers if stage.name in QUESTION_STAGES]
    assert tuple(stage.name for stage in links) == QUESTION_STAGES
    assert sum(stage.samples[0] for stage in links) == pytest.approx(answers[0].samples[0])
    token = next(stage for stage in answers if stage.name == "token")
    assert len(token.samples) == 6 and token.statistics.n == 6


def test_names_are_unique_so_that_reports_can_be_compared_by_them() -> None:
    graphs = {name + end: 1.0 for name in ("vision", "step", "visual_kv", "memory") for end in ("", "_device")}
    for stages in (stages_of([frame(graphs=graphs)], "frame"), stages_of([question()], "question")):
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        assert {stage.clock for stage in stages if stage.name.endswith("_device")} <= {"device"}


def test_no_sample_no_stage() -> None:
    assert stages_of([], "question") == []
