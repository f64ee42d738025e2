"""Slow, plain memory banks, written from the description of MA-LMM's code: what `keepsight.runtime.memory` must equal.

Nothing here is shared with the fast bank. A token's memory is a Python list of slots, oldest first, and a merge walks
through it as ``memory_bank_compress`` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Slot:
    """What one token remembers of one stretch of time."""

    row: np.ndarray  # [C] float64
    size: int
    first_s: float
    last_s: float


def cosine(a: np.ndarray, b: np.ndarray, eps: float = 1e-8) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norm_a = math.sqrt(sum(float(x) * float(x) for x in a))
    norm_b = math.sqrt(sum(float(x) * float(x) for x in b))
    return dot / (max(norm_a, eps) * max(norm_b, eps))


def weighted_mean(older: Slot, newer: Slot) -> Slot:
    size = older.size + newer.size
    row = (older.row * older.size + newer.row * newer.size) / size
    return Slot(row, size, older.first_s, newer.last_s)


def compress(slots: list[Slot], similarity=cosine) -> tuple[list[Slot], int]:
    """`memory_bank_compress` for one token: merge the first most similar pair of neighbours, shift the rest left."""
    best, best_similarity = 0, -math.inf
    for j in range(len(slots) - 1):
        value = similarity(slots[j].row, slots[j + 1].row)
        if value > best_similarity:
            best, best_similarity = j, value
    return [*slots[:best], weighted_mean(slots[best], slots[best + 1]), *slots[best + 2 :]], best


class NaiveBank:
    """A memory bank for any policy; tokens are (group, token) pairs in lists of lists."""

    def __init__(self, *, length: int, tokens: int, groups: int, policy: str, current_outside: bool, similarity=cosine):
        self.length = length
        self.policy = policy
        self.current_outside = current_outside
        self.similarity = similarity
        self.slots: list[list[list[Slot]]] = [[[] for _ in range(tokens)] for _ in range(groups)]
        self.merged = np.full((groups, tokens), -1)

    def see(self, features: np.ndarray, time_s: float) -> list[list[list[Slot]]]:
        """Take in a frame [G, n, C]; return what the reader of this frame sees of the bank, per group and token.

        The visual bank (not `current_outside`) is read with the frame in it, a query bank without.
        """
        self.merged[:] = -1
        seen = []
        for g, group in enumerate(self.slots):
            seen.append([])
            for i, past in enumerate(group):
                new = Slot(np.array(features[g, i], dtype=np.float64), 1, time_s, time_s)
                past, merge = self.make_room(past)
                self.merged[g, i] = merge
                with_new = self.add(past, new)
                seen[g].append(past if self.current_outside else with_new)
                group[i] = with_new
        return seen

    def make_room(self, past: list[Slot]) -> tuple[list[Slot], int]:
        """What the reference does after each frame but the last, and so before each frame but the first."""
        if self.policy == "mbc" and len(past) > self.length:
            return compress(past, self.similarity)
        if self.policy == "fifo":
            return past[-self.length :], -1
        if self.policy == "last":
            return [], -1
        return past, -1

    def add(self, past: list[Slot], new: Slot) -> list[Slot]:
        if self.policy == "average" and past:
            return [weighted_mean(past[0], new)]
        return [*past, new]
