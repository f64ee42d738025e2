"""MA-LMM's online loop as its reference computes it, in PyTorch: what the fast path is timed against and must equal.

Written after `blip2_vicuna_instruct.py : generate` and `blip2.py : MBBertSelfAttention.forward, memory_bank_compress`. At every
frame every layer projects its whole bank to keys and values again, all layers run to the end, and similarities are computed for
the whole bank. That is what the fast path leaves out, and there is no other waste: everything is one tensor operation over all
rows, text is not padded, a merge rewrites the rows that it moves and no others. Products go through either of PyTorch's
two libraries (`LINEARS`). No positions, as in a zero-shot checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from keepsight.export.qformer import Attention, FeedForward, QFormer
from keepsight.streams.errors import UsageError

__all__ = ["LINEARS", "Bank", "Linear", "NaiveLoop", "Seen", "linear_rates"]

Choice = NDArray[np.intp] | None
Linear = Callable[[Tensor, nn.Linear], Tensor]
"""Computes `x W^T + b` for rows `x` `[n, in]`."""


def default_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """PyTorch's own way: MKL's sgemm where PyTorch was built with it."""
    return F.linear(x, layer.weight, layer.bias)


def onednn_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """oneDNN's inner product, float32 only: twice as fast as MKL on processors whose AVX-512 MKL leaves alone (AMD)."""
    return torch._C._nn.mkldnn_linear(x.to_mkldnn(), layer.weight, layer.bias).to_dense()


LINEARS: Mapping[str, Linear] = {"default": default_linear, "onednn": onednn_linear}


def linear_rates(rows: int, qformer: QFormer, *, repeats: int = 3) -> dict[str, float]:
    """Multiply-adds a second of processor time (1e9) that each of `LINEARS` reaches for keys of so many rows on this machine.

    oneDNN is left out where PyTorch was built without it.
    """
    layer = cast(Attention, qformer.layer(0).cross).key
    names = [name for name in LINEARS if name == "default" or torch.backends.mkldnn.is_available()]
    return {name: _rate(LINEARS[name], torch.randn(rows, layer.in_features), layer, repeats) for name in names}


@torch.no_grad()
def _rate(linear: Linear, x: Tensor, layer: nn.Linear, repeats: int) -> float:
    linear(x, layer)
    began = process_time()
    for _ in range(repeats):
        linear(x, layer)
    return repeats * x.numel() * layer.out_features / (process_time() - began) / 1e9


@dataclass(frozen=True)
class Seen:
    """What one frame gave.

    Attributes:
        query_output: `[Q, H]`, the last layer's query rows.
        visual_choice: `[N]`, the older one of the pair that each visual token's cosines chose to merge; None = bank not full.
        query_choice: the same for each layer's bank, `[R]`.
    """

    query_output: Tensor
    visual_choice: Choice
    query_choice: list[Choice]


class Bank:
    """At most M rows in time for each of n tokens, and one more until `compress`.

    Attributes:
        rows: `[t, n, C]`, oldest first.
        sizes: `[t, n]`, frames in each.
    """

    def __init__(self, length: int, tokens: int, channels: int, *, dtype: torch.dtype) -> None:
        self.length = length
        self.rows = torch.zeros(0, tokens, channels, dtype=dtype)
        self.sizes = torch.zeros(0, tokens, dtype=dtype)

    def append(self, rows: Tensor) -> None:
        self.rows = torch.cat([self.rows, rows[None]])
        self.sizes = torch.cat([self.sizes, self.sizes.new_ones(1, len(rows))])

    def compress(self, forced: NDArray[np.intp] | None = None) -> Choice:
        """Merge one pair of neighbours per token if there are more than M: the most similar, or the one that is forced.

        Returns:
            The bank's own choice, whatever is forced.
        """
        if len(self.rows) <= self.length:
            return None
        own = torch.max(F.cosine_similarity(self.rows[:-1], self.rows[1:], dim=-1, eps=1e-8), dim=0).indices
        pair = own if forced is None else torch.from_numpy(np.asarray(forced, np.int64))
        tokens = torch.arange(len(pair))
        older, newer = self.sizes[pair, tokens], self.sizes[pair + 1, tokens]
        share = (newer / (older + newer))[:, None]
        merged = torch.lerp(self.rows[pair, tokens], self.rows[pair + 1, tokens], share)
        slots = torch.arange(self.length)[:, None]
        keep = slots + (slots > pair)
        self.rows, self.sizes = self.rows[keep, tokens], self.sizes[keep, tokens]
        self.rows[pair, tokens], self.sizes[pair, tokens] = merged, older + newer
        return cast(NDArray[np.intp], own.numpy())


class NaiveLoop:
    """One question over a stream.

    Args:
        qformer: without position tables; its dtype is that of the banks.
        text_ids: `[L]`, without padding.
        length: M.
        linear: one of `LINEARS`.

    Raises:
        UsageError: a Q-Former with positions.
    """

    def __init__(self, qformer: QFormer, text_ids: Sequence[int], *, length: int, linear: str = "default") -> None:
        config = qformer.config
        if config.position_rows:
            raise UsageError("the naive reference has no positions.", fix="Give a Q-Former without position tables.")
        self._qformer, self._linear = qformer, LINEARS[linear]
        self._text = torch.tensor(list(text_ids), dtype=torch.int64)
        self._dtype = qformer.query_tokens.dtype
        rows = config.queries + len(self._text)
        self._length = length
        self.visual: Bank | None = None
        self.query = [Bank(length, rows, config.hidden, dtype=self._dtype) for _ in range(config.layers)]

    @torch.no_grad()
    def see(
        self,
        features: NDArray[np.floating[Any]],
        *,
        visual_merge: NDArray[np.intp] | None = None,
        query_merge: Mapping[int, NDArray[np.intp]] | None = None,
    ) -> Seen:
        """One frame `[N, C]`, then every bank makes room; merges may be forced on the visual bank and on some layers'."""
        current = torch.from_numpy(np.asarray(features)).to(self._dtype)
        if self.visual is None:
            self.visual = Bank(self._length, *current.shape, dtype=self._dtype)
        self.visual.append(current)
        seen, choices = self.visual.rows.flatten(0, 1), []
        x = self._qformer.embed(self._text)
        for index, bank in enumerate(self.query):
            layer = self._qformer.layer(index)
            bank.append(x)  # the reference appends after attending; the rows attended to are the same
            x = self._attend(layer.attention, x, bank.rows.flatten(0, 1))
            choices.append(bank.compress((query_merge or {}).get(index)))
            queries, text = x.split([self._qformer.config.queries, len(self._text)])
            if layer.cross is not None:
                queries = self._attend(layer.cross, queries, seen)
            queries = self._feed_forward(layer.query_ffn, queries)
            x = queries if layer.text_ffn is None else torch.cat([queries, self._feed_forward(layer.text_ffn, text)])
        return Seen(x[: self._qformer.config.queries], self.visual.compress(visual_merge), choices)

    def _attend(self, attention: Attention, x: Tensor, rows: Tensor) -> Tensor:
        """Rows `x` `[n, H]` attend to the keys and values of `rows` `[K, C]`, made anew."""
        query, key, value = (
            attention.split(self._linear(of, layer))
            for of, layer in ((x, attention.query), (rows, attention.key), (rows, attention.value))
        )
        context = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        return cast(Tensor, attention.norm(self._linear(context.transpose(0, 1).flatten(1), attention.dense) + x))

    def _feed_forward(self, ffn: FeedForward, x: Tensor) -> Tensor:
        return cast(Tensor, ffn.norm(self._linear(F.gelu(self._linear(x, ffn.intermediate)), ffn.output) + x))
