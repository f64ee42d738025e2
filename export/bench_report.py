"""What `keepsight bench memory` found, for a reader: a page of figures, and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "print_memory"]

Figures = Mapping[str, Any]
NAIVE = {"default": "naive, PyTorch", "onednn": "naive, PyTorch with oneDNN"}
"""How the naive loop is called by the library that multiplies in it."""
_COLOURS = {"default": "#b5541c", "onednn": "#d9a441", "fast": "#1f5fa8", "grey": "#888888"}


def print_memory(found: Figures, console: Console) -> None:
    """The figures as tables."""
    _print_against_naive(found["against_naive"], console)
    _print_differences(found["against_naive"]["differences"], console)
    _print_sizes(found, console)
    _print_ask(found["ask"], console)
    host = found["machine"]
    console.print(
        f"{host['processor']}, {host['threads']} thread{'s' * (host['threads'] > 1)} of {host['cores']} cores, load average "
        f"{host['load_average']:.1f} at the start; PyTorch {host['torch']}, ONNX Runtime {host['onnxruntime']}"
    )


def _print_against_naive(found: Figures, console: Console) -> None:
    frames, length = found["frames"], found["memory_length"]
    start = 2 * frames // 3
    title = f"Q-Former and memory, M = {length}, {frames} frames in turns; ms a frame, by the clock (processor time)"
    columns = ("", "all frames", f"frames {start + 1} to {frames}", "ratio, all", "ratio, steady", "of the ceiling")
    table = Table(*columns, title=title)
    for name, row in found["naive"].items():
        ratio = row["ratio"]
        table.add_row(
            f"{NAIVE[name]} ({found['linear_gmac_per_s'][name]:.0f} GMAC/s)", _mean(row, 0), _mean(row, start),
            *(f"{ratio[part]['wall']:.1f} ({ratio[part]['processor']:.1f})" for part in ("all", "steady")),
            f"{ratio['all']['share_of_ceiling']:.0%}, {ratio['steady']['share_of_ceiling']:.0%}",
        )  # fmt: skip
    table.add_row("fast, ONNX Runtime", _mean(found["fast"], 0), _mean(found["fast"], start), "", "", "")
    limits, macs = found["ceiling"], found["macs"]
    table.add_row("ceiling by multiply-adds", "", "", f"{limits['all']:.2f}", f"{limits['steady']:.2f}", "")
    console.print(table)
    console.print(
        f"GMAC a frame once full: naive {macs['naive_steady'] / 1e9:.1f}, fast {macs['fast'] / 1e9:.1f}, ViT-g "
        f"{macs['vision'] / 1e9:.1f}. A share above 100 % means that the naive loop's library multiplies more slowly than ONNX "
        "Runtime's."
    )
    whole = ", ".join(f"{gain:.2f} at M = {m}" for m, gain in found["whole_frame_by_macs"].items())
    console.print(f"A whole frame, ViT-g included, gets faster by (from multiply-adds): {whole}.")
    console.print(f"An answer to the standing question takes {found['answer_ms']:.1f} ms more.")


def _mean(row: Figures, start: int) -> str:
    return f"{np.mean(row['wall_ms'][start:]):.0f} ({np.mean(row['processor_ms'][start:]):.0f})"


def _print_differences(found: Figures, console: Console) -> None:
    table = Table("query output against the naive loop's", "largest difference", "limit")
    double, free = found["double"], found["free"]
    table.add_row(f"in double, M = {double['memory_length']}, {double['frames']} frames", f"{double['largest']:.1e}", "1e-10")
    table.add_row("float32, merges forced", f"{found['forced']['largest']:.1e}", "1e-03")
    table.add_row(f"float32, free (values up to {free['largest_value']:.1f})", f"{free['largest']:.1e}", "-")
    console.print(table)
    shares = ((bank, free[f"equal_decisions_{bank}"]) for bank in ("visual", "query"))
    said = (f"{bank} {'-' if share is None else f'{share:.2%}'}" for bank, share in shares)
    console.print(f"equal merge decisions, free: {', '.join(said)}")


def _print_sizes(found: Figures, console: Console) -> None:
    table = Table("fast path alone, once full", "ms a frame (processor time)", "banks, MB")
    for length, row in found["by_length"].items():
        named = f"M = {length}, N = {found['settings']['tokens']}"
        table.add_row(named, f"{row['steady_ms']:.1f} ({row['steady_processor_ms']:.1f})", f"{row['bytes'] / 1e6:.0f}")
    for tokens, row in found["by_tokens"].items():
        if int(tokens) != found["settings"]["tokens"]:
            named = f"M = {found['against_naive']['memory_length']}, N = {tokens}"
            table.add_row(named, f"{row['steady_ms']:.1f} ({row['steady_processor_ms']:.1f})", f"{row['bytes'] / 1e6:.0f}")
    long = found["by_length"][str(found["against_naive"]["memory_length"])]
    for part in ("early", "late"):
        (first, last), row = long[part]["frames"], long[part]
        table.add_row(f"frames {first + 1} to {last}", f"{row['ms']:.1f} ({row['processor_ms']:.1f})", "")
    for mark, row in found["update"].items():
        table.add_row(f"the visual bank's update alone, frame {mark}", f"{row['ms']:.2f} ({row['processor_ms']:.2f})", "")
    console.print(table)
    naive = found["against_naive"]["naive_bytes"]
    console.print(f"the naive loop's banks, without keys and values: {naive / 1e6:.0f} MB")


def _print_ask(found: Figures, console: Console) -> None:
    columns = (f"a question put later, {found['slots']} slots", "ms (processor time)", "times the replay", "largest difference")
    table = Table(*columns)
    replay = found["processor_ms"]["replay"]
    for name, median in found["ms"].items():
        processor, apart = found["processor_ms"][name], found["max_abs_diff"].get(name)
        said = "-" if apart is None else f"{apart:.1e}"
        table.add_row(_asked(name), f"{median:.0f} ({processor:.0f})", f"{processor / replay:.1f}", said)
    console.print(table)
    tiny = found["tiny_bundle"]
    if "not_measured" in tiny:
        console.print(f"share of the time to the first token: not measured ({tiny['not_measured']})")
    else:
        console.print(
            f"share of the time to the first token, with keepsight-tiny and its small language model: {tiny['share']:.0%} "
            f"({tiny['replay_ms']:.1f} of {tiny['first_token_ms']:.1f} ms); with a 7B one: scripts/question-cost"
        )


def _asked(name: str) -> str:
    return {
        "replay": "block-causal replay, one pass", "step by step": "replayed step by step",
        "recomputed, default": "recomputed, PyTorch", "recomputed, onednn": "recomputed, PyTorch with oneDNN",
    }[name]  # fmt: skip


def draw(found: Figures, target: Path) -> None:
    """Write a plot: frames in turns, differences, M, N, length of the stream, a question put later."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(15, 8))
    _draw_turns(axes[0, 0], found["against_naive"])
    _draw_differences(axes[0, 1], found["against_naive"]["differences"])
    _draw_ask(axes[0, 2], found["ask"])
    _draw_sizes(axes[1, 0], found["by_length"], "M, slots of the memory")
    _draw_sizes(axes[1, 1], found["by_tokens"], "N, visual tokens of a frame")
    _draw_stream(axes[1, 2], found["by_length"][str(found["against_naive"]["memory_length"])])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
    host = found["machine"]
    fig.suptitle(f"Memory at full size, float32, random weights; {host['processor']}, {host['threads']} thread(s)", fontsize=12)
    fig.tight_layout()
    fig.savefig(target, dpi=100)
    plt.close(fig)


def _draw_turns(axis: Axes, found: Figures) -> None:
    frames = np.arange(1, found["frames"] + 1)
    for name, row in found["naive"].items():
        label = f"{NAIVE[name]}: {row['ratio']['steady']['processor']:.1f} times the fast path's once full"
        axis.plot(frames, row["processor_ms"], color=_COLOURS[name], label=label)
    axis.plot(frames, found["fast"]["processor_ms"], color=_COLOURS["fast"], label="fast, ONNX Runtime")
    highest = max(max(row["processor_ms"]) for row in found["naive"].values())
    axis.set(
        title=f"Q-Former and memory, M = {found['memory_length']}, in turns", xlabel="frame",
        ylabel="processor time, ms a frame", ylim=(0, 1.35 * highest),
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_differences(axis: Axes, found: Figures) -> None:
    parts = (("free", "float32, free", "default"), ("forced", "float32, merges forced", "fast"), ("double", "double", "grey"))
    for part, label, colour in parts:
        apart = found[part]["by_frame"]
        axis.semilogy(np.arange(1, len(apart) + 1), np.maximum(apart, 1e-17), color=_COLOURS[colour], label=label)
    axis.axhline(1e-3, color=_COLOURS["fast"], lw=0.8, ls=":")
    axis.axhline(1e-10, color=_COLOURS["grey"], lw=0.8, ls=":")
    axis.set(title="query output against the naive loop's (dotted: limits)", xlabel="frame", ylabel="largest difference")
    axis.set_ylim(1e-16, 10)
    axis.legend(frameon=False, fontsize=8, loc="center right")


def _draw_ask(axis: Axes, found: Figures) -> None:
    names, times = zip(*found["processor_ms"].items(), strict=True)
    colours = [_COLOURS[{"replay": "fast", "step by step": "grey"}.get(name, name.rsplit(" ", 1)[-1])] for name in names]
    bars = axis.barh([_asked(name).replace(", ", ",\n", 1) for name in names], times, color=colours)
    axis.bar_label(bars, fmt="%.0f ms", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set(title=f"a question put later, {found['slots']} slots", xlabel="processor time, ms", xlim=(0, 1.2 * max(times)))


def _draw_sizes(axis: Axes, rows: Figures, label: str) -> None:
    sizes = sorted(int(size) for size in rows)
    axis.plot(sizes, [rows[str(size)]["steady_processor_ms"] for size in sizes], "o-", color=_COLOURS["fast"])
    axis.set(title=f"fast path alone against {label.split(',')[0]}", xlabel=label, xticks=sizes)
    axis.set_ylabel("processor time, ms a frame", color=_COLOURS["fast"])
    axis.set_ylim(0, 1.3 * max(row["steady_processor_ms"] for row in rows.values()))
    other = axis.twinx()
    other.plot(sizes, [rows[str(size)]["bytes"] / 1e6 for size in sizes], "s--", color=_COLOURS["grey"])
    other.set_ylabel("banks, MB (dashed)", color=_COLOURS["grey"])
    other.set_ylim(0)
    other.spines["top"].set_visible(False)


def _draw_stream(axis: Axes, row: Figures) -> None:
    times = row["processor_ms"]
    axis.plot(np.arange(1, len(times) + 1), times, color=_COLOURS["fast"], lw=1)
    axis.set(title="fast path alone, frame by frame", xlabel="frame", ylabel="processor time, ms a frame")
    axis.set_ylim(0, 1.3 * max(times))
