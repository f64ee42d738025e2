"""Every exported graph computes what its torch module does; training form and stored weights agree with them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from keepsight.export import dense
from keepsight.export.bundlewriter import unfold_basis
from keepsight.export.efficientnet import CHANNELS as FULL_WIDTH
from keepsight.export.graphs import GRAPHS, Answer, Replay, Step, example_inputs, export_qformer
from keepsight.export.onnxfile import HALF_MIN_ELEMENTS, round_to_half
from keepsight.export.qformer import QFormer, QFormerConfig
from keepsight.export.streamset import Basis
from keepsight.export.weights import WEIGHTS, load_qformer, store_weights
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.engine import OnnxRuntimeEngine
from keepsight.runtime.memory import MemoryBank
from keepsight.runtime.positions import OrderPositions, ranks, step_mask
from keepsight.streams.errors import BundleError

from ..random_bundle import CHANNELS, TOKENS, PatchVision, make_bundle, random_frames, random_qformer
from .naive_malmm import replay as naive_replay

LENGTH = 4
SLOTS = LENGTH + 1
CLOSE = 1e-4  # float32 sums in another order, through up to four layers


@pytest.fixture(scope="module", params=[4, 3], ids=["last layer without cross-attention", "with"])
def bundle(request, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("graphs")
    return Bundle.open(make_bundle(folder, layers=request.param, memory_length=LENGTH, seed=request.param))


@pytest.fixture(scope="module")
def qformer(bundle) -> QFormer:
    return load_qformer(bundle.path)


def random_inputs(qformer: QFormer, graph: str, text: int, *, used: int = SLOTS) -> dict[str, np.ndarray]:
    """Inputs of the right shapes: some text padding, some hidden slots and rows, buckets over the whole table."""
    rng = np.random.default_rng(text)
    config = qformer.config
    rank = rng.permuted(np.arange(SLOTS)[:, None].repeat(TOKENS, 1), axis=0).astype(np.int32)
    rank[rank < SLOTS - used] = -1
    buckets = 1 + config.slots * config.time_buckets
    made = {}
    for name, example in example_inputs(qformer, slots=SLOTS, tokens=TOKENS, text=text)[graph].items():
        shape = tuple(example.shape)
        match name:
            case "text_ids":
                made[name] = rng.integers(0, config.vocab, shape)
            case "text_mask":
                made[name] = (np.arange(text) < max(1, text - 3)).astype(np.float32)
            case "rank":
                made[name] = rank
            case "step_mask":
                made[name] = step_mask(rank)
            case "bucket":
                made[name] = rng.integers(0, buckets, shape).astype(np.int32)
            case "visual_mask" | "self_mask" | "bank_mask":
                made[name] = (rng.random(shape) < 0.7).astype(np.float32)
            case _:
                made[name] = rng.standard_normal(shape).astype(np.float32)
    return made


@pytest.mark.parametrize("text", [16, 32, 64, 5])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_equals_its_torch_module_at_any_text_length(bundle, qformer, graph, text):
    feeds = random_inputs(qformer, graph, text)
    module, names = GRAPHS[graph]
    with torch.no_grad():
        outputs = module(qformer)(*(torch.from_numpy(value) for value in feeds.values()))
    expected = dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    got = OnnxRuntimeEngine(bundle.graph_path(graph)).run(feeds)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.dtype == np.float32
        assert np.abs(value - expected[name].numpy()).max() < CLOSE, name


@pytest.mark.parametrize("used", range(1, SLOTS + 1))
def test_replay_reads_a_bank_that_is_not_full(bundle, qformer, used):
    """Slots out of use may hold anything finite: the same output whatever they hold."""
    feeds = random_inputs(qformer, "replay", 16, used=used)
    engine = OnnxRuntimeEngine(bundle.graph_path("replay"))
    expected = engine.run(feeds)
    unused = (feeds["rank"] < 0)[None, :, :, None]
    other = {name: np.where(unused, 50 - feeds[name], feeds[name]) for name in ("cross_k", "cross_v")}
    got = engine.run({**feeds, **other})
    assert all(np.array_equal(got[name], value) for name, value in expected.items())


def test_the_vision_graph_takes_any_number_of_frames(bundle):
    torch.manual_seed(bundle.manifest.provenance["seed"])  # as make_bundle did, and made the encoder first
    vision = PatchVision()
    engine = OnnxRuntimeEngine(bundle.graph_path("vision"))
    for count in (1, 3):
        frames = random_frames(count)
        with torch.no_grad():
            expected = vision(torch.from_numpy(frames)).numpy()
        assert np.abs(engine.run({"frames": frames})["features"] - expected).max() < CLOSE


def test_every_graph_has_the_inputs_of_the_contract_and_opset_17(bundle, qformer):
    examples = example_inputs(qformer, slots=SLOTS, tokens=TOKENS, text=16)
    numbers = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32}
    for graph in bundle.manifest.graphs:
        model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
        if graph in ("vision", "memory"):  # made otherwise, and tested where they are made
            continue
        engine = OnnxRuntimeEngine(bundle.graph_path(graph))
        assert list(engine.inputs) == list(examples[graph])
        assert tuple(engine.outputs) == GRAPHS[graph][1]
        for name, example in examples[graph].items():
            assert engine.inputs[name].dtype == numbers[example.dtype]
            assert engine.inputs[name].fits(example.numpy())
    last_reads = bundle.manifest.dims.layers - 1 in bundle.manifest.dims.cross_layers
    assert ("cross_k" in examples["answer"]) == last_reads


def test_the_attention_of_a_replay_equals_the_plain_loop_at_real_widths():
    """InstructBLIP's: 257 tokens of 1408, rows of 768 in 12 heads, 32 queries; three layers; one slot of each token hidden."""
    torch.manual_seed(2)
    slots, tokens, rng = 3, 257, np.random.default_rng(2)
    config = QFormerConfig(
        hidden=768, layers=3, heads=12, ffn=3072, channels=1408, queries=32, vocab=40, max_text=16, n_embd=64, slots=slots,
        time_buckets=4,
    )  # fmt: skip
    qformer = QFormer(config).eval()
    bank = MemoryBank(length=slots - 1, tokens=tokens, channels=1408)
    for time_s in (0.5, 1.0, 2.5, 3.0, 4.5):
        bank.append(rng.standard_normal((tokens, 1408)), time_s=time_s)
    oldest = bank.order[0][:1]
    visible = bank.visible[0].copy()
    np.put_along_axis(visible, oldest, False, axis=0)
    rank, ids = ranks(bank, visible), np.array([1, 7, 9, 2])
    with torch.no_grad():
        cross_k, cross_v = qformer.cross_kv(torch.from_numpy(bank.features[0]))
        mask = torch.ones(len(ids))
        state = qformer.prompt_state(torch.from_numpy(ids), mask)
        bucket = OrderPositions(slots, 4).replay(bank, visible)
        feeds = (torch.from_numpy(value) for value in (rank, bucket, step_mask(rank)))
        output, _, attention = Replay(qformer)(state, cross_k, cross_v, *feeds, mask)
    order = bank.order[0][1:]
    shown, first_s, last_s = (
        np.take_along_axis(values[0], order[..., None] if values.ndim == 4 else order, axis=0)
        for values in (bank.features, bank.first_s, bank.last_s)
    )
    plain = naive_replay(qformer, ids, shown, first_s, last_s)
    assert (output - plain.query_output).abs().max() < CLOSE
    by_slot = np.zeros(attention.shape)
    np.put_along_axis(by_slot, np.broadcast_to(order, plain.attention.shape), plain.attention.numpy(), axis=1)
    assert np.abs(attention.numpy() - by_slot).max() < 1e-6
    assert by_slot.max() > 3 / (2 * tokens)  # it is not flat
    assert attention.sum((1, 2)).numpy() == pytest.approx(1, abs=1e-5)
    assert (attention.numpy()[:, rank < 0] == 0).all()


# -- the form that trains ------------------------------------------------------------------------------------------


def remembered(frames: int, seed: int) -> MemoryBank:
    """A visual bank that has seen a stream of scenes, at uneven times."""
    rng = np.random.default_rng(seed)
    bank = MemoryBank(length=LENGTH, tokens=TOKENS, channels=CHANNELS)
    scenes = rng.standard_normal((frames, TOKENS, CHANNELS))
    for time_s in np.cumsum(rng.uniform(0.1, 1, frames)):
        bank.append(scenes[rng.integers(frames)] + 0.3 * rng.standard_normal((TOKENS, CHANNELS)), time_s=time_s)
    return bank


def two_questions(qformer: QFormer, streams: int, text: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and masks `[B, 2, L]` of questions of different lengths."""
    ids = torch.randint(0, qformer.config.vocab, (streams, 2, text), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(text) < torch.tensor([[7], [12]])).to(torch.float32)
    return ids, mask.expand(streams, 2, text).contiguous()


def test_the_training_form_of_replay_equals_the_graph(bundle, qformer):
    banks = [remembered(frames, seed) for seed, frames in enumerate((1, 3, LENGTH + 1, 4 * LENGTH))]
    policy = OrderPositions(SLOTS, qformer.config.time_buckets)
    rank, bucket = (np.array([read(bank) for bank in banks]) for read in (ranks, policy.replay))
    steps = np.array([step_mask(one) for one in rank])
    now = np.arange(SLOTS)[:, None, None]
    ids, mask = two_questions(qformer, len(banks))
    with torch.no_grad():
        got = dense.replay(
            qformer,
            ids,
            mask,
            dense.Banks(
                features=torch.from_numpy(np.array([bank.features for bank in banks])),
                visible=torch.from_numpy((rank[:, None] >= 0) & (rank[:, None] <= now)),
                bucket=torch.from_numpy(bucket.astype(np.int64)),
                steps=torch.from_numpy(steps > 0),
            ),
        ).numpy()
    engines = {name: OnnxRuntimeEngine(bundle.graph_path(name)) for name in ("visual_kv", "prompt", "replay")}
    for b, bank in enumerate(banks):
        keys = [engines["visual_kv"].run({"features": slot}) for slot in bank.features[0]]
        cross = {name: np.stack([slot[name] for slot in keys], axis=1) for name in ("cross_k", "cross_v")}
        for n in range(2):
            text_mask = mask[b, n].numpy()
            state = engines["prompt"].run({"text_ids": ids[b, n].numpy(), "text_mask": text_mask})
            feeds = {"rank": rank[b], "bucket": bucket[b], "step_mask": steps[b], "text_mask": text_mask}
            expected = engines["replay"].run({**state, **cross, **feeds})["query_output"]
            assert np.abs(got[b, n] - expected).max() < CLOSE


def test_the_training_form_with_one_step_is_a_reading_without_query_bank(qformer):
    bank = remembered(3 * LENGTH, 5)
    bucket = OrderPositions(SLOTS, qformer.config.time_buckets).step(bank)
    ids, mask = two_questions(qformer, 1)
    features, visible = torch.from_numpy(bank.features), torch.from_numpy(bank.visible)
    config, rows = qformer.config, qformer.config.queries + ids.shape[-1]
    banked = torch.zeros(config.layers - 1, SLOTS, rows, config.hidden)
    with torch.no_grad():
        places = torch.from_numpy(bucket)
        one = torch.ones(1, 1, dtype=torch.bool)
        got = dense.replay(qformer, ids, mask, dense.Banks(features[:, None], visible[:, None], places.long()[None, None], one))
        cross_k, cross_v = qformer.cross_kv(features[0])
        seen = visible[0].to(torch.float32)
        for n in range(2):
            state = qformer.prompt_state(ids[0, n], mask[0, n])
            hidden = torch.zeros(config.layers - 1, SLOTS, rows)
            x, k, v = Step(qformer)(state, cross_k, cross_v, seen, places, banked, banked, hidden, mask[0, n])
            visual = (cross_k[-1], cross_v[-1], seen, places) if config.layers - 1 in config.cross_layers else ()
            output, _ = Answer(qformer)(x[-1], k[-1], v[-1], banked[-1], banked[-1], hidden[-1], mask[0, n], *visual)
            assert (got[0, n] - output).abs().max() < CLOSE


def test_a_q_former_of_projected_features_unfolds_to_full_width_exactly():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((FULL_WIDTH, 32)))[0].astype(np.float32)
    mean, scale = rng.standard_normal(FULL_WIDTH).astype(np.float32), rng.uniform(0.5, 20, 32).astype(np.float32)
    basis = Basis(mean=mean, directions=directions, scale=scale)
    narrow = random_qformer(channels=32)
    full = unfold_basis(narrow, basis).double()
    spread = rng.standard_normal((50, 32)) / scale @ directions.T  # of unit variance once projected and scaled
    features = torch.from_numpy(mean + spread + 0.1 * rng.standard_normal((50, FULL_WIDTH)))
    projected = (features - torch.from_numpy(mean)) @ torch.from_numpy(directions * scale).double()
    with torch.no_grad():
        for got, expected in zip(full.cross_kv(features), narrow.double().cross_kv(projected), strict=True):
            assert expected.std() > 1
            assert (got - expected).abs().max() < CLOSE  # the absorbed weights are rounded to float32
    assert full.config == replace(narrow.config, channels=FULL_WIDTH)
    for name, value in narrow.state_dict().items():
        if ".cross.key." not in name and ".cross.value." not in name:
            assert torch.equal(full.state_dict()[name], value)


# -- weights on disk -----------------------------------------------------------------------------------------------


def test_torch_loads_from_a_bundle_exactly_what_was_exported(tmp_path):
    exported = random_qformer()
    round_to_half(exported)
    graphs = export_qformer(exported, tmp_path, slots=SLOTS, tokens=TOKENS, text=16, half_storage=True)
    store_weights(exported, tmp_path, graphs)
    loaded = load_qformer(tmp_path)
    assert loaded.config == exported.config
    state = exported.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert any(value.numel() >= HALF_MIN_ELEMENTS for value in state.values())


def test_a_bundle_without_its_index_says_so(tmp_path):
    with pytest.raises(BundleError, match=r"qformer\.json does not exist"):
        load_qformer(tmp_path)


def external_weights(bundle: Bundle) -> dict[tuple[str, str], tuple[int, int, bytes]]:
    """(graph, weight) -> offset, length and bytes of all that lies in the shared file."""
    blob = (bundle.path / WEIGHTS).read_bytes()
    found = {}
    for graph in GRAPHS:
        for tensor in onnx.load(str(bundle.graph_path(graph)), load_external_data=False).graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                assert numpy_helper.to_array(tensor).size < HALF_MIN_ELEMENTS  # the large ones are shared, all of them
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == WEIGHTS
            offset, length = int(place["offset"]), int(place["length"])
            found[graph, tensor.name] = offset, length, blob[offset : offset + length]
    return found


def test_weights_that_graphs_share_stand_once(bundle, qformer):
    weights = external_weights(bundle)
    offset_of: dict[bytes, int] = {}
    for offset, _, content in weights.values():
        assert offset_of.setdefault(content, offset) == offset
    pieces = sorted({(offset, length) for offset, length, _ in weights.values()})
    assert all(offset + length <= following for (offset, length), (following, _) in pairwise(pieces))
    assert len(weights) > 1.5 * len(pieces)  # step, replay and answer have most of them in common
    counts = [value.numel() for value in qformer.state_dict().values()]
    once = sum(count * (2 if count >= HALF_MIN_ELEMENTS else 4) for count in counts)
    tables = 2 * (qformer.position_key.numel() + qformer.position_value.numel())  # these also stand cut by layer
    padding = 64 * (len(pieces) + len(counts))
    assert (bundle.path / WEIGHTS).stat().st_size <= once + tables + padding


def test_the_same_weights_give_the_same_bytes(tmp_path):
    first, second = (make_bundle(tmp_path / name, seed=2, layers=3) for name in ("first", "second"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_the_training_form_of_a_standing_question_is_a_chain_of_steps(qformer):
    """Three moments of one stream; fewer than the query bank holds, so that nothing is merged."""
    moments = [remembered(frames, 8) for frames in (2, LENGTH + 2, 3 * LENGTH)]
    buckets = [OrderPositions(SLOTS, qformer.config.time_buckets).step(bank) for bank in moments]
    ids, mask = two_questions(qformer, 1)
    config, rows = qformer.config, qformer.config.queries + ids.shape[-1]
    visible, places = torch.from_numpy(np.array([bank.visible[0] for bank in moments])), torch.from_numpy(np.array(buckets))
    features = torch.from_numpy(np.array([bank.features[0] for bank in moments]))
    with torch.no_grad():
        every = torch.ones(1, 3, dtype=torch.bool)
        got = dense.replay(qformer, ids, mask, dense.Banks(features[None], visible[None], places.long()[None], every))
        for n in range(2):
            state = qformer.prompt_state(ids[0, n], mask[0, n])
            keys, values = (torch.zeros(config.layers - 1, SLOTS, rows, config.hidden) for _ in range(2))
            hidden = torch.zeros(config.layers - 1, SLOTS, rows)
            for moment, slot_features in enumerate(features):
                cross_k, cross_v = qformer.cross_kv(slot_features)
                seen = visible[moment].to(torch.float32)
                earlier = (keys[-1].clone(), values[-1].clone(), hidden[-1].clone())
                x, k, v = Step(qformer)(state, cross_k, cross_v, seen, places[moment], keys, values, hidden, mask[0, n])
                keys[:, moment], values[:, moment], hidden[:, moment] = k, v, qformer.row_mask(mask[0, n])
            visual = (cross_k[-1], cross_v[-1], seen, places[-1]) if config.layers - 1 in config.cross_layers else ()
            output, _ = Answer(qformer)(x[-1], k[-1], v[-1], *earlier, mask[0, n], *visual)
            assert (got[0, n] - output).abs().max() < CLOSE
