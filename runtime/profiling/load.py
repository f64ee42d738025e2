"""Opening everything that a profile runs, step by step, each step timed: the cold start."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from keepsight.runtime.profiling.report import Phase

if TYPE_CHECKING:
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.graphs.backends import Engines
    from keepsight.runtime.language.llm import LLM
    from keepsight.runtime.memory import Policy
    from keepsight.runtime.profiling.graphs import GraphTimes
    from keepsight.runtime.session import Session

__all__ = ["Loaded", "Setup", "load"]


@dataclass(frozen=True)
class Setup:
    """What is to be profiled, and how: the options of the commands that run a bundle.

    Attributes:
        urgent: on TensorRT, let the graphs' kernels go before the language model's.
    """

    bundle: str
    variant: str | None = None
    memory: Policy = "mbc"
    backend: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    cuda_graphs: bool = True
    threads: int | None = None
    urgent: bool = False


@dataclass
class Loaded:
    """A session whose graphs are timed, and what opening it took. A context manager.

    Attributes:
        engines: the bundle's, without clocks.
        times: of each run of a graph; None if they are not timed.
        phases: of the cold start so far, in their order.
    """

    setup: Setup
    bundle: Bundle
    session: Session
    engines: Engines
    times: GraphTimes | None
    llm: LLM | None
    phases: list[Phase]
    _close: ExitStack = field(repr=False, default_factory=ExitStack)

    def close(self) -> None:
        """Give everything back."""
        self._close.close()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Steps:
    """Turns moments into phases: each lasts from the one before."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._last = perf_counter()

    def __call__(self, name: str) -> None:
        now = perf_counter()
        self.phases.append(Phase(name=name, ms=1000 * (now - self._last)))
        self._last = now


def load(setup: Setup, *, clocks: bool = True) -> Loaded:
    """Open a bundle and load its parts one after the other.

    Args:
        clocks: put a clock before every graph; without, the session is as everybody's.

    Raises:
        KeepsightError: a part can't be opened.
    """
    step = _Steps()
    from keepsight.runtime.bundle import Bundle
    from keepsight.runtime.graphs.backends import open_engines
    from keepsight.runtime.language.bundle_llm import load_llm
    from keepsight.runtime.profiling.graphs import GraphTimes, timed
    from keepsight.runtime.session import Session
    from keepsight.streams.gst import load_gst

    load_gst()
    step("import libraries")
    bundle = Bundle.open(setup.bundle, variant=setup.variant)
    step("open bundle")
    with ExitStack() as stack:
        engines = open_engines(
            bundle, setup.backend, threads=setup.threads or 1, cuda_graphs=setup.cuda_graphs, urgent=setup.urgent,
            loaded=lambda name: step(f"load {name}"),
        )  # fmt: skip
        stack.callback(engines.close)
        times = GraphTimes() if clocks else None
        llm = None
        if bundle.has_llm:
            llm = stack.enter_context(load_llm(bundle, setup.threads))
            step("load language model")
        inside = engines if times is None else timed(engines, times)
        session = stack.enter_context(Session(bundle, memory=setup.memory, threads=setup.threads, llm=llm, engines=inside))
        step("open session")
        return Loaded(setup, bundle, session, engines, times, llm, step.phases, stack.pop_all())
    raise AssertionError("unreachable")
