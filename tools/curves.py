"""A run's curves as a picture, drawn again from metrics.jsonl whenever there is something new to see.

Here: losses, what predictions explain, what labels say, learning rate, gradients, speed.
Not here: pictures of views (views_picture.py); what the numbers mean (train/reporting.py, train/evaluation/labels.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wherefrom.pipeline.files import write_aside

Records = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]  # updates and values


def draw_curves(records: Records, path: Path) -> None:
    """Draw the lines of metrics.jsonl, as `run_folder.read_metrics` returns them, into a PNG at `path`, whole or not at all."""
    logged = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(16, 8), layout="constrained")
    (loss, explained, labels), (rate, gradients, speed) = figure.subplots(2, 3)
    _draw(loss, "loss, by term", _grouped(logged, "losses"))
    loss.set_yscale("log")
    _draw_explained(explained, logged, evaluations)
    _draw_labels(labels, evaluations)
    _draw(rate, "learning rate", {"lr": _series(logged, "lr")})
    _draw(gradients, "gradient norm before clipping", _grouped(logged, "gradients"))
    _draw(speed, "pictures a second; pale: share of time waiting for data", {"pictures/s": _series(logged, "images_per_s")})
    speed.set_ylim(bottom=0)
    waiting = speed.twinx()
    waiting.plot(*_series(logged, "waiting_frac"), color="gray", linewidth=1, alpha=0.5)
    waiting.set_ylim(0, 1)
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=90)


def _draw_explained(axes: Axes, logged: Records, evaluations: Records) -> None:
    """Draw R2 and right answers on training batches as pale lines, on held-out pictures as dots of the same color."""
    batches = {name: series for name, series in _grouped(logged, "meters").items() if "/r2_" in name or name.endswith("/accuracy")}
    held_out = _grouped(evaluations, "curves")
    for number, (name, series) in enumerate(batches.items()):
        axes.plot(*series, color=f"C{number}", linewidth=1, alpha=0.4)
        axes.plot(*held_out.get(name, ([], [])), "o-", color=f"C{number}", markersize=4, label=name)
    _finish(axes, "R2, or share of right answers, on held-out pictures (dots) and batches (pale)", legend=bool(batches))
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.set_ylim(-0.1, 1)


def _draw_labels(axes: Axes, evaluations: Records) -> None:
    """Draw accuracies by labels."""
    curves = {name: series for name, series in _grouped(evaluations, "curves").items() if "/" not in name}
    for name, series in curves.items():
        axes.plot(*series, "o--", linewidth=1, markersize=4, label=name)
    _finish(axes, "accuracy by labels, on the few pictures of short evaluations", legend=bool(curves))


def _draw(axes: Axes, title: str, curves: Mapping[str, Series]) -> None:
    for name, series in curves.items():
        axes.plot(*series, label=name, linewidth=1)
    _finish(axes, title, legend=len(curves) > 1)


def _finish(axes: Axes, title: str, *, legend: bool) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=8)
    if legend:
        axes.legend(fontsize=7)


def _grouped(records: Records, group: str) -> dict[str, Series]:
    """Return a series for every name in a group of the records."""
    names = dict.fromkeys(name for record in records for name in record[group])
    return {name: _series([record[group] | {"update": record["update"]} for record in records], name) for name in names}


def _series(records: Records, name: str) -> Series:
    """Return updates and values of the records that have one."""
    points = [(record["update"], record[name]) for record in records if record.get(name) is not None]
    return [update for update, _ in points], [value for _, value in points]
