"""The Q-Former (BLIP-2, Li et al. 2023; InstructBLIP, Dai et al. 2023) with the memory banks of MA-LMM (He et al. 2024).

One class at every size: InstructBLIP's 12 layers of 768 and keepsight-tiny's 6 of 192 differ in `QFormerConfig` only.
Geometry and numerics are those of LAVIS `Qformer.py` (BERT, post-norm, erf-Gelu): queries first, then text; every
`cross_every`-th layer lets the query rows read the visual tokens; query and text rows have a feed-forward net each.

The banks are not state in here. Callers pass keys and values that were cached per frame, which is exact: MA-LMM banks what
goes into a layer, and nothing stands between a banked row and its affine key and value (`MBBertSelfAttention.forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e4  # as BERT adds it to masked scores; far below any score, and finite in half precision


@dataclass(frozen=True)
class QFormerConfig:
    """Dimensions. `slots` and `time_buckets` describe the position tables; 0 time buckets means no positions.

    `vocab` 0 is a Q-Former without text (BLIP-2): only the query rows flow, and nothing for text exists.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    channels: int
    queries: int
    vocab: int
    max_text: int
    n_embd: int
    cross_every: int = 2
    slots: int = 0
    time_buckets: int = 0
    norm_eps: float = 1e-12

    @property
    def cross_layers(self) -> list[int]:
        """Indices of the layers with cross-attention."""
        return [index for index in range(self.layers) if index % self.cross_every == 0]

    @property
    def position_rows(self) -> int:
        """Rows of a position table: one per rank, then one per time bucket."""
        return self.slots + self.time_buckets if self.time_buckets else 0


class Attention(nn.Module):
    """BERT attention with its output projection and post-norm; keys and values may come from a cache."""

    def __init__(self, config: QFormerConfig, kv_channels: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(kv_channels, config.hidden)
        self.value = nn.Linear(kv_channels, config.hidden)
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)

    def split(self, x: Tensor) -> Tensor:
        """`[..., T, H]` to `[..., heads, T, H / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def finish(self, context: Tensor, residual: Tensor) -> Tensor:
        """Join the heads of `context` `[..., heads, T, d]`, project, add, normalise."""
        joined = context.transpose(-3, -2).flatten(-2)
        return cast(Tensor, self.norm(self.dense(joined) + residual))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Rows `x` `[..., T, H]` attend to `k`, `v` `[..., K, H]`; `mask` is added to scores `[..., heads, T, K]`."""
        context = F.scaled_dot_product_attention(self.split(self.query(x)), self.split(k), self.split(v), mask)
        return self.finish(context, x)


class FeedForward(nn.Module):
    """Linear, erf-Gelu, linear, residual, post-norm."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden, config.ffn)
        self.output = nn.Linear(config.ffn, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.output(F.gelu(self.intermediate(x))) + x))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention of the query rows where the layer has it, and two feed-forward nets."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.queries = config.queries
        self.attention = Attention(config, config.hidden)
        self.cross = Attention(config, config.channels) if index in config.cross_layers else None
        self.text_ffn = FeedForward(config) if config.vocab else None
        self.query_ffn = FeedForward(config)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Each kind of row through its own net: `x` `[..., R, H]`, queries first."""
        if self.text_ffn is None:
            return cast(Tensor, self.query_ffn(x))
        query, text = x[..., : self.queries, :], x[..., self.queries :, :]
        return torch.cat([self.query_ffn(query), self.text_ffn(text)], dim=-2)


class QFormer(nn.Module):
    """Weights and the pieces that the graphs and the training share.

    Shapes: B questions, Q queries, L text rows, R = Q + L, S slots, N visual tokens, H hidden.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(config.queries, config.hidden))
        self.word_embeddings = nn.Embedding(config.vocab, config.hidden) if config.vocab else None
        self.position_embeddings = nn.Embedding(config.max_text, config.hidden) if config.vocab else None
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, index) for index in range(config.layers))
        self.llm_proj = nn.Linear(config.hidden, config.n_embd)
        table = (len(config.cross_layers), config.position_rows, config.hidden)
        self.position_key = nn.Parameter(torch.zeros(table))
        self.position_value = nn.Parameter(torch.zeros(table))
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=0.5)
        for positions in (self.position_key, self.position_value):
            positions.data.copy_(sinusoids(config).expand(table))

    def layer(self, index: int) -> QFormerLayer:
        return cast(QFormerLayer, self.layers[index])

    def embed(self, text_ids: Tensor) -> Tensor:
        """Layer 0's input `[B, R, H]`: queries carry no position, text does (`text_ids` `[B, L]`)."""
        queries = self.query_tokens.expand(*text_ids.shape[:-1], -1, -1)
        if self.word_embeddings is None or self.position_embeddings is None:
            return cast(Tensor, self.embedding_norm(queries))
        places = torch.arange(text_ids.shape[-1], device=text_ids.device)
        text = self.word_embeddings(text_ids) + self.position_embeddings(places)
        return cast(Tensor, self.embedding_norm(torch.cat([queries, text], dim=-2)))

    def prompt_state(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Layer 0's self-attention output `[B, R, H]`, the same for every frame (`text_mask` `[B, L]`, 1 = real)."""
        x = self.embed(text_ids)
        attention = self.layer(0).attention
        mask = additive(self.row_mask(text_mask))[..., None, None, :]
        return cast(Tensor, attention(x, attention.key(x), attention.value(x), mask))

    def row_mask(self, text_mask: Tensor) -> Tensor:
        """`[..., R]`: query rows are always seen, text rows as `text_mask` says."""
        queries = text_mask.new_ones(*text_mask.shape[:-1], self.config.queries)
        return torch.cat([queries, text_mask], dim=-1)

    def cross_kv(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every cross-attention layer: `[..., C]` to two of `[X, ..., H]`."""
        crosses = [cast(Attention, self.layer(index).cross) for index in self.config.cross_layers]
        keys = torch.stack([cross.key(features) for cross in crosses])
        values = torch.stack([cross.value(features) for cross in crosses])
        return keys, values

    def read_visual(
        self,
        index: int,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        bucket: Tensor | None,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """Cross-attention of layer `index` with positions added at reading.

        Instead of expanding the position tables to every slot, scores add `q . key_row` gathered by bucket, and values add
        the attention summed per row times `value_row`: equal, since keys and values are affine in what was banked.

        Args:
            x: `[..., R, H]`; only the first Q rows read.
            k, v: `[..., K, H]` with K = S N.
            mask: `[..., K]`, 1 = visible.
            bucket: int `[..., K]` as `OrderPositions` numbers them, 0 = no position; None for a model without positions.
            shares: gets `visual_share` of the last of several readings (or the only one), if given.
        """
        cross = cast(Attention, self.layer(index).cross)
        queries, text = x[..., : self.config.queries, :], x[..., self.config.queries :, :]
        projected = cross.query(queries)
        if shares is not None:
            last: Any = -1 if projected.dim() > 2 else ...
            bucket_read = None if bucket is None else bucket[last]
            shares.append(self.visual_share(index, projected[last], k[last], mask[last], bucket_read))
        q, keys, values = cross.split(projected), cross.split(k), cross.split(v)
        scores = torch.matmul(q, keys.transpose(-1, -2))
        hot = None
        if bucket is not None and self.config.position_rows:
            table = self.config.cross_layers.index(index)
            key_rows, value_rows = cross.split(self.position_key[table]), cross.split(self.position_value[table])
            hot = self.position_weights(bucket)[..., None, :, :].to(q.dtype)
            scores = scores + torch.matmul(torch.matmul(q, key_rows.transpose(-1, -2)), hot.transpose(-1, -2))
        scores = scores / float(q.shape[-1]) ** 0.5 + additive(mask)[..., None, None, :]
        share = torch.softmax(scores, dim=-1)
        context = torch.matmul(share, values)
        if hot is not None:
            context = context + torch.matmul(torch.matmul(share, hot), value_rows)
        return torch.cat([cross.finish(context, queries), text], dim=-2)

    def visual_share(self, index: int, query: Tensor, k: Tensor, mask: Tensor, bucket: Tensor | None) -> Tensor:
        """How much of layer `index`'s visual attention rests on each token: `[K]`, the mean over heads and query rows; sums to 1.

        Computed beside `read_visual` and not inside, so that nothing looks into an attention that a backend runs as one kernel.
        `query` `[Q, H]` is projected; `k` `[K, H]`, `mask` and `bucket` `[K]` as in `read_visual`.
        """
        cross = cast(Attention, self.layer(index).cross)
        q, keys = cross.split(query), cross.split(k)
        scores = torch.matmul(q, keys.transpose(-1, -2))
        if bucket is not None and self.config.position_rows:
            rows = cross.split(self.position_key[self.config.cross_layers.index(index)])
            hot = self.position_weights(bucket).to(q.dtype)
            scores = scores + torch.matmul(torch.matmul(q, rows.transpose(-1, -2)), hot.transpose(-1, -2))
        share = torch.softmax(scores / float(q.shape[-1]) ** 0.5 + additive(mask), dim=-1)
        return share.flatten(0, 1).mean(0)

    def position_weights(self, bucket: Tensor) -> Tensor:
        """Which table rows a bucket adds, as 0/1: `[..., K]` to `[..., K, position_rows]`.

        Bucket 1 + rank * U + u stands for row `rank` (how many newer slots the token has) and row `slots + u` (its age as a
        share of what is remembered, in U steps); bucket 0 for none.
        """
        steps = self.config.time_buckets
        inside = bucket - 1
        rank = torch.div(inside, steps, rounding_mode="trunc")
        time = inside - rank * steps + self.config.slots
        rows = torch.arange(self.config.position_rows, dtype=bucket.dtype, device=bucket.device)
        hit = (rank[..., None] == rows) | (time[..., None] == rows)
        return (hit & (bucket > 0)[..., None]).to(torch.float32)

    def soft_prompt(self, query_output: Tensor) -> Tensor:
        """Rows for the LLM: `[..., Q, H]` to `[..., Q, n_embd]`."""
        return cast(Tensor, self.llm_proj(query_output))


def sinusoids(config: QFormerConfig) -> Tensor:
    """Position tables before training, `[position_rows, H]`.

    Every head has waves of the rank in one half of its channels and of the age in the other, so that to look one scene
    further back is the same turn of a query wherever it starts, and need not be learnt place by place.
    """
    table = torch.zeros(config.position_rows, config.hidden)
    half = config.hidden // config.heads // 2
    for head in range(config.heads):
        start = head * 2 * half
        table[: config.slots, start : start + half] = _waves(config.slots, half)
        table[config.slots :, start + half : start + 2 * half] = _waves(config.time_buckets, half)
    return table


def _waves(count: int, channels: int) -> Tensor:
    """Sines and cosines of 0..count-1, wavelengths in a geometric row from 4 to twice the count: `[count, channels]`."""
    pairs = max(1, channels // 2)
    length = 4 * (max(count, 2) / 2) ** torch.linspace(0, 1, pairs)
    angle = 2 * torch.pi * torch.arange(count)[:, None] / length
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :channels]


def additive(mask: Tensor) -> Tensor:
    """1 = seen to 0, 0 = hidden to `MASKED`."""
    return (1.0 - mask) * MASKED


def _initialise(module: nn.Module) -> None:
    """Xavier's uniform weights and zero biases. (BERT's fixed 0.02 suits a width of 768; at 128 attention would start flat.)"""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
