"""What a model takes in a board's memory, part by part, and whether it fits.

A board has one memory for CPU and GPU. The parts are those of a process that runs the graphs as TensorRT engines and the
language model in llama.cpp, all its layers on the GPU: each engine holds its weights and a copy of its inputs and outputs, and
all share room for activations; the visual bank is the inputs and outputs of `memory`, and the query banks live on the host. Each
part says how it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from keepsight.runtime.boards import Board, process
from keepsight.runtime.graphs.device_bank import MEMORY, VISUAL_RIDERS
from keepsight.runtime.language.sequences import SEQUENCES
from keepsight.runtime.manifest import Dims
from keepsight.streams.errors import LLMError

__all__ = [
    "DEFAULT_CONTEXT",
    "Basis",
    "Fit",
    "Footprint",
    "LanguageShape",
    "Part",
    "banks",
    "engines",
    "fit",
    "graph_tensors",
    "key_value_bytes",
    "language",
    "program",
]

Basis = Literal["exact", "measured", "estimated"]
Tensors = dict[str, tuple[int, ...]]

DEFAULT_CONTEXT = 2048
"""Positions of the language model's context: the default of `LLM`."""

_ROWS_A_CALL = 512  # of llama.cpp's physical batch, which `Llama` sets
_CACHE_CELLS = 256  # llama.cpp rounds the context up to so many
_SINGLE, _DOUBLE, _LONG = 4, 8, 8
# Bytes of an engine over those of its weights: TensorRT-RTX 1.7.1, InstructBLIP's graphs in fp16, for SM86 and SM120 alike.
_VISION_ENGINE, _QFORMER_ENGINE = 1.01, 1.14
# Of a vision transformer's features at once in its widest place, in float32: fused q, k, v, and the MLP with its Gelu.
_WIDEST_VISION = 16


@dataclass(frozen=True)
class Part:
    """One thing in memory.

    Attributes:
        basis: `exact` as the runtime allocates it, `measured` on another machine, or `estimated`.
    """

    name: str
    bytes: int
    basis: Basis


@dataclass(frozen=True)
class Footprint:
    """All parts."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Fit:
    """A footprint on a board. `free_bytes` is what is left, negative by as much as is missing."""

    board: Board
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0


@dataclass(frozen=True)
class LanguageShape:
    """What of a language model decides its memory beside its file.

    Attributes:
        kv_width: of a layer's keys for one position: heads times their width.
    """

    layers: int
    hidden: int
    kv_width: int
    vocab: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> LanguageShape:
        """From the matrices of a GGUF file, by llama.cpp's names, rows first.

        Raises:
            LLMError: it is no plain decoder with keys of its own in every layer.
        """
        keys = [shape[0] for name, shape in shapes.items() if name.endswith(".attn_k.weight")]
        if not keys or "token_embd.weight" not in shapes:
            raise LLMError(
                "the GGUF file holds no layers with keys of their own (attn_k), so its memory can't be told.",
                fix="Use a plain transformer decoder, such as LLaMA or Qwen.",
            )
        vocab, hidden = shapes["token_embd.weight"]
        return cls(layers=len(keys), hidden=hidden, kv_width=max(keys), vocab=vocab)


def fit(footprint: Footprint, board: Board) -> Fit:
    """What a board has left beside a footprint and its own operating system."""
    return Fit(board, board.usable_bytes - footprint.total)


def program() -> tuple[Part, ...]:
    """The process without any model."""
    constants = process()
    return (
        Part("Python, GStreamer, libraries", int(constants.program_bytes.value), "measured"),
        Part("CUDA context and kernels", int(constants.cuda_bytes.value), "estimated"),
    )


def banks(dims: Dims, *, standing: int = 1) -> tuple[Part, ...]:
    """What the host holds: order, sizes and times of the visual bank, whose features are on the device, and a query bank for each
    standing question of the largest text bucket.
    """
    banked, rows = dims.banked_layers, dims.queries + dims.text_buckets[-1]
    visual = _bank_bytes(dims.slots, dims.tokens, 1, 1)
    query = _bank_bytes(dims.slots, rows, banked, dims.hidden, riders=((banked, dims.hidden),) * 2)
    questions = "a standing question" if standing == 1 else f"{standing} standing questions"
    books = Part("order and times of the visual memory", visual, "exact")
    return (books, Part(f"memory of {questions}", standing * query, "exact"))


def engines(dims: Dims, weights: Mapping[str, int]) -> tuple[Part, ...]:
    """The graphs as TensorRT engines: weights, inputs and outputs of each, and room for the activations of one at a time.

    Args:
        weights: bytes of weights that each graph reads, by its name.
    """
    tensors = graph_tensors(dims)
    graphs = [name for name in weights if name != "vision"]
    copies = sum(_tensor_bytes(name, _own(name, tensors[name])) for name in (*weights, MEMORY))
    return (
        Part("engine of the visual encoder", round(_VISION_ENGINE * weights["vision"]), "estimated"),
        Part(f"{len(graphs)} engines of the Q-Former", round(_QFORMER_ENGINE * sum(weights[n] for n in graphs)), "estimated"),
        Part("inputs and outputs on the device, the visual memory among them", copies, "exact"),
        Part("activations", max(_activations(dims, name) for name in weights), "estimated"),
    )


def language(file_bytes: int, shape: LanguageShape, *, context: int = DEFAULT_CONTEXT) -> tuple[Part, ...]:
    """The language model in llama.cpp: its file, and what a context of so many positions takes."""
    logits = SEQUENCES * shape.vocab
    # What llama.cpp reserves for a full batch: the logits of every row, and the rows before and after the last norm.
    batch = min(_ROWS_A_CALL, context) * (shape.vocab + 2 * shape.hidden)
    return (
        Part("language model", file_bytes, "exact"),
        Part(f"its context of {context} positions", key_value_bytes(shape, context), "exact"),
        Part("its buffers", _SINGLE * (logits + batch), "estimated"),
    )


def key_value_bytes(shape: LanguageShape, context: int) -> int:
    """llama.cpp's cache of keys and values in float16."""
    cells = -(-context // _CACHE_CELLS) * _CACHE_CELLS
    return 2 * 2 * cells * shape.layers * shape.kv_width


def graph_tensors(dims: Dims) -> dict[str, Tensors]:
    """Shapes of each graph's inputs and outputs at the largest text bucket, one frame: the contract of the graphs."""
    slots, tokens, hidden, text = dims.slots, dims.tokens, dims.hidden, dims.text_buckets[-1]
    crosses, banked, rows = len(dims.cross_layers), dims.banked_layers, dims.queries + text
    state, visual, seen = (rows, hidden), (crosses, slots, tokens, hidden), (slots, tokens)
    bank, new = (banked, slots, rows, hidden), (banked, rows, hidden)
    said = {"query_output": (dims.queries, hidden), "soft_prompt": (dims.queries, dims.n_embd)}
    last = {}
    if dims.layers - 1 in dims.cross_layers:
        last = {"cross_k": visual[1:], "cross_v": visual[1:], "visual_mask": seen, "bucket": seen}
    return {
        "vision": {
            "frames": (1, dims.image_size, dims.image_size, 3), "features": (1, tokens, dims.channels),
        },
        "visual_kv": {
            "features": (tokens, dims.channels), "cross_k": (crosses, tokens, hidden), "cross_v": (crosses, tokens, hidden),
        },
        "prompt": {"text_ids": (text,), "text_mask": (text,), "prompt_state": state},
        "step": {
            "prompt_state": state, "cross_k": visual, "cross_v": visual, "visual_mask": seen, "bucket": seen, "self_k": bank,
            "self_v": bank, "self_mask": bank[:3], "text_mask": (text,), "rows": new, "row_k": new, "row_v": new,
        },
        "answer": {
            "rows_last": state, "k_last": state, "v_last": state, "bank_k": bank[1:], "bank_v": bank[1:],
            "bank_mask": (slots, rows), "text_mask": (text,), **last, **said,
        },
        "replay": {
            "prompt_state": state, "cross_k": visual, "cross_v": visual, "rank": seen, "bucket": (slots, slots, tokens),
            "step_mask": (slots,), "text_mask": (text,), **said, "attention": (crosses, slots, tokens),
        },
        MEMORY: _memory_tensors(dims),
    }  # fmt: skip


def _memory_tensors(dims: Dims) -> Tensors:
    crosses, tokens, hidden, by_slot = len(dims.cross_layers), dims.tokens, dims.hidden, (1, dims.slots, dims.tokens)
    keys = (crosses, dims.slots, tokens, hidden)
    kept = {"features": (*by_slot, dims.channels), "cross_k": keys, "cross_v": keys, "similarity": by_slot, "norms": by_slot}
    rows = dict.fromkeys(VISUAL_RIDERS, (crosses, tokens, hidden))
    small = dict.fromkeys(("position", "sizes"), by_slot) | dict.fromkeys(("pair", "entry", "merged", "magnitude"), (1, tokens))
    halves = {f"{half}_{name}": shape for half in ("bank", "next") for name, shape in kept.items()}
    return {"features": (tokens, dims.channels), **rows, **halves, **small}


def _own(graph: str, tensors: Tensors) -> Tensors:
    """Those of an engine that it has room of its own for: `step` reads the bank where it is."""
    return {name: shape for name, shape in tensors.items() if graph != "step" or name not in VISUAL_RIDERS}


def _bank_bytes(slots: int, tokens: int, groups: int, channels: int, *, riders: tuple[tuple[int, int], ...] = ()) -> int:
    """`MemoryBank.nbytes` of a float32 bank with riders of (groups, channels), without making it."""
    rows = [(groups, channels), *riders]
    stored = sum(count * (slots + 2) * tokens * width for count, width in rows)  # and two scratch slots each
    scratch = 3 * groups * tokens * channels
    small = 6 * slots + 1  # sizes, first and last moment, norms, similarities, order; the last merge
    return _SINGLE * stored + _DOUBLE * scratch + groups * tokens * (_DOUBLE * (small - 1) + _SINGLE)


def _tensor_bytes(graph: str, tensors: Tensors) -> int:
    sizes = {"frames": 1, "text_ids": _LONG}
    return sum(prod(shape) * sizes.get(name, _SINGLE) for name, shape in tensors.items())


def _activations(dims: Dims, graph: str) -> int:
    """The largest tensors that are alive at once, in float32 and with nothing fused: TensorRT may take less.

    ONNX Runtime, without its arena, took as much at InstructBLIP's size with 20 slots: of the replay 1,277 MB (this says 1,283)
    at 128 text rows and 536 MB (547) at 16, of a step 217 MB (253), of ViT-g 18 MB (23).
    """
    slots, heads, text = dims.slots, dims.heads, dims.text_buckets[-1]
    rows, visual = dims.queries + text, dims.slots * dims.tokens
    if graph == "vision":
        return _SINGLE * _WIDEST_VISION * dims.tokens * dims.channels
    scores = {
        "visual_kv": 0,
        "prompt": rows * rows,
        "step": max(dims.queries * visual, rows * (slots + 1) * rows),
        "answer": dims.queries * (slots + 1) * rows,
        "replay": max(slots * dims.queries * visual, slots * rows * slots * rows),
    }[graph]
    flattened = len(dims.cross_layers) * visual * dims.hidden if graph in ("step", "replay") else 0
    return _SINGLE * 2 * (heads * scores + flattened)  # before and after the softmax; keys and values
