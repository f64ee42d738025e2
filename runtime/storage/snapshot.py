"""A memory as it was at one moment, and the file that it is saved to.

What is in it: the visual bank; the bank of every standing question, with its text; the newest frame; the parts that others
keep beside the memory, by name; whose memory it is, and when it was saved. `sections` is the file's format.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepsight.runtime.bank_state import BankShape
from keepsight.runtime.bundle import Bundle
from keepsight.runtime.graphs.onnx_weights import external_files
from keepsight.runtime.manifest import Dims
from keepsight.runtime.storage.sections import is_section_file, read_sections, write_sections
from keepsight.streams import Frame
from keepsight.streams.errors import SnapshotError, UsageError

__all__ = ["Part", "Question", "SavedFrame", "Snapshot", "bytes_per_day", "fingerprint", "is_snapshot", "snapshot_bytes"]

Array = npt.NDArray[Any]

WRITING_GRAPHS = ("vision", "visual_kv", "prompt", "step")
"""The graphs that decide what the numbers in a memory mean."""

_DAY_S = 86400.0


class Part(Protocol):
    """Something beside the memory that must survive a restart."""

    def state(self) -> dict[str, Array]:
        """What it is, as arrays of numbers (text and pictures as uint8)."""
        ...

    def restore(self, state: Mapping[str, Array]) -> None:
        """Become what the state was taken from, or raise and stay unchanged."""
        ...


@dataclass(frozen=True)
class Question:
    """A standing question: its text, and the prompt that replaces both templates, if one does."""

    question: str
    prompt: str | None = None


@dataclass(frozen=True, eq=False)
class SavedFrame:
    """The newest frame of a memory, its capture on the wall clock, so that another process can tell its age."""

    image: npt.NDArray[np.uint8]
    time_s: float
    captured_wall_s: float
    index: int

    @classmethod
    def of(cls, frame: Frame) -> SavedFrame:
        """A frame of this process."""
        return cls(frame.image, frame.time_s, time.time() - (time.monotonic() - frame.captured_at), frame.index)

    def as_frame(self) -> Frame:
        """The frame on this process's monotonic clock. A wall clock that went back leaves an age of 0."""
        age_s = max(time.time() - self.captured_wall_s, 0.0)
        return Frame(self.image, self.time_s, time.monotonic() - age_s, self.index)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A memory at one moment. Nothing in it is shared with the session that it was taken from.

    Attributes:
        bundle: name of the bundle.
        fingerprint: of what decides the meaning of a memory, see `fingerprint`.
        variant: precision of the graphs. Another variant of the same bundle may go on with it: the same model, rounded otherwise.
        policy: how the banks make room.
        source: the address that was watched, without passwords; None if that is not known.
        saved_at: wall time, seconds since 1970.
        newest: the newest frame; None before the first.
        visual: state of the visual bank, without keys and values unless `kv`.
        questions: the standing questions, and `standing` the state of each one's bank.
        parts: what others keep, by name.
    """

    bundle: str
    fingerprint: str
    variant: str
    policy: str
    source: str | None
    saved_at: float
    newest: SavedFrame | None
    visual: Mapping[str, Array]
    questions: Sequence[Question] = ()
    standing: Sequence[Mapping[str, Array]] = ()
    parts: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)

    @property
    def frames_seen(self) -> int:
        return int(self.visual["frames_seen"])

    @property
    def time_s(self) -> float:
        """Stream time of the newest frame; -1 before the first."""
        return -1.0 if self.newest is None else self.newest.time_s

    @property
    def age_s(self) -> float:
        """Wall-clock seconds since it was saved; below 0 where the clock went back."""
        return time.time() - self.saved_at

    def check_belongs_to(self, bundle: Bundle, policy: str) -> None:
        """Refuse a session that would read these numbers as something else.

        Raises:
            SnapshotError: another bundle, or another memory policy.
        """
        own = fingerprint(bundle)
        if own != self.fingerprint:
            raise SnapshotError(
                f"the memory was saved with bundle {self.bundle} ({self.fingerprint[:12]}), this is "
                f"{bundle.manifest.name} ({own[:12]}).",
                fix="Name the bundle it was saved with: --bundle.",
            )
        if policy != self.policy:
            raise SnapshotError(
                f"the memory was saved with the policy {self.policy}, this session has {policy}.",
                fix=f"Use --memory {self.policy}.",
            )

    # -- the file --------------------------------------------------------------------------------------------------

    def write(self, path: str | Path) -> int:
        """Replace a file by this, atomically; bytes written.

        Raises:
            SnapshotError: it can't be written; the old file is then unchanged.
        """
        named = ("bundle", "fingerprint", "variant", "policy", "source", "saved_at")
        meta: dict[str, Any] = {name: getattr(self, name) for name in named}
        meta["questions"] = [asdict(question) for question in self.questions]
        meta["parts"] = sorted(self.parts)
        sections = dict(_nested("visual", self.visual))
        for number, state in enumerate(self.standing):
            sections |= _nested(f"standing/{number}", state)
        for name, state in self.parts.items():
            sections |= _nested(f"parts/{name}", state)
        if self.newest is not None:
            meta["newest"] = {name: getattr(self.newest, name) for name in ("time_s", "captured_wall_s", "index")}
            sections["newest/image"] = self.newest.image
        return write_sections(path, meta, sections)

    @classmethod
    def read(cls, path: str | Path) -> Snapshot:
        """Read a file that `write` wrote.

        Raises:
            SnapshotError: see `sections.read_sections`.
        """
        meta, sections = read_sections(path)
        try:
            newest = meta.pop("newest", None)
            questions = tuple(Question(**question) for question in meta.pop("questions"))
            parts = {name: _under(f"parts/{name}", sections) for name in meta.pop("parts")}
            return cls(
                **meta,
                newest=None if newest is None else SavedFrame(image=sections["newest/image"], **newest),
                visual=_under("visual", sections),
                questions=questions,
                standing=tuple(_under(f"standing/{number}", sections) for number in range(len(questions))),
                parts=parts,
            )
        except (KeyError, TypeError) as error:
            raise SnapshotError(f"{path} is a file of ours, and no snapshot: {error}.", fix="Give a snapshot.") from error


def is_snapshot(path: str | Path) -> bool:
    """Whether a file is a snapshot by its first bytes, whatever it is called."""
    return is_section_file(path)


def _nested(prefix: str, state: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    return ((f"{prefix}/{name}", array) for name, array in state.items())


def _under(prefix: str, sections: Mapping[str, Array]) -> dict[str, Array]:
    start = len(prefix) + 1
    return {name[start:]: array for name, array in sections.items() if name.startswith(prefix + "/")}


# -- whose memory ----------------------------------------------------------------------------------------------------


def fingerprint(bundle: Bundle) -> str:
    """sha256, in hex, of what decides the meaning of a bundle's memory.

    That is: the graphs that write into a memory (`WRITING_GRAPHS`) with their weights, in the bundle's first variant; the
    tokenizer and the template of the Q-Former; sizes, memory length among them; preprocessing; positions. A variant that is
    added later, another language model, or a faster `replay` graph leave it as it is.
    """
    manifest = bundle.manifest
    files = {name: _files(bundle, name) for name in WRITING_GRAPHS}
    if manifest.tokenizer is not None:
        files["tokenizer"] = [manifest.files[manifest.tokenizer]]
    decides = {
        "files": files,
        "qformer": manifest.templates.qformer,
        **{name: getattr(manifest, name).model_dump(mode="json") for name in ("dims", "preprocessing", "positions")},
        "system": manifest.system,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _files(bundle: Bundle, graph: str) -> list[str]:
    """sha256 of a graph and of the files that hold its weights."""
    path = bundle.graph_path(graph, bundle.manifest.variants[0])
    files = [path, *sorted(path.parent / name for name in external_files(path))]
    return [bundle.manifest.files[file.relative_to(bundle.path).as_posix()] for file in files]


# -- how much is written ---------------------------------------------------------------------------------------------


def snapshot_bytes(dims: Dims, *, question_rows: Sequence[int] = (), kv: bool) -> int:
    """Bytes of one snapshot of a full memory, but for the header (a few kB) and the parts of others.

    Args:
        dims: of the bundle.
        question_rows: Q + L of every standing question.
        kv: with the keys and values of the visual bank. Those of the standing questions are always there.
    """
    crosses = dict.fromkeys(("cross_k", "cross_v"), (len(dims.cross_layers), dims.hidden))
    banks = [_full_bank(dims, groups=1, tokens=dims.tokens, channels=dims.channels, riders=crosses if kv else {})]
    selfs = dict.fromkeys(("self_k", "self_v"), (dims.banked_layers, dims.hidden))
    for rows in question_rows:
        banks.append(_full_bank(dims, groups=dims.banked_layers, tokens=rows, channels=dims.hidden, riders=selfs))
    return sum(banks) + 3 * dims.image_size**2


def bytes_per_day(nbytes: int, every_s: float) -> int:
    """Bytes written in a day by saving so many at this interval.

    Raises:
        UsageError: an interval that is not above 0.
    """
    if not every_s > 0:
        raise UsageError(f"saving every {every_s:g} s makes no sense.", fix="Give seconds above 0.")
    return round(nbytes * _DAY_S / every_s)


def _full_bank(dims: Dims, *, groups: int, tokens: int, channels: int, riders: Mapping[str, tuple[int, int]]) -> int:
    shape = BankShape(
        groups=groups, slots=dims.slots, tokens=tokens, channels=channels, dtype=np.dtype(np.float32), riders=riders,
        merges=True,
    )  # fmt: skip
    return sum(int(np.prod(size)) * dtype.itemsize for size, dtype in shape.expected(dims.slots).values())
