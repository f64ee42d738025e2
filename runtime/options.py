"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModeName = Literal["standing", "replay"]
ScoreName = Literal["answer", "prefix", "mean"]
MemoryName = Literal["mbc", "fifo", "average", "last"]
OfflineMemoryName = Literal["mbc", "fifo", "average", "last", "concat"]
BundleOption = Annotated[str, typer.Option("--bundle", "-b", help="A bundle's directory, or `tiny` for the shipped one.")]
VariantOption = Annotated[str | None, typer.Option(help="A precision that the bundle comes in [default: its first].")]
MemoryOption = Annotated[MemoryName, typer.Option(help="How a full memory makes room.")]
OfflineMemoryOption = Annotated[
    OfflineMemoryName,
    typer.Option(help="How a full memory makes room; concat: no memory, every frame's rows go to the LLM (files only)."),
]
GateOption = Annotated[bool, typer.Option("--gate/--no-gate", help="Leave grey, green and black frames out of the memory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
ScoreOption = Annotated[
    ScoreName,
    typer.Option(help="What options are ranked by: as whole answers, as beginnings of one (LAVIS), or the mean of their tokens."),
]
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
SnapshotOption = Annotated[Path | None, typer.Option(help="Go on from this file if it is there; save the memory to it.")]
SaveEveryOption = Annotated[float, typer.Option(help="Seconds from one save to the next.")]
SnapshotKVOption = Annotated[
    bool,
    typer.Option(
        "--snapshot-kv/--no-snapshot-kv", help="Save keys and values, too: larger, and restored bit for bit, not by rounding."
    ),
]
CameraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=URI", help="A camera with a name, in place of SOURCE; may be given several times."),
]
PreviewOption = Annotated[
    str | None,
    typer.Option(metavar="[HOST:]PORT", help="Show the pictures in a browser; on this machine alone, unless a host is named."),
]
RecordOption = Annotated[Path | None, typer.Option(help="Record the camera's video to this folder, as it comes.")]
RecordBytesOption = Annotated[str, typer.Option(help="Room for the recording, such as 2GB or 500M; the oldest goes first.")]
GovernorOption = Annotated[
    str,
    typer.Option(
        help="What to leave out when the machine is too hot, full, late or busy: on, off, or steps such as "
        "'rate=1/2,memory=10,context=1024'; knobs are rate, memory, context, answer and threads."
    ),
]
FeatureLogOption = Annotated[Path | None, typer.Option(help="Log features of the far past to this folder.")]
LogEveryOption = Annotated[float, typer.Option(help="Seconds from one logged frame to the next.")]
LogBytesOption = Annotated[str, typer.Option(help="Room for the log, such as 2G or 500M; the oldest goes first.")]
