"""A double of TensorRT's Python module: it reads inputs from real ONNX files, "engines" say how they were configured, and run
in ONNX Runtime on whatever lies at the addresses that they are given.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .fake_cuda import load_driver

_WORK = ctypes.CFUNCTYPE(None)


def fake_tensorrt(version: str = "10.3.0", **changes: Any) -> Any:
    """A module of its own, with a `record` of what was built, which timing caches were offered and which profiles set.

    Args:
        changes: `strongly_typed` value of that enum member; `starts` False: no builder or runtime; `accepts_profiles`,
            `accepts_timings` False: refused as TensorRT does; `builds`, `loads`, `has_memory` False: None instead of an engine
            or a context; `runs`, `captures` False: a run that fails, ever or in a capture; `during`: called by every run.
    """
    usual: dict[str, Any] = {"strongly_typed": 1, "during": lambda: None} | dict.fromkeys(
        ("starts", "accepts_profiles", "accepts_timings", "builds", "loads", "has_memory", "runs", "captures"), True
    )
    behaviour = SimpleNamespace(**{**usual, **changes})
    record = SimpleNamespace(
        built=[], timings=[], network_flags=[], switched=[], captured=[], executed=0, behaviour=behaviour
    )

    class Builder(_Builder):
        def __init__(self, logger: Any) -> None:
            if not behaviour.starts:
                logger.log(1, "no driver")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.record, self.logger = record, logger

    class Runtime:
        def __init__(self, logger: Any) -> None:
            if not behaviour.starts:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            if not behaviour.loads:
                self.logger.log(1, "the engine was made by another TensorRT")
                return None
            return _Engine(json.loads(bytes(serialized_engine)), record, self.logger)

    return SimpleNamespace(
        __name__=f"fake-{version}-{id(record)}",
        __version__=version,
        record=record,
        Builder=Builder,
        OnnxParser=_Parser,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="the caller's"),
        IProfiler=type("IProfiler", (), {"__init__": lambda self: None}),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        DataType=SimpleNamespace(**{name: name for name in ("FLOAT", "HALF", "INT8", "INT32", "INT64", "UINT8", "BOOL")}),
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

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        if not self.record.behaviour.accepts_profiles:
            return -1
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return SimpleNamespace(content=serialized_timing_cache, serialize=lambda: serialized_timing_cache + b"+1")

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

    def parse_from_file(self, model: str) -> bool:
        graph = onnx.load(model, load_external_data=False).graph
        inputs = [_tensor(value) for value in graph.input]
        self.network.path, self.network.num_inputs, self.network.num_outputs = model, len(inputs), len(graph.output)
        self.network.get_input = inputs.__getitem__
        return True


def _tensor(value: Any) -> Any:
    dims = value.type.tensor_type.shape.dim
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
    return SimpleNamespace(name=value.name, shape=shape, get_dimension_name=lambda axis: dims[axis].dim_param)


_TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(uint8)": ("UINT8", np.uint8),
}


class _Engine:
    def __init__(self, plan: Any, record: Any, logger: Any) -> None:
        self.path = plan[0]
        self.session = onnxruntime.InferenceSession(plan[0], providers=["CPUExecutionProvider"])
        self.profiles: list[dict[str, Any]] = plan[1]["profiles"]
        self.record, self.behaviour, self.logger = record, record.behaviour, logger
        self.values = {value.name: value for value in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.ins = [value.name for value in self.session.get_inputs()]
        self.num_io_tensors = len(self.values)
        self.num_optimization_profiles = max(1, len(self.profiles))  # a static graph has TensorRT's own

    @cached_property
    def layers(self) -> list[str]:
        return [node.name for node in onnx.load(self.path, load_external_data=False).graph.node]

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.ins else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return _TYPES[self.values[name].type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.values[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return self.profiles[profile_index][name]

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy == "the caller's"
        return _Context(self) if self.behaviour.has_memory else None


class _Inspector:
    """Says what an engine holds that was built without detailed profiling: names of layers, here those of the file's nodes."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine

    def get_engine_information(self, format: str) -> str:
        assert format == "json"
        return json.dumps({"Layers": self.engine.layers, "Bindings": list(self.engine.values)})


class _Context:
    """As strict as TensorRT: a run needs scratch memory, a profile, and every shape and address, aligned."""

    def __init__(self, engine: _Engine) -> None:
        self.engine, self.sizes = engine, dict[str, int]()
        self.profile: int | None = None
        self.addresses: dict[str, int] = {}
        self.scratch = 0
        self._profiler: Any = None

    @property
    def profiler(self) -> Any:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: Any) -> None:
        self._profiler = profiler

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile, self.sizes = profile_index, {}
        self.engine.record.switched.append(profile_index)
        return stream_handle != 0 and profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        low, _, high = self.engine.profiles[self.profile][name]
        self.sizes.update(
            {axis: size for axis, size in zip(self.engine.values[name].shape, shape, strict=True) if isinstance(axis, str)}
        )
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(size if isinstance(size, int) else self.sizes.get(size, -1) for size in self.engine.values[name].shape)
        return self._inferred()[name] if -1 in shape and name not in self.engine.ins and self.sizes else shape

    def _inferred(self) -> dict[str, tuple[int, ...]]:
        """Shapes of outputs whose axes the file does not name, as TensorRT would infer them: seen in a run on zeros."""
        engine = self.engine
        zeros = {
            name: np.zeros(self.get_tensor_shape(name), _TYPES[engine.values[name].type][1]) for name in engine.ins
        }
        results = engine.session.run(None, zeros)
        return {value.name: result.shape for value, result in zip(engine.session.get_outputs(), results, strict=True)}

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0 and memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Run at once; or, while the stream captures, let the graph run what this is bound to now."""
        behaviour = self.engine.behaviour
        if not behaviour.runs or self.addresses.keys() != self.engine.values.keys() or not self.scratch:
            self.engine.logger.log(1, "an address is missing, or the GPU is")
            return False
        behaviour.during()
        self.engine.record.executed += 1
        driver = load_driver()
        if not driver.keepsight_capturing():
            self._compute(dict(self.addresses))
            if self.profiler is not None:
                for layer in self.engine.layers:
                    self.profiler.report_layer_time(layer, 0.25)
            return True
        assert self.profiler is None, "a profiler waits for the stream, which a capture forbids"
        if not behaviour.captures:
            self.engine.logger.log(1, "this network waits for the host")
            return False
        work = _WORK(lambda addresses=dict(self.addresses): self._compute(addresses))
        self.engine.record.captured.append(work)  # alive as long as a graph may call it
        driver.keepsight_record(work)
        return True

    def _compute(self, addresses: dict[str, int]) -> None:
        engine = self.engine
        results = engine.session.run(None, {name: self._read(name, addresses[name]) for name in engine.ins})
        for value, result in zip(engine.session.get_outputs(), results, strict=True):
            ctypes.memmove(addresses[value.name], np.ascontiguousarray(result).ctypes.data, result.nbytes)

    def _read(self, name: str, address: int) -> Any:
        shape, dtype = self.get_tensor_shape(name), np.dtype(_TYPES[self.engine.values[name].type][1])
        content = ctypes.string_at(address, int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)
