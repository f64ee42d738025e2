"""How fast and how flat the memory is: the deployed path at full size, beside the naive reference, in one process.

Weights and features are random, sizes are MA-LMM's. Frames are interleaved: frame t of the naive loop, frame t of the fast path,
frame t + 1, ..., so that whatever else the machine does meets both. The fast path is the runtime's own: `QFormer`,
`StandingQuestion` and `MemoryBank` over exported graphs on ONNX Runtime.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keepsight.export.bench_bundle import FRAME_GRAPHS, FULL_SIZE, Case, random_qformer, video_features
from keepsight.export.bench_double import double_path
from keepsight.export.bench_macs import ceiling, fast_macs, naive_macs, vision_macs
from keepsight.export.bench_naive import NaiveLoop, Seen, linear_rates
from keepsight.export.graphs import GRAPHS
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.runtime.bank import Bank
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.memory import MemoryBank, Rider
from keepsight.runtime.qformer import QFormer as DeployedQFormer
from keepsight.runtime.qformer import SoftPrompt, StandingQuestion
from keepsight.streams.errors import KeepsightError, UsageError

__all__ = ["Settings", "bench_memory", "compare", "double_difference"]

Progress = Callable[[str, int, int], None]
Features = NDArray[np.float32]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: M of the fast path; the naive loop runs at `naive_length` alone.
        frames: of the comparison.
        threads: of PyTorch and of ONNX Runtime.
        question: standing, and put at the end.
        config, tokens: sizes.
        token_counts: N of the fast path beside `tokens`, at `naive_length`.
        long_stream: frames that the fast path alone is carried on to.
        updates: frames after which the bank's update alone is timed.
        double_length: M of the comparison in double, which takes M + 4 frames.
    """

    lengths: Sequence[int] = (20, 10, 40)
    frames: int = 60
    threads: int = 1
    question: str = "what is the activity in the video?"
    config: QFormerConfig = FULL_SIZE
    tokens: int = 257
    token_counts: Sequence[int] = (32, 65, 129)
    long_stream: int = 140
    updates: Sequence[int] = (1000, 3000)
    double_length: int = 5

    @property
    def naive_length(self) -> int:
        """20 where that is among the lengths, else the first of them."""
        return 20 if 20 in self.lengths else self.lengths[0]

    def case(self, folder: Path, *, length: int, tokens: int | None = None) -> Case:
        """One size of the memory."""
        return Case(self.config, tokens or self.tokens, length, self.question, folder)


@dataclass
class Clock:
    """Milliseconds of something done many times, by the clock and by the process's processor time."""

    wall_ms: list[float] = field(default_factory=list)
    processor_ms: list[float] = field(default_factory=list)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Time what is done inside."""
        wall, processor = perf_counter(), process_time()
        yield
        self.wall_ms.append(1e3 * (perf_counter() - wall))
        self.processor_ms.append(1e3 * (process_time() - processor))

    def median(self, start: int = 0, end: int | None = None) -> float:
        """Of the clock."""
        return float(np.median(self.wall_ms[start:end]))

    def processor_median(self, start: int = 0, end: int | None = None) -> float:
        """Of processor time, which other programs change less."""
        return float(np.median(self.processor_ms[start:end]))

    def as_dict(self) -> Figures:
        return {"wall_ms": np.round(self.wall_ms, 3).tolist(), "processor_ms": np.round(self.processor_ms, 3).tolist()}


class FastPath:
    """The deployed path: one standing question over a stream of features.

    Args:
        bundle: with the graphs that a frame runs, and `answer` to be asked.
        engines: its graphs; shared, so not closed here.
        question: standing.
    """

    def __init__(self, bundle: Bundle, engines: Engines, question: str) -> None:
        self.deployed = DeployedQFormer(bundle, engines=engines)
        self.standing = self.deployed.stand(self.deployed.prompt(question))
        self.clock = Clock()

    def see(self, features: Features, time_s: float) -> None:
        """One frame, timed."""
        with self.clock.once():
            self.deployed.remember(features, time_s)
            self.standing.step(time_s)

    @property
    def nbytes(self) -> int:
        """Of both banks."""
        return self.deployed.bank.nbytes + self.standing.bank.nbytes


def bench_memory(settings: Settings, folder: Path, *, progress: Progress | None = None) -> Figures:
    """Measure everything; graphs are written to `folder` (up to 2 GB).

    Raises:
        UsageError: a setting that makes no sense.
    """
    _check(settings)
    torch.set_num_threads(settings.threads)
    show = progress or (lambda what, done, total: None)
    qformer = random_qformer(settings.config)
    found: Figures = {"machine": machine(settings.threads), "settings": _described(settings)}
    case = settings.case(folder, length=settings.naive_length)
    done = iter(range(1, len(GRAPHS) + 1))
    bundle = case.export(qformer, tuple(GRAPHS), wrote=lambda: show("graphs", next(done), len(GRAPHS)))
    with open_engines(bundle, threads=settings.threads) as engines:
        against = compare(settings, case, qformer, bundle, engines, progress=show)
        found["against_naive"] = against
        found["ask"] = ask(settings, case, qformer, bundle, engines, progress=show)
    against["differences"]["double"] = double_difference(settings, folder, qformer, progress=show)
    by_length = {
        str(length): _alone(settings, settings.case(folder, length=length), qformer, show) for length in settings.lengths
    }
    by_tokens = {
        str(tokens): _alone(settings, settings.case(folder, length=settings.naive_length, tokens=tokens), qformer, show)
        for tokens in settings.token_counts
    }
    by_tokens[str(settings.tokens)] = by_length[str(settings.naive_length)]
    found |= {"by_length": by_length, "by_tokens": by_tokens, "update": _updates(settings, show)}
    default = against["naive"]["default"]
    naive = str(settings.naive_length)
    return {
        "speedup": {naive: default["ratio"]["all"]["wall"]},
        "max_abs_diff": {naive: against["differences"]["forced"]["largest"]},
        "per_frame_ms": {length: row["steady_ms"] for length, row in by_length.items()},
        "per_frame_processor_ms": {length: row["steady_processor_ms"] for length, row in by_length.items()},
        "bytes": {length: row["bytes"] for length, row in by_length.items()},
        **found,
    }


# -- beside the naive loop -------------------------------------------------------------------------------------------------


def compare(
    settings: Settings, case: Case, qformer: QFormer, bundle: Bundle, engines: Engines, *, progress: Progress
) -> Figures:
    """Naive and fast over the same frames, in turns: times, ratios, the ceiling, and how far their outputs are apart."""
    rates = linear_rates(case.tokens * (case.length + 1), qformer)
    naive = {name: NaiveLoop(qformer, case.text_ids, length=case.length, linear=name) for name in rates}
    clocks = {name: Clock() for name in naive}
    free, forced = (FastPath(bundle, engines, case.question) for _ in range(2))
    answers = Clock()
    decisions, drift = Decisions(settings.config.queries, len(case.text_ids)), {"free": Drift(), "forced": Drift()}
    stream, before = video_features(case.tokens, case.config.channels), None
    for t in range(settings.frames):
        features = next(stream)
        seen: dict[str, Seen] = {}
        for name, loop in naive.items():
            with clocks[name].once():
                seen[name] = loop.see(features)
        _force(forced, before)
        for fast in (free, forced):
            fast.see(features, float(t))
        decisions.add(before, free)
        before = seen["default"]
        with answers.once():
            said = free.standing.answer()
        drift["free"].add(said, before)
        drift["forced"].add(forced.standing.answer(), before)
        progress("naive and fast in turns", t + 1, settings.frames)
    steady = range(2 * settings.frames // 3, settings.frames)
    limits = {"all": _ceilings(case, range(settings.frames)), "steady": _ceilings(case, steady)}
    macs = {
        "naive_steady": naive_macs(case.config, tokens=case.tokens, text=len(case.text_ids), seen=case.length + 1),
        "fast": fast_macs(case.config, tokens=case.tokens, text=case.bucket, slots=case.length + 1),
        "vision": vision_macs(),
    }
    return {
        "memory_length": case.length,
        "frames": settings.frames,
        "macs": macs,
        "linear_gmac_per_s": rates,
        "ceiling": limits,
        "fast": free.clock.as_dict(),
        "answer_ms": answers.median(),
        "naive": {name: clock.as_dict() | _against(clock, free.clock, steady, limits) for name, clock in clocks.items()},
        "naive_bytes": _naive_bytes(naive["default"]),
        "whole_frame_by_macs": {str(length): _whole_frame(settings, case, length) for length in settings.lengths},
        "differences": {
            "forced": drift["forced"].as_dict(), "free": drift["free"].as_dict() | decisions.as_dict(),
        },
    }  # fmt: skip


def _ceilings(case: Case, frames: range) -> float:
    return ceiling(
        case.config, tokens=case.tokens, text=len(case.text_ids), bucket=case.bucket, length=case.length, frames=frames
    )


def _against(naive: Clock, fast: Clock, steady: range, limits: Mapping[str, float]) -> Figures:
    """Ratios of sums over all frames and over the last third, and which share of the ceiling they are."""
    ratio = {}
    for what, start in (("all", 0), ("steady", steady.start)):
        wall = sum(naive.wall_ms[start:]) / sum(fast.wall_ms[start:])
        processor = sum(naive.processor_ms[start:]) / sum(fast.processor_ms[start:])
        ratio[what] = {"wall": wall, "processor": processor, "share_of_ceiling": processor / limits[what]}
    return {"ratio": ratio}


def _whole_frame(settings: Settings, case: Case, length: int) -> float:
    """What the fast path gains of a frame that ViT-g is part of, by multiply-adds, once the bank is full."""
    config, vision = settings.config, vision_macs()
    naive = naive_macs(config, tokens=case.tokens, text=len(case.text_ids), seen=length + 1)
    return (vision + naive) / (vision + fast_macs(config, tokens=case.tokens, text=case.bucket, slots=length + 1))


def _naive_bytes(loop: NaiveLoop) -> int:
    assert loop.visual is not None
    return sum(bank.rows.nbytes + bank.sizes.nbytes for bank in (loop.visual, *loop.query))


def _force(fast: FastPath, before: Seen | None) -> None:
    """Make the room that the newest frame needs, with the choices that the naive loop made."""
    if before is None or before.visual_choice is None:
        return
    fast.deployed.bank.settle(before.visual_choice[None])
    bank = fast.standing.bank
    pairs = np.zeros((bank.groups, bank.tokens), np.intp)  # padding merges what it likes: no one reads it
    for group, choice in enumerate(before.query_choice[1:]):
        assert choice is not None
        pairs[group, : len(choice)] = choice
    bank.settle(pairs)


class Decisions:
    """Shares of equal merge decisions of two loops that run freely.

    Layer 0's bank and layer 1's text rows hold copies of one row: all their neighbours tie, and a choice there means nothing.
    """

    def __init__(self, queries: int, text: int) -> None:
        self._queries, self._rows = queries, queries + text
        self._equal: dict[str, list[bool]] = {"visual": [], "query": []}

    def add(self, naive: Seen | None, fast: FastPath) -> None:
        """What both merged after the frame before the newest one."""
        if naive is None or naive.visual_choice is None:
            return
        self._equal["visual"] += (naive.visual_choice == fast.deployed.bank.last_merge[0]).tolist()
        for group, choice in enumerate(naive.query_choice[1:]):
            assert choice is not None
            rows = self._queries if group == 0 else self._rows
            self._equal["query"] += (choice[:rows] == fast.standing.bank.last_merge[group, :rows]).tolist()

    def as_dict(self) -> Figures:
        return {f"equal_decisions_{bank}": float(np.mean(equal)) if equal else None for bank, equal in self._equal.items()}


class Drift:
    """How far query outputs are apart, frame by frame."""

    def __init__(self) -> None:
        self._apart: list[float] = []
        self._largest = 0.0

    def add(self, fast: SoftPrompt, naive: Seen) -> None:
        wanted = naive.query_output.numpy()
        self._apart.append(float(np.abs(fast.query_output - wanted).max()))
        self._largest = max(self._largest, float(np.abs(wanted).max()))

    def as_dict(self) -> Figures:
        return {"largest": max(self._apart), "by_frame": self._apart, "largest_value": self._largest}


def double_difference(settings: Settings, folder: Path, qformer: QFormer, *, progress: Progress) -> Figures:
    """The host's algorithm in double against the naive loop in double, both free, over M + 4 frames."""
    case = settings.case(folder, length=settings.double_length)
    deployed, standing = double_path(qformer, case)
    naive = NaiveLoop(_in_double(qformer), case.text_ids, length=case.length)
    drift, stream = Drift(), video_features(case.tokens, case.config.channels)
    for t in range(case.length + 4):
        features = next(stream)
        deployed.remember(features, float(t))
        standing.step(float(t))
        drift.add(standing.answer(), naive.see(features))
        progress("in double", t + 1, case.length + 4)
    return drift.as_dict() | {"memory_length": case.length, "frames": case.length + 4}


def _in_double(qformer: QFormer) -> QFormer:
    wide = QFormer(qformer.config)
    wide.load_state_dict(qformer.state_dict())
    return wide.double().eval()


# -- a question put later ----------------------------------------------------------------------------------------------------


def ask(settings: Settings, case: Case, qformer: QFormer, bundle: Bundle, engines: Engines, *, progress: Progress) -> Figures:
    """A question over a full memory of M + 1 slots: one block-causal pass, step by step, and computed anew from features."""
    bank = _full_bank(case, bundle, engines)
    order = bank.deployed.bank.in_time_order()[0][0]
    riders = _riders_by_time(bank.deployed.bank)
    libraries = list(linear_rates(case.tokens, qformer, repeats=1))  # one round of each: some 20 s
    clocks: dict[str, Clock] = {"replay": Clock(), "step by step": Clock()}
    said: dict[str, NDArray[np.float32]] = {}
    for at, name in enumerate(libraries):
        with clocks["replay"].once():
            said["replay"] = bank.deployed.replay(bank.standing.prompt).query_output
        said["step by step"] = _step_by_step(case, bundle, engines, order, riders, clocks["step by step"])
        loop = NaiveLoop(qformer, case.text_ids, length=len(order), linear=name)
        with clocks.setdefault(f"recomputed, {name}", Clock()).once():
            for slot in order:
                output = loop.see(slot).query_output
        said[f"recomputed, {name}"] = output.numpy()
        progress("a question put later", at + 1, len(libraries))
    wanted = said["recomputed, default"]
    return {
        "slots": len(order),
        "ms": {name: clock.median() for name, clock in clocks.items()},
        "processor_ms": {name: float(np.median(clock.processor_ms)) for name, clock in clocks.items()},
        "max_abs_diff": {name: float(np.abs(value - wanted).max()) for name, value in said.items() if name[:4] != "reco"},
        "tiny_bundle": _tiny_trace(),
    }


def _full_bank(case: Case, bundle: Bundle, engines: Engines) -> FastPath:
    """A memory in which merges have happened; only its visual bank is read."""
    path = FastPath(bundle, engines, case.question)
    stream = video_features(case.tokens, case.config.channels, seed=1)
    for t in range(case.length + 6):
        path.deployed.remember(next(stream), float(t))
    return path


def _riders_by_time(bank: Bank) -> list[dict[str, NDArray[Any]]]:
    """Keys and values of each place in time, as that many frames would have brought them."""
    tokens = np.arange(bank.tokens)
    return [{name: values[:, slot, tokens] for name, values in bank.riders.items()} for slot in bank.order[0]]


def _step_by_step(
    case: Case,
    bundle: Bundle,
    engines: Engines,
    order: Features,
    riders: Sequence[Mapping[str, NDArray[Any]]],
    clock: Clock,
) -> NDArray[np.float32]:
    """The `step` graph once for each slot. Keys and values are cached, and entering them into a bank is not timed."""
    deployed = DeployedQFormer(bundle, engines=engines)
    standing: StandingQuestion = deployed.stand(deployed.prompt(case.question))
    steps = Clock()
    for t, (slot, rider) in enumerate(zip(order, riders, strict=True)):
        deployed.bank.append(slot, time_s=float(t), riders=rider)
        deployed._visual = {}  # as `remember` does
        with steps.once():
            standing.step(float(t))
    with steps.once():
        said = standing.answer()
    clock.wall_ms.append(sum(steps.wall_ms))
    clock.processor_ms.append(sum(steps.processor_ms))
    return said.query_output


def _tiny_trace() -> Figures:
    """What the shipped bundle's own trace says of a question put later: the replay, and all until the first token.

    Each question follows a new frame: the language model keeps what it has read, and would not read the same rows again.
    """
    from keepsight.runtime.clips import synthetic_clip
    from keepsight.runtime.session import Session
    from keepsight.streams import Frame

    try:
        bundle = Bundle.open("tiny")
        with Session(bundle, threads=1) as session:
            dims, fps, traces = bundle.manifest.dims, bundle.manifest.sample_fps, []
            for index, image in enumerate(synthetic_clip(dims.memory_length + 4, dims.image_size)):
                session.see(Frame(image, index / fps, monotonic(), index))
                if index >= dims.memory_length:
                    traces.append(session.ask("what was there first?").result.trace)
    except KeepsightError as error:  # no language model here: said so in its place
        return {"not_measured": str(error)}
    replay = float(np.median([trace.qformer_ms for trace in traces[1:]]))
    first = float(np.median([trace.first_token_ms for trace in traces[1:]]))
    return {"replay_ms": replay, "first_token_ms": first, "share": replay / first}


# -- the fast path alone -----------------------------------------------------------------------------------------------------


def _alone(settings: Settings, case: Case, qformer: QFormer, progress: Progress) -> Figures:
    """Milliseconds of a frame once the bank is full, without the naive loop in between, and bytes of the banks."""
    what = f"fast alone, M={case.length}, N={case.tokens}"
    longest = case.length == settings.naive_length and case.tokens == settings.tokens
    frames = settings.long_stream if longest else case.length + 15
    progress(what, 0, frames)
    bundle = case.export(qformer, FRAME_GRAPHS)
    with open_engines(bundle, threads=settings.threads) as engines:
        path = FastPath(bundle, engines, case.question)
        stream = video_features(case.tokens, case.config.channels)
        for t in range(frames):
            path.see(next(stream), float(t))
            progress(what, t + 1, frames)
    if case.tokens != settings.tokens or case.length != settings.naive_length:
        shutil.rmtree(case.path)  # half a gigabyte
    full = case.length + 1
    clock = path.clock
    row: Figures = {
        "steady_ms": clock.median(full), "steady_processor_ms": clock.processor_median(full), "frames": frames,
        "bytes": path.nbytes, **clock.as_dict(),
    }  # fmt: skip
    if longest:
        for part, start, end in (("early", full, full + 40), ("late", frames - 40, frames)):
            row[part] = {
                "frames": [start, end], "ms": clock.median(start, end), "processor_ms": clock.processor_median(start, end),
            }  # fmt: skip
    return row


def _updates(settings: Settings, progress: Progress) -> Figures:
    """The visual bank's update alone, keys and values included: milliseconds over the 500 frames up to each mark."""
    config, crosses = settings.config, len(settings.config.cross_layers)
    bank = MemoryBank(
        length=settings.naive_length, tokens=settings.tokens, channels=config.channels,
        riders={name: Rider(crosses, config.hidden) for name in ("cross_k", "cross_v")},
    )  # fmt: skip
    stream = video_features(settings.tokens, config.channels)
    shown = [next(stream) for _ in range(61)]
    rows = np.random.default_rng(0).standard_normal((2, crosses, settings.tokens, config.hidden), dtype=np.float32)
    riders, clock = dict(zip(bank.riders, rows, strict=True)), Clock()
    for t in range(max(settings.updates)):
        features = shown[t * 7 % 61]
        with clock.once():
            bank.append(features, time_s=float(t), riders=riders)
        if (t + 1) % 100 == 0:
            progress("the update alone", t + 1, max(settings.updates))
    spans = {str(mark): (max(0, mark - 500), mark) for mark in settings.updates}
    return {mark: {"ms": clock.median(*span), "processor_ms": clock.processor_median(*span)} for mark, span in spans.items()}


# -- what it was measured on -------------------------------------------------------------------------------------------------


def machine(threads: int) -> Figures:
    """The processor and the versions that matter."""
    import onnxruntime

    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "processor": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _described(settings: Settings) -> Figures:
    config = settings.config
    return {
        "memory_lengths": list(settings.lengths), "frames": settings.frames, "question": settings.question,
        "tokens": settings.tokens, "channels": config.channels, "layers": config.layers, "hidden": config.hidden,
        "queries": config.queries, "precision": "float32", "weights": "random",
    }  # fmt: skip


def _check(settings: Settings) -> None:
    if not settings.lengths or min(settings.lengths) < 1:
        raise UsageError("a memory needs at least one slot.", fix="Give --memory-length 1 or more.")
    if len(set(settings.lengths)) < len(settings.lengths):
        raise UsageError("a memory length is named twice.")
    if settings.frames < settings.naive_length + 6:
        raise UsageError(
            f"{settings.frames} frames fill a memory of {settings.naive_length} slots but hardly show it full.",
            fix=f"Give --frames {settings.naive_length + 6} or more.",
        )
    if settings.threads < 1:
        raise UsageError(f"{settings.threads} threads compute nothing.", fix="Give --threads 1 or more.")
