"""The page stands on its own, shows every section that the report has figures for, escapes all text, and stays small."""

from __future__ import annotations

import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepsight.runtime.profiling import svg
from keepsight.runtime.profiling.outline import blocks, figures, makeup, rows, throttled
from keepsight.runtime.profiling.page import page
from keepsight.runtime.profiling.report import Layer, Machine, MemoryUse, Moment, Phase, Profile, Stage, Statistics

from .made_reports import FRAME_MS, QUESTION_MS, Made

EVIL = "<script>alert('x')</script>&\"<img src=x onerror=y>"


class Reader(html.parser.HTMLParser):
    """What is in a page: its elements, the attributes that could fetch something, and whether all is closed in order."""

    OPTIONAL = frozenset({"th", "td", "tr", "meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset") or name.startswith("on")]
        if tag not in self.OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)]


REPORTS = {
    "with sensors": lambda: Made(sensors=True).profile(),
    "without": lambda: Made().profile(),
    "one frame": lambda: Made(runs=1, frames=1, questions=1).profile(),
    "frames alone": lambda: Made(runs=1, frames=9, questions=0).profile(
        timeline=(), memory=(), cold_start=(), language_model=None
    ),
    "all alike": lambda: Made(runs=1, frames=5).profile(stages=tuple(_constant(s) for s in Made(runs=1).profile().stages)),
}


def _constant(stage: Any) -> Any:
    return stage.model_copy(update={"samples": (0.0,) * 5, "statistics": stage.statistics.of((0.0,) * 5)})


@pytest.mark.parametrize("kind", REPORTS)
def test_the_page_is_whole_and_fetches_nothing(kind: str) -> None:
    text = page(REPORTS[kind]())
    found = Reader(text)
    assert not found.open and not found.fetched
    assert "script" not in found.tags and "link" not in found.tags and "@import" not in text and "url(" not in text
    assert "http://" not in text and "https://" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text) and "inf" not in re.findall(r"[\w.]+", text)


@pytest.mark.parametrize("kind", REPORTS)
def test_every_plot_has_a_title_and_says_in_words_what_it_shows(kind: str) -> None:
    for picture in pictures(page(REPORTS[kind]())):
        if picture.get("aria-hidden") == "true":
            continue
        names = (picture.get("aria-labelledby") or "").split()
        assert picture.get("role") == "img" and len(names) == 2
        assert [child.get("id") for child in picture[:2]] == names
        assert [child.tag for child in picture[:2]] == ["title", "desc"] and all(child.text for child in picture[:2])


def test_ids_are_unique() -> None:
    ids = re.findall(r' id="([^"]+)"', page(Made(sensors=True).profile()))
    assert len(ids) == len(set(ids)) > 20


def test_all_sections_are_there() -> None:
    made = Made(sensors=True).profile(notes=("a note",))
    text = " ".join(Reader(page(made)).text)
    for words in (
        "keepsight-tiny", "A made-up board", "25W", "2026-01-02 03:04:05 UTC", "a note", "Throttled for 7.0 s",
        "Where a frame's time goes",
        "Timeline of a question", "Every question", "Spread of each stage", "Memory", "Temperature", "Clocks",
        "Energy", "block 11",
        "Vision and language model at once", "Cold start", "All numbers", "keepsight profile run tiny", "1.20.1",
        made.fingerprint, "memory bank", *FRAME_MS, *QUESTION_MS,
    ):  # fmt: skip
        assert words in text, words


def test_what_a_report_does_not_have_has_no_section() -> None:
    text = " ".join(Reader(page(REPORTS["frames alone"]())).text)
    for words in (
        "Timeline",
        "Memory",
        "Power",
        "Energy",
        "Layers",
        "at once",
        "Cold start",
        "Throttled",
        "power mode",
        "JetPack",
    ):
        assert words not in text, words


def evil_report() -> Profile:
    made = Made(runs=1, frames=4, questions=2, sensors=True).profile()
    machine = Machine(
        title=EVIL, processor=EVIL, cores=1, memory=1, system=EVIL, l4t=EVIL, jetpack=EVIL, power_mode=EVIL, gpu=EVIL,
        versions={EVIL: EVIL},
    )  # fmt: skip
    assert made.energy is not None
    texts = dict.fromkeys(("bundle", "source", "command", "made_at", "variant", "backend", "memory_policy", "keepsight"), EVIL)
    return made.model_copy(
        update={
            **texts, "language_model": EVIL, "fingerprint": EVIL, "machine": machine, "dims": {EVIL: EVIL}, "notes": (EVIL,),
            "drops": {EVIL: 1},
            "cold_start": (Phase(name=EVIL, ms=1.0),), "energy": made.energy.model_copy(update={"meter": EVIL}),
            "questions": tuple(
                q.model_copy(update={"text": EVIL, "answer": EVIL, "stages": ((EVIL, 0.0, 1.0),)}) for q in made.questions
            ),
            "memory": (MemoryUse(component=EVIL, steady=1, peak=1, basis="read"),),
            "timeline": tuple(
                Moment(t=t, resident=1, watts=1.0, rails={EVIL: 2.0}, celsius={EVIL: 3.0}, throttled=(EVIL,)) for t in (0.0, 1.0)
            ),
            "layers": (Layer(engine=EVIL, name=EVIL, block=EVIL, ms=1.0),),
            "stages": tuple(s.model_copy(update={"name": EVIL, "inside": EVIL}) if s.inside else s for s in made.stages),
        }
    )  # fmt: skip


def test_all_text_is_escaped() -> None:
    text = page(evil_report())
    found = Reader(text)
    assert "script" not in found.tags and "img" not in found.tags and not found.fetched and not found.open
    assert "".join(found.text).count("<script>alert") > 25  # as words, not as an element
    pictures(text)


def test_a_hundred_thousand_frames_and_hours_make_no_large_page() -> None:
    made = Made(runs=1, frames=100_000, questions=20, sensors=True, frame_ms={"vision": 18.0, "memory": 1.4}).profile()
    moments = tuple(Moment(t=t / 2, resident=t, watts=5 + t % 7, celsius={"a": t % 50}) for t in range(20_000))
    layers = tuple(
        Layer(engine="vision", name=f"/blocks.{i}/layer with a long name " * 3, block=f"b{i // 9}", ms=0.1) for i in range(3000)
    )
    text = page(made.model_copy(update={"timeline": moments, "layers": layers, "questions": made.questions * 50}))
    assert len(text.encode()) < 300_000
    assert "The first 20 of 600" in text


def test_no_peak_of_memory_is_lost_in_a_long_run() -> None:
    moments = tuple(Moment(t=float(t), resident=500_000_000 if t == 7777 else 100_000_000) for t in range(10_000))
    text = page(Made(runs=1, frames=3).profile(timeline=moments))
    assert "most: 500 MB after 7777.0 s" in text
    plot = next(p for p in pictures(text) if "Resident" in (p[0].text or ""))
    line = next(e for e in plot if e.get("class", "").startswith("line")).get("d", "")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert min(heights) < 0.5 * np.median(heights)


# What is shown


def test_the_bars_add_up_to_the_time_at_the_percentile() -> None:
    made = Made(runs=1, frames=2000).profile()
    whole = made.stage("frame")
    assert whole is not None
    for percentile in (50, 95):
        total = sum(ms for _, ms in makeup(made, "frame", percentile))
        assert total == pytest.approx(float(np.percentile(whole.samples, percentile)), rel=0.03)
    sums = sum(np.asarray(stage.samples) for name in FRAME_MS if (stage := made.stage(name)) is not None)
    assert np.asarray(sums) == pytest.approx(np.asarray(whole.samples), abs=0.01)


def test_stages_come_in_the_order_of_the_chain_with_their_parts() -> None:
    found = [(row.stage.name, row.depth) for row in rows(Made().profile(), "frame")]
    names = [*FRAME_MS]
    names.insert(names.index("memory") + 1, "visual_kv")
    assert found == [("frame", 0)] + [(name, 2 if name == "visual_kv" else 1) for name in names]
    assert rows(Made().profile(), "question")[-1].stage.name == "time_to_first_token"


def test_layers_are_summed_by_engine_and_block() -> None:
    layers = [("vision", "b0", 1.0), ("vision", "b0", 3.0), ("vision", "b1", 1.0), ("step", "b0", 5.0)]
    made = Made(runs=1, frames=2).profile(
        layers=tuple(Layer(engine=engine, name=f"{ms}", block=block, ms=ms) for engine, block, ms in layers)
    )
    assert [(b.engine, b.name, b.ms, [layer.ms for layer in b.layers]) for b in blocks(made)] == [
        ("vision", "b0", 4.0, [3.0, 1.0]), ("vision", "b1", 1.0, [1.0]), ("step", "b0", 5.0, [5.0]),
    ]  # fmt: skip


def test_throttling_is_told_in_spans() -> None:
    reasons: list[tuple[str, ...]] = [(), ("a",), ("a",), ("b", "a"), (), ("a",)]
    moments = tuple(Moment(t=float(t), resident=1, throttled=why) for t, why in enumerate(reasons))
    made = Made(runs=1, frames=2).profile(timeline=moments)
    assert throttled(made) == [(1.0, 3.0, "a"), (3.0, 4.0, "a, b"), (5.0, 5.0, "a")]


# The plots' own arithmetic


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    found = svg.ticks(low, high, most)
    assert 1 <= len(found) <= most
    slack = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 1:
        step = (found[-1] - found[0]) / (len(found) - 1)
        assert np.diff(found) == pytest.approx(step, rel=1e-5)
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-4


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (4.5, "4.5"), (12345.6, "12346"), (100, "100"), (-2.345, "-2.35")]
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert svg.rounded(value) == text


@pytest.mark.parametrize("words", ["vision", "x" * 400, "为什么" * 40, ""])
def test_a_name_is_cut_to_its_room(words: str) -> None:
    cut = svg.fit(words, 100)
    assert cut == words or (cut.endswith("…") and words.startswith(cut[:-1]))
    wide = sum(12 if ord(letter) > 0x2E80 else 0.63 * 12 for letter in cut)
    assert wide <= 100


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.001, 1e5), min_size=2, max_size=12))
def test_names_of_marks_and_numbers_of_axes_never_overlap(samples: list[float]) -> None:
    values = np.asarray(samples)
    counts, edges = np.histogram(values, bins=10)
    marks = tuple((f"p{p}", float(np.percentile(values, p))) for p in (50, 95))
    picture = ElementTree.fromstring(svg.columns(counts.tolist(), edges[0], edges[-1], marks, "t", "d"))
    boxes: dict[str, list[tuple[float, float]]] = {}
    for text in picture.iter("text"):
        wide = 0.63 * 12 * len(text.text or "")
        x = float(text.get("x", "")) - {"start": 0.0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "start")]
        assert x >= -1 and x + wide <= 241
        boxes.setdefault(text.get("y", ""), []).append((x, x + wide))
    for line in boxes.values():
        line.sort()
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(line)), line


def test_a_frame_that_waits_in_a_queue_is_told_without_that_too() -> None:
    """Not the difference of the medians: the median of what each frame took without its own waiting."""
    made = Made(runs=1, frames=3).profile()

    def made_of(name: str, samples: tuple[float, ...]) -> Stage:
        return Stage(name=name, path="frame", samples=samples, statistics=Statistics.of(samples))

    waiting = made.model_copy(update={"stages": (made_of("wait", (80.0, 10.0, 60.0)), made_of("frame", (90.0, 100.0, 61.0)))})
    assert dict(figures(waiting))["of it no waiting"] == "10 ms"  # of 10, 90 and 1
    fast = made.model_copy(update={"stages": (made_of("wait", (1.0, 1.0, 1.0)), made_of("frame", (90.0, 100.0, 61.0)))})
    assert dict(figures(fast))["a frame, p95"] == "99 ms" and "of it no waiting" not in dict(figures(fast))
