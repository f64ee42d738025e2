"""Which layers of a bundle's language model go to a GPU: all where llama.cpp has one, none where it has not."""

from __future__ import annotations

from typing import Any

import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.language import bundle_llm, llama


@pytest.mark.parametrize(("has_gpu", "layers"), [(True, -1), (False, 0)])
def test_a_build_with_a_gpu_gets_all_layers(has_gpu: bool, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(llama.C, "llama_supports_gpu_offload", lambda: has_gpu)
    monkeypatch.setattr(bundle_llm, "LLM", lambda path, **options: asked.update(options))
    bundle_llm.load_llm(Bundle.open("tiny"), threads=1)
    assert asked == {"n_threads": 1, "n_gpu_layers": layers}
