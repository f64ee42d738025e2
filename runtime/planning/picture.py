"""Boards and precisions as bars: frames per second and tokens per second with their error bars, as PNG or in a page of HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from keepsight.runtime.planning.plan import Plan
from keepsight.streams.errors import MissingComponentError, UsageError

__all__ = ["save_html", "save_png"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP, _BOARD_GAP = 1200, 270, 90, 96, 20, 4, 14
_INK, _GRID, _PAPER, _MISSING = "#282828", "#dddddd", "#ffffff", "#b8b8b8"
# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = {"fp32": "#0072b2", "fp16": "#009e73", "int8": "#e69f00", "fp8": "#cc79a7", "tokens": "#56b4e9"}
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class _Canvas(Protocol):
    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None: ...

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None: ...

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "start") -> None: ...


class _Svg:
    def __init__(self, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
            f'font-family="sans-serif" role="img"><rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>'
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        self._parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>')

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "start") -> None:
        said = html.escape(words)
        self._parts.append(f'<text x="{x:.1f}" y="{y + 0.36 * size:.1f}" font-size="{size}" text-anchor="{anchor}">{said}</text>')

    def done(self) -> str:
        return "".join([*self._parts, "</svg>"])


class _Png:
    def __init__(self, height: int) -> None:
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            raise MissingComponentError(f"Pillow can't be used: {error}.", fix="Install it with `pip install pillow`.") from error
        self.image = Image.new("RGB", (_WIDTH, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._draw.rectangle([x, y, x + max(1.0, width) - 1, y + height - 1], fill=colour)

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
        self._draw.line([x, y, to_x, to_y], fill=colour)

    def text(self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "start") -> None:
        self._draw.text((x, y), words, fill=_INK, anchor={"start": "lm", "middle": "mm", "end": "rm"}[anchor], font_size=size)


def save_png(plans: Sequence[Plan], path: Path) -> None:
    """Draw plans into a PNG file, 1200 pixels wide.

    Raises:
        UsageError: the file can't be written.
        MissingComponentError: Pillow is not installed.
    """
    canvas = _Png(_height(plans))
    _draw(canvas, plans)
    _written(path, lambda: canvas.image.save(path, "PNG"))


def save_html(plans: Sequence[Plan], path: Path) -> None:
    """Draw plans into one page of HTML that needs nothing else.

    Raises:
        UsageError: the file can't be written.
    """
    canvas = _Svg(_height(plans))
    _draw(canvas, plans)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(_title(plans))}</title>'
    page = f"{head}{canvas.done()}</html>\n"
    _written(path, lambda: path.write_text(page, encoding="utf-8"))


def _written(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}.", fix="Name a file in your folder.") from error


def _title(plans: Sequence[Plan]) -> str:
    first = plans[0]
    kind = "" if first.llm_kind is None else f", language model {first.llm_kind}"
    asked = f"{first.request.standing} standing, {first.request.cameras} x {first.fps:g} frames/s"
    return f"{first.model}: memory of {first.memory_length} slots, {asked}{kind}"


def _height(plans: Sequence[Plan]) -> int:
    boards = len(dict.fromkeys(plan.target for plan in plans))
    tokens = boards * any(plan.tokens_per_s is not None for plan in plans)
    return _TOP + (len(plans) + tokens) * (_BAR + _GAP) + boards * _BOARD_GAP + 60


def _draw(canvas: _Canvas, plans: Sequence[Plan]) -> None:
    """Bars on a logarithmic axis from half the smallest to twice the largest: a bar's length is a ratio, not an amount."""
    rates = [plan.most_fps * plan.request.cameras for plan in plans] + [p.tokens_per_s for p in plans if p.tokens_per_s]
    low, high = min(rates) / 2, max(rates) * 2
    asked = plans[0].fps * plans[0].request.cameras
    low = min(low, asked / 1.5)

    def x_of(rate: float) -> float:
        share = math.log(max(rate, low) / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    bottom = _height(plans) - 50
    canvas.text(16, 24, _title(plans), size=18)
    said = "predicted frames/s in all, by precision, and tokens/s; logarithmic; four of five figures lie within the whiskers"
    canvas.text(16, 48, said)
    _legend(canvas, plans)
    for tick in _TICKS:
        if low < tick < high:
            canvas.line(x_of(tick), _TOP - 6, x_of(tick), bottom, _GRID)
            canvas.text(x_of(tick), bottom + 14, f"{tick:g}", anchor="middle")
    y = float(_TOP)
    for board in dict.fromkeys(plan.target for plan in plans):
        own = [plan for plan in plans if plan.target == board]
        canvas.text(_LEFT - 60, y + _BAR / 2, board, size=14, anchor="end")
        canvas.text(_LEFT - 60, y + _BAR / 2 + 18, _room(own), size=12, anchor="end")
        for plan in own:
            rate = plan.most_fps * plan.request.cameras
            colour = _COLOURS[plan.precision] if plan.fits else _MISSING
            _bar(canvas, x_of, y, rate, plan.frame.bar, colour, plan.precision, f"{rate:.1f} frames/s")
            y += _BAR + _GAP
        tokens, token = own[0].tokens_per_s, own[0].token
        if tokens is not None and token is not None:
            colour = _COLOURS["tokens"] if any(plan.fits for plan in own) else _MISSING
            _bar(canvas, x_of, y, tokens, token.bar, colour, "tokens", f"{tokens:.1f} tokens/s")
            y += _BAR + _GAP
        y += _BOARD_GAP
    canvas.line(x_of(asked), _TOP - 6, x_of(asked), bottom, _INK)
    canvas.text(x_of(asked), bottom + 32, f"asked for: {asked:g}", size=12, anchor="middle")


def _bar(
    canvas: _Canvas, x_of: Callable[[float], float], y: float, rate: float, bar: float, colour: str, name: str, words: str
) -> None:
    canvas.text(_LEFT - 8, y + _BAR / 2, name, size=12, anchor="end")
    canvas.box(_LEFT, y, x_of(rate) - _LEFT, _BAR, colour)
    middle, start, end = y + _BAR / 2, x_of(rate / bar), x_of(rate * bar)
    canvas.line(start, middle, end, middle, _INK)
    for x in (start, end):
        canvas.line(x, middle - 5, x, middle + 5, _INK)
    canvas.text(max(end, x_of(rate)) + 6, middle, words, size=12)


def _room(plans: Sequence[Plan]) -> str:
    fitting = [plan.precision for plan in plans if plan.fits]
    if len(fitting) == len(plans):
        return "fits"
    return f"fits in {', '.join(fitting)}" if fitting else "does not fit (grey)"


def _legend(canvas: _Canvas, plans: Sequence[Plan]) -> None:
    x = 16.0
    for name in (*dict.fromkeys(plan.precision for plan in plans), "tokens"):
        canvas.box(x, 66, 12, 12, _COLOURS[name])
        canvas.text(x + 18, 72, name, size=12)
        x += 80
