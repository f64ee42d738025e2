"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ModeName = Literal["standing", "replay"]
MemoryName = Literal["mbc", "fifo", "average", "last"]
BundleOption = Annotated[str, typer.Option("--bundle", "-b", help="A bundle's directory, or `tiny` for the shipped one.")]
VariantOption = Annotated[str | None, typer.Option(help="A precision that the bundle comes in [default: its first].")]
MemoryOption = Annotated[MemoryName, typer.Option(help="How a full memory makes room.")]
GateOption = Annotated[bool, typer.Option("--gate/--no-gate", help="Leave grey, green and black frames out of the memory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
BackendName = Literal["cpu", "cuda", "tensorrt"]
BackendOption = Annotated[
    BackendName, typer.Option(help="What runs the graphs: ONNX Runtime on CPU or CUDA, or TensorRT after `keepsight build`.")
]
GraphsOption = Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="TensorRT: launch kernels as CUDA graphs.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads of each stage [default: all cores for the LLM].")]
