"""A double of TensorRT's Python module: it reads inputs from real ONNX files, and "engines" say how they were configured."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx


def fake_tensorrt(version: str = "10.3.0", **changes: Any) -> Any:
    """A module of its own, with a `record` of what was built and of the timing caches that were offered.

    Args:
        changes: `strongly_typed` value of that enum member; `starts` False: no builder; `accepts_profiles`, `accepts_timings`
            False: refused as TensorRT does; `builds` False: None instead of an engine.
    """
    usual = {"strongly_typed": 1, "starts": True, "accepts_profiles": True, "accepts_timings": True, "builds": True}
    behaviour = SimpleNamespace(**{**usual, **changes})
    record = SimpleNamespace(built=[], timings=[], network_flags=[], behaviour=behaviour)

    class Builder(_Builder):
        def __init__(self, logger: Any) -> None:
            if not behaviour.starts:
                logger.log(1, "no driver")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.record, self.logger = record, logger

    return SimpleNamespace(
        __name__=f"fake-{version}-{id(record)}",
        __version__=version,
        record=record,
        Builder=Builder,
        OnnxParser=_Parser,
        ILogger=type("ILogger", (), {"__init__": lambda self: None}),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=behaviour.strongly_typed),
        BuilderFlag=Enum("BuilderFlag", ["TF32", "FP16"]),
        MemoryPoolType=Enum("MemoryPoolType", ["WORKSPACE"]),
    )


class _Builder:
    record: Any
    logger: Any

    def create_network(self, flags: int) -> Any:
        self.record.network_flags.append(flags)
        return SimpleNamespace(inputs=[], num_inputs=0, num_outputs=0, path=None)

    def create_builder_config(self) -> Any:
        return _Config(self.record)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *limits: shapes.update({name: limits}))

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        if not self.record.behaviour.builds:
            self.logger.log(2, "a warning before")
            self.logger.log(1, "no tactics\nto implement the operation")
            return None
        self.record.built.append(Path(network.path).stem)
        said = {"cleared": config.cleared, "pools": config.pools, "profiles": config.profiles}
        return json.dumps([network.path, said, sorted(config.cleared)]).encode()


class _Config:
    def __init__(self, record: Any) -> None:
        self.record = record
        self.cleared: list[str] = []
        self.pools: dict[str, int] = {}
        self.profiles: list[Any] = []
        self.timings: Any = None

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile: Any) -> int:
        if not self.record.behaviour.accepts_profiles:
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: content + b"+1")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.record.timings.append(cache.content)
        if cache.content and not self.record.behaviour.accepts_timings:
            return False
        self.timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timings


class _Parser:
    num_errors = 0

    def __init__(self, network: Any, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        graph = onnx.load(path, load_external_data=False).graph
        inputs = [_tensor(value) for value in graph.input]
        self.network.path, self.network.num_inputs, self.network.num_outputs = path, len(inputs), len(graph.output)
        self.network.get_input = inputs.__getitem__
        return True


def _tensor(value: Any) -> Any:
    dims = value.type.tensor_type.shape.dim
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
    return SimpleNamespace(name=value.name, shape=shape, get_dimension_name=lambda axis: dims[axis].dim_param)
