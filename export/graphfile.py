"""An ONNX graph in memory as a file, with its weights in a second one where they are too large for the first."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["LARGEST_FILE", "save_graph"]

LARGEST_FILE = 2**31 - 2**24  # bytes of weights; protocol buffers end at 2 GiB, and nodes want room, too


def save_graph(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write a graph whose weights are loaded.

    Args:
        path: of the graph; large weights go to the same name with the ending `.weights`. Both are replaced.

    Returns:
        The files that were written.
    """
    weights = path.with_suffix(".weights")
    path.unlink(missing_ok=True)
    weights.unlink(missing_ok=True)  # onnx would append to it
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST_FILE:
        onnx.save(model, str(path))
        return [path]
    onnx.save(
        model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=weights.name, size_threshold=1024
    )
    return [path, weights]
