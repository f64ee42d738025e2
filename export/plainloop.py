"""MA-LMM's online loop in PyTorch, plain: what a bundle's cached keys, values and banks are verified against.

Written after `blip2_vicuna_instruct.py : generate` and `blip2.py : MBBertSelfAttention, memory_bank_compress` of the reference:
every frame projects every banked row to keys and values again, every layer banks its input, text has no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from keepsight.export.qformer import Attention, QFormer
from keepsight.runtime.manifest import AgeInfo, CurrentInfo, Manifest, OrderInfo

__all__ = ["PlainLoop", "Said"]

Choice = NDArray[np.intp] | None


@dataclass(frozen=True)
class Said:
    """What one frame gave: `query_output` `[Q, H]`, `soft_prompt` `[Q, n_embd]`, and the older one of the pair that each bank
    chose to merge after it, per row (None = nothing to merge): of the visual bank `[N]`, and of each layer's bank `[R]`.
    """

    query_output: Tensor
    soft_prompt: Tensor
    visual_choice: Choice
    query_choice: list[Choice]


@dataclass
class _Bank:
    """At most M slots between frames, oldest first: rows `[t, n, C]`, frames in each and first and last moment `[t, n]`."""

    length: int
    rows: Tensor = field(default_factory=lambda: torch.zeros(0))
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0))
    first_s: Tensor = field(default_factory=lambda: torch.zeros(0))
    last_s: Tensor = field(default_factory=lambda: torch.zeros(0))

    def append(self, rows: Tensor, time_s: float) -> None:
        moment = torch.full((1, len(rows)), time_s, dtype=torch.float64)
        for name, value in (("rows", rows[None]), ("sizes", torch.ones_like(moment)), ("first_s", moment), ("last_s", moment)):
            held: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([held, value]) if len(held) else value)

    def compress(self, forced: NDArray[np.intp] | None) -> Choice:
        """Merge one pair of neighbours per row if there are more than M, the most similar or the one that is forced."""
        if len(self.rows) <= self.length:
            return None
        near = F.cosine_similarity(self.rows[:-1], self.rows[1:], dim=-1, eps=1e-8)
        own: NDArray[np.intp] = near.numpy().argmax(0)  # the first on ties
        pair = torch.from_numpy(np.asarray(own if forced is None else forced, np.int64))[None]
        slots = torch.arange(len(self.rows) - 1)[:, None]
        keep = slots + (slots > pair)  # which old slot each new one is; the older of the pair stands for both
        merging = slots == pair
        older, newer = self.sizes.gather(0, keep), self.sizes.gather(0, (keep + 1).clamp(max=len(self.sizes) - 1))
        share = torch.where(merging, newer / (older + newer), torch.zeros_like(older)).to(self.rows.dtype)[..., None]
        wide = keep[..., None].expand(-1, -1, self.rows.shape[-1])
        following = (wide + 1).clamp(max=len(self.rows) - 1)
        self.rows = self.rows.gather(0, wide) * (1 - share) + self.rows.gather(0, following) * share
        self.first_s = self.first_s.gather(0, keep)
        self.last_s = self.last_s.gather(0, keep + merging.long())
        self.sizes = torch.where(merging, older + newer, older)
        return own


class PlainLoop:
    """One question over a stream.

    Args:
        qformer: with its position tables, if the bundle has any.
        manifest: M and the position policy.
        text_ids: `[L]`, without padding.
        table: `[frames, C]`, for the policy `table`: row t is added to frame t before it is banked.
    """

    def __init__(
        self, qformer: QFormer, manifest: Manifest, text_ids: Sequence[int], *, table: Tensor | None = None
    ) -> None:
        self._qformer, self._manifest = qformer, manifest
        self._text = torch.tensor(list(text_ids), dtype=torch.int64)
        length = manifest.dims.memory_length
        self._visual = _Bank(length)
        self._query = [_Bank(length) for _ in range(qformer.config.layers)]
        self._table, self._frames = table, 0

    @torch.no_grad()
    def see(
        self,
        features: NDArray[np.float32],
        time_s: float,
        *,
        visual_merge: NDArray[np.intp] | None = None,
        query_merge: Mapping[int, NDArray[np.intp]] | None = None,
    ) -> Said:
        """One frame `[N, C]` at a moment in seconds; merges to force on the visual bank, and on those of some layers."""
        rows = torch.from_numpy(np.array(features, np.float32))
        if self._table is not None:
            rows = rows + self._table[self._frames]
        self._frames += 1
        self._visual.append(rows, time_s)
        inputs, output = self._read(self._buckets(answering=False))
        if isinstance(self._manifest.positions, CurrentInfo):  # an answer reads again, with the marker, and banks nothing
            output = self._read(self._buckets(answering=True))[1]
        choices = []
        for index, (bank, rows) in enumerate(zip(self._query, inputs, strict=True)):
            bank.append(rows, time_s)
            choices.append(bank.compress((query_merge or {}).get(index)))
        return Said(output, self._qformer.soft_prompt(output), self._visual.compress(visual_merge), choices)

    def _read(self, bucket: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Every layer over both banks: the layers' inputs `[R, H]`, and the last one's query rows `[Q, H]`."""
        qformer, seen = self._qformer, self._visual.rows.flatten(0, 1)
        x, inputs = qformer.embed(self._text), []
        for index in range(qformer.config.layers):
            layer = qformer.layer(index)
            inputs.append(x)
            held = self._query[index].rows
            rows = torch.cat([held.flatten(0, 1), x]) if len(held) else x
            x = layer.attention(x, layer.attention.key(rows), layer.attention.value(rows), torch.zeros(1, 1, len(rows)))
            if isinstance(layer.cross, Attention):
                keys, values = layer.cross.key(seen), layer.cross.value(seen)
                x = qformer.read_visual(index, x, keys, values, torch.ones(len(seen)), bucket)
            x = layer.feed_forward(x)
        return inputs, x[: qformer.config.queries]

    def _buckets(self, *, answering: bool) -> Tensor | None:
        """Position bucket of every slot's tokens, `[t N]` int32, as the policies of `runtime/positions.py` say in words."""
        info, bank = self._manifest.positions, self._visual
        count, tokens = bank.sizes.shape
        if isinstance(info, CurrentInfo):
            bucket = torch.zeros(count, tokens)
            bucket[-1] = float(answering)
        elif isinstance(info, OrderInfo):
            age = bank.last_s[-1] - bank.last_s
            span = float(bank.last_s[-1].max() - bank.first_s.min())
            time = torch.floor(info.time_buckets * age / span).clamp(max=info.time_buckets - 1) if span > 0 else 0 * age
            newer = torch.arange(count - 1, -1, -1)[:, None]
            bucket = 1 + newer * info.time_buckets + time
        elif isinstance(info, AgeInfo):
            edges = torch.tensor(info.edges_s, dtype=torch.float64)
            bucket = 1 + torch.searchsorted(edges, bank.last_s[-1] - bank.last_s, right=True)
        else:
            return None
        return bucket.to(torch.int32).flatten()
