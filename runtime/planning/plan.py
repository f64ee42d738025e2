"""A plan: whether a model fits on a board, how fast each stage is, whether it keeps up, what binds it, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from keepsight.runtime.boards import Board
from keepsight.runtime.footprint import (
    DEFAULT_CONTEXT,
    Fit,
    Footprint,
    Part,
    banks,
    engines,
    fit,
    graph_tensors,
    language,
    program,
)
from keepsight.runtime.graphs.device_bank import MEMORY
from keepsight.runtime.language.gguf_cache import QUANTISATIONS
from keepsight.runtime.planning.costs import Precision
from keepsight.runtime.planning.hardware import hardware, modes
from keepsight.runtime.planning.models import PlannedModel
from keepsight.runtime.planning.roofline import BoardTarget, Limit, Stage, Target, is_convolutional, total
from keepsight.runtime.planning.shapes import host_memory_cost
from keepsight.streams.errors import UsageError

__all__ = ["ModeEffect", "Plan", "Request", "Suggestion", "make_plan", "plan_all"]

_PROMPT_ROWS = 32  # of a question and its template, beside the soft prompt
_SHORT_MEMORY = 10
_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")
_WORTH = 1.05  # a change that gains less is not suggested


@dataclass(frozen=True)
class Request:
    """What is asked of a board.

    Attributes:
        fps: of each camera; None for the model's own.
        precision: of the visual encoder; None for the model's own. The Q-Former is never in 8 bits.
        standing: questions that are carried along with each camera's frames.
        context: positions of the language model's context.
    """

    cameras: int = 1
    fps: float | None = None
    precision: Precision | None = None
    standing: int = 1
    context: int = DEFAULT_CONTEXT

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: no camera, frames at a rate of 0, a negative number of questions, or a context without room.
        """
        for value, least, what in ((self.cameras, 1, "cameras"), (self.standing, 0, "standing"), (self.context, 64, "context")):
            if value < least:
                raise UsageError(f"--{what} {value} makes no sense.", fix=f"Give at least {least}.")
        if self.fps is not None and not self.fps > 0:
            raise UsageError(f"at {self.fps:g} frames per second nothing is seen.", fix="Give more than 0.")


@dataclass(frozen=True)
class Suggestion:
    """A change, planned again.

    Attributes:
        change: what to do, as an option or a command.
        gain: what it does to what binds.
        times: how many times faster that is; 1 for a change that is about memory.
    """

    change: str
    gain: str
    times: float


@dataclass(frozen=True)
class ModeEffect:
    """The same in another power mode of the board: frames per second in all, and tokens per second."""

    mode: str
    number: int | None
    frames_per_s: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """What to expect of a model on a board.

    Attributes:
        mode: the board's power mode, and `mode_number` for `nvpmodel -m`; None for this machine.
        stages: of a frame, of one standing question, of an answer, by name.
        frame: all that a frame of one camera takes, with its standing questions.
        first_token: from a standing question's asking to its first token; None without a language model.
        replay_token: the same for a new question, which is replayed over the memory.
        tokens_per_s: while an answer is generated.
        duty: share of the time that frames keep the target busy; above 1 it does not keep up.
        most_fps: frames per second that each camera could have.
        footprint, fit: in memory; None for this machine.
        limit: what binds first.
    """

    model: str
    target: str
    mode: str | None
    mode_number: int | None
    precision: Precision
    request: Request
    fps: float
    stages: tuple[Stage, ...]
    frame: Stage
    first_token: Stage | None
    replay_token: Stage | None
    token: Stage | None
    footprint: Footprint | None
    fit: Fit | None
    suggestions: tuple[Suggestion, ...] = ()
    modes: tuple[ModeEffect, ...] = ()
    notes: tuple[str, ...] = ()
    llm_kind: str | None = None
    memory_length: int = 0

    @property
    def duty(self) -> float:
        return self.request.cameras * self.fps * self.frame.ms / 1e3

    @property
    def most_fps(self) -> float:
        return 1e3 / (self.request.cameras * self.frame.ms)

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.token is None else 1e3 / self.token.ms

    @property
    def fits(self) -> bool:
        return self.fit is None or self.fit.fits

    @property
    def keeps_up(self) -> bool | None:
        """None where the error bar does not say."""
        if self.duty * self.frame.bar <= 1:
            return True
        return False if self.duty / self.frame.bar > 1 else None

    @property
    def limit(self) -> Limit:
        return self.frame.limit if self.fits else "memory"

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "model": self.model, "board": self.target, "mode": self.mode, "nvpmodel": self.mode_number,
            "precision": self.precision, "llm_quant": self.llm_kind, "memory_length": self.memory_length,
            "cameras": self.request.cameras, "fps": self.fps, "standing": self.request.standing, "context": self.request.context,
            "fits": self.fits,
            "free_bytes": None if self.fit is None else self.fit.free_bytes,
            "memory": [] if self.footprint is None else [asdict(part) for part in self.footprint.parts],
            "stages": [_stage_dict(stage) for stage in self.stages],
            "frame": _stage_dict(self.frame),
            "frames_per_s": {"asked": self.fps * self.request.cameras, "most": self.most_fps * self.request.cameras},
            "duty": self.duty, "keeps_up": self.keeps_up,
            "first_token": _stage_dict(self.first_token), "replay_first_token": _stage_dict(self.replay_token),
            "tokens_per_s": self.tokens_per_s, "limit": self.limit,
            "modes": [asdict(effect) for effect in self.modes],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions], "notes": list(self.notes),
        }  # fmt: skip


def make_plan(model: PlannedModel, target: Target, request: Request, *, advise: bool = True) -> Plan:
    """Plan a model on a target.

    Raises:
        UsageError: a request that makes no sense, or a precision that the target does not have.
    """
    request.check()
    vision: Precision = request.precision or model.precision
    qformer: Precision = vision if vision in ("fp32", "fp16") else ("fp16" if model.bundle is None else model.precision)
    stages = {"vision": target.graph("vision", "vision", model.vision, vision)}
    for name, cost in model.graphs.items():
        if name == MEMORY:
            work = cost if isinstance(target, BoardTarget) else host_memory_cost(model.dims)
            stages[name] = target.graph(name, "memory", work, "fp32")
        else:
            stages[name] = target.graph(name, "memory" if name == "visual_kv" else "qformer", cost, qformer)
    shared = [stages["vision"], stages["visual_kv"], stages[MEMORY]]
    frame = total("frame", shared + request.standing * [stages["step"]])
    first = replay = token = None
    if model.llm is not None:
        rows = model.dims.queries + _PROMPT_ROWS
        prefill, token = target.prefill(model.llm.work, rows), target.token(model.llm.work, rows)
        stages |= {"prefill": prefill, "token": token}
        first = total("first token", [stages["answer"], prefill])
        replay = total("first token, replay", [stages["prompt"], stages["replay"], prefill])
    footprint, found, mode, number = None, None, None, None
    if isinstance(target, BoardTarget):
        board, used = target.hardware.board, target.hardware.mode
        footprint = _footprint(model, request, vision, qformer)
        found, mode, number = fit(footprint, board), used.name, used.number
    plan = Plan(
        model=model.name, target=target.name, mode=mode, mode_number=number, precision=vision, request=request,
        fps=request.fps or model.sample_fps, stages=tuple(stages.values()), frame=frame, first_token=first, replay_token=replay,
        token=token, footprint=footprint, fit=found, llm_kind=None if model.llm is None else model.llm.kind,
        memory_length=model.dims.memory_length, notes=(*model.notes, *_notes(model, target, vision, footprint)),
    )  # fmt: skip
    if not advise:
        return plan
    suggestions = tuple(_suggestions(plan, model, target, request))
    return replace(plan, suggestions=suggestions, modes=tuple(_mode_effects(model, target, request)))


def plan_all(model: PlannedModel, boards: tuple[Board, ...], request: Request) -> list[Plan]:
    """Every board in its fastest mode, in every precision that it has and that the model can be had in."""
    plans = []
    for board in boards:
        target = BoardTarget.of(hardware(board.name))
        for precision in _PRECISIONS:
            if target.hardware.flops[precision] is not None:
                plans.append(make_plan(model, target, replace(request, precision=precision), advise=False))
    return plans


def _footprint(model: PlannedModel, request: Request, vision: Precision, qformer: Precision) -> Footprint:
    dims, parts = model.dims, [*program(), *engines(model.dims, model.weights(vision, qformer))]
    for part in banks(dims, standing=request.standing):
        parts.append(replace(part, bytes=request.cameras * part.bytes))
    if request.cameras > 1:
        bank = sum(prod(shape) for name, shape in graph_tensors(dims)[MEMORY].items() if name.startswith(("bank_", "next_")))
        more = request.cameras - 1
        parts.append(Part(f"visual memories of {more} more camera{'s' * (more > 1)}", 4 * more * bank, "exact"))
    if model.llm is not None:
        parts += language(model.llm.bytes, model.llm.shape, context=request.context)
    return Footprint(tuple(parts))


def _notes(model: PlannedModel, target: Target, vision: Precision, footprint: Footprint | None) -> Iterator[str]:
    if model.bundle is not None and vision not in model.bundle.manifest.variants:
        how = f"keepsight quantize --variant {vision}" if vision in ("int8", "fp8") else f"keepsight export --precision {vision}"
        yield f"the bundle has no variant {vision} yet: {how} makes one"
    if not isinstance(target, BoardTarget) or footprint is None:
        return
    if is_convolutional(model.vision):
        yield "what a visual encoder reaches of a board's peak is known of transformers, and this one is made of convolutions"
    board, mode = target.hardware.board, target.hardware.mode
    usual = next((one.name for one in modes(board.name) if one.default), mode.name)
    if mode.name != usual and mode.number is not None:
        yield f"the board comes in mode {usual}; sudo nvpmodel -m {mode.number} sets {mode.name}"
    ceiling = board.largest_allocation_bytes
    if ceiling is not None:
        for part in footprint.parts:
            if part.bytes > ceiling.value:
                yield (
                    f"{part.name} is one allocation of {part.bytes / 1e9:.1f} GB, and {board.name} has been seen to refuse more "
                    f"than {ceiling.value / 1e9:.1f} GB at once"
                )
    yield "vision and language model are planned alone: while an answer is generated, both are slower"


def _mode_effects(model: PlannedModel, target: Target, request: Request) -> Iterator[ModeEffect]:
    """Every power mode of the board whose clocks are known."""
    if not isinstance(target, BoardTarget):
        return
    for mode in modes(target.name):
        if mode.gpu_mhz is not None:
            found = make_plan(model, target.in_mode(mode.name), request, advise=False)
            yield ModeEffect(mode.name, mode.number, found.most_fps * request.cameras, found.tokens_per_s)


def _suggestions(plan: Plan, model: PlannedModel, target: Target, request: Request) -> Iterator[Suggestion]:
    """Changes to what binds, each planned again: to fit comes first, then what gains most; what gains nothing is left out."""
    yield from _memory_changes(plan, model, target, request)
    yield from sorted(_speed_changes(plan, model, target, request), key=lambda one: -one.times)


def _memory_changes(plan: Plan, model: PlannedModel, target: Target, request: Request) -> Iterator[Suggestion]:
    if plan.fit is None or plan.fits:
        return
    for change, other, asked in _smaller(model, request, plan.precision):
        found = make_plan(other, target, asked, advise=False)
        if found.fit is not None and found.fits:
            yield Suggestion(change, f"fits, with {found.fit.free_bytes / 1e9:.1f} GB to spare", 1.0)
            return
    yield Suggestion("a smaller language model, or a larger board", f"{-plan.fit.free_bytes / 1e9:.1f} GB are missing", 1.0)


def _smaller(model: PlannedModel, request: Request, precision: Precision) -> Iterator[tuple[str, PlannedModel, Request]]:
    """Less and less memory: first what costs the answers least."""
    half = replace(request, precision="fp16") if precision == "fp32" else request
    said = ["--precision fp16"] if half is not request else []
    kinds = [None] if model.llm is None else [None, *_kinds_below(model.llm.kind)]
    for length in (None, _SHORT_MEMORY):
        for kind in kinds:
            changed = model if kind is None else model.with_llm(kind)
            words = said + ([f"--llm-quant {kind}"] if kind else [])
            if length is not None and length < model.dims.memory_length:
                changed = changed.with_memory(length)
                words = [*words, f"--memory-length {length}"]
            if words:
                yield " and ".join(words), changed, half


def _kinds_below(kind: str | None) -> tuple[str, ...]:
    return QUANTISATIONS[QUANTISATIONS.index(kind) + 1 :] if kind in QUANTISATIONS else QUANTISATIONS[1:]


def _speed_changes(plan: Plan, model: PlannedModel, target: Target, request: Request) -> Iterator[Suggestion]:
    for change, other, on, asked in _alternatives(plan, model, target, request):
        found = make_plan(other, on, asked, advise=False)
        frames = plan.frame.ms / found.frame.ms
        if frames >= _WORTH:
            now, then = plan.most_fps * request.cameras, found.most_fps * request.cameras
            yield Suggestion(change, f"{then:.1f} frames/s instead of {now:.1f}", frames)
        elif plan.token is not None and found.token is not None and plan.token.ms / found.token.ms >= _WORTH:
            times = plan.token.ms / found.token.ms
            yield Suggestion(change, f"{found.tokens_per_s:.1f} tokens/s instead of {plan.tokens_per_s:.1f}", times)


def _alternatives(
    plan: Plan, model: PlannedModel, target: Target, request: Request
) -> Iterator[tuple[str, PlannedModel, Target, Request]]:
    if isinstance(target, BoardTarget):
        for precision in _PRECISIONS[_PRECISIONS.index(plan.precision) + 1 :]:
            if target.hardware.flops[precision] is not None:
                yield f"--precision {precision}", model, target, replace(request, precision=precision)
        for mode in modes(target.name):
            if mode.gpu_mhz is not None and mode.name != plan.mode:
                yield f"sudo nvpmodel -m {mode.number}, mode {mode.name}", model, target.in_mode(mode.name), request
    if request.standing > 1:
        fewer = request.standing // 2
        yield f"--standing {fewer}", model, target, replace(request, standing=fewer)
    if model.dims.memory_length > _SHORT_MEMORY:
        yield f"--memory-length {_SHORT_MEMORY}", model.with_memory(_SHORT_MEMORY), target, request
    if model.llm is not None and isinstance(target, BoardTarget):
        for kind in _kinds_below(model.llm.kind)[:1]:
            yield f"--llm-quant {kind}", model.with_llm(kind), target, request


def _stage_dict(stage: Stage | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    return {
        "name": stage.name, "ms": stage.ms, "low_ms": stage.low_ms, "high_ms": stage.high_ms, "limit": stage.limit,
        "flops": stage.flops, "bytes": stage.bytes,
    }  # fmt: skip
