"""Tensors of a checkpoint on disk, by key, read one at a time and without running any of the checkpoint's code.

Safetensors hold no code. A torch file is a pickle: only `torch.load(weights_only=True)` reads it here, which refuses
whatever is more than tensors and plain containers.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepsight.streams.errors import CheckpointError

__all__ = ["StoredTensor", "TensorFiles", "open_tensors"]

# What save_pretrained and torch.save call a model's weights, best first.
_FOLDER_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shape, known without reading it, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class TensorFiles(Mapping[str, StoredTensor]):
    """A checkpoint's tensors by key.

    Attributes:
        path: what the user named, for messages.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path, self._tensors = path, tensors

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_tensors(path: Path) -> TensorFiles:
    """Open a `.safetensors` file, a torch file, or a folder as `save_pretrained` writes it (whole or in shards).

    A torch file may hold the tensors themselves or, as LAVIS saves them, have them under the key `model`.

    Raises:
        CheckpointError: nothing there, a damaged file, a shard that is missing, or a pickle that holds more than tensors.
    """
    if path.is_dir():
        return TensorFiles(path, _folder(path))
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}.", fix="Check the path.")
    return TensorFiles(path, _file(path))


def _folder(folder: Path) -> dict[str, StoredTensor]:
    for name in _FOLDER_NAMES:
        if (folder / name).exists():
            return _shards(folder / name) if name.endswith(".json") else _file(folder / name)
    raise CheckpointError(
        f"{folder} holds no weights: none of {', '.join(_FOLDER_NAMES)}.",
        fix="Name the folder that save_pretrained wrote, or a file.",
    )


def _shards(index: Path) -> dict[str, StoredTensor]:
    try:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error}).", fix="Fetch it again.") from error
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is not beside it.", fix="Fetch the shard too.")
        tensors |= _file(index.parent / shard)
    absent = sorted(names.keys() - tensors.keys())
    if absent:
        raise CheckpointError(f"{index} names {absent[0]}, which its shard does not hold.", fix="Fetch the shards again.")
    return tensors


def _file(path: Path) -> dict[str, StoredTensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: StoredTensor(tuple(file.get_slice(key).get_shape()), _reading(path, key)) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}).", fix="Fetch it again.") from error


def _reading(path: Path, key: str) -> Callable[[], Tensor]:
    """Opens the file anew for each tensor: what was mapped for one is given back with it."""

    def read() -> Tensor:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return read


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    content = _load(path)
    state = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no table of tensors, neither at its top nor under `model`.")
    return {key: StoredTensor(tuple(value.shape), lambda value=value: value) for key, value in state.items()}  # type: ignore[misc]


def _load(path: Path) -> Any:
    """The content of a torch file; mapped rather than read where its format allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols, which are read or refused like any other
            # Files from before torch 1.6 are no zip archives and can't be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise CheckpointError(f"{path} is not a readable torch file ({reason}).", fix="Fetch it again.") from error


def _refusal(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Torch puts its reason behind a page of advice that leads around the protection; only the reason is passed on."""
    said = str(error).rsplit("WeightsUnpickler error:", 1)[-1]
    if called := re.search(r"GLOBAL (\S+)", said):
        return CheckpointError(
            f"{path} holds more than tensors: it asks for {called[1]}, and reading it would run code.",
            fix="If you trust it, save its tensors alone, torch.save({'model': state_dict}, file), where it may run.",
        )
    reason = said.strip().splitlines()[0]
    return CheckpointError(f"{path} is not a readable torch file ({reason}).", fix="Fetch it again.")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
