"""The language model that a bundle's manifest names, loaded."""

from __future__ import annotations

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.language.llm import LLM
from keepsight.streams.errors import BundleError

__all__ = ["load_llm"]


def load_llm(bundle: Bundle, threads: int | None = None) -> LLM:
    """The bundle's language model, requantised once into the cache if the manifest asks for it.

    All its layers are on the GPU if llama.cpp was built with one: whoever built it so meant it.

    Raises:
        BundleError: the bundle has none.
        MissingModelError, LLMError: its file is not there, or llama.cpp refuses it.
    """
    from keepsight.runtime.language.gguf_cache import requantised
    from keepsight.runtime.language.llama import gpu_layers

    info = bundle.manifest.llm
    if info is None:
        raise BundleError(f"{bundle.path} has no language model.")
    path = bundle.llm_path()
    if info.quantise is not None:
        path = requantised(path, kind=info.quantise)
    return LLM(path, n_threads=threads, n_gpu_layers=gpu_layers())
