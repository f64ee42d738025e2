"""Microphones: `mic://`, `alsa://hw:1,0`, `pulse://NAME`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from keepsight.streams.errors import KeepsightError, SourceLostError, SourceNotFoundError, SourceUnreadableError, UsageError
from keepsight.streams.gst import has_element

__all__ = ["Microphone", "is_microphone"]

_ADDRESS = re.compile(r"^(mic|alsa|pulse)://(.*)$", re.IGNORECASE | re.DOTALL)
_ELEMENTS = {"alsa": "alsasrc", "pulse": "pulsesrc"}


@dataclass(frozen=True, slots=True)
class Microphone:
    """The address of a microphone.

    Attributes:
        kind: the system that has it; `mic` is PulseAudio (or PipeWire in its name) where GStreamer knows it, else ALSA.
        device: as that system names it (`arecord -L`, `pactl list short sources`); empty for its default.

    >>> Microphone.parse("alsa://hw:1,0")
    Microphone(kind='alsa', device='hw:1,0')
    """

    kind: Literal["mic", "alsa", "pulse"]
    device: str = ""

    @classmethod
    def parse(cls, address: str) -> Microphone:
        """Read an address.

        Raises:
            UsageError: it is none of a microphone.
        """
        match = _ADDRESS.match(address)
        if match is None or "\0" in address:
            raise UsageError(f"{address!r} is not a microphone.", fix="Write mic://, alsa://hw:1,0 or pulse://NAME.")
        kind, device = match[1].lower(), match[2]
        if kind == "mic" and device:
            raise UsageError("mic:// is the system's default and takes no name.", fix=f"Write alsa://{device} or pulse://{device}.")
        return cls(kind, device)  # type: ignore[arg-type]  # the pattern knows no other

    @property
    def element(self) -> str:
        """GStreamer's element for it."""
        if self.kind == "mic":
            return "pulsesrc" if has_element("pulsesrc") else "alsasrc"
        return _ELEMENTS[self.kind]

    @property
    def properties(self) -> dict[str, Any]:
        """What to set on that element."""
        return {"device": self.device} if self.device else {}

    def fault(self, reason: str, *, delivered: bool) -> KeepsightError:
        """The error of one that fails, in our words."""
        if delivered:
            return SourceLostError(f"{self} is lost: {reason}.", fix="Check the cable, then start again.")
        if not self.device:
            return SourceNotFoundError(f"{self} can't be opened: {reason}.", fix="Plug a microphone in; `arecord -l` lists them.")
        return SourceUnreadableError(f"{self} can't be opened: {reason}.", fix="See `arecord -L` or `pactl list short sources`.")

    def __str__(self) -> str:
        return f"{self.kind}://{self.device}"


def is_microphone(address: object) -> bool:
    """Whether an address is spelled as a microphone's."""
    return isinstance(address, str) and _ADDRESS.match(address) is not None
