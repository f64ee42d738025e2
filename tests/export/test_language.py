"""The language model that training sees is the one that answers: same tokens, same logits; its loss reaches the rows only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from keepsight.export.bundlewriter import CHATML, SMOLLM2
from keepsight.export.language import FrozenLanguageModel
from keepsight.runtime.bundle import find_packaged
from keepsight.runtime.evaluation.scenes import ANSWERS
from keepsight.runtime.language.gguf_cache import requantised
from keepsight.runtime.language.llm import LLM, render

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def deployed() -> Iterator[LLM]:
    with LLM(requantised(find_packaged(SMOLLM2), kind="F16"), n_threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def language(deployed: LLM) -> FrozenLanguageModel:
    return FrozenLanguageModel(find_packaged(SMOLLM2), deployed, CHATML)


def test_torch_and_llama_cpp_agree_on_the_next_token(deployed: LLM, language: FrozenLanguageModel) -> None:
    rows = language.word_rows(8)[ANSWERS.index("red")]
    prompt = deployed.logits(render(CHATML, video=rows.numpy(), question=QUESTION))
    inputs, _ = language._assemble(rows[None], [(QUESTION, "red")])
    told = len(language.answer_ids("red")) + 1
    with torch.no_grad():
        logits = language.model(inputs_embeds=inputs[:, :-told]).logits[0, -1].numpy()
    cosine = float(logits @ prompt / np.linalg.norm(logits) / np.linalg.norm(prompt))
    assert cosine > 0.99999 and int(logits.argmax()) == int(prompt.argmax())


def test_padding_does_not_change_the_loss(language: FrozenLanguageModel) -> None:
    rows = language.word_rows(8)[:2]
    asked = [(QUESTION, "rectangle"), ("is there a red shape in the image?", "yes")]
    alone = [language.loss(rows[i : i + 1], asked[i : i + 1])[0] for i in range(2)]
    counts = [len(language.answer_ids(answer)) + 1 for _, answer in asked]
    together, _ = language.loss(rows, asked)
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_reaches_the_rows_and_nothing_else(language: FrozenLanguageModel) -> None:
    rows = language.word_rows(8)[:1].clone().requires_grad_()
    language.loss(rows, [(QUESTION, "red")])[0].backward()
    assert rows.grad is not None and float(rows.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in language.model.parameters())
