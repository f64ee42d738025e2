"""Random InstructBLIP and BLIP-2 models of Hugging Face `transformers`, small but odd, saved as their users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from keepsight.export.vocabulary import build_tokenizer

QUESTION = "what is the color of the shape?"


def instructblip(**changes: Any) -> Any:
    """A random `InstructBlipForConditionalGeneration` in float32; `changes` like `vision_hidden_size=48` override a size."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    return _spread(InstructBlipForConditionalGeneration(_config(InstructBlipConfig, "instructblip_qformer", changes)))


def blip2(**changes: Any) -> Any:
    """A random `Blip2ForConditionalGeneration` in float32."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    return _spread(Blip2ForConditionalGeneration(_config(Blip2Config, "blip_2_qformer", changes)))


def save(model: Any, folder: Path, **options: Any) -> Path:
    """`save_pretrained`, with a Q-Former tokenizer where a processor would put it."""
    model.save_pretrained(folder, **options)
    (folder / "qformer_tokenizer").mkdir(exist_ok=True)
    build_tokenizer([QUESTION], folder / "qformer_tokenizer" / "tokenizer.json")
    return folder


def _config(kind: Any, qformer: str, changes: dict[str, Any]) -> Any:
    parts: dict[str, dict[str, Any]] = {
        "vision": {
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
            "patch_size": 7,
        },
        "qformer": {
            "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
            "max_position_embeddings": 40, "encoder_hidden_size": 48,
        },
        "text": {
            "model_type": "llama", "vocab_size": 90, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4,
        },
    }  # fmt: skip
    queries = changes.pop("num_query_tokens", 5)
    for name, value in changes.items():
        part, key = name.split("_", 1)
        parts[part][key] = value
    return kind(
        vision_config=parts["vision"],
        qformer_config=parts["qformer"],
        text_config=parts["text"],
        num_query_tokens=queries,
        image_token_index=3,
    )


def _spread(model: Any) -> Any:
    """Weights that all matter: no zero biases or tables, no unit norms, attention that is not flat."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("language_model"):
                continue
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()
