"""How far two computations of the same thing are apart, and the report that says so: parity.json and a page to look at."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keepsight.streams.errors import UsageError

__all__ = [
    "GRAPH_LIMITS",
    "LEAST_COSINES",
    "PROMPT_LIMITS",
    "ChangedWeight",
    "Difference",
    "Drift",
    "GraphParity",
    "LanguageParity",
    "Located",
    "PixelParity",
    "Report",
    "difference",
    "graph_difference",
    "marks",
    "write_report",
]

GRAPH_LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 10.0, "fp8": 10.0}
PROMPT_LIMITS = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest difference by precision, in the units of `Difference`: of one graph, and of the soft prompt. Float16 rounds at 5e-4
where float32 does at 6e-8, and errors of some dozen layers add up. In 8 bits one number that is rounded the other way changes
many after it: of two right computations of keepsight-tiny's INT8 encoder single features differed by 7, and the cosine was
0.988, so that is what tells there.
"""

LEAST_COSINES = {"int8": 0.95, "fp8": 0.95}
"""Of one graph, where it is judged by its cosine, too."""

JSON_FILE, PAGE_FILE = "parity.json", "parity.html"


def marks(length: int, frames: int) -> list[int]:
    """After how many frames soft prompts are compared: 1, M, 2M and 5M, as far as there are so many, and at the end."""
    return sorted({count for count in (1, length, 2 * length, 5 * length) if count < frames} | {frames})


@dataclass(frozen=True)
class Difference:
    """One array against its reference.

    Attributes:
        largest, mean: of the absolute difference, in units of the reference's spread where that is above 1.
        cosine: of the two arrays, flattened; 1 for two arrays of zeros.
        limit: what `largest` may be.
        least_cosine: what `cosine` must be.
    """

    largest: float
    mean: float
    cosine: float
    limit: float
    least_cosine: float = -1.0

    @property
    def passed(self) -> bool:
        """False for nan, too."""
        return self.largest <= self.limit and self.cosine >= self.least_cosine


def graph_difference(value: NDArray[Any], reference: NDArray[Any], precision: str) -> Difference:
    """Compare an output of a graph in `fp32`, `fp16`, `int8` or `fp8` with the same graph's elsewhere."""
    return difference(value, reference, GRAPH_LIMITS[precision], LEAST_COSINES.get(precision, -1.0))


def difference(value: NDArray[Any], reference: NDArray[Any], limit: float, least_cosine: float = -1.0) -> Difference:
    """Compare two arrays of the same shape, in float64."""
    a, b = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if a.shape != b.shape:
        raise UsageError(f"an array of {list(a.shape)} can't be compared with one of {list(b.shape)}.")
    if not a.size:
        return Difference(0.0, 0.0, 1.0, limit, least_cosine)
    apart = np.abs(a - b) / max(1.0, float(b.std()))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float((a * b).sum() / norms) if norms else float(not a.any() and not b.any())
    return Difference(float(apart.max()), float(apart.mean()), cosine, limit, least_cosine)


@dataclass(frozen=True)
class Located:
    """The first node of a graph that differs: its name, its operator, the tensor, and its inputs that differ already."""

    node: str
    operator: str
    tensor: str
    largest: float
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedWeight:
    """A weight that is not the source's, and the first node that reads it."""

    weight: str
    node: str
    operator: str


@dataclass(frozen=True)
class GraphParity:
    """One graph on real inputs: each output, where a difference over the limit begins, and the weights that changed."""

    outputs: dict[str, Difference]
    first_difference: Located | None = None
    changed_weights: tuple[ChangedWeight, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.changed_weights and all(output.passed for output in self.outputs.values())


@dataclass(frozen=True)
class Drift:
    """The soft prompt after some frames: with the reference's banks made to merge what the bundle's did, and left alone."""

    frames: int
    forced: Difference
    free: Difference


@dataclass(frozen=True)
class LanguageParity:
    """What the language model makes of both soft prompts.

    Attributes:
        kl: mean and largest KL divergence of the next token's distribution, in nats, over the questions.
        answers: for each question the reference's and the bundle's greedy answer.
    """

    mean_kl: float
    largest_kl: float
    answers: dict[str, tuple[str, str]]

    @property
    def agreement(self) -> float:
        """Share of answers that are equal."""
        return sum(a == b for a, b in self.answers.values()) / max(1, len(self.answers))


@dataclass(frozen=True)
class PixelParity:
    """One way of making frames, against the reference's pixels.

    Attributes:
        name: of the way.
        mean, largest: absolute difference of the pixels, in levels of 255.
        cosine, least_cosine: of the features with those of the reference's pixels, over frames and tokens.
        merges: share of the visual bank's merge decisions that agree; None where nothing merged.
        answers: share of the questions whose answers are the same; None without a language model.
        cost: CPU time of a frame, decoded and scaled, over that of decoding it alone.
        own: whether it is what the bundle's manifest says.
    """

    name: str
    mean: float
    largest: int
    cosine: float
    least_cosine: float
    merges: float | None
    answers: float | None
    cost: float
    own: bool = False


@dataclass
class Report:
    """What `keepsight verify` measured.

    Attributes:
        bundle, against, clip: names of what was compared, and of the frames that it was compared on.
        graphs: by name.
        drift: by number of frames.
        merges: share of merge decisions that agree when both sides are left alone; None where nothing merged.
        language: None for a bundle without a language model.
        pixels: what ways of making frames do, the reference's first; empty where that was not asked. Shown, not judged.
    """

    bundle: str
    against: str
    clip: str
    graphs: dict[str, GraphParity] = field(default_factory=dict)
    drift: list[Drift] = field(default_factory=list)
    merges: dict[str, float] = field(default_factory=dict)
    language: LanguageParity | None = None
    pixels: list[PixelParity] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every output within its limit, and every soft prompt with merges forced. Free running is shown, not judged."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """What is over its limit, one line each."""
        lines = []
        for name, graph in self.graphs.items():
            for output, apart in graph.outputs.items():
                if not apart.passed:
                    lines.append(f"{name}: {output} {_how(apart)}{_where(graph)}")
            for weight in graph.changed_weights:
                lines.append(f"{name}: {weight.weight}, read by the node {weight.node} ({weight.operator}), is not the source's")
        for row in self.drift:
            if not row.forced.passed:
                lines.append(
                    f"soft prompt after {row.frames} frames, merges forced: differs by {row.forced.largest:.2e} "
                    f"(limit {row.forced.limit:.0e})"
                )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For parity.json."""
        content = asdict(self)
        content["passed"], content["failures"] = self.passed, self.failures
        if self.language is not None:
            content["language"]["agreement"] = self.language.agreement
        return content


def _how(apart: Difference) -> str:
    cosine = "" if apart.cosine >= apart.least_cosine else f", cosine {apart.cosine:.4f} (limit {apart.least_cosine})"
    return f"differs by {apart.largest:.2e} (limit {apart.limit:.0e}){cosine}"


def _where(graph: GraphParity) -> str:
    found = graph.first_difference
    if found is None:
        return ""
    after = f" (its inputs {', '.join(found.inputs)} differ)" if found.inputs else ""
    return f"; it begins at the node {found.node} ({found.operator}), tensor {found.tensor}{after}"


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write parity.json and parity.html to `folder`; returns their paths.

    Raises:
        UsageError: the folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(json.dumps(report.as_dict(), indent=2, allow_nan=True) + "\n", encoding="utf-8")
        (folder / PAGE_FILE).write_text(_page(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder} can't be written to ({error.strerror}).", fix="Name a folder: --out FOLDER.") from error
    return folder / JSON_FILE, folder / PAGE_FILE


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.own { font-weight: 600; } .bar { display: inline-block; height: .7rem; background: #b06000; }
.bad { color: #b00020; font-weight: 600; } .good { color: #1b6e35; }
"""


def _page(report: Report) -> str:
    verdict = '<span class="good">passed</span>' if report.passed else '<span class="bad">failed</span>'
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Parity of {_text(report.bundle)}</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>Parity of {_text(report.bundle)}: {verdict}</h1>",
        f"<p>Against {_text(report.against)}, on {_text(report.clip)}.</p>",
        "".join(f'<p class="bad">{_text(line)}</p>' for line in report.failures),
        "<h2>Graphs</h2>",
        _graph_table(report.graphs),
        "<h2>Soft prompt over the stream</h2>" + _drift_plot(report.drift) if report.drift else "",
        _merge_lines(report.merges),
        _language_table(report.language) if report.language is not None else "",
        _pixel_table(report.pixels) if report.pixels else "",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _graph_table(graphs: Mapping[str, GraphParity]) -> str:
    rows = []
    for name, graph in graphs.items():
        for output, apart in graph.outputs.items():
            kind = "number" if apart.passed else "number bad"
            rows.append(
                f"<tr><td>{_text(name)}</td><td>{_text(output)}</td><td class='{kind}'>{apart.largest:.2e}</td>"
                f"<td class=number>{apart.limit:.0e}</td><td class=number>{apart.mean:.2e}</td>"
                f"<td class=number>{apart.cosine:.9f}</td></tr>"
            )
    head = "<tr><th>graph<th>output<th>largest difference<th>limit<th>mean<th>cosine</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _drift_plot(drift: list[Drift]) -> str:
    """Largest difference on a logarithmic axis over the frames: merges forced, free-running, and the limit."""
    width, height, left, bottom = 640, 260, 70, 40
    lowest, highest = -8.0, 1.0
    span = max(row.frames for row in drift) or 1

    def place(frames: int, value: float) -> str:
        level = min(highest, max(lowest, math.log10(max(value, 1e-12)) if math.isfinite(value) else highest))
        x = left + (width - left - 10) * frames / span
        return f"{x:.1f},{(height - bottom) * (highest - level) / (highest - lowest) + 5:.1f}"

    lines = []
    for kind, colour in (("forced", "#1b6e35"), ("free", "#b06000")):
        points = [place(row.frames, getattr(row, kind).largest) for row in drift]
        dots = "".join(f"<circle cx='{p.split(',')[0]}' cy='{p.split(',')[1]}' r=3 fill='{colour}' />" for p in points)
        lines.append(f"<polyline points='{' '.join(points)}' fill=none stroke='{colour}' stroke-width=2 />{dots}")
    limit = drift[0].forced.limit
    lines.append(
        f"<polyline points='{place(0, limit)} {place(span, limit)}' fill=none stroke='#888' stroke-dasharray='4 4' />"
    )
    for power in range(int(lowest), int(highest) + 1, 3):
        x, y = place(0, 10.0**power).split(",")
        lines.append(f"<text x='{float(x) - 8}' y='{float(y) + 4}' text-anchor=end font-size=12>1e{power}</text>")
    for row in drift:
        x = place(row.frames, 1).split(",")[0]
        lines.append(f"<text x='{x}' y='{height - 18}' text-anchor=middle font-size=12>{row.frames}</text>")
    lines.append(f"<text x='{width / 2}' y='{height - 2}' text-anchor=middle font-size=12>frames</text>")
    legend = (
        "<p>Largest difference of the soft prompt: <span style='color:#1b6e35'>with the same merges</span>, "
        "<span style='color:#b06000'>each merging what it finds</span>; the limit is dashed and holds for the first.</p>"
    )
    return f"<svg width={width} height={height} role=img>{''.join(lines)}</svg>{legend}"


def _merge_lines(merges: Mapping[str, float]) -> str:
    return "".join(f"<p>Merge decisions of the {_text(bank)} bank that agree: {share:.2%}.</p>" for bank, share in merges.items())


def _language_table(language: LanguageParity) -> str:
    rows = "".join(
        f"<tr><td>{_text(question)}<td>{_text(theirs)}<td class='{'good' if theirs == ours else 'bad'}'>{_text(ours)}</tr>"
        for question, (theirs, ours) in language.answers.items()
    )
    return (
        f"<h2>Language model</h2><p>KL divergence of the next token: mean {language.mean_kl:.2e}, largest "
        f"{language.largest_kl:.2e} nats. {language.agreement:.0%} of the answers agree.</p>"
        f"<table><tr><th>question<th>reference<th>bundle</tr>{rows}</table>"
    )


def _pixel_table(pixels: list[PixelParity]) -> str:
    """Ways of making frames; a bar is as long as the features are wrong."""
    rows = "".join(
        f"<tr{' class=own' if row.own else ''}><td>{_text(row.name)}{' (this bundle)' if row.own else ''}"
        f"<td class=number>{row.mean:.2f}<td class=number>{row.largest}<td class=number>{row.cosine:.4f}"
        f"<td><span class=bar style='width:{200 * min(1.0, max(0.0, 1 - row.cosine)):.1f}px'></span>"
        f"<td class=number>{row.least_cosine:.3f}<td class=number>{_share(row.merges)}<td class=number>{_share(row.answers)}"
        f"<td class=number>{row.cost:.1f}</tr>"
        for row in pixels
    )
    head = (
        "<tr><th>frames made by<th>mean difference, levels<th>largest<th>cosine of features<th>1 - cosine<th>least cosine"
        "<th>merges that agree<th>answers that agree<th>CPU time, decoding alone = 1</tr>"
    )
    return f"<h2>Pixels before the graph</h2><table>{head}{rows}</table>"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _text(value: str) -> str:
    return html.escape(value)
