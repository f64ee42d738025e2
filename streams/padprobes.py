"""Pad probes that leave nothing behind.

For each callable that they hand to C, the bindings of Debian 12 (PyGObject 3.42 over girepository 1.74) have the types of its
arguments laid out (`g_callable_info_create_closure`), and never free them: 48 bytes of heap for each `Gst.Pad.add_probe`, and a
camera that is lost and found makes four every time. So all probes share one C callback here, made once for the process; what it
is given as user data tells them apart. A buffer is read where it lies, with no object of the bindings around it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

from keepsight.streams.gst import load_gst

__all__ = ["OnData", "add_probe"]

OnData = Callable[[Any, Any], bool]
"""Called with a buffer and None, or with None and a Gst.Event; whether it may pass on. What this raises is logged, and it may.

Of a buffer there are `pts` and `duration` (ns, Gst.CLOCK_TIME_NONE for none), `flags` (an int, see Gst.BufferFlags) and `whole`,
the Gst.Buffer. It is there during the call only.
"""

_LIBRARY = "libgstreamer-1.0.so.0"
_log = logging.getLogger("keepsight.streams")


def add_probe(pad: Any, on_data: OnData, *, buffers: bool = True) -> int:
    """Have a function called with what comes down through a pad: its events, and its buffers if they are wanted.

    The pad holds the function for as long as it has the probe, so the function must not hold the pad's pipeline.

    Returns:
        What `Gst.Pad.remove_probe` takes.
    """
    kinds = load_gst().PadProbeType
    mask = kinds.BUFFER | kinds.EVENT_DOWNSTREAM if buffers else kinds.EVENT_DOWNSTREAM
    shared = _shared()
    return _add_by_bindings(pad, on_data, mask) if shared is None else shared.add(pad, on_data, int(mask))


def _add_by_bindings(pad: Any, on_data: OnData, mask: Any) -> int:
    """The same with a closure of its own for each probe."""
    gst = load_gst()

    def on_pad(_: Any, info: Any) -> Any:
        is_buffer = bool(info.type & gst.PadProbeType.BUFFER)
        passes = on_data(_Bound(info.get_buffer()), None) if is_buffer else on_data(None, info.get_event())
        return gst.PadProbeReturn.OK if passes else gst.PadProbeReturn.DROP

    probe: int = pad.add_probe(mask, on_pad)
    return probe


class _Bound:
    """A buffer as the bindings have it."""

    def __init__(self, buffer: Any) -> None:
        self.whole, self.pts, self.duration, self.flags = buffer, buffer.pts, buffer.duration, int(buffer.get_flags())


class _Buffer(ctypes.Structure):
    """A buffer as it lies in memory: GstMiniObject and the head of GstBuffer, the same for all of GStreamer 1."""

    _fields_ = (
        ("type", ctypes.c_size_t),
        ("reference_count", ctypes.c_int),
        ("lock_state", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("copy", ctypes.c_void_p),
        ("dispose", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
        ("private_number", ctypes.c_uint),
        ("private_pointer", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("pts", ctypes.c_uint64),
        ("dts", ctypes.c_uint64),
        ("duration", ctypes.c_uint64),
    )

    @property
    def whole(self) -> Any:
        return _object_at(load_gst().Buffer, ctypes.addressof(self))


class _Info(ctypes.Structure):
    """The head of GstPadProbeInfo."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_ulong), ("data", ctypes.c_void_p))


def _object_at(kind: Any, address: int) -> Any:
    """The bindings' object, with a reference of its own, for what lies at an address."""
    from gi.repository import GObject

    value = GObject.Value(kind)
    # The method that the bindings put in its place takes objects only.
    super(GObject.Value, value).set_boxed(address)
    return value.get_value()


class _Shared:
    """The one callback, and which function is meant by each of the numbers that it is called with."""

    def __init__(self, library: ctypes.CDLL) -> None:
        gst = load_gst()
        self._event, self._is_buffer = gst.Event, int(gst.PadProbeType.BUFFER)
        self._pass, self._drop = int(gst.PadProbeReturn.OK), int(gst.PadProbeReturn.DROP)
        self._functions: dict[int, OnData] = {}
        self._numbers = count(1)  # 0 would come back as None
        called = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        gone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._called, self._gone = called(self._on_data), gone(self._forget)
        for callback in (self._called, self._gone):  # GStreamer's threads may outlive Python's modules
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
        self._add = library.gst_pad_add_probe
        self._add.argtypes = (ctypes.c_void_p, ctypes.c_int, called, ctypes.c_void_p, gone)
        self._add.restype = ctypes.c_ulong

    def add(self, pad: Any, on_data: OnData, mask: int) -> int:
        number = next(self._numbers)
        self._functions[number] = on_data
        probe: int = self._add(_address_of(pad), mask, self._called, number, self._gone)
        return probe

    def _on_data(self, _: int, info_at: int, number: int) -> int:
        try:
            info, on_data = _Info.from_address(info_at), self._functions[number]
            if info.type & self._is_buffer:
                passes = on_data(_Buffer.from_address(info.data), None)
            else:
                passes = on_data(None, _object_at(self._event, info.data))
        except Exception:  # there is nobody to raise it to
            _log.exception("a pad probe failed")
            return self._pass
        return self._pass if passes else self._drop

    def _forget(self, number: int) -> None:
        self._functions.pop(number, None)


def _address_of(pad: Any) -> int:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    address: int = get_pointer(pad.__gpointer__, None)
    return address


@lru_cache(maxsize=1)
def _shared() -> _Shared | None:
    """None where the library that the bindings have loaded can't be found by its name, as on macOS and Windows."""
    if sys.platform != "linux":
        return None
    load_gst()
    try:
        return _Shared(ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
    except OSError:
        return None
