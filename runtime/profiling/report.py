"""The report of a profile: what its JSON file holds. Everything that a comparison, a page or a plan needs is in it.

Times are milliseconds, memory is bytes, energy is joules. Samples are kept one by one, so that a reader can make the statistics
that it needs; those here are made of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keepsight.streams.errors import UsageError

__all__ = [
    "FRAME_STAGES",
    "QUESTION_STAGES",
    "Contention",
    "Energy",
    "Layer",
    "Machine",
    "MemoryUse",
    "Moment",
    "Phase",
    "Profile",
    "Question",
    "Stage",
    "Statistics",
    "read_profile",
    "schema",
    "write_profile",
]

Chain = Literal["frame", "question"]
FRAME_STAGES = ("decode", "scale", "copy", "wait", "vision", "memory", "step", "other")
"""What a frame goes through, in order: they add up to `frame`, its end-to-end time from the decoder's input to remembered."""
QUESTION_STAGES = ("qformer", "prefill", "first_token", "tokens", "other")
"""What an answer goes through, in order: they add up to `answer`. `first_token` is sampling it; `tokens` all later ones."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Statistics(_Part):
    """Of the samples of a stage, milliseconds. `histogram`: counts between `edges`, one more of these."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float
    edges: tuple[float, ...]
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, samples: tuple[float, ...] | list[float], bins: int = 24) -> Statistics:
        """Of at least one sample."""
        values = np.asarray(samples, np.float64)
        counts, edges = np.histogram(values, bins=bins)
        p50, p90, p95, p99 = (float(p) for p in np.percentile(values, [50, 90, 95, 99]))
        return cls(
            n=len(values), mean=float(values.mean()), p50=p50, p90=p90, p95=p95, p99=p99, min=float(values.min()),
            max=float(values.max()), edges=tuple(map(float, edges)), histogram=tuple(map(int, counts)),
        )  # fmt: skip


class Stage(_Part):
    """A stage, or an end-to-end time.

    Attributes:
        name: one of `FRAME_STAGES` or `QUESTION_STAGES`; `capture_age`, `frame`, `answer`, `time_to_first_token`, `token`; a
            graph's own name for what is inside a stage (`visual_kv`, `bank`).
        path: whose it is: a frame's, or a question's.
        inside: the stage that it is part of, if it is no link of the path's chain.
        clock: `host`, or `device` for CUDA events.
        samples: one a frame, question or token, in the order they came; warm-up left out.
    """

    name: str
    path: Chain
    inside: str | None = None
    clock: Literal["host", "device"] = "host"
    samples: Annotated[tuple[float, ...], Field(min_length=1)]
    statistics: Statistics


class Phase(_Part):
    """A step of the cold start: opening the bundle, loading an engine or the language model, first frame, first answer."""

    name: str
    ms: float


class Question(_Part):
    """One question's timeline: when each stage began after it was put, milliseconds, and how long it took.

    Attributes:
        tokens: that were drawn, the end token among them: one more than there are samples of `token`.
    """

    text: str
    answer: str
    mode: Literal["standing", "replay"]
    stages: tuple[tuple[str, float, float], ...]
    tokens: int


class MemoryUse(_Part):
    """Bytes of a component. `steady`: after warm-up; `peak`: the most. `basis`: read from the system, or counted from sizes."""

    component: str
    steady: int
    peak: int
    basis: Literal["read", "counted"]


class Moment(_Part):
    """The sensors at a moment of the run, `t` seconds after its start; None = no such sensor."""

    t: float
    resident: int
    watts: float | None = None
    rails: dict[str, float] = {}
    celsius: dict[str, float] = {}
    gpu_hz: float | None = None
    gpu_load: float | None = None
    cpu_hz: float | None = None
    throttled: tuple[str, ...] = ()


class Energy(_Part):
    """Joules, by integrating the board's own meter over the run. `idle_watts` was read before it; marginal ones are above it."""

    meter: str
    idle_watts: float
    per_frame: float | None
    per_answer: float | None
    marginal_per_frame: float | None
    marginal_per_answer: float | None


class Layer(_Part):
    """A layer of an engine as TensorRT's profiler times it, and the block of the graph that it is of."""

    engine: str
    name: str
    block: str
    ms: float


class Contention(_Part):
    """Vision and language model alone, and both at once: what each does to the other.

    Attributes:
        frames_per_s, tokens_per_s: of each alone, then of both together.
        vision_ms, token_ms: medians, likewise.
    """

    frames_per_s: tuple[float, float]
    tokens_per_s: tuple[float, float]
    vision_ms: tuple[float, float]
    token_ms: tuple[float, float]


class Machine(_Part):
    """Where it ran. What is not there is None: no field is guessed."""

    title: str
    processor: str
    cores: int
    memory: int
    system: str
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    clocks_locked: bool | None = None
    gpu: str | None = None
    versions: dict[str, str] = {}


class Profile(_Part):
    """A whole report.

    Attributes:
        made_at: ISO 8601, UTC.
        command: as it was typed, passwords left out.
        fingerprint: of the bundle's perception: profiles of different ones are not comparable.
        fps: frames a second that went through in all, and `drops` of live frames by cause.
        runs: how many repeated runs the samples are of, and which run each frame's and question's sample is of.
    """

    schema_version: Literal[1] = 1
    keepsight: str
    made_at: str
    command: str
    bundle: str
    fingerprint: str
    variant: str
    backend: str
    memory_policy: str
    dims: dict[str, Any]
    language_model: str | None
    machine: Machine
    source: str
    frames: int
    fps: float
    drops: dict[str, int] = {}
    runs: int = 1
    run_of_frame: tuple[int, ...] = ()
    run_of_question: tuple[int, ...] = ()
    cold_start: tuple[Phase, ...] = ()
    stages: tuple[Stage, ...]
    questions: tuple[Question, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    timeline: tuple[Moment, ...] = ()
    energy: Energy | None = None
    layers: tuple[Layer, ...] = ()
    contention: Contention | None = None
    notes: tuple[str, ...] = ()

    def stage(self, name: str, path: Chain = "frame") -> Stage | None:
        """The stage of a name; None if it did not run."""
        return next((stage for stage in self.stages if (stage.name, stage.path) == (name, path)), None)


def schema() -> dict[str, Any]:
    """The JSON schema of a report."""
    return Profile.model_json_schema()


def write_profile(profile: Profile, path: str | Path) -> None:
    """Write a report, milliseconds to the microsecond."""
    Path(path).write_text(json.dumps(_rounded(profile.model_dump(mode="json")), ensure_ascii=False) + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> Profile:
    """Read a report.

    Raises:
        UsageError: it can't be read, or is no report of this version.
    """
    try:
        return Profile.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} can't be read ({error.strerror}).", fix="Give a file that `keepsight profile run` wrote."
        ) from error
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is no profile: {where}: {first['msg']}.", fix="Profile again with this version.") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if abs(value) >= 1e-3 else value
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
