"""What another visual encoder does to the memory: both banks over the same clip, once with each variant of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation.parity import difference
from keepsight.runtime.qformer import QFormer, StandingQuestion

__all__ = ["Agreement", "compare_memories"]


@dataclass(frozen=True)
class Agreement:
    """Two runs over one clip, each merging what it finds.

    Attributes:
        visual, query: share of the merge decisions of a bank that are equal; None where nothing merged.
        soft_prompt: cosine of the soft prompts after the last frame.
    """

    visual: float | None
    query: float | None
    soft_prompt: float


@dataclass(frozen=True, eq=False)
class _Run:
    """Merge decisions over time, visual `[T, N]` and query `[T, rows]`, -1 = none; the soft prompt at the end."""

    visual: NDArray[np.int32]
    query: NDArray[np.int32]
    soft_prompt: NDArray[np.float32]


def compare_memories(
    bundle: Bundle, variant: str, frames: Sequence[NDArray[np.uint8]], question: str, *, threads: int = 1
) -> Agreement:
    """A variant of a bundle against the bundle's first one, on frames uint8 `[S, S, 3]` in the order of time."""
    bundles = (Bundle(bundle.path, bundle.manifest, name) for name in (bundle.manifest.variants[0], variant))
    a, b = (_run(one, frames, question, threads) for one in bundles)
    apart = difference(b.soft_prompt, a.soft_prompt, np.inf)
    return Agreement(_share(a.visual, b.visual), _share(a.query, b.query), apart.cosine)


def _run(bundle: Bundle, frames: Sequence[NDArray[np.uint8]], question: str, threads: int) -> _Run:
    qformer = QFormer(bundle, threads=threads)
    standing = qformer.stand(qformer.prompt(bundle.manifest.templates.qformer_text(question)))
    visual, query = [], []
    for index, frame in enumerate(frames):
        time_s = index / bundle.manifest.sample_fps
        qformer.remember(qformer.encode(frame[None])[0], time_s)
        standing.step(time_s)
        visual.append(qformer.bank.last_merge[0].copy())
        query.append(_query_merges(standing, qformer.dims.queries))
    soft_prompt = standing.answer().rows
    qformer.close()
    return _Run(np.stack(visual), np.stack(query), soft_prompt)


def _query_merges(standing: StandingQuestion, queries: int) -> NDArray[np.int32]:
    """Of rows that are no padding; of layer 1's those of the queries, since its text rows are the same at every frame."""
    real = standing.prompt.row_mask > 0
    first, others = standing.bank.last_merge[:1, :queries], standing.bank.last_merge[1:, real]
    return np.concatenate([first.ravel(), others.ravel()])


def _share(a: NDArray[np.int32], b: NDArray[np.int32]) -> float | None:
    merged = (a >= 0) & (b >= 0)
    return float((a == b)[merged].mean()) if merged.any() else None
