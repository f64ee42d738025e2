"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModeName = Literal["standing", "replay"]
MemoryName = Literal["mbc", "fifo", "average", "last"]
BundleOption = Annotated[str, typer.Option("--bundle", "-b", help="A bundle's directory, or `tiny` for the shipped one.")]
VariantOption = Annotated[str | None, typer.Option(help="A precision that the bundle comes in [default: its first].")]
MemoryOption = Annotated[MemoryName, typer.Option(help="How a full memory makes room.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Ask only about what was seen since: 2h, 30m, 90s, or a time. Of a file: its seconds.")
]
AtOption = Annotated[str | None, typer.Option(help="Ask only about one moment: 14:05, an ISO date; of a file 95 or 1:35.")]
BetweenOption = Annotated[
    tuple[str, str] | None, typer.Option(metavar="START END", help="Ask only about what was seen between two moments.")
]
EvidenceOption = Annotated[
    Path | None, typer.Option(help="Folder to write the key frames to that the answer rests on; prints their times.")
]
BackendName = Literal["cpu", "cuda", "tensorrt"]
BackendOption = Annotated[
    BackendName, typer.Option(help="What runs the graphs: ONNX Runtime on CPU or CUDA, or TensorRT after `keepsight build`.")
]
GraphsOption = Annotated[bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="TensorRT: launch kernels as CUDA graphs.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads of each stage [default: all cores for the LLM].")]
