"""LAVIS's and MA-LMM's files in the layouts that their code writes, made from the weights of a `transformers` model.

Every name is spelled here as the reference spells it; nothing is taken from the project's own key maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tower(model: Any, *, fused_bias: bool = False) -> dict[str, Tensor]:
    """`eva_vit_g.pth`: the blocks, and what the reference's non-strict load drops (a 40th block, a norm, a head)."""
    theirs = model.vision_model.state_dict()
    state = {
        "cls_token": theirs["embeddings.class_embedding"],
        "pos_embed": theirs["embeddings.position_embedding"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embedding.bias"],
    }
    for index in range(model.config.vision_config.num_hidden_layers):
        hf, lavis = f"encoder.layers.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            state[f"{lavis}.norm1.{part}"] = theirs[f"{hf}.layer_norm1.{part}"]
            state[f"{lavis}.norm2.{part}"] = theirs[f"{hf}.layer_norm2.{part}"]
            state[f"{lavis}.attn.proj.{part}"] = theirs[f"{hf}.self_attn.projection.{part}"]
            state[f"{lavis}.mlp.fc1.{part}"] = theirs[f"{hf}.mlp.fc1.{part}"]
            state[f"{lavis}.mlp.fc2.{part}"] = theirs[f"{hf}.mlp.fc2.{part}"]
        state[f"{lavis}.attn.qkv.weight"] = theirs[f"{hf}.self_attn.qkv.weight"]
        bias = theirs[f"{hf}.self_attn.qkv.bias"]
        if fused_bias:
            state[f"{lavis}.attn.qkv.bias"] = bias
        else:
            state[f"{lavis}.attn.q_bias"], _, state[f"{lavis}.attn.v_bias"] = bias.chunk(3)
    width = state["cls_token"].shape[-1]
    state["blocks.39.norm1.weight"] = torch.ones(width)
    state["norm.weight"], state["norm.bias"] = torch.ones(width), torch.zeros(width)
    state["head.weight"], state["head.bias"] = torch.ones(7, width), torch.zeros(7)
    return state


def qformer(model: Any) -> dict[str, Tensor]:
    """What `instruct_blip_vicuna7b_trimmed.pth` and `checkpoint_best.pth` have under `model`, less `image_pe`."""
    theirs = model.qformer.state_dict()
    state = {
        "query_tokens": model.query_tokens.detach(),
        "ln_vision.weight": model.vision_model.post_layernorm.weight.detach(),
        "ln_vision.bias": model.vision_model.post_layernorm.bias.detach(),
        "llm_proj.weight": model.language_projection.weight.detach(),
        "llm_proj.bias": model.language_projection.bias.detach(),
        "Qformer.bert.embeddings.word_embeddings.weight": theirs["embeddings.word_embeddings.weight"],
        "Qformer.bert.embeddings.position_embeddings.weight": theirs["embeddings.position_embeddings.weight"],
        "Qformer.bert.embeddings.LayerNorm.weight": theirs["embeddings.layernorm.weight"],
        "Qformer.bert.embeddings.LayerNorm.bias": theirs["embeddings.layernorm.bias"],
        "Qformer.bert.embeddings.position_ids": torch.arange(40)[None],
    }
    for key, value in theirs.items():
        if key.startswith("encoder.layer."):
            lavis = key.replace(".attention.attention.", ".attention.self.")
            state["Qformer.bert." + lavis.replace(".crossattention.attention.", ".crossattention.self.")] = value
    return state


def rotary(layers: int = 2) -> dict[str, Tensor]:
    """The buffers that MA-LMM's vendored LLaMA saves with every fine-tuned checkpoint."""
    return {f"llm_model.model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(layers)}
