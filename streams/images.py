"""Picture files: one alone, or those of a directory in the order of their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from keepsight.streams.capture import Capture, Picture, Timeouts
from keepsight.streams.errors import SourceUnreadableError
from keepsight.streams.uri import Option, SourceURI
from keepsight.streams.view import View

__all__ = ["ImageFiles", "image_paths"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def image_paths(path: Path) -> list[Path] | None:
    """The pictures at a path: itself, or a directory's in the order of their names; None for anything else.

    Raises:
        SourceUnreadableError: a directory without pictures.
    """
    if not path.is_dir():
        return [path] if path.suffix.lower() in SUFFIXES else None
    found = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
    if not found:
        raise SourceUnreadableError(
            f"{path} is a directory without pictures.",
            fix=f"Put some of {', '.join(sorted(SUFFIXES))} there, or name a file.",
        )
    return found


class ImageFiles:
    """Picture files as `Stills`: each is decoded by a pipeline of its own when it is read.

    Args:
        paths: the files, in order.
        view: size and shape.
        timeouts: how long one file may take to decode.
        options: of the address (see `uri.SourceURI`).
    """

    def __init__(
        self, paths: Sequence[Path], view: View, timeouts: Timeouts, options: Mapping[str, Option] | None = None
    ) -> None:
        self._paths, self._view, self._timeouts, self._options = paths, view, timeouts, options or {}

    def __len__(self) -> int:
        return len(self._paths)

    def picture(self, index: int) -> Picture:
        """Decode one file.

        Raises:
            SourceUnreadableError: it is not a picture; it is named.
        """
        path = self._paths[index]
        capture = Capture(replace(SourceURI.parse(path), options=self._options), self._view, "every", self._timeouts)
        try:
            picture = capture.next()
        finally:
            capture.close()
        if picture is None:
            raise SourceUnreadableError(f"{path} has no picture in it.", fix="Remove it, or save it again.")
        return picture

    def close(self) -> None:
        """Nothing stays open between two pictures."""
