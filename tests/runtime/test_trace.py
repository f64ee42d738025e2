"""A trace holds what each stage computed for each frame, as a slow recomputation finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from keepsight.runtime.bundle import Bundle
from keepsight.runtime.evaluation import trace
from keepsight.runtime.qformer import QFormer
from keepsight.streams import Frame, Source
from keepsight.streams.errors import EngineError, KeepsightError, NoFrameError, UsageError

from ..random_bundle import IMAGE_SIZE, make_bundle, random_frames
from .naive_memory import NaiveBank

LENGTH, COUNT = 3, 11
QUESTION = "what was there first?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("trace"), memory_length=LENGTH))


@pytest.fixture
def qformer(bundle):
    qformer = QFormer(bundle)
    yield qformer
    qformer.close()


@pytest.fixture
def frames() -> list[Frame]:
    images = random_frames(COUNT, hold=2)
    return [Frame(image, 0.25 * index + 1, 0.0, index) for index, image in enumerate(images)]


def test_the_arrays_have_the_stated_shapes_and_dtypes(qformer, frames):
    arrays = trace.record(qformer, frames, QUESTION)
    dims = qformer.dims
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "times": ("float64", (COUNT,)),
        "features": ("float32", (COUNT, dims.tokens, dims.channels)),
        "query_output": ("float32", (COUNT, dims.queries, dims.hidden)),
        "soft_prompt": ("float32", (COUNT, dims.queries, dims.n_embd)),
        "visual_merge": ("int32", (COUNT, dims.tokens)),
        "query_merge": ("int32", (COUNT, dims.banked_layers, len(qformer.prompt(QUESTION).state))),
        "text": (f"str{32 * len(QUESTION)}", ()),
        "visual_size": ("int32", (LENGTH + 1, dims.tokens)),
    }
    assert arrays["times"].tolist() == [frame.time_s for frame in frames]


def test_features_and_soft_prompts_are_those_of_the_stream_cut_at_that_frame(bundle, qformer, frames):
    arrays = trace.record(qformer, frames, QUESTION)
    for last in (0, LENGTH, LENGTH + 1, COUNT - 1):
        alone = QFormer(bundle)
        standing = alone.stand(alone.prompt(QUESTION))
        for frame in frames[: last + 1]:
            features = alone.encode(frame.image[None])[0]
            alone.remember(features, frame.time_s)
            standing.step(frame.time_s)
        said = standing.answer()  # asked once, at the end
        assert np.array_equal(arrays["features"][last], features)
        assert np.array_equal(arrays["query_output"][last], said.query_output)
        assert np.array_equal(arrays["soft_prompt"][last], said.rows)


@pytest.mark.parametrize("count", [1, LENGTH, LENGTH + 1, LENGTH + 2, COUNT])
def test_merges_stand_with_the_frame_that_they_followed(qformer, frames, count):
    arrays = trace.record(qformer, frames[:count], QUESTION)
    naive = NaiveBank(length=LENGTH, tokens=qformer.dims.tokens, groups=1, policy="mbc", current_outside=False)
    followed = np.full((count, qformer.dims.tokens), -1)
    for index, frame in enumerate(frames[:count]):
        seen = naive.see(arrays["features"][index][None], frame.time_s)
        if index:
            followed[index - 1] = naive.merged[0]  # it makes room for this frame, after the one before
    assert np.array_equal(arrays["visual_merge"], followed)
    assert (arrays["visual_merge"][-1] == -1).all()
    assert (arrays["visual_merge"][:LENGTH] == -1).all()
    assert (arrays["visual_merge"][LENGTH:-1] >= 0).all()
    sizes = np.array([[slot.size for slot in token] for token in seen[0]]).T
    assert np.array_equal(arrays["visual_size"], sizes)
    assert (arrays["visual_size"].sum(axis=0) == count).all()


def test_the_merges_rebuild_the_memory(qformer, frames):
    """What a board needs of the file: features and merges alone give every slot back."""
    arrays = trace.record(qformer, frames, QUESTION)
    for token in range(qformer.dims.tokens):
        slots: list[tuple[np.ndarray, int]] = []
        for features, merge in zip(arrays["features"], arrays["visual_merge"], strict=True):
            slots.append((features[token].astype(np.float64), 1))
            if merge[token] >= 0:
                (a, m), (b, n) = slots[merge[token] : merge[token] + 2]
                slots[merge[token] : merge[token] + 2] = [((m * a + n * b) / (m + n), m + n)]
        assert [size for _, size in slots] == arrays["visual_size"][:, token].tolist()
        held = qformer.bank.in_time_order()[0][0, :, token]
        assert np.abs(held - [row for row, _ in slots]).max() < 1e-5


def test_a_prompt_goes_to_the_tokenizer_as_it_is(bundle, frames):
    """The template of this bundle is the bare question, so that the two must agree where the texts do."""
    by_question, by_prompt, other = (
        trace.record(QFormer(bundle), frames[:2], question, prompt=prompt)["soft_prompt"]
        for question, prompt in ((QUESTION, None), ("", QUESTION), (QUESTION, "circle?"))
    )
    assert np.array_equal(by_question, by_prompt)
    assert not np.array_equal(by_question, other)


def test_an_array_file_is_traced_frame_by_frame(qformer, tmp_path):
    images = random_frames(6)
    np.save(tmp_path / "frames.npy", images)
    with Source(tmp_path / "frames.npy", size=(IMAGE_SIZE, IMAGE_SIZE)) as source:
        arrays = trace.record(qformer, source, QUESTION)
    assert arrays["times"].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(arrays["features"], np.concatenate([qformer.encode(image[None]) for image in images]))


def test_the_same_frames_give_the_same_file(bundle, frames, tmp_path):
    for name in ("a.npz", "b.npz"):
        trace.save(tmp_path / name, trace.record(QFormer(bundle), frames, QUESTION))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_what_cannot_be_traced_is_refused(bundle, frames):
    refused = [
        (QFormer(bundle, memory="fifo"), frames, QUESTION, None, UsageError, "mbc, not fifo"),
        (QFormer(bundle), [], QUESTION, None, NoFrameError, "no frames"),
        (QFormer(bundle), frames, "  ", None, UsageError, "empty"),
        (QFormer(bundle), frames, QUESTION, "", UsageError, "empty"),
        (QFormer(bundle), [Frame(frames[0].image[:8], 0, 0, 0)], QUESTION, None, EngineError, "'frames'"),
    ]
    for qformer, given, question, prompt, kind, says in refused:
        with pytest.raises(kind, match=says):
            trace.record(qformer, given, question, prompt=prompt)


def test_a_memory_that_has_seen_something_is_refused(qformer, frames):
    trace.record(qformer, frames[:1], QUESTION)
    with pytest.raises(UsageError, match="empty memory"):
        trace.record(qformer, frames[1:], QUESTION)


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_back_as_it_was_recorded_under_the_very_name_given(tmp_path):
    arrays = {"times": np.arange(3.0), "visual_merge": np.full((3, 2), -1, np.int32)}
    trace.save(tmp_path / "golden", arrays)  # numpy alone would add .npz
    with np.load(tmp_path / "golden", allow_pickle=False) as saved:
        assert sorted(saved) == sorted(arrays)
        assert all(np.array_equal(saved[name], array) for name, array in arrays.items())
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    trace.save(tmp_path / "golden.npz", {"times": np.zeros(2)})
    before = (tmp_path / "golden.npz").read_bytes()

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(KeepsightError, match="No space left"):
        trace.save(tmp_path / "golden.npz", {"times": np.ones(2)})
    assert (tmp_path / "golden.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["golden.npz"]


@pytest.mark.parametrize("place", ["nowhere/golden.npz", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=Path(place).name):
        trace.save(tmp_path / place, {"times": np.zeros(2)})
