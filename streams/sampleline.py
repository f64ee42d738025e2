"""Sound on a line of time: every sample at its place, silence where there is none."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from keepsight.streams.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TOLERANCE_S", "SampleLine"]

TOLERANCE_S = 0.005
"""How far sound may drift from its time stamps before it is put right: more than containers round (1 ms), less than the shortest
packet that can be lost (10 ms of Opus in practice)."""


class SampleLine:
    """Chunks of mono sound, put together by their times.

    Sample `i` of the line is the sound at `i / rate` seconds. A chunk that begins within `TOLERANCE_S` of the end of the one
    before it goes on there, so that rounded time stamps make no cracks; any other begins where its time says: a gap is silence,
    and what overlaps is cut off the newer chunk. So no sample ever lies further than the tolerance from its time, however long
    the stream.

    Args:
        rate: samples per second.

    >>> line = SampleLine(10)
    >>> line.add(np.ones(3, np.float32), 0.2)
    >>> line.add(np.ones(1, np.float32), 0.7)
    >>> line.read(0, 9)[0].tolist()
    [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    """

    def __init__(self, rate: int) -> None:
        if rate < 1:
            raise UsageError(f"a rate of {rate} samples/s makes no sense.", fix="Give 16000, for instance.")
        self.rate = rate
        self.end: int | None = None  # one behind the last sample; None before the first
        self.silence = 0  # samples put in, between the first and the last
        self.cut = 0  # samples taken out
        self._next = 0  # where the next chunk is expected: behind the last one, cut or not
        self._chunks: deque[tuple[int, NDArray[np.float32]]] = deque()

    def add(self, samples: NDArray[np.float32], time_s: float, *, restart: bool = False) -> None:
        """Append a chunk.

        Args:
            samples: float32 `[n]`.
            time_s: of its first sample. Samples before 0 are cut off.
            restart: the stream says that this does not go on from what was before it: the time is taken to the sample.
        """
        begin = round(time_s * self.rate)
        if self.end is not None:
            slack = 0 if restart else round(TOLERANCE_S * self.rate)
            if abs(begin - self._next) <= slack:
                begin = self._next
            self.silence += max(0, begin - self.end)
        self._next = begin + len(samples)
        earliest = max(0, begin if self.end is None else self.end)
        overlap = min(len(samples), max(0, earliest - begin))
        self.cut += overlap
        if overlap < len(samples):
            self._chunks.append((begin + overlap, samples[overlap:]))
            self.end = begin + len(samples)

    def read(self, begin: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Samples `begin` to `begin + count`: float32 `[count]`, and bool `[count]`, false where there was no sound."""
        samples, heard = np.zeros(count, np.float32), np.zeros(count, np.bool_)
        for start, chunk in self._chunks:
            first, last = max(begin, start), min(begin + count, start + len(chunk))
            if first < last:
                samples[first - begin : last - begin] = chunk[first - start : last - start]
                heard[first - begin : last - begin] = True
        return samples, heard

    def forget(self, before: int) -> None:
        """Let go of the chunks that end before this sample."""
        while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= before:
            self._chunks.popleft()
