"""A LLaMA-family language model to GGUF, tensor by tensor: from its own folder, or from inside an InstructBLIP or LAVIS file.

An adapter over it (`export/lora.py`) is merged on the way, into each tensor as it is written.

Names and layout are llama.cpp's, written with the `gguf` package. Two things differ from the weights in PyTorch: llama.cpp
rotates neighbouring pairs of a head where Hugging Face rotates its two halves, so q and k rows are reordered; and a vocabulary
that was enlarged (InstructBLIP's 32,001 rows) is padded with tokens that are never written. Neither raises an error when it is
missed: `check_gguf` compares logits with `export/llama_reference.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keepsight.export.lora import Adapter, merged, open_lora
from keepsight.export.tensorfiles import StoredTensor, open_tensors
from keepsight.streams.errors import CheckpointError

__all__ = [
    "FloatType",
    "GGUFLayout",
    "LanguageSource",
    "LlamaConfig",
    "gguf_layout",
    "open_llama",
    "with_lora",
    "write_gguf",
]

FloatType = Literal["F16", "F32"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a LLaMA, as its Hugging Face configuration has them."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the content of a `config.json` (or its `text_config`), of transformers 4 or 5.

        Raises:
            CheckpointError: not a LLaMA, or one with scaled rope, biases or another activation.
        """
        kind = config.get("model_type")
        if kind != "llama":
            raise CheckpointError(
                f"a language model of the type {kind!r} can't be converted; only LLaMA (Vicuna among them) can.",
                fix="Give a GGUF file with --llm, or --llm none for a bundle that ends at the soft prompt.",
            )
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        scaled = rope.get("rope_type", rope.get("type", "default"))
        odd = [f"rope {scaled!r}"] if scaled != "default" else []
        odd += [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
        odd += [f"activation {config['hidden_act']!r}"] if config.get("hidden_act", "silu") != "silu" else []
        if odd:
            raise CheckpointError(f"this LLaMA has {', '.join(odd)}, which the conversion does not know.")
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return cls(
            vocab=int(config["vocab_size"]), hidden=hidden, ffn=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]), heads=heads, kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads), context=int(config.get("max_position_embeddings") or 2048),
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tied=bool(config.get("tie_word_embeddings")),
        )  # fmt: skip


@dataclass(frozen=True)
class LanguageSource:
    """A LLaMA to convert.

    Attributes:
        config: dimensions.
        tensors: by Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`, `lm_head.weight`).
        tokenizer: SentencePiece's `tokenizer.model`, or the folder that holds it.
        bos: the token that begins a text; InstructBLIP's is 2, `</s>`. None: what SentencePiece says.
        lora: an adapter that is merged while the file is written; `tensors` are without it.
    """

    config: LlamaConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path
    bos: int | None = None
    lora: Adapter | None = None


def open_llama(folder: Path, *, bos: int | None = None) -> LanguageSource:
    """A LLaMA's own Hugging Face folder, such as Vicuna-7B v1.1's.

    Raises:
        CheckpointError: no configuration or weights there, or not a LLaMA.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json ({error}).", fix="Name a LLaMA's folder.") from error
    return LanguageSource(LlamaConfig.read(content), open_tensors(folder), folder, bos)


def with_lora(source: LanguageSource, adapter: Path, *, alpha: float | None = None) -> LanguageSource:
    """A LLaMA with an adapter over it (`export/lora.py`: `open_lora`, which says what it takes and refuses).

    Args:
        alpha: in place of what the adapter says.

    Raises:
        CheckpointError: it is no adapter of this LLaMA, or one that can't be merged.
        UsageError: an alpha that is no positive number.
    """
    matrices = {theirs.removesuffix(".weight"): shape for theirs, _, shape in _expected(source.config) if len(shape) == 2}
    del matrices["model.embed_tokens"]  # looked up, not multiplied
    return replace(source, lora=open_lora(adapter, matrices, alpha=alpha))


def write_gguf(
    source: LanguageSource, out: Path, *, name: str, float_type: FloatType = "F16", progress: Progress | None = None
) -> None:
    """Write `out`, which appears when it is complete.

    Args:
        name: what the file says that it is.
        float_type: of matrices; norms are float32.
        progress: told after each tensor.

    Raises:
        CheckpointError: no tokenizer, or tensors that are missing, unknown or of the wrong shape.
    """
    named = _named(source)
    partial = out.with_name(f"{out.name}.part")
    try:
        writer = _write_head(partial, source, named, name, float_type)
        for index, stored in enumerate(named.values()):
            writer.write_tensor_data(_values(stored, float_type))
            if progress is not None:
                progress(index + 1, len(named))
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class GGUFLayout:
    """What a GGUF file will hold, before it is written.

    Attributes:
        head_bytes: of metadata, vocabulary and the table of tensors, as `write_gguf` writes them.
        shapes: of the tensors, by llama.cpp's names.
    """

    head_bytes: int
    shapes: Mapping[str, tuple[int, ...]]


def gguf_layout(source: LanguageSource, *, name: str) -> GGUFLayout:
    """The layout of the float16 file of that name; the head is written to memory, and no weight is read.

    Raises:
        CheckpointError: as `write_gguf`.
    """
    named = _named(source)
    with os.fdopen(os.memfd_create("head.gguf"), "rb") as head:
        _write_head(Path(f"/proc/self/fd/{head.fileno()}"), source, named, name, "F16").close()
        size = os.fstat(head.fileno()).st_size
    return GGUFLayout(size, {target: stored.shape for target, stored in named.items()})


def _write_head(path: Path, source: LanguageSource, named: Mapping[str, StoredTensor], name: str, float_type: FloatType) -> Any:
    """Write everything but the weights; returns the writer, which takes them in the order of `named`."""
    import gguf

    vocabulary = _Vocabulary(source.tokenizer, source.config.vocab)
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_dimensions(writer, source.config, name, float_type)
    vocabulary.add(writer, source.bos)
    for target, stored in named.items():
        writer.add_tensor_info(target, stored.shape, _dtype(stored, float_type), _bytes(stored, float_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


_LAYER = {
    "input_layernorm.weight": ("attn_norm.weight", ("hidden",)),
    "self_attn.q_proj.weight": ("attn_q.weight", ("query", "hidden")),
    "self_attn.k_proj.weight": ("attn_k.weight", ("kv", "hidden")),
    "self_attn.v_proj.weight": ("attn_v.weight", ("kv", "hidden")),
    "self_attn.o_proj.weight": ("attn_output.weight", ("hidden", "query")),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ("hidden",)),
    "mlp.gate_proj.weight": ("ffn_gate.weight", ("ffn", "hidden")),
    "mlp.up_proj.weight": ("ffn_up.weight", ("ffn", "hidden")),
    "mlp.down_proj.weight": ("ffn_down.weight", ("hidden", "ffn")),
}


def _expected(config: LlamaConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Hugging Face's name, llama.cpp's name and the shape of every tensor."""
    sizes = {
        "hidden": config.hidden, "ffn": config.ffn, "query": config.heads * config.head_dim,
        "kv": config.kv_heads * config.head_dim,
    }  # fmt: skip
    yield "model.embed_tokens.weight", "token_embd.weight", (config.vocab, config.hidden)
    for index in range(config.layers):
        for theirs, (ours, axes) in _LAYER.items():
            yield f"model.layers.{index}.{theirs}", f"blk.{index}.{ours}", tuple(sizes[axis] for axis in axes)
    yield "model.norm.weight", "output_norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", "output.weight", (config.vocab, config.hidden)


def _named(source: LanguageSource) -> dict[str, StoredTensor]:
    """The tensors under llama.cpp's names, an adapter merged and q and k reordered as they are read."""
    config, tensors = source.config, source.tensors if source.lora is None else merged(source.tensors, source.lora)
    expected = list(_expected(config))
    known = {theirs for theirs, _, _ in expected} | ({"lm_head.weight"} if config.tied else set())
    missing = [theirs for theirs, _, _ in expected if theirs not in tensors]
    unknown = [key for key in tensors if key not in known and not key.endswith("rotary_emb.inv_freq")]
    wrong = [
        f"{theirs} {list(tensors[theirs].shape)} instead of {list(shape)}"
        for theirs, _, shape in expected
        if theirs in tensors and tensors[theirs].shape != shape
    ]
    complaints = [
        f"{len(keys)} {what}: {', '.join(keys)}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if keys
    ]
    if complaints:
        raise CheckpointError(f"this is not the LLaMA of its configuration; {'; '.join(complaints)}.")
    named = {}
    for theirs, ours, shape in expected:
        heads = {"attn_q.weight": config.heads, "attn_k.weight": config.kv_heads}.get(ours.split(".", 2)[-1])
        named[ours] = tensors[theirs] if heads is None else StoredTensor(shape, _reordering(tensors[theirs], heads))
    return named


def _reordering(stored: StoredTensor, heads: int) -> Callable[[], Tensor]:
    """Rows of each head from halves (i, i + d/2) to neighbours (2 i, 2 i + 1): what is rotated together."""

    def read() -> Tensor:
        halves = stored.read().unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)

    return read


def _half(stored: StoredTensor, float_type: FloatType) -> bool:
    return float_type == "F16" and len(stored.shape) > 1


def _dtype(stored: StoredTensor, float_type: FloatType) -> Any:
    return np.dtype(np.float16 if _half(stored, float_type) else np.float32)


def _bytes(stored: StoredTensor, float_type: FloatType) -> int:
    return int(np.prod(stored.shape)) * int(_dtype(stored, float_type).itemsize)


def _values(stored: StoredTensor, float_type: FloatType) -> NDArray[Any]:
    kind = torch.float16 if _half(stored, float_type) else torch.float32
    return stored.read().detach().to(kind).contiguous().numpy()


def _add_dimensions(writer: Any, config: LlamaConfig, name: str, float_type: FloatType) -> None:
    import gguf

    writer.add_name(name)
    writer.add_vocab_size(config.vocab)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.head_dim * config.heads != config.hidden:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_F16 if float_type == "F16" else kinds.ALL_F32)


class _Vocabulary:
    """A SentencePiece model, padded to the embedding's rows."""

    def __init__(self, path: Path, rows: int) -> None:
        from sentencepiece import SentencePieceProcessor

        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(
                f"there is no SentencePiece model at {file}.", fix="Give the folder of the language model: --llm FOLDER."
            )
        self._pieces: Any = SentencePieceProcessor()
        try:
            self._pieces.LoadFromFile(str(file))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{file} is not a SentencePiece model ({error}).") from error
        self._rows = rows
        if self._pieces.vocab_size() > rows:
            raise CheckpointError(f"{file} has {self._pieces.vocab_size()} tokens, the embedding {rows} rows.")

    def add(self, writer: Any, bos: int | None) -> None:
        """Tokens, scores and kinds, and which tokens are special. Nothing is added to a text by itself: templates say it."""
        import gguf

        pieces, kinds = self._pieces, gguf.TokenType
        count = pieces.vocab_size()
        tokens = [pieces.IdToPiece(token).encode() for token in range(count)]
        scores = [pieces.GetScore(token) for token in range(count)]
        types = [self._kind(token, kinds) for token in range(count)]
        for extra in range(count, self._rows):
            tokens.append(b"[PAD]" if extra == count else b"[PAD%d]" % extra)
            scores.append(-1000.0)
            types.append(kinds.CONTROL if extra == count else kinds.UNUSED)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(pieces.bos_id() if bos is None else bos)
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_unk_token_id(pieces.unk_id())
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)

    def _kind(self, token: int, kinds: Any) -> Any:
        pieces = self._pieces
        for is_kind, kind in (
            (pieces.IsUnknown, kinds.UNKNOWN), (pieces.IsControl, kinds.CONTROL), (pieces.IsUnused, kinds.UNUSED),
            (pieces.IsByte, kinds.BYTE),
        ):  # fmt: skip
            if is_kind(token):
                return kind
        return kinds.NORMAL
