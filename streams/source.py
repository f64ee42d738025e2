"""A camera, a video file, pictures or a test pattern, as an iterator of frames."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from keepsight.streams.arrays import ArrayFile, is_array_file
from keepsight.streams.branches import Branch
from keepsight.streams.capture import Arrivals, Capture, Picture, Timeouts
from keepsight.streams.errors import UsageError
from keepsight.streams.frame import Frame, wall_time_of
from keepsight.streams.images import ImageFiles, image_paths
from keepsight.streams.pipelines import Delivery
from keepsight.streams.presence import check_presence
from keepsight.streams.sampling import ChangeSampler, Sampler, sampler_for
from keepsight.streams.stills import Stills, StillSequence
from keepsight.streams.timing import PipelineTiming
from keepsight.streams.uri import SourceURI
from keepsight.streams.view import Aspect, Colorimetry, Conversion, Scaler, View

__all__ = ["Source"]

_USUAL_FPS = 30.0  # of a file with a single picture

Pace = Literal["auto", "offline", "realtime"]


class _Reader(Protocol):
    dropped: int

    def next(self) -> Picture | None: ...

    def duration_s(self) -> float | None: ...

    def close(self) -> None: ...


class Source(Iterator[Frame]):
    """Frames of a source, one after the other.

    A live source gives its newest frame: those that came while nobody asked are dropped and counted. A file gives
    every frame, as fast as they are read, unless `pace="realtime"` makes a camera of it.

    The address is checked at once; the pipeline starts with the first frame asked for, or on entering a `with`.
    One thread iterates; any thread may close.

    Args:
        uri: a path, `file://`, a directory of images, a `.npy` file of uint8 RGB frames `[T, H, W, 3]`, `test://ball`,
            `v4l2:///dev/video0`, `/dev/video0`, `csi://0`, `rtsp://user:password@host/path` (see `uri.SourceURI` for
            the options after `?`).
        size: (width, height) of the frames; None leaves the stored pixels as they are.
        aspect: `stretch` fills `size`; `letterbox` keeps the shape and adds black borders.
        scaler: how `size` is reached, one of `view.Scaler`: GStreamer's `nearest`, `bilinear`, `sinc-4tap`,
            `bilinear-antialias`, `bicubic-antialias`, `lanczos`; or PyTorch's `bicubic`, and `bicubic-wrap` whose
            overshoot wraps around.
        colorimetry: `bt601` or `bt709` reads YUV with that matrix whatever the stream says; None believes the stream.
        conversion: `exact` goes from YUV to RGB through 16 bits; `8-bit` is quicker, and 2 to 4 levels too dark.
        fps: frames wanted per second of the stream, the first at or after each `k / fps`; None is every frame.
            For pictures and `.npy` frames, of which every one is given, it is their rate, 1 by default.
        every: each how manieth frame is wanted, the first one included; None is every one.
        change: only frames that differ from the last one given by so many levels of luma, and one every 10 s of a scene that
            stands still (see `sampling.ChangeSampler`). Only one of `fps`, `every` and `change` can be given.
        change_floor_s: other seconds instead of those 10; math.inf for none while nothing changes.
        hardware_scaling: let a Jetson's video hardware scale (see `view.View`).
        pace: `auto` plays what is live as live and files offline; `offline` gives every frame of a file or of a test
            pattern; `realtime` plays a file at its own speed, newest frame first.
        first_frame_timeout_s: seconds to wait for the first frame.
        stall_timeout_s: seconds to wait for each frame after it.
        branches: what hangs on the stream beside the frames, such as a recorder's or a preview's; none on pictures and arrays.
        timing: times each frame's way through the pipeline, for a profile; pictures and arrays that lie ready have none.

    Raises:
        UsageError: an address or an option that makes no sense.
        SourceNotFoundError: no such file or device; while iterating: a host or a path that can't be reached.
        SourceUnreadableError: empty, not a video, no video in it, no decoder, a `.npy` of something else; while
            iterating: truncated, or damaged so that pictures can't be decoded (after all the frames that are there).
        NoFrameError: while iterating: no first frame in time.
        SourceLostError: while iterating: a live source ended or stalled.
        MissingComponentError: GStreamer or one of its elements is not installed.

    >>> with Source("test://ball?frames=3", size=(64, 48), pace="offline") as source:
    ...     [frame.image.shape for frame in source]
    [(48, 64, 3), (48, 64, 3), (48, 64, 3)]
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        size: tuple[int, int] | None = None,
        aspect: Aspect = "stretch",
        scaler: Scaler = "bilinear",
        colorimetry: Colorimetry | None = None,
        conversion: Conversion = "exact",
        fps: float | None = None,
        every: int | None = None,
        change: float | None = None,
        change_floor_s: float | None = None,
        hardware_scaling: bool = False,
        pace: Pace = "auto",
        first_frame_timeout_s: float = 10.0,
        stall_timeout_s: float = 5.0,
        branches: Sequence[Branch] = (),
        timing: PipelineTiming | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._reader: _Reader | None = None
        self.uri = SourceURI.parse(uri)
        self._view = View(size, aspect, scaler, colorimetry, conversion, hardware_scaling)
        self._pace = pace
        self._delivery = _delivery(self.uri, pace)
        self._timeouts = Timeouts(first_frame_timeout_s, stall_timeout_s)
        self._fps, self._branches, self._timing = fps, tuple(branches), timing
        self._policy = (fps, every, change, change_floor_s)
        self._sampler = sampler_for(*self._policy)
        self._stills = _present_stills(self.uri, self._view, self._timeouts)
        self._ahead: Picture | None = None
        self._epoch_s: float | None = None
        self._time_s = 0.0
        self._delivered = 0
        self._rounds, self._offset_s = 1, 0.0  # of a file that is played over and over
        self._drops: Counter[str] = Counter()  # of its rounds that are over
        self._before_s: float | None = None
        self._played_to_s: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether the world goes on while nobody looks: a camera, or a test pattern that is not read offline."""
        return self._delivery == "newest"

    @property
    def drops(self) -> Counter[str]:
        """Frames that came and were not handed over, by cause (see `live.Drop`): `replaced` and `damaged`."""
        drops = Counter(self._drops)
        drops["replaced"] += 0 if self._reader is None else self._reader.dropped
        drops["damaged"] += self._reader.ledger.lost if isinstance(self._reader, Capture) else 0
        return drops

    @property
    def dropped(self) -> int:
        """The sum of `drops`. What a sampling policy leaves out is no drop."""
        return self.drops.total()

    @property
    def corrupted(self) -> int:
        """Frames that were handed over although the decoder had marked them as damaged; few decoders do either."""
        return self._reader.ledger.corrupted if isinstance(self._reader, Capture) else 0

    @property
    def arrivals(self) -> Arrivals | None:
        """Rate and size of what has been decoded; None before it is opened, and for pictures and `.npy` frames."""
        return self._reader.arrivals if isinstance(self._reader, Capture) else None

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots that frames lie in while somebody holds them; 0 for pictures and `.npy` frames."""
        return self._reader.ring.nbytes if isinstance(self._reader, Capture) else 0

    @property
    def duration_s(self) -> float | None:
        """Length in seconds; None for what is live or does not say. Opens the source, as asking for a frame does."""
        if self.is_live:
            return None
        if self._stills is None and self._ahead is None and self._delivered == 0:
            self._ahead = self._read()
        reader = self._open()
        return None if reader is None else reader.duration_s()

    def __next__(self) -> Frame:
        picture, self._ahead = self._ahead, None
        picture = picture or self._read()
        if picture is None:
            self.close()
            raise StopIteration
        frame = Frame(
            picture.image, self._forward(picture.time_s), picture.captured_at, self._delivered, picture.pts_ns,
            picture.running_time_s, wall_time_of(picture.captured_at) if self.is_live else None,
        )  # fmt: skip
        self._delivered += 1
        return frame

    def close(self) -> None:
        """Stop and give everything back. An iteration in another thread ends; closing twice does nothing."""
        with self._lock:
            self._closed = True
            reader = self._reader
        if reader is not None:
            reader.close()

    def __enter__(self) -> Source:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A source nobody closed would go on playing; one whose __init__ raised has nothing to close.
        if getattr(self, "_reader", None) is not None:
            self.close()

    def __repr__(self) -> str:
        view = self._view
        options = f", size={view.size}, aspect={view.aspect!r}, scaler={view.scaler!r}, fps={self._fps}, pace={self._pace!r}"
        return f"Source({self.uri.redacted!r}{options})"

    def _open(self) -> _Reader | None:
        with self._lock:
            if self._reader is None and not self._closed:
                self._reader = self._make_reader()
            return self._reader

    def _make_reader(self) -> _Reader:
        if self._stills is not None:
            return StillSequence(self._stills, fps=self._fps or 1.0, realtime=self._delivery != "every")
        # A newest-wins reader is sampled here, on what is newest when it is asked; sampled earlier, the frame that
        # waits could be nearly 1/fps old.
        early = None if self._delivery != "every" or isinstance(self._sampler, ChangeSampler) else self._sampler
        return Capture(self.uri, self._view, self._delivery, self._timeouts, early, self._branches, self._timing)

    def _read(self) -> Picture | None:
        """The next picture that is wanted, its time counted from the stream's start."""
        reader = self._open()
        while reader is not None and not self._closed:
            try:
                picture = reader.next()
            except BaseException:
                self.close()
                raise
            if picture is None:
                reader = self._begun_again()
                continue
            picture = self._dated(picture)
            if self._wanted(picture):
                return picture
        return None

    def _wanted(self, picture: Picture) -> bool:
        sampler = self._sampler
        if isinstance(sampler, ChangeSampler):
            return sampler.take_picture(picture.time_s, picture.image)
        # Of pictures that lie ready, `fps` is the rate; a reader of every frame has sampled already.
        chosen = isinstance(sampler, Sampler) if self._stills is not None else self._delivery == "every"
        return chosen or sampler is None or sampler.take(picture.time_s)

    def _begun_again(self) -> _Reader | None:
        """A reader at the beginning, if the address asks for another round and the last one gave anything."""
        rounds = self.uri.options.get("loop", 1)
        if self._played_to_s is None or self._rounds == rounds or self.is_live:
            return None
        with self._lock:
            if self._closed or self._reader is None:
                return None
            self._reader.close()
            self._drops = self.drops
            self._reader = None
            if self._stills is not None:  # what was closed stays closed
                self._stills = _present_stills(self.uri, self._view, self._timeouts)
            self._sampler = sampler_for(*self._policy)
        self._rounds += 1
        self._offset_s, self._played_to_s = self._played_to_s, None
        return self._open()

    def _dated(self, picture: Picture) -> Picture:
        if not self.is_live:
            time_s = picture.time_s + self._offset_s
            # The last picture is shown for as long as the one before it.
            interval = 0.0 if self._before_s is None else max(0.0, time_s - self._before_s)
            self._before_s, self._played_to_s = time_s, time_s + (interval or 1 / (self._fps or _USUAL_FPS))
            return replace(picture, time_s=time_s)
        # A camera's stream starts with its first frame, not with the time it took to connect.
        if self._epoch_s is None:
            self._epoch_s = picture.captured_at
        return replace(picture, time_s=max(0.0, picture.captured_at - self._epoch_s))

    def _forward(self, time_s: float) -> float:
        self._time_s = max(self._time_s, time_s)
        return self._time_s


def _delivery(uri: SourceURI, pace: Pace) -> Delivery:
    if pace not in ("auto", "offline", "realtime"):
        raise UsageError(f"pace={pace!r} is not known.", fix="Use 'auto', 'offline' or 'realtime'.")
    if not uri.is_camera:
        return "newest-in-time" if pace == "realtime" else "every"
    if pace == "offline" and uri.kind != "test":
        raise UsageError(f"{uri} is live and can't be read offline.", fix="Leave pace='auto'.")
    return "every" if pace == "offline" else "newest"


def _present_stills(uri: SourceURI, view: View, timeouts: Timeouts) -> Stills | None:
    """Refuse what is not there before GStreamer is asked, whose answers are vaguer; find pictures that lie ready."""
    check_presence(uri)
    return _stills_at(uri, view, timeouts) if uri.kind == "file" else None


def _stills_at(uri: SourceURI, view: View, timeouts: Timeouts) -> Stills | None:
    path, flip = Path(uri.location), uri.options.get("flip")
    if is_array_file(path):
        if flip is not None:
            raise UsageError("flip= is not for frames of a .npy file.", fix="Turn the array: frames[:, ::-1, ::-1] for 180.")
        return ArrayFile(path, view, timeouts)
    images = image_paths(path)
    return None if images is None else ImageFiles(images, view, timeouts, {} if flip is None else {"flip": flip})
