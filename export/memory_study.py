"""How long memories hold: accuracy of every policy on streams of 5 to 320 scenes, and what glitch frames do to the memory.

Policies are compared with the shipped weights, which were trained for `mbc`, and each with its own: those that
`keepsight train --policy` made for it.

Perception is most of the cost of an evaluation, so each frame is encoded once and every memory reads the same features; the
rest is the deployed path: `QFormer`, its banks and standing questions, and llama.cpp's answers. A test holds it against
`keepsight eval`. Scenes come from takes (a test picture, one camera, twelve looks) that recur in a stream; no take is held
twice in a row. Work is cut into units, one stream each, that processes take up side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keepsight.export.glitches import CONDITIONS, Shot, View, see_through
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.datasets import Question, picture_pixels, stream_questions
from keepsight.runtime.evaluation.scenes import Camera, Scene, expose, frame_count, plan_scenes
from keepsight.runtime.graphs.backends import open_engines
from keepsight.runtime.language.llm import render as render_prompt
from keepsight.runtime.live.gate import flat
from keepsight.runtime.memory import MemoryBank, Policy
from keepsight.runtime.qformer import Prompt, QFormer, SoftPrompt, StandingQuestion
from keepsight.runtime.session import load_llm
from keepsight.streams.errors import BundleError, UsageError

LENGTHS = (5, 20, 80, 320)
GLITCH_SCENES = 40
FRAME_S = 0.25
TAKES, LOOKS = 6, 12  # takes of each shape and color, looks of a take
KEPT_VIEWS = 2000  # encoded frames of other views that are kept

Float32 = NDArray[np.float32]
Key = tuple[Any, ...]
Weights = Literal["shipped", "own"]
"""Whose weights a memory is read with: the shipped ones, or those trained for its policy."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A frame's features float32 `[N, C]`, and whether a gate would refuse it."""

    features: Float32
    flat: bool


class Laboratory:
    """The bundle's graphs and language model, the takes, and their frames, each encoded when it is first seen.

    Args:
        seed: of streams and questions.
        own: bundles with weights of their own, by the policy that they were trained for.

    Raises:
        BundleError: one of `own` was trained for another policy, or differs from the shipped one in more than weights.
    """

    def __init__(self, seed: int, own: Mapping[Policy, Path] | None = None) -> None:
        self.seed = seed
        self.bundle = Bundle.open("tiny")
        self.engines = open_engines(self.bundle, threads=1)
        self._own_bundles = {policy: _trained_for(policy, path, self.bundle) for policy, path in (own or {}).items()}
        self._own_engines = {policy: open_engines(bundle, threads=1) for policy, bundle in self._own_bundles.items()}
        self.llm = load_llm(self.bundle, 1)
        self._encoder = QFormer(self.bundle, engines=self.engines)
        by_label: dict[tuple[str, str], list[easyvqa.Picture]] = {}
        for picture in easyvqa.pictures("test"):
            by_label.setdefault((picture.shape, picture.color), []).append(picture)
        rng = np.random.default_rng([seed, 1])
        self.takes = [some[k] for some in by_label.values() for k in rng.permutation(len(some))[:TAKES]]
        self._take_of = {picture.path: take for take, picture in enumerate(self.takes)}
        self._own: dict[Any, list[tuple[str, str]]] = {}
        for row in easyvqa.load("test"):
            self._own.setdefault(row.picture.path, []).append((row.question, row.answer))
        self._cameras: dict[int, Camera] = {}
        self._encoded: dict[Key, Encoded] = {}

    # -- streams ---------------------------------------------------------------------------------------------------

    def stream(self, number: int, scenes: int) -> tuple[list[Scene], list[Key], list[int]]:
        """Scenes, a key for every frame, and the index of each scene's last frame that shows it alone."""
        rng = np.random.default_rng([self.seed, 5, number])
        plan = plan_scenes(self.takes, scenes, rng)
        keys: list[Key] = []
        ends: list[int] = []
        takes = [self._take_of[scene.picture.path] for scene in plan]
        for place, scene in enumerate(plan):
            keys += [("held", takes[place], int(look)) for look in rng.permutation(LOOKS)[: scene.hold]]
            ends.append(len(keys) - 1)
            keys += [("fade", takes[place], takes[place + 1], step, scene.fade) for step in range(scene.fade)]
        assert len(keys) == frame_count(plan)
        return plan, keys, ends

    def questions(self, scenes: Sequence[Scene], number: int) -> list[Question]:
        """Two rounds of a stream's questions at its end, those that came twice once."""
        rng = np.random.default_rng([self.seed, 6, number, len(scenes)])
        rounds = [stream_questions(scenes, self._own[scenes[-1].picture.path], rng) for _ in range(2)]
        return list({question.text: question for asked in rounds for question in asked}.values())

    # -- frames ----------------------------------------------------------------------------------------------------

    def encoded(self, key: Key, view: View | None = None) -> Encoded:
        """Features of a stream's frame, or of a still level `("still", level)`."""
        name = (key, view)
        if name not in self._encoded:
            image = self._pixels(key)
            image = image if view is None else see_through(image, view)
            made = Encoded(np.array(self._encoder.encode(image[None])[0]), flat(image) is not None)
            if key[0] == "fade" or (view is not None and len(self._encoded) > len(self.takes) * LOOKS + KEPT_VIEWS):
                return made
            self._encoded[name] = made
        return self._encoded[name]

    def _pixels(self, key: Key) -> NDArray[np.uint8]:
        if key[0] == "still":
            return np.full((224, 224, 3), key[1], np.uint8)
        rng = np.random.default_rng([self.seed, 3, *key[1:]])
        camera = self._camera(key[1], rng)
        if key[0] == "held":
            return expose(camera.look(), camera)
        share = (key[3] + 1) / (key[4] + 1)
        return expose(camera.look() * (1 - share) + self._camera(key[2], rng).look() * share, camera)

    def _camera(self, take: int, rng: np.random.Generator) -> Camera:
        """The take's camera, its tremor and noise drawn from `rng`."""
        if take not in self._cameras:
            own = np.random.default_rng([self.seed, 2, take])
            self._cameras[take] = Camera(picture_pixels(self.takes[take]), self.bundle.manifest.dims.image_size, own)
        self._cameras[take].rng = rng
        return self._cameras[take]

    # -- answers ---------------------------------------------------------------------------------------------------

    def memory(self, policy: Policy, weights: Weights = "shipped") -> Memory:
        """An empty memory over the laboratory's graphs.

        Raises:
            UsageError: the laboratory has no weights of the policy's own.
        """
        if weights == "shipped":
            return Memory(self, QFormer(self.bundle, memory=policy, engines=self.engines))
        if policy not in self._own_bundles:
            raise UsageError(f"no weights were given that are trained for {policy}.", fix="Give a bundle: --own POLICY=FOLDER.")
        return Memory(self, QFormer(self._own_bundles[policy], memory=policy, engines=self._own_engines[policy]))

    def right(self, soft: SoftPrompt, question: Question) -> bool:
        """Whether the language model's answer to a soft prompt is an exact match."""
        manifest = self.bundle.manifest
        decoding = manifest.decoding
        written = self.llm.generate(
            render_prompt(manifest.templates.llm, video=soft.rows, question=question.text), max_tokens=decoding.max_tokens,
            stop=decoding.stop, beams=decoding.beams, repetition_penalty=decoding.repetition_penalty,
        )  # fmt: skip
        return "".join(written).strip().lower() == question.answer.strip().lower()


def _trained_for(policy: Policy, path: Path, shipped: Bundle) -> Bundle:
    bundle = Bundle.open(path)
    said, ours = bundle.manifest, shipped.manifest
    trained = said.provenance.get("memory", "mbc")
    if trained != policy:
        raise BundleError(f"{path} was trained for {trained}, not for {policy}.", fix=f"keepsight train --policy {policy}")
    same = (said.files["vision.onnx"], said.dims, said.templates, said.decoding, said.llm)
    if same != (ours.files["vision.onnx"], ours.dims, ours.templates, ours.decoding, ours.llm):
        raise BundleError(f"{path} differs from the shipped bundle in more than the Q-Former's weights: they can't be compared.")
    return bundle


class Memory:
    """One memory under study: a visual bank, its standing questions, and a shadow bank that says how much of a slot is glitch."""

    def __init__(self, lab: Laboratory, qformer: QFormer) -> None:
        self.lab, self.qformer = lab, qformer
        self.prompt_of = cache(self._prompt_of)
        bank = qformer.bank
        self._shadow = MemoryBank(length=bank.length, tokens=bank.tokens, channels=1)
        self.standing: list[StandingQuestion] = []

    def forget(self) -> None:
        """Start over."""
        self.qformer.bank.reset()
        self._shadow.reset()
        self.standing.clear()

    def stand(self, question: Question) -> StandingQuestion:
        """Carry a question along from the next frame on."""
        self.standing.append(self.qformer.stand(self.prompt_of(question.text)))
        return self.standing[-1]

    def _prompt_of(self, question: str) -> Prompt:
        """The question as this memory's Q-Former reads it."""
        return self.qformer.prompt(self.lab.bundle.manifest.templates.qformer_text(question))

    def see(self, frame: Encoded, time_s: float, *, disturbed: bool = False) -> None:
        """One frame into the bank and past all standing questions."""
        self.qformer.remember(frame.features, time_s)
        for standing in self.standing:
            standing.step(time_s)
        if self.qformer.policy == "mbc":
            merge = self.qformer.bank.last_merge
            self._shadow.settle(merge if (merge >= 0).all() else None)  # the same merges, of what is glitch and what is not
            self._shadow.append(np.full((self._shadow.tokens, 1), float(disturbed)), time_s=time_s)

    def glitch_share(self) -> float:
        """Share of the slots in use, over all tokens, that stand for glitches more than for anything else (`mbc` only)."""
        return float((self._shadow.features[self._shadow.visible] > 0.5).mean())


# -- units of work -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One stream to measure.

    Attributes:
        part: "replay", "standing" or "glitches".
        stream: its number, which with the seed makes it.
        scenes: how long it is.
        policies: what to compare on it ("glitches": always `mbc`, with a gate and without).
        asked: at most so many questions at each length.
        weights: whose weights read the memories ("glitches": always the shipped ones).
    """

    part: str
    stream: int
    scenes: int
    policies: tuple[Policy, ...] = ("mbc",)
    asked: int = 16
    weights: Weights = "shipped"

    @property
    def name(self) -> str:
        name = f"{self.part}/{self.stream}/{self.scenes}/{'+'.join(self.policies)}"
        return name if self.weights == "shipped" else f"{name}/{self.weights}"


Rows = list[dict[str, Any]]
"""A row per setting: `mode`, `policy`, `weights`, `scenes` or `condition`; `kinds`, `answers`, and `right`, a 0 or 1 for each."""


def measure(lab: Laboratory, unit: Unit) -> Rows:
    """All rows of one unit."""
    if unit.part == "glitches":
        return list(_glitches(lab, unit))
    return list(_lengths(lab, unit))


def _lengths(lab: Laboratory, unit: Unit) -> Iterator[dict[str, Any]]:
    scenes, keys, ends = lab.stream(unit.stream, unit.scenes)
    lengths = {ends[length - 1]: length for length in LENGTHS if length <= unit.scenes}
    questions = {length: lab.questions(scenes[:length], unit.stream)[: unit.asked] for length in lengths.values()}
    memories = {policy: lab.memory(policy, unit.weights) for policy in unit.policies}
    carried: dict[tuple[Policy, int], list[StandingQuestion]] = {}
    if unit.part == "standing":
        carried = {
            (policy, length): [memory.stand(question) for question in asked]
            for policy, memory in memories.items()
            for length, asked in questions.items()
        }
    for index, key in enumerate(keys[: max(lengths) + 1]):
        frame = lab.encoded(key)
        for memory in memories.values():
            memory.see(frame, index * FRAME_S)
        if index not in lengths:
            continue
        length = lengths[index]
        for policy, memory in memories.items():
            if unit.part == "standing":
                mine = carried[policy, length]
                softs = [standing.answer() for standing in mine]
                memory.standing = [standing for standing in memory.standing if standing not in mine]
            else:
                softs = [memory.qformer.replay(memory.prompt_of(question.text)) for question in questions[length]]
            setting = {"mode": unit.part, "policy": policy, "weights": unit.weights, "scenes": length}
            yield {**setting, **_scored(lab, softs, questions[length])}


def _scored(lab: Laboratory, softs: Iterable[SoftPrompt], questions: Sequence[Question]) -> dict[str, Any]:
    right = [lab.right(soft, question) for soft, question in zip(softs, questions, strict=True)]
    return {
        "kinds": [question.kind for question in questions],
        "answers": [question.answer for question in questions],
        "right": "".join("01"[hit] for hit in right),
    }


def _glitches(lab: Laboratory, unit: Unit) -> Iterator[dict[str, Any]]:
    scenes, keys, ends = lab.stream(unit.stream, unit.scenes)
    questions = lab.questions(scenes, unit.stream)[: unit.asked]
    memory = lab.memory("mbc")
    for number, (condition, shots_of) in enumerate(CONDITIONS.items()):
        shots = shots_of(ends[-1] + 1, np.random.default_rng([lab.seed, 7, unit.stream, number]))
        frames = [(FRAME_S * k, lab.encoded(_key(keys, shot), shot.view), shot.disturbed) for k, shot in enumerate(shots)]
        gated = [seen for seen in frames if not seen[1].flat]  # what it lets through keeps its time
        for gate, seen in ((False, frames), (True, gated)) if len(gated) < len(frames) else ((False, frames),):
            memory.forget()
            for time_s, frame, disturbed in seen:
                memory.see(frame, time_s, disturbed=disturbed)
            softs = [memory.qformer.replay(memory.prompt_of(question.text)) for question in questions]
            yield {
                "mode": "replay", "policy": "mbc", "condition": condition, "gate": gate, "glitch_share": memory.glitch_share(),
                "disturbed": float(np.mean([disturbed for *_, disturbed in frames])),
                "dropped_good": sum(frame.flat and not disturbed for _, frame, disturbed in frames),
                **_scored(lab, softs, questions),
            }  # fmt: skip


def _key(keys: Sequence[Key], shot: Shot) -> Key:
    return keys[shot.frame] if shot.still is None else ("still", shot.still)


# -- statistics ----------------------------------------------------------------------------------------------------


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), from counts."""
    if not asked:
        return 0.0, 1.0
    share, extra = right / asked, z * z / asked
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / asked + extra / (4 * asked)) / (1 + extra)
    return middle - half, middle + half


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Two-sided exact p-value that two sets of answers to the same questions are equally often right (McNemar 1947)."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    differ = gained + lost
    tail = sum(math.comb(differ, k) for k in range(min(gained, lost) + 1)) / 2**differ
    return min(1.0, 2 * tail)


def past(rows: Rows, *kinds: str) -> list[bool]:
    """Whether each question about the past (of these kinds, if any are given) was answered right, in order."""
    return [
        hit == "1"
        for row in rows
        for kind, hit in zip(row["kinds"], row["right"], strict=True)
        if (kind in kinds if kinds else kind != "present")
    ]


def paired(ours: Rows, theirs: Rows) -> tuple[list[bool], list[bool]]:
    """Whether each question about the past was answered right, for two sets of rows, where both were asked it.

    Rows are paired by `stream` and `scenes`: a stream's questions at a length come in one order, some rows have fewer of them.
    """
    found: tuple[list[bool], list[bool]] = ([], [])
    others = {(row["stream"], row["scenes"]): row for row in theirs}
    for row in ours:
        other = others.get((row["stream"], row["scenes"]))
        if other is None:
            continue
        both = min(len(row["kinds"]), len(other["kinds"]))
        if row["kinds"][:both] != other["kinds"][:both] or row["answers"][:both] != other["answers"][:both]:
            raise ValueError(f"stream {row['stream']} at {row['scenes']} scenes was asked other questions.")
        for kind, *hits in zip(row["kinds"], row["right"], other["right"], strict=False):
            if kind != "present":
                found[0].append(hits[0] == "1")
                found[1].append(hits[1] == "1")
    return found


def majority(rows: Rows) -> float | None:
    """Share of right answers of one who knows each kind's most frequent answer in hindsight, over questions about the past."""
    answers: dict[str, list[str]] = {}
    for row in rows:
        for kind, answer in zip(row["kinds"], row["answers"], strict=True):
            if kind != "present":
                answers.setdefault(kind, []).append(answer)
    asked = sum(map(len, answers.values()))
    return sum(max(map(some.count, set(some))) for some in answers.values()) / asked if asked else None


def select(rows: Rows, **wanted: Any) -> Rows:
    """Rows whose fields are these."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def summary(rows: Rows) -> dict[str, Any]:
    """`right`, `asked`, `accuracy`, `low`, `high` of the questions about the past, the `majority` level, and `by_kind`."""
    hits = past(rows)
    low, high = wilson(sum(hits), len(hits))
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    by_kind: Mapping[str, list[bool]] = {kind: past(rows, kind) for kind in kinds}
    return {
        "right": sum(hits), "asked": len(hits), "accuracy": sum(hits) / len(hits) if hits else None, "low": low, "high": high,
        "majority": majority(rows), "by_kind": {kind: [sum(some), len(some)] for kind, some in by_kind.items()},
    }  # fmt: skip
