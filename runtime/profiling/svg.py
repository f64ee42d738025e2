"""Plots as SVG text: scales with round ticks, bars, lines and spans. Colours are classes, on which a page's style decides."""

from __future__ import annotations

import html
import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "COLOURS",
    "FONT",
    "Scale",
    "Series",
    "columns",
    "fit",
    "gantt",
    "lines",
    "picture",
    "rounded",
    "stacked",
    "swatch",
    "ticks",
]

COLOURS = 8
"""How many classes of colours there are: `c0` to `c7`; further series begin again, with another dash."""

FONT = 12
"""Pixels. A character is taken to be 0.63 of it wide, as in broad fonts, 1 if it is a wide one (Chinese, an emoji)."""

_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_ids = itertools.count()


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart, at most `most` of them."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / max(1, most - 1)))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first + 1 <= most:
            return [number * step * factor for number in range(first, last + 1)]
    return [low]


def rounded(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent: 0.0123, 4.5, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(places, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Scale:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start if span == 0 else self.start + (self.end - self.start) * (value - self.low) / span


@dataclass(frozen=True)
class Series:
    """A line of a plot: as many `y` as the plot has `x`, None where there is no value."""

    name: str
    y: Sequence[float | None]


def fit(words: str, pixels: float, size: int = FONT) -> str:
    """A text, with an ellipsis if it is longer than so many pixels."""
    if _wide(words, size) <= pixels:
        return words
    kept = len(words)
    while kept and _wide(words[:kept] + "…", size) > pixels:
        kept -= 1
    return words[:kept].rstrip() + "…"


def _wide(words: str, size: int = FONT) -> float:
    return size * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.63 for letter in words)


def picture(title: str, description: str, width: int, height: int, body: str) -> str:
    """An SVG that a screen reader can tell of."""
    name = f"p{next(_ids)}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}t {name}d"><title id="{name}t">'
        f'{html.escape(title)}</title><desc id="{name}d">{html.escape(description)}</desc>{body}</svg>'
    )


def columns(
    counts: Sequence[int], low: float, high: float, marks: tuple[tuple[str, float], tuple[str, float]], title: str, about: str
) -> str:
    """A small histogram of milliseconds: `counts` between `low` and `high`, with two named marks, the lower one first."""
    width, height, bottom, top = 240, 118, 94, 20
    across, up = Scale(low, high, 8, width - 8), Scale(0, max(*counts, 1), bottom, top)
    step = (across.end - across.start) / len(counts)
    bars = "".join(
        f"M{across.start + index * step:.1f} {bottom}V{up(count):.1f}h{max(0.5, step - 1):.1f}V{bottom}z"
        for index, count in enumerate(counts)
        if count
    )
    parts = [f'<path class="c0" d="{bars}"/>', _rule(across, bottom), *_across(across, bottom, 4, room=width)]
    # The lower mark is named on its left, the upper one on its right, each moved as far as it must be to stay within the picture.
    (low_name, low_mark), (high_name, high_mark) = marks
    at = [across(min(max(value, low), high)) for value in (low_mark, high_mark)]
    right = min(at[1] + 3, width - _wide(high_name))
    left = max(0.0, min(at[0] - 3, right - 6) - _wide(low_name))
    right = max(right, left + _wide(low_name) + 6)
    parts += [f'<path class="mark" d="M{x:.1f} {top - 12}V{bottom}"/>' for x in at]
    parts += [_text(left, top - 5, low_name, "start"), _text(right, top - 5, high_name, "start")]
    return picture(title, about, width, height, "".join(parts))


def stacked(bars: Sequence[tuple[str, Sequence[tuple[int, str, float]]]], unit: str, title: str, about: str) -> str:
    """Horizontal bars of parts: (name of the bar, (colour, name of the part, length) one by one)."""
    width, left, row, top = 680, 92, 46, 6
    longest = max((sum(max(0.0, part[2]) for part in parts) for _, parts in bars), default=0.0) or 1.0
    across = Scale(0, longest, left, width - 76)
    bottom = top + row * len(bars)
    found = [*_grid(across, top, bottom, 8), *_across(across, bottom, 8, unit)]
    for index, (name, parts) in enumerate(bars):
        y, at = top + row * index + 6, 0.0
        found.append(_text(left - 8, y + 22, fit(name, left - 8), "end"))
        for colour, part, length in parts:
            length = max(0.0, length)
            x, wide = across(at), across(at + length) - across(at)
            label = f"{part}: {rounded(length)} {unit}"
            found.append(
                f'<rect class="c{colour % COLOURS}" x="{x:.1f}" y="{y}" width="{wide:.2f}" height="{row - 12}">'
                f"<title>{html.escape(label)}</title></rect>"
            )
            if wide >= 12 + _wide(part):
                found.append(_text(x + wide / 2, y + 21, part, "middle", f"on on{colour % COLOURS}"))
            at += length
        found.append(_text(across(at) + 6, y + 22, f"{rounded(at)} {unit}", "start", "strong"))
    return picture(title, about, width, bottom + 36, "".join(found))


def gantt(rows: Sequence[tuple[str, Sequence[tuple[int, str, float, float]]]], unit: str, title: str, about: str) -> str:
    """When each thing of a row began and how long it took: (name of the row, (colour, name, start, length) one by one)."""
    width, left, row, top = 680, 190 if any(len(name) > 14 for name, _ in rows) else 100, 26, 4
    end = max((start + length for _, spans in rows for _, _, start, length in spans), default=0.0) or 1.0
    across = Scale(0, end, left, width - 70)
    bottom = top + row * len(rows)
    found = [*_grid(across, top, bottom, 7), *_across(across, bottom, 7, unit)]
    for index, (name, spans) in enumerate(rows):
        y, last = top + row * index + 4, 0.0
        found.append(f"<g><title>{html.escape(name)}</title>{_text(left - 8, y + 13, fit(name, left - 8), 'end')}</g>")
        for colour, part, start, length in spans:
            x, wide = across(start), max(1.0, across(start + length) - across(start))
            label = f"{part}: {rounded(length)} {unit} from {rounded(start)} {unit}"
            found.append(
                f'<rect class="c{colour % COLOURS}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{row - 8}">'
                f"<title>{html.escape(label)}</title></rect>"
            )
            last = max(last, start + length)
        length = sum(span[3] for span in spans)
        found.append(_text(across(last) + 6, y + 13, f"{rounded(length)} {unit}", "start"))
    return picture(title, about, width, bottom + 36, "".join(found))


def lines(
    x: Sequence[float], series: Sequence[Series], unit: str, title: str, about: str, *,
    shaded: Sequence[tuple[float, float]] = (), from_zero: bool = False, filled: bool = False,
) -> str:  # fmt: skip
    """Lines over seconds; `shaded` are spans of x, `filled` the area below the first line."""
    width, height, left, top = 680, 200, 62, 18
    bottom = height - 38
    values = [value for one in series for value in one.y if value is not None] or [0.0]
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    low, high = (low if from_zero else low - room), high + room
    across, up = Scale(min(0.0, x[0]), max(x[-1], x[0] + 1e-3), left, width - 14), Scale(low, high, bottom, top)
    found = []
    for start, end in shaded:
        wide = max(2.0, across(end) - across(start))
        found.append(f'<rect class="shade" x="{across(start):.1f}" y="{top}" width="{wide:.1f}" height="{bottom - top}"/>')
    marks = ticks(low, high, 5)
    for mark in marks:
        found.append(f'<path class="grid" d="M{left} {up(mark):.1f}H{width - 14}"/>')
        found.append(_text(left - 7, up(mark) + 4, _ticked(mark, marks), "end"))
    found.append(_text(4, 11, unit, "start"))
    found += _across(across, bottom, 8, "s")
    for index, one in enumerate(series):
        path = _path(x, one.y, across, up)
        if filled and index == 0 and path:
            found.append(f'<path class="area c0" d="{path}V{bottom}H{across(x[0]):.1f}z"/>')
        found.append(f'<path {_stroke(index)} d="{path}"><title>{html.escape(one.name)}</title></path>')
    return picture(title, about, width, height, "".join(found))


def swatch(index: int) -> str:
    """A short piece of a plot's line, for its key."""
    return f'<svg viewBox="0 0 28 8" aria-hidden="true"><path {_stroke(index)} d="M0 4H28"/></svg>'


def _stroke(index: int) -> str:
    """Lines differ by their dashes, too, not by colour alone."""
    dash = _DASHES[index % len(_DASHES)]
    return f'class="line s{index % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _path(x: Sequence[float], y: Sequence[float | None], across: Scale, up: Scale) -> str:
    path, drawing = [], False
    for at, value in zip(x, y, strict=True):
        if value is not None:
            path.append(f"{'L' if drawing else 'M'}{across(at):.1f} {up(value):.1f}")
        drawing = value is not None
    if len(path) == 1:
        path.append("h3")  # a single moment would not be seen
    return "".join(path)


def _across(across: Scale, bottom: float, most: int, unit: str = "", room: float = math.inf) -> list[str]:
    """The ticks and numbers of a horizontal axis, `unit` below them in the middle. Numbers stay within 0 and `room`."""
    found = []
    for mark, number in _marks(across, most):
        half = _wide(number) / 2
        found.append(f'<path class="axis" d="M{across(mark):.1f} {bottom}v4"/>')
        found.append(_text(max(half, min(across(mark), room - half)), bottom + 17, number, "middle"))
    if unit:
        found.append(_text((across.start + across.end) / 2, bottom + 32, unit, "middle"))
    return found


def _grid(across: Scale, top: float, bottom: float, most: int) -> list[str]:
    return [f'<path class="grid" d="M{across(mark):.1f} {top}V{bottom}"/>' for mark, _ in _marks(across, most)]


def _marks(across: Scale, most: int) -> list[tuple[float, str]]:
    """Ticks of a horizontal axis with their numbers, so few that these don't write over each other."""
    found: list[tuple[float, str]] = []
    for count in range(most, 0, -1):
        marks = ticks(across.low, across.high, count)
        found = [(mark, _ticked(mark, marks)) for mark in marks]
        # Numbers at an end may be moved inwards by half their width.
        if all((across(b) - across(a)) >= 1.5 * max(_wide(x), _wide(y)) for (a, x), (b, y) in pairwise(found)):
            break
    return found


def _rule(across: Scale, y: float) -> str:
    return f'<path class="axis" d="M{across.start} {y}H{across.end}"/>'


def _ticked(mark: float, marks: Sequence[float]) -> str:
    """A tick's number, with as many decimals as the step has."""
    step = marks[1] - marks[0] if len(marks) > 1 else abs(mark) or 1.0
    return f"{mark:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(words)}</text>'
