"""What an export would write and take in memory, and on which boards it would fit: no weight is read, nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from keepsight.export.checkpoints import Checkpoint
from keepsight.export.convert import (
    LLM_FILE,
    TOKENIZER_FILE,
    Conversion,
    Precision,
    check_options,
    manifest_of,
    position_policy,
    with_marker,
)
from keepsight.export.graph_sizes import File, GraphSizes
from keepsight.export.llama_gguf import GGUFLayout, LanguageSource, gguf_layout
from keepsight.export.memory_graph import MEMORY_FILE, memory_graph_bytes
from keepsight.export.wordpiece import text_tokenizer
from keepsight.runtime.boards import Board, boards
from keepsight.runtime.footprint import Fit, Footprint, LanguageShape, banks, engines, fit, language, program
from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.runtime.language.gguf_rows import matrix_shapes
from keepsight.runtime.language.gguf_sizes import file_bytes
from keepsight.runtime.manifest import MANIFEST, Cost, CurrentInfo, LLMInfo, Manifest, TableInfo, manifest_text
from keepsight.runtime.planning.costs import total_bytes
from keepsight.runtime.planning.shapes import QFormerShape, qformer_costs, vision_cost

__all__ = ["LanguageModel", "Preview", "preview"]

_HASH = "0" * 64  # as long as the one that nobody knows yet
_SHORT_MEMORY = 10  # slots, as MA-LMM's question answering has


@dataclass(frozen=True)
class LanguageModel:
    """The language model that would be in the bundle.

    Attributes:
        kind: its quantisation; None for a GGUF file that is taken as it is.
    """

    kind: str | None
    bytes: int
    shape: LanguageShape


@dataclass(frozen=True)
class Preview:
    """An export that has not happened.

    Attributes:
        manifest: as it would be, but for hashes.
        precision: of the graphs.
        weights: bytes that each graph reads, by its name.
        footprint: in the memory of a board.
        fits: what each board would have left.
        changes: by name of a board that it does not fit on, what to change.
    """

    manifest: Manifest
    precision: Precision
    llm: LanguageModel | None
    files: tuple[File, ...]
    weights: Mapping[str, int]
    footprint: Footprint
    fits: tuple[Fit, ...]
    changes: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


def preview(checkpoint: Checkpoint, out: Path, options: Conversion) -> Preview:
    """What `convert` would make of the same arguments.

    Raises:
        UsageError, CheckpointError: as `convert`, as far as that says so before it writes.
        MissingModelError, LLMError: the GGUF file named is not there, or is none.
    """
    check_options(checkpoint, out, options)
    sizes = _Sizes(checkpoint, options)
    graphs, llm = sizes.graphs(options.precision), sizes.language_model(options)
    files = [*graphs.files(), *_table_file(checkpoint), *_tokenizer_file(checkpoint, options)]
    info = None
    if llm is not None:
        files.append(File(LLM_FILE, llm.bytes, "exact"))
        info = LLMInfo(file=LLM_FILE, sha256=_HASH, licence="see the model's own")
    manifest = manifest_of(checkpoint, out.name, position_policy(checkpoint), options, info)
    files.append(File(MEMORY_FILE, len(memory_graph_bytes(manifest.dims)), "exact"))
    manifest = sizes.with_costs(manifest.model_copy(update={"files": {file.name: _HASH for file in files}}), options.precision)
    files.append(File(MANIFEST, len(manifest_text(manifest).encode()), "estimated"))
    footprint = sizes.footprint(manifest, options)
    fits = tuple(fit(footprint, board) for board in boards())
    changes = {one.board.name: sizes.advice(manifest, options, one.board) for one in fits if not one.fits}
    return Preview(manifest, options.precision, llm, tuple(files), graphs.weights(), footprint, fits, changes)


def _different(costs: Iterable[Cost]) -> tuple[Cost, ...]:
    """Those of a graph without text once."""
    return tuple({cost.text: cost for cost in costs}.values())


def _table_file(checkpoint: Checkpoint) -> Iterator[File]:
    positions = position_policy(checkpoint)
    if isinstance(positions, TableInfo):
        yield File(positions.file, 4 * positions.frames * checkpoint.qformer.channels, "exact")


def _tokenizer_file(checkpoint: Checkpoint, options: Conversion) -> Iterator[File]:
    source, rows = options.tokenizer or checkpoint.tokenizer, checkpoint.qformer.vocab
    if source is not None and rows:
        yield File(TOKENIZER_FILE, len(text_tokenizer(source, rows=rows).to_str(pretty=True).encode()), "exact")


class _Sizes:
    """Sizes of one checkpoint under different options; what all of them share is found out once."""

    def __init__(self, checkpoint: Checkpoint, options: Conversion) -> None:
        self._checkpoint, self._source = checkpoint, options.llm

    def graphs(self, precision: Precision) -> GraphSizes:
        checkpoint = self._checkpoint
        marked = isinstance(position_policy(checkpoint), CurrentInfo)
        qformer = with_marker(checkpoint.qformer) if marked else checkpoint.qformer
        return GraphSizes(checkpoint.vision, qformer, precision)

    def with_costs(self, manifest: Manifest, precision: Precision) -> Manifest:
        """The manifest with what a run of each graph will cost, counted from sizes."""
        dims, config = manifest.dims, self._checkpoint.qformer
        config = with_marker(config) if isinstance(manifest.positions, CurrentInfo) else config
        qformer = QFormerShape(dims, config.ffn, config.position_rows)
        counted: dict[str, tuple[Cost, ...]] = {"vision": (vision_cost(self._checkpoint.vision),)}
        rows = [qformer_costs(qformer, text) for text in dims.text_buckets]
        counted |= {name: _different(row[name] for row in rows) for name in rows[0]}
        graphs = {}
        for name, info in manifest.graphs.items():
            costs = counted[name]
            moved = total_bytes(costs[-1], precision)
            graphs[name] = info.model_copy(update={"costs": costs, "flops": costs[-1].flops, "bytes": moved})
        return manifest.model_copy(update={"graphs": graphs})

    def language_model(self, options: Conversion) -> LanguageModel | None:
        source = self._source
        if source is None:
            return None
        if not isinstance(source, LanguageSource):
            return LanguageModel(None, source.stat().st_size, LanguageShape.of(matrix_shapes(source)))
        config, layout = source.config, self._layout
        grouping = config.heads // config.kv_heads
        size = file_bytes(layout.shapes, options.llm_type, head_bytes=layout.head_bytes, grouping=grouping)
        shape = LanguageShape(config.layers, config.hidden, config.kv_heads * config.head_dim, config.vocab)
        return LanguageModel(options.llm_type, size, shape)

    def footprint(self, manifest: Manifest, options: Conversion) -> Footprint:
        dims = manifest.dims.model_copy(update={"memory_length": options.memory_length})
        llm = self.language_model(options)
        parts = [*program(), *engines(dims, self.graphs(options.precision).weights()), *banks(dims)]
        return Footprint((*parts, *(language(llm.bytes, llm.shape) if llm is not None else ())))

    def advice(self, manifest: Manifest, options: Conversion, board: Board) -> str:
        """What to change so that it fits."""
        for changed in self._smaller(options):
            if fit(self.footprint(manifest, changed), board).fits:
                return " ".join(_differences(options, changed))
        return "a smaller language model, or a larger board"

    @cached_property
    def _layout(self) -> GGUFLayout:
        assert isinstance(self._source, LanguageSource)
        return gguf_layout(self._source, name=self._checkpoint.name)

    def _smaller(self, options: Conversion) -> Iterator[Conversion]:
        """The same with less and less: first what costs the answers least."""
        half = replace(options, precision="fp16")
        converted = isinstance(self._source, LanguageSource)
        kinds = QUANTISATIONS[QUANTISATIONS.index(options.llm_type) :] if converted else (options.llm_type,)
        for length in (options.memory_length, min(options.memory_length, _SHORT_MEMORY)):
            for kind in kinds:
                yield replace(half, memory_length=length, llm_type=kind)


def _differences(options: Conversion, changed: Conversion) -> Iterator[str]:
    for name in ("precision", "llm_type", "memory_length"):
        if getattr(options, name) != getattr(changed, name):
            yield f"--{name.replace('_', '-')} {getattr(changed, name)}"
