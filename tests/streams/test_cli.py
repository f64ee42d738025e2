from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import keepsight.streams.cli as cli
from keepsight.streams import MissingComponentError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    cli.commands(app)
    app.callback()(lambda: None)  # one command alone would lose its name
    return app


def test_cameras_are_listed_by_number_and_metadata_nodes_are_not(tmp_path: Path) -> None:
    for node, index, name in (("video10", "0", "Dock"), ("video2", "0", "HD Webcam"), ("video3", "1", "HD Webcam")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "index").write_text(f"{index}\n")
        (tmp_path / node / "name").write_text(f"{name}\n")
    assert [(camera.uri, camera.name) for camera in cli.cameras(tmp_path)] == [
        ("v4l2:///dev/video2", "HD Webcam"),
        ("v4l2:///dev/video10", "Dock"),
    ]


def test_sources_as_json_is_json_alone(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["sources", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["gstreamer"].startswith("GStreamer")
    assert {row["what"] for row in report["abilities"]} >= {"video files and pictures", "network cameras (rtsp)"}
    assert all(bool(row["elements"]) != bool(row["package"]) for row in report["abilities"])


def test_sources_for_people(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["sources"])
    assert result.exit_code == 0 and "decodebin" in result.stdout


def test_without_gstreamer_the_problem_is_shown(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingComponentError("GStreamer is not here.", fix="apt-get install it.")

    monkeypatch.setattr(cli, "load_gst", missing)
    result = CliRunner().invoke(app, ["sources", "--json"])
    assert result.exit_code == 0 and "apt-get" in json.loads(result.stdout)["problem"]
