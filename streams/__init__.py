"""Cameras, video files, pictures and test patterns in; frames with their times out.

>>> from keepsight.streams import Source
>>> with Source("test://smpte?frames=2", size=(224, 224), pace="offline") as source:
...     [frame.image.shape for frame in source]
[(224, 224, 3), (224, 224, 3)]

GStreamer does the work and is imported when the first source opens, not with this package.
"""

from __future__ import annotations

from keepsight.streams.audio import Audio, Sound
from keepsight.streams.backoff import Reconnect
from keepsight.streams.branches import Branch
from keepsight.streams.clips import Clip, clip
from keepsight.streams.encode import write_video
from keepsight.streams.errors import (
    BundleError,
    CheckpointError,
    DatasetError,
    EngineError,
    KeepsightError,
    LLMError,
    MissingComponentError,
    MissingModelError,
    NoFrameError,
    ParityError,
    SourceLostError,
    SourceNotFoundError,
    SourceUnreadableError,
    UsageError,
)
from keepsight.streams.events import Event
from keepsight.streams.frame import Frame
from keepsight.streams.live import LiveSource
from keepsight.streams.many import Budget, Cameras
from keepsight.streams.preview import Preview
from keepsight.streams.pushed import PushSource
from keepsight.streams.record import Recorder
from keepsight.streams.sampling import ChangeSampler, EverySampler, Sampler
from keepsight.streams.snippet import Snippet, Snippets
from keepsight.streams.source import Source
from keepsight.streams.uri import SourceURI

__all__ = [
    "Audio",
    "Branch",
    "Budget",
    "BundleError",
    "Cameras",
    "ChangeSampler",
    "CheckpointError",
    "Clip",
    "DatasetError",
    "EngineError",
    "Event",
    "EverySampler",
    "Frame",
    "KeepsightError",
    "LLMError",
    "LiveSource",
    "MissingComponentError",
    "MissingModelError",
    "NoFrameError",
    "ParityError",
    "Preview",
    "PushSource",
    "Reconnect",
    "Recorder",
    "Sampler",
    "Snippet",
    "Snippets",
    "Sound",
    "Source",
    "SourceLostError",
    "SourceNotFoundError",
    "SourceURI",
    "SourceUnreadableError",
    "UsageError",
    "clip",
    "write_video",
]
