"""A session and its feature log: features written as frames are remembered, and remembered again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from keepsight.runtime.graphs.engine import Tensor
from keepsight.runtime.qformer import QFormer
from keepsight.runtime.storage.feature_history import FeatureHistory
from keepsight.runtime.storage.feature_log import FeatureLog
from keepsight.runtime.storage.snapshot import SavedFrame
from keepsight.streams import Frame
from keepsight.streams.errors import KeepsightError, UsageError

__all__ = ["logging_to", "newest_of", "remember_again"]


def logging_to(log: FeatureLog, on_error: Callable[[KeepsightError], None] | None) -> Callable[[Tensor, Frame], None]:
    """An observer of a session that logs the features of every frame that is due; arguments as of `Session.log_features`."""

    def offer(features: Tensor, frame: Frame) -> None:
        wall_s = time.time() - (time.monotonic() - frame.captured_at)
        try:
            log.offer(features, time_s=frame.time_s, index=frame.index, wall_s=wall_s)
        except KeepsightError as error:
            if on_error is None:
                raise
            on_error(error)

    return offer


def newest_of(log: FeatureLog) -> Frame | None:
    """The newest frame that a log has, without its picture; None of an empty one."""
    newest = log.newest
    return None if newest is None else _frame(newest.time_s, newest.wall_s, newest.index)


def remember_again(
    qformer: QFormer, lock: AbstractContextManager[Any], log: FeatureLog | FeatureHistory, since_s: float, until_s: float
) -> Frame:
    """Put the records of an interval into an empty bank; returns the newest one's frame, without its picture.

    The lock, of the graphs, is held for one record at a time: frames of a camera come in between.

    Raises:
        UsageError: the log has nothing from then.
        SnapshotError: a record of the interval is damaged.
    """
    newest: Frame | None = None
    for record in log.read(since_s, until_s):
        with lock:
            qformer.remember(record.features.astype(np.float32), record.time_s)
        newest = _frame(record.time_s, record.wall_s, record.index)
    if newest is None:
        covered = log.covers_s
        has = "is empty" if covered is None else f"covers {covered[0]:.1f} s to {covered[1]:.1f} s"
        raise UsageError(
            f"the feature log has nothing from {since_s:g} s to {until_s:g} s: it {has}.", fix="Ask about another time."
        )
    return newest


def _frame(time_s: float, wall_s: float, index: int) -> Frame:
    return SavedFrame(np.zeros((0, 0, 3), np.uint8), time_s, wall_s, index).as_frame()
