"""How pictures are wanted: their size and shape, the scaler that gets them there, and how colours are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from keepsight.streams.errors import UsageError

__all__ = ["SOFTWARE_SCALERS", "Aspect", "Colorimetry", "Conversion", "Scaler", "View"]

Aspect = Literal["stretch", "letterbox"]

Scaler = Literal[
    "nearest", "bilinear", "sinc-4tap", "bilinear-antialias", "bicubic-antialias", "lanczos", "bicubic", "bicubic-wrap"
]
"""How a picture gets another size. Without antialiasing a smaller picture is made of few of the larger one's pixels, which is
what PyTorch and OpenCV do unless told otherwise; Pillow always antialiases.

- nearest, bilinear, sinc-4tap: GStreamer's, of 1, 2 by 2 and 4 by 4 pixels. Its bilinear lays the first and last column of a
  video on the first and last of the result, where all others lay edge on edge: from 1280 to 224, up to 2.4 columns off.
- bilinear-antialias, bicubic-antialias (Catmull-Rom, a = -0.5), lanczos (of two lobes, antialiased): GStreamer's, as Pillow.
- bicubic: of 4 by 4 pixels with a = -0.75, as PyTorch and OpenCV; overshoot is cut off, and so are fractions.
- bicubic-wrap: the same, but overshoot wraps around, so that 257 becomes 1: MA-LMM's preprocessing.
"""

SOFTWARE_SCALERS: frozenset[Scaler] = frozenset({"bicubic", "bicubic-wrap"})
"""Those that GStreamer does not have: it hands out the full picture, which `streams/bicubic.py` scales."""

Colorimetry = Literal["bt601", "bt709"]
"""The matrix that YUV is read with, whatever the stream says of itself."""

Conversion = Literal["exact", "8-bit"]
"""From YUV to RGB: through 16 bits, or GStreamer's direct way, which is quicker and 2 to 4 levels of 255 too dark."""


@dataclass(frozen=True, slots=True)
class View:
    """How pictures are wanted.

    Attributes:
        size: (width, height) in pixels, or None for the size and the pixels as they are stored.
        aspect: `stretch` fills the size; `letterbox` keeps the shape that a viewer sees (pixels need not be square)
            and adds black borders.
        scaler: how the size is reached.
        colorimetry: the matrix that YUV is read with; None for the stream's own, or GStreamer's guess where it has none
            (BT.709 above 576 rows, else BT.601). Pictures in RGB are not touched.
        conversion: of the colours.
        hardware_scaling: let a Jetson's video hardware scale, before pictures leave its memory, which saves copying them in full
            size. Only for `stretch` with `nearest` or `bilinear`; its pixels are not those of GStreamer's scaler of that name,
            so a bundle whose manifest asks for exact preprocessing is not served by it.
    """

    size: tuple[int, int] | None = None
    aspect: Aspect = "stretch"
    scaler: Scaler = "bilinear"
    colorimetry: Colorimetry | None = None
    conversion: Conversion = "exact"
    hardware_scaling: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("aspect", Aspect), ("scaler", Scaler), ("conversion", Conversion)):
            _check(name, getattr(self, name), get_args(kind))
        _check("colorimetry", self.colorimetry, (None, *get_args(Colorimetry)))
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"size={self.size!r} is not a size.", fix="Give (width, height), each 1 or more.")

    @property
    def scales_in_software(self) -> bool:
        """Whether GStreamer leaves the picture in full size."""
        return self.size is not None and self.scaler in SOFTWARE_SCALERS


def _check(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name}={value!r} is not known.", fix=f"Use one of: {', '.join(map(repr, known))}.")
