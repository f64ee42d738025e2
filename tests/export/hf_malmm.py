"""MA-LMM's online loop over the modules of Hugging Face `transformers`: an oracle that shares no model code with the project.

`blip2_vicuna_instruct.py : generate` and `blip2.py : MBBertSelfAttention` of the reference, with InstructBLIP's own vision
tower, Q-Former and projection doing the work: frame positions are added before storing, every self-attention layer attends to
its bank and to itself, then banks its input. Banks and merges are those of `naive_malmm.Bank`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keepsight.export.eva import MEAN, STD

from .naive_malmm import Bank, Said


class HuggingFaceMALMM:
    """One question over a stream.

    Args:
        model: an InstructBLIP model; its Q-Former's self-attention is given banks for good.
        text_ids: `[L]`, without padding; none for a BLIP-2 model.
        length: M.
        image_pe: `[frames, C]`, MA-LMM's table; None = zero-shot.
    """

    def __init__(self, model: Any, text_ids: Sequence[int], *, length: int, image_pe: Tensor | None = None) -> None:
        self.model, self.text_ids, self.image_pe = model, torch.tensor([list(text_ids)]), image_pe
        self.visual = Bank(length)
        self.query = [Bank(length) for _ in model.qformer.encoder.layer]
        self._forced: Mapping[int, Sequence[int]] = {}
        self._choices: list[Any] = []
        self._frame = 0
        for index, layer in enumerate(model.qformer.encoder.layer):
            attention = layer.attention.attention
            attention.forward = self._banked(index, type(attention).forward.__get__(attention))

    def features(self, frame: Any) -> Tensor:
        """One frame uint8 `[S, S, 3]` through the tower and its last norm: `[N, C]`."""
        pixels = (torch.from_numpy(frame).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        result: Tensor = self.model.vision_model(pixels.permute(2, 0, 1)[None]).last_hidden_state[0]
        return result

    @torch.no_grad()
    def see(
        self,
        frame: Any,
        *,
        visual_merge: Sequence[int] | None = None,
        query_merge: Mapping[int, Sequence[int]] | None = None,
    ) -> Said:
        """One frame uint8 `[S, S, 3]`; choices to force on the banks as `NaiveMALMM.see` takes them."""
        features = self.features(frame)
        if self.image_pe is not None:
            features = features + self.image_pe[self._frame]
        self._frame += 1
        moment = torch.zeros(len(features), dtype=torch.float64)
        self.visual.append(features, moment, moment)
        self._forced, self._choices = query_merge or {}, []
        output = self._qformer(torch.cat(self.visual.rows)[None])[0]
        return Said(output, self.model.language_projection(output), self.visual.compress(visual_merge), self._choices)

    def _qformer(self, visual: Tensor) -> Tensor:
        model, queries = self.model, self.model.query_tokens
        if self.text_ids.shape[1]:
            mask = torch.ones(1, queries.shape[1] + self.text_ids.shape[1], dtype=torch.long)
            said = model.qformer(
                input_ids=self.text_ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=visual
            )
        else:
            said = model.qformer(query_embeds=queries, encoder_hidden_states=visual)
        rows: Tensor = said.last_hidden_state[:, : queries.shape[1]]
        return rows

    def _banked(self, index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Self-attention over the bank and the current rows, which are then banked. Text has no padding, so no mask."""

        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            bank, rows = self.query[index], hidden_states[0]
            result = plain(hidden_states, encoder_hidden_states=torch.cat([*bank.rows, rows])[None])
            moment = torch.zeros(len(rows), dtype=torch.float64)
            bank.append(rows, moment, moment)
            self._choices.append(bank.compress(self._forced.get(index)))
            return result

        return forward
