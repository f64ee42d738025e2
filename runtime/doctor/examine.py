"""All checks of a machine, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from keepsight.runtime.doctor import board_checks as board
from keepsight.runtime.doctor import bundle_checks as bundles
from keepsight.runtime.doctor import gpu_checks as gpu
from keepsight.runtime.doctor import memory_checks as memory
from keepsight.runtime.doctor import power_checks as power
from keepsight.runtime.doctor import storage_checks as storage
from keepsight.runtime.doctor import video_checks as video
from keepsight.runtime.doctor.finding import Area, Finding
from keepsight.runtime.doctor.graph_checks import onnxruntime
from keepsight.runtime.doctor.keepsight_checks import extras
from keepsight.runtime.doctor.language_checks import llama
from keepsight.runtime.doctor.machine import Machine

__all__ = ["examine"]

Check = Callable[[Machine], Iterator[Finding]]

_CHECKS: tuple[tuple[Area, tuple[Check, ...]], ...] = (
    ("board", (board.board, board.jetpack, board.python, board.system_python, board.clock)),
    ("memory", (memory.memory, memory.swap, memory.contiguous, memory.nvmap, memory.desktop)),
    ("power", (power.mode, power.clocks, power.throttling, power.meters)),
    ("GPU", (gpu.driver, gpu.compiler, gpu.tensorrt, gpu.cuda_python)),
    ("language model", (llama,)),
    ("graphs", (onnxruntime,)),
    ("video", (video.gstreamer, video.cameras, video.groups, video.argus)),
)


def examine(machine: Machine, bundle: str | None = None) -> Iterator[Finding]:
    """Make every check that applies to this machine.

    Args:
        machine: what to look at.
        bundle: a bundle to look at, too: its directory, or the name of a shipped one.

    Yields:
        The findings, those that are well among them, as they are made. A check that fails itself is a finding, too.
    """
    for area, checks in _CHECKS:
        for check in checks:
            yield from _made(area, partial(check, machine))
    opened, findings = (None, []) if bundle is None else bundles.opened(bundle)
    place = machine.working if opened is None else opened.path
    for look in (storage.disk, storage.sd_card):
        yield from _made("storage", partial(look, machine, place))
    yield from findings
    if opened is not None:
        yield from _made("bundle", partial(bundles.language_model, opened))
        for inspect in (bundles.built_engines, bundles.room):
            yield from _made("bundle", partial(inspect, machine, opened))
    yield from _made("Keepsight", partial(extras, machine))


def _made(area: Area, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # on a strange machine the other checks are wanted all the more
        yield Finding(
            "doctor",
            area,
            "warning",
            f"a check of the {area} can't be made: {type(error).__name__}: {error}",
            "That is a fault of Keepsight's: please report it, with what `keepsight doctor --json` prints.",
        )
