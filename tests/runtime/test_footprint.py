"""What a model takes on a board: the parts that are exact are those that the runtime allocates."""

from __future__ import annotations

import logging
import re

import pytest

from keepsight.runtime.boards import board
from keepsight.runtime.footprint import Footprint, LanguageShape, Part, banks, engines, fit, key_value_bytes, language
from keepsight.runtime.language.gguf_rows import matrix_shapes
from keepsight.runtime.language.llm import LLM
from keepsight.runtime.manifest import Dims
from keepsight.runtime.memory import MemoryBank, Rider
from keepsight.streams.errors import LLMError

from .smollm2 import smollm2_gguf

DIMS = Dims(
    image_size=224, tokens=257, channels=1408, queries=32, hidden=768, layers=12, cross_layers=tuple(range(0, 12, 2)), heads=12,
    n_embd=4096, memory_length=10, text_buckets=(16, 32, 64, 128), position_buckets=1,
)  # fmt: skip


def smaller(**changes: object) -> Dims:
    return Dims(**{**DIMS.model_dump(), **changes})


@pytest.mark.parametrize("dims", [DIMS, smaller(memory_length=3, text_buckets=(0,), layers=5, cross_layers=(0, 2, 4), tokens=9)])
def test_the_banks_take_what_memory_banks_take(dims: Dims) -> None:
    banked, rows = dims.layers - 1, dims.queries + dims.text_buckets[-1]
    visual = MemoryBank(length=dims.memory_length, tokens=dims.tokens, channels=1)  # the books of one on the device
    query = MemoryBank(
        length=dims.memory_length, tokens=rows, channels=dims.hidden, groups=banked,
        riders={name: Rider(banked, dims.hidden) for name in "kv"}, current_outside=True,
    )  # fmt: skip
    assert [part.bytes for part in banks(dims)] == [visual.nbytes, query.nbytes]
    assert [part.bytes for part in banks(dims, standing=3)] == [visual.nbytes, 3 * query.nbytes]


def logged(context: int, caplog: pytest.LogCaptureFixture) -> dict[str, float]:
    """What llama.cpp says that it allocates, in bytes, by buffer."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="keepsight.llama"):
        LLM(smollm2_gguf(), n_ctx=context, n_threads=1, self_check=False).close()
    found = (re.search(r"(output|KV|compute) buffer size = +([\d.]+) MiB", record.getMessage()) for record in caplog.records)
    return {match[1]: float(match[2]) * 2**20 for match in found if match}


@pytest.mark.parametrize("context", [100, 512, 2048])
def test_the_language_models_cache_and_buffers_are_those_that_llama_cpp_allocates(
    context: int, caplog: pytest.LogCaptureFixture
) -> None:
    shape = LanguageShape.of(matrix_shapes(smollm2_gguf()))
    assert shape == LanguageShape(layers=30, hidden=576, kv_width=192, vocab=49152)
    found = logged(context, caplog)
    assert key_value_bytes(shape, context) == pytest.approx(found["KV"], abs=0.01 * 2**20)  # printed to two decimals
    buffers = language(1, shape, context=context)[-1]
    assert buffers.bytes == pytest.approx(found["output"] + found["compute"], rel=0.05)


def test_the_cache_of_a_7b_model_is_half_a_megabyte_a_position() -> None:
    assert key_value_bytes(LanguageShape(layers=32, hidden=4096, kv_width=4096, vocab=32001), 2048) == 2048 * 512 * 1024


def test_a_model_without_keys_of_its_own_is_refused() -> None:
    with pytest.raises(LLMError, match="attn_k"):
        LanguageShape.of({"token_embd.weight": (100, 8), "blk.0.attn_qkv.weight": (24, 8)})


def test_it_fits_to_the_byte() -> None:
    small = board("orin-nano-8gb-super")
    for extra, fits in ((0, True), (1, False)):
        found = fit(Footprint((Part("x", small.usable_bytes, "exact"), Part("y", extra, "exact"))), small)
        assert found.fits is fits and found.free_bytes == -extra


def test_engines_share_no_weights_and_grow_with_the_memory() -> None:
    weights = {"vision": 1000, "visual_kv": 1, "prompt": 2, "step": 3, "answer": 4, "replay": 5}
    short, long = (sum(part.bytes for part in engines(smaller(memory_length=length), weights)) for length in (10, 20))
    assert long > 1.5 * short
    twice = engines(DIMS, {**weights, "step": 1003})
    assert twice[1].bytes - engines(DIMS, weights)[1].bytes == pytest.approx(1140, abs=1)


def test_engines_share_the_room_for_activations() -> None:
    weights = {"vision": 1000, "visual_kv": 1, "prompt": 2, "step": 3, "answer": 4, "replay": 5}
    alone = engines(DIMS, {"vision": 1000, "replay": 5})
    assert alone[3].name == "activations" and engines(DIMS, weights)[3] == alone[3]


def test_inputs_and_outputs_are_those_of_the_shipped_graphs() -> None:
    """Of keepsight-tiny, as ONNX Runtime names and shapes them."""
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.footprint import graph_tensors
    from keepsight.runtime.graphs.engine import OnnxRuntimeEngine

    bundle = Bundle.open("tiny", verify=False)
    said = graph_tensors(bundle.manifest.dims)
    for graph in bundle.manifest.graphs:
        with OnnxRuntimeEngine(bundle.graph_path(graph)) as engine:
            specs = {**engine.inputs, **engine.outputs}
            assert said[graph].keys() == specs.keys()
            for name, spec in specs.items():
                assert len(spec.shape) == len(said[graph][name])
                assert all(want in (None, got) for want, got in zip(spec.shape, said[graph][name], strict=True)), name
