"""Which weight of a published checkpoint is which of ours: LAVIS's and MA-LMM's names, and Hugging Face's.

A translated name starts with the part that it belongs to: `vision.` (`export/eva.py`), `qformer.` (`export/qformer.py`),
`llm.` (the language model, by its own names), or is `image_pe` (MA-LMM's table of frame positions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keepsight.export.tensorfiles import StoredTensor
from keepsight.streams.errors import CheckpointError

__all__ = ["EVA_FILE", "HUGGING_FACE", "LAVIS", "Rule", "Translated", "fit", "translate"]


@dataclass(frozen=True)
class Rule:
    """Keys that match `pattern` as a whole become `name`; None: they are known, and not needed."""

    pattern: str
    name: str | None


# The two halves of a BERT layer, with LAVIS's and Hugging Face's names of the same things.
def _bert(layer: str, own: str) -> list[Rule]:
    rules = []
    for theirs, ours in (("attention", "attention"), ("crossattention", "cross")):
        rules += [
            Rule(rf"{layer}\.{theirs}\.{own}\.(query|key|value)\.(weight|bias)", rf"qformer.layers.\1.{ours}.\2.\3"),
            Rule(rf"{layer}\.{theirs}\.output\.dense\.(weight|bias)", rf"qformer.layers.\1.{ours}.dense.\2"),
            Rule(rf"{layer}\.{theirs}\.output\.LayerNorm\.(weight|bias)", rf"qformer.layers.\1.{ours}.norm.\2"),
        ]
    for theirs, ours in (("", "text_ffn"), ("_query", "query_ffn")):
        rules += [
            Rule(rf"{layer}\.intermediate{theirs}\.dense\.(weight|bias)", rf"qformer.layers.\1.{ours}.intermediate.\2"),
            Rule(rf"{layer}\.output{theirs}\.dense\.(weight|bias)", rf"qformer.layers.\1.{ours}.output.\2"),
            Rule(rf"{layer}\.output{theirs}\.LayerNorm\.(weight|bias)", rf"qformer.layers.\1.{ours}.norm.\2"),
        ]
    return rules


def _eva(prefix: str) -> list[Rule]:
    """LAVIS's ViT, whose names ours are. The reference builds 39 of the tower's 40 blocks and drops its head."""
    return [
        Rule(rf"{prefix}(cls_token|pos_embed)", r"vision.\1"),
        Rule(rf"{prefix}patch_embed\.proj\.(weight|bias)", r"vision.patch_embed.\1"),
        Rule(rf"{prefix}blocks\.39\..*", None),
        Rule(rf"{prefix}blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)", r"vision.blocks.\1.\2.\3"),
        Rule(rf"{prefix}blocks\.(\d+)\.attn\.([qv]_bias)", r"vision.blocks.\1.attn.\2"),
        Rule(rf"{prefix}(norm|fc_norm|head|lm_head)\.(weight|bias)", None),
        Rule(rf"{prefix}mask_token", None),
    ]


EVA_FILE: Sequence[Rule] = _eva("")
"""`eva_vit_g.pth`: the tower alone."""

LAVIS: Sequence[Rule] = [
    Rule(r"query_tokens", "qformer.query_tokens"),
    Rule(r"ln_vision\.(weight|bias)", r"vision.ln_vision.\1"),
    *_eva(r"visual_encoder\."),
    Rule(r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"qformer.\1_embeddings.weight"),
    Rule(r"Qformer\.bert\.embeddings\.LayerNorm\.(weight|bias)", r"qformer.embedding_norm.\1"),
    Rule(r"Qformer\.bert\.embeddings\.position_ids", None),
    *_bert(r"Qformer\.bert\.encoder\.layer\.(\d+)", "self"),
    Rule(r"Qformer\.cls\..*", None),
    Rule(r"(?:llm|llama|opt)_proj\.(weight|bias)", r"qformer.llm_proj.\1"),
    Rule(r"image_pe\.weight", "image_pe"),
    Rule(r"llm_model\..*rotary_emb\.inv_freq", None),  # computed from the configuration
    Rule(r"(?:llm_model|llama_model|opt_model)\.(.*)", r"llm.\1"),
    Rule(r"(?:temp|itm_head\..*|vision_proj\..*|text_proj\..*)", None),  # of BLIP-2's first training stage
]
"""`instruct_blip_vicuna7b_trimmed.pth`, BLIP-2's files, and MA-LMM's `checkpoint_best.pth`."""

_HF_BLOCK = r"vision_model\.encoder\.layers\.(\d+)"
HUGGING_FACE: Sequence[Rule] = [
    Rule(r"query_tokens", "qformer.query_tokens"),
    Rule(r"vision_model\.embeddings\.class_embedding", "vision.cls_token"),
    Rule(r"vision_model\.embeddings\.position_embedding", "vision.pos_embed"),
    Rule(r"vision_model\.embeddings\.patch_embedding\.(weight|bias)", r"vision.patch_embed.\1"),
    Rule(rf"{_HF_BLOCK}\.layer_norm([12])\.(weight|bias)", r"vision.blocks.\1.norm\2.\3"),
    Rule(rf"{_HF_BLOCK}\.self_attn\.qkv\.(weight|bias)", r"vision.blocks.\1.attn.qkv.\2"),
    Rule(rf"{_HF_BLOCK}\.self_attn\.([qv]_bias)", r"vision.blocks.\1.attn.\2"),
    Rule(rf"{_HF_BLOCK}\.self_attn\.projection\.(weight|bias)", r"vision.blocks.\1.attn.proj.\2"),
    Rule(rf"{_HF_BLOCK}\.mlp\.(fc[12])\.(weight|bias)", r"vision.blocks.\1.mlp.\2.\3"),
    Rule(r"vision_model\.post_layernorm\.(weight|bias)", r"vision.ln_vision.\1"),
    Rule(r"qformer\.embeddings\.(word|position)_embeddings\.weight", r"qformer.\1_embeddings.weight"),
    Rule(r"qformer\.(?:embeddings\.)?layernorm\.(weight|bias)", r"qformer.embedding_norm.\1"),
    Rule(r"qformer\.embeddings\.position_ids", None),
    *_bert(r"qformer\.encoder\.layer\.(\d+)", "attention"),
    Rule(r"language_projection\.(weight|bias)", r"qformer.llm_proj.\1"),
    Rule(r"language_model\..*rotary_emb\.inv_freq", None),
    Rule(r"language_model\.(.*)", r"llm.\1"),
]
"""`InstructBlipForConditionalGeneration` and `Blip2ForConditionalGeneration` folders."""


@dataclass
class Translated:
    """A checkpoint under our names, and the keys that no rule knows."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    def part(self, name: str) -> dict[str, StoredTensor]:
        """The tensors of `vision`, `qformer` or `llm`, without that prefix."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def translate(tensors: Mapping[str, StoredTensor], rules: Iterable[Rule]) -> Translated:
    """Rename a checkpoint's keys; the first rule that matches decides. Biases of q and v are joined to one of q, k, v."""
    compiled = [(re.compile(rule.pattern), rule.name) for rule in rules]
    result = Translated()
    for key, tensor in tensors.items():
        found = next(((match, name) for pattern, name in compiled if (match := pattern.fullmatch(key))), None)
        if found is None:
            result.unexpected.append(key)
        elif found[1] is not None:
            result.tensors[found[0].expand(found[1])] = tensor
    _join_biases(result.tensors)
    return result


def _join_biases(tensors: dict[str, StoredTensor]) -> None:
    """`q_bias` and `v_bias` become `qkv.bias`, with zeros for the keys, which have none."""
    for key in [key for key in tensors if key.endswith(".q_bias")]:
        stem = key.removesuffix("q_bias")
        if f"{stem}v_bias" not in tensors or f"{stem}qkv.bias" in tensors:
            continue  # `fit` names what is missing or too much
        tensors[f"{stem}qkv.bias"] = _joined(tensors.pop(key), tensors.pop(f"{stem}v_bias"))


def _joined(q: StoredTensor, v: StoredTensor) -> StoredTensor:
    def read() -> Tensor:
        q_bias, v_bias = q.read(), v.read()
        return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    return StoredTensor((2 * q.shape[0] + v.shape[0],), read)


def fit(
    found: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], *, part: str, source: str
) -> dict[str, StoredTensor]:
    """The tensors that a module needs, each of the right shape (leading axes of length 1 may be more or fewer).

    Raises:
        CheckpointError: keys are missing, too many or wrongly shaped; all are named, by our names.
    """
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    wrong = [
        f"{key} {list(found[key].shape)} instead of {list(shape)}"
        for key, shape in sorted(wanted.items())
        if key in found and _bare(found[key].shape) != _bare(shape)
    ]
    complaints = [
        f"{len(keys)} {what}: {', '.join(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if complaints:
        raise CheckpointError(
            f"{source} does not hold the {part} that was asked for; {'; '.join(complaints)}.",
            fix="Check that the files belong together and to the system named.",
        )
    return {key: _reshaped(found[key], shape) for key, shape in wanted.items()}


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(shape, lambda: tensor.read().to(torch.float32).reshape(shape))


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
