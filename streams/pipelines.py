"""From a source's address to the GStreamer pipeline that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from keepsight.streams.branches import BRANCH_ELEMENTS, Branch, Place, attach, encoder
from keepsight.streams.errors import UsageError
from keepsight.streams.gst import has_element, launch, load_gst, require_elements, state_colorimetry
from keepsight.streams.uri import Option, SourceURI
from keepsight.streams.view import Colorimetry, Scaler, View

__all__ = ["Branch", "Delivery", "Piece", "Recipe", "build", "recipe_for", "recipe_for_pictures"]

Delivery = Literal["every", "newest", "newest-in-time"]

# Names of the elements that the capture looks up.
FRAMES, TAP, ORIGIN, DECODER, COLOURS = "frames", "tap", "origin", "decoder", "colours"
# And of the tees that branches hang on.
CODED, DECODED = "coded", "decoded"

_CSI_DEFAULTS: Mapping[str, Option] = {"width": 1280, "height": 720, "fps": Fraction(30)}
_RTSP_LATENCY_MS = 200


Stage = Literal["origin", "parse", "decode", "to-host", "tail"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a pipeline.

    Attributes:
        stage: `origin` brings the stream in; `parse` cuts it into coded pictures; `decode` makes raw video of them; `to-host`
            brings that from a device's memory into the host's; `tail` scales, converts and hands out.
        launch: its elements in gst-launch's language.
        elements: what must be installed.
    """

    stage: Stage
    launch: str
    elements: tuple[str, ...]


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
    origin: Mapping[str, Any] = field(default_factory=dict)
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
    """What brings a kind of source in, up to raw video in host memory."""

    pieces: tuple[Piece, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)


def recipe_for(uri: SourceURI, view: View, delivery: Delivery, branches: Sequence[Branch] = ()) -> Recipe:
    """Say how to read a source.

    Args:
        uri: the source. Its file or device need not exist.
        view: size and shape of the pictures.
        delivery: `every` frame as fast as it is read, waiting for the reader; the `newest` as soon as it is there;
            or the `newest-in-time`, each when its time has come.
        branches: what hangs on the stream beside the frames. Without any, the pipeline has no tee.
    """
    head = _HEADS[uri.kind](uri, delivery)
    places, pieces = _places(head.pieces, branches)
    return Recipe((*pieces, _tail(view, delivery, live=delivery == "newest")), head.origin, view.colorimetry, places)


def recipe_for_pictures(width: int, height: int, view: View) -> Recipe:
    """Say how to scale RGB pictures of width x height that are pushed into the element `ORIGIN`."""
    caps = f"video/x-raw,format=RGB,width={width},height={height},framerate=1/1,pixel-aspect-ratio=1/1"
    origin = Piece("origin", f"appsrc name={ORIGIN} format=time caps={caps}", ("appsrc",))
    return Recipe((origin, _tail(view, "every", live=False)))


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


def test_patterns() -> list[str]:
    """The names that `test://` takes, as this machine's videotestsrc has them."""
    gst = load_gst()
    pattern = gst.ElementFactory.make("videotestsrc").find_property("pattern")
    # In PyGObject 3.50 `enum_class` and `default_value` are other things than before; this method is new there.
    default = pattern.get_default_value() if hasattr(pattern, "get_default_value") else pattern.default_value
    kind = type(default)
    values = kind.__enum_values__.values() if hasattr(kind, "__enum_values__") else kind  # an `enum.Enum` since 3.52
    return [value.value_nick for value in values]


def _file(uri: SourceURI, delivery: Delivery) -> _Head:
    origin = Piece("origin", f"filesrc name={ORIGIN}", ("filesrc",))
    return _Head((origin, *_decoding()), {"location": uri.location})


def _test(uri: SourceURI, delivery: Delivery) -> _Head:
    known = test_patterns()
    if uri.location not in known:
        raise UsageError(f"test://{uri.location} is not a test pattern.", fix=f"Use one of: {', '.join(known)}.")
    live = "false" if delivery == "every" else "true"
    options: dict[str, Option] = {"width": 640, "height": 480, "fps": Fraction(30), **uri.options}
    frames = options.get("frames", -1)
    launch = (
        f"videotestsrc name={ORIGIN} is-live={live} pattern={uri.location} num-buffers={frames} "
        f"! {_raw_caps('video/x-raw,format=I420', options)}"
    )
    return _Head((Piece("origin", launch, ("videotestsrc",)),))


def _v4l2(uri: SourceURI, delivery: Delivery) -> _Head:
    caps = f" ! capsfilter caps={_raw_caps('video/x-raw', uri.options)};{_raw_caps('image/jpeg', uri.options)}"
    origin = Piece("origin", f"v4l2src name={ORIGIN}{caps if uri.options else ''}", ("v4l2src",))
    return _Head((origin, *_decoding()), {"device": uri.location})


def _csi(uri: SourceURI, delivery: Delivery) -> _Head:
    caps = _raw_caps("video/x-raw(memory:NVMM)", {**_CSI_DEFAULTS, **uri.options})
    launch = f"nvarguscamerasrc name={ORIGIN} sensor-id={int(uri.location)} ! {caps}"
    to_host = Piece("to-host", "nvvidconv ! video/x-raw,format=I420", ("nvvidconv",))
    return _Head((Piece("origin", launch, ("nvarguscamerasrc",)), to_host))


def _rtsp(uri: SourceURI, delivery: Delivery) -> _Head:
    latency = uri.options.get("latency", _RTSP_LATENCY_MS)
    # TCP unless asked otherwise: a lost packet smears the picture until the next key frame.
    transport = uri.options.get("transport", "tcp")
    launch = f"rtspsrc name={ORIGIN} latency={latency} drop-on-latency=true protocols={transport} ! application/x-rtp,media=video"
    properties = {"location": uri.location}
    if uri.user is not None:
        properties["user-id"] = uri.user
        properties["user-pw"] = uri.password or ""
    return _Head((Piece("origin", launch, ("rtspsrc",)), *_decoding()), properties)


_HEADS = {"file": _file, "test": _test, "v4l2": _v4l2, "csi": _csi, "rtsp": _rtsp}


def _raw_caps(media: str, options: Mapping[str, Option]) -> str:
    caps = media
    for name in ("width", "height"):
        if name in options:
            caps += f",{name}={options[name]}"
    if "fps" in options:
        fps = Fraction(options["fps"])
        caps += f",framerate={fps.numerator}/{fps.denominator}"
    return caps


def _decoding() -> tuple[Piece, ...]:
    decode = Piece("decode", f"decodebin name={DECODER}", ("decodebin",))
    if not has_element("nvvidconv"):
        return (decode,)
    # A Jetson's decoders leave pictures in device memory and its software decoders do not. nvvidconv takes both, but
    # one of its ends must be in device memory: so once in, and once out.
    return decode, Piece("to-host", "nvvidconv ! video/x-raw(memory:NVMM) ! nvvidconv ! video/x-raw", ("nvvidconv",))


# Coded video that can be handed on as it is. Anything else that a demuxer finds, such as sound, is left where it is.
_CODED_CAPS = ";".join(
    ("video/x-h264", "video/x-h265", "image/jpeg", "video/x-vp8", "video/x-vp9", "video/x-av1", "video/mpeg", "video/x-h263")
)


def _places(pieces: tuple[Piece, ...], branches: Sequence[Branch]) -> tuple[tuple[Place, ...], tuple[Piece, ...]]:
    """Put tees between the pieces of a head, and say which branch hangs on which."""
    wanted = {branch.point for branch in branches}
    decoders = [index for index, piece in enumerate(pieces) if piece.stage == "decode"]
    # What v4l2src gives is raw or JPEG, which shows only when it runs: its pictures are encoded, like those of what is raw.
    is_coded = bool(decoders) and "v4l2src" not in pieces[0].elements
    lead, lead_elements = encoder() if "coded" in wanted and not is_coded else ("", ())
    parted = list(pieces)
    if "decoded" in wanted or lead:
        parted.append(Piece(parted[-1].stage, f"tee name={DECODED}", ("tee",)))
    if "coded" in wanted and is_coded:
        # The capture asks the element DECODER which streams there are: that is now the parser.
        parse = f"parsebin name={DECODER} ! capsfilter caps={_CODED_CAPS} ! tee name={CODED}"
        decode = Piece("decode", "decodebin", ("decodebin",))
        parted[decoders[0] : decoders[0] + 1] = [Piece("parse", parse, ("parsebin", "capsfilter", "tee")), decode]
    places = []
    for branch in branches:
        encoded = branch.point == "coded" and not is_coded
        tee = DECODED if encoded or branch.point == "decoded" else CODED
        places.append(Place(branch, tee, lead, lead_elements) if encoded else Place(branch, tee))
    return tuple(places), tuple(parted)


def _tail(view: View, delivery: Delivery, *, live: bool) -> Piece:
    caps, scale, elements = "video/x-raw,format=RGB", "", ["capssetter", "queue", "videoconvert", "videoflip", "appsink"]
    if view.size is not None and not view.scales_in_software:
        width, height = view.size
        borders = "true" if view.aspect == "letterbox" else "false"
        # Scaled before it is converted: converting the full size costs more. With square pixels asked for, borders
        # keep the shape seen on a screen, and no borders fill the size whatever the shape of the stored pixels.
        scale = f"videoscale method={_METHODS[view.scaler]} add-borders={borders} ! "
        caps += f",width={width},height={height},pixel-aspect-ratio=1/1"
        elements.append("videoscale")
    # A live source must not queue up behind a machine too slow to scale: its old frames are let go here.
    head = f"queue name={TAP} leaky=downstream max-size-buffers=1 max-size-bytes=0 max-size-time=0 ! videoconvert"
    head = head if live else f"videoconvert name={TAP}"
    exact = f"{_EXACT_COLOURS} ! " if view.conversion == "exact" else ""
    sink = f"appsink name={FRAMES} {_SINKS[delivery]}"
    # videoflip turns pictures of a phone held upright; the videoconvert before it is idle unless videoflip does not
    # know the format.
    launch = f"capssetter name={COLOURS} ! {head} ! videoflip video-direction=auto ! {scale}{exact}videoconvert ! {caps} ! {sink}"
    return Piece("tail", launch, tuple(elements))


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
