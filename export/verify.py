"""Is a bundle still what it was made from? Every graph against PyTorch, then the memory over a stream, then the answers.

Three questions, each on the same clip: does each graph give what its module gives for the inputs it met there; does the soft
prompt, after 1, M, 2M and 5M frames, equal that of MA-LMM's plain loop (`export/plainloop.py`), with the bundle's merges forced
on it and without; and does the language model say the same of both soft prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keepsight.export.asked_questions import refuse_blank
from keepsight.export.checkpoints import Checkpoint
from keepsight.export.convert import dims_of, position_policy, positioned
from keepsight.export.eva import EvaVision
from keepsight.export.graphs import GRAPHS, export_qformer
from keepsight.export.locate import changed_weights, first_difference
from keepsight.export.plainloop import PlainLoop, Said
from keepsight.export.qformer import QFormer
from keepsight.export.streamed import export_streamed
from keepsight.export.vision import export_vision, pretrained_vision
from keepsight.export.weights import INDEX, load_qformer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation.parity import (
    GRAPH_LIMITS,
    PROMPT_LIMITS,
    Drift,
    GraphParity,
    LanguageParity,
    Report,
    difference,
    marks,
)
from keepsight.runtime.graphs.backends import Engines, open_engines
from keepsight.runtime.graphs.tap import Tap
from keepsight.runtime.language.llm import LLM, Segment, render
from keepsight.runtime.manifest import TableInfo
from keepsight.runtime.position_table import position_table
from keepsight.runtime.qformer import QFormer as DeployedQFormer
from keepsight.runtime.qformer import StandingQuestion
from keepsight.runtime.session import load_llm
from keepsight.streams.errors import CheckpointError, UsageError

__all__ = ["Source", "greedy_answer", "source_of", "verify"]

_TINY = "keepsight-tiny"
Arrays = Mapping[str, NDArray[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """What a bundle was made from.

    Attributes:
        name: for the report.
        vision: makes the visual encoder: frames uint8 `[B, S, S, 3]` to features `[B, N, C]`.
        qformer: with its position tables.
        export_vision: writes the encoder's graph anew, in half precision or not, to find where a difference begins.
        table: of positions that are added before frames are banked, `[frames, C]`; None for a bundle of another policy.
    """

    name: str
    vision: Callable[[], nn.Module]
    qformer: QFormer
    export_vision: Callable[[Path, bool], None]
    table: Tensor | None = None


def source_of(bundle: Bundle, checkpoint: Checkpoint | None) -> Source:
    """The modules of a checkpoint, or those of the bundle's own: published encoder weights and the Q-Former's stored ones.

    Raises:
        CheckpointError: the bundle was converted from a checkpoint, which must be named; or the one named has other dimensions.
    """
    if checkpoint is not None:
        model = checkpoint
        _refuse_other_dims(bundle, model)

        def write(path: Path, half: bool) -> None:
            frames, weights = {"frames": _blank(model.vision.image_size)}, model.vision_tensors
            export_streamed(lambda: EvaVision(model.vision), weights, frames, ["features"], path, half_compute=half)

        qformer, positions = positioned(model)
        table = model.image_pe if isinstance(positions, TableInfo) else None
        return Source(model.name, model.load_vision, qformer, write, table)
    if bundle.manifest.name != _TINY or not (bundle.path / INDEX).is_file():
        raise CheckpointError(
            f"{bundle.manifest.name} must be verified against what it was made from.",
            fix="Name it: --against CHECKPOINT, with the options that it was exported with.",
        )
    qformer = load_qformer(bundle.path)
    name = "its published encoder and its own Q-Former weights"
    return Source(name, pretrained_vision, qformer, lambda path, _: export_vision(path))


def _refuse_other_dims(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Tensors of other shapes can't be compared. Whether there is a position table, the comparison itself will show."""
    dims = bundle.manifest.dims
    theirs = dims_of(checkpoint, position_policy(checkpoint), memory_length=dims.memory_length)
    apart = [
        f"{name} {value} instead of {ours}"
        for name, value in theirs
        if name != "position_buckets" and value != (ours := getattr(dims, name))
    ]
    if apart:
        raise CheckpointError(
            f"{bundle.manifest.name} was not made from {checkpoint.name}, which has {', '.join(apart)}.",
            fix="Name the checkpoint that it was exported from: --against CHECKPOINT.",
        )


def verify(
    bundle: Bundle,
    source: Source,
    frames: NDArray[np.uint8],
    questions: Sequence[str],
    *,
    clip: str,
    engines: Engines | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a bundle against its source on frames uint8 `[T, S, S, 3]`, with one standing question per soft prompt series.

    The first question is carried along the clip; all are asked at its end. `engines` are the bundle's graphs on another
    backend than the CPU; they are closed when done.

    Raises:
        UsageError: no frames, or no question, or an empty one; or a variant in 8 bits, which rounds what it was made from.
    """
    if not len(frames) or not questions:
        raise UsageError("verifying needs at least one frame and one question.")
    refuse_blank(questions)
    if bundle.precision("vision") not in PROMPT_LIMITS:
        raise UsageError(
            f"vision of the variant {bundle.variant} is no conversion of the source, but rounds it to 8 bits.",
            fix=f"Verify the variant {bundle.manifest.variants[0]}; what 8 bits change is told by keepsight quantize.",
        )
    tell = progress or (lambda what, done, total: None)
    report = Report(bundle.manifest.name, source.name, clip)
    with open_engines(bundle) if engines is None else engines as opened:
        watched = _watch(bundle, opened, frames, questions, tell)
    report.graphs = _compare_graphs(bundle, source, watched, tell) | _compare_tables(bundle, source)
    said = _compare_streams(report, bundle, source, frames, watched, tell)
    if bundle.has_llm:
        with load_llm(bundle, None) as llm:
            report.language = _compare_answers(bundle, llm, watched.answers, said)
    return report


# -- the deployed side ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """What the bundle made of the clip.

    Attributes:
        runs: feeds and outputs of each graph's last run.
        text_ids: of every question, without padding.
        soft_prompts: after each frame, of the first question `[T, Q, n_embd]`.
        merges: after each frame but the last, the visual bank's and those of the banked layers, for real rows.
        answers: by question, the soft prompt at the end.
    """

    runs: Mapping[str, tuple[Arrays, Arrays]]
    text_ids: Mapping[str, list[int]]
    soft_prompts: NDArray[np.float32]
    merges: list[tuple[NDArray[np.intp], dict[int, NDArray[np.intp]]] | None]
    answers: Mapping[str, NDArray[np.float32]]


def _watch(bundle: Bundle, engines: Engines, frames: NDArray[np.uint8], questions: Sequence[str], tell: Progress) -> _Watched:
    """Run the bundle over the clip as `ask` does, every question standing; times follow the manifest's frame rate."""
    taps = {name: Tap(engine) for name, engine in engines.items()}
    qformer = DeployedQFormer(bundle, engines=Engines(taps))
    prompts = {question: qformer.prompt(bundle.manifest.templates.qformer_text(question)) for question in questions}
    standing = {question: qformer.stand(prompt) for question, prompt in prompts.items()}
    first = standing[questions[0]]
    soft, merges = [], []
    for index, frame in enumerate(frames):
        qformer.remember(qformer.encode(frame[None])[0], index / bundle.manifest.sample_fps)
        for carried in standing.values():
            carried.step(index / bundle.manifest.sample_fps)
        if index:
            merges.append(_merges(qformer, first))
        soft.append(first.answer().rows)
        tell("the bundle", index + 1, len(frames))
    answers = {question: carried.answer().rows for question, carried in standing.items()}
    qformer.replay(first.prompt)
    runs = {name: tap.newest for name, tap in taps.items() if tap.newest is not None}
    ids = {question: _text_ids(bundle, question) for question in questions}
    return _Watched(runs, ids, np.stack(soft), [*merges, None], answers)


def _merges(
    qformer: DeployedQFormer, standing: StandingQuestion
) -> tuple[NDArray[np.intp], dict[int, NDArray[np.intp]]] | None:
    """What both banks merged before the newest frame, which is what the reference merges after the one before."""
    visual = qformer.bank.last_merge[0].astype(np.intp)
    if visual[0] < 0:
        return None
    real = standing.prompt.row_mask > 0
    query = standing.bank.last_merge[:, real].astype(np.intp)
    return visual, dict(enumerate(query, start=1))


def _text_ids(bundle: Bundle, question: str) -> list[int]:
    if bundle.tokenizer is None:
        return []
    text = bundle.manifest.templates.qformer_text(question)
    ids, mask = bundle.tokenizer.encode(text, bundle.manifest.dims.text_buckets)
    return [int(token) for token, real in zip(ids, mask, strict=True) if real]


# -- graph by graph ------------------------------------------------------------------------------------------------------


def _compare_graphs(bundle: Bundle, source: Source, watched: _Watched, tell: Progress) -> dict[str, GraphParity]:
    results = {}
    limit = GRAPH_LIMITS[bundle.variant]
    with tempfile.TemporaryDirectory() as folder:
        _export_anew(bundle, source, Path(folder))
        for index, (name, (feeds, outputs)) in enumerate(watched.runs.items()):
            module = source.vision() if name == "vision" else GRAPHS[name][0](source.qformer)
            wanted = _run_module(module, feeds, list(outputs) if name == "vision" else GRAPHS[name][1])
            apart = {output: difference(value, wanted[output], limit) for output, value in outputs.items()}
            graph, fresh = bundle.graph_path(name), Path(folder) / f"{name}.onnx"
            over = not all(output.passed for output in apart.values())
            located = first_difference(graph, fresh, feeds, limit) if over else None
            results[name] = GraphParity(apart, located, tuple(changed_weights(graph, fresh)))
            tell("graphs", index + 1, len(watched.runs))
    return results


def _compare_tables(bundle: Bundle, source: Source) -> dict[str, GraphParity]:
    """Positions that are added before frames are banked: copied, so the same to the bit."""
    stored = position_table(bundle)
    if stored is None and source.table is None:
        return {}
    ours, theirs = (np.zeros(0) if table is None else np.asarray(table) for table in (stored and stored.rows, source.table))
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{bundle.manifest.name} has positions {list(ours.shape)} to add, {source.name} has {list(theirs.shape)}.",
            fix="Name the checkpoint, and the fine-tuned one, that it was exported from.",
        )
    return {"positions": GraphParity({"rows": difference(ours, theirs, 0.0)})}


@torch.no_grad()
def _run_module(module: nn.Module, feeds: Arrays, outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    values = module.eval()(*(torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values()))
    several: tuple[Tensor, ...] = values if isinstance(values, tuple) else (values,)
    return {name: value.numpy() for name, value in zip(outputs, several, strict=True)}


def _export_anew(bundle: Bundle, source: Source, folder: Path) -> None:
    """The source's graphs, to compare the bundle's with, weight by weight and node by node."""
    dims = bundle.manifest.dims
    half = bundle.variant == "fp16"
    source.export_vision(folder / "vision.onnx", half)
    export_qformer(
        source.qformer, folder, slots=dims.slots, tokens=dims.tokens, text=dims.text_buckets[0], half_storage=False,
        half_compute=half,
    )  # fmt: skip


# -- over the stream -----------------------------------------------------------------------------------------------------


def _compare_streams(
    report: Report, bundle: Bundle, source: Source, frames: NDArray[np.uint8], watched: _Watched, tell: Progress
) -> dict[str, NDArray[np.float32]]:
    """Fill in `drift` and `merges`; returns the reference's soft prompt of every question at the end, merges not forced.

    The reference is the whole model: it sees the frames through its own encoder.
    """
    vision = source.vision().eval()
    manifest, questions = bundle.manifest, list(watched.text_ids)
    qformer, table, ids = source.qformer, source.table, watched.text_ids
    loops = {question: PlainLoop(qformer, manifest, ids[question], table=table) for question in questions}
    forced = PlainLoop(qformer, manifest, ids[questions[0]], table=table)
    limit = PROMPT_LIMITS[bundle.variant]
    told_at = marks(manifest.dims.memory_length, len(frames))
    agreed: dict[str, list[bool]] = {"visual": [], "query": []}
    said: dict[str, Said] = {}
    for index, frame in enumerate(frames):
        with torch.no_grad():
            features = vision(torch.from_numpy(frame[None]))[0].numpy()
        time_s, merge = index / manifest.sample_fps, watched.merges[index]
        told = forced.see(
            features, time_s, visual_merge=merge[0] if merge else None, query_merge=merge[1] if merge else None
        )
        said = {question: loop.see(features, time_s) for question, loop in loops.items()}
        free = said[questions[0]]
        if merge is not None:
            _count(agreed, free, merge, manifest.dims.queries)
        if index + 1 in told_at:
            rows = watched.soft_prompts[index]
            apart = (difference(rows, other.soft_prompt.numpy(), limit) for other in (told, free))
            report.drift.append(Drift(index + 1, *apart))
        tell("PyTorch", index + 1, len(frames))
    report.merges = {bank: float(np.mean(equal)) for bank, equal in agreed.items() if equal}
    return {question: one.soft_prompt.numpy() for question, one in said.items()}


def _count(
    agreed: dict[str, list[bool]], said: Said, merge: tuple[NDArray[np.intp], dict[int, NDArray[np.intp]]], queries: int
) -> None:
    """Equal decisions. Layer 1's text rows are the same at every frame: whatever is merged there, the bank stays the same."""
    if said.visual_choice is not None:
        agreed["visual"] += (said.visual_choice == merge[0]).tolist()
    for layer, rows in merge[1].items():
        chosen = said.query_choice[layer]
        if chosen is not None:
            agreed["query"] += (chosen == rows)[: queries if layer == 1 else None].tolist()


# -- the language model --------------------------------------------------------------------------------------------------


def _compare_answers(bundle: Bundle, llm: LLM, deployed: Arrays, reference: Arrays) -> LanguageParity:
    divergences, answers = [], {}
    for question, rows in deployed.items():
        told = [_segments(bundle, question, soft) for soft in (reference[question], rows)]
        p, q = (_log_softmax(llm.logits(segments)) for segments in told)
        divergences.append(float((np.exp(p) * (p - q)).sum()))
        theirs, ours = (greedy_answer(bundle, llm, question, soft) for soft in (reference[question], rows))
        answers[question] = (theirs, ours)
    return LanguageParity(float(np.mean(divergences)), float(np.max(divergences)), answers)


def greedy_answer(bundle: Bundle, llm: LLM, question: str, rows: NDArray[np.float32]) -> str:
    """What the language model says of a soft prompt `[Q, n_embd]`, at most 24 tokens, each the likeliest."""
    decoding = bundle.manifest.decoding
    segments = _segments(bundle, question, rows)
    return llm.answer(segments, max_tokens=min(24, decoding.max_tokens), stop=decoding.stop).text.strip()


def _segments(bundle: Bundle, question: str, rows: NDArray[np.float32]) -> list[Segment]:
    return render(bundle.manifest.templates.llm, video=rows, question=question)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max()
    return values - np.log(np.exp(values).sum())


def _blank(size: int) -> Tensor:
    return torch.zeros(1, size, size, 3, dtype=torch.uint8)


