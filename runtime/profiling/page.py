"""A report as one HTML page: no script, nothing from elsewhere, so that it opens anywhere, offline, and can be mailed."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from keepsight.runtime.profiling import svg
from keepsight.runtime.profiling.outline import PATHS, Block, blocks, figures, makeup, place, rows, throttled
from keepsight.runtime.profiling.report import FRAME_STAGES, QUESTION_STAGES, Chain, Moment, Profile, Question, Stage

__all__ = ["page"]

_POINTS = 240  # of a line: more than a screen shows would only make the page larger
_QUESTIONS = 20
_BLOCKS = 60
_LAYERS = 12  # of a block
_BINS = 30

_COLOURS: dict[Chain, dict[str, int]] = {
    "frame": dict(zip(FRAME_STAGES, (5, 6, 3, 4, 0, 2, 1, 7), strict=True)),
    "question": dict(zip(QUESTION_STAGES, (5, 1, 3, 2, 7), strict=True)),
}

# The palette of Okabe and Ito, which can be told apart without seeing all colours, and a grey. Its yellow is too light for a line
# on white, its blue too dark for one on black: these two change with the page.
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --on0: #fff; --text: #1a1a1a; --faint: #5d5d5d; --rule: #ddd; --panel: #f6f6f4;
  --c0: #0072b2; --c1: #e69f00; --c2: #009e73; --c3: #cc79a7; --c4: #d55e00; --c5: #56b4e9; --c6: #b8a800; --c7: #8a8a8a;
  --bad: #b00020; --good: #1b6e35; --shade: #d55e0033; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --on0: #fff; --text: #e6e6e6; --faint: #a5a5a5; --rule: #3a3d42;
  --panel: #1f2226; --c0: #2b7bba; --c6: #f0e442; --bad: #ff8a8a; --good: #6fd08c; --shade: #d55e0055; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--back); overflow-wrap: anywhere; }
h1 { line-height: 1.2; margin-bottom: .3rem; } h2 { margin: 2.4rem 0 .4rem; border-bottom: 1px solid var(--rule); }
h3 { margin: 1.4rem 0 .3rem; font-size: 1rem; } p { margin: .4rem 0; } .faint { color: var(--faint); }
.bad { color: var(--bad); font-weight: 600; } code { font-size: .9em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--panel); border-radius: .4rem; padding: .5rem .8rem; }
.tiles b { display: block; font-size: 1.15rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; } dt { color: var(--faint); }
dd { margin: 0; min-width: 0; }
.wide { overflow-x: auto; margin: .4rem 0; }
.wide > svg { width: 100%; min-width: 34rem; max-width: 48rem; height: auto; display: block; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-size: .85rem; } .small svg { width: 100%; max-width: 20rem; height: auto; display: block; }
table { border-collapse: collapse; margin: .4rem 0; font-size: .93rem; }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-left: .7rem; }
tr.whole td { font-weight: 600; } tr.inside td:first-child { padding-left: 1.4rem; } td.words { min-width: 9rem; }
.key { font-size: .88rem; margin: .2rem 0; } .key span { white-space: nowrap; margin-right: 1rem; display: inline-block; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; vertical-align: -.05em; }
summary { cursor: pointer; } details { margin: .3rem 0; } details table { margin-left: 1rem; }
.track { display: inline-block; width: 160px; } rect { stroke: var(--back); stroke-width: .6; }
svg rect.shade { stroke: none; } .share { display: inline-block; height: .65em; background: var(--c0); min-width: 1px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); } svg text.strong { font-weight: 600; }
svg .grid { stroke: var(--rule); fill: none; } svg .axis { stroke: var(--faint); fill: none; }
svg .mark { stroke: var(--text); stroke-dasharray: 3 2; fill: none; } svg .shade { fill: var(--shade); }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .area { fill-opacity: .16; }
svg text.on { fill: #111; } svg text.on0 { fill: var(--on0); } .key svg { width: 1.9em; height: .6em; margin-right: .35em; }
"""
_STYLE += "".join(
    f"svg .c{i} {{ fill: var(--c{i}); }} svg .s{i} {{ stroke: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }}\n"
    for i in range(svg.COLOURS)
)


def page(profile: Profile) -> str:
    """The whole page. What the report does not have, the page has no section for."""
    sections = (
        _head, _frame, _question, _histograms, _memory, _sensors, _energy, _layers, _contention, _cold_start, _numbers, _versions
    )  # fmt: skip
    title = _text(f"Profile of {profile.bundle}")
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            *(section(profile) for section in sections),
            "</body></html>\n",
        ]
    )


def _head(profile: Profile) -> str:
    kind = f"{profile.variant} on {profile.backend}, memory {profile.memory_policy}"
    language = "no language model" if profile.language_model is None else profile.language_model
    runs = f" in {profile.runs} runs" if profile.runs > 1 else ""
    tiles = "".join(f"<div><span>{_text(name)}</span><b>{_text(value)}</b></div>" for name, value in figures(profile))
    spans = throttled(profile)
    slowed = (
        f'<p class="bad">Throttled for {sum(end - start for start, end, _ in spans):.1f} s while it was measured: '
        f"{_text(', '.join(sorted({why for *_, why in spans})))}. These figures are not those of a cool machine.</p>"
        if spans
        else ""
    )
    facts = (
        *place(profile), ("bundle", f"{profile.bundle}, {kind}"), ("language model", language),
        ("source", f"{profile.source}, {profile.frames} frame{'' if profile.frames == 1 else 's'}{runs}"),
        ("measured", profile.made_at.replace("T", " ").replace("Z", " UTC").replace("+00:00", " UTC")),
    )  # fmt: skip
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    notes = "".join(f"<li>{_text(note)}</li>" for note in profile.notes)
    return (
        f'<h1>Profile of {_text(profile.bundle)}</h1><p class="faint">{_text(kind)}, on {_text(profile.machine.title)}'
        f"{_text(f', power mode {profile.machine.power_mode}') if profile.machine.power_mode else ''}</p>{slowed}"
        f'<div class="tiles">{tiles}</div><dl>{listed}</dl>{f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""}'
    )


def _frame(profile: Profile) -> str:
    return _stacked(profile, "frame", "Where a frame's time goes", "frames")


def _stacked(profile: Profile, path: Chain, heading: str, things: str) -> str:
    bars = []
    for name, percentile in (("median", 50), ("p95", 95)):
        parts = [(_colour(part, path), part, ms) for part, ms in makeup(profile, path, percentile)]
        if parts:
            bars.append((name, parts))
    if not bars:
        return ""
    about = "; ".join(f"{name}: " + ", ".join(f"{part} {svg.rounded(ms)} ms" for _, part, ms in parts) for name, parts in bars)
    text = (
        f"The {things} around the median and the 95th percentile of the end-to-end time, and the stages that add up to it "
        "(mean over a twentieth of them; stages' own percentiles, in the table below, do not add up)."
    )
    plot = svg.stacked(bars, "ms", f"{heading}, by stage", about)
    return f'<h2>{heading}</h2><p class="faint">{text}</p>{_key(bars[0][1])}<div class="wide">{plot}</div>'


def _key(parts: Sequence[tuple[int, str, float]]) -> str:
    return '<p class="key">' + "".join(f'<span><i class="k{c % 8}"></i>{_text(name)}</span>' for c, name, _ in parts) + "</p>"


def _colour(name: str, path: Chain) -> int:
    """Each stage has one colour wherever it is drawn; what is left over is grey."""
    return _COLOURS[path].get(name, 7)


def _question(profile: Profile) -> str:
    if not profile.questions:
        return ""
    asked = sorted(profile.questions, key=_lasts)
    median = asked[(len(asked) - 1) // 2]
    spans = [(name, [(_colour(name, "question"), name, start, ms)]) for name, start, ms in median.stages]
    about = ", ".join(f"{name} from {svg.rounded(start)} for {svg.rounded(ms)} ms" for name, start, ms in median.stages)
    plot = svg.gantt(spans, "ms", f"Timeline of the question: {median.text}", about)
    return (
        _stacked(profile, "question", "Where an answer's time goes", "answers")
        + f"<h2>Timeline of a question</h2><p>The one that took the median time: “{_text(_cut(median.text))}” "
        f"({_text(median.mode)}, {median.tokens} token{'' if median.tokens == 1 else 's'}): “{_text(_cut(median.answer))}”</p>"
        f'<div class="wide">{plot}</div>{_every_question(profile)}'
    )


def _lasts(question: Question) -> float:
    return max((start + ms for _, start, ms in question.stages), default=0.0)


def _every_question(profile: Profile) -> str:
    if len(profile.questions) == 1:
        return ""
    shown = profile.questions[:_QUESTIONS]
    lines = [
        (f"{number}. {question.text}", [(_colour(name, "question"), name, start, ms) for name, start, ms in question.stages])
        for number, question in enumerate(shown, start=1)
    ]
    names = list(dict.fromkeys((c, name, 0.0) for _, spans in lines for c, name, *_ in spans))
    about = "; ".join(f"{question.text}: {svg.rounded(_lasts(question))} ms" for question in shown)
    answers = "".join(
        f'<tr><td class="n">{number}</td><td class="words">{_text(_cut(question.text))}</td>'
        f'<td class="words">{_text(_cut(question.answer))}</td><td>{_text(question.mode)}</td>'
        f'<td class="n">{question.tokens}</td><td class="n">{svg.rounded(_lasts(question), 4)}</td></tr>'
        for number, question in enumerate(shown, start=1)
    )
    left = len(profile.questions) - len(shown)
    rest = f'<p class="faint">The first {len(shown)} of {len(profile.questions)}.</p>' if left else ""
    head = '<tr><th class="n">#<th>question<th>answer<th>mode<th class="n">tokens<th class="n">ms</tr>'
    plot = svg.gantt(lines, "ms", "Timelines of all questions", about)
    return (
        f'<h3>Every question</h3>{rest}{_key(names)}<div class="wide">{plot}</div>'
        f"<details><summary>Questions and answers</summary><table>{head}{answers}</table></details>"
    )


def _cut(words: str, most: int = 300) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _histograms(profile: Profile) -> str:
    figures = [_histogram(row.stage) for path, _ in PATHS for row in rows(profile, path) if len(row.stage.samples) > 1]
    if not figures:
        return ""
    text = "Milliseconds; dashed: the median and the 95th percentile. Where the slowest few are far out, they are counted alone."
    return f'<h2>Spread of each stage</h2><p class="faint">{text}</p><div class="small">{"".join(figures)}</div>'


def _histogram(stage: Stage) -> str:
    values, found = np.asarray(stage.samples), stage.statistics
    # A single far sample would press all others into one bar.
    upper = float(np.percentile(values, 75))
    cut = max(found.p95, found.p50 + 6 * (upper - found.p50))
    high = cut if found.max - found.min > 1.5 * (cut - found.min) > 0 else found.max
    inner = values[values <= high]
    low = found.min
    counts, edges = np.histogram(inner, bins=min(_BINS, max(4, len(inner))), range=(low, high) if high > low else None)
    beyond = len(values) - len(inner)
    more = f", {beyond} from {svg.rounded(high)} to {svg.rounded(found.max)} not drawn" if beyond else ""
    about = f"{found.n} samples, median {svg.rounded(found.p50)} ms, 95th percentile {svg.rounded(found.p95)} ms{more}"
    marks = (("p50", found.p50), ("p95", found.p95))
    plot = svg.columns(counts.tolist(), float(edges[0]), float(edges[-1]), marks, f"Histogram of {stage.name}", about)
    inside = f' <span class="faint">in {_text(stage.inside)}</span>' if stage.inside else ""
    return f"<figure><figcaption><b>{_text(stage.name)}</b>{inside}, {found.n} samples{more}</figcaption>{plot}</figure>"


def _memory(profile: Profile) -> str:
    found = []
    if len(profile.timeline) > 1:
        moments = _thinned(profile.timeline, lambda moment: float(moment.resident))
        scale, unit = (1e9, "GB") if max(moment.resident for moment in moments) >= 2e9 else (1e6, "MB")
        series = svg.Series("resident", [moment.resident / scale for moment in moments])
        most = max(profile.timeline, key=lambda moment: moment.resident)
        about = (
            f"most: {most.resident / scale:.4g} {unit} after {most.t:.1f} s; at the end {moments[-1].resident / scale:.4g} {unit}"
        )
        times = [moment.t for moment in moments]
        plot = svg.lines(times, [series], unit, "Resident memory of the process", about, from_zero=True, filled=True)
        found.append(f'<p class="faint">Of the process, {about}.</p><div class="wide">{plot}</div>')
    if profile.memory:
        most_bytes = max(1, *(use.peak for use in profile.memory))
        lines = "".join(
            f'<tr><td class="words">{_text(use.component)}</td><td class="n">{use.steady / 1e6:.1f}</td>'
            f'<td class="n">{use.peak / 1e6:.1f}</td><td>{use.basis}</td>'
            f'<td><span class="share" style="width:{140 * use.peak / most_bytes:.0f}px"></span></td></tr>'
            for use in profile.memory
        )
        head = '<tr><th>component<th class="n">steady, MB<th class="n">peak, MB<th>basis<th></tr>'
        found.append(f'<div class="wide"><table>{head}{lines}</table></div>')
    return "<h2>Memory</h2>" + "".join(found) if found else ""


def _thinned(moments: Sequence[Moment], value: Callable[[Moment], float]) -> list[Moment]:
    """At most `_POINTS` moments: of each stretch the one that is highest, so that no peak is lost."""
    if len(moments) <= _POINTS:
        return list(moments)
    edges = np.linspace(0, len(moments), _POINTS + 1).astype(int)
    return [max(moments[start:end], key=value) for start, end in pairwise(edges)]


def _sensors(profile: Profile) -> str:
    if len(profile.timeline) < 2:
        return ""
    spans = throttled(profile)
    shaded = [(start, end) for start, end, _ in spans]
    plots = []
    for heading, unit, series, from_zero in _sensor_series(profile):
        if not series:
            continue
        times, thinned = _averaged([moment.t for moment in profile.timeline], series)
        about = "; ".join(f"{one.name}: {_range(one.y)} {unit}" for one in series)
        key = "".join(
            f'<span>{svg.swatch(index)}{_text(one.name)} <span class="faint">{_range(one.y)}</span></span>'
            for index, one in enumerate(series)
        )
        plot = svg.lines(times, thinned, unit, heading, about, shaded=shaded, from_zero=from_zero)
        plots.append(f'<h3>{heading}</h3><p class="key">{key}</p><div class="wide">{plot}</div>')
    if not plots:
        return ""
    slowed = "".join(f"<li>{start:.1f} to {end:.1f} s: {_text(why)}</li>" for start, end, why in spans[:20])
    text = f"<p>Throttled, shaded in the plots:</p><ul>{slowed}</ul>" if spans else "<p>Not throttled at any moment.</p>"
    return f"<h2>Power, temperature, clocks</h2>{text}{''.join(plots)}"


def _sensor_series(profile: Profile) -> Iterator[tuple[str, str, list[svg.Series], bool]]:
    moments = profile.timeline
    rails = list(dict.fromkeys(name for moment in moments for name in moment.rails))
    rails = [name for name in rails if any(moment.rails.get(name) != moment.watts for moment in moments)]  # not twice
    zones = list(dict.fromkeys(name for moment in moments for name in moment.celsius))
    power = [svg.Series("whole board", [moment.watts for moment in moments])]
    power += [svg.Series(name, [moment.rails.get(name) for moment in moments]) for name in rails]
    yield "Power", "W", _known(power), True
    yield "Temperature", "°C", _known([svg.Series(name, [m.celsius.get(name) for m in moments]) for name in zones]), False
    clocks = [("GPU", [moment.gpu_hz for moment in moments]), ("CPU", [moment.cpu_hz for moment in moments])]
    yield "Clocks", "MHz", _known([svg.Series(name, [v / 1e6 if v else None for v in hz]) for name, hz in clocks]), True
    yield (
        "GPU load",
        "%",
        _known([svg.Series("GPU", [100 * m.gpu_load if m.gpu_load is not None else None for m in moments])]),
        True,
    )


def _known(series: list[svg.Series]) -> list[svg.Series]:
    return [one for one in series if any(value is not None for value in one.y)]


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = svg.rounded(min(known)), svg.rounded(max(known))
    return low if low == high else f"{low} to {high}"


def _averaged(times: list[float], series: list[svg.Series]) -> tuple[list[float], list[svg.Series]]:
    """The same over at most `_POINTS` stretches of time, averaged."""
    if len(times) <= _POINTS:
        return times, series
    edges = np.linspace(0, len(times), _POINTS + 1).astype(int)
    parts = list(pairwise(edges))

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return [times[a] for a, _ in parts], [svg.Series(one.name, [mean(one.y[a:b]) for a, b in parts]) for one in series]


def _energy(profile: Profile) -> str:
    if (energy := profile.energy) is None:
        return ""
    lines = "".join(
        f'<tr><td>{words}</td><td class="n">{_joules(whole)}</td><td class="n">{_joules(above)}</td></tr>'
        for words, whole, above in (
            ("a frame", energy.per_frame, energy.marginal_per_frame),
            ("an answer", energy.per_answer, energy.marginal_per_answer),
        )
    )
    return (
        f'<h2>Energy</h2><p class="faint">By {_text(energy.meter)}; idle {energy.idle_watts:.3g} W.</p><table><tr><th>for'
        f'<th class="n">in all, J<th class="n">above idle, J</tr>{lines}</table>'
    )


def _joules(value: float | None) -> str:
    return "-" if value is None else svg.rounded(value)


def _layers(profile: Profile) -> str:
    if not profile.layers:
        return ""
    found = ["<h2>Layers, by block of the graph</h2>", '<p class="faint">As TensorRT times them, one by one; open a block.</p>']
    every = blocks(profile)
    for engine in dict.fromkeys(block.engine for block in every):
        own = [block for block in every if block.engine == engine]
        total = sum(block.ms for block in own) or 1.0
        found.append(f"<h3>{_text(engine)}: {svg.rounded(total, 4)} ms</h3>")
        shown = own if len(own) <= _BLOCKS else sorted(own, key=lambda block: -block.ms)[:_BLOCKS]
        found += [_block(block, total) for block in shown]
        if len(shown) < len(own):
            rest = total - sum(block.ms for block in shown)
            found.append(f'<p class="faint">{len(own) - len(shown)} smaller blocks: {svg.rounded(rest)} ms</p>')
    return "".join(found)


def _block(block: Block, total: float) -> str:
    share = block.ms / total
    lines = "".join(
        f'<tr><td class="n">{svg.rounded(layer.ms)}</td><td>{_text(_cut(layer.name, 160))}</td></tr>'
        for layer in block.layers[:_LAYERS]
    )
    more = len(block.layers) - _LAYERS
    rest = f'<tr><td></td><td class="faint">and {more} more</td></tr>' if more > 0 else ""
    bar = f'<span class="track"><span class="share" style="width:{160 * share:.0f}px"></span></span>'
    return (
        f"<details><summary>{bar} {_text(_cut(block.name, 100))}: "
        f"{svg.rounded(block.ms)} ms, {share:.1%}</summary><table>{lines}{rest}</table></details>"
    )


def _contention(profile: Profile) -> str:
    if (both := profile.contention) is None:
        return ""
    lines = "".join(
        f'<tr><td>{words}</td><td class="n">{svg.rounded(alone)}</td><td class="n">{svg.rounded(together)}</td>'
        f'<td class="n">{f"x {together / alone:.2f}" if alone else "-"}</td></tr>'
        for words, (alone, together) in (
            ("frames/s", both.frames_per_s), ("tokens/s", both.tokens_per_s),
            ("vision, ms a frame", both.vision_ms), ("language model, ms a token", both.token_ms),
        )
    )  # fmt: skip
    return (
        "<h2>Vision and language model at once</h2><table><tr><th><th class=n>alone<th class=n>together<th class=n>changes</tr>"
        f"{lines}</table>"
    )


def _cold_start(profile: Profile) -> str:
    if not profile.cold_start:
        return ""
    starts = np.cumsum([0.0] + [phase.ms for phase in profile.cold_start]).tolist()
    spans = [
        (phase.name, [(index, phase.name, start, phase.ms)])
        for index, (phase, start) in enumerate(zip(profile.cold_start, starts, strict=False))
    ]
    about = ", ".join(f"{phase.name} {svg.rounded(phase.ms)} ms" for phase in profile.cold_start)
    plot = svg.gantt(spans, "ms", "Cold start", about)
    text = f"Before all that is above, {starts[-1] / 1000:.3g} s in all."
    return f'<h2>Cold start</h2><p class="faint">{text}</p><div class="wide">{plot}</div>'


def _numbers(profile: Profile) -> str:
    head = "".join(f'<th class="n">{name}' for name in ("n", "p50", "p90", "p95", "p99", "mean", "least", "most"))
    tables = []
    for path, words in PATHS:
        lines = []
        for row in rows(profile, path):
            found = row.stage.statistics
            numbers = (found.p50, found.p90, found.p95, found.p99, found.mean, found.min, found.max)
            cells = "".join(f'<td class="n">{value:.3f}</td>' for value in numbers)
            share = "" if row.share is None else f"{row.share:.1%}"
            kind = ("whole", "link", "inside", "link")[row.depth]
            lines.append(
                f'<tr class="{kind}"><td>{_text(row.stage.name)}</td><td class="n">{share}</td><td>{row.stage.clock}</td>'
                f'<td class="n">{found.n}</td>{cells}</tr>'
            )
        if lines:
            top = f'<tr><th>stage<th class="n">share<th>clock{head}</tr>'
            tables.append(f'<h3>{words.capitalize()}</h3><div class="wide"><table>{top}{"".join(lines)}</table></div>')
    drops = ", ".join(f"{_text(cause)} {count}" for cause, count in profile.drops.items())
    return "<h2>All numbers, ms</h2>" + "".join(tables) + (f"<p>Live frames dropped: {drops}.</p>" if drops else "")


def _versions(profile: Profile) -> str:
    dims = {str(name): str(value) for name, value in profile.dims.items()}
    facts = {
        "fingerprint": profile.fingerprint, "keepsight": profile.keepsight, **profile.machine.versions, **dims
    }  # fmt: skip
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(_cut(value))}</dd>" for name, value in facts.items())
    return f"<h2>How it was measured</h2><p><code>{_text(_cut(profile.command, 2000))}</code></p><dl>{listed}</dl>"


def _text(value: str) -> str:
    return html.escape(value)
