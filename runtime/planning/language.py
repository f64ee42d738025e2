"""What a language model in llama.cpp computes and reads for a prompt and for a token: from the header of its file alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from keepsight.runtime.footprint import LanguageShape
from keepsight.runtime.language.gguf_rows import matrix_bytes, matrix_shapes
from keepsight.runtime.language.gguf_sizes import file_bytes, tensor_bytes, tensor_types
from keepsight.streams.errors import UsageError

__all__ = ["LanguageModel", "LanguageWork", "language_model", "llama_shapes", "llama_work", "requantised"]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_HALF = 2


@dataclass(frozen=True)
class LanguageWork:
    """Of one row of a prompt, or one token.

    Attributes:
        kv_width: of a layer's keys for one position.
        heads_width: of a layer's queries.
        weight_bytes: read for a token: every matrix once; of the embeddings a row, unless they are the head, too.
        row_parameters: multiplied with each row of a prompt.
        head_parameters: multiplied with the rows that are answered: the last one.
    """

    layers: int
    kv_width: int
    heads_width: int
    weight_bytes: float
    row_parameters: float
    head_parameters: float

    def prefill_flops(self, rows: int) -> float:
        """Of reading a prompt; each row attends to those before it."""
        attention = 2 * 2 * self.layers * self.heads_width * rows * (rows + 1) / 2
        return 2 * (self.row_parameters * rows + self.head_parameters) + attention

    def token_flops(self, context: int) -> float:
        """Of one token after `context` positions."""
        return 2 * (self.row_parameters + self.head_parameters) + 2 * 2 * self.layers * self.heads_width * context

    def token_bytes(self, context: int) -> float:
        """Read for one token: weights, and the keys and values of all positions in float16."""
        return self.weight_bytes + 2 * _HALF * self.layers * self.kv_width * context


@dataclass(frozen=True)
class LanguageModel:
    """A language model to plan with.

    Attributes:
        kind: its quantisation, as it is named; None for a file that is taken as it is.
        shapes: of its matrices by llama.cpp's names, to plan other quantisations with.
    """

    name: str
    kind: str | None
    bytes: int
    shape: LanguageShape
    work: LanguageWork
    shapes: Mapping[str, tuple[int, ...]]


def language_model(path: Path, *, kind: str | None = None) -> LanguageModel:
    """A GGUF file's, as it is or requantised to `kind`. Only its header is read.

    Raises:
        MissingModelError, LLMError: there is none, or one whose layers are not plain.
        UsageError: `kind` is unknown.
    """
    shapes = matrix_shapes(path)
    sizes = matrix_bytes(path)
    found = LanguageModel(path.name, None, path.stat().st_size, LanguageShape.of(shapes), _work(shapes, sizes), shapes)
    return found if kind is None else requantised(found, kind)


def requantised(model: LanguageModel, kind: str) -> LanguageModel:
    """The same in another quantisation.

    Raises:
        UsageError: it is unknown.
    """
    grouping = _grouping(model.shapes)
    types = tensor_types(model.shapes, kind, grouping=grouping)
    sizes = {name: tensor_bytes(model.shapes[name], found) for name, found in types.items()}
    total = file_bytes(model.shapes, kind, head_bytes=0, grouping=grouping)
    return replace(model, kind=kind, bytes=total, work=_work(model.shapes, sizes))


def llama_shapes(
    *, layers: int, hidden: int, ffn: int, kv_width: int, vocab: int, gated: bool = True
) -> dict[str, tuple[int, ...]]:
    """A decoder's matrices by llama.cpp's names; `gated` feed-forward nets have three."""
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (vocab, hidden), _HEAD: (vocab, hidden)}
    for layer in range(layers):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_q.weight": (hidden, hidden), f"{block}attn_k.weight": (kv_width, hidden),
            f"{block}attn_v.weight": (kv_width, hidden), f"{block}attn_output.weight": (hidden, hidden),
            f"{block}ffn_up.weight": (ffn, hidden), f"{block}ffn_down.weight": (hidden, ffn),
            **({f"{block}ffn_gate.weight": (ffn, hidden)} if gated else {}),
        }  # fmt: skip
    return shapes


def llama_work(
    *, layers: int, hidden: int, ffn: int, heads_width: int, kv_width: int, vocab: int, bits: float, head_bits: float
) -> LanguageWork:
    """A LLaMA's, by its sizes and the bits of a weight."""
    body = layers * (hidden * (2 * heads_width + 2 * kv_width) + 3 * hidden * ffn)
    head = hidden * vocab
    return LanguageWork(layers, kv_width, heads_width, (body * bits + head * head_bits) / 8, body, head)


def _work(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> LanguageWork:
    shape = LanguageShape.of(shapes)
    tied = _HEAD not in shapes
    body = sum(rows * width for name, (rows, width) in _matrices(shapes) if name not in (_EMBEDDING, _HEAD))
    head = shape.vocab * shape.hidden
    read = sum(size for name, size in sizes.items() if name != _EMBEDDING or tied)
    heads = max((rows for name, (rows, _) in _matrices(shapes) if name.endswith(".attn_q.weight")), default=shape.hidden)
    return LanguageWork(shape.layers, shape.kv_width, heads, read, body, head)


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, int]]]:
    return [(name, (shape[0], shape[1])) for name, shape in shapes.items() if len(shape) == 2]


def _grouping(shapes: Mapping[str, tuple[int, ...]]) -> int:
    queries = next((shape[0] for name, shape in shapes.items() if name.endswith(".attn_q.weight")), None)
    keys = next((shape[0] for name, shape in shapes.items() if name.endswith(".attn_k.weight")), None)
    if queries is None or keys is None:
        raise UsageError("this language model has no layers of queries and keys, and can't be planned in another quantisation.")
    return queries // keys
