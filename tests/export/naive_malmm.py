"""MA-LMM, slow and plain, from its description: what the graphs and banks of a bundle must equal.

Written after `blip2_vicuna_instruct.py : generate` and `blip2.py : MBBertSelfAttention.forward, memory_bank_compress`
of the reference. Every frame, every layer projects its whole bank to keys and values again; every bank holds what the
reference's holds (the first layer's too); text is not padded; nothing is cached, no graph is run, and of the project
only the weights are taken, by their names. Positions, which the reference has not, are as
`runtime.positions.OrderPositions` says in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from keepsight.export.qformer import QFormer


@dataclass
class Bank:
    """At most M + 1 sets of rows, oldest first: each `[n, C]`, with the frames in each row and the times it covers."""

    length: int
    rows: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    first_s: list[Tensor] = field(default_factory=list)
    last_s: list[Tensor] = field(default_factory=list)

    def append(self, rows: Tensor, first_s: Tensor, last_s: Tensor) -> None:
        self.rows.append(rows)
        self.sizes.append(torch.ones(len(rows), dtype=rows.dtype))
        self.first_s.append(first_s)
        self.last_s.append(last_s)

    def compress(self, forced: Sequence[int] | None = None) -> np.ndarray | None:
        """Merge one pair of neighbours of each row if there are more than M; returns each row's own choice `[n]`.

        Args:
            forced: the older one of the pair to merge, per row, instead of the most similar.
        """
        if len(self.rows) <= self.length:
            return None
        bank = torch.stack(self.rows)
        near = F.cosine_similarity(bank[:-1], bank[1:], dim=-1, eps=1e-8)
        chosen = torch.max(near, dim=0).indices
        merge = chosen if forced is None else torch.as_tensor(np.asarray(forced))
        assert (merge >= 0).all() and (merge < len(bank) - 1).all()
        tokens = range(bank.shape[1])
        merged = [self._merged(token, int(merge[token])) for token in tokens]
        for place, name in enumerate(("rows", "sizes", "first_s", "last_s")):
            columns = [torch.stack(column[place]) for column in merged]
            setattr(self, name, list(torch.stack(columns, dim=1)))
        return chosen.numpy()

    def _merged(self, n: int, m: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """One row's slots with m and m + 1 as one: their mean, weighted by the frames in each."""
        rows, sizes, first_s, last_s = (
            [slot[n] for slot in slots] for slots in (self.rows, self.sizes, self.first_s, self.last_s)
        )
        total = sizes[m] + sizes[m + 1]
        rows[m] = (sizes[m] * rows[m] + sizes[m + 1] * rows[m + 1]) / total
        sizes[m], last_s[m] = total, last_s[m + 1]
        for slots in (rows, sizes, last_s, first_s):
            del slots[m + 1]
        return rows, sizes, first_s, last_s


@dataclass(frozen=True)
class Said:
    """What one frame gave: `[Q, H]`, `[Q, n_embd]`, the pairs that banks chose to merge after it (None = none), and where its
    query rows looked: of each cross-attention the mean over heads and rows, `[X, used, N]`, oldest slot first (None = unknown).
    """

    query_output: Tensor
    soft_prompt: Tensor
    visual_choice: np.ndarray | None
    query_choice: list[np.ndarray | None]
    attention: Tensor | None = None


class NaiveMALMM:
    """The online loop for one question.

    Args:
        qformer: where the weights come from.
        text_ids: `[L]`, without padding.
        length: M.
        dtype: to compute in.
    """

    def __init__(
        self, qformer: QFormer, text_ids: Sequence[int], *, length: int, dtype: torch.dtype = torch.float64
    ) -> None:
        self.config = qformer.config
        self.weights = {name: value.detach().to(dtype) for name, value in qformer.state_dict().items()}
        self.text_ids = torch.as_tensor(np.asarray(text_ids))
        self.visual = Bank(length)
        self.query = [Bank(length) for _ in range(self.config.layers)]
        self.looked: dict[str, Tensor] = {}

    def see(
        self,
        features: np.ndarray,
        first_s: np.ndarray,
        last_s: np.ndarray,
        *,
        visual_merge: Sequence[int] | None = None,
        query_merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Said:
        """One frame `[N, C]`, whose tokens cover `first_s` to `last_s` `[N]`; then the banks are compressed.

        Args:
            visual_merge, query_merge: choices to force on the visual bank, and on those of some layers.
        """
        config = self.config
        start, end = (torch.from_numpy(np.asarray(t, dtype=np.float64)) for t in (first_s, last_s))
        self.visual.append(torch.from_numpy(features).to(self.weights["query_tokens"].dtype), start, end)
        x = self._embedding()
        choices = []
        for index in range(config.layers):
            layer_input = x
            x = self._self_attention(index, x)
            moment = torch.zeros(len(x), dtype=torch.float64)
            self.query[index].append(layer_input, moment, moment)
            choices.append(self.query[index].compress((query_merge or {}).get(index)))
            queries, text = x[: config.queries], x[config.queries :]
            if index % config.cross_every == 0:
                queries = self._cross_attention(index, queries)
            x = torch.cat([self._ffn(index, "query_ffn", queries), self._ffn(index, "text_ffn", text)])
        output = x[: config.queries]
        crosses = [self.looked[f"layers.{index}.cross"] for index in range(0, config.layers, config.cross_every)]
        attention = torch.stack(crosses).unflatten(1, (len(self.visual.rows), len(features)))
        return Said(output, self._linear("llm_proj", output), self.visual.compress(visual_merge), choices, attention)

    def _embedding(self) -> Tensor:
        text = self.weights["word_embeddings.weight"][self.text_ids]
        text = text + self.weights["position_embeddings.weight"][: len(self.text_ids)]
        return self._norm("embedding_norm", torch.cat([self.weights["query_tokens"], text]))

    def _self_attention(self, index: int, x: Tensor) -> Tensor:
        """Rows attend to all banked sets of rows and to themselves."""
        name = f"layers.{index}.attention"
        seen = torch.cat([*self.query[index].rows, x])
        keys, values = self._linear(f"{name}.key", seen), self._linear(f"{name}.value", seen)
        return self._attend(name, x, keys, values)

    def _cross_attention(self, index: int, queries: Tensor) -> Tensor:
        """Query rows attend to every token of every slot, its position added to the projected key and value."""
        name = f"layers.{index}.cross"
        table = index // self.config.cross_every
        keys, values = [], []
        for slot, (place, age) in zip(self.visual.rows, self._position_rows(), strict=True):
            for into, part, position in ((keys, "key", "position_key"), (values, "value", "position_value")):
                rows = self.weights[position][table]
                into.append(self._linear(f"{name}.{part}", slot) + rows[place] + rows[age])
        return self._attend(name, queries, torch.cat(keys), torch.cat(values))

    def _position_rows(self) -> list[tuple[list[int], list[int]]]:
        """For each slot, oldest first: the row of the position table for each token's place, and for its age."""
        bank, steps = self.visual, self.config.time_buckets
        newest = bank.last_s[-1].tolist()
        span = max(newest) - min(float(first.min()) for first in bank.first_s)
        result = []
        for rank, last in enumerate(bank.last_s):
            ages = [now - then for now, then in zip(newest, last.tolist(), strict=True)]
            shares = [min(steps - 1, int(steps * age / span)) if span > 0 else 0 for age in ages]
            newer_slots = len(bank.rows) - 1 - rank
            result.append(([newer_slots] * len(last), [self.config.slots + share for share in shares]))
        return result

    def _attend(self, name: str, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width = self.config.hidden // self.config.heads
        query = self._linear(f"{name}.query", x)
        context, shares = [], []
        for head in range(self.config.heads):
            part = slice(head * width, (head + 1) * width)
            share = torch.softmax(query[:, part] @ keys[:, part].T / width**0.5, dim=-1)
            context.append(share @ values[:, part])
            shares.append(share)
        self.looked[name] = sum(share.mean(0) for share in shares) / len(shares)
        return self._norm(f"{name}.norm", self._linear(f"{name}.dense", torch.cat(context, dim=-1)) + x)

    def _ffn(self, index: int, kind: str, x: Tensor) -> Tensor:
        name = f"layers.{index}.{kind}"
        inner = self._linear(f"{name}.intermediate", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        return self._norm(f"{name}.norm", self._linear(f"{name}.output", inner) + x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def replay(
    qformer: QFormer, text_ids: Sequence[int], slots: np.ndarray, first_s: np.ndarray, last_s: np.ndarray
) -> Said:
    """A question put now: the online loop with a bank's slots as the frames, each token's own, oldest first.

    Args:
        slots: `[used, N, C]` in time order, with `first_s`, `last_s` `[used, N]`.
    """
    loop = NaiveMALMM(qformer, text_ids, length=len(slots))  # long enough: nothing is compressed on the way
    said = [loop.see(*frame) for frame in zip(slots, first_s, last_s, strict=True)]
    return said[-1]
