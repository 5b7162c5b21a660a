"""What runs with two loaders say together: means over seeds, a table, and curves of losses side by side.

Here: everything that is read from the files of runs.
Not here: making runs (own_loaders.py).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wherefrom.pipeline.files import write_aside

LARGEST_DIFFERENCE = 0.04  # of two means over seeds, of the accuracy that is compared
COMPARED = "class token knn"
TITLES = {"simclr": "SimCLR", "dino": "DINO, teacher", "mae": "MAE"}
COLORS = {"ours": "#1a5e9a", "theirs": "#d89b2b"}
LABELS = {"ours": "wherefrom", "theirs": "lightly"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The runs of a method: scores by side, one mapping a seed, of the same seeds."""

    method: str
    scores: Mapping[str, Sequence[Mapping[str, float]]]

    def mean(self, side: str, score: str = COMPARED) -> float:
        """Return a mean over seeds."""
        return statistics.mean(each[score] for each in self.scores[side])

    @property
    def difference(self) -> float:
        """How much better ours are than theirs."""
        return self.mean("ours") - self.mean("theirs")

    @property
    def agrees(self) -> bool:
        """Whether both means are near enough."""
        return abs(self.difference) <= LARGEST_DIFFERENCE


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs whose files lie in a folder, in the order of their names.

    Raises: ValueError in one line if there are none, or a file is of something else.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as problem:
            raise ValueError(f"{path}: no JSON ({problem}); move it away") from None
        if isinstance(held, dict) and {"run", "losses", "scores"} <= held.keys():
            runs.append(held)
    if not runs:
        raise ValueError(f"{folder}: holds no runs; make some with own-loaders --out {folder}")
    return runs


def compared(runs: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Return the runs by method, in the order of TITLES; seeds that one side lacks are left out of the other."""
    comparisons = []
    for method in TITLES:
        of_method = {(run["run"]["side"], run["run"]["seed"]): run["scores"] for run in runs if run["run"]["method"] == method}
        seeds = [{seed for side, seed in of_method if side == name} for name in LABELS]
        common = sorted(set.intersection(*seeds))
        if common:
            comparisons.append(Comparison(method=method, scores={side: [of_method[side, seed] for seed in common] for side in LABELS}))
    return comparisons


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Return a row of words a method and accuracy, the heading first: both sides' seeds and means, and the difference."""
    rows = [["method", "accuracy", "wherefrom", "lightly", "mean", "mean", "difference"]]
    for each in comparisons:
        for score in each.scores["ours"][0]:
            ours, theirs = each.mean("ours", score), each.mean("theirs", score)
            seeds = [" ".join(f"{run[score]:.3f}" for run in each.scores[side]) for side in LABELS]
            rows.append([TITLES[each.method], score, *seeds, f"{ours:.3f}", f"{theirs:.3f}", f"{ours - theirs:+.3f}"])
    return rows


def draw_losses(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of all runs, a panel a method, into a file of the kind that its name ends with, whole or not at all."""
    methods = [method for method in TITLES if any(run["run"]["method"] == method for run in runs)]
    figure = Figure(figsize=(4.2 * len(methods), 3.2), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        for run in (run for run in runs if run["run"]["method"] == method):
            side, every = run["run"]["side"], run["log_every"]
            updates = [min(every * (number + 1), run["run"]["updates"]) for number in range(len(run["losses"]))]
            label = LABELS[side] if run["run"]["seed"] == min(_seeds(runs, method, side)) else None
            axes.plot(updates, run["losses"], color=COLORS[side], linewidth=1, alpha=0.8, label=label)
        axes.set_title(TITLES[method].partition(",")[0], fontsize=10)
        axes.set_xlabel("update", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel(f"loss, means of {runs[0]['log_every']} updates", fontsize=9)
    with write_aside(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."), dpi=110)


def _seeds(runs: Sequence[Mapping[str, Any]], method: str, side: str) -> list[int]:
    return [run["run"]["seed"] for run in runs if (run["run"]["method"], run["run"]["side"]) == (method, side)]
