"""Time on the device between two CUDA events: the host's clock would tell how long it waited, not what kernels took."""

from __future__ import annotations

from types import TracebackType

from keepsight.runtime.graphs.cuda import DeviceEvent, DeviceStream

__all__ = ["DeviceClock"]


class DeviceClock:
    """Two events on a stream, around what is enqueued within `with`. Read it when that is to be done.

    The event before waits, as the kernels do, for all that was enqueued earlier: copies of inputs are not counted.
    """

    def __init__(self, stream: DeviceStream) -> None:
        self._stream = stream
        with stream:
            self._events: tuple[DeviceEvent, ...] = (stream.event(), stream.event())

    def __enter__(self) -> DeviceClock:
        self._events[0].record()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._events[1].record()

    def read_ms(self) -> float:
        """Milliseconds between the two, on the device's clock (to half a microsecond); waits until the second has passed."""
        before, behind = self._events
        with self._stream:
            return behind.ms_since(before)

    def close(self) -> None:
        """Free the events; closing twice is no error."""
        with self._stream:
            for event in self._events:
                event.close()
        self._events = ()
