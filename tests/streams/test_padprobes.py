"""Pad probes that share a callback do what the bindings' own do, and leave nothing behind."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from typing import Any

import pytest

from keepsight.streams import padprobes
from keepsight.streams.gst import launch, load_gst

LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every probe is the bindings' own")


class Heap(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>."""

    _fields_ = (("before", 7 * ctypes.c_size_t), ("uordblks", ctypes.c_size_t), ("after", 2 * ctypes.c_size_t))


def seen(monkeypatch: pytest.MonkeyPatch, *, shared: bool, kept: int = 1) -> list[Any]:
    """What a probe is shown of a stream of coded pictures, of which it lets each `kept`-th one pass, and how many pass."""
    if not shared:
        monkeypatch.setattr(padprobes, "_shared", lambda: None)
    gst = load_gst()
    pipeline = launch(
        "videotestsrc num-buffers=20 ! video/x-raw,width=64,height=48,framerate=25/1 ! jpegenc ! identity name=at "
        "! appsink name=end sync=false"
    )
    shown: list[Any] = []

    def on_data(buffer: Any, event: Any) -> bool:
        if buffer is None:
            name = event.parse_caps().to_string() if event.type == gst.EventType.CAPS else event.type.value_nick
            shown.append(name)
            return True
        whole = buffer.whole
        assert (buffer.pts, buffer.duration, buffer.flags) == (whole.pts, whole.duration, int(whole.get_flags()))
        shown.append((buffer.pts, buffer.duration, buffer.flags & int(gst.BufferFlags.DISCONT), whole.get_size()))
        return len(shown) % kept == 0

    padprobes.add_probe(pipeline.get_by_name("at").get_static_pad("sink"), on_data)
    pipeline.set_state(gst.State.PLAYING)
    passed = 0
    while pipeline.get_by_name("end").try_pull_sample(5 * gst.SECOND) is not None:
        passed += 1
    pipeline.set_state(gst.State.NULL)
    return [*shown, passed]


@LINUX_ONLY
@pytest.mark.parametrize("kept", [1, 3])
def test_a_probe_is_shown_what_the_bindings_show_and_drops_likewise(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    assert padprobes._shared() is not None
    shared = seen(monkeypatch, shared=True, kept=kept)
    assert shared == seen(monkeypatch, shared=False, kept=kept)
    assert sum(isinstance(what, tuple) for what in shared) == 20 and "eos" in shared
    assert shared[-1] == 20 if kept == 1 else 0 < shared[-1] < 10


@LINUX_ONLY
def test_a_probe_of_events_is_shown_no_buffer() -> None:
    gst = load_gst()
    pipeline = launch("videotestsrc num-buffers=3 ! identity name=at ! fakesink")
    kinds: list[bool] = []

    def on_data(buffer: Any, event: Any) -> bool:
        kinds.append(buffer is None)
        return True

    padprobes.add_probe(pipeline.get_by_name("at").get_static_pad("sink"), on_data, buffers=False)
    pipeline.set_state(gst.State.PLAYING)
    assert pipeline.get_bus().timed_pop_filtered(5 * gst.SECOND, gst.MessageType.EOS) is not None
    pipeline.set_state(gst.State.NULL)
    assert kinds and all(kinds)


@LINUX_ONLY
def test_what_raises_is_logged_and_lets_all_pass(caplog: pytest.LogCaptureFixture) -> None:
    gst = load_gst()
    pipeline = launch("videotestsrc num-buffers=3 ! identity name=at ! appsink name=end sync=false")

    def on_data(buffer: Any, event: Any) -> bool:
        raise ArithmeticError("on purpose")

    with caplog.at_level(logging.ERROR, "keepsight.streams"):
        padprobes.add_probe(pipeline.get_by_name("at").get_static_pad("sink"), on_data)
        pipeline.set_state(gst.State.PLAYING)
        passed = 0
        while pipeline.get_by_name("end").try_pull_sample(5 * gst.SECOND) is not None:
            passed += 1
        pipeline.set_state(gst.State.NULL)
    assert passed == 3 and "on purpose" in caplog.text


@LINUX_ONLY
def test_a_thousand_probes_leave_no_memory_and_no_function_behind() -> None:
    gst, shared = load_gst(), padprobes._shared()
    assert shared is not None
    in_use = ctypes.CDLL(None).mallinfo2
    in_use.restype = Heap

    def probed(*, removed: bool) -> None:
        pad = gst.Pad.new("pad", gst.PadDirection.SINK)
        probe = padprobes.add_probe(pad, lambda buffer, event: True)
        if removed:
            pad.remove_probe(probe)

    for count in range(100):
        probed(removed=count % 2 == 0)
    gc.collect()
    held, before = len(shared._functions), in_use().uordblks
    for count in range(1000):
        probed(removed=count % 2 == 0)
    gc.collect()
    assert len(shared._functions) == held
    assert in_use().uordblks - before < 16 * 1000  # the bindings' own leave 48 each
