"""Checkpoints in: our modules say what `transformers` says with the same weights, whatever layout the weights came in."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keepsight.export.checkpoints import Checkpoint, load_huggingface, load_lavis, with_fine_tuned
from keepsight.export.eva import EvaConfig, resize_positions
from keepsight.export.graphs import Replay
from keepsight.export.qformer import QFormer
from keepsight.export.tensorfiles import open_tensors
from keepsight.streams.errors import CheckpointError

from . import hf_models, lavis_files
from .hf_malmm import HuggingFaceMALMM

PARITY = 1e-4  # largest difference in float32
TEXT = (2, 17, 60, 33, 3)
ODD = {
    "as it is": {},
    "two heads, one block": {"vision_num_attention_heads": 2, "vision_num_hidden_layers": 1},
    "cross-attention in every third layer": {"qformer_cross_attention_frequency": 3, "qformer_num_hidden_layers": 5},
    "one query, other epsilons": {"num_query_tokens": 1, "qformer_layer_norm_eps": 1e-3, "vision_layer_norm_eps": 1e-3},
    "no q, k, v biases": {"vision_qkv_bias": False},
}
LAVIS_SIZES = {"qformer_hidden_size": 128, "qformer_num_attention_heads": 2}
LAVIS_VISION = EvaConfig(image_size=28, patch=7, width=48, blocks=3, heads=4, mlp=80, norm_eps=1e-6)


def frames_of(size: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def one_frame(qformer: QFormer, features: Tensor, text: tuple[int, ...] = TEXT) -> tuple[Tensor, Tensor]:
    """Query output and soft prompt of a memory with one frame `[N, C]`."""
    ids, mask = torch.tensor(text, dtype=torch.int64), torch.ones(len(text))
    keys, values = qformer.cross_kv(features)
    nowhere = torch.zeros(1, len(features), dtype=torch.int32)
    with torch.no_grad():
        state = qformer.prompt_state(ids, mask)
        output, rows, _ = Replay(qformer)(
            state, keys[:, None], values[:, None], nowhere, nowhere[None], torch.ones(1), mask
        )
        return output, rows


def check_against(model: Any, checkpoint: Checkpoint, text: tuple[int, ...] = TEXT) -> None:
    """Vision and Q-Former, each fed the same."""
    oracle, vision = HuggingFaceMALMM(model, text, length=4), checkpoint.load_vision()
    for frame in frames_of(checkpoint.vision.image_size):
        with torch.no_grad():
            theirs, ours = oracle.features(frame), vision(torch.from_numpy(frame)[None])[0]
        assert (theirs - ours).abs().max() < PARITY
    said = oracle.see(frame)
    output, rows = one_frame(checkpoint.load_qformer(), theirs, text)
    assert (said.query_output - output).abs().max() < PARITY
    assert (said.soft_prompt - rows).abs().max() < PARITY
    assert said.soft_prompt.std() > 0.05  # it says something


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_an_instructblip_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    model = hf_models.instructblip(**changes)
    check_against(model, load_huggingface(hf_models.save(model, tmp_path)))


def test_a_blip2_folder_has_no_text(tmp_path: Path) -> None:
    model = hf_models.blip2()
    checkpoint = load_huggingface(hf_models.save(model, tmp_path))
    assert checkpoint.qformer.vocab == 0
    check_against(model, checkpoint, ())


def test_one_layer_of_everything_at_real_dimensions(tmp_path: Path) -> None:
    sizes = {
        "vision_hidden_size": 1408, "vision_intermediate_size": 6144, "vision_num_hidden_layers": 1,
        "vision_num_attention_heads": 16, "vision_image_size": 224, "vision_patch_size": 14, "qformer_vocab_size": 30523,
        "qformer_hidden_size": 768, "qformer_num_hidden_layers": 2, "qformer_num_attention_heads": 12,
        "qformer_intermediate_size": 3072, "qformer_max_position_embeddings": 512, "qformer_encoder_hidden_size": 1408,
        "num_query_tokens": 32,
    }  # fmt: skip
    model = hf_models.instructblip(**sizes)
    checkpoint = load_huggingface(hf_models.save(model, tmp_path))
    assert checkpoint.vision == EvaConfig(blocks=1, norm_eps=1e-6)
    check_against(model, checkpoint)


def test_shards_and_torch_files_hold_the_same(tmp_path: Path) -> None:
    model = hf_models.instructblip()
    hf_models.save(model, tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole = load_huggingface(hf_models.save(model, tmp_path / "whole")).load_qformer().state_dict()
    torch.save(model.state_dict(), tmp_path / "whole" / "pytorch_model.bin")
    os.remove(tmp_path / "whole" / "model.safetensors")
    for folder in ("shards", "whole"):
        again = load_huggingface(tmp_path / folder)
        assert all(
            torch.equal(stored.read(), whole[key]) for key, stored in again.qformer_tensors.items()
        )


@pytest.fixture
def lavis(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A model, and its `trimmed.pth` and `eva_vit_g.pth` in LAVIS's layout."""
    model = hf_models.instructblip(**LAVIS_SIZES)
    torch.save(lavis_files.tower(model), tmp_path / "eva_vit_g.pth")
    torch.save({"model": lavis_files.qformer(model)}, tmp_path / "trimmed.pth")
    return model, tmp_path / "trimmed.pth", tmp_path / "eva_vit_g.pth"


def load_small(trimmed: Path, tower: Path | None) -> Checkpoint:
    return load_lavis(trimmed, tower, vision_config=LAVIS_VISION, layers=4)


def test_lavis_files(lavis: tuple[Any, Path, Path]) -> None:
    model, trimmed, tower = lavis
    check_against(model, load_small(trimmed, tower))


def test_lavis_with_fused_biases_and_everything_in_one_file(lavis: tuple[Any, Path, Path]) -> None:
    model, trimmed, _ = lavis
    inside = {f"visual_encoder.{key}": value for key, value in lavis_files.tower(model, fused_bias=True).items()}
    torch.save({"model": lavis_files.qformer(model) | inside}, trimmed)
    check_against(model, load_small(trimmed, None))


def test_lavis_defaults_are_vit_g(lavis: tuple[Any, Path, Path]) -> None:
    config = EvaConfig()
    assert (config.width, config.blocks, config.heads, config.mlp, config.tokens) == (1408, 39, 16, 6144, 257)
    assert (config.block_eps, config.norm_eps) == (1e-6, 1e-5)
    with pytest.raises(CheckpointError, match=r"does not hold the visual encoder.*missing: blocks\.10\."):
        load_lavis(lavis[1], lavis[2])


def test_a_position_table_of_another_grid_is_resized_as_the_reference_does() -> None:
    table = torch.randn(1, 1 + 16, 6)
    resized = resize_positions(table, 1 + 36)
    assert torch.equal(resized[:, 0], table[:, 0])
    grid = table[0, 1:].reshape(4, 4, 6).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)[0]
    assert torch.equal(resized[0, 1:], wanted.permute(1, 2, 0).reshape(36, 6))
    assert resize_positions(table, 17) is table


def save_fine_tuned(model: Any, folder: Path, image_pe: Tensor) -> Path:
    folder.mkdir()
    state = lavis_files.qformer(model) | lavis_files.rotary() | {"image_pe.weight": image_pe}
    content = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "config": {"run": {}}, "scaler": None, "epoch": 4}
    torch.save(content, folder / "checkpoint_best.pth")
    return folder / "checkpoint_best.pth"


@pytest.mark.parametrize("frames", [120, 100, 7])
def test_fine_tuned_weights_replace_the_bases(lavis: tuple[Any, Path, Path], frames: int, tmp_path: Path) -> None:
    _, trimmed, tower = lavis
    tuned = hf_models.instructblip(**LAVIS_SIZES)
    image_pe = torch.zeros(frames, 48)
    image_pe[5] = torch.randn(48)
    base = load_small(trimmed, tower)
    checkpoint = with_fine_tuned(base, save_fine_tuned(tuned, tmp_path / "msvd", image_pe))
    assert checkpoint.image_pe is not None and torch.equal(checkpoint.image_pe, image_pe)
    assert checkpoint.vision.norm_eps == 1e-5  # LAVIS's, whatever the base's format has
    features = torch.randn(17, 48)
    oracle = HuggingFaceMALMM(tuned, TEXT, length=4)
    oracle.features = lambda _: features  # type: ignore[method-assign]
    assert (oracle.see(None).soft_prompt - one_frame(checkpoint.load_qformer(), features)[1]).abs().max() < PARITY
    norm, before = checkpoint.vision_tensors["ln_vision.weight"].read(), base.vision_tensors["ln_vision.weight"].read()
    assert torch.equal(norm, tuned.vision_model.post_layernorm.weight) and not torch.equal(norm, before)


def test_a_table_of_zeros_is_none(lavis: tuple[Any, Path, Path], tmp_path: Path) -> None:
    base = load_small(lavis[1], lavis[2])
    assert with_fine_tuned(base, save_fine_tuned(lavis[0], tmp_path / "zero", torch.zeros(120, 48))).image_pe is None


def test_a_language_model_of_32001_rows_is_carried_by_its_own_names(tmp_path: Path) -> None:
    model = hf_models.instructblip(text_vocab_size=32001)
    checkpoint = load_huggingface(hf_models.save(model, tmp_path))
    assert checkpoint.llm_config is not None and checkpoint.llm_config["model_type"] == "llama"
    assert checkpoint.llm_tensors is not None
    assert checkpoint.llm_tensors["model.embed_tokens.weight"].shape == (32001, 40)


def changed(lavis: tuple[Any, Path, Path], **changes: Tensor | None) -> Path:
    state: dict[str, Any] = lavis_files.qformer(lavis[0])
    for key, value in changes.items():
        state[key] = value
    torch.save({"model": {key: value for key, value in state.items() if value is not None}}, lavis[1])
    return lavis[1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ln_vision.bias": None}, r"visual encoder.*1 missing: ln_vision\.bias"),
        ({"Qformer.bert.encoder.layer.2.output_query.dense.weight": None}, r"1 missing: layers\.2\.query_ffn\.output\.weight"),
        ({"llm_proj.bias": torch.zeros(41)}, r"of another shape: llm_proj\.bias \[41\] instead of \[40\]"),
        ({"Qformer.bert.encoder.layer.9.output.dense.weight": torch.zeros(2)}, r"1 unexpected: layers\.9\.text_ffn\.output"),
        ({"video_Qformer.bert.x": torch.zeros(2)}, r"keys that are not of this model: video_Qformer\.bert\.x"),
        ({"query_tokens": None}, r"no query_tokens"),
        ({"image_pe.weight": torch.zeros(120, 47)}, r"image_pe of \[120, 47\], not of rows of 48"),
    ],
)
def test_what_does_not_fit_is_named(lavis: tuple[Any, Path, Path], changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        load_small(changed(lavis, **changes), lavis[2])


def test_lavis_without_a_tower_says_which_file_is_missing(lavis: tuple[Any, Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"no visual encoder.*--vision eva_vit_g\.pth"):
        load_small(lavis[1], None)


class Evil:
    """What unpickling must never run."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", self.command],)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"model": {"a": torch.zeros(1)}, "config": Evil(str(trace))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"it asks for (commands|subprocess)\.call, and reading it would run code\."):
        open_tensors(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(str(trace))))
    with pytest.raises(CheckpointError, match=r"not a readable torch file \(Unsupported operand"):
        open_tensors(tmp_path / "plain.pth")
    assert not trace.exists()


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        open_tensors(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_tensors(tmp_path)
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with pytest.raises(CheckpointError, match="not a readable"):
            open_tensors(tmp_path / name)
    for content in (b"", b"hello" * 100, b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q"):  # each fails elsewhere
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.pth is not a readable torch file \([^`]*\)\. Fetch it again"):
            open_tensors(tmp_path / "x.pth")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        open_tensors(tmp_path / "numbers.pth")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/model-1.safetensors"}}')
    with pytest.raises(CheckpointError, match="which is not beside it"):
        open_tensors(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="type 'bert'"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        load_huggingface(tmp_path)
