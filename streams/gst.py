"""GStreamer from Python: loading it, checking its elements, reading its messages, copying its pictures."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keepsight.streams.errors import MissingComponentError, UsageError
from keepsight.streams.ring import FrameRing

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BRANCH_PREFIX",
    "array_to_buffer",
    "debian_package",
    "first_error",
    "has_element",
    "is_inside",
    "launch",
    "launch_bin",
    "load_gst",
    "pixel_aspect",
    "require_elements",
    "sample_to_array",
    "state_colorimetry",
]

# Where Debian, Ubuntu and JetPack put Python packages for their own Python.
_SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")

_APT_LINE = (
    "apt-get install python3-gi python3-gst-1.0 gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 "
    "gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-libav"
)
_INSTALL = f'On Debian, Ubuntu and JetPack: {_APT_LINE}. On macOS and Windows: pip install "gstreamer-bundle~=1.28".'

_PACKAGE_OF = {
    "gstreamer1.0-plugins-base": (
        "appsink appsrc audioconvert audioresample audiotestsrc decodebin opusdec parsebin playbin uridecodebin videoconvert "
        "videoscale videotestsrc typefind"
    ),
    "gstreamer1.0-plugins-good": (
        "rtph265depay rtpjitterbuffer rtpjpegdepay souphttpsrc udpsrc "
        "avidemux capssetter imagefreeze jpegdec jpegenc matroskademux matroskamux mp4mux pngdec pngenc qtdemux rtph264depay "
        "rtspsrc v4l2src videoflip vp8enc"
    ),
    "gstreamer1.0-plugins-bad": "errorignore hlsdemux jpegparse h264parse h265parse openh264dec openh264enc",
    "gstreamer1.0-alsa": "alsasrc",
    "gstreamer1.0-pulseaudio": "pulsesrc",  # in Debian 12 a name for gstreamer1.0-plugins-good
    "gstreamer1.0-plugins-ugly": "x264enc",
    "gstreamer1.0-libav": "avdec_h264 avdec_h265",
    "libgstreamer1.0-0": "capsfilter filesink filesrc identity queue tee",
    "nvidia-l4t-gstreamer (JetPack only)": "nvarguscamerasrc nvjpegdec nvv4l2decoder nvv4l2h264enc nvvidconv",
}

# Bins whose name begins so hold side branches (see `branches`).
BRANCH_PREFIX = "branch-"

_lock = threading.Lock()


def load_gst() -> Any:
    """Import GStreamer's Python bindings and initialise the library.

    PyGObject is a package of the system (`python3-gi`), which a virtual environment does not see. Where it is not
    installed here and the system's was built for this very version of Python, that one is used, and nothing else of
    the system's packages.

    Returns:
        The module `gi.repository.Gst`, initialised. `GstApp` and `GstVideo` are loaded too.

    Raises:
        MissingComponentError: with the line that installs what is missing.
    """
    with _lock:  # importing the system's `gi` is a change of `sys.modules` that two threads must not interleave
        return _load()


@lru_cache(maxsize=1)
def _load() -> Any:
    _put_unwinder_first()
    if "gi" not in sys.modules and importlib.util.find_spec("gi") is None:
        _import_system_gi()
    try:
        with warnings.catch_warnings():
            # Older bindings load their modules in a way that newer Pythons call outdated.
            warnings.simplefilter("ignore")
            import gi

            for name in ("Gst", "GstApp", "GstVideo"):
                gi.require_version(name, "1.0")
            from gi.repository import GLib, Gst, GstApp, GstVideo  # noqa: F401  (GstApp gives appsink its methods)
    except (ImportError, ValueError) as error:
        raise MissingComponentError(f"GStreamer can't be used from Python: {error}.", fix=_INSTALL) from error
    # init_check gives (done, argv) from some versions of the bindings and a bare bool from others.
    Gst.init_check(None)
    if not Gst.is_initialized():
        raise MissingComponentError("GStreamer's libraries are here but refuse to start.", fix=_INSTALL)
    return Gst


def _put_unwinder_first() -> None:
    """Make the compiler's own unwinder the one that every library finds.

    GStreamer brings in libunwind, which defines the same symbols. Whatever is loaded after it (ONNX Runtime, llama.cpp,
    PyTorch) would mix the two, and the next C++ exception inside it would abort the process instead of being caught.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a system without libgcc has no such clash
            ctypes.CDLL("libgcc_s.so.1", mode=ctypes.RTLD_GLOBAL)


def _import_system_gi() -> None:
    folder = _SYSTEM_PACKAGES / "gi"
    extension = folder / f"_gi{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not extension.exists():
        raise _no_bindings(folder)
    spec = importlib.util.spec_from_file_location("gi", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None  # the location is a file: there is always a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gi"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules["gi"]
        if isinstance(error, ImportError):
            raise MissingComponentError(f"{folder} can't be imported: {error}.", fix=_INSTALL) from error
        raise


def _no_bindings(folder: Path) -> MissingComponentError:
    built_for = sorted(path.name.split(".")[1] for path in folder.glob("_gi.*.so"))
    if not built_for:
        return MissingComponentError("GStreamer's Python bindings are not installed.", fix=_INSTALL)
    mine = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return MissingComponentError(
        f"the system's python3-gi is built for {', '.join(built_for)}, and this is {mine}.",
        fix="Make the virtual environment with the system's /usr/bin/python3, or build the bindings for this Python: "
        "apt-get install libgirepository1.0-dev libcairo2-dev pkg-config && pip install 'PyGObject>=3.42,<3.51'.",
    )


def has_element(name: str) -> bool:
    """Whether GStreamer knows an element of this name."""
    return load_gst().ElementFactory.find(name) is not None


def debian_package(element: str) -> str | None:
    """The Debian package that brings an element, or None if we don't know."""
    for package, elements in _PACKAGE_OF.items():
        if element in elements.split():
            return package
    return None


def require_elements(names: Iterable[str]) -> None:
    """Check that every element is installed.

    Raises:
        MissingComponentError: naming each missing one and the packages that bring them.
    """
    missing = [name for name in names if not has_element(name)]
    if not missing:
        return
    packages = sorted({package for name in missing if (package := debian_package(name)) is not None})
    jetpack = [package for package in packages if "JetPack" in package]
    if jetpack:
        fix = "That element comes with NVIDIA's JetPack and exists on a Jetson only: use another source here."
    elif packages:
        fix = f"apt-get install {' '.join(packages)}."
    else:
        fix = f"Find the package that has it, for instance with: apt-file search {missing[0]}."
    plural = "elements" if len(missing) > 1 else "element"
    raise MissingComponentError(f"GStreamer lacks the {plural} {', '.join(missing)}.", fix=fix)


def launch(description: str) -> Any:
    """Build a pipeline from gst-launch's language. It is not started.

    Raises:
        UsageError: GStreamer can't build it; the text is GStreamer's.
    """
    gst = load_gst()
    from gi.repository import GLib

    try:
        return gst.parse_launch(description)
    except GLib.Error as error:
        raise UsageError(f"GStreamer can't build the pipeline: {error.message}.", fix=f"It was: {description}") from error


def launch_bin(description: str) -> Any:
    """Build a bin from gst-launch's language, with a pad for each that its elements left open.

    Raises:
        UsageError: GStreamer can't build it; the text is GStreamer's.
    """
    gst = load_gst()
    from gi.repository import GLib

    try:
        return gst.parse_bin_from_description(description, True)
    except GLib.Error as error:
        raise UsageError(f"GStreamer can't build the branch: {error.message}.", fix=f"It was: {description}") from error


def is_inside(element: Any, prefix: str) -> bool:
    """Whether an element lies in a bin whose name begins so, or is one."""
    while element is not None:
        if element.get_name().startswith(prefix):
            return True
        element = element.get_parent()
    return False


def first_error(bus: Any) -> Any | None:
    """Take everything off the bus and return the oldest ERROR message, or None.

    The oldest is the cause; those behind it ("Internal data stream error.") are its consequences. What a side branch reports
    is no error of the source's.
    """
    gst = load_gst()
    found = None
    while (message := bus.pop_filtered(gst.MessageType.ERROR)) is not None:
        if found is None and not is_inside(message.src, BRANCH_PREFIX):
            found = message
    return found


def state_colorimetry(setter: Any, matrix: str | None) -> None:
    """Make a capssetter write the colorimetry of the YUV that passes it into its caps, where a decoder has not.

    GStreamer takes what does not say for BT.709 above 576 rows and for BT.601 below, each element for itself: a picture
    that crosses that height when it is scaled would be converted from one to the other on the way, in 8 bits.

    Args:
        setter: the element, in a pipeline that has not started.
        matrix: `bt601` or `bt709` to read it with that one, whatever the stream says. The range stays as it is: a JPEG's
            is the full one. What is not YUV passes as it is.
    """
    gst = load_gst()
    from gi.repository import GstVideo

    from keepsight.streams.padprobes import add_probe

    forced = None if matrix is None else int(getattr(GstVideo.VideoColorMatrix, matrix.upper()))

    # A probe that held the element would keep it for ever, and be kept by it.
    setter_or_none = setter.weak_ref()

    def on_event(_: Any, event: Any) -> bool:
        if event.type == gst.EventType.CAPS:
            caps = event.parse_caps()
            if not caps.get_structure(0).get_name().startswith("video/"):  # a file of sound alone reaches this, too
                return True
            stream = GstVideo.VideoInfo.new_from_caps(caps)
            if stream.finfo.flags & GstVideo.VideoFormatFlags.YUV:
                own = stream.colorimetry
                said = (own.range, own.matrix if forced is None else forced, own.transfer, own.primaries)
                colorimetry = ":".join(str(int(part)) for part in said)
                told = gst.Caps.from_string(f"video/x-raw,colorimetry=(string){colorimetry}")
                setter_or_none().set_property("caps", told)
        return True

    add_probe(setter.get_static_pad("sink"), on_event, buffers=False)


def array_to_buffer(image: NDArray[np.uint8]) -> Any:
    """Copy a picture, uint8 `[H, W, 3]`, into a buffer for caps of `video/x-raw, format=RGB`; its time is not set."""
    height, width, _ = image.shape
    stride = (3 * width + 3) // 4 * 4  # GStreamer wants rows of RGB at multiples of 4 bytes
    rows = np.zeros((height, stride), np.uint8)
    rows[:, : 3 * width] = image.reshape(height, 3 * width)
    return load_gst().Buffer.new_wrapped(rows.tobytes())


def pixel_aspect(sample: Any) -> float:
    """Width of a sample's pixels over their height; 1 where its caps do not say."""
    known, width, height = sample.get_caps().get_structure(0).get_fraction("pixel-aspect-ratio")
    return width / height if known and width > 0 and height > 0 else 1.0


def sample_to_array(sample: Any, ring: FrameRing | None = None) -> NDArray[np.uint8]:
    """Copy the picture out of a sample whose caps are `video/x-raw, format=RGB`.

    Rows are padded to 4 bytes in GStreamer's memory, and hardware may pad more: the copy has none. It is the only copy, but for
    PyPI's build of the bindings, which make one of their own before.

    Args:
        sample: of an appsink.
        ring: where the memory for it comes from; None lays out new memory.

    Returns:
        uint8 `[H, W, 3]`, C-contiguous, in memory that nobody else uses.
    """
    gst = load_gst()
    from gi.repository import GstVideo

    info = GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    buffer = sample.get_buffer()
    meta = GstVideo.buffer_get_video_meta(buffer)
    stride, offset = (meta.stride[0], meta.offset[0]) if meta is not None else (info.stride[0], info.offset[0])
    mapped, memory = buffer.map(gst.MapFlags.READ)
    if not mapped:
        raise MemoryError("GStreamer could not map a video buffer into memory")
    try:
        # `memory.data` is a view with the distribution's bindings and a copy with PyPI's: both serve as a buffer.
        view = np.ndarray((info.height, info.width, 3), np.uint8, buffer=memory.data, offset=offset, strides=(stride, 3, 1))
        image = np.empty(view.shape, np.uint8) if ring is None else ring.take(view.shape)
        np.copyto(image, view)
        return image
    finally:
        # The view ends with this function: GStreamer reuses the memory as soon as it is unmapped.
        buffer.unmap(memory)
