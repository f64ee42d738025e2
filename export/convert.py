"""A checkpoint in, a bundle out: the graphs with their weights, the text tokenizer, the language model, the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from keepsight.export.checkpoints import Checkpoint
from keepsight.export.costs import with_costs
from keepsight.export.eva import EvaVision
from keepsight.export.graphs import GRAPHS, export_qformer
from keepsight.export.half import too_large
from keepsight.export.llama_gguf import LanguageSource, LlamaConfig, gguf_layout, open_llama, with_lora, write_gguf
from keepsight.export.llama_reference import check_gguf
from keepsight.export.memory_graph import write_memory_graph
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.streamed import export_streamed
from keepsight.export.weights import store_weights
from keepsight.export.wordpiece import text_tokenizer, write_text_tokenizer
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.language.gguf_cache import QUANTISATIONS, quantise
from keepsight.runtime.language.gguf_rows import find_matrix
from keepsight.runtime.manifest import (
    MANIFEST,
    CurrentInfo,
    Decoding,
    Dims,
    GraphInfo,
    LLMInfo,
    Manifest,
    NoPositionsInfo,
    Preprocessing,
    System,
    TableInfo,
    Templates,
    sha256_of,
    write_manifest,
)
from keepsight.streams.errors import CheckpointError, UsageError

__all__ = [
    "FLOAT32",
    "LLM_FILE",
    "TABLE_FILE",
    "TOKENIZER_FILE",
    "Conversion",
    "Precision",
    "check_options",
    "convert",
    "dims_of",
    "language_source",
    "manifest_of",
    "position_policy",
    "positioned",
    "with_marker",
]

LLM_FILE = "llm.gguf"
TOKENIZER_FILE = "tokenizer.json"
TABLE_FILE = "positions.f32"
FLOAT32 = "float32"
"""In the provenance of a float16 bundle: the weights that float16 can't hold, which are computed with in float32."""
_BUCKETS = (16, 32, 64, 128)

Precision = Literal["fp32", "fp16"]
Positions = NoPositionsInfo | CurrentInfo | TableInfo
Progress = Callable[[str, int, int], None]
"""Called with what is being written, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint does not say itself.

    Attributes:
        system: which reference's memory and loop the bundle follows.
        memory_length: M. MA-LMM's scripts have 10 for question answering, 20 for classification, 40 for captions.
        sample_fps: frames per second that go into the memory (LVU's clips were sampled at one).
        prompt: how a question is put to the Q-Former and the language model alike, with `{question}`.
        llm: a GGUF file, or a LLaMA to convert; None for a bundle that ends at the soft prompt.
        llm_type: of a converted LLaMA's matrices, one of `QUANTISATIONS`.
        precision: of the graphs; fp16 computes matrix products and convolutions in float16 (`export/half.py`).
        tokenizer: the Q-Former's tokenizer, if it does not lie beside the checkpoint.
    """

    system: System = "malmm"
    memory_length: int = 20
    sample_fps: float = 1.0
    prompt: str = "{question}"
    llm: Path | LanguageSource | None = None
    llm_type: str = "F16"
    precision: Precision = "fp32"
    tokenizer: Path | None = None


def convert(checkpoint: Checkpoint, out: Path, options: Conversion, *, progress: Progress | None = None) -> Manifest:
    """Write a bundle to `out`, which appears when it is complete: until then it is `NAME.part` beside it.

    Raises:
        UsageError: `out` is there and is no bundle, or can't be made, or an option makes no sense.
        CheckpointError: no text tokenizer, a LLaMA that does not fit.
    """
    check_options(checkpoint, out, options)
    qformer, positions = positioned(checkpoint)
    partial = _made(out.with_name(f"{out.name}.part"))
    try:
        manifest = _write(checkpoint, qformer, positions, partial, options, progress or _silent)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _made(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder} can't be made ({error.strerror}).", fix="Name another folder with --out.") from error
    return folder


def language_source(
    checkpoint: Checkpoint, llm: str | None, *, lora: Path | None = None, lora_alpha: float | None = None
) -> Path | LanguageSource | None:
    """What `--llm` names: `none`, a GGUF file, a LLaMA's folder; by default the language model inside the checkpoint.

    InstructBLIP's tokenizer begins a text with `</s>` (id 2), whatever the language model's own does.

    Args:
        lora, lora_alpha: an adapter to merge into a LLaMA, and an alpha in place of what it says (`export/lora.py`).

    Raises:
        CheckpointError: the checkpoint has none inside, one that is no LLaMA, or an adapter that does not fit it.
        UsageError: an adapter over something that is not converted, or an alpha without an adapter.
    """
    source = _without_lora(checkpoint, llm)
    if lora is None:
        if lora_alpha is not None:
            raise UsageError("--lora-alpha is of an adapter, and none is named.", fix="Name it: --lora ADAPTER.")
        return source
    if not isinstance(source, LanguageSource):
        what = "with --llm none there is none" if source is None else f"{source} is a GGUF file"
        raise UsageError(
            f"{lora.name} can only be merged into a LLaMA that is converted; {what}.",
            fix="Give the folder of the one that it was trained on: --llm FOLDER.",
        )
    return with_lora(source, lora, alpha=lora_alpha)


def _without_lora(checkpoint: Checkpoint, llm: str | None) -> Path | LanguageSource | None:
    bos = 2 if checkpoint.qformer.vocab else None
    if llm == "none":
        return None
    if llm is not None:
        return open_llama(Path(llm), bos=bos) if Path(llm).is_dir() else Path(llm)
    if not checkpoint.llm_tensors or checkpoint.llm_config is None or checkpoint.llm_tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.name} carries no language model.",
            fix="Name it: --llm with its folder or a GGUF file, or --llm none for a bundle that ends at the soft prompt.",
        )
    return LanguageSource(LlamaConfig.read(checkpoint.llm_config), checkpoint.llm_tensors, checkpoint.llm_tokenizer, bos)


def position_policy(checkpoint: Checkpoint) -> Positions:
    """What `image_pe` means at run time: nothing, a marker on the newest frame, or a row for every frame.

    MA-LMM's training fills one row, that of its last frame, since banked features are detached: it marks what is answered at.
    Several rows have been trained otherwise, and are added as the reference adds them.
    """
    if checkpoint.image_pe is None:
        return NoPositionsInfo()
    frames = [int(row) for row in checkpoint.image_pe.any(dim=1).nonzero()[:, 0]]
    if len(frames) > 1:
        return TableInfo(file=TABLE_FILE, frames=len(checkpoint.image_pe))
    return CurrentInfo(frame=frames[0])


def positioned(checkpoint: Checkpoint) -> tuple[QFormer, Positions]:
    """The Q-Former, with what `image_pe` means to its cross-attention as position tables, and the policy that reads them.

    Keys and values are affine: k(x + pe) = k(x) + W pe. So the marker that MA-LMM adds to the newest frame's features
    becomes one row for each cross-attention layer, and what is banked stays without it. Of a table the Q-Former knows nothing.
    """
    policy = position_policy(checkpoint)
    qformer = checkpoint.load_qformer()
    if checkpoint.image_pe is None or not isinstance(policy, CurrentInfo):
        return qformer, policy
    marked = QFormer(with_marker(qformer.config))
    state = qformer.state_dict() | _marker_rows(qformer, checkpoint.image_pe[policy.frame])
    marked.load_state_dict(state)
    return marked.eval(), policy


def with_marker(config: QFormerConfig) -> QFormerConfig:
    """The dimensions of a Q-Former whose position tables hold the marker of the newest frame."""
    return replace(config, slots=1, time_buckets=1)


def _marker_rows(qformer: QFormer, marker: Tensor) -> dict[str, Tensor]:
    """Position tables `[X, 2, H]`: bucket 1 adds row 0, which is the marker's, and row 1, which is nothing."""
    rows = {}
    for name, part in (("position_key", "key"), ("position_value", "value")):
        crosses = [qformer.get_submodule(f"layers.{index}.cross.{part}") for index in qformer.config.cross_layers]
        images = torch.stack([cross.weight.detach().double() @ marker.double() for cross in crosses])  # type: ignore[operator]
        rows[name] = torch.stack([images, torch.zeros_like(images)], dim=1).float()
    return rows


def _write(
    checkpoint: Checkpoint,
    qformer: QFormer,
    positions: Positions,
    folder: Path,
    options: Conversion,
    progress: Progress,
) -> Manifest:
    text = _text_buckets(qformer.config)
    vision = checkpoint.vision
    frames = torch.zeros(1, vision.image_size, vision.image_size, 3, dtype=torch.uint8)
    half = options.precision == "fp16"
    large = export_streamed(
        lambda: EvaVision(vision),
        checkpoint.vision_tensors,
        {"frames": frames},
        ["features"],
        folder / "vision.onnx",
        dynamic_axes={"frames": {0: "batch"}, "features": {0: "batch"}},
        half_compute=half,
        progress=lambda done, total: progress("visual encoder", done, total),
    )
    progress("Q-Former", 0, 1)
    slots = options.memory_length + 1
    graphs = export_qformer(
        qformer, folder, slots=slots, tokens=vision.tokens, text=text[0], half_storage=False,
        half_compute=half,
    )  # fmt: skip
    if half:
        large += [name for name, weight in qformer.named_parameters() if too_large(weight)]
    store_weights(qformer, folder, graphs)
    progress("Q-Former", 1, 1)
    if isinstance(positions, TableInfo) and checkpoint.image_pe is not None:
        (folder / positions.file).write_bytes(checkpoint.image_pe.numpy().astype("<f4").tobytes())
    tokenizer = options.tokenizer or checkpoint.tokenizer
    if tokenizer is not None and qformer.config.vocab:
        write_text_tokenizer(tokenizer, folder / TOKENIZER_FILE, rows=qformer.config.vocab)
    llm = _language_model(options, checkpoint.name, folder, progress)
    manifest = manifest_of(checkpoint, folder.name.removesuffix(".part"), positions, options, llm)
    write_memory_graph(folder, manifest.dims)
    if large:
        manifest = manifest.model_copy(update={"provenance": {**manifest.provenance, FLOAT32: large}})
    return write_manifest(folder, with_costs(folder, manifest))


def manifest_of(
    checkpoint: Checkpoint, name: str, positions: Positions, options: Conversion, llm: LLMInfo | None
) -> Manifest:
    """What the bundle says of itself, its files' hashes left out."""
    vision, config = checkpoint.vision, checkpoint.qformer
    return Manifest(
        name=name,
        system=options.system,
        dims=dims_of(checkpoint, positions, memory_length=options.memory_length),
        preprocessing=Preprocessing(width=vision.image_size, height=vision.image_size, scaler="bicubic-wrap"),
        sample_fps=options.sample_fps,
        templates=_templates(checkpoint, options),
        decoding=Decoding(max_tokens=256, beams=5, repetition_penalty=1.5),
        positions=positions,
        graphs={name: GraphInfo(files={options.precision: f"{name}.onnx"}) for name in ("vision", *GRAPHS, MEMORY)},
        variants=(options.precision,),
        llm=llm,
        tokenizer=TOKENIZER_FILE if config.vocab else None,
        provenance=_provenance(checkpoint, options.llm),
    )  # fmt: skip


def dims_of(checkpoint: Checkpoint, positions: Positions, *, memory_length: int) -> Dims:
    """The dimensions of a bundle of this checkpoint."""
    vision, config = checkpoint.vision, checkpoint.qformer
    return Dims(
        image_size=vision.image_size, tokens=vision.tokens, channels=config.channels, queries=config.queries,
        hidden=config.hidden, layers=config.layers, cross_layers=tuple(config.cross_layers), heads=config.heads,
        n_embd=config.n_embd, memory_length=memory_length, text_buckets=_text_buckets(config),
        position_buckets=positions.buckets(memory_length + 1),
    )  # fmt: skip


def check_options(checkpoint: Checkpoint, out: Path, options: Conversion) -> None:
    """Refuse what can't be exported, before anything is written.

    Raises:
        UsageError: `out` is there and is no bundle, or an option makes no sense.
        CheckpointError: no text tokenizer, or a LLaMA whose tensors or tokenizer do not fit its configuration.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} is there and is no bundle.", fix="Name a folder that does not exist yet.")
    if options.memory_length < 1:
        raise UsageError(f"a memory of {options.memory_length} slots remembers nothing.", fix="Give at least 1.")
    if not options.sample_fps > 0:
        raise UsageError(f"at {options.sample_fps:g} frames per second nothing is seen.", fix="Give more than 0.")
    if options.prompt.count("{question}") != 1:
        raise UsageError(f"the prompt {options.prompt!r} must hold {{question}} once.")
    if checkpoint.qformer.vocab and options.tokenizer is None and checkpoint.tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.name} comes without the Q-Former's text tokenizer.",
            fix="Give it: --tokenizer with the folder, tokenizer.json or vocab.txt of bert-base-uncased.",
        )
    if options.llm_type not in QUANTISATIONS:
        raise UsageError(f"{options.llm_type!r} is no quantisation.", fix=f"Use one of {', '.join(QUANTISATIONS)}.")
    if options.llm is not None:
        width = _width(options.llm)
        if width != checkpoint.qformer.n_embd:
            raise UsageError(
                f"the soft prompt's rows are {checkpoint.qformer.n_embd} wide, the language model takes {width}.",
                fix="Give the language model that the checkpoint was trained with.",
            )
    _check_tokenizers(checkpoint, options)


def _check_tokenizers(checkpoint: Checkpoint, options: Conversion) -> None:
    """Minutes before they are needed: the visual encoder is written first."""
    source = options.tokenizer or checkpoint.tokenizer
    if source is not None and checkpoint.qformer.vocab:
        text_tokenizer(source, rows=checkpoint.qformer.vocab)
    if isinstance(options.llm, LanguageSource):
        gguf_layout(options.llm, name=checkpoint.name)


def _text_buckets(config: QFormerConfig) -> tuple[int, ...]:
    """Lengths that the graphs are built for, up to the position table's."""
    if not config.vocab:
        return (0,)
    return tuple(bucket for bucket in _BUCKETS if bucket <= config.max_text) or (config.max_text,)


def _templates(checkpoint: Checkpoint, options: Conversion) -> Templates:
    """The rows come first, before what the tokenizer calls the beginning: InstructBLIP's LLaMA tokenizer says `</s>`, id 2."""
    text = checkpoint.qformer.vocab
    begin = "</s>" if text else ""
    return Templates(qformer=options.prompt if text else "", llm="{video}" + begin + options.prompt)


def _width(llm: Path | LanguageSource) -> int:
    return llm.config.hidden if isinstance(llm, LanguageSource) else find_matrix(llm, "token_embd.weight").width


def _language_model(options: Conversion, name: str, folder: Path, progress: Progress) -> LLMInfo | None:
    """Put the language model into the bundle: a GGUF as it is, a LLaMA converted, proved, and then quantised."""
    target = folder / LLM_FILE
    if options.llm is None:
        return None
    if isinstance(options.llm, LanguageSource):
        full = folder / "full.gguf"
        write_gguf(options.llm, full, name=name, progress=lambda done, total: progress("language model", done, total))
        check_gguf(full, options.llm)
        if options.llm_type == "F16":
            os.replace(full, target)
        else:
            quantise(full, target, options.llm_type)
            full.unlink()
    else:
        _link(options.llm, target)
    return LLMInfo(file=LLM_FILE, sha256=sha256_of(target), licence="see the model's own")


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name, or a copy where the file system has no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _provenance(checkpoint: Checkpoint, llm: Path | LanguageSource | None) -> dict[str, Any]:
    """The files that the weights are from, by name and size, and the adapter that was merged into the language model.

    A path would tell of the machine, not of the model.
    """
    adapter = llm.lora if isinstance(llm, LanguageSource) else None
    files = [file for source in checkpoint.sources for file in (sorted(source.iterdir()) if source.is_dir() else [source])]
    return {
        "checkpoint": checkpoint.name,
        "files": {file.name: file.stat().st_size for file in files if file.is_file()},
        "ln_vision_eps": checkpoint.vision.norm_eps,
        **({} if adapter is None else {"lora": adapter.provenance()}),
    }


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""
