"""A random LLaMA as its users have it, and what llama.cpp says of the file that it was turned into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.runtime.language.llm import LLM, Tokens

IDS = [5, 99, 300, 7, 7, 41, 260, 12]


def save_llama(folder: Path, vocabulary: Path, **changes: Any) -> Any:
    """A random LLaMA in `folder`; grouped keys, an enlarged vocabulary."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    sizes = {
        "vocab_size": 701, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(TheirConfig(**(sizes | changes))).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return model


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of all values together."""
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def deployed_logits(gguf: Path) -> np.ndarray:
    """Of `IDS`, `[T, vocab]`."""
    with LLM(gguf, n_ctx=64, n_threads=1) as model:
        return model.logits([Tokens(IDS)], all_positions=True)
