"""LLaMA to GGUF: llama.cpp says what `transformers` says with the same weights, and spells what SentencePiece spells."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keepsight.export.llama_gguf import LanguageSource, LlamaConfig, open_llama, write_gguf
from keepsight.export.llama_reference import check_gguf, logits
from keepsight.runtime.language.llm import LLM, Text
from keepsight.streams.errors import CheckpointError

from .peak_memory import peak_mb
from .random_llama import IDS, cosine, deployed_logits, save_llama

TEXTS = ["what shape was first?", "The circle, then a triangle", "naïve café \u2603 \U0001f600", "tabs\tand  spaces", "12345"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 8, "rope_theta": 500.0}, {"head_dim": 24}],
    ids=["grouped keys", "tied", "ungrouped, another rope", "wide heads"],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], vocabulary: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path, vocabulary, **changes)
    source = open_llama(tmp_path)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0]
    assert (wanted - logits(source, IDS)).abs().max() < 1e-4  # our reference, a layer at a time
    for kind, least in (("F32", 0.999999), ("F16", 0.9999)):
        write_gguf(source, tmp_path / f"{kind}.gguf", name="test", float_type=kind)  # type: ignore[arg-type]
        assert cosine(deployed_logits(tmp_path / f"{kind}.gguf"), wanted.numpy()) > least
    assert check_gguf(tmp_path / "F16.gguf", source).cosine > 0.9999


def test_a_missed_reordering_is_found(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path, vocabulary)
    source = open_llama(tmp_path)
    monkeypatch.setattr("keepsight.export.llama_gguf._reordering", lambda stored, heads: stored.read)
    write_gguf(source, tmp_path / "bad.gguf", name="bad")
    with pytest.raises(CheckpointError, match="does not say what its source says"):
        check_gguf(tmp_path / "bad.gguf", source)


def test_tokens_are_those_of_sentencepiece(vocabulary: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    save_llama(tmp_path, vocabulary)
    write_gguf(open_llama(tmp_path, bos=2), tmp_path / "llm.gguf", name="test")
    pieces = SentencePieceProcessor(model_file=str(vocabulary))
    assert any(pieces.IsByte(token) for text in TEXTS for token in pieces.Encode(text))
    with LLM(tmp_path / "llm.gguf", n_ctx=64, n_threads=1) as model:
        assert model.n_vocab == 701
        for text in TEXTS:
            assert model.tokenise([Text(text)]) == pieces.Encode(text), text


@pytest.mark.parametrize(("bos", "stored"), [(2, 2), (None, 1)], ids=["InstructBLIP's", "SentencePiece's"])
def test_a_text_begins_as_instructblips_tokenizer_begins_it(
    bos: int | None, stored: int, vocabulary: Path, tmp_path: Path
) -> None:
    """Whose special tokens are all `</s>`, id 2. The rows beyond the vocabulary are padding that is never written."""
    from gguf import GGUFReader, TokenType

    save_llama(tmp_path, vocabulary)
    write_gguf(open_llama(tmp_path, bos=bos), tmp_path / "llm.gguf", name="test")
    fields = GGUFReader(tmp_path / "llm.gguf").fields
    special = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("bos_token_id", "eos_token_id", "add_bos_token")}
    assert special == {"bos_token_id": stored, "eos_token_id": 2, "add_bos_token": False}
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert len(tokens) == 701 and (tokens[2], tokens[700]) == ("</s>", "[PAD]") and kinds[700] == TokenType.CONTROL


def test_it_is_the_same_language_model_inside_an_instructblip(vocabulary: Path, tmp_path: Path) -> None:
    from . import hf_models

    model = hf_models.instructblip(text_vocab_size=701, text_num_hidden_layers=2)
    from keepsight.export.checkpoints import load_huggingface

    checkpoint = load_huggingface(hf_models.save(model, tmp_path / "hf"))
    assert checkpoint.llm_config is not None and checkpoint.llm_tensors is not None
    source = LanguageSource(LlamaConfig.read(checkpoint.llm_config), checkpoint.llm_tensors, vocabulary, bos=2)
    write_gguf(source, tmp_path / "llm.gguf", name="inside")
    with torch.no_grad():
        wanted = model.language_model(torch.tensor([IDS]))
    wanted = wanted.logits[0] if hasattr(wanted, "logits") else model.lm_head(wanted.last_hidden_state)[0]
    assert cosine(deployed_logits(tmp_path / "llm.gguf"), wanted.numpy()) > 0.9999


def test_rope_settings_of_transformers_4_and_5() -> None:
    common = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    }  # fmt: skip
    old = LlamaConfig.read({**common, "rope_theta": 5e5, "rope_scaling": None})
    new = LlamaConfig.read({**common, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert old == new and old.rope_theta == 5e5 and old.kv_heads == 32 and old.head_dim == 128
    assert LlamaConfig.read(common).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "opt"}, r"type 'opt' can't be converted.*--llm none"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope 'linear'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], complaint: str) -> None:
    common = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(CheckpointError, match=complaint):
        LlamaConfig.read({**common, "num_attention_heads": 2, **changes})


def test_tensors_that_do_not_fit_are_named(vocabulary: Path, tmp_path: Path) -> None:
    save_llama(tmp_path, vocabulary)
    source = open_llama(tmp_path)
    tensors = dict(source.tensors)
    tensors["model.layers.9.x.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    complaint = "1 missing: model.layers.2.mlp.up_proj.weight; 1 unknown: model.layers.9.x"
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        write_gguf(replace(source, tensors=tensors), tmp_path / "llm.gguf", name="test")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight \[701, 96\] instead of \[999, 96\]"):
        write_gguf(replace(source, config=replace(source.config, vocab=999)), tmp_path / "llm.gguf", name="test")
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        write_gguf(replace(source, tokenizer=tmp_path / "absent"), tmp_path / "llm.gguf", name="test")
    assert not list(tmp_path.glob("llm.gguf*"))


def test_memory_stays_that_of_the_largest_tensors(vocabulary: Path, tmp_path: Path) -> None:
    """A file of 160 MB is written with far less than that: what peaks is torch itself and single tensors."""
    save_llama(tmp_path, vocabulary, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_key_value_heads=8)
    raised = peak_mb(
        "from keepsight.export.llama_gguf import open_llama, write_gguf\nsource = open_llama(Path(sys.argv[1]))",
        "write_gguf(source, Path(sys.argv[1]) / 'llm.gguf', name='big')",
        tmp_path,
    )
    size = (tmp_path / "llm.gguf").stat().st_size >> 20
    print(f"{size} MB written with {raised} MB more than before")
    assert size > 120 and raised < size / 2
