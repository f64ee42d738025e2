"""LoRA adapters merged into a GGUF: llama.cpp says what PEFT says with the adapter beside the weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from keepsight.export import lora
from keepsight.export.checkpoints import load_huggingface
from keepsight.export.convert import language_source
from keepsight.export.llama_gguf import LanguageSource, open_llama, with_lora, write_gguf
from keepsight.export.llama_reference import check_gguf, logits
from keepsight.export.tensorfiles import StoredTensor
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.manifest import sha256_of
from keepsight.streams.errors import CheckpointError, UsageError

from . import hf_models
from .peak_memory import peak_mb
from .random_llama import IDS, cosine, deployed_logits, save_llama

# PEFT reads an attribute of transformers' models that has a newer name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]  # what TimeChat trains
TIMECHAT = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ATTENTION}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a random LLaMA, and the model."""
    folder = tmp_path_factory.mktemp("base")
    return folder, save_llama(folder, vocabulary)


def adapted(model: Any, **settings: Any) -> Any:
    """PEFT's model with a random adapter that matters as much as the weights; they are not merged."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    return peft


def save_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    adapted(model, **settings).save_pretrained(folder, save_embedding_layers=False)
    return folder


def said_by(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def merged_gguf(source: LanguageSource, folder: Path) -> Path:
    write_gguf(source, folder / "merged.gguf", name="merged")
    return folder / "merged.gguf"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def timechat_state(peft: Any, adapter: str = ".default") -> dict[str, Tensor]:
    """What `timechat_7b.pth` has under `model`: the trained parts by their own names, PEFT 0.5's among them."""
    trained = {key.replace(".default", adapter): value for key, value in peft.state_dict().items() if "lora_" in key}
    pairs = {f"llama_model.{key}": value for key, value in trained.items()}
    assert f"llama_model.{Q0}.lora_A{adapter}.weight" in pairs
    others = {
        "query_tokens": torch.ones(1, 32, 768), "llama_proj.weight": torch.ones(4, 4), "llama_proj.bias": torch.ones(4),
        "Qformer.bert.encoder.layer.0.attention.self.query.bias": torch.ones(4),
        "video_frame_position_embedding.weight": torch.ones(96, 4),
        "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }  # fmt: skip
    return pairs | others


ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"]
PATTERNS = {
    "target_modules": "all-linear",
    "rank_pattern": {"v_proj": 2, r".*\.3\.mlp\.up_proj": 5},
    "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 1, "k_proj": 40, "(up|down)_proj": 6},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 20},
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ALL},
        PATTERNS,
        {"layers_to_transform": [0, 2], "exclude_modules": ["layers.2.self_attn.o_proj"]},
        {"target_modules": r".*layers\.[12]\.(self_attn|mlp)\.[a-z]+_proj", "init_lora_weights": "gaussian"},
    ],
    ids=["attention", "rank-stabilised, all matrices", "patterns", "some layers", "a pattern of modules"],
)
def test_the_merged_file_says_what_peft_says_unmerged(base: tuple[Path, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    folder, model = base
    settings = TIMECHAT | settings
    wanted = said_by(adapted(model, **settings))
    source = with_lora(open_llama(folder), save_adapter(model, tmp_path / "adapter", **settings))
    assert np.abs(wanted - logits(source, IDS).numpy()).max() < 2e-4  # our reference, not merged either
    merged = merged_gguf(source, tmp_path)
    assert cosine(deployed_logits(merged), wanted) > 0.9999
    assert cosine(said_by(model), wanted) < 0.97  # without the adapter it is another model
    assert check_gguf(merged, source).cosine > 0.9999


@pytest.mark.parametrize("adapter", ["", ".default"])
@pytest.mark.parametrize("alpha", [8.0, 5.0])
def test_the_pairs_inside_a_timechat_checkpoint(base: tuple[Path, Any], adapter: str, alpha: float, tmp_path: Path) -> None:
    """8 is what it was trained with; less at inference, as TimeChat's authors advise, is `--lora-alpha`."""
    folder, model = base
    peft = adapted(model, **TIMECHAT)
    torch.save({"model": timechat_state(peft, adapter), "epoch": 3}, tmp_path / "timechat.pth")
    source = with_lora(open_llama(folder), tmp_path / "timechat.pth", alpha=alpha)
    wanted = said_by(adapted(model, **{**TIMECHAT, "lora_alpha": alpha}))
    assert cosine(deployed_logits(merged_gguf(source, tmp_path)), wanted) > 0.9999
    assert (cosine(said_by(peft), wanted) > 0.9999) == (alpha == 8)
    with pytest.raises(CheckpointError, match=r"nothing in .*timechat\.pth says the alpha.*--lora-alpha"):
        with_lora(open_llama(folder), tmp_path / "timechat.pth")


def test_a_named_alpha_is_that_of_every_pair(base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = base
    said = save_adapter(model, tmp_path / "adapter", **TIMECHAT, alpha_pattern={"k_proj": 2})
    source = with_lora(open_llama(folder), said, alpha=20)
    wanted = said_by(adapted(model, **{**TIMECHAT, "lora_alpha": 20}))
    assert cosine(deployed_logits(merged_gguf(source, tmp_path)), wanted) > 0.9999


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_folder_and_the_file_in_it_are_the_same_adapter(base: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    folder, model = base
    settings = {**TIMECHAT, "use_rslora": True}
    said = save_adapter(model, tmp_path / "adapter", **settings)
    if name.endswith(".bin"):
        torch.save(load_file(said / "adapter_model.safetensors"), said / name)
        (said / "adapter_model.safetensors").unlink()
    of_folder, of_file = (with_lora(open_llama(folder), path).lora for path in (said, said / name))
    assert of_folder is not None and of_file is not None
    assert of_folder.provenance() == of_file.provenance()
    assert of_folder.provenance() == {
        "name": "adapter", "sha256": sha256_of(said / name),
        "pairs": [{"matrices": 16, "r": 8, "alpha": 8.0, "scale": pytest.approx(8 / 8**0.5)}],
    }  # fmt: skip


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_checkpoint_as_it_is(base: tuple[Path, Any], kind: torch.dtype, tmp_path: Path) -> None:
    """A torch file's tensors are handed out as they are: a merge in place would be there twice at the second reading."""
    folder, model = base[0], copy.deepcopy(base[1]).to(kind)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    source = with_lora(open_llama(tmp_path), save_adapter(model, tmp_path / "adapter", **TIMECHAT))
    first = merged_gguf(source, tmp_path).read_bytes()
    assert merged_gguf(source, tmp_path).read_bytes() == first
    assert cosine(deployed_logits(tmp_path / "merged.gguf"), said_by(adapted(model.float(), **TIMECHAT))) > 0.9999


def _forgotten(stored: StoredTensor, pair: lora.LowRank) -> StoredTensor:
    return stored


def _unscaled(stored: StoredTensor, pair: lora.LowRank) -> StoredTensor:
    return StoredTensor(stored.shape, lambda: stored.read() + pair.up.read() @ pair.down.read())


def _subtracted(stored: StoredTensor, pair: lora.LowRank) -> StoredTensor:
    return StoredTensor(stored.shape, lambda: stored.read() - pair.scale * pair.up.read() @ pair.down.read())


@pytest.mark.parametrize("merging", [_forgotten, _unscaled, _subtracted])
def test_the_check_after_a_conversion_finds_a_wrong_merge(
    base: tuple[Path, Any], merging: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = base
    source = with_lora(open_llama(folder), save_adapter(model, tmp_path / "adapter", **{**TIMECHAT, "lora_alpha": 6}))
    monkeypatch.setattr(lora, "_merging", merging)
    with pytest.raises(CheckpointError, match="does not say what its source says"):
        check_gguf(merged_gguf(source, tmp_path), source)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"use_dora": True}, "trained with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "trained with modules_to_save"),
        ({"init_lora_weights": "pissa"}, "trained with init_lora_weights 'pissa'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"tensors of LoRA on an embedding: .*embed_tokens\.lora_embedding_A"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of some of these combinations
def test_what_peft_trains_beside_plain_pairs_is_refused(
    base: tuple[Path, Any], settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder, model = base
    said = save_adapter(model, tmp_path / "adapter", **(TIMECHAT | settings))
    with pytest.raises(CheckpointError, match=complaint):
        with_lora(open_llama(folder), said)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "LOHA"}, "an adapter of the type 'LOHA'; only LORA"),
        ({"fan_in_fan_out": True, "lora_bias": True}, "trained with lora_bias, fan_in_fan_out"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"r": 4}, r"32 of another shape: .*layers\.0\.self_attn\.q_proj\.lora_A \[8, 96\] instead of \[4, 96\]"),
        ({"rank_pattern": {"0.self_attn.q_proj": 9}}, r"2 of another shape: \S*0\.self_attn\.q_proj\.lora_A .*lora_B"),
        ({"target_modules": [*ATTENTION, "up_proj"]}, r"8 missing: .*layers\.3\.mlp\.up_proj\.lora_B"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern can't be understood"),
        ({"lora_alpha": None}, "--lora-alpha"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    base: tuple[Path, Any], changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder, model = base
    said = save_adapter(model, tmp_path / "adapter", **TIMECHAT)
    change_config(said, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        with_lora(open_llama(folder), said)


def _cut(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous()})


def _added(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.ones(8, 96)})


def _moved(module: str) -> Callable[[dict[str, Tensor]], object]:
    """The pair of the first q_proj under another name."""
    names = {f"{Q0}.lora_{side}.weight": f"base_model.model.{module}.lora_{side}.weight" for side in "AB"}
    return lambda tensors: [tensors.update({new: tensors.pop(old)}) for old, new in names.items()]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"), r"1 missing: model\.layers\.0\.self_attn\.q_proj\.lora_B\."),
        (_moved("model.layers.9.mlp.up_proj"), r"2 missing: \S+, .*; 1 for modules .* has not: model\.layers\.9\.mlp\.up_proj"),
        (_moved("model.embed_tokens"), "1 for modules that the base has not: model.embed_tokens"),
        (_cut(f"{Q0}.lora_A.weight"), r"1 of another shape: \S+q_proj\.lora_A \[8, 95\] instead of \[8, 96\]"),
        (_cut(f"{Q0}.lora_B.weight"), r"1 of another shape: \S+q_proj\.lora_B \[96, 7\] instead of \[96, 8\]"),
        (_added(f"{Q0}.bias"), r"tensors of biases: \S+layers\.N\.self_attn\.q_proj\.bias"),
        (_added(f"{Q0}.lora_B.bias"), r"tensors of biases: \S+lora_B\.bias"),
        (_added(f"{Q0}.lora_magnitude_vector"), r"tensors of DoRA: \S+lora_magnitude_vector"),
        (_added("base_model.model.lm_head.weight"), r"tensors of no pair: base_model\.model\.lm_head\.weight"),
        (_added(f"{Q0}.lora_A.other.weight"), "several adapters: one without a name, other"),
    ],
    ids=[
        "half a pair", "a layer more", "an embedding", "A cut", "B cut", "biases", "biases of B", "DoRA", "a whole matrix",
        "two adapters",
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    base: tuple[Path, Any], change: Callable[[dict[str, Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    folder, model = base
    said = save_adapter(model, tmp_path / "adapter", **TIMECHAT)
    change_tensors(said, change)
    with pytest.raises(CheckpointError, match=complaint):
        with_lora(open_llama(folder), said)


def test_a_head_that_is_the_embedding_takes_no_adapter(vocabulary: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path, vocabulary, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        said = save_adapter(model, tmp_path / "adapter", **(TIMECHAT | {"target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(CheckpointError, match="1 for modules that the base has not: lm_head"):
        with_lora(open_llama(tmp_path), said)


def _without(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_without("lora_"), "holds no LoRA pairs"),
        (_without("layers.2.self_attn.v_proj"), r"2 missing: model\.layers\.2\.self_attn\.v_proj\.lora_A, "),
        (_without("layers.1.self_attn.v_proj.lora_A"), r"1 missing: model\.layers\.1\.self_attn\.v_proj\.lora_A\."),
        (_added("llama_model.model.embed_tokens.weight"), r"tensors of no pair: llama_model\.model\.embed_tokens\.weight"),
        (_added("Qformer.bert.lora_A.default.weight"), r"tensors of no pair: Qformer\.bert"),
    ],
    ids=["no pairs", "a layer without one", "half a pair", "a matrix of the language model", "LoRA elsewhere"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    base: tuple[Path, Any], change: Callable[[dict[str, Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    folder, model = base
    state = timechat_state(adapted(model, **TIMECHAT))
    change(state)
    torch.save({"model": state}, tmp_path / "timechat.pth")
    with pytest.raises(CheckpointError, match=complaint):
        with_lora(open_llama(folder), tmp_path / "timechat.pth", alpha=8)


class Malicious:
    """A pickle that runs code where it is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_a_folder_that_is_no_adapter_is_refused(
    base: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, said = open_llama(base[0]), tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        with_lora(source, said, alpha=8)
    said.mkdir()
    with pytest.raises(CheckpointError, match=r"no readable adapter_config\.json"):
        with_lora(source, said)
    (said / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    with pytest.raises(CheckpointError, match=r"none of adapter_model\.safetensors, adapter_model\.bin"):
        with_lora(source, said)
    torch.save({f"{Q0}.lora_A.weight": Malicious()}, said / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        with_lora(source, said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("alpha", [0.0, -8.0, float("nan"), float("inf")])
def test_an_alpha_is_a_positive_number(base: tuple[Path, Any], alpha: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no positive number"):
        with_lora(open_llama(base[0]), tmp_path, alpha=alpha)


def test_only_a_llama_that_is_converted_takes_an_adapter(tmp_path: Path) -> None:
    checkpoint = load_huggingface(hf_models.save(hf_models.instructblip(), tmp_path / "hf"))
    said = tmp_path / "adapter"
    with pytest.raises(UsageError, match=r"adapter can only be merged into a LLaMA.*--llm none"):
        language_source(checkpoint, "none", lora=said)
    with pytest.raises(UsageError, match=r"model\.gguf is a GGUF file\. .*--llm FOLDER"):
        language_source(checkpoint, str(tmp_path / "model.gguf"), lora=said)
    with pytest.raises(UsageError, match=r"--lora-alpha .*--lora ADAPTER"):
        language_source(checkpoint, None, lora_alpha=20)


def test_the_command_merges_it_and_says_so_in_the_manifest(base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = base
    said = save_adapter(model, tmp_path / "adapter", **(TIMECHAT | {"alpha_pattern": {"o_proj": 16}}))
    checkpoint = hf_models.save(hf_models.instructblip(text_hidden_size=96), tmp_path / "hf")
    arguments = ["export", str(checkpoint), "--llm", str(folder), "--lora", str(said), "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.output
    wanted = said_by(adapted(model, **(TIMECHAT | {"alpha_pattern": {"o_proj": 16}})))
    assert cosine(deployed_logits(tmp_path / "bundle" / "llm.gguf"), wanted) > 0.9999
    assert Bundle.open(tmp_path / "bundle").manifest.provenance["lora"] == {
        "name": "adapter", "sha256": sha256_of(said / "adapter_model.safetensors"),
        "pairs": [
            {"matrices": 12, "r": 8, "alpha": 8.0, "scale": 1.0}, {"matrices": 4, "r": 8, "alpha": 16.0, "scale": 2.0},
        ],
    }  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "weaker"), "--lora-alpha", "5"])
    assert result.exit_code == 0, result.output
    assert Bundle.open(tmp_path / "weaker").manifest.provenance["lora"]["pairs"] == [
        {"matrices": 16, "r": 8, "alpha": 5.0, "scale": 0.625}
    ]


def test_memory_stays_that_of_the_largest_tensors(vocabulary: Path, tmp_path: Path) -> None:
    """Merged all at once, the matrices of this model would take twice the size of its file."""
    save_llama(tmp_path, vocabulary, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_key_value_heads=8)
    pairs = {}
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        if ".layers." in key and tensor.dim() == 2:
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            pairs[f"{stem}.lora_A.weight"] = torch.ones(16, tensor.shape[1])
            pairs[f"{stem}.lora_B.weight"] = torch.ones(tensor.shape[0], 16)
    save_file(pairs, tmp_path / "pairs.safetensors")
    raised = peak_mb(
        "from keepsight.export.llama_gguf import open_llama, with_lora, write_gguf\n"
        "folder = Path(sys.argv[1])\n"
        "source = with_lora(open_llama(folder), folder / 'pairs.safetensors', alpha=16)\n"
        "assert len(source.lora.pairs) == 12 * 7",
        "write_gguf(source, folder / 'llm.gguf', name='big')",
        tmp_path,
    )
    size = (tmp_path / "llm.gguf").stat().st_size >> 20
    print(f"{size} MB written with {raised} MB more than before")
    assert size > 120 and raised < size / 2
