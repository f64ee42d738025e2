"""Times of a TensorRT engine's layers, grouped by the block of the graph that they are of."""

from __future__ import annotations

import re
from contextlib import ExitStack
from itertools import islice
from statistics import median

from keepsight.runtime.graphs.tensorrt_engine import TensorRTEngine
from keepsight.runtime.graphs.tensorrt_layers import layer_origins, layers_timed
from keepsight.runtime.profiling.load import Loaded
from keepsight.runtime.profiling.questions import WARM_UP
from keepsight.runtime.profiling.report import Layer

__all__ = ["block_of", "layer_times"]

_FRAMES = 10

# `/encoder/blocks.6/project/Conv`, `qformer.layers.0.cross.query`: a module of a list of modules.
_BLOCK = re.compile(r"([A-Za-z_]\w*)\.(\d+)(?=[/.\]]|$)")


def layer_times(loaded: Loaded, address: str) -> list[Layer]:
    """The median of each layer over some frames of the source and a question; none where no engine is TensorRT's."""
    engines = {name: engine for name, engine in loaded.engines.items() if isinstance(engine, TensorRTEngine)}
    if not engines:
        return []
    session = loaded.session
    with ExitStack() as stack:
        times = {name: stack.enter_context(layers_timed(engine)) for name, engine in engines.items()}
        with loaded.bundle.source(address) as source:
            for frame in islice(source, _FRAMES):
                session.see(frame)
        session.perceive(WARM_UP)
    session.forget()
    return [
        Layer(engine=name, name=layer, block=block_of(origins.get(layer, layer)), ms=median(ms))
        for name, by_layer in times.items()
        for origins in (layer_origins(engines[name]),)
        for layer, ms in by_layer.items()
    ]


def block_of(origin: str) -> str:
    """The block of a graph that a layer is of, by the names of its nodes: `blocks.6`; of several, the first and the last.

    >>> block_of("/encoder/blocks.6/project/Conv + /encoder/blocks.6/Clip")
    'blocks.6'
    >>> block_of("{ForeignNode[/m/layer.0/Add.../m/layer.11/Mul]}")
    'layer.0 to layer.11'
    """
    found = list(dict.fromkeys((name, int(number)) for name, number in _BLOCK.findall(origin)))
    if not found:
        return "outside of blocks"
    first, last = found[0], found[-1]
    return f"{first[0]}.{first[1]}" + ("" if first == last else f" to {last[0]}.{last[1]}")
