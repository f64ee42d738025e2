"""The memory `concat`: no memory at all. The Q-Former reads each frame alone, and the language model gets the rows of every one.

It is the reference with its memory off (`blip2_vicuna_instruct.py : generate` with memory_bank_length 0, whose rows of all frames
are laid end to end, oldest first), and what MA-LMM's ablation calls concat: T frames are T x Q rows, so it grows with the stream
and is for clips, to compare with. (The released code never computes the frames' features in that branch; they are taken as with
the memory on, positions included.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.language.llm import LLM, Embeds, Segment, Special, Text, Tokens
from keepsight.runtime.qformer import Prompt, QFormer, SoftPrompt, StandingQuestion
from keepsight.streams.errors import UsageError

__all__ = ["ConcatQuestion", "frames_that_fit"]


class ConcatQuestion(StandingQuestion):
    """A question put to every frame alone. After T frames its soft prompt has T x Q rows.

    Args:
        qformer: with the memory `last`, whose banks hold the newest frame and nothing else.
        most: frames whose rows the language model has room for; None for any number.
    """

    def __init__(self, qformer: QFormer, prompt: Prompt, most: int | None = None) -> None:
        super().__init__(qformer, prompt)
        self._most = most
        self._said: list[SoftPrompt] = []

    def step(self, time_s: float) -> None:
        """Read the frame that was just remembered, and keep what is said of it.

        Raises:
            UsageError: there is no room for its rows.
        """
        if self._most is not None and len(self._said) >= self._most:
            raise UsageError(
                f"the memory concat has no room for frame {len(self._said)}: the language model's context takes the rows of "
                f"{self._most} frames beside this question and its answer.",
                fix="Ask before (--when), or use a memory that does not grow, such as mbc.",
            )
        super().step(time_s)
        self._said.append(super().answer(marked=False))

    def answer(self, *, marked: bool = True) -> SoftPrompt:
        """All frames: query_output float32 `[T Q, H]`, rows float32 `[T Q, n_embd]`, oldest first.

        Where a bundle marks the frame that is answered at (positions `current`), that is the last one here, too.

        Raises:
            UsageError: no frame has been read yet.
        """
        said = [*self._said[:-1], super().answer(marked=marked)]
        return SoftPrompt(
            np.concatenate([one.query_output for one in said]), np.concatenate([one.rows for one in said])
        )


def frames_that_fit(bundle: Bundle, llm: LLM, prompt: Sequence[Segment]) -> int:
    """How many frames' rows the language model has room for, beside a prompt and the longest answer to it.

    Args:
        prompt: what the rows go into; rows that it holds do not count.
    """
    decoding = bundle.manifest.decoding
    text = sum(len(llm.tokenise(part)) for part in _texts(prompt))
    return max(0, llm.n_ctx - text - decoding.max_tokens * decoding.beams) // bundle.manifest.dims.queries


def _texts(prompt: Sequence[Segment]) -> list[list[Text | Special | Tokens]]:
    """The runs of text between rows: neighbouring text is tokenised as one."""
    runs: list[list[Text | Special | Tokens]] = [[]]
    for segment in prompt:
        if isinstance(segment, Embeds):
            runs.append([])
        else:
            runs[-1].append(segment)
    return runs
