"""What each way of making a frame's pixels does to a model: to the pixels, the features, the merges and the answers.

The reference is MA-LMM's own preprocessing on full frames in RGB. Every other row comes through the pipeline that a board runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from keepsight.export.verify import greedy_answer
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation.parity import PixelParity
from keepsight.runtime.qformer import QFormer
from keepsight.runtime.session import load_llm
from keepsight.streams import Source
from keepsight.streams.errors import UsageError
from keepsight.streams.view import Aspect, Colorimetry, Conversion, Scaler

__all__ = ["Choice", "choices", "compare_pixels", "reference_pixels"]

Progress = Callable[[str, int, int], None]
Frames = NDArray[np.uint8]

_TIMED_FRAMES, _ROUNDS = 40, 3


def reference_pixels(image: NDArray[np.uint8], size: tuple[int, int], *, wrap: bool = True) -> NDArray[np.uint8]:
    """MA-LMM's preprocessing up to its uint8 (`blip2_video_eval`: `functional_video.py : resize`, `transforms_video.py`).

    Args:
        image: uint8 `[H, W, 3]`, the full frame.
        size: (width, height).
        wrap: as the reference, whose conversion keeps the low 8 bits of what overshoots; else it is cut off at 0 and 255.

    Returns:
        uint8 `[height, width, 3]`.
    """
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float().contiguous()
    values = F.interpolate(pixels, size=size[::-1], mode="bicubic", align_corners=False)
    if not wrap:
        values = values.clamp(0, 255)
    # Straight to uint8 is the same on x86, and on ARM it is not: what lies outside is not defined there.
    return values.to(torch.int32).to(torch.uint8)[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Choice:
    """One way from a decoded frame to the vision graph's input."""

    scaler: Scaler
    aspect: Aspect = "stretch"
    colorimetry: Colorimetry | None = None
    conversion: Conversion = "exact"

    def open(self, clip: str, size: tuple[int, int] | None, fps: float | None) -> Source:
        """The clip through the pipeline, scaled this way; in full size for None."""
        return Source(
            clip, size=size, aspect=self.aspect, scaler=self.scaler, colorimetry=self.colorimetry,
            conversion=self.conversion, fps=fps,
        )  # fmt: skip


def choices(own: Choice) -> list[Choice]:
    """Every scaler; then what differs from a bundle's own choice in the aspect, the colorimetry, the conversion."""
    scalers = [replace(own, scaler=scaler, aspect="stretch") for scaler in get_args(Scaler)]
    boxed = replace(own, aspect="letterbox")
    matrices = [replace(own, colorimetry=name) for name in (None, *get_args(Colorimetry)) if name != own.colorimetry]
    return [*scalers, boxed, *matrices, replace(own, conversion="8-bit")]


def compare_pixels(
    bundle: Bundle, clip: str, questions: Sequence[str], *, count: int, progress: Progress | None = None
) -> list[PixelParity]:
    """One row for the reference, one for the reference without its wrap-around, and one for each of `choices`.

    Args:
        bundle: its graphs encode, remember and answer, in the precision that it was opened in.
        clip: what `Source` takes, of its own size.
        questions: each carried along the clip and asked at its end.
        count: frames to use at most, at the manifest's rate.
        progress: told of each row that is done.

    Raises:
        UsageError: no frames, or no question.
    """
    tell = progress or (lambda what, done, total: None)
    wanted = bundle.manifest.preprocessing
    size, own = (wanted.width, wanted.height), Choice(wanted.scaler, wanted.aspect, wanted.colorimetry)
    ways = choices(own)
    costs = _costs(clip, size, ways, tell)
    model = _Model(bundle, questions)
    reference, cut_off = _reference(own, clip, size, bundle.manifest.sample_fps, count)
    seen = model.see(reference)
    rows = [model.row("reference: MA-LMM's bicubic, which wraps", reference, reference, seen, seen, costs[0])]
    rows.append(model.row("reference, overshoot cut off", cut_off, reference, model.see(cut_off), seen, costs[0]))
    for index, (way, cost) in enumerate(zip(ways, costs[1:], strict=True)):
        with way.open(clip, size, bundle.manifest.sample_fps) as source:
            pixels = _stacked(islice((frame.image for frame in source), count))
        row = model.row(_name(way), pixels, reference, model.see(pixels), seen, cost)
        rows.append(replace(row, own=way == own))
        tell("pixels", index + 1, len(ways))
    model.close()
    return _with_answers(bundle, rows, model.soft_prompts)


def _name(way: Choice) -> str:
    more = {"letterbox": ", letterbox", "8-bit": ", 8-bit colours", "bt601": ", read as BT.601", "bt709": ", read as BT.709"}
    return way.scaler + "".join(more.get(str(value), "") for value in (way.aspect, way.colorimetry, way.conversion))


def _reference(own: Choice, clip: str, size: tuple[int, int], fps: float, count: int) -> tuple[Frames, Frames]:
    """The clip's frames as the reference makes them, and without what wraps; full frames are held one at a time."""
    with own.open(clip, None, fps) as source:
        both = [
            (reference_pixels(frame.image, size), reference_pixels(frame.image, size, wrap=False))
            for frame in islice(source, count)
        ]
    wrapped, cut_off = (_stacked(pair[side] for pair in both) for side in (0, 1))
    return wrapped, cut_off


def _stacked(images: Iterable[NDArray[np.uint8]]) -> Frames:
    held = list(images)
    if not held:
        raise UsageError("there are no frames to compare.", fix="Give a clip that has some: --clip.")
    return np.stack(held)


# -- what a model makes of them ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """Of one series of frames: features `[T, N, C]`, merges of the visual bank after each frame but the last, soft prompts."""

    features: NDArray[np.float32]
    merges: NDArray[np.int32]
    soft_prompts: Mapping[str, NDArray[np.float32]]


class _Model:
    """The bundle's graphs, with an empty memory for each series of frames."""

    def __init__(self, bundle: Bundle, questions: Sequence[str]) -> None:
        if not questions:
            raise UsageError("comparing pixels needs at least one question.")
        self._manifest, self._qformer = bundle.manifest, QFormer(bundle)
        self._prompts = {
            question: self._qformer.prompt(bundle.manifest.templates.qformer_text(question)) for question in questions
        }
        self.soft_prompts: list[Mapping[str, NDArray[np.float32]]] = []

    def see(self, frames: Frames) -> _Seen:
        """Watch frames uint8 `[T, S, S, 3]` with every question standing."""
        qformer = self._qformer
        qformer.bank.reset()
        standing = {question: qformer.stand(prompt) for question, prompt in self._prompts.items()}
        features, merges = [], []
        for index, frame in enumerate(frames):
            moment = index / self._manifest.sample_fps
            features.append(qformer.encode(frame[None])[0])
            qformer.remember(features[-1], moment)
            for carried in standing.values():
                carried.step(moment)
            merges.append(qformer.bank.last_merge[0].copy())  # made before this frame entered: of those before it
        answers = {question: carried.answer().rows for question, carried in standing.items()}
        return _Seen(np.stack(features), np.stack(merges[1:] or merges), answers)

    def row(self, name: str, pixels: Frames, wanted: Frames, seen: _Seen, reference: _Seen, cost: float) -> PixelParity:
        """One row of the table, its answers not known yet."""
        if len(pixels) != len(wanted):
            raise UsageError(f"the clip has {len(wanted)} frames once and {len(pixels)} then.", fix="Give a file, not a camera.")
        apart = np.abs(pixels.astype(np.int16) - wanted)
        cosines = _cosines(seen.features, reference.features)
        merged = reference.merges >= 0
        self.soft_prompts.append(seen.soft_prompts)
        return PixelParity(
            name=name,
            mean=float(apart.mean()),
            largest=int(apart.max()),
            cosine=float(cosines.mean()),
            least_cosine=float(cosines.min()),
            merges=float((seen.merges == reference.merges)[merged].mean()) if merged.any() else None,
            answers=None,
            cost=cost,
        )

    def close(self) -> None:
        self._qformer.close()


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each token's features, `[T, N]`; 1 where both are nothing."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=-1) * np.linalg.norm(b64, axis=-1)
    same = (a64 == b64).all(axis=-1)
    return np.where(same, 1.0, (a64 * b64).sum(axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny))


def _with_answers(
    bundle: Bundle, rows: list[PixelParity], soft_prompts: Sequence[Mapping[str, NDArray[np.float32]]]
) -> list[PixelParity]:
    """The rows with the share of answers that are those of the first, if the bundle has a language model."""
    if not bundle.has_llm:
        return rows
    with load_llm(bundle, None) as llm:
        said = [[greedy_answer(bundle, llm, *question) for question in prompts.items()] for prompts in soft_prompts]
    return [
        replace(row, answers=float(np.mean([a == b for a, b in zip(texts, said[0], strict=True)])))
        for row, texts in zip(rows, said, strict=True)
    ]


# -- what they cost ------------------------------------------------------------------------------------------------------


def _costs(clip: str, size: tuple[int, int], ways: Sequence[Choice], tell: Progress) -> list[float]:
    """CPU time of a frame over that of decoding it alone: of the reference, then of each way.

    All are timed in turn, several times over, and the quickest counts: what else runs on the machine only adds.
    """
    decoding, full = Choice("nearest"), replace(ways[0], scaler="bilinear")
    rounds = []
    for index in range(_ROUNDS):
        alone = _cpu_s(frame.image for frame in _first(decoding.open(clip, (2, 2), None)))
        reference = _cpu_s(reference_pixels(frame.image, size) for frame in _first(full.open(clip, None, None)))
        rounds.append([alone, reference, *(_cpu_s(_first(way.open(clip, size, None))) for way in ways)])
        tell("time of a frame", index + 1, _ROUNDS)
    alone, *others = np.min(rounds, axis=0)
    return [float(other / alone) for other in others]


def _first(source: Source) -> Iterator[Any]:
    with source:
        yield from islice(source, _TIMED_FRAMES)


def _cpu_s(frames: Iterable[Any]) -> float:
    """Seconds of CPU time, all threads together, for each item."""
    began = time.process_time()
    count = sum(1 for _ in frames)
    return (time.process_time() - began) / max(1, count)
