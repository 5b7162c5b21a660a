"""The picture of a loader benchmark: pictures a second of everybody, drawn from what bench.json holds.

Here: a panel for each kind of views and pictures, a group of bars for each contender, ratios to the Pillow DataLoader.
Not here: the numbers (command.py). Medians; the whiskers are the least and the largest round.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE = "pil"  # whom all others are compared with
COLORS = {"ours": ("#1a5e9a", "#78acd6"), "peer": ("#7d7d7d", "#bdbdbd"), "ceiling": ("#d89b2b", "#efd09a")}  # by number of threads
UNITS = {"per_cpu_s": "pictures per CPU-second (one core, one second)", "per_wall_s": "pictures per second"}
GROUP = 0.82  # of a contender's height that its bars fill
COLUMNS = 2
LETTER = 5.6  # points that a figure of a number takes


def draw_rates(result: Mapping[str, Any], path: Path) -> None:
    """Draw what bench.json holds into a PNG: CPU contenders by CPU time; where there is a GPU, everybody by the clock as well."""
    kinds: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        kinds.setdefault((case["views"], case["mode"], case["megapixels"]), []).append(case)
    contenders = result["contenders"]
    everybody = list(contenders)
    on_cpu = [name for name in everybody if not contenders[name]["on_gpu"]]
    units = [("per_cpu_s", on_cpu)] if on_cpu else []
    units += [("per_wall_s", everybody)] if on_cpu != everybody else []
    rows = [(unit, names, cases) for unit, names in units for cases in _rows(list(kinds.values()))]
    heights = [1.0 + 0.34 * len(names) * max(1.0, 0.7 * max(map(len, cases))) for _, names, cases in rows]
    columns = min(COLUMNS, len(kinds))
    figure = Figure(figsize=(3.2 + 5.2 * columns, 0.6 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, (unit, names, cases_of_row) in zip(grid, rows, strict=True):
        for column, axes in enumerate(row):
            if column >= len(cases_of_row):
                axes.set_axis_off()
                continue
            _draw_panel(axes, cases_of_row[column], unit, {name: contenders[name]["role"] for name in names})
            axes.set_yticks(
                range(len(names)), [contenders[name]["title"] for name in names] if column == 0 else [""] * len(names), fontsize=9
            )
            axes.set_ylim(len(names) - 0.5, -0.5)
    where, settings = result["machine"], result["settings"]
    gpu = f", {where['gpu']['name']}" if where.get("gpu") else ""
    figure.suptitle(
        f"{'; '.join(f'{name}: {views}' for name, views in result['views'].items())}; {where['cpu']}, {where['cores']} cores{gpu}\n"
        f"medians of {settings['rounds']} fresh processes in turns; whiskers: least and largest; bold: ratio to Pillow; dashed: decoding",
        fontsize=9,
    )
    figure.savefig(path, format="png", dpi=130)


def _draw_panel(axes: Axes, cases: Sequence[Mapping[str, Any]], unit: str, roles: Mapping[str, str]) -> None:
    """Draw one kind of views and pictures, for everybody a bar for each number of threads; roles are keys of COLORS."""
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    height = GROUP / len(cases)
    most = max(max(rates[unit]) for case in cases for name, rates in case["rates"].items() if name in roles)
    for number, case in enumerate(cases):
        base = statistics.median(case["rates"][BASE][unit]) if BASE in case["rates"] else None
        for place, (name, role) in enumerate(roles.items()):
            if name not in case["rates"]:  # cuts no such views
                continue
            rates = case["rates"][name][unit]
            rate = statistics.median(rates)
            y = place + (number + 0.5) * height - GROUP / 2
            whiskers = [[rate - min(rates)], [max(rates) - rate]]
            style = {"capsize": 2, "lw": 0.8, "ecolor": "0.25"}
            axes.barh(y, rate, 0.92 * height, color=COLORS[role][min(number, 1)], xerr=whiskers, error_kw=style)
            beside: list[tuple[str, dict[str, Any]]] = [(f"{rate:.0f}", {})]
            if base and role != "ceiling":
                beside.append((f"{rate / base:.1f} ×", {"fontweight": "bold"}))
            if len(cases) > 1:
                beside.append((f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}", {"color": "0.45"}))
            offset = 5.0
            for words, font in beside:
                axes.annotate(words, (max(rates), y), (offset, 0), textcoords="offset points", va="center", fontsize=8, **font)
                offset += LETTER * len(words) + 5
    decoders = [name for name, role in roles.items() if role == "ceiling"]
    ceiling = max(
        (statistics.median(case["rates"][name][unit]) for case in cases for name in decoders if name in case["rates"]), default=None
    )
    if ceiling:
        axes.axvline(ceiling, color=COLORS["ceiling"][0], linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_xlim(0, (1.4 if len(cases) > 1 else 1.25) * most)
    pictures, threads = cases[0]["pictures"], " and ".join(str(case["threads"]) for case in cases)
    views = f"{cases[0]['views']}, {'all photometrics' if cases[0]['mode'] == 'photometrics' else 'geometry'}"
    enlarged = "" if pictures["origin"] == "as given" else " (enlarged)"
    axes.set_title(f"{views}, pictures of {pictures['megapixels']:.2g} MP{enlarged}, threads: {threads}", fontsize=10)
    axes.set_xlabel(UNITS[unit], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _rows(kinds: Sequence[Any]) -> list[Sequence[Any]]:
    return [kinds[first : first + COLUMNS] for first in range(0, len(kinds), COLUMNS)]
