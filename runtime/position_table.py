"""MA-LMM's table of frame positions, for checkpoints that have learned several rows: added to features before they are banked.

`blip2_vicuna_instruct.py : generate` adds row t of `image_pe` to every token of frame t, counted from the stream's start, and
then stores the frame: the position takes part in the similarity test, and merged slots hold a mixture of positions.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine import Tensor
from keepsight.runtime.manifest import Manifest, TableInfo
from keepsight.streams.errors import BundleError, UsageError

__all__ = ["PositionTable", "most_frames", "position_table"]

Float32 = NDArray[np.float32]


class PositionTable:
    """One row for each frame that a stream may have.

    Args:
        rows: float32 `[frames, C]`.
    """

    def __init__(self, rows: Float32) -> None:
        self.rows = rows

    def added(self, features: Tensor, frame: int) -> Float32:
        """Features float32 `[N, C]` of frame `frame`, counted from 0, with its position: on the host, of their own.

        Raises:
            UsageError: the stream is longer than the table. (The reference fails with an IndexError.)
        """
        if frame >= len(self.rows):
            raise UsageError(
                f"frame {frame} is beyond the bundle's table of positions, which was trained for {len(self.rows)} frames.",
                fix="Ask before (--when, --seconds), or export with a lower --sample-fps, so that the stream has fewer frames.",
            )
        return np.asarray(features, np.float32) + self.rows[frame]


def most_frames(manifest: Manifest) -> int:
    """The longest stream that a bundle can see: its table's, or any."""
    return manifest.positions.frames if isinstance(manifest.positions, TableInfo) else sys.maxsize


def position_table(bundle: Bundle) -> PositionTable | None:
    """A bundle's table; None for a bundle with another policy of positions, or with none.

    Raises:
        BundleError: the file can't be read, or is not as long as the manifest says.
    """
    info, channels = bundle.manifest.positions, bundle.manifest.dims.channels
    if not isinstance(info, TableInfo):
        return None
    path = bundle.path / info.file
    try:
        values = np.fromfile(path, "<f4")
    except OSError as error:
        raise BundleError(f"{path} can't be read ({error.strerror}).", fix="Export the bundle again.") from error
    if values.size != info.frames * channels:
        raise BundleError(
            f"{path} holds {values.size} numbers, not {info.frames} rows of {channels}.", fix="Export the bundle again."
        )
    return PositionTable(values.reshape(info.frames, channels).astype(np.float32, copy=False))
