"""The golden dump: what a bundle computes for one question, frame by frame, to compare a board with a PC."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.qformer import QFormer, StandingQuestion
from keepsight.streams import Frame
from keepsight.streams.errors import KeepsightError, NoFrameError, UsageError

__all__ = ["record", "save"]


def record(
    qformer: QFormer, frames: Iterable[Frame], question: str, *, prompt: str | None = None
) -> dict[str, NDArray[Any]]:
    """Watch frames with a standing question and keep what it said after each.

    No language model is needed. Everything is kept in memory: about 0.3 MB a frame for keepsight-tiny.

    Args:
        qformer: the bundle's graphs; its memory must be empty, and is filled.
        frames: of the size that the vision graph takes; `Source` scales.
        question: put into the bundle's template.
        prompt: text that goes to the Q-Former's tokenizer as it is, instead of the question.

    Returns:
        For T frames, N visual tokens, C channels, Q queries of width H, language rows of n_embd:

        - times: float64 `[T]`, seconds;
        - features: float32 `[T, N, C]`, after ln_vision, before positions;
        - query_output: float32 `[T, Q, H]`, and soft_prompt: float32 `[T, Q, n_embd]`;
        - visual_merge: int32 `[T, N]`, which neighbours in time order (0 = the oldest and the next) each token merged
          after that frame; -1 where it merged none, and for the last frame, whose merge waits for a next one;
        - query_merge: int32 `[T, Y, R]`, the same for each row (queries, then text and its padding) of each banked layer;
        - text: what the Q-Former read, a str of no axes;
        - visual_size: int32 `[slots in use, N]`, frames in each slot at the end, oldest first.

    Raises:
        UsageError: an empty question, a memory that is not empty, or a policy without merges.
        NoFrameError: there were no frames.
        EngineError: a frame does not fit the vision graph.
    """
    text = _text(qformer, question, prompt)
    standing = qformer.stand(qformer.prompt(text))
    _check_memory(qformer)
    rows = [_row(qformer, standing, frame) for frame in frames]
    if not rows:
        raise NoFrameError("there were no frames to trace.", fix="Give a source that has at least one.")
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    # A merge is recorded with the frame before which it ran, and belongs to the one that it followed.
    for name in ("visual_merge", "query_merge"):
        merges = arrays[name]
        arrays[name] = np.concatenate([merges[1:], np.full_like(merges[:1], -1)])
    arrays["text"] = np.array(text)
    arrays["visual_size"] = qformer.bank.in_time_order()[1][0].astype(np.int32)
    return arrays


def save(path: str | Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write the arrays to an `.npz` file that appears when it is complete: until then it is `NAME.part` beside it.

    Raises:
        UsageError: the folder is not there, or may not be written to.
        KeepsightError: writing failed, such as for a full disk.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.part")
    contents: dict[str, Any] = dict(arrays)
    try:
        with partial.open("wb") as file:
            np.savez(file, **contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"{path} can't be written: {error.strerror}.", fix="Name a file in your folder.") from error
    except OSError as error:
        raise KeepsightError(f"{path} can't be written: {error.strerror}.", fix="Check the free disk space.") from error
    finally:
        partial.unlink(missing_ok=True)


def _row(qformer: QFormer, standing: StandingQuestion, frame: Frame) -> dict[str, NDArray[Any]]:
    features = np.asarray(qformer.encode(frame.image[None])[0])
    qformer.remember(features, frame.time_s)
    standing.step(frame.time_s)
    soft = standing.answer()
    return {
        "times": np.array(frame.time_s, np.float64),
        "features": features,
        "query_output": soft.query_output,
        "soft_prompt": soft.rows,
        "visual_merge": qformer.bank.last_merge[0].copy(),
        "query_merge": standing.bank.last_merge.copy(),
    }


def _text(qformer: QFormer, question: str, prompt: str | None) -> str:
    if not (question if prompt is None else prompt).strip():
        raise UsageError("The question is empty.", fix="Ask something.")
    return qformer.bundle.manifest.templates.qformer_text(question) if prompt is None else prompt


def _check_memory(qformer: QFormer) -> None:
    if qformer.policy != "mbc":
        raise UsageError(f"a trace is of the memory policy mbc, not {qformer.policy}.", fix="Open the bundle with mbc.")
    if qformer.bank.used:
        raise UsageError("a trace starts with an empty memory; this one has seen frames.", fix="Open the bundle again.")
