from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import keepsight.streams.gst as gst_module
from keepsight.streams import MissingComponentError, SourceURI
from keepsight.streams.gst import require_elements
from keepsight.streams.pipelines import View, recipe_for


def test_missing_elements_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gst_module, "has_element", lambda name: name == "appsink")
    with pytest.raises(MissingComponentError) as caught:
        require_elements(("appsink", "h264parse", "rtspsrc"))
    assert "h264parse, rtspsrc" in str(caught.value) and "appsink" not in str(caught.value)
    assert "apt-get install gstreamer1.0-plugins-bad gstreamer1.0-plugins-good" in str(caught.value)


def test_an_element_nobody_knows_says_how_to_look_for_it() -> None:
    with pytest.raises(MissingComponentError, match="apt-file search nosuchelement"):
        require_elements(("nosuchelement",))


ABSENT = [
    # files in the system's folder, what the error says
    ((), "apt-get install python3-gi"),
    (("_gi.cpython-39-x86_64-linux-gnu.so",), "built for cpython-39-x86_64-linux-gnu"),
]


@pytest.mark.parametrize(("files", "says"), ABSENT)
def test_without_the_bindings_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], says: str
) -> None:
    (tmp_path / "gi").mkdir()
    for name in files:
        (tmp_path / "gi" / name).touch()
    monkeypatch.setattr(gst_module, "_SYSTEM_PACKAGES", tmp_path)
    with pytest.raises(MissingComponentError, match=says):
        gst_module._import_system_gi()


def test_importing_streams_does_not_import_gstreamer_or_the_other_parts() -> None:
    code = (
        "import sys, keepsight.streams, keepsight.streams.cli; "
        "heavy = {'gi', 'torch', 'onnxruntime', 'keepsight.runtime', 'keepsight.export'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_bindings_are_taken_from_the_system() -> None:
    code = (
        "import sys; before = list(sys.path); from keepsight.streams.gst import load_gst; load_gst(); load_gst(); "
        "assert sys.path == before; import gi"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_a_user_types_is_spliced_into_a_pipeline() -> None:
    for typed in ("a ! fakesink.mp4", "rtsp://u:p ! x@h/ ! fakesink", "http://h/ ! fakesink", "v4l2:///dev/x ! fakesink"):
        recipe = recipe_for(SourceURI.parse(typed), View(), "every")
        assert "fakesink" not in recipe.launch and "fakesink" in str(recipe.origin)
