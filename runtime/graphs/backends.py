"""A bundle's graphs, loaded on a backend: ONNX Runtime on the CPU or on CUDA, or TensorRT on this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Literal

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.cuda import CudaStream
from keepsight.runtime.graphs.device import DeviceBuffer
from keepsight.runtime.graphs.device_bank import MEMORY, OTHER_TURN, VISUAL_RIDERS
from keepsight.runtime.graphs.engine import Engine, OnnxRuntimeEngine
from keepsight.runtime.graphs.engine_store import find_engine
from keepsight.runtime.graphs.tensorrt_build import this_target
from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine, load_plan
from keepsight.runtime.graphs.tensorrt_module import import_tensorrt
from keepsight.streams.errors import EngineError

__all__ = ["Backend", "Engines", "open_engines"]

Backend = Literal["cpu", "cuda", "tensorrt"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Engines(Mapping[str, Engine]):
    """Graphs by name, and what they share.

    Args:
        graphs: the engines; closed with this.
        shared: what to close after them.
        memory: the graph `memory` on a device, as `DeviceMemoryBank` takes it; none where banks are on the host, which is
            everywhere but on TensorRT, and there with a bundle that was exported without that graph.
        load_memory: loads that graph once more, with buffers of its own; what it gives is closed with this.
    """

    def __init__(
        self,
        graphs: Mapping[str, Engine],
        shared: ExitStack | None = None,
        *,
        memory: Sequence[Engine] = (),
        load_memory: Callable[[], Sequence[Engine]] | None = None,
    ) -> None:
        self._graphs, self.shared, self.memory = graphs, shared, tuple(memory)
        self._load_memory = load_memory
        self._more: list[Engine] = []

    def __getitem__(self, name: str) -> Engine:
        return self._graphs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._graphs)

    def __len__(self) -> int:
        return len(self._graphs)

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def more_memory(self) -> Sequence[Engine]:
        """The graph `memory` for the bank of one more stream, in room of its own; none where banks are on the host.

        Raises:
            EngineError: the device has no room for it, or these engines serve one stream alone.
        """
        if self._load_memory is None:
            if self.memory:
                raise EngineError("these engines have one memory on the device.", fix="Open them with open_engines.")
            return ()
        engines = tuple(self._load_memory())
        self._more += engines
        return engines

    def close(self) -> None:
        """Give everything back; closing twice is no error."""
        for engine in (*self._more, *self.memory, *self._graphs.values()):
            engine.close()
        if self.shared is not None:
            self.shared.close()


def open_engines(
    bundle: Bundle,
    backend: Backend = "cpu",
    *,
    threads: int = 1,
    cuda_graphs: bool = True,
    urgent: bool = False,
    loaded: Callable[[str], None] = lambda name: None,
) -> Engines:
    """Load every graph of a bundle, in the variant that it was opened in.

    Args:
        backend: nothing else is tried where this one can't be had.
        threads: CPU threads of each graph; for `cpu` alone.
        cuda_graphs: launch each graph's kernels as one CUDA graph; for `tensorrt` alone.
        urgent: on a stream that goes before the language model's; for `tensorrt` alone.
        loaded: called with a graph's name when it has been read.

    Raises:
        EngineError: a graph can't be loaded, or not on that backend; for `tensorrt`, an engine that `keepsight build` has not
            built on this machine.
        MissingComponentError: the backend is not installed.
    """
    if backend == "tensorrt":
        return _on_tensorrt(bundle, cuda_graphs, urgent, loaded)
    graphs = {}
    for name in bundle.manifest.graphs:
        graphs[name] = OnnxRuntimeEngine(bundle.graph_path(name), providers=(_PROVIDERS[backend],), threads=threads)
        loaded(name)
    return Engines(graphs)


def _on_tensorrt(bundle: Bundle, cuda_graphs: bool, urgent: bool, loaded: Callable[[str], None]) -> Engines:
    """All on one stream, one after another, so that they share scratch memory as large as the largest needs."""
    trt = import_tensorrt()
    target = this_target(trt)
    files = {name: find_engine(bundle, name, target, bundle.variant)[0] for name in bundle.manifest.graphs}
    with ExitStack() as stack:
        stream = CudaStream(urgent=urgent)
        stack.callback(stream.close)
        with stream:
            plans = {}
            for name, file in files.items():
                plans[name] = load_plan(file, trt)
                loaded(name)
            scratch = stream.allocate(max(plan.scratch_bytes for plan in plans.values()))
        stack.callback(_free, stream, scratch)

        def load(close: ExitStack, name: str, buffers: Mapping[str, DeviceBuffer]) -> TensorRTEngine:
            engine = TensorRTEngine(plans[name], stream, scratch=scratch, cuda_graphs=cuda_graphs, buffers=buffers)
            return close.enter_context(engine)

        def load_memory(close: ExitStack) -> list[TensorRTEngine]:
            """Two that take turns: what one writes, the other reads."""
            first = load(close, MEMORY, {})
            return [first, load(close, MEMORY, {name: first.buffers[OTHER_TURN.get(name, name)] for name in first.buffers})]

        memory, lent = [], dict[str, dict[str, DeviceBuffer]]()
        if MEMORY in plans:
            memory = load_memory(stack)
            # `step` reads the bank where it is, and needs no room for a copy. `replay` may be asked about another bank.
            lent["step"] = {name: memory[0].buffers[f"bank_{name}"] for name in VISUAL_RIDERS}
        engines = {name: memory[0] if memory and name == MEMORY else load(stack, name, lent.get(name, {})) for name in plans}

        def load_more() -> list[TensorRTEngine]:
            if not memory:  # what `step` was given of one bank would be overwritten by the other's
                raise EngineError(
                    f"{bundle.manifest.name} has no graph {MEMORY!r}, and its engines can remember one stream alone.",
                    fix="Export the bundle again, or use another --backend.",
                )
            with ExitStack() as close:
                more = load_memory(close)
                close.pop_all()
            for engine in engines.values():
                engine.read_in_turns(by=2)
            return more

        return Engines(engines, stack.pop_all(), memory=memory, load_memory=load_more)


def _free(stream: CudaStream, address: int) -> None:
    with stream:
        stream.free(address)
