"""Closed questions: probabilities of the options equal those of plain forward passes, in both ways to ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from keepsight.runtime import Bundle, Session
from keepsight.runtime.cli import app
from keepsight.runtime.language.llm import Score, Special, Text, Tokens, render
from keepsight.runtime.session import Standing
from keepsight.streams import Frame
from keepsight.streams.errors import UsageError

from ..random_bundle import random_frames

QUESTION = "what color is the shape?"
# One is the beginning of another, and one has several tokens.
OPTIONS = ["red", "green", "red circle", "a purple rhombicuboctahedron"]
CLOSE = 0.02  # nats: llama.cpp's kernels round by the shape of a batch


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(Bundle.open("tiny"), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def standing(session: Session) -> Standing:
    """Carried along 12 frames, more than the memory has slots."""
    put = session.stand(QUESTION)
    for index, image in enumerate(random_frames(12, size=224)):
        session.see(Frame(image, 0.25 * index, 0.0, index))
    return put


def slow_score(session: Session, question: str | Standing, option: str, score: Score) -> tuple[float, int]:
    """Log-probability of an option by one forward pass for each of its tokens, from an empty cache; and how many tokens."""
    llm = session.llm
    rows = session.perceive(question).rows
    prompt = render(session.bundle.manifest.templates.llm, video=rows, question=QUESTION)
    ids, total = llm.tokenise([Text(option)]), 0.0
    for count in range(len(ids) + (score != "prefix")):
        llm.reset()
        logits = llm.logits([*prompt, Tokens(ids[:count])]).astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        ends = llm.tokenise([Special("<|im_end|><|endoftext|>")])
        total += float(np.log(shares[ids[count]] if count < len(ids) else shares[ends].sum()))
    return total, len(ids) + (score != "prefix")


@pytest.mark.parametrize(
    ("mode", "score"), [("standing", "answer"), ("standing", "prefix"), ("standing", "mean"), ("replay", "answer")]
)
def test_scores_are_those_of_plain_forward_passes(session: Session, standing: Standing, mode: str, score: Score) -> None:
    question: str | Standing = standing if mode == "standing" else QUESTION
    ranking = session.rank(question, OPTIONS, score=score)
    slow = {option: slow_score(session, question, option, score) for option in OPTIONS}
    found = {item.option: item for item in ranking}
    assert set(found) == set(OPTIONS) and ranking.mode == mode
    for option, (logprob, tokens) in slow.items():
        assert found[option].logprob == pytest.approx(logprob, abs=CLOSE) and found[option].tokens == tokens
    scores = np.array([logprob / (tokens if score == "mean" else 1) for logprob, tokens in slow.values()])
    normaliser = float(np.log(np.exp(scores).sum()))
    assert ranking.log_normaliser == pytest.approx(normaliser, abs=CLOSE)
    for option, value in zip(slow, scores, strict=True):
        assert np.log(found[option].probability) == pytest.approx(value - normaliser, abs=2 * CLOSE)
    assert sum(item.probability for item in ranking) == pytest.approx(1, abs=1e-12)
    assert [item.probability for item in ranking] == sorted((item.probability for item in ranking), reverse=True)


def test_the_order_of_the_options_changes_nothing(session: Session, standing: Standing) -> None:
    options = OPTIONS[:3]
    rankings = [session.rank(standing, order) for order in permutations(options)]
    for ranking in rankings[1:]:
        assert [item.option for item in ranking] == [item.option for item in rankings[0]]
        for item, other in zip(ranking, rankings[0], strict=True):
            assert item.probability == pytest.approx(other.probability, abs=CLOSE)


def test_the_likeliest_option_is_what_is_answered(session: Session, standing: Standing) -> None:
    said = session.ask(standing).result.text
    ranking = session.rank(standing, ["triangle", said, "seven"])
    assert ranking.best.option == said and ranking.best.probability > 0.5
    assert np.exp(ranking.log_normaliser) <= 1  # of all that it could say, these are a part


def test_an_option_can_lose_to_one_that_it_begins_only_where_its_end_counts(session: Session) -> None:
    llm = session.llm
    asked = "<|im_start|>user\nWhat is the capital of France? Answer in a sentence.<|im_end|>\n<|im_start|>assistant\n"
    short, long = "The capital", "The capital of France is Paris."
    ids = [llm.tokenise([Text(text)]) for text in (short, long)]
    assert ids[1][: len(ids[0])] == ids[0]
    assert [item.option for item in llm.rank([Special(asked)], [long, short], score="prefix")] == [short, long]
    assert [item.option for item in llm.rank([Special(asked)], [short, long], score="answer")] == [long, short]


def test_a_single_option_is_certain(session: Session, standing: Standing) -> None:
    ranking = session.rank(standing, ["nonsense"])
    assert len(ranking) == 1 and ranking.best.probability == 1.0 and ranking.log_normaliser == ranking.best.logprob


@pytest.mark.parametrize("options", [[], ["red", ""], ["red", " "], ["red", "red"]])
def test_what_is_no_choice_is_refused(session: Session, standing: Standing, options: list[str]) -> None:
    with pytest.raises(UsageError, match="no options"):
        session.rank(standing, options)


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    clip = tmp_path / "clip.npy"
    np.save(clip, random_frames(4, size=224))
    arguments = ["ask", str(clip), QUESTION, "--options", "red, green,blue", "--threads", "1"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert len(lines) == 4 and {line.split()[0] for line in lines[:3]} == {"red", "green", "blue"} and "%" in lines[0]
    ranking = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--mode", "replay"]).stdout)
    assert ranking["mode"] == "replay" and ranking["score"] == "answer" and ranking["frames_seen"] == 4
    assert ranking["options"][0]["option"] == lines[0].split()[0]  # nothing merged: both ways are one
    assert sum(row["probability"] for row in ranking["options"]) == pytest.approx(1)


def test_the_command_refuses_what_is_no_choice_before_it_loads_anything() -> None:
    result = CliRunner().invoke(app, ["ask", "test://ball", QUESTION, "--options", "red,,blue", "--bundle", "nowhere"])
    assert isinstance(result.exception, UsageError) and "no options" in str(result.exception)
