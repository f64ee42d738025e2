"""The Q-Former's graphs, as design.md freezes their inputs and outputs: visual_kv, prompt, step, answer, replay.

Each is a torch module without a batch axis: one question per call. S = M + 1 slots, N visual tokens, C channels, Q queries,
L text rows, R = Q + L, X cross-attention layers, Y = layers - 1 banked layers, H hidden. Masks are float32, 1 = visible;
what a mask hides must still be finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from keepsight.export.onnxfile import export_onnx
from keepsight.export.qformer import QFormer, additive


class VisualKV(nn.Module):
    """features `[N, C]` -> cross_k, cross_v `[X, N, H]`."""

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer = qformer

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.qformer.cross_kv(features)


class Prompt(nn.Module):
    """text_ids int64 `[L]`, text_mask `[L]` -> prompt_state `[R, H]`: layer 0's self-attention, constant per question."""

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer = qformer

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        return self.qformer.prompt_state(text_ids, text_mask)


class _Reader(nn.Module):
    """What `step` and `replay` share: one layer's visual reading and feed-forward."""

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer = qformer

    def after_attention(
        self,
        index: int,
        x: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        mask: Tensor,
        bucket: Tensor,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """Layer `index` from its self-attention's output on; `cross_k`, `cross_v` `[X, K, H]`. `shares` as in `read_visual`."""
        layer, cross_layers = self.qformer.layer(index), self.qformer.config.cross_layers
        if index in cross_layers:
            place = cross_layers.index(index)
            x = self.qformer.read_visual(index, x, cross_k[place], cross_v[place], mask, bucket, shares)
        return layer.feed_forward(x)


class Step(_Reader):
    """One frame of a standing question: the rows, keys and values to bank for layers 1..last.

    In: prompt_state, cross_k, cross_v `[X, S, N, H]`, visual_mask `[S, N]`, bucket int32 `[S, N]`, self_k, self_v
    `[Y, S, R, H]`, self_mask `[Y, S, R]`, text_mask `[L]`. Out: rows, row_k, row_v `[Y, R, H]`.
    """

    def forward(
        self,
        prompt_state: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        visual_mask: Tensor,
        bucket: Tensor,
        self_k: Tensor,
        self_v: Tensor,
        self_mask: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = cross_k.flatten(1, 2), cross_v.flatten(1, 2)
        mask, places = visual_mask.flatten(), bucket.flatten()
        current = self.qformer.row_mask(text_mask)
        x = self.after_attention(0, prompt_state, keys, values, mask, places)
        rows, row_k, row_v = [], [], []
        last = self.qformer.config.layers - 1
        for index in range(1, last + 1):
            attention = self.qformer.layer(index).attention
            k, v = attention.key(x), attention.value(x)
            rows.append(x)
            row_k.append(k)
            row_v.append(v)
            if index < last:
                seen = torch.cat([self_mask[index - 1].flatten(), current])
                x = attention(
                    x,
                    torch.cat([self_k[index - 1].flatten(0, 1), k]),
                    torch.cat([self_v[index - 1].flatten(0, 1), v]),
                    additive(seen)[None, None, :],
                )
                x = self.after_attention(index, x, keys, values, mask, places)
        return torch.stack(rows), torch.stack(row_k), torch.stack(row_v)


class Answer(_Reader):
    """The last layer, run only when an answer is asked: query_output `[Q, H]` and soft_prompt `[Q, n_embd]`.

    In: rows_last, k_last, v_last `[R, H]`, bank_k, bank_v `[S, R, H]`, bank_mask `[S, R]`, text_mask `[L]`; and, where the last
    layer has cross-attention, its cross_k, cross_v `[S, N, H]`, visual_mask and bucket `[S, N]`.
    """

    def forward(
        self,
        rows_last: Tensor,
        k_last: Tensor,
        v_last: Tensor,
        bank_k: Tensor,
        bank_v: Tensor,
        bank_mask: Tensor,
        text_mask: Tensor,
        *visual: Tensor,
    ) -> tuple[Tensor, Tensor]:
        qformer = self.qformer
        layer = qformer.layer(qformer.config.layers - 1)
        seen = torch.cat([bank_mask.flatten(), qformer.row_mask(text_mask)])
        # Text rows are keys here, but no longer queries: nothing reads what they would become.
        queries = layer.attention(
            rows_last[: qformer.config.queries],
            torch.cat([bank_k.flatten(0, 1), k_last]),
            torch.cat([bank_v.flatten(0, 1), v_last]),
            additive(seen)[None, None, :],
        )
        if layer.cross is not None:
            cross_k, cross_v, mask, bucket = visual
            queries = qformer.read_visual(
                qformer.config.layers - 1,
                queries,
                cross_k.flatten(0, 1),
                cross_v.flatten(0, 1),
                mask.flatten(),
                bucket.flatten(),
            )
        output = layer.query_ffn(queries)
        return output, qformer.soft_prompt(output)


class Replay(_Reader):
    """The Q-Former over the bank's slots as if they were the frames, oldest first, in one block-causal pass.

    In: prompt_state, cross_k, cross_v `[X, S, N, H]`, rank int32 `[S, N]`, bucket int32 `[S, S, N]` (by step, then slot),
    step_mask `[S]`, text_mask `[L]`. Out: those of step S-1: query_output `[Q, H]`, soft_prompt `[Q, n_embd]`, and attention
    `[X, S, N]`: where that step's query rows looked, the mean over heads and rows. Each layer sums to 1; what is hidden has 0.
    """

    def forward(
        self,
        prompt_state: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        rank: Tensor,
        bucket: Tensor,
        step_mask: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qformer, steps = self.qformer, rank.shape[0]
        shares: list[Tensor] = []
        keys, values = cross_k.flatten(1, 2)[:, None], cross_v.flatten(1, 2)[:, None]
        order, now = rank.flatten()[None, :], torch.arange(steps, dtype=rank.dtype)[:, None]
        visible = ((order >= 0) & (order <= now)).to(torch.float32)
        places = bucket.flatten(1)
        rows = prompt_state.shape[0]
        x = self.after_attention(0, prompt_state.expand(steps, rows, -1), keys, values, visible, places, shares)
        # A step sees the rows of earlier steps (its bank) and its own; hidden steps are no one's keys.
        earlier = torch.tril(torch.ones(steps, steps)) * step_mask[None, :]
        seen = earlier[:, :, None] * qformer.row_mask(text_mask)[None, None, :]
        causal = additive(seen.flatten(1))
        last = qformer.config.layers - 1
        for index in range(1, last + 1):
            attention = qformer.layer(index).attention
            k, v = attention.key(x).flatten(0, 1), attention.value(x).flatten(0, 1)
            if index == last:
                break
            x = attention(x, k[None], v[None], causal[:, None, None, :])
            x = self.after_attention(index, x, keys, values, visible, places, shares)
        said = self._last(x[-1], k, v, causal[-1], keys, values, visible[-1], places[-1], shares)
        return *said, torch.stack(shares).unflatten(1, rank.shape)

    def _last(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor,
        places: Tensor,
        shares: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The last layer for the newest step's query rows."""
        qformer = self.qformer
        index = qformer.config.layers - 1
        layer = qformer.layer(index)
        queries = layer.attention(x[: qformer.config.queries], k, v, mask[None, None, :])
        if layer.cross is not None:
            place = qformer.config.cross_layers.index(index)
            queries = qformer.read_visual(index, queries, keys[place, 0], values[place, 0], seen, places, shares)
        output = layer.query_ffn(queries)
        return output, qformer.soft_prompt(output)


def example_inputs(qformer: QFormer, *, slots: int, tokens: int, text: int) -> dict[str, dict[str, Tensor]]:
    """Finite inputs of the right shapes for each graph, by graph and input name."""
    config = qformer.config
    crosses, banked, rows, hidden = len(config.cross_layers), config.layers - 1, config.queries + text, config.hidden
    text_mask = torch.ones(text)
    state = torch.zeros(rows, hidden)
    visual = torch.zeros(crosses, slots, tokens, hidden)
    self_bank = torch.zeros(banked, slots, rows, hidden)
    ones, places = torch.ones(slots, tokens), torch.ones(slots, tokens, dtype=torch.int32)
    rank = torch.arange(slots, dtype=torch.int32)[:, None].expand(slots, tokens).contiguous()
    answer = {
        "rows_last": state, "k_last": state, "v_last": state, "bank_k": self_bank[0], "bank_v": self_bank[0],
        "bank_mask": torch.ones(slots, rows), "text_mask": text_mask,
    }  # fmt: skip
    if config.layers - 1 in config.cross_layers:
        answer |= {"cross_k": visual[0], "cross_v": visual[0], "visual_mask": ones, "bucket": places}
    return {
        "visual_kv": {"features": torch.zeros(tokens, config.channels)},
        "prompt": {"text_ids": torch.ones(text, dtype=torch.int64), "text_mask": text_mask},
        "step": {
            "prompt_state": state, "cross_k": visual, "cross_v": visual, "visual_mask": ones, "bucket": places,
            "self_k": self_bank, "self_v": self_bank, "self_mask": torch.ones(banked, slots, rows), "text_mask": text_mask,
        },
        "answer": answer,
        "replay": {
            "prompt_state": state, "cross_k": visual, "cross_v": visual, "rank": rank,
            "bucket": places.expand(slots, slots, tokens).contiguous(), "step_mask": torch.ones(slots),
            "text_mask": text_mask,
        },
    }  # fmt: skip


GRAPHS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "visual_kv": (VisualKV, ("cross_k", "cross_v")),
    "prompt": (Prompt, ("prompt_state",)),
    "step": (Step, ("rows", "row_k", "row_v")),
    "answer": (Answer, ("query_output", "soft_prompt")),
    "replay": (Replay, ("query_output", "soft_prompt", "attention")),
}
_ROW_AXES = {
    "text_ids": {0: "text"}, "text_mask": {0: "text"}, "prompt_state": {0: "rows"}, "self_k": {2: "rows"}, "self_v": {2: "rows"},
    "self_mask": {2: "rows"}, "rows": {1: "rows"}, "row_k": {1: "rows"}, "row_v": {1: "rows"}, "rows_last": {0: "rows"},
    "k_last": {0: "rows"}, "v_last": {0: "rows"}, "bank_k": {1: "rows"}, "bank_v": {1: "rows"}, "bank_mask": {1: "rows"},
}  # fmt: skip


def dynamic_axes(names: Iterable[str], text: int) -> dict[str, dict[int, str]]:
    """Axes of a graph's inputs and outputs that stay dynamic: those of the text's rows, if there are any."""
    return {name: _ROW_AXES[name] for name in names if name in _ROW_AXES and text}


def export_qformer(
    qformer: QFormer,
    folder: Path,
    *,
    slots: int,
    tokens: int,
    text: int,
    half_storage: bool,
    half_compute: bool = False,
    only: Sequence[str] = (),
) -> list[str]:
    """Write the five graphs, or `only` some, to `folder/<name>.onnx`; only the number of text rows stays dynamic, if any.

    Returns:
        Their names.
    """
    inputs = example_inputs(qformer, slots=slots, tokens=tokens, text=text)
    names = [name for name in GRAPHS if not only or name in only]
    for name in names:
        graph, outputs = GRAPHS[name]
        axes = dynamic_axes([*inputs[name], *outputs], text)
        module = graph(qformer)
        export_onnx(
            module, inputs[name], outputs, folder / f"{name}.onnx", dynamic_axes=axes, half_storage=half_storage,
            half_compute=half_compute,
        )  # fmt: skip
    return names


__all__ = ["GRAPHS", "Answer", "Prompt", "Replay", "Step", "VisualKV", "dynamic_axes", "example_inputs", "export_qformer"]
