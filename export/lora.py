"""LoRA adapters: PEFT's folder, or the pairs inside a checkpoint such as TimeChat's, checked against the LLaMA that they change.

A pair adds scale * B A to one weight matrix (Hu et al., LoRA, section 4.1). Whatever else an adapter may change is refused by
name, since nothing would tell of it afterwards: the merged model answers, only differently from the trained one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepsight.export.tensorfiles import StoredTensor, open_tensors
from keepsight.runtime.manifest import sha256_of
from keepsight.streams.errors import CheckpointError, UsageError

__all__ = ["Adapter", "LowRank", "merged", "open_lora"]

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# TimeChat's, LAVIS's and Hugging Face's names of the language model inside a larger one.
_INSIDE = r"(?:llama_model|llm_model|language_model)\."
_PAIR = re.compile(rf"(?:{_INSIDE})?base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_OF_LANGUAGE_MODEL = re.compile(rf"{_INSIDE}.*|base_model\..*|.*lora_.*")
_COMPUTED = "rotary_emb.inv_freq"  # a buffer, made from the configuration

# What else an adapter can train, by the names that PEFT gives it.
_OTHER_KINDS = (
    (re.compile(r".*lora_magnitude_vector.*"), "of DoRA"),
    (re.compile(r".*lora_embedding_[AB].*"), "of LoRA on an embedding"),
    (re.compile(r".*\.bias"), "of biases"),
)
# Settings of PEFT under which the model computes something other than W x + scale * B A x, or trains more than the pairs.
_MORE_THAN_PAIRS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ take what they put into the pairs out of it.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

_Halves = dict[str, StoredTensor]
"""A module's pair as it is found: `A`, `B` or both."""


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight matrix `[out, in]`: `scale` times `up` times `down`.

    Attributes:
        down: LoRA's A, `[r, in]`.
        up: LoRA's B, `[out, r]`.
        alpha: what the scale is made from: alpha / r, or alpha / sqrt(r) of a rank-stabilised adapter.
        scale: the factor itself.
    """

    down: StoredTensor
    up: StoredTensor
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its language model.

    Attributes:
        name: of the folder or file.
        sha256: of the file with its tensors.
        pairs: by the name of the weight that they change (`model.layers.0.self_attn.q_proj.weight`).
    """

    name: str
    sha256: str
    pairs: Mapping[str, LowRank]

    def provenance(self) -> dict[str, Any]:
        """For a manifest: which adapter, and how many matrices it changes with which rank, alpha and scale."""
        kinds = Counter((pair.rank, pair.alpha, pair.scale) for pair in self.pairs.values())
        return {
            "name": self.name,
            "sha256": self.sha256,
            "pairs": [
                {"matrices": count, "r": rank, "alpha": alpha, "scale": scale}
                for (rank, alpha, scale), count in sorted(kinds.items())
            ],
        }


def open_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], *, alpha: float | None = None) -> Adapter:
    """Open an adapter without reading its weights.

    Args:
        path: PEFT's folder (`adapter_config.json` and `adapter_model.safetensors` or `.bin`), or a checkpoint with the pairs
            inside, by PEFT's names (TimeChat's: `llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A...`).
        shapes: of the base's matrices, `[out, in]`, by module (`model.layers.0.self_attn.q_proj`).
        alpha: in place of what the configuration says, for every pair. A checkpoint says nothing and needs it.

    Raises:
        CheckpointError: not an adapter, one that changes more than weight matrices of this base, pairs that are missing,
            incomplete or wrongly shaped, or no alpha.
        UsageError: an alpha that is no positive number.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"an alpha of {alpha} is no positive number.", fix="Give the one that the adapter was trained with.")
    if path.name in _WEIGHTS and (path.parent / _CONFIG).is_file():
        path = path.parent  # the file alone would lose what lies beside it: alpha, and how the scale is made from it
    config = _read_config(path)
    weights = path if config is None else _weights_in(path)
    pairs = _read_pairs(weights, whole=config is not None)
    if config is None:  # nothing says which modules were trained: those that are there, in every layer
        config = {"target_modules": sorted({re.sub(r"^model\.layers\.\d+\.", "", module) for module in pairs})}
    _check(pairs, shapes, config, path)
    return Adapter(
        name=path.resolve().name,
        sha256=sha256_of(weights),
        pairs={f"{module}.weight": _low_rank(module, halves, config, alpha, path) for module, halves in sorted(pairs.items())},
    )


def merged(tensors: Mapping[str, StoredTensor], adapter: Adapter) -> dict[str, StoredTensor]:
    """The base's tensors, the adapter's part added in float32 to those that it changes, as each is read."""
    changed = {key: _merging(tensors[key], pair) for key, pair in adapter.pairs.items() if key in tensors}
    return {**tensors, **changed}


def _merging(stored: StoredTensor, pair: LowRank) -> StoredTensor:
    def read() -> Tensor:
        base, up, down = (part.read().detach().to(torch.float32) for part in (stored, pair.up, pair.down))
        return torch.addmm(base, up, down, alpha=pair.scale)  # not in place: `base` may be the checkpoint's own memory

    return StoredTensor(stored.shape, read)


# -- reading -------------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> Mapping[str, Any] | None:
    """The configuration of PEFT's folder; None for a file."""
    if not path.is_dir():
        return None
    try:
        config: Any = json.loads((path / _CONFIG).read_text())
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has no readable {_CONFIG} ({error}).", fix="Name the folder that PEFT's save_pretrained wrote, or a file."
        ) from error
    if kind != "LORA":
        raise CheckpointError(f"{path} is an adapter of the type {kind!r}; only LORA can be merged.")
    more = [key for key in _MORE_THAN_PAIRS if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        more.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if more:
        raise CheckpointError(
            f"{path} was trained with {', '.join(more)}: adding its pairs to the base's weights would give another model.",
            fix="Merge it with PEFT, save_pretrained the result, and name that with --llm.",
        )
    return config


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights: none of {', '.join(_WEIGHTS)}.", fix="Fetch them too.")


def _read_pairs(weights: Path, *, whole: bool) -> dict[str, _Halves]:
    """Pairs by module. Of a file that is not PEFT's as a `whole`, what does not belong to the language model is left alone."""
    pairs: dict[str, _Halves] = {}
    adapters, others = set(), []
    for key, tensor in open_tensors(weights).items():
        if match := _PAIR.fullmatch(key):
            pairs.setdefault(match["module"], {})[match["side"]] = tensor
            adapters.add(match["adapter"] or "one without a name")
        elif (whole or _OF_LANGUAGE_MODEL.fullmatch(key)) and not key.endswith(_COMPUTED):
            others.append(key)
    if others:
        raise CheckpointError(
            f"{weights} changes more than pairs of LoRA can: it has {'; '.join(_by_kind(others))}.",
            fix="Merge it with PEFT, save_pretrained the result, and name that with --llm.",
        )
    if not pairs:
        raise CheckpointError(f"{weights} holds no LoRA pairs (...lora_A.weight and ...lora_B.weight).")
    if len(adapters) > 1:
        raise CheckpointError(f"{weights} holds several adapters: {', '.join(sorted(adapters))}.", fix="Save one alone.")
    return pairs


def _by_kind(keys: Iterable[str]) -> list[str]:
    kinds: dict[str, set[str]] = {}
    for key in keys:
        kind = next((kind for pattern, kind in _OTHER_KINDS if pattern.fullmatch(key)), "of no pair")
        kinds.setdefault(kind, set()).add(re.sub(r"\.\d+\.", ".N.", key))
    return [f"tensors {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items()]


# -- what the configuration says -----------------------------------------------------------------------------------------


def _check(
    pairs: Mapping[str, _Halves], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], path: Path
) -> None:
    modules = {module for module in shapes if _targeted(module, config)} | pairs.keys() & shapes.keys()
    missing, wrong = [], []
    for module in sorted(modules):
        for side, shape in _wanted(module, shapes[module], pairs.get(module, {}), config, path).items():
            found = pairs.get(module, {}).get(side)
            if found is None:
                missing.append(f"{module}.lora_{side}")
            elif found.shape != shape:
                wrong.append(f"{module}.lora_{side} {list(found.shape)} instead of {list(shape)}")
    unknown = sorted(pairs.keys() - shapes.keys())
    complaints = [
        f"{len(keys)} {what}: {', '.join(keys)}"
        for what, keys in (("missing", missing), ("for modules that the base has not", unknown), ("of another shape", wrong))
        if keys
    ]
    if complaints:
        raise CheckpointError(
            f"{path} is no adapter of this language model; {'; '.join(complaints)}.",
            fix="Give the language model that it was trained on: --llm FOLDER.",
        )


def _wanted(
    module: str, base: tuple[int, ...], halves: _Halves, config: Mapping[str, Any], path: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of A and B: the rank is the configuration's, or, where there is none, what was found."""
    said = _setting("r", "rank_pattern", module, config, path)
    found = [halves[side].shape[axis] for side, axis in (("A", 0), ("B", -1)) if side in halves and halves[side].shape]
    rank = max(int(said) if said is not None else next(iter(found), 1), 1)
    return {"A": (rank, base[1]), "B": (base[0], rank)}


def _low_rank(module: str, halves: _Halves, config: Mapping[str, Any], alpha: float | None, path: Path) -> LowRank:
    if alpha is None:
        alpha = _setting("lora_alpha", "alpha_pattern", module, config, path)
    if alpha is None:
        raise CheckpointError(
            f"nothing in {path} says the alpha of its LoRA pairs.",
            fix="Give the one that it was trained with: --lora-alpha (TimeChat: 32).",
        )
    rank = halves["A"].shape[0]
    return LowRank(halves["A"], halves["B"], alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _setting(name: str, patterns: str, module: str, config: Mapping[str, Any], path: Path) -> float | None:
    """A number of one module: that of the first pattern that its name ends with, or the one for all (PEFT: `get_pattern_key`)."""
    value = config.get(name)
    try:
        for pattern, special in (config.get(patterns) or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                value = special
                break
        return None if value is None else float(value)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{path / _CONFIG}: {name} or {patterns} can't be understood ({error}).") from error


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration asks for a pair on this module (PEFT: `check_target_module_exists`)."""
    if _named(module, config.get("exclude_modules")):
        return False
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if layers is None or layers == []:
        return _named(module, targets)
    layer = re.match(r"model\.layers\.(\d+)\.", module)
    return layer is not None and int(layer[1]) in ([layers] if isinstance(layers, int) else layers) and _named(module, targets)


def _named(module: str, names: str | Iterable[str] | None) -> bool:
    """A text is a pattern of the whole name; of a list, each is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())
