"""`keepsight stream probe`: what it says of a good source, of one that comes back, and of one that never came."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from keepsight.streams import KeepsightError, UsageError
from keepsight.streams.probe import add_probe, probe

if TYPE_CHECKING:
    from conftest import RtspServer

app = typer.Typer()
app.callback()(lambda: None)
add_probe(app)


def probed(*arguments: str) -> tuple[dict[str, Any], int]:
    """The JSON, and the exit code that `keepsight` gives to the error."""
    result = CliRunner().invoke(app, ["probe", *arguments, "--json"])
    error = result.exception
    return json.loads(result.stdout), error.exit_code if isinstance(error, KeepsightError) else result.exit_code


def states(report: dict[str, Any]) -> list[str]:
    return [event["state"] for event in report["events"] if "no frame yet" not in event["reason"]]


def test_a_live_source() -> None:
    report, code = probed("test://ball?fps=30&width=320&height=240", "--seconds", "3")
    assert code == 0 and report["error"] is None and report["state"] == "live" and report["generations"] == 1
    assert report["caps"] == {"width": 320, "height": 240, "fps": 30.0}
    assert report["frames"] + sum(report["drops"].values()) > 10 and 10 < report["fps"] < 50
    assert 0 <= report["age_ms"]["p50"] <= report["age_ms"]["p95"] < 1000
    assert states(report) == ["connecting", "live"] and set(report["drops"]) == {"replaced", "stale", "damaged"}
    assert all(set(event) == {"t", "state", "reason"} for event in report["events"])


def test_a_camera_that_goes_and_comes_back(rtsp_server: RtspServer) -> None:
    def restart() -> None:
        time.sleep(1.5)
        rtsp_server.stop()
        time.sleep(0.5)
        rtsp_server.start()

    other = threading.Thread(target=restart)
    other.start()
    report, code = probed(rtsp_server.url("/ball", "ann:s3cret@"), "--seconds", "9")
    other.join()
    assert code == 0 and report["generations"] == 2 and report["state"] == "live"
    assert states(report)[:3] == ["connecting", "live", "lost"] and states(report)[-1] == "live"
    times = [event["t"] for event in report["events"]]
    assert times == sorted(times) and times[2] > 1.0
    assert 10 < report["fps"] < 50  # the outage is none of the stream's time
    assert "s3cret" not in json.dumps(report) and "ann:***@" in report["uri"]


def test_exit_codes_tell_why_nothing_came(rtsp_server: RtspServer, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video\n" * 20)
    for uri, code in (
        (rtsp_server.url("/nope"), 3),
        ("rtsp://127.0.0.1:9/x", 3),
        ("/dev/video99", 3),
        (str(tmp_path / "none.mp4"), 3),
        (str(tmp_path / "text.mp4"), 4),
    ):
        report, given = probed(uri, "--seconds", "2")
        assert given == code and report["error"]["exit_code"] == code and report["frames"] == 0, uri
        assert states(report)[:2] == ["connecting", "lost"]


def test_nothing_in_time_is_no_frame(rtsp_server: RtspServer) -> None:
    report, code = probed(rtsp_server.url("/half"), "--seconds", "0.3")
    assert code == 5 and report["error"]["kind"] == "no-frame"


def test_a_file_plays_as_a_camera(media: Path) -> None:
    report, code = probed(str(media / "plain.mp4"), "--seconds", "1.5")
    assert code == 0 and report["caps"]["width"] == 160 and 10 < report["fps"] < 50
    assert 1.4 < report["seconds"] < 10 and report["age_ms"] is not None


def test_a_truncated_file_says_so_after_its_frames(media: Path, tmp_path: Path) -> None:
    content = (media / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    report, code = probed(str(tmp_path / "cut.mp4"), "--seconds", "20")
    assert code == 4 and report["frames"] > 10 and "truncated" in report["error"]["message"]
    assert states(report) == ["connecting", "live", "lost"]


def test_people_read_events_as_they_happen_and_a_summary() -> None:
    result = CliRunner().invoke(app, ["probe", "test://ball?fps=30&width=64&height=64", "--seconds", "1"])
    assert result.exit_code == 0 and "64x64, 30 fps stated" in result.stdout and "age when handed over" in result.stdout
    assert "first frame of 64x64" in result.stderr


@pytest.mark.parametrize("bad", [lambda: probe("nosuch://x", 1.0), lambda: probe("test://ball", 0.0)])
def test_what_makes_no_sense_is_refused(bad: Callable[[], Any]) -> None:
    with pytest.raises(UsageError):
        bad()
