"""Checkpoints of the MA-LMM family, opened and checked against our modules without reading their weights.

Hugging Face folders (InstructBLIP, BLIP-2), LAVIS's files (`eva_vit_g.pth` and the trimmed InstructBLIP), and MA-LMM's
fine-tuned `checkpoint_best.pth` over either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keepsight.export.eva import LAVIS_NORM_EPS, EvaConfig, EvaVision, resize_positions
from keepsight.export.keymaps import EVA_FILE, HUGGING_FACE, LAVIS, Translated, fit, translate
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.tensorfiles import StoredTensor, open_tensors
from keepsight.streams.errors import CheckpointError

__all__ = ["Checkpoint", "load_huggingface", "load_lavis", "module_shapes", "with_fine_tuned"]

LAVIS_LAYERS = 12
_HEAD = 64  # BERT's width of a head, at every size
# Ours alone: the checkpoint has no such tables, and `export/convert.py` makes them from `image_pe`.
_OWN = ("position_key", "position_value")


@dataclass(frozen=True)
class Checkpoint:
    """A model to export.

    Attributes:
        name: of the folder or file that it came from.
        vision, qformer: dimensions. The Q-Former has no position tables yet.
        vision_tensors, qformer_tensors: complete and of the right shapes, by our names, read when asked for.
        image_pe: MA-LMM's frame positions, `[frames, C]`; None where there are none, or all are zero.
        llm_tensors: the language model's, by its own names; empty if the checkpoint carries none.
        llm_config: its Hugging Face configuration, if the checkpoint has one.
        llm_tokenizer: the folder with its `tokenizer.model`, if the checkpoint is one.
        tokenizer: the Q-Former's text tokenizer beside the checkpoint, a folder or file; None if there is none.
        sources: the paths that it was read from.
    """

    name: str
    vision: EvaConfig
    qformer: QFormerConfig
    vision_tensors: Mapping[str, StoredTensor]
    qformer_tensors: Mapping[str, StoredTensor]
    image_pe: Tensor | None = None
    llm_tensors: Mapping[str, StoredTensor] | None = None
    llm_config: Mapping[str, Any] | None = None
    llm_tokenizer: Path | None = None
    tokenizer: Path | None = None
    sources: tuple[Path, ...] = ()

    def load_qformer(self) -> QFormer:
        """The Q-Former with its weights, float32."""
        module = QFormer(self.qformer)
        module.load_state_dict({name: tensor.read() for name, tensor in self.qformer_tensors.items()}, strict=False)
        return module.eval()

    def load_vision(self) -> EvaVision:
        """The visual encoder with its weights, float32: 4 GB for ViT-g."""
        module = EvaVision(self.vision)
        module.load_state_dict({name: tensor.read() for name, tensor in self.vision_tensors.items()})
        return module.eval()


def load_huggingface(folder: Path) -> Checkpoint:
    """Open an `InstructBlipForConditionalGeneration` or `Blip2ForConditionalGeneration` folder.

    Raises:
        CheckpointError: another model, an activation that ours does not have, or keys that do not fit.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json ({str(error).splitlines()[0]}).") from error
    if config.model_type not in ("instructblip", "blip-2"):
        raise CheckpointError(
            f"{folder} is a model of the type {config.model_type!r}.", fix="Supported are instructblip and blip-2."
        )
    for part in (config.vision_config, config.qformer_config):
        if part.hidden_act != "gelu":
            raise CheckpointError(f"{folder} uses the activation {part.hidden_act!r}; only gelu (erf) is known.")
    translated = translate(open_tensors(folder), HUGGING_FACE)
    _refuse_unexpected(translated, folder)
    vision = _huggingface_vision(config.vision_config)
    qformer = _huggingface_qformer(config)
    vision_tensors = translated.part("vision")
    if not config.vision_config.qkv_bias:
        _add_zero_biases(vision_tensors, vision)
    tokenizer = folder / "qformer_tokenizer"
    return Checkpoint(
        name=folder.resolve().name,
        vision=vision,
        qformer=qformer,
        vision_tensors=fit(vision_tensors, module_shapes(EvaVision, vision), part="visual encoder", source=str(folder)),
        qformer_tensors=fit(translated.part("qformer"), _qformer_shapes(qformer), part="Q-Former", source=str(folder)),
        llm_tensors=translated.part("llm"),
        llm_config=config.text_config.to_dict(),
        llm_tokenizer=folder,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        sources=(folder,),
    )


def load_lavis(
    model: Path, vision: Path | None = None, *, vision_config: EvaConfig | None = None, layers: int = LAVIS_LAYERS
) -> Checkpoint:
    """Open LAVIS's files.

    Args:
        model: `instruct_blip_vicuna7b_trimmed.pth` or one like it: Q-Former, queries, ln_vision, llm_proj.
        vision: `eva_vit_g.pth`; not needed if `model` holds `visual_encoder.*` too.
        vision_config: the tower's dimensions, which its file does not tell; ViT-g/14 by default.
        layers: of the Q-Former.

    Raises:
        CheckpointError: keys that are missing, unknown or wrongly shaped.
    """
    config = vision_config or EvaConfig()
    translated = translate(open_tensors(model), LAVIS)
    _refuse_unexpected(translated, model)
    vision_tensors = translated.part("vision")
    if vision is not None:
        tower = translate(open_tensors(vision), EVA_FILE)
        _refuse_unexpected(tower, vision)
        vision_tensors |= tower.part("vision")
    elif "cls_token" not in vision_tensors:
        raise CheckpointError(f"{model} holds no visual encoder.", fix="Name its file too: --vision eva_vit_g.pth.")
    if "pos_embed" in vision_tensors:
        vision_tensors["pos_embed"] = _resized(vision_tensors["pos_embed"], config.tokens)
    source = str(model) if vision is None else f"{model} with {vision}"
    qformer_tensors = translated.part("qformer")
    qformer = _lavis_qformer(qformer_tensors, layers, model)
    return Checkpoint(
        name=model.stem,
        vision=config,
        qformer=qformer,
        vision_tensors=fit(vision_tensors, module_shapes(EvaVision, config), part="visual encoder", source=source),
        qformer_tensors=fit(qformer_tensors, _qformer_shapes(qformer), part="Q-Former", source=str(model)),
        image_pe=_image_pe(translated, model, config),
        llm_tensors=translated.part("llm"),
        sources=(model,) if vision is None else (model, vision),
    )


def with_fine_tuned(base: Checkpoint, path: Path) -> Checkpoint:
    """MA-LMM's `checkpoint_best.pth` over a base: whatever it holds (Q-Former, queries, ln_vision, llm_proj, image_pe) counts.

    Raises:
        CheckpointError: it holds keys that are unknown, that the base has not, or that are wrongly shaped.
    """
    translated = translate(open_tensors(path), LAVIS)
    _refuse_unexpected(translated, path)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for part, wanted in (("vision", base.vision_tensors), ("qformer", base.qformer_tensors)):
        found = translated.part(part)
        shapes = {name: wanted[name].shape for name in found if name in wanted}
        parts[part] = {**wanted, **fit(found, shapes, part=f"fine-tuned {part}", source=str(path))}
    if not translated.part("qformer") and "image_pe" not in translated.tensors:
        raise CheckpointError(f"{path} holds nothing that MA-LMM fine-tunes.", fix="Name its checkpoint_best.pth.")
    return replace(
        base,
        name=f"{base.name}+{path.parent.resolve().name}",
        vision=replace(base.vision, norm_eps=LAVIS_NORM_EPS),  # as it was fine-tuned, whatever format the base is in
        vision_tensors=parts["vision"],
        qformer_tensors=parts["qformer"],
        image_pe=_image_pe(translated, path, base.vision),
        sources=(*base.sources, path),
    )


def module_shapes(build: Any, config: EvaConfig | QFormerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters, without making them."""
    with torch.device("meta"):
        module: nn.Module = build(config)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _qformer_shapes(config: QFormerConfig) -> dict[str, tuple[int, ...]]:
    shapes = module_shapes(QFormer, config)
    return {name: shape for name, shape in shapes.items() if name not in _OWN}


def _huggingface_vision(config: Any) -> EvaConfig:
    return EvaConfig(
        image_size=config.image_size, patch=config.patch_size, width=config.hidden_size, blocks=config.num_hidden_layers,
        heads=config.num_attention_heads, mlp=config.intermediate_size, block_eps=config.layer_norm_eps,
        norm_eps=config.layer_norm_eps,
    )  # fmt: skip


def _huggingface_qformer(config: Any) -> QFormerConfig:
    inner = config.qformer_config
    text = config.model_type == "instructblip"
    return QFormerConfig(
        hidden=inner.hidden_size, layers=inner.num_hidden_layers, heads=inner.num_attention_heads,
        ffn=inner.intermediate_size, channels=inner.encoder_hidden_size, queries=config.num_query_tokens,
        vocab=inner.vocab_size if text else 0, max_text=inner.max_position_embeddings if text else 0,
        n_embd=config.text_config.hidden_size, cross_every=inner.cross_attention_frequency, norm_eps=inner.layer_norm_eps,
    )  # fmt: skip


def _lavis_qformer(tensors: Mapping[str, StoredTensor], layers: int, source: Path) -> QFormerConfig:
    """Dimensions from the shapes; LAVIS keeps no configuration in its files."""
    text = "word_embeddings.weight" in tensors
    needed = {"query_tokens", "llm_proj.weight", "layers.0.cross.key.weight", "layers.0.query_ffn.intermediate.weight"}
    if text:
        needed.add("position_embeddings.weight")
    absent = sorted(needed - tensors.keys())
    if absent:
        raise CheckpointError(f"{source} holds no Q-Former with queries and projection: no {', '.join(absent)}.")
    hidden, channels = tensors["layers.0.cross.key.weight"].shape
    return QFormerConfig(
        hidden=hidden, layers=layers, heads=hidden // _HEAD, ffn=tensors["layers.0.query_ffn.intermediate.weight"].shape[0],
        channels=channels, queries=tensors["query_tokens"].shape[-2],
        vocab=tensors["word_embeddings.weight"].shape[0] if text else 0,
        max_text=tensors["position_embeddings.weight"].shape[0] if text else 0,
        n_embd=tensors["llm_proj.weight"].shape[0],
    )  # fmt: skip


def _image_pe(translated: Translated, source: Path, vision: EvaConfig) -> Tensor | None:
    """MA-LMM's table if any of its rows is not zero; its length is that of the training's `max_num_frames`."""
    stored = translated.tensors.get("image_pe")
    if stored is None:
        return None
    if len(stored.shape) != 2 or stored.shape[1] != vision.width:
        raise CheckpointError(f"{source} has an image_pe of {list(stored.shape)}, not of rows of {vision.width}.")
    table = stored.read().to(torch.float32)
    return table if bool(table.any()) else None


def _resized(stored: StoredTensor, tokens: int) -> StoredTensor:
    shape = (1, tokens, stored.shape[-1])
    return StoredTensor(shape, lambda: resize_positions(stored.read(), tokens))


def _add_zero_biases(tensors: dict[str, StoredTensor], config: EvaConfig) -> None:
    """A tower without q, k, v biases is one with zeros."""
    for block in range(config.blocks):
        shape = (3 * config.width,)
        tensors.setdefault(f"blocks.{block}.attn.qkv.bias", StoredTensor(shape, lambda: torch.zeros(3 * config.width)))


def _refuse_unexpected(translated: Translated, source: Path) -> None:
    if translated.unexpected:
        kinds = sorted({re.sub(r"\.\d+\.", ".N.", key) for key in translated.unexpected})
        raise CheckpointError(
            f"{source} has {len(translated.unexpected)} keys that are not of this model: {', '.join(kinds)}.",
            fix="Check that it is the checkpoint that you mean.",
        )
