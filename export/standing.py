"""Standing questions in training: the query bank carried along frame by frame, gradients at chosen moments.

MA-LMM trains with detached banks, so a moment's gradient stays within that moment. Here the frames before it run without a
graph of gradients, in a batch of (stream, question) pairs, over the visual bank as `MemoryBank` recorded it; the query bank
is compressed in torch by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from keepsight.export.qformer import MASKED, QFormer


class QueryBank:
    """Query banks of many questions at once: `[B, Y, M + 1, R, H]` of rows, merged as MA-LMM does, in time order.

    The layer inputs alone are kept; keys and values are computed from them where they are read, which training needs.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.rows: Tensor | None = None
        self.sizes = torch.zeros(0)
        self.similar = torch.zeros(0)

    def append(self, rows: Tensor) -> None:
        """Bank `rows` `[B, Y, R, H]`, then merge one pair per row if there are more than M."""
        rows = rows.detach()
        one = torch.ones_like(rows[:, :, None, :, 0])
        if self.rows is None:
            self.rows, self.sizes = rows[:, :, None], one
            return
        near = F.cosine_similarity(self.rows[:, :, -1], rows, dim=-1)[:, :, None]
        self.similar = near if self.rows.shape[2] == 1 else torch.cat([self.similar, near], 2)
        self.rows = torch.cat([self.rows, rows[:, :, None]], 2)
        self.sizes = torch.cat([self.sizes, one], 2)
        if self.rows.shape[2] > self.length:
            self._merge(self.similar.argmax(2, keepdim=True))

    def _merge(self, pair: Tensor) -> None:
        assert self.rows is not None
        wide = (*pair.shape, self.rows.shape[-1])
        first, second = pair[..., None].expand(wide), (pair + 1)[..., None].expand(wide)
        a, b = self.sizes.gather(2, pair), self.sizes.gather(2, pair + 1)
        share = (b / (a + b))[..., None]
        merged = torch.lerp(self.rows.gather(2, first), self.rows.gather(2, second), share)
        self.rows = _without(self.rows.scatter(2, first, merged), pair + 1)
        self.sizes = _without(self.sizes.scatter(2, pair, a + b), pair + 1)
        count = self.rows.shape[2]
        left, right = (pair - 1).clamp(min=0), (pair + 1).clamp(max=count - 1)
        at = merged[:, :, 0]
        to_left = F.cosine_similarity(self.rows.gather(2, left[..., None].expand(wide))[:, :, 0], at, dim=-1)[:, :, None]
        to_right = F.cosine_similarity(self.rows.gather(2, right[..., None].expand(wide))[:, :, 0], at, dim=-1)[:, :, None]
        similar = _without(self.similar, pair)
        kept = similar.gather(2, left)
        similar = similar.scatter(2, left, torch.where(pair > 0, to_left, kept))
        inside = pair.clamp(max=count - 2)
        kept = similar.gather(2, inside)
        self.similar = similar.scatter(2, inside, torch.where(pair < count - 1, to_right, kept))


def _without(values: Tensor, index: Tensor) -> Tensor:
    """`values` `[B, Y, T, R, ...]` without position `index` `[B, Y, 1, R]` of each row."""
    count = values.shape[2] - 1
    place = torch.arange(count)[None, None, :, None]
    source = place + (place >= index).to(torch.int64)
    if values.dim() == 5:
        source = source[..., None].expand(*source.shape, values.shape[-1])
    return values.gather(2, source)


@dataclass(frozen=True)
class Moment:
    """The visual bank of B streams at one frame, as recorded: features `[B, S, N, C]`, visible and bucket `[B, S, N]`."""

    features: Tensor
    visible: Tensor
    bucket: Tensor


class VisualReplay:
    """Rebuilds the visual banks of recorded sequences frame by frame, keys and values included."""

    def __init__(self, arrays: dict[str, NDArray[Any]], streams: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self.arrays = arrays
        self.starts = starts[streams]
        tokens = arrays["features"].shape[1]
        self.slots = arrays["bucket"].shape[1]
        self.keep = np.zeros((len(streams), self.slots, tokens, arrays["features"].shape[2]), np.float32)

    def moments(self, frames: int) -> Iterator[Moment]:
        """The banks after each of the first `frames` frames."""
        previous_rank: NDArray[np.int8] | None = None
        previous_size: NDArray[np.int16] | None = None
        for frame in range(frames):
            at = self.starts + frame
            rank, size, merge = (self.arrays[name][at] for name in ("rank", "size", "merge"))
            features = self.arrays["features"][at].astype(np.float32)
            if previous_rank is not None and previous_size is not None:
                self._merge(previous_rank, previous_size, merge)
            newest = (rank == self.slots - 1).argmax(1)[:, None, :, None]
            np.put_along_axis(self.keep, np.broadcast_to(newest, (*newest.shape[:3], self.keep.shape[-1])), features[:, None], 1)
            previous_rank, previous_size = rank, size
            bucket = torch.from_numpy(self.arrays["bucket"][at].astype(np.int64))
            yield Moment(torch.from_numpy(self.keep), torch.from_numpy(rank >= 0), bucket)

    def _merge(self, rank: NDArray[np.int8], size: NDArray[np.int16], merge: NDArray[np.int8]) -> None:
        """What `MemoryBank` did between two frames; streams where it merged nothing are left alone."""
        rows = np.flatnonzero(merge[:, 0] >= 0)
        if not len(rows):
            return
        used = (rank[rows] >= 0).sum(1)
        place = merge[rows].astype(np.int64) + self.slots - used
        into = (rank[rows] == place[:, None]).argmax(1)[:, None]
        other = (rank[rows] == place[:, None] + 1).argmax(1)[:, None]
        a, b = (np.take_along_axis(size[rows], index, 1).astype(np.float32) for index in (into, other))
        x, y = (np.take_along_axis(self.keep[rows], index[..., None], 1) for index in (into, other))
        mixed = x + (b / (a + b))[..., None] * (y - x)
        mine = self.keep[rows]
        np.put_along_axis(mine, np.broadcast_to(into[..., None], mixed.shape), mixed, 1)
        self.keep[rows] = mine


def read_moment(
    qformer: QFormer, state: Tensor, text_mask: Tensor, moment: Moment, bank: QueryBank, *, answer: bool
) -> tuple[Tensor, Tensor | None]:
    """One frame for all questions: rows to bank `[B, n, Y, R, H]` (flattened to `[B n, ...]`), and the query outputs if asked.

    Args:
        state: prompt states `[B n, R, H]`.
        text_mask: `[B n, L]`.
        answer: whether to run the last layer.
    """
    streams, config = moment.features.shape[0], qformer.config
    each = state.shape[0] // streams
    keys, values = qformer.cross_kv(moment.features.flatten(1, 2)[:, None])
    visible = moment.visible.flatten(1)[:, None].to(torch.float32)
    bucket = moment.bucket.flatten(1)[:, None]
    current = torch.where(qformer.row_mask(text_mask) > 0, 0.0, MASKED)

    def read(index: int, x: Tensor) -> Tensor:
        if index in config.cross_layers:
            place = config.cross_layers.index(index)
            x = x.unflatten(0, (streams, each))
            x = qformer.read_visual(index, x, keys[place], values[place], visible, bucket).flatten(0, 1)
        return x

    x = qformer.layer(0).feed_forward(read(0, state))
    inputs: list[Tensor] = []
    last = config.layers - 1
    for index in range(1, last + 1):
        inputs.append(x)
        if index == last and not answer:
            return torch.stack(inputs, 1), None
        attention = qformer.layer(index).attention
        seen, mask = x, current
        if bank.rows is not None:
            past = bank.rows[:, index - 1]
            seen = torch.cat([past.flatten(1, 2), x], 1)
            mask = torch.cat([current[:, None].expand(-1, past.shape[1], -1).flatten(1), current], 1)
        query = x[:, : config.queries] if index == last else x
        context = F.scaled_dot_product_attention(
            attention.split(attention.query(query)), attention.split(attention.key(seen)),
            attention.split(attention.value(seen)), mask[:, None, None, :],
        )  # fmt: skip
        x = read(index, attention.finish(context, query))
        x = qformer.layer(index).query_ffn(x) if index == last else qformer.layer(index).feed_forward(x)
    return torch.stack(inputs, 1), x
