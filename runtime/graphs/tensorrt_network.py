"""From an ONNX file to a serialised TensorRT engine, with TensorRT 10.3 to 11 or TensorRT-RTX.

Networks are strongly typed: an operation runs in the type that the ONNX file gives it, and no builder flag changes that.
Objects carry the names by which tests/runtime/test_tensorrt_api.py looks their attributes up in every version's bindings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.runtime.graphs.engine_store import Target, write_atomically
from keepsight.runtime.graphs.tensorrt_module import is_rtx, log_of, title_of
from keepsight.streams.errors import EngineError

__all__ = ["Network", "Profile", "build_plan", "parse", "profiles_of"]

Profile = Mapping[str, tuple[int, ...]]
"""The one shape of every input with a free axis: minimum, optimum and maximum of an optimisation profile."""


@dataclass(frozen=True, eq=False)
class Network:
    """A parsed graph. The parser owns the weights, so it lives as long as the network."""

    path: Path
    builder: Any
    network: Any
    parser: Any


def parse(trt: Any, path: Path) -> Network:
    """Read an ONNX file, its external weights included, into a strongly typed network.

    Raises:
        EngineError: TensorRT does not start, or refuses the graph; the message names the node.
    """
    log = log_of(trt)
    log.clear()
    try:
        builder = trt.Builder(log.ilogger)
    except TypeError as error:  # how the bindings say that the factory gave nothing
        raise EngineError(
            f"{title_of(trt)} can't start: {log.complaints()}.",
            fix="Check that the GPU's driver is loaded and as new as this TensorRT wants.",
        ) from error
    # By the enum: the bit is 1 in TensorRT 10 and 0 in 11, and each means something else in the other.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.ilogger)
    # TensorRT-RTX accepts a file that is no ONNX at all, as a network with nothing in it.
    if not parser.parse_from_file(str(path)) or network.num_outputs == 0:
        raise EngineError(
            f"{title_of(trt)} can't parse {path.name}: {_parser_error(parser) or log.complaints()}.",
            fix="Export the bundle again with this Keepsight; if that doesn't help, this TensorRT lacks what the graph needs.",
        )
    return Network(path, builder, network, parser)


def profiles_of(parsed: Network, sizes: Sequence[Mapping[str, int]]) -> list[Profile]:
    """The different profiles that fix every free axis, one per entry of `sizes` (axis name -> size); none for a static graph.

    Raises:
        EngineError: a free axis that `sizes` does not name.
    """
    network = parsed.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    profiles: list[Profile] = []
    for named in sizes:
        profile = {tensor.name: _shape(parsed.path, tensor, named) for tensor in inputs if -1 in tuple(tensor.shape)}
        if profile and profile not in profiles:
            profiles.append(profile)
    return profiles


def build_plan(
    trt: Any,
    parsed: Network,
    profiles: Sequence[Profile],
    *,
    target: Target,
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
) -> Any:
    """Build the engine of a network, serialised, as an object with the buffer protocol.

    Args:
        profiles: one shape per input; from `profiles_of`.
        target: for TensorRT-RTX, what to build for; others build for the GPU that is there.
        workspace_mib: see `build_engines`.
        timing_cache: file with what earlier builds measured; read, and written again. TensorRT-RTX has none.

    Raises:
        EngineError: TensorRT refuses the target, a profile or the graph, or runs out of memory.
    """
    log, builder = log_of(trt), parsed.builder
    log.clear()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if is_rtx(trt):
        _aim(trt, config, target)
    for shapes in profiles:
        _add_profile(trt, parsed, config, shapes)
    timings = None if is_rtx(trt) or timing_cache is None else _Timings(timing_cache, config)
    plan = builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise _refusal(trt, parsed.path, "can't build")
    if timings is not None:
        timings.save()
    return plan


class _Timings:
    """The timing cache: what TensorRT measured of its tactics, so that the next build of a like layer need not.

    Only a matter of build time, so one that TensorRT can't use any more is started anew.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self._path, self._config = path, config
        if not (path.is_file() and self._use(path.read_bytes())):
            self._use(b"")

    def save(self) -> None:
        cache = self._config.get_timing_cache()
        write_atomically(self._path, memoryview(cache.serialize()))

    def _use(self, content: bytes) -> bool:
        cache = self._config.create_timing_cache(content)
        return cache is not None and self._config.set_timing_cache(cache, False)


def _aim(trt: Any, config: Any, target: Target) -> None:
    """Tell TensorRT-RTX which GPU to build for."""
    config.num_compute_capabilities = 1
    # It answers with False, and builds nothing later.
    if not config.set_compute_capability(trt.ComputeCapability(target.sm), 0):
        known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        raise EngineError(f"{title_of(trt)} can't build for sm{target.sm}.", fix=f"It can for {', '.join(known)}.")


def _add_profile(trt: Any, parsed: Network, config: Any, shapes: Profile) -> None:
    profile = parsed.builder.create_optimization_profile()
    for name, shape in shapes.items():
        profile.set_shape(name, shape, shape, shape)
    if config.add_optimization_profile(profile) < 0:
        raise _refusal(trt, parsed.path, f"refuses the optimisation profile {dict(shapes)} of")


def _shape(path: Path, tensor: Any, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input with its free axes filled in by name."""
    shape = list(tensor.shape)
    for axis, size in enumerate(shape):
        if size == -1:
            name = tensor.get_dimension_name(axis)
            if name not in sizes:
                raise EngineError(
                    f"axis {axis} of input {tensor.name} of {path.name} is free and called {name!r}; "
                    f"known are {', '.join(sizes)}.",
                    fix="Export the bundle again with this Keepsight.",
                )
            shape[axis] = sizes[name]
    return tuple(shape)


def _parser_error(parser: Any) -> str | None:
    """The parser's first error: the node, and two lines of why. None if it blames no node; then the log says more."""
    error = parser.get_error(0) if parser.num_errors else None
    if error is None or error.node() < 0:
        return None
    why = ": ".join(line.strip() for line in error.desc().splitlines()[:2])
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {why}"


def _refusal(trt: Any, path: Path, verb: str) -> EngineError:
    complaints = log_of(trt).complaints()
    return EngineError(f"{title_of(trt)} {verb} {path.name}: {complaints}.", fix=_advice(complaints))


def _advice(complaints: str) -> str:
    text = complaints.lower()
    if "fp8" in text:
        return "This GPU has no FP8: build another variant of the bundle."
    if "workspace" in text or "outofmemory" in text.replace(" ", ""):
        return "Give more with --workspace, or leave it out, and close what else uses the GPU's memory."
    if "profile" in text:
        return "The profile must name the graph's free inputs and keep its fixed sizes: export the bundle again."
    return "If it names an operation, export the bundle again with this Keepsight or use another variant."
