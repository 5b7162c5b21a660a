"""The command `wherefrom compare`: what several networks know, side by side.

Here: which reports are meant, what of them may stand side by side, how it looks.
Not here: what is measured (train/evaluation/), the command that measures (evaluate.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from wherefrom.tools.console import print_line, print_table
from wherefrom.tools.evaluate import Names
from wherefrom.train.evaluation.features import ENCODER
from wherefrom.train.evaluation.pictures import Table
from wherefrom.train.evaluation.protocols import EvaluationReport, Measured, Score, read_report
from wherefrom.train.run_folder import RunFolder

__all__ = ["compare_command"]

Reports = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="REPORT REPORT [REPORT ...]")]
PICTURES = {"train": "pictures to learn from", "held_out": "held-out pictures", "limit": "--limit"}  # the same, or nothing compares
WIDTH, AROUND = 80, 3  # of a table on a terminal; around each of its cells
NUMBER = len("0.0000") + AROUND


def compare_command(reports: Reports = (), *, protocols: Names = ()) -> int:
    """Print what several networks know, side by side, as `wherefrom evaluate` measured it; return 0.

    Beside the networks stand the best of all floors (raw pixels, chance, each network with random weights), and which network is best.

    Args:
        reports: of two networks or more: runs, folders that evaluations were written to, or files evaluation.json.
        protocols: which, by name, such as knn or knn@1; default: all.
    Raises: OSError or ValueError of one line if a report is not there, or is of other pictures than the first, or none has a protocol.
    """
    if len(reports) < 2:
        raise ValueError(f"{len(reports)} named: needs two reports at least; name runs that were evaluated")
    files = [_file(path) for path in reports]
    twice = next((path for path, file in zip(reports, files, strict=True) if files.count(file) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; name every report once")
    found = [read_report(file) for file in files]
    for path, report in zip(reports, found, strict=True):
        other = [words for key, words in PICTURES.items() if report.about.get(key) != found[0].about.get(key)]
        if other:
            differing = ", ".join(other)
            mend = "evaluate it with the same --data, --val and --limit"
            raise ValueError(f"{path}: was measured on other pictures than {reports[0]} ({differing}); {mend}")
    titles = list(dict.fromkeys(measured.protocol for report in found for measured in report.measured if not measured.not_measured))
    for name in protocols:
        if not any(name in _names(title) for title in titles):
            raise ValueError(f"protocol {name}: none of these networks was measured by it, but by {', '.join(titles)}")
    console = Console()
    for number, (path, report) in enumerate(zip(reports, found, strict=True), 1):
        px, seed = (report.about.get(key) for key in ("picture_px", "seed"))
        print_line(console, f"#{number} {path}: {report.name}, pictures of {px} px, seed {seed}")
    for title in titles:
        if not protocols or not _names(title).isdisjoint(protocols):
            _print_protocol(console, title, found)
    return 0


def _file(path: Path) -> Path:
    """Return the report that a path means."""
    if RunFolder(path).settings.is_file():
        path = path / "evaluations"  # what lies in the run itself are its own short forms
    file = path / "evaluation.json" if path.is_dir() or path.name == "evaluations" else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; `wherefrom evaluate` writes it")
    return file.resolve()


def _names(title: str) -> set[str]:
    """Return what a protocol may be called: knn@1, knn."""
    return {title, title.partition("@")[0]}


def _print_protocol(console: Console, title: str, reports: Sequence[EvaluationReport]) -> None:
    """Print a protocol's tables, and who is left out of them."""
    held = {
        number: measured
        for number, report in enumerate(reports)
        for measured in report.measured
        if measured.protocol == title and not measured.not_measured
    }
    first = min(held)
    alike = {number: measured for number, measured in held.items() if _is_alike(title, reports, held, first, number)}
    for number in held.keys() - alike.keys():
        print_line(console, f"{title}: #{number + 1} is left out, measured on other pictures, or by other choices, than #{first + 1}")
    if len(alike) < 2:
        print_line(console, f"{title}: of #{first + 1} alone")
        return
    for table in _tables(title, alike):
        print_table(console, table)


def _is_alike(title: str, reports: Sequence[EvaluationReport], held: Mapping[int, Measured], first: int, number: int) -> bool:
    return held[number].choices == held[first].choices and reports[number].of[title] == reports[first].of[title]


def _tables(title: str, held: Mapping[int, Measured]) -> Iterator[Table]:
    """Yield a row for each thing measured and a column for each network, as many side by side as find a place."""
    scores = {number: {score.row: score for score in measured.scores if score.features == ENCODER} for number, measured in held.items()}
    rows = list(dict.fromkeys(row for of_network in scores.values() for row in of_network))
    floors = [score for measured in held.values() for score in measured.scores if score.features != ENCODER]
    beside = {row: (_best([score for score in floors if score.row == row]), _leaders(row, scores)) for row in rows}
    longest = max(map(len, (title, *rows))) + max(map(len, ("best", *(leaders for _, leaders in beside.values()))))
    at_once = max(1, (WIDTH - longest - 2 * AROUND - 1) // NUMBER - 1)  # and the floor
    numbers = sorted(held)
    for start in range(0, len(numbers), at_once):
        shown = numbers[start : start + at_once]
        heading = (title, *(f"#{number + 1}" for number in shown), "floor", "best")
        yield (
            heading,
            *((row, *(_written(scores[number].get(row)) for number in shown), _written(beside[row][0]), beside[row][1]) for row in rows),
        )


def _leaders(row: str, scores: Mapping[int, Mapping[str, Score]]) -> str:
    """Return the networks that are best in a row, several if they are alike."""
    there = {number: of_network[row] for number, of_network in scores.items() if row in of_network}
    best = _best(list(there.values()))
    return " ".join(f"#{number + 1}" for number, score in there.items() if best is not None and score.value == best.value) or "-"


def _best(scores: Sequence[Score]) -> Score | None:
    finite = [score for score in scores if math.isfinite(score.value)]
    return max(finite, key=lambda score: score.value if score.better == "higher" else -score.value, default=None)


def _written(score: Score | None) -> str:
    return "-" if score is None or math.isnan(score.value) else f"{score.value:.4f}"
