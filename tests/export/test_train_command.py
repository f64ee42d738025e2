"""`keepsight train --policy`: what it hands on, and that a bundle for another memory than it runs with says so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepsight.runtime import Bundle
from keepsight.runtime.cli import app
from keepsight.runtime.qformer import QFormer


def test_the_policy_reaches_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("keepsight.export.tiny.train_tiny", lambda work, out, **options: given.append(options))
    for arguments in ([], ["--policy", "fifo"]):
        result = CliRunner().invoke(app, ["train", "--work", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 0, result.output
    assert [options["policy"] for options in given] == ["mbc", "fifo"]


def test_a_policy_that_is_none_is_refused() -> None:
    assert CliRunner().invoke(app, ["train", "--policy", "concat"]).exit_code == 2


@pytest.mark.parametrize(("trained", "memory", "told"), [("fifo", "mbc", True), ("fifo", "fifo", False), (None, "last", False)])
def test_weights_for_another_memory_are_no_secret(
    caplog: pytest.LogCaptureFixture, trained: str | None, memory: Any, told: bool
) -> None:
    """The shipped bundle does not say what it was trained for; nor are its ablations remarkable."""
    provenance = {} if trained is None else {"memory": trained}
    tiny = Bundle.open("tiny")
    bundle = Bundle(tiny.path, tiny.manifest.model_copy(update={"provenance": provenance}))
    with caplog.at_level(logging.WARNING, "keepsight"):
        QFormer(bundle, memory=memory).close()
    assert ("was trained for the memory fifo and runs with mbc" in caplog.text) is told
