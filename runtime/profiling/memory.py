"""What takes memory: this process as the system counts it, and each component as its sizes say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

from keepsight.runtime.footprint import LanguageShape, key_value_bytes
from keepsight.runtime.graphs.engine import Engine, OnnxRuntimeEngine
from keepsight.runtime.graphs.onnx_weights import weight_bytes
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine
from keepsight.runtime.language.gguf_rows import matrix_shapes
from keepsight.runtime.language.llm import LLM
from keepsight.runtime.profiling.load import Loaded
from keepsight.runtime.profiling.report import MemoryUse, Moment
from keepsight.runtime.session import Standing
from keepsight.streams.errors import LLMError

__all__ = ["components", "peak_resident", "process_use", "resident", "system_use"]


def resident(process: Path = Path("/proc/self")) -> int:
    """Bytes of this process that are in memory, shared ones included: a walk over its page tables; 0 where nobody says."""
    return _field(process / "smaps_rollup", "Rss:")


def peak_resident(process: Path = Path("/proc/self")) -> int:
    """The most that ever was, in bytes; 0 where nobody says."""
    return _field(process / "status", "VmHWM:")


def process_use(steady: Iterable[int], timeline: Iterable[Moment]) -> MemoryUse:
    """The whole process.

    Args:
        steady: `resident` at the end of each run.
        timeline: readings of the run; the peak is the kernel's own mark, or the most of these where there is none.
    """
    readings = [found for found in steady if found]
    most = max([peak_resident(), *readings, *(moment.resident for moment in timeline)])
    return MemoryUse(component="process", steady=int(median(readings)) if readings else most, peak=most, basis="read")


def system_use(available: Sequence[int]) -> list[MemoryUse]:
    """What the whole system has taken since the first reading: on a board, what the GPU was given is in no process's count.

    Args:
        available: bytes that were, reading by reading, the first before anything was loaded.
    """
    if len(available) < 2:
        return []
    first, *later = available
    steady = first - int(median(later[len(later) // 2 :]))
    return [MemoryUse(component="system, GPU included", steady=max(steady, 0), peak=max(first - min(later), 0), basis="read")]


def components(loaded: Loaded, standing: Sequence[Standing], *, ring_bytes: int) -> list[MemoryUse]:
    """Sizes of what is held, counted: fixed from the first frame on, so that steady and peak are the same.

    Args:
        standing: the questions that are carried along.
        ring_bytes: of the slots that frames lie in.
    """
    return [_counted(name, size) for name, size in _sizes(loaded, standing, ring_bytes) if size]


def _sizes(loaded: Loaded, standing: Sequence[Standing], ring_bytes: int) -> Iterator[tuple[str, int]]:
    for name, engine in loaded.engines.items():
        yield f"weights of {name}", _weights(engine)
    yield "visual memory", loaded.session.qformer.bank.nbytes
    yield "query memories", sum(one.carried.bank.nbytes for one in standing)
    yield "frame slots", ring_bytes
    yield "key frames, at most", loaded.session.key_frames.budget_bytes
    if loaded.llm is not None:
        yield "language model", loaded.llm.path.stat().st_size
        yield "language model's keys and values", _cache(loaded.llm)


def _weights(engine: Engine) -> int:
    """Of TensorRT the engine's file; it is its weights, and little else."""
    if isinstance(engine, TensorRTEngine):
        return engine.path.stat().st_size
    return weight_bytes(engine.path) if isinstance(engine, OnnxRuntimeEngine) else 0


def _cache(llm: LLM) -> int:
    """0 for a model whose layers share keys, of which the file does not tell."""
    try:
        return key_value_bytes(LanguageShape.of(matrix_shapes(llm.path)), llm.n_ctx)
    except LLMError:
        return 0


def _counted(name: str, size: int) -> MemoryUse:
    return MemoryUse(component=name, steady=size, peak=size, basis="counted")


def _field(file: Path, name: str) -> int:
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
