"""The types that llama.cpp chooses for each tensor, against llama.cpp: its own dry run over files that hold no weights."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from keepsight.runtime.language.gguf_cache import _FTYPES, QUANTISATIONS, quantise
from keepsight.runtime.language.gguf_rows import matrix_shapes
from keepsight.runtime.language.gguf_sizes import file_bytes, tensor_bytes, tensor_types
from keepsight.runtime.language.llama import C
from keepsight.streams.errors import UsageError

# Layers, width, feed-forward width, vocabulary, heads, key heads, whether embedding and output share one matrix.
MODELS = {
    "7B": (32, 4096, 11008, 32001, 32, 32, False),
    "13B": (40, 5120, 13824, 32001, 40, 40, False),
    "70B, grouped keys": (80, 8192, 28672, 32000, 64, 8, False),
    "1.1B, grouped keys": (22, 2048, 5632, 32000, 32, 4, False),
    "135M, tied, rows of 576": (30, 576, 1536, 49152, 9, 3, True),
    "rows that are no multiple of 32": (4, 100, 68, 701, 4, 4, True),
}


def shapes_of(layers: int, width: int, ffn: int, vocab: int, heads: int, keys: int, tied: bool) -> dict[str, tuple[int, ...]]:
    narrow = width // heads * keys
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, width)}
    for layer in range(layers):
        for part, shape in {
            "attn_norm": (width,), "attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width),
            "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{part}.weight"] = shape
    shapes["output_norm.weight"] = (width,)
    return shapes if tied else {**shapes, "output.weight": (vocab, width)}


def save_hollow(path: Path, shapes: dict[str, tuple[int, ...]], heads: int, keys: int) -> int:
    """A GGUF file whose weights are a hole in the file; returns the bytes of its head."""
    layers = sum("attn_v" in name for name in shapes)
    vocab, width = shapes["token_embd.weight"]
    writer: Any = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(vocab)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shapes["blk.0.ffn_gate.weight"][0])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, shape, kind, prod(shape) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    head = path.stat().st_size
    os.truncate(path, file_bytes(shapes, "F16", head_bytes=head, grouping=heads // keys))
    return head


def dry_run(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """The type of each tensor, as llama.cpp logs it."""
    caplog.clear()
    parameters = C.llama_model_quantize_default_params()
    parameters.ftype, parameters.dry_run, parameters.nthread = _FTYPES[kind], True, 1
    with caplog.at_level(logging.DEBUG, logger="keepsight.llama"):
        assert C.llama_model_quantize(os.fsencode(path), b"/nowhere", ctypes.byref(parameters)) == 0
    types, name = {}, ""
    for line in (record.getMessage() for record in caplog.records):
        if found := re.match(r"\[ *\d+/ *\d+\] (\S+) +- \[.*type = +(\w+),", line):
            name = found[1]
            types[name] = found[2].upper()
        if found := re.search(r"->.*\((\w+)\)$", line):
            types[name] = found[1].upper()
    return types


@pytest.mark.parametrize("model", MODELS)
def test_the_types_are_those_that_llama_cpp_chooses(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    *_, heads, keys, _tied = MODELS[model]
    shapes = shapes_of(*MODELS[model])
    save_hollow(tmp_path / "hollow.gguf", shapes, heads, keys)
    for kind in QUANTISATIONS[1:]:
        assert tensor_types(shapes, kind, grouping=heads // keys) == dry_run(tmp_path / "hollow.gguf", kind, caplog), kind


@pytest.mark.parametrize("kind", QUANTISATIONS[1:])
def test_a_quantised_file_has_the_size_that_was_said(kind: str, tmp_path: Path) -> None:
    shapes = shapes_of(3, 256, 512, 300, 4, 4, False)
    head = save_hollow(tmp_path / "hollow.gguf", shapes, 4, 4)  # a hole reads as zeros
    quantise(tmp_path / "hollow.gguf", tmp_path / "out.gguf", kind)
    assert (tmp_path / "out.gguf").stat().st_size == file_bytes(shapes, kind, head_bytes=head, grouping=1)


def test_the_shapes_in_a_file_are_found(tmp_path: Path) -> None:
    shapes = shapes_of(3, 256, 512, 300, 4, 2, True)
    save_hollow(tmp_path / "hollow.gguf", shapes, 4, 2)
    assert matrix_shapes(tmp_path / "hollow.gguf") == {name: shape for name, shape in shapes.items() if len(shape) > 1}


def test_bytes_of_a_tensor() -> None:
    assert tensor_bytes((3, 512), "Q4_K") == 3 * 2 * 144
    assert tensor_bytes((3, 64), "Q8_0") == 3 * 2 * 34
    assert tensor_bytes((7,), "F32") == 28


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(UsageError, match="Q1"):
        tensor_types({}, "Q1", grouping=1)
