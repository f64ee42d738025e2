"""A bundle of an older export gets this version's replay graph, from its own weights and without changing what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from keepsight.export.renew import renew_replay
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.manifest import read_manifest, sha256_of, write_manifest
from keepsight.runtime.qformer import QFormer, SoftPrompt
from keepsight.streams.errors import BundleError

from ..random_bundle import make_bundle, random_frames


def without_attention(bundle: Path) -> Path:
    """What an export wrote before there was such an output."""
    path = bundle / "replay.onnx"
    model = onnx.load(str(path), load_external_data=False)
    model.graph.output.remove(next(value for value in model.graph.output if value.name == "attention"))
    path.write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(bundle, read_manifest(bundle))
    return bundle


def said_of(bundle: Path) -> SoftPrompt:
    qformer = QFormer(Bundle.open(bundle))
    for time_s, features in enumerate(qformer.encode(random_frames(7))):
        qformer.remember(features, float(time_s))
    said = qformer.replay(qformer.prompt("what was there first?"))
    qformer.close()
    return said


def test_an_older_bundle_gets_the_attention_and_says_the_same(tmp_path: Path) -> None:
    bundle = without_attention(make_bundle(tmp_path, layers=3))
    before = said_of(bundle)
    untouched = {path.name: sha256_of(path) for path in bundle.iterdir() if path.name not in ("replay.onnx", "manifest.json")}
    renew_replay(bundle)
    after = said_of(bundle)  # which checks the manifest's hashes
    assert before.attention is None and after.attention is not None
    assert np.array_equal(before.query_output, after.query_output) and np.array_equal(before.rows, after.rows)
    assert {name: sha256_of(bundle / name) for name in untouched} == untouched
    assert (bundle / "replay.onnx").stat().st_size < 300_000  # its weights lie where they lay


def test_what_an_export_writes_today_is_not_changed_by_a_byte(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    before = (bundle / "replay.onnx").read_bytes()
    renew_replay(bundle)
    assert (bundle / "replay.onnx").read_bytes() == before


def test_the_shipped_bundle_has_this_version_s_graph(tmp_path: Path) -> None:
    graph = onnx.load(str(Bundle.open("tiny").graph_path("replay")), load_external_data=False).graph
    assert [output.name for output in graph.output] == ["query_output", "soft_prompt", "attention"]


def test_a_weight_that_is_not_in_the_shared_file_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    index = json.loads((bundle / "qformer.json").read_text())
    index["parameters"]["layers.1.attention.key.weight"]["offset"] += 64
    (bundle / "qformer.json").write_text(json.dumps(index))
    write_manifest(bundle, read_manifest(bundle))
    kept = (bundle / "replay.onnx").read_bytes()
    with pytest.raises(BundleError, match="does not hold"):
        renew_replay(bundle)
    assert (bundle / "replay.onnx").read_bytes() == kept
