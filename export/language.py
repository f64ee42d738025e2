"""The frozen language model in PyTorch: what an answer costs it, given the Q-Former's rows. SmolLM2 from the deployed GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from keepsight.runtime.evaluation.scenes import ANSWERS
from keepsight.runtime.language.llm import LLM, Embeds, Special, Text, Tokens, render

IGNORED = -100


class FrozenLanguageModel:
    """The LLM behind the bundle's template; gradients go through it to the rows, never into it.

    Args:
        gguf: the model's file, read by transformers.
        deployed: the same model in llama.cpp: prompts are tokenised by it, so that training and runtime agree.
        template: with `{video}` and `{question}`.
        end: the token that ends an answer, as text.
    """

    def __init__(self, gguf: Path, deployed: LLM, template: str, end: str = "<|im_end|>") -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        self.model: Any = cast(Any, model).requires_grad_(False)
        self.model.train(False)
        self._deployed, self._template = deployed, template
        self.embedding: Tensor = self.model.get_input_embeddings().weight
        self._end = deployed.tokenise([Special(end)])
        self._seen: dict[str, tuple[list[int], list[int]]] = {}

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer, without the end token."""
        return self._deployed.tokenise([Text(answer)])

    def word_rows(self, queries: int) -> Tensor:
        """`[answers, Q, n_embd]`: for each answer its own word embeddings, repeated over the queries."""
        rows = []
        for answer in ANSWERS:
            ids = self.answer_ids(answer)
            rows.append(self.embedding[[ids[index % len(ids)] for index in range(queries)]])
        return torch.stack(rows)

    def loss(self, soft_prompt: Tensor, rows: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of answers and their end tokens, given `soft_prompt` `[B, Q, n_embd]` and (question, answer) rows.

        Returns:
            The mean over answer tokens, and bool `[B]`: whether greedy decoding would give the answer exactly.
        """
        inputs, targets = self._assemble(soft_prompt, rows)
        mask = (targets != IGNORED - 1).long()
        positions = torch.clamp(mask.cumsum(1) - 1, min=0)
        first = int((targets >= 0).any(0).nonzero()[0, 0])
        hidden = self.model.model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, first - 1 : -1]
        wanted = targets[:, first:]
        logits = F.linear(hidden, self.embedding)
        told = wanted >= 0
        loss = F.cross_entropy(logits[told], wanted[told])
        right = ((logits.argmax(-1) == wanted) | ~told).all(1)
        return loss, right

    def _assemble(self, soft_prompt: Tensor, rows: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Left-padded inputs `[B, T, n_embd]` and targets `[B, T]`: answer ids where they are told, IGNORED elsewhere."""
        parts, targets = [], []
        for soft, (question, answer) in zip(soft_prompt, rows, strict=True):
            before, after = self._around(question)
            told = [*self.answer_ids(answer), *self._end]
            parts.append(torch.cat([self.embedding[before], soft, self.embedding[[*after, *told]]]))
            silent = len(before) + len(soft) + len(after)
            targets.append(torch.tensor([IGNORED] * silent + told))
        length = max(len(part) for part in parts)
        inputs = torch.stack([F.pad(part, (0, 0, length - len(part), 0)) for part in parts])
        padded = torch.stack([F.pad(target, (length - len(target), 0), value=IGNORED - 1) for target in targets])
        return inputs, padded

    def _around(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the rows, as the runtime makes them."""
        if question not in self._seen:
            blank = torch.zeros(1, self.embedding.shape[1]).numpy()
            sides: list[list[Text | Special | Tokens]] = [[], []]
            side = 0
            for segment in render(self._template, video=blank, question=question):
                if isinstance(segment, Embeds):
                    side = 1
                else:
                    sides[side].append(segment)
            before, after = (self._deployed.tokenise(parts) for parts in sides)
            self._seen[question] = (before, after)
        return self._seen[question]
