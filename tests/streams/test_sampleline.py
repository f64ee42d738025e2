"""Where each sample of a chunked sound lands, against a plain reference that places one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest

from keepsight.streams import UsageError
from keepsight.streams.sampleline import TOLERANCE_S, SampleLine

RATE = 1000  # so that a sample is a millisecond


def one_by_one(chunks: list[tuple[float, int, bool]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample for sample as the docstring of SampleLine has it; the samples are numbered from 1."""
    samples, heard = np.zeros(count, np.float32), np.zeros(count, bool)
    end, following, number = None, 0, 0
    for time_s, length, restart in chunks:
        place = round(time_s * RATE)
        if end is not None and abs(place - following) <= (0 if restart else TOLERANCE_S * RATE):
            place = following
        for offset in range(length):
            number += 1
            taken = end is not None and place + offset < end
            if 0 <= place + offset < count and not taken:
                samples[place + offset], heard[place + offset] = number, True
        following = place + length
        end = place + length if end is None else max(end, place + length)
    return samples, heard


def numbered(chunks: list[tuple[float, int, bool]]) -> SampleLine:
    line, number = SampleLine(RATE), 1
    for time_s, length, restart in chunks:
        line.add(np.arange(number, number + length, dtype=np.float32), time_s, restart=restart)
        number += length
    return line


CHUNKS = [
    # (time, samples, restart) of each chunk; silence put in, samples cut
    ([(0.0, 20, False), (0.020, 20, False)], 0, 0),
    ([(0.0, 20, False), (0.024, 20, False)], 0, 0),  # rounded time stamps: no crack
    ([(0.0, 20, False), (0.024, 20, True)], 4, 0),  # the same, but said to be lost
    ([(0.0, 20, False), (0.030, 20, False)], 10, 0),  # one lost packet of 10 ms
    ([(0.0, 20, False), (0.010, 20, False)], 0, 10),  # overlapping
    ([(0.0, 20, False), (0.005, 10, False), (0.020, 20, False)], 0, 15),  # all of it heard already
    ([(0.0, 40, False), (0.010, 28, False), (0.038, 20, False)], 0, 30),  # what goes on there is no crack, either
    ([(0.7, 20, False)], 0, 0),  # a late start is not a gap
    ([(-0.005, 20, False)], 0, 5),  # before the beginning
    ([(0.0, 20, False), (0.2, 20, True), (0.1, 30, False), (0.22, 5, False)], 180, 30),
]


@pytest.mark.parametrize(("chunks", "silence", "cut"), CHUNKS)
def test_chunks_land_where_their_times_say(chunks: list[tuple[float, int, bool]], silence: int, cut: int) -> None:
    line = numbered(chunks)
    for got, wanted in zip(line.read(0, 800), one_by_one(chunks, 800), strict=True):
        assert np.array_equal(got, wanted)
    assert (line.silence, line.cut) == (silence, cut)


def test_random_chunks_land_as_one_sample_at_a_time_would() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        time_s, chunks = float(rng.uniform(-0.02, 0.05)), []
        for length in rng.integers(1, 40, 20):
            chunks.append((time_s, int(length), bool(rng.integers(2))))
            time_s += length / RATE + float(rng.choice([0, 0, 0.003, -0.003, 0.02, -0.02]))
        for got, wanted in zip(numbered(chunks).read(0, 1200), one_by_one(chunks, 1200), strict=True):
            assert np.array_equal(got, wanted)


@pytest.mark.parametrize("drift", [1.001, 0.999])
def test_drift_never_grows_beyond_the_tolerance(drift: float) -> None:
    # a microphone whose clock goes a thousandth wrong: its stamps and its count part by 60 ms a minute
    line = SampleLine(16000)
    for index in range(6000):
        line.add(np.full(160, index, np.float32), index * 0.010 * drift)
        if index % 500 == 499:
            end_s = (index * drift + 1) * 0.010
            assert abs((line.end or 0) / 16000 - end_s) <= TOLERANCE_S + 1e-4
            begin = round(index * 0.010 * drift * 16000)
            place = int(np.flatnonzero(line.read(begin - 160, 480)[0] == index)[0]) + begin - 160
            assert abs(place - begin) <= TOLERANCE_S * 16000 + 1
        line.forget((line.end or 0) - 4000)
    corrected = line.silence if drift > 1 else line.cut
    assert corrected / 16000 == pytest.approx(0.060, abs=TOLERANCE_S)


def test_what_is_forgotten_is_gone_and_what_follows_stays() -> None:
    line = numbered([(index * 0.01, 10, False) for index in range(100)])
    line.forget(500)
    samples, heard = line.read(490, 20)
    assert not heard[:10].any() and samples[10:].tolist() == list(range(501, 511))
    assert len(line._chunks) == 50


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="0 samples/s"):
        SampleLine(0)
