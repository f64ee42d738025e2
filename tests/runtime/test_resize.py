"""A language model that stays loaded while its context and its threads change."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from keepsight.runtime.language.gguf_cache import requantised
from keepsight.runtime.language.llama import Llama
from keepsight.runtime.language.llm import LLM, Special, Text
from keepsight.streams.errors import LLMError, UsageError

from .smollm2 import smollm2_gguf

ASKED = [Special("<|im_start|>user\n"), Text("Name a colour."), Special("<|im_end|>\n<|im_start|>assistant\n")]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(requantised(smollm2_gguf(), kind="F16"), n_ctx=2048, n_threads=1) as opened:
        yield opened


# In a process of its own: in one that has freed large blocks before, the C library keeps what is given back for itself.
GIVEN_BACK = """
import sys
from pathlib import Path
from keepsight.runtime.language.llm import LLM, Text

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with LLM(sys.argv[1], n_ctx=2048, n_threads=1) as llm:
    llm.answer([Text("Name a colour.")], max_tokens=8)
    large = resident()
    llm.resize(1024)
    llm.answer([Text("Name a colour.")], max_tokens=8)
    print(large - resident())
"""


def test_a_smaller_context_gives_memory_back() -> None:
    model = requantised(smollm2_gguf(), kind="F16")
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK, str(model)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 15e6  # keys and values of 1024 positions: 23.6 MB


def test_a_smaller_context_answers_the_same(llm: LLM) -> None:
    before, logits = llm.answer(ASKED, max_tokens=8), llm.logits(ASKED)
    assert llm.resize(1024) and llm.n_ctx == 1024
    after = llm.answer(ASKED, max_tokens=8)
    assert after.text == before.text and after.reused_rows == 0
    np.testing.assert_array_equal(llm.logits(ASKED), logits)
    with pytest.raises(LLMError, match="exceeds the context of 1024"):
        llm.answer(ASKED, max_tokens=1024)
    assert llm.resize(2048) and llm.n_ctx == 2048
    assert llm.answer(ASKED, max_tokens=8).text == before.text


def test_an_open_answer_keeps_its_context(llm: LLM) -> None:
    whole = llm.answer(ASKED, max_tokens=8).text
    writing = llm.generate(ASKED, max_tokens=8)
    pieces = [next(writing)]
    assert not llm.resize(512) and llm.n_ctx == 2048
    assert "".join([*pieces, *writing]) == whole
    assert llm.resize(512)


def test_a_context_that_cant_be_opened_leaves_the_old_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = llm.answer(ASKED, max_tokens=8).text
    with pytest.raises(LLMError, match="trained for 1 to 8192"):
        llm.resize(10_000)
    assert llm.answer(ASKED, max_tokens=8).text == text
    opening, asked = Llama._open_context, []

    def no_room(self: Llama, n_ctx: int, *rest: int) -> object:
        asked.append(n_ctx)
        if n_ctx == 1024:
            raise LLMError("no room")
        return opening(self, n_ctx, *rest)

    monkeypatch.setattr(Llama, "_open_context", no_room)
    with pytest.raises(LLMError, match="no room"):
        llm.resize(1024)
    assert asked == [1024, 2048] and llm.n_ctx == 2048
    assert llm.answer(ASKED, max_tokens=8).text == text

    def never(*_: object) -> object:
        raise LLMError("nothing left")

    monkeypatch.setattr(Llama, "_open_context", never)
    with pytest.raises(LLMError, match="nothing left"):
        llm.resize(1024)
    with pytest.raises(LLMError, match="closed"):
        llm.answer(ASKED, max_tokens=8)


def test_threads_change_between_calls_and_survive_another_context(llm: LLM) -> None:
    text = llm.answer(ASKED, max_tokens=8).text
    writing = llm.generate(ASKED, max_tokens=8)
    pieces = [next(writing)]
    llm.set_threads(2)
    assert "".join([*pieces, *writing]) == text
    assert llm.resize(512) and llm.n_threads == 2
    llm.set_threads(1)
    with pytest.raises(UsageError, match="at least 1"):
        llm.set_threads(0)
    assert llm.n_threads == 1 and llm.newest_prefill is not None and llm.newest_prefill.rows > 8
