"""The manifest of a bundle: what `manifest.json` may say, checked when read, written the same way every time."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from keepsight.streams.errors import BundleError
from keepsight.streams.view import Aspect, Colorimetry, Scaler

__all__ = [
    "MANIFEST",
    "PRODUCT",
    "SCHEMA_VERSION",
    "AgeInfo",
    "Cost",
    "CurrentInfo",
    "Decoding",
    "Dims",
    "GraphInfo",
    "LLMInfo",
    "Licence",
    "Manifest",
    "NoPositionsInfo",
    "OrderInfo",
    "Preprocessing",
    "System",
    "TableInfo",
    "Templates",
    "Work",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
System = Literal["malmm"]

# Made after the export, on the machine that runs the bundle: not part of what the manifest vouches for.
_MADE_LATER = ("engines/", "parity.json", "parity.html")


def _inside(name: str) -> str:
    """Accept only a plain relative path, so that no manifest can make us read outside its bundle."""
    path = PurePosixPath(name)
    if not name or "\\" in name or path.is_absolute() or str(path) != name or {"..", "."} & set(path.parts):
        raise ValueError(f"{name!r} is not a plain path inside the bundle")
    return name


BundleFile = Annotated[str, AfterValidator(_inside)]
"""A file of the bundle: relative, with forward slashes."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Work = Literal["map", "gelu", "softmax", "norm", "reduce", "move"]
"""What is no product: arithmetic value by value, Gelu, softmax, layer norm, sums, and moving (transpose, join, gather, cast)."""
PRODUCT = r"^(conv )?([1-9]\d*\*)?[1-9]\d*x[1-9]\d*x[1-9]\d*( w)?$"
"""How the shape of a product is written."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Dims(_Part):
    """Sizes of the graphs. Letters are those of the graph contract.

    Attributes:
        image_size: height and width of a frame, pixels.
        tokens: N, visual tokens of a frame.
        channels: C, width of the visual features.
        queries: Q, learned queries = soft prompt rows.
        hidden: H, width of the Q-Former.
        layers: layers of the Q-Former; Y = layers - 1 of them are banked (1..last).
        cross_layers: the layers with cross-attention, X of them.
        heads: attention heads of a Q-Former layer.
        n_embd: width of the language model's embeddings.
        memory_length: M, stored slots; the graphs have S = M + 1.
        text_buckets: L, the text lengths that graphs are built for, rising; (0,) for a Q-Former without text.
        position_buckets: P, rows of the position table; bucket 0 adds nothing.
    """

    image_size: Size
    tokens: Size
    channels: Size
    queries: Size
    hidden: Size
    layers: Size
    cross_layers: tuple[int, ...]
    heads: Size
    n_embd: Size
    memory_length: Size
    text_buckets: Annotated[tuple[int, ...], Field(min_length=1)]
    position_buckets: Size

    @property
    def slots(self) -> int:
        """S = M + 1: the stored slots and the free one."""
        return self.memory_length + 1

    @property
    def banked_layers(self) -> int:
        """Y: every layer but the first, whose self-attention is constant."""
        return self.layers - 1

    @model_validator(mode="after")
    def _consistent(self) -> Dims:
        if not _rises(self.cross_layers) or not set(self.cross_layers) <= set(range(self.layers)):
            raise ValueError(f"cross_layers {self.cross_layers} must rise and lie in 0..{self.layers - 1}")
        if not _rises(self.text_buckets) or (self.text_buckets != (0,) and self.text_buckets[0] < 1):
            raise ValueError(f"text_buckets {self.text_buckets} must rise from at least 1, or be (0,) for no text")
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} does not divide into {self.heads} heads")
        return self


class Preprocessing(_Part):
    """How a decoded frame becomes the vision graph's input. Normalisation is inside the graph.

    Attributes:
        width, height: pixels.
        scaler: how the size is reached (`streams/view.py` says what each computes).
        aspect: "stretch" ignores the aspect ratio, "letterbox" keeps it and pads with black.
        colorimetry: the matrix that YUV is read with, or None to take the stream's own.
    """

    width: Size
    height: Size
    scaler: Scaler = "bilinear"
    aspect: Aspect = "stretch"
    colorimetry: Colorimetry | None = None


class Templates(_Part):
    """What a question is put into.

    Attributes:
        qformer: text for the Q-Former's tokenizer, with `{question}`; "" for a Q-Former without text.
        llm: prompt for the language model, with `{question}` and `{video}`, where the soft prompt's rows go.
    """

    qformer: str
    llm: str

    def qformer_text(self, question: str) -> str:
        """The text that the Q-Former reads."""
        return self.qformer.replace("{question}", question)

    def llm_parts(self, question: str) -> tuple[str, str]:
        """The prompt before and after the video's rows. A question's own braces are plain text."""
        before, after = self.llm.split("{video}")
        return before.replace("{question}", question), after.replace("{question}", question)

    @model_validator(mode="after")
    def _placeholders(self) -> Templates:
        for name, text, placeholders in (
            ("qformer", self.qformer, ("{question}",) if self.qformer else ()),
            ("llm", self.llm, ("{question}", "{video}")),
        ):
            for placeholder in placeholders:
                if text.count(placeholder) != 1:
                    raise ValueError(f"template {name} {text!r} must hold {placeholder} once")
        return self


class Decoding(_Part):
    """Defaults of decoding. The repetition penalty sees generated tokens only."""

    max_tokens: Size
    stop: tuple[str, ...] = ()
    beams: Size = 1
    repetition_penalty: Positive = 1.0


class NoPositionsInfo(_Part):
    """No position is added (zero-shot checkpoints)."""

    policy: Literal["none"] = "none"

    def buckets(self, slots: int) -> int:
        """P, for a memory of S slots."""
        return 1


class OrderInfo(_Part):
    """Rank in time, with the age relative to all that is remembered in `time_buckets` steps."""

    policy: Literal["order"] = "order"
    time_buckets: Size

    def buckets(self, slots: int) -> int:
        """P, for a memory of S slots."""
        return 1 + slots * self.time_buckets


class AgeInfo(_Part):
    """Age in seconds, cut at `edges_s` (rising; usually in a geometric row)."""

    policy: Literal["age"] = "age"
    edges_s: Annotated[tuple[Positive, ...], Field(min_length=1)]

    def buckets(self, slots: int) -> int:
        """P, for a memory of S slots."""
        return len(self.edges_s) + 2

    @model_validator(mode="after")
    def _rising(self) -> AgeInfo:
        if not _rises(self.edges_s):
            raise ValueError(f"edges_s {self.edges_s} must rise")
        return self


class CurrentInfo(_Part):
    """One marker, on the newest frame, and only when an answer is made: what MA-LMM's fine-tuned checkpoints have learned.

    Their training fills row `frame` of the table alone (the last frame's), since what is banked is detached.
    """

    policy: Literal["current"] = "current"
    frame: Annotated[int, Field(ge=0)]

    def buckets(self, slots: int) -> int:
        """P, for a memory of S slots."""
        return 2


class TableInfo(_Part):
    """A row for each frame, counted from the stream's start, added to its features before they are banked: MA-LMM offline.

    Attributes:
        file: the rows, raw float32 `[frames, C]`, little-endian.
        frames: that a stream may have.
    """

    policy: Literal["table"] = "table"
    file: BundleFile
    frames: Size

    def buckets(self, slots: int) -> int:
        """P, for a memory of S slots: nothing is added when a slot is read."""
        return 1


class Cost(_Part):
    """The work of one run of a graph, of one frame and one question: counted by `export/costs.py`, read by `runtime/planning`.

    Traffic is counted in values, not bytes, since a value has another width in each precision; nothing is taken to be fused but
    Gelu. Products are those of matrices and convolutions, as `[batch*]MxKxN`: `12*32x64x257` is twelve products of 32 x 64 by
    64 x 257. A second matrix of weights is marked by ` w`; a convolution is `conv ` and its product of patches by weights, its
    batch the number of groups.

    Attributes:
        text: L, rows of text; 0 for a graph that has none.
        flops: 2 for each multiply-add of a product, and what all else computes: 5 for each value of a softmax, 7 of a norm, 8 of
            a Gelu, otherwise 1; moving costs none.
        weights: values of weights that it reads.
        product_values: read and written by products, weights left out.
        other_values: read and written by what is no product, by its kind.
        inputs_outputs: values of the graph's inputs and outputs.
        kernels: operators that do something at run time.
        products: how many of each shape.
    """

    text: Annotated[int, Field(ge=0)] = 0
    flops: Annotated[int, Field(ge=0)]
    weights: Annotated[int, Field(ge=0)]
    product_values: Annotated[int, Field(ge=0)]
    other_values: dict[Work, Annotated[int, Field(ge=0)]]
    inputs_outputs: Annotated[int, Field(ge=0)]
    kernels: Annotated[int, Field(ge=0)]
    products: dict[Annotated[str, StringConstraints(pattern=PRODUCT)], Size]


class GraphInfo(_Part):
    """One graph of the bundle.

    Attributes:
        files: variant (fp32, fp16, ...) -> .onnx file.
        flops: of one run (the vision graph: of one frame; text graphs: at the largest text bucket), if known.
        bytes: of weights and activations moved by one run in the bundle's first variant, if known.
        costs: its work in detail, at each text bucket, rising; None where nobody has counted it.
    """

    files: dict[str, BundleFile]
    flops: Annotated[int, Field(ge=0)] | None = None
    bytes: Annotated[int, Field(ge=0)] | None = None
    costs: Annotated[tuple[Cost, ...], Field(min_length=1)] | None = None


class LLMInfo(_Part):
    """Where the language model's GGUF is.

    Attributes:
        file: inside `package` if that is given; else an absolute path, or else a file of the bundle.
        package: name of an installed Python package (as it is imported; it never is).
        sha256: of the file.
        quantise: type to requantise to once, before use; None = use as it is.
        licence: SPDX id.
        install: what `pip install` gets to bring the package, such as `keepsight[tiny]`.
    """

    file: str
    package: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")] | None = None
    sha256: Sha256
    quantise: Literal["Q8_0", "F16"] | None = None
    licence: str
    install: str | None = None

    @property
    def place(self) -> Literal["package", "bundle", "absolute"]:
        """Which of the three the file is in."""
        if self.package is not None:
            return "package"
        return "absolute" if Path(self.file).is_absolute() else "bundle"

    @model_validator(mode="after")
    def _plain(self) -> LLMInfo:
        if self.place != "absolute":
            _inside(self.file)
        return self


class Licence(_Part):
    """Licence of one part of the bundle: what it covers, its SPDX id, and where it is from."""

    part: str
    spdx: str
    source: str | None = None


class Manifest(_Part):
    """Everything that a runtime must know of a bundle. See the attributes' own classes.

    Attributes:
        name: of the bundle.
        system: which reference's memory and loop it follows.
        sample_fps: frames per second that go into the memory.
        graphs: vision, visual_kv, prompt, step, answer, replay; and memory, without which banks stay on the host everywhere.
        variants: precisions that every graph comes in; the first is the default.
        llm: None for a bundle that ends at the soft prompt.
        tokenizer: of the Q-Former's text, a `tokenizers` file; None for a Q-Former without text.
        provenance: where it comes from: checkpoint, commit, seed, command, figures.
        files: sha256 of every file, by name. :func:`write_manifest` fills it in.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    system: System = "malmm"
    dims: Dims
    preprocessing: Preprocessing
    sample_fps: Positive
    templates: Templates
    decoding: Decoding
    positions: Annotated[NoPositionsInfo | OrderInfo | AgeInfo | CurrentInfo | TableInfo, Field(discriminator="policy")]
    graphs: dict[str, GraphInfo]
    variants: Annotated[tuple[str, ...], Field(min_length=1)]
    llm: LLMInfo | None = None
    tokenizer: BundleFile | None = None
    licences: tuple[Licence, ...] = ()
    provenance: dict[str, JsonValue] = {}
    files: dict[BundleFile, Sha256] = {}

    def referenced_files(self) -> set[str]:
        """Files of the bundle that the manifest refers to."""
        files = {file for graph in self.graphs.values() for file in graph.files.values()}
        if self.tokenizer is not None:
            files.add(self.tokenizer)
        if isinstance(self.positions, TableInfo):
            files.add(self.positions.file)
        if self.llm is not None and self.llm.place == "bundle":
            files.add(self.llm.file)
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        expected = self.positions.buckets(self.dims.slots)
        if self.dims.position_buckets != expected:
            raise ValueError(
                f"dims.position_buckets is {self.dims.position_buckets}, and positions {self.positions.policy!r} "
                f"over {self.dims.slots} slots has {expected}"
            )
        size = (self.preprocessing.width, self.preprocessing.height)
        if size != (self.dims.image_size, self.dims.image_size):
            raise ValueError(f"preprocessing makes frames of {size}, dims.image_size is {self.dims.image_size}")
        for name, graph in self.graphs.items():
            if set(graph.files) != set(self.variants):
                raise ValueError(f"graph {name} has the variants {sorted(graph.files)}, not {sorted(self.variants)}")
        llm = self.llm
        if llm is not None and llm.place == "bundle" and self.files.get(llm.file, llm.sha256) != llm.sha256:
            raise ValueError(f"llm.sha256 is not that of {llm.file} in files")
        if (self.dims.text_buckets == (0,)) != (self.tokenizer is None):
            raise ValueError("a Q-Former with text needs a tokenizer, and one without (text_buckets (0,)) has none")
        return self


def read_manifest(directory: str | Path) -> Manifest:
    """Read `manifest.json` of a bundle directory.

    Raises:
        BundleError: no such directory or file, not JSON, another schema version, an unknown or wrong field.
    """
    path = Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if path.exists() else "does not exist"
        raise BundleError(
            f"{path} {what}.", fix="Give a bundle's directory, or `tiny` for the one that is shipped."
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}.", fix="Restore or export the bundle again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema_version {version!r}, this Keepsight reads {SCHEMA_VERSION}.",
            fix="Export the bundle again with this version, or install the version that made it.",
        )
    return _validated(content, path)


def write_manifest(directory: str | Path, manifest: Manifest) -> Manifest:
    """Hash the files of a bundle directory and write its `manifest.json`; the same content gives the same bytes.

    Every file is hashed but the manifest, hidden files, and what is made on the machine that runs the bundle.

    Returns:
        The manifest with `files` filled in, as written.

    Raises:
        BundleError: a file that the manifest refers to is not there, or is not the language model that it describes.
    """
    directory = Path(directory)
    files = {name: sha256_of(directory / name) for name in _bundle_files(directory)}
    absent = sorted(manifest.referenced_files() - files.keys())
    if absent:
        raise BundleError(f"{directory} has no {absent[0]}, which its manifest refers to.")
    manifest = _validated({**manifest.model_dump(), "files": files}, directory / MANIFEST)
    (directory / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return manifest


def manifest_text(manifest: Manifest) -> str:
    """What `manifest.json` says."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _validated(content: dict[str, Any], path: Path) -> Manifest:
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path} is not a valid manifest: {_one_line(error)}.") from error


def _bundle_files(directory: Path) -> list[str]:
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return [
        name
        for name in names
        if name != MANIFEST
        and not name.startswith(_MADE_LATER)
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    ]


def _rises(values: tuple[float, ...]) -> bool:
    return all(low < high for low, high in pairwise(values))


def _one_line(error: ValidationError) -> str:
    """The first complaint, by the field's dotted name, and how many more there are."""
    errors = error.errors(include_url=False)
    field = ".".join(str(part) for part in errors[0]["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{field + ': ' if field else ''}{errors[0]['msg'].removeprefix('Value error, ')}{more}"
