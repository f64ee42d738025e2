"""The study's short cut, every frame encoded once for all memories, says what `keepsight eval` says; its statistics are right."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from keepsight.export.glitches import CONDITIONS, see_through
from keepsight.export.memory_study import Encoded, Laboratory, Unit, majority, mcnemar, measure, paired, past, summary, wilson
from keepsight.export.weights import INDEX, WEIGHTS, load_qformer
from keepsight.runtime import Session
from keepsight.runtime.evaluation.datasets import open_dataset
from keepsight.runtime.evaluation.evaluate import evaluate
from keepsight.runtime.manifest import write_manifest
from keepsight.streams.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def lab():
    return Laboratory(seed=3)


def test_the_study_answers_as_eval_does(lab):
    def clips():
        return open_dataset("easy-vqa-stream", limit=8, seed=5, scenes=4, fps=4.0, size=224)

    with Session(lab.bundle, memory="fifo", threads=1, llm=lab.llm) as session:
        official = {mode: [result.right for result in evaluate(session, clips(), mode)] for mode in ("replay", "standing")}
        ours = {"replay": [], "standing": []}
        for clip in clips():
            memory = lab.memory("fifo")
            standing = [memory.stand(question) for question in clip.questions]
            with session.source(str(clip.path)) as source:
                for frame in source:
                    memory.see(Encoded(np.array(session.qformer.encode(frame.image[None])[0]), False), frame.time_s)
            for question, carried in zip(clip.questions, standing, strict=True):
                ours["replay"].append(lab.right(memory.qformer.replay(memory.prompt_of(question.text)), question))
                ours["standing"].append(lab.right(carried.answer(), question))
    assert ours == official
    assert 2 <= sum(official["replay"]) <= 8


def test_what_glitches_hold_is_what_they_were_merged_into(lab):
    """One grey frame among many of two scenes: it is unlike everything, so it keeps its slot, in every token."""
    memory = lab.memory("mbc")
    grey = lab.encoded(("still", (128, 128, 128)))
    looks = [lab.encoded(("held", take, look)) for take in (0, 30) for look in range(12)]
    for index, frame in enumerate([*looks[:12], grey, *looks[12:]]):
        memory.see(frame, 0.25 * index, disturbed=frame is grey)
    assert memory.glitch_share() == pytest.approx(1 / memory.qformer.bank.slots)
    assert grey.flat and not looks[0].flat
    memory.forget()
    memory.see(looks[0], 0.0)
    assert memory.glitch_share() == 0


def test_a_stream_is_the_same_each_time_and_its_prefix_ends_where_a_scene_stands_alone(lab):
    scenes, keys, ends = lab.stream(2, 12)
    again = lab.stream(2, 12)
    assert (scenes, keys, ends) == again
    for scene, end in zip(scenes, ends, strict=True):
        assert keys[end][0] == "held" and lab.takes[keys[end][1]] == scene.picture
    assert np.array_equal(lab.encoded(keys[0]).features, lab.encoded(keys[0]).features)
    assert all(question.answer for question in lab.questions(scenes[:5], 2))


def test_a_unit_gives_a_row_per_setting(lab):
    rows = measure(lab, Unit("replay", 0, 5, ("mbc", "last"), asked=3))
    assert [(row["policy"], row["scenes"], len(row["right"])) for row in rows] == [("mbc", 5, 3), ("last", 5, 3)]


@pytest.fixture
def fifo(lab, tmp_path):
    """The shipped bundle, saying that it was trained for another policy."""
    folder = tmp_path / "fifo"
    shutil.copytree(lab.bundle.path, folder)
    manifest = lab.bundle.manifest.model_copy(update={"provenance": {"memory": "fifo"}})
    write_manifest(folder, manifest)
    return folder


def test_weights_of_a_policy_s_own_are_read_from_its_bundle(lab, fifo):
    index = json.loads((fifo / INDEX).read_text())["parameters"]["llm_proj.weight"]
    with (fifo / WEIGHTS).open("r+b") as file:
        file.seek(index["offset"])
        file.write(bytes(np.dtype(index["dtype"]).itemsize * math.prod(index["shape"])))  # zeros
    write_manifest(fifo, lab.bundle.manifest.model_copy(update={"provenance": {"memory": "fifo"}}))
    own = Laboratory(3, {"fifo": fifo})
    softs = []
    for memory in (own.memory("fifo", "own"), own.memory("fifo")):
        memory.see(own.encoded(("held", 0, 0)), 0.0)
        softs.append(memory.qformer.replay(memory.prompt_of("what color is the shape?")))
        assert memory.qformer.policy == "fifo"
    bias = load_qformer(lab.bundle.path).llm_proj.bias.detach().numpy()
    np.testing.assert_allclose(softs[0].rows, np.broadcast_to(bias, softs[0].rows.shape), atol=1e-5)
    assert np.abs(softs[1].rows - bias).max() > 0.1
    with pytest.raises(UsageError, match="no weights were given that are trained for last"):
        own.memory("last", "own")


def test_a_unit_s_rows_say_whose_weights_they_are_of(lab, fifo):
    """The copy's weights are the shipped ones: so are its answers."""
    (own,) = measure(Laboratory(3, {"fifo": fifo}), Unit("replay", 0, 5, ("fifo",), asked=2, weights="own"))
    (shipped,) = measure(lab, Unit("replay", 0, 5, ("fifo",), asked=2))
    assert own == {**shipped, "weights": "own"} and shipped["weights"] == "shipped"


def test_weights_that_can_t_be_compared_are_refused(lab, fifo):
    with pytest.raises(BundleError, match=r"was trained for fifo, not for average.*--policy average"):
        Laboratory(3, {"average": fifo})
    with pytest.raises(BundleError, match="was trained for mbc, not for fifo"):
        Laboratory(3, {"fifo": lab.bundle.path})
    manifest = lab.bundle.manifest
    other = manifest.decoding.model_copy(update={"max_tokens": 3})
    write_manifest(fifo, manifest.model_copy(update={"provenance": {"memory": "fifo"}, "decoding": other}))
    with pytest.raises(BundleError, match="more than the Q-Former's weights"):
        Laboratory(3, {"fifo": fifo})


def test_answers_are_paired_where_both_were_asked():
    row = {"stream": 1, "scenes": 5, "kinds": ["first", "present", "count"], "answers": ["red", "no", "two"], "right": "101"}
    fewer = {**row, "kinds": ["first", "present"], "answers": ["red", "no"], "right": "01"}
    elsewhere = {**row, "stream": 2}
    assert paired([row, elsewhere], [fewer]) == ([True], [False])
    assert paired([row], [{**row, "right": "110"}]) == ([True, True], [True, False])
    assert paired([row], [elsewhere]) == ([], [])
    with pytest.raises(ValueError, match="other questions"):
        paired([row], [{**fewer, "answers": ["blue", "no"]}])


def test_conditions_disturb_as_they_say():
    rng = np.random.default_rng(0)
    for name, shots_of in CONDITIONS.items():
        shots = shots_of(3000, rng)
        share = sum(shot.disturbed for shot in shots) / len(shots)
        assert sorted({shot.frame for shot in shots}) == list(range(3000)), name
        assert shots[-1].still is None
        wanted = {"undisturbed": 0, "day and night": 0, "infrared, middle third": 1 / 3, "lamp on and off": 0.5,
                  "grey, 1 frame in 50": 1 / 51, "flicker, 1 frame in 10": 0.1}.get(name, 1 / 11)  # fmt: skip
        assert share == pytest.approx(wanted, abs=0.03), name


def test_views_brighten_and_take_the_color_away():
    image = np.full((2, 2, 3), (100, 50, 0), np.uint8)
    assert see_through(image, ("gain", 2.0)).tolist()[0][0] == [200, 100, 0]
    assert see_through(image, ("gain", 9.0)).max() == 255
    night = see_through(image, ("infrared", 1.0))
    assert (night == 85).all()  # 0.4 * 100 + 0.4 * 50 + 25


def test_intervals_and_tests_are_those_of_the_textbooks():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert mcnemar([True] * 6 + [False], [False] * 6 + [True]) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_a_summary_counts_the_past_alone():
    rows = [{"kinds": ["first", "present", "first", "count"], "answers": ["red", "yes", "blue", "two"], "right": "1101"}]
    assert past(rows) == [True, False, True]
    cell = summary(rows)
    assert (cell["right"], cell["asked"]) == (2, 3) and cell["by_kind"]["present"] == [1, 1]
    assert majority(rows) == pytest.approx(2 / 3)
    assert math.isclose(cell["low"], wilson(2, 3)[0])


def test_a_gate_takes_glitches_out_of_the_slots_and_has_a_row_only_where_it_refused_a_frame(lab):
    rows = measure(lab, Unit("glitches", 1, 6, asked=1))
    shares = {(row["condition"], row["gate"]): row["glitch_share"] for row in rows}
    assert {condition for condition, _ in shares} == set(CONDITIONS)
    assert shares["grey, 1 frame in 10", False] > 0 == shares["grey, 1 frame in 10", True]
    assert ("undisturbed", True) not in shares and shares["undisturbed", False] == 0
