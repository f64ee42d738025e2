"""From a source's address to the GStreamer pipeline that reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from keepsight.streams.boards import DECODER as DECODER
from keepsight.streams.boards import Board, Codec, Decoding, Memory, Piece, this_board
from keepsight.streams.branches import BRANCH_ELEMENTS, Branch, Place, attach
from keepsight.streams.errors import UsageError
from keepsight.streams.gst import launch, load_gst, require_elements, state_colorimetry
from keepsight.streams.uri import Flip, Option, SourceURI
from keepsight.streams.view import Colorimetry, Scaler, View

__all__ = ["Branch", "Delivery", "Piece", "Recipe", "build", "recipe_for", "recipe_for_pictures"]

Delivery = Literal["every", "newest", "newest-in-time"]

# Names of the elements that the capture looks up.
FRAMES, TAP, ORIGIN, COLOURS = "frames", "tap", "origin", "colours"
# And of the tees that branches hang on.
CODED, DECODED = "coded", "decoded"

_CSI_DEFAULTS: Mapping[str, Option] = {"width": 1280, "height": 720, "fps": Fraction(30)}
_RTP_LATENCY_MS = 200
_RTP_SOCKET_BYTES = 2 << 20  # a key frame comes as a burst of packets


@dataclass(frozen=True, slots=True)
class Recipe:
    """A pipeline, not built yet.

    Attributes:
        pieces: its parts, in the order of the stream. No text of the user's is in them: that would need quoting.
        origin: properties to set on the source element.
        colorimetry: the matrix to read YUV with; None for the stream's own.
        places: side branches, and where they hang.
    """

    pieces: tuple[Piece, ...]
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)  # with passwords
    colorimetry: Colorimetry | None = None
    places: tuple[Place, ...] = ()

    @property
    def launch(self) -> str:
        """The pipeline in gst-launch's language, without its branches."""
        return " ! ".join(piece.launch for piece in self.pieces)

    @property
    def elements(self) -> tuple[str, ...]:
        """What must be installed, for the branches too."""
        needed = [name for piece in self.pieces for name in piece.elements]
        for place in self.places:
            needed += [*BRANCH_ELEMENTS, *place.elements]
        return tuple(dict.fromkeys(needed))


@dataclass(frozen=True, slots=True)
class _Head:
    """What brings a kind of source in: its pieces up to raw video, where that lies, and what to set on the first element."""

    pieces: tuple[Piece, ...]
    memory: Memory
    properties: Mapping[str, Any] = field(default_factory=dict, repr=False)


def recipe_for(
    uri: SourceURI, view: View, delivery: Delivery, branches: Sequence[Branch] = (), *, board: Board | None = None
) -> Recipe:
    """Say how to read a source.

    Args:
        uri: the source. Its file or device need not exist.
        view: size and shape of the pictures.
        delivery: `every` frame as fast as it is read, waiting for the reader; the `newest` as soon as it is there;
            or the `newest-in-time`, each when its time has come.
        branches: what hangs on the stream beside the frames. Without any, the pipeline has no tee.
        board: what it is to run on; None for this machine.

    Raises:
        UsageError: no such test pattern; a view that the board can't give.
    """
    board = board or this_board()
    head = _HEADS[uri.kind](uri, delivery, board)
    places, pieces = _places(head, branches, board)
    flip: Flip = uri.options.get("flip", "none")  # type: ignore[assignment]  # the parser lets nothing else in
    to_host = board.to_host(head.memory, view, flip)
    live = delivery == "newest"
    if to_host is None:
        end: tuple[Piece, ...] = (_tail(view, delivery, tap=_QUEUE if live else f"videoconvert name={TAP}", flip=flip),)
    else:  # what the sampler refuses, or a newer picture replaces, is not even copied
        tap, element = (_QUEUE, "queue") if live else (f"identity name={TAP}", "identity")
        to_host = replace(to_host, launch=f"{tap} ! {to_host.launch}", elements=(element, *to_host.elements))
        end = (to_host, _tail(view, delivery, tap=None, flip="none"))
    return Recipe((*pieces, *end), head.properties, view.colorimetry, places)


def recipe_for_pictures(width: int, height: int, view: View) -> Recipe:
    """Say how to scale RGB pictures of width x height that are pushed into the element `ORIGIN`."""
    caps = f"video/x-raw,format=RGB,width={width},height={height},framerate=1/1,pixel-aspect-ratio=1/1"
    origin = Piece("origin", f"appsrc name={ORIGIN} format=time caps={caps}", ("appsrc",))
    return Recipe((origin, _tail(view, "every", tap=f"videoconvert name={TAP}", flip="none")))


def build(recipe: Recipe) -> Any:
    """Build a recipe's pipeline; it is not started.

    Raises:
        MissingComponentError: GStreamer or an element is not installed.
    """
    require_elements(recipe.elements)
    pipeline = launch(recipe.launch)
    origin = pipeline.get_by_name(ORIGIN)
    for name, value in recipe.origin.items():
        origin.set_property(name, value)
    state_colorimetry(pipeline.get_by_name(COLOURS), recipe.colorimetry)
    attach(pipeline, recipe.places)
    return pipeline


def pattern_names() -> list[str]:
    """The names that `test://` takes, as this machine's videotestsrc has them."""
    gst = load_gst()
    pattern = gst.ElementFactory.make("videotestsrc").find_property("pattern")
    # In PyGObject 3.50 `enum_class` and `default_value` are other things than before; this method is new there.
    default = pattern.get_default_value() if hasattr(pattern, "get_default_value") else pattern.default_value
    kind = type(default)
    values = kind.__enum_values__.values() if hasattr(kind, "__enum_values__") else kind  # an `enum.Enum` since 3.52
    return [value.value_nick for value in values]


def _file(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    origin = Piece("origin", f"filesrc name={ORIGIN}", ("filesrc",))
    return _decoded((origin,), board.decoding(None), {"location": uri.location})


def _http(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    # Pictures of a camera carry no times of their own.
    live = " is-live=true do-timestamp=true" if uri.is_camera else ""
    origin = Piece("origin", f"souphttpsrc name={ORIGIN}{live}", ("souphttpsrc",))
    return _decoded((origin,), board.decoding(None), _login(uri))


def _test(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    known = pattern_names()
    if uri.location not in known:
        raise UsageError(f"test://{uri.location} is not a test pattern.", fix=f"Use one of: {', '.join(known)}.")
    live = "false" if delivery == "every" else "true"
    options: dict[str, Option] = {"width": 640, "height": 480, "fps": Fraction(30), **uri.options}
    frames = options.get("frames", -1)
    launch = (
        f"videotestsrc name={ORIGIN} is-live={live} pattern={uri.location} num-buffers={frames} "
        f"! {_raw_caps('video/x-raw,format=I420', options)}"
    )
    return _Head((Piece("origin", launch, ("videotestsrc",)),), "host")


def _v4l2(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    encoding, source = uri.options.get("encoding"), f"v4l2src name={ORIGIN}"
    properties = {"device": uri.location}
    if encoding is None:
        caps = f" ! capsfilter caps={_raw_caps('video/x-raw', uri.options)};{_raw_caps('image/jpeg', uri.options)}"
        sized = {"width", "height", "fps"} & set(uri.options)
        origin = Piece("origin", f"{source}{caps if sized else ''}", ("v4l2src",))
        return _decoded((origin,), board.decoding(None), properties)
    media = {"raw": "video/x-raw", "mjpeg": "image/jpeg", "h264": "video/x-h264"}[str(encoding)]
    origin = Piece("origin", f"{source} ! {_raw_caps(media, uri.options)}", ("v4l2src",))
    if encoding == "raw":
        return _Head((origin,), "host", properties)
    codec: Codec = "mjpeg" if encoding == "mjpeg" else "h264"
    return _decoded((origin, _parsing(codec)), board.decoding(codec), properties)


def _csi(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    caps = _raw_caps("video/x-raw(memory:NVMM)", {**_CSI_DEFAULTS, **uri.options})
    launch = f"nvarguscamerasrc name={ORIGIN} sensor-id={int(uri.location)} ! {caps}"
    return _Head((Piece("origin", launch, ("nvarguscamerasrc",)),), "device")


def _rtsp(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    latency = uri.options.get("latency", _RTP_LATENCY_MS)
    # TCP unless asked otherwise: a lost packet smears the picture until the next key frame.
    transport = uri.options.get("transport", "tcp")
    launch = f"rtspsrc name={ORIGIN} latency={latency} drop-on-latency=true protocols={transport} ! application/x-rtp,media=video"
    return _rtp_decoded(uri, Piece("origin", launch, ("rtspsrc",)), board, _login(uri), uri.options.get("encoding"))


def _rtp(uri: SourceURI, delivery: Delivery, board: Board) -> _Head:
    latency, payload = uri.options.get("latency", _RTP_LATENCY_MS), uri.options.get("payload", 96)
    encoding = uri.options.get("encoding", "h264")
    caps = f"application/x-rtp,media=video,clock-rate=90000,encoding-name={str(encoding).upper()},payload={payload}"
    launch = f"udpsrc name={ORIGIN} caps={caps} ! rtpjitterbuffer latency={latency} drop-on-latency=true"
    address, _, port = uri.location.rpartition(":")
    properties = {"address": address.strip("[]"), "port": int(port), "buffer-size": _RTP_SOCKET_BYTES}
    return _rtp_decoded(uri, Piece("origin", launch, ("udpsrc", "rtpjitterbuffer")), board, properties, encoding)


def _rtp_decoded(uri: SourceURI, origin: Piece, board: Board, properties: Mapping[str, Any], encoding: Option | None) -> _Head:
    if encoding is None:
        return _decoded((origin,), board.decoding(None), properties)
    codec: Codec = "h265" if encoding == "h265" else "mjpeg" if encoding == "mjpeg" else "h264"
    return _decoded((origin, _parsing(codec, rtp=True)), board.decoding(codec), properties)


def _login(uri: SourceURI) -> dict[str, Any]:
    properties = {"location": uri.location}
    if uri.user is not None:
        properties["user-id"] = uri.user
        properties["user-pw"] = uri.password or ""
    return properties


def _decoded(pieces: tuple[Piece, ...], decoding: Decoding, properties: Mapping[str, Any]) -> _Head:
    return _Head((*pieces, decoding.piece), decoding.memory, properties)


def _parsing(codec: Codec, *, rtp: bool = False) -> Piece:
    parser, depayloader = {
        "h264": ("h264parse", "rtph264depay"),
        "h265": ("h265parse", "rtph265depay"),
        "mjpeg": ("jpegparse", "rtpjpegdepay"),
    }[codec]
    elements = (depayloader, parser) if rtp else (parser,)
    return Piece("parse", " ! ".join(elements), elements)


_HEADS = {"file": _file, "http": _http, "test": _test, "v4l2": _v4l2, "csi": _csi, "rtsp": _rtsp, "rtp": _rtp}


def _raw_caps(media: str, options: Mapping[str, Option]) -> str:
    caps = media
    for name in ("width", "height"):
        if name in options:
            caps += f",{name}={options[name]}"
    if "fps" in options:
        fps = Fraction(options["fps"])
        caps += f",framerate={fps.numerator}/{fps.denominator}"
    return caps


# Coded video that can be handed on as it is. Anything else that a demuxer finds, such as sound, is left where it is.
_CODED_CAPS = ";".join(
    ("video/x-h264", "video/x-h265", "image/jpeg", "video/x-vp8", "video/x-vp9", "video/x-av1", "video/mpeg", "video/x-h263")
)
_PARSED_CAPS = re.sub(r"(video/x-h26[45])", r"\1,parsed=(boolean)true", _CODED_CAPS)


def _places(head: _Head, branches: Sequence[Branch], board: Board) -> tuple[tuple[Place, ...], tuple[Piece, ...]]:
    """Put tees between the pieces of a head, and say which branch hangs on which."""
    points = {branch.point for branch in branches}
    pieces = list(head.pieces)
    # What v4l2src gives unasked is raw or JPEG, which shows only when it runs: it is encoded, like what is raw.
    encoded = "coded" in points and not _has_coded(head.pieces)
    if "coded" in points and not encoded:
        pieces = _parted(pieces)
    if "decoded" in points or encoded:
        pieces.append(Piece(pieces[-1].stage, f"tee name={DECODED}", ("tee",)))
    raw = _HOST_LEADS[head.memory]
    coder = board.encoder(head.memory) if encoded else ("", ())
    places = []
    for branch in branches:
        if branch.point == "coded" and not encoded:
            places.append(Place(branch, CODED))
        else:
            places.append(Place(branch, DECODED, *(coder if branch.point == "coded" else raw)))
    return tuple(places), tuple(pieces)


def _has_coded(pieces: tuple[Piece, ...]) -> bool:
    stages = [piece.stage for piece in pieces]
    return "decode" in stages and ("parse" in stages or "v4l2src" not in pieces[0].elements)


def _parted(pieces: list[Piece]) -> list[Piece]:
    """Pieces with a tee before the decoder."""
    at = next(index for index, piece in enumerate(pieces) if piece.stage == "decode")
    if pieces[at - 1].stage == "parse":
        return [*pieces[:at], Piece("parse", f"tee name={CODED}", ("tee",)), *pieces[at:]]
    # The capture asks the element DECODER which streams there are: that is now the parser.
    # A decodebin that stops at parsed pictures, not a parsebin: that leaves an RTP depayloader at single NAL units, and where
    # headers stand before each slice of a key frame, the parser behind it tears the picture apart.
    parse = f'decodebin name={DECODER} caps="{_PARSED_CAPS}" ! capsfilter caps={_CODED_CAPS} ! tee name={CODED}'
    decode = Piece("decode", "decodebin", ("decodebin",))
    return [*pieces[:at], Piece("parse", parse, ("decodebin", "capsfilter", "tee")), decode, *pieces[at + 1 :]]


# What brings pictures on a tee to a branch that wants them in host memory.
_HOST_LEADS: Mapping[Memory, tuple[str, tuple[str, ...]]] = {
    "host": ("", ()),
    "device": ("nvvidconv ! video/x-raw,format=I420", ("nvvidconv",)),
    "either": ("videoconvert ! nvvidconv ! video/x-raw(memory:NVMM) ! nvvidconv ! video/x-raw", ("videoconvert", "nvvidconv")),
}

# A live source must not queue up behind a machine too slow to scale: its old frames are let go here.
_QUEUE = f"queue name={TAP} leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0"


def _tail(view: View, delivery: Delivery, *, tap: str | None, flip: Flip) -> Piece:
    caps, scale, elements = "video/x-raw,format=RGB", "", ["capssetter", "queue", "videoconvert", "videoflip", "appsink"]
    if view.size is not None and not view.scales_in_software:
        width, height = view.size
        borders = "true" if view.aspect == "letterbox" else "false"
        # Scaled before it is converted: converting the full size costs more. With square pixels asked for, borders
        # keep the shape seen on a screen, and no borders fill the size whatever the shape of the stored pixels.
        scale = f"videoscale method={_METHODS[view.scaler]} add-borders={borders} ! "
        caps += f",width={width},height={height},pixel-aspect-ratio=1/1"
        elements.append("videoscale")
    first = f"{tap} ! videoconvert" if tap == _QUEUE else tap or "videoconvert"
    exact = f"{_EXACT_COLOURS} ! " if view.conversion == "exact" else ""
    sink = f"appsink name={FRAMES} {_SINKS[delivery]}"
    turned = "" if flip == "none" else f"videoflip video-direction={_DIRECTIONS[flip]} ! "
    # videoflip turns pictures of a phone held upright; the videoconvert before it is idle unless videoflip does not
    # know the format.
    upright = f"{first} ! videoflip video-direction=auto ! {turned}"
    launch = f"capssetter name={COLOURS} ! {upright}{scale}{exact}videoconvert ! {caps} ! {sink}"
    return Piece("tail", launch, tuple(elements))


# videoflip's names of jetson-utils' names.
_DIRECTIONS: Mapping[Flip, str] = {
    "counterclockwise": "90l",
    "rotate-180": "180",
    "clockwise": "90r",
    "horizontal": "horiz",
    "vertical": "vert",
    "upper-right-diagonal": "ur-ll",
    "upper-left-diagonal": "ul-lr",
}

# GStreamer's names of its scalers. Those with several taps take as many more as the picture gets smaller: they antialias.
_METHODS: Mapping[Scaler, str] = {
    "nearest": "nearest-neighbour",
    "bilinear": "bilinear",
    "sinc-4tap": "4-tap",
    "bilinear-antialias": "bilinear2",
    "bicubic-antialias": "catrom",
    "lanczos": "lanczos",
}

# GStreamer's direct way from 8-bit YUV to RGB is 2.6 levels of 255 off on average, nearly all of them too dark;
# through 16 bits it is 0.65 off, for 0.5 ms a frame of 224x224. Of these formats GStreamer takes the one that loses
# least: AYUV64 for YUV, RGBA for pictures in RGB, which stay bit for bit what they are.
_EXACT_COLOURS = "videoconvert ! video/x-raw,format={RGBA,AYUV64,GRAY8}"

_SINKS: Mapping[str, str] = {
    "every": "sync=false max-buffers=4",
    "newest": "sync=false drop=true max-buffers=1",
    "newest-in-time": "sync=true drop=true max-buffers=1",
}
