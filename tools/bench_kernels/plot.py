"""The picture of the kernels' benchmark: how many times as fast as eager PyTorch everyone is, a row a case, drawn from bench.json alone.

Here: medians and quartiles of ratios by round on a log axis; CUDA graphs have rows of their own.
Not here: the numbers (command.py).
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from wherefrom.pipeline.files import write_aside

COLORS = {
    "triton": "#1f77b4",
    "torch": "#2a9d4a",
    "native": "#7a4fb5",
    "apart": "#7fbf8e",
    "eager": "0.45",
    "compile": "#d97706",
    "torchvision": "#b0305c",
    "torchvision NCHW": "#e39ab5",
}


def draw_speeds(result: Mapping[str, Any], path: Path) -> None:
    """Draw what bench.json holds into a PNG at `path`, whole or not at all."""
    rows = [
        (case["name"] + manner, members)
        for case in result["cases"]
        for manner, members in _by_manner(case["contenders"]).items()
        if "eager" in members
    ]
    figure = Figure(figsize=(11, 2.4 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for place, (_, contenders) in enumerate(rows):
        for name, contender in contenders.items():
            faster = [base / own for base, own in zip(contenders["eager"]["seconds"], contender["seconds"], strict=True)]
            median = contenders["eager"]["median_s"] / contender["median_s"]
            low, _, high = statistics.quantiles(faster, n=4, method="inclusive")
            whiskers = [[max(0.0, median - low)], [max(0.0, high - median)]]
            look: dict[str, Any] = {"marker": "D", "markersize": 8} if contender["ours"] else {"marker": "o", "markersize": 5}
            marks = axes.errorbar(median, place, xerr=whiskers, linestyle="", capsize=2, elinewidth=0.8, color=COLORS[name], **look)
            legend[f"ours, {name}" if contender["ours"] else name] = marks
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_xlabel("times as fast as eager PyTorch (log scale, right is faster); medians of rounds, quartiles", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    where, threads = result["machine"], result["settings"]["threads"]
    on = where["gpu"]["name"] if result["settings"]["cuda"] else f"{where['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    axes.set_title(f"wherefrom's kernels on {on}: forward and backward, unless a row says forward\n{versions}", fontsize=10)
    figure.legend(legend.values(), legend, fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _by_manner(contenders: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return contenders apart by how they were called: "" or ", CUDA graph", which their names end with."""
    apart: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        path, comma, graph = name.partition(",")
        apart.setdefault(comma + graph, {})[path] = contender
    return apart
