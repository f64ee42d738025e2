"""Questions for training: the data set's own about pictures, and generated ones about the past of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from keepsight.runtime.evaluation import easyvqa
from keepsight.runtime.evaluation.scenes import ANSWERS, PAST_KINDS, Label, StreamQuestion, past_question

ANSWER_IDS = {answer: index for index, answer in enumerate(ANSWERS)}
# What is hard to learn is asked more often; "first" and "previous" are learnt within minutes.
_DRAWN = (*PAST_KINDS, "before", "after", "ever", "ever")
_SAMPLES = 4000  # generated questions that show the vocabulary every word of their templates


Form = tuple[str, str, str]


def form_of(question: str, answer: str) -> Form:
    """Of one of the data set's own questions: what it asks for, whether it is negated, and the answer."""
    words = question.rstrip("?").split()
    if answer not in ("yes", "no"):
        return "open", "plain", "color" if "color" in words else "shape"
    asked = "color" if "shape" in words else "shape"  # "is there a red shape?"
    return asked, "negated" if {"not", "no"} & set(words) else "plain", answer


class QuestionSet:
    """The training split's questions by picture.

    Attributes:
        by_picture: (question, answer) rows of every picture.
        by_form: the same rows by what they ask, how, and their answer.
    """

    def __init__(self) -> None:
        self.by_picture: dict[Path, list[tuple[str, str]]] = {}
        self.by_form: dict[Path, dict[Form, list[tuple[str, str]]]] = {}
        for row in easyvqa.load("train"):
            asked = (row.question, row.answer)
            self.by_picture.setdefault(row.picture.path, []).append(asked)
            self.by_form.setdefault(row.picture.path, {}).setdefault(form_of(*asked), []).append(asked)
        self.stills = sorted(self.by_picture, key=lambda path: int(path.stem))

    def texts(self) -> Iterator[str]:
        """Every question that training can ask, at least once each by wording."""
        yield from (question for rows in self.by_picture.values() for question, _ in rows)
        rng = np.random.default_rng(0)
        labels = [(picture.shape, picture.color) for picture in easyvqa.pictures("train")]
        for _ in range(_SAMPLES):
            chosen = [labels[index] for index in rng.integers(len(labels), size=8)]
            for kind in PAST_KINDS:
                made = past_question(kind, chosen, rng)
                if made is not None:
                    yield made.question

    def present(self, path: Path, rng: np.random.Generator, scene: int = 0) -> StreamQuestion:
        """One of the picture's questions, every form of question and answer equally often; the picture is scene `scene`.

        As the data set has them, seven of eight yes/no questions about a color are about a wrong one: whoever only listens
        for the negation is right 88 % of the time, and training stays there for thousands of steps.
        """
        forms = list(self.by_form[path].values())
        rows = forms[rng.integers(len(forms))]
        question, answer = rows[rng.integers(len(rows))]
        return StreamQuestion("present", question, answer, evidence=(scene,), referent=(scene,))

    def about_stream(
        self, path: Path, labels: Sequence[Label], count: int, rng: np.random.Generator, present_share: float = 0.2
    ) -> list[StreamQuestion]:
        """`count` questions about a stream whose scenes showed `labels` and that shows picture `path` now."""
        made: list[StreamQuestion] = []
        while len(made) < count:
            if rng.random() < present_share:
                made.append(self.present(path, rng, len(labels) - 1))
                continue
            question = past_question(_DRAWN[rng.integers(len(_DRAWN))], labels, rng)
            if question is not None:
                made.append(question)
        return made


class TextBatch:
    """Tokenises questions into padded tensors, remembering what it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._seen: dict[str, list[int]] = {}

    def __call__(self, rows: Sequence[Sequence[StreamQuestion]]) -> tuple[Tensor, Tensor, Tensor]:
        """Questions `[B][n]` to ids int64 `[B, n, L]`, mask `[B, n, L]` and answer ids `[B, n]`."""
        ids = [[self._encode(asked.question) for asked in row] for row in rows]
        length = max(len(one) for row in ids for one in row)
        text = torch.zeros(len(rows), len(rows[0]), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), len(rows[0]), length)
        for i, row in enumerate(ids):
            for j, one in enumerate(row):
                text[i, j, : len(one)] = torch.tensor(one)
                mask[i, j, : len(one)] = 1
        answers = torch.tensor([[ANSWER_IDS[asked.answer] for asked in row] for row in rows])
        return text, mask, answers

    def _encode(self, question: str) -> list[int]:
        if question not in self._seen:
            self._seen[question] = self.tokenizer.encode(question).ids
        return self._seen[question]
