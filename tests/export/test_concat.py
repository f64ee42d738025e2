"""The memory `concat`: each frame read alone, all rows to the language model, as the reference with its memory off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import convert
from keepsight.export.weights import load_qformer
from keepsight.runtime import Bundle, Session
from keepsight.runtime.cli import app
from keepsight.runtime.language.llm import render
from keepsight.streams import Frame
from keepsight.streams.errors import LLMError, UsageError

from ..random_bundle import make_bundle, random_frames
from . import hf_models
from .hf_malmm import HuggingFaceMALMM
from .naive_malmm import Bank, NaiveMALMM
from .test_convert import OPTIONS, text_ids

QUESTION = "what was there first?"
LIMIT = 1e-4


def watch(session: Session, images: np.ndarray) -> None:
    for index, image in enumerate(images):
        session.see(Frame(image, 0.5 * index, 0.0, index))


def test_the_rows_are_those_of_plain_passes_over_single_frames(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", seed=5))
    images = random_frames(7)  # more than the memory has slots: nothing is merged all the same
    qformer = load_qformer(bundle.path)
    with Session(bundle, memory="concat", threads=1) as session:
        standing = session.stand(QUESTION)
        ids, mask = bundle.tokenizer.encode(QUESTION, bundle.manifest.dims.text_buckets)  # type: ignore[union-attr]
        expected = []
        for index, image in enumerate(images):
            features = np.asarray(session.qformer.encode(image[None])[0]).copy()
            moment = np.full(len(features), 0.5 * index)
            loop = NaiveMALMM(qformer, ids[mask > 0], length=4)  # a new one: it has seen nothing else
            expected.append(loop.see(features, moment, moment))
            session.see(Frame(image, 0.5 * index, 0.0, index))
            said = session.perceive(standing)
            assert said.rows.shape == (4 * (index + 1), 40) and said.query_output.shape == (4 * (index + 1), 64)
        for name, got in (("soft_prompt", said.rows), ("query_output", said.query_output)):
            assert np.abs(got - torch.cat([getattr(one, name) for one in expected]).numpy()).max() < LIMIT


@pytest.mark.parametrize("kind", ["none", "table", "current"])
def test_the_rows_are_those_of_transformers_with_each_frames_position(kind: str, tmp_path: Path) -> None:
    images = random_frames(6, size=28)
    table = 2 * torch.randn(len(images), 48, generator=torch.Generator().manual_seed(1))
    if kind == "current":
        table[:-1] = 0  # the last frame's row is the one that is trained
    torch.manual_seed(2)
    model = hf_models.instructblip()
    checkpoint = load_huggingface(hf_models.save(model, tmp_path / "hf"))
    table_used = None if kind == "none" else table
    convert(replace(checkpoint, image_pe=table_used), tmp_path / "bundle", OPTIONS)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.positions.policy == kind
    oracle = HuggingFaceMALMM(model, text_ids(bundle), length=1, image_pe=table_used)
    expected = []
    for image in images:
        oracle.visual, oracle.query = Bank(1), [Bank(1) for _ in oracle.query]
        expected.append(oracle.see(image).soft_prompt)
    with Session(bundle, memory="concat", threads=1) as session:
        standing = session.stand(hf_models.QUESTION)
        watch(session, images)
        rows = session.perceive(standing).rows
    assert np.abs(rows - torch.cat(expected).numpy()).max() < 1e-3


def test_what_an_answer_reads_is_every_row_in_order(tmp_path: Path) -> None:
    with Session(Bundle.open("tiny"), memory="concat", threads=1) as session:
        standing = session.stand(QUESTION)
        watch(session, random_frames(3, size=224))
        rows = session.perceive(standing).rows
        assert len(rows) == 3 * session.bundle.manifest.dims.queries
        prompt = render(session.bundle.manifest.templates.llm, video=rows, question=QUESTION)
        decoding = session.bundle.manifest.decoding
        expected = session.llm.answer(prompt, max_tokens=decoding.max_tokens, stop=decoding.stop).text.strip()
        answer = session.ask(standing).result
        assert (answer.text, answer.mode, answer.frames_seen) == (expected, "standing", 3)
        assert session.rank(standing, [answer.text, "nonsense"]).best.option == answer.text
        with pytest.raises(UsageError, match="before the first frame"):
            session.ask(QUESTION)
        with pytest.raises(UsageError, match="files alone"):
            session.watch(session.source("test://ball"))


def test_as_many_frames_as_the_context_takes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by trying: the language model itself refuses the rows of one frame more."""
    with Session(Bundle.open("tiny"), memory="concat", threads=1) as session:
        dims, decoding = session.bundle.manifest.dims, session.bundle.manifest.decoding
        most = session.stand(QUESTION).carried._most  # type: ignore[attr-defined]

        def generate(frames: int) -> None:
            rows = np.zeros((frames * dims.queries, dims.n_embd), np.float32)
            prompt = render(session.bundle.manifest.templates.llm, video=rows, question=QUESTION)
            session.llm.generate(prompt, max_tokens=decoding.max_tokens)

        generate(most)
        with pytest.raises(LLMError, match="exceeds the context"):
            generate(most + 1)
        session.forget()
        standing = session.stand(QUESTION)
        standing.carried._most = 2  # type: ignore[attr-defined]
        watch(session, random_frames(2, size=224))
        with pytest.raises(UsageError, match=r"no room for frame 2: .* rows of 2 frames.*--when"):
            session.see(Frame(random_frames(1, size=224)[0], 9.0, 0.0, 2))


def test_the_commands(tmp_path: Path) -> None:
    clip = tmp_path / "clip.npy"
    np.save(clip, random_frames(5, size=224))
    asked = CliRunner().invoke(app, ["ask", str(clip), QUESTION, "--memory", "concat", "--threads", "1", "--json"])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["frames_seen"] == 5
    rows = [{"video": "clip.npy", "question": QUESTION, "answer": "x", "time": time_s} for time_s in (1.0, None)]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["eval", "tiny", str(tmp_path / "set.jsonl"), "--memory", "concat", "--threads", "1", "--json"]
    scored = CliRunner().invoke(app, arguments)
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "test://ball", QUESTION], "is live"),
        (["ask", "CLIP", QUESTION, "--mode", "replay"], "Leave --mode out"),
        (["eval", "tiny", "easy-vqa", "--mode", "replay"], "Leave --mode out"),
    ],
)
def test_what_it_can_not_do_is_said_before_anything_is_loaded(arguments: list[Any], says: str, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", random_frames(2))
    given = [str(tmp_path / "clip.npy") if one == "CLIP" else one for one in arguments]
    more = ["--bundle", "nowhere"] if given[0] == "ask" else []
    result = CliRunner().invoke(app, [*given, *more, "--memory", "concat"])
    assert isinstance(result.exception, UsageError) and says in str(result.exception)


def test_it_is_not_saved_since_a_snapshot_would_lose_all_frames_but_the_last(tmp_path: Path) -> None:
    with Session(Bundle.open(make_bundle(tmp_path / "bundle", seed=5)), memory="concat", threads=1) as session:
        session.stand(QUESTION)
        watch(session, random_frames(3))
        with pytest.raises(UsageError, match="can't be saved"):
            session.save(tmp_path / "memory.keepsight")
        with pytest.raises(UsageError, match="can't be saved or restored"):
            session.restore(tmp_path / "memory.keepsight")
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]
