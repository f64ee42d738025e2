"""The Q-Former's weights inside a bundle: one file that its graphs share, with an index by parameter name.

The index lets PyTorch load exactly what the deployed graphs hold, so that the two can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keepsight.export.onnxfile import share_weights
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.streams.errors import BundleError

WEIGHTS = "qformer.weights"
INDEX = "qformer.json"


def store_weights(qformer: QFormer, folder: Path, graphs: list[str]) -> None:
    """Move the graphs' weights to `qformer.weights` and write `qformer.json`: dimensions, and where each parameter lies.

    A parameter that no graph holds in one piece (biases, tables that are cut by layer) is appended to the file.
    """
    shared = share_weights(folder, graphs, WEIGHTS)
    blob = bytearray((folder / WEIGHTS).read_bytes())
    parameters: dict[str, object] = {}
    for name, parameter in qformer.state_dict().items():
        values = parameter.detach().numpy()
        parameters[name] = _place(values, shared) or _append(values, blob)
    (folder / WEIGHTS).write_bytes(blob)
    content = {"config": vars(qformer.config), "parameters": parameters}
    (folder / INDEX).write_text(json.dumps(content, sort_keys=True) + "\n")


def _place(values: NDArray[np.float32], shared: dict[str, tuple[int, str, tuple[int, ...]]]) -> dict[str, object] | None:
    """Where a parameter's bytes stand, as they are or transposed, in single or half precision; None if nowhere."""
    for turned in (False, True) if values.ndim == 2 else (False,):
        rows = np.ascontiguousarray(values.T if turned else values)
        for stored in (_half(rows), rows):
            found = shared.get(hashlib.sha256(stored.tobytes()).hexdigest())
            if found is not None and found[1] == stored.dtype.name:
                return {"offset": found[0], "dtype": found[1], "shape": list(stored.shape), "transposed": turned}
    return None


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded; what float16 can't hold becomes infinite, and equals nothing that is stored."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _append(values: NDArray[np.float32], blob: bytearray) -> dict[str, object]:
    half = _half(values)
    stored = half if (half.astype(np.float32) == values).all() else values
    blob += bytes(-len(blob) % 4)
    place = {"offset": len(blob), "dtype": stored.dtype.name, "shape": list(values.shape), "transposed": False}
    blob += stored.tobytes()
    return place


def load_qformer(folder: Path) -> QFormer:
    """The Q-Former of a bundle as a torch module, with the very numbers that the graphs hold.

    Raises:
        BundleError: the bundle carries no index of its weights.
    """
    path = folder / INDEX
    if not path.exists():
        raise BundleError(f"{path} does not exist.", fix="Export the bundle again.")
    content = json.loads(path.read_text())
    blob = (folder / WEIGHTS).read_bytes()
    qformer = QFormer(QFormerConfig(**content["config"]))
    state = {name: torch.from_numpy(_read(entry, blob)) for name, entry in content["parameters"].items()}
    qformer.load_state_dict(state)
    return qformer.eval()


def _read(entry: dict[str, Any], blob: bytes) -> NDArray[np.float32]:
    shape: tuple[int, ...] = tuple(entry["shape"])
    values = np.frombuffer(blob, entry["dtype"], math.prod(shape), entry["offset"])
    rows = values.reshape(shape).astype(np.float32)
    return np.ascontiguousarray(rows.T if entry["transposed"] else rows)
