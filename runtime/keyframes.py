"""Key frames: a bounded store of small pictures of what was seen, to show as evidence."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.runtime.timeline import Interval
from keepsight.streams.errors import MissingComponentError, UsageError

__all__ = ["KeyFrame", "KeyFrames", "encode_jpeg", "write_key_frames"]

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KeyFrame:
    """A picture that was kept.

    Attributes:
        time_s: its moment, in seconds of the stream.
        jpeg: the file's bytes.
    """

    time_s: float
    jpeg: bytes

    def __repr__(self) -> str:
        return f"KeyFrame({self.time_s:.3f} s, {len(self.jpeg)} bytes)"


class KeyFrames:
    """At most `limit` pictures of at most `budget_bytes` together, whatever the length of the stream.

    A frame is taken when `every_s` have passed since the last one that was taken. When there are too many, the one goes whose
    loss shows least: of the two neighbours in time that are most alike, the older, for which the younger can stand. How much two
    frames are alike is the cosine of their features' means over all visual tokens. So a scene that lasts is thinned out from its
    past on, a scene that came once stays as long as others are more alike, and the newest frame always stays. Of pairs that are
    equally alike the oldest goes first.

    Args:
        limit: how many pictures at most.
        budget_bytes: of JPEG, at most. A single picture that is larger is not kept.
        every_s: seconds of the stream between two that are taken.
        quality: of the JPEG, 1 to 95.

    Raises:
        UsageError: a limit, budget, spacing or quality that makes no sense.
    """

    def __init__(self, *, limit: int = 64, budget_bytes: int = 2 << 20, every_s: float = 0.5, quality: int = 80) -> None:
        if limit < 1 or budget_bytes < 1 or not every_s >= 0 or not 1 <= quality <= 95:
            raise UsageError(
                f"key frames can't be {limit} of {budget_bytes} bytes every {every_s:g} s at quality {quality}.",
                fix="Give numbers above 0, and a quality of 1 to 95.",
            )
        self.limit, self.budget_bytes, self.every_s, self.quality = limit, budget_bytes, every_s, quality
        self._frames: list[KeyFrame] = []
        self._pooled: list[Float32] = []  # of length 1
        self._alike: list[float] = []  # each with the one after it
        self._taken_s = -math.inf

    def __len__(self) -> int:
        return len(self._frames)

    def __repr__(self) -> str:
        return f"KeyFrames({len(self)} of {self.limit}, {self.nbytes} of {self.budget_bytes} bytes)"

    @property
    def frames(self) -> Sequence[KeyFrame]:
        """What is kept, oldest first."""
        return tuple(self._frames)

    @property
    def nbytes(self) -> int:
        """Bytes of JPEG that are kept."""
        return sum(len(frame.jpeg) for frame in self._frames)

    def wants(self, time_s: float) -> bool:
        """Whether a frame at this moment is to be taken. Cheap: ask before features are fetched from a device."""
        return time_s - self._taken_s >= self.every_s

    def take(self, image: NDArray[np.uint8], features: Float32, time_s: float) -> None:
        """Take a frame, and drop what there is too much of.

        Args:
            image: uint8 `[H, W, 3]`, RGB.
            features: `[N, C]`, the frame's visual features.
            time_s: later than all before.

        Raises:
            UsageError: a time before the newest.
            MissingComponentError: Pillow is not installed.
        """
        if self._frames and time_s < self._frames[-1].time_s:
            raise UsageError(f"key frames went back from {self._frames[-1].time_s:.3f} s to {time_s:.3f} s.")
        self._taken_s = time_s
        pooled = features.mean(axis=0, dtype=np.float32)
        pooled /= max(float(np.linalg.norm(pooled)), 1e-8)
        if self._frames:
            self._alike.append(float(self._pooled[-1] @ pooled))
        self._frames.append(KeyFrame(time_s, encode_jpeg(image, self.quality)))
        self._pooled.append(pooled)
        while len(self._frames) > self.limit or self.nbytes > self.budget_bytes:
            self._drop()

    def within(self, interval: Interval) -> list[KeyFrame]:
        """Those of an interval, oldest first."""
        return [frame for frame in self._frames if interval.holds(frame.time_s)]

    def reset(self) -> None:
        """Forget everything."""
        self._frames, self._pooled, self._alike, self._taken_s = [], [], [], -math.inf

    def state(self) -> dict[str, NDArray[Any]]:
        """What is kept, to be saved: times float64 `[n]`, jpeg uint8 `[bytes]`, ends int64 `[n]`, pooled float32 `[n, C]`."""
        blobs = [np.frombuffer(frame.jpeg, np.uint8) for frame in self._frames]
        return {
            "times": np.array([frame.time_s for frame in self._frames], np.float64),
            "jpeg": np.concatenate(blobs) if blobs else np.zeros(0, np.uint8),
            "ends": np.cumsum([len(blob) for blob in blobs], dtype=np.int64),
            "pooled": np.stack(self._pooled) if self._pooled else np.zeros((0, 0), np.float32),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over what was saved; a smaller limit or budget than it was saved under drops at once.

        Raises:
            UsageError: not the state of a store of key frames.
        """
        times, ends, pooled = (np.asarray(state[name]) for name in ("times", "ends", "pooled"))
        blob = np.asarray(state["jpeg"], np.uint8).tobytes()
        starts = [0, *ends.tolist()]
        if not len(times) == len(ends) == len(pooled) or starts[-1] != len(blob) or starts != sorted(starts):
            raise UsageError(f"{len(times)} times and {len(ends)} pictures of {len(blob)} bytes are no key frames.")
        self._frames = [KeyFrame(float(at), blob[starts[k] : starts[k + 1]]) for k, at in enumerate(times)]
        self._pooled = [row.astype(np.float32) for row in pooled]
        self._alike = [float(a @ b) for a, b in zip(self._pooled, self._pooled[1:], strict=False)]
        self._taken_s = self._frames[-1].time_s if self._frames else -math.inf
        while len(self._frames) > self.limit or self.nbytes > self.budget_bytes:
            self._drop()

    def _drop(self) -> None:
        older = int(np.argmax(self._alike)) if self._alike else 0
        del self._frames[older], self._pooled[older], self._alike[older : older + 1]
        if 0 < older < len(self._frames):
            self._alike[older - 1] = float(self._pooled[older - 1] @ self._pooled[older])


def write_key_frames(frames: Sequence[KeyFrame], folder: Path) -> list[Path]:
    """Write each to `folder/<seconds of the stream>.jpg`, made if it is not there; returns the files in the same order.

    Raises:
        UsageError: the folder can't be made or written to.
    """
    paths = [folder / f"{frame.time_s:010.3f}s.jpg" for frame in frames]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for frame, path in zip(frames, paths, strict=True):
            path.write_bytes(frame.jpeg)
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror}.", fix="Name a folder of yours.") from error
    return paths


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """A picture uint8 `[H, W, 3]` as JPEG.

    Raises:
        MissingComponentError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingComponentError(f"Pillow can't be used: {error}.", fix="Install it with `pip install pillow`.") from error
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=quality)
    return out.getvalue()
