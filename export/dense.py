"""The Q-Former over many questions and banks at once: the form that trains, equal to the graphs and to `QFormer`.

Here the position tables are expanded to every slot, several questions of one stream share its keys and values, and the steps of
a replay lie side by side. The tests hold it against the `replay` graph.

Shapes: B streams, n questions of each, G steps, S slots, N visual tokens, K = S N, Q queries, L text rows, R = Q + L, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from keepsight.export.hints import Watched
from keepsight.export.qformer import MASKED, Attention, QFormer


@dataclass(frozen=True)
class Banks:
    """What B streams remember, as G steps read it.

    Attributes:
        features: float32 `[B, G, S, N, C]`; `[B, 1, S, N, C]` where all steps read the same, as a replay does.
        visible: bool `[B, G, S, N]`, what each step may see.
        bucket: int64 `[B, G, S, N]`, as `OrderPositions` numbers them.
        steps: bool `[B, G]`, steps that see anything; the last always does.
    """

    features: Tensor
    visible: Tensor
    bucket: Tensor
    steps: Tensor


def replay(
    qformer: QFormer, text_ids: Tensor, text_mask: Tensor, banks: Banks, watched: Watched | None = None
) -> Tensor:
    """Query outputs `[B, n, Q, H]` of the last step; `text_ids`, `text_mask` `[B, n, L]`.

    With one step this is a single reading of the bank, without query bank. What the newest step did is added to `watched`.
    """
    visual = _VisualReader(qformer, banks, watched)
    count = qformer.config.queries
    steps = banks.steps.shape[1]
    x = qformer.prompt_state(text_ids, text_mask)[:, :, None].expand(-1, -1, steps, -1, -1)
    mask = _causal_mask(qformer, text_mask, banks.steps)
    last = qformer.config.layers - 1
    for index in range(last + 1):
        layer = qformer.layer(index)
        if index:
            x = _self_attention(layer.attention, x, mask, only_last=index == last, queries=count)
        if layer.cross is not None:
            x = visual.read(index, x)
        x = layer.query_ffn(x[..., :count, :]) if index == last else layer.feed_forward(x)
        if watched is not None:
            watched.queries.append(x[:, :, -1, :count])
    return x[:, :, -1, :count]


def _causal_mask(qformer: QFormer, text_mask: Tensor, steps: Tensor) -> Tensor:
    """Additive `[B n, 1, G R, G R]`: a row sees the rows of earlier live steps and of its own step, never padding."""
    count = steps.shape[1]
    rows = qformer.row_mask(text_mask)
    earlier = torch.tril(torch.ones(count, count, dtype=torch.bool)) & steps[:, None, :]
    earlier = earlier | torch.eye(count, dtype=torch.bool)
    seen = earlier[:, None, :, :, None] & (rows > 0)[:, :, None, None, :]
    seen = seen.flatten(0, 1).flatten(2)
    return torch.where(seen, 0.0, MASKED)[:, None].repeat_interleave(rows.shape[-1], dim=2)


def _self_attention(attention: Attention, x: Tensor, mask: Tensor, *, only_last: bool, queries: int) -> Tensor:
    """`x` `[B, n, G, R, H]` over all rows of all steps; at the last layer only the newest step's query rows are wanted."""
    lead, steps = x.shape[:2], x.shape[2]
    flat = x.flatten(2, 3).flatten(0, 1)
    rows, seen = flat, mask
    if only_last:
        first = flat.shape[1] - x.shape[3]
        rows, seen = flat[:, first : first + queries], mask[:, :, first : first + queries]
    k, v = attention.key(flat), attention.value(flat)
    context = F.scaled_dot_product_attention(attention.split(attention.query(rows)), attention.split(k), attention.split(v), seen)
    out = attention.finish(context, rows).unflatten(0, lead)
    return out[:, :, None] if only_last else out.unflatten(2, (steps, -1))


class _VisualReader:
    """Cross-attention of all questions and steps over shared keys and values."""

    def __init__(self, qformer: QFormer, banks: Banks, watched: Watched | None) -> None:
        self.qformer, self.banks, self.watched = qformer, banks, watched
        config = qformer.config
        self.seen = torch.where(banks.visible.flatten(2), 0.0, MASKED)[:, :, None, None, :]
        place = banks.bucket.flatten(2) - 1
        self.rank = torch.div(place.clamp(min=0), config.time_buckets, rounding_mode="trunc")
        self.time = place.clamp(min=0) - self.rank * config.time_buckets + config.slots
        self.placed = (place >= 0)[..., None].to(torch.float32)

    def read(self, index: int, x: Tensor) -> Tensor:
        """`x` `[B, n, G, R, H]`; the first Q rows read."""
        qformer = self.qformer
        cross = cast(Attention, qformer.layer(index).cross)
        count, table = qformer.config.queries, qformer.config.cross_layers.index(index)
        steps = x.shape[2]
        first = self.banks.steps.shape[1] - steps
        queries, text = x[..., :count, :], x[..., count:, :]
        flat = self.banks.features.flatten(2, 3)
        flat = flat if flat.shape[1] == 1 else flat[:, first:]
        k = cross.key(flat) + self._positions(qformer.position_key[table], first)
        v = cross.value(flat) + self._positions(qformer.position_value[table], first)
        # [B, n, G, Q, H] -> [B, G, heads, n Q, d]: the questions of a stream are more queries over the same keys.
        together = queries.transpose(1, 2).flatten(2, 3)
        q, k, v = cross.split(cross.query(together)), cross.split(k), cross.split(v)
        if self.watched is None:
            context = F.scaled_dot_product_attention(q, k, v, self.seen[:, first:])
        else:
            share = torch.softmax(q @ k.transpose(-1, -2) / float(q.shape[-1]) ** 0.5 + self.seen[:, first:], dim=-1)
            self.watched.attention.append(share[:, -1].unflatten(2, (x.shape[1], count)))
            context = share @ v
        read = cross.finish(context, together).unflatten(2, (x.shape[1], count)).transpose(1, 2)
        return torch.cat([read, text], dim=-2)

    def _positions(self, table: Tensor, first: int) -> Tensor:
        rank, time = F.embedding(self.rank[:, first:], table), F.embedding(self.time[:, first:], table)
        return (rank + time) * self.placed[:, first:]
