"""The command `wherefrom compare`: what several networks know, side by side.

Here: which reports are meant, what of them may stand side by side, how it looks.
Not here: what is measured (train/evaluation/), the command that measures (evaluate.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from wherefrom.tools.console import print_line, print_table
from wherefrom.tools.evaluate import Names
from wherefrom.train.evaluation.features import CHANCE, ENCODER
from wherefrom.train.evaluation.pictures import Table
from wherefrom.train.evaluation.protocols import EvaluationReport, Measured, Score, read_report, written
from wherefrom.train.run_folder import RunFolder

__all__ = ["compare_command"]

Reports = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="REPORT REPORT [REPORT ...]")]
PICTURES = {"train": "pictures to learn from", "held_out": "held-out pictures", "limit": "--limit"}  # the same, or nothing compares
WIDTH, AROUND = 80, 3  # of a table on a terminal; around each of its cells
TIED = 3  # networks that are named as best, at most

Networks = Mapping[int, Measured]  # by number, from 1: one protocol's results of each


def compare_command(reports: Reports = (), *, protocols: Names = ()) -> int:
    """Print what several networks know, side by side, as `wherefrom evaluate` measured it; return 0.

    Beside the networks stand the best of all floors (raw pixels, chance, each network with random weights), and which network is best.

    Args:
        reports: of two networks or more: runs, folders that evaluations were written to, or files evaluation.json.
        protocols: which, by name, such as knn or knn@1; default: all.
    Raises: OSError or ValueError of one line if a report is not there, or is of other pictures than the first, or none has a protocol.
    """
    found = _read(reports)
    titles = list(dict.fromkeys(measured.protocol for report in found for measured in report.measured if measured.scores))
    if not titles:
        raise ValueError(f"{', '.join(map(str, reports))}: hold no scores; evaluate these networks by some protocol")
    for name in protocols:
        if not any(name in _names(title) for title in titles):
            raise ValueError(f"protocol {name}: none of these networks was measured by it, but by {', '.join(titles)}; evaluate them")
    console = Console()
    for number, (path, report) in enumerate(zip(reports, found, strict=True), 1):
        px, seed = (report.about.get(key) for key in ("picture_px", "seed"))
        print_line(console, f"#{number} {path}: {report.name}, pictures of {px} px, seed {seed}")
    for title in titles:
        if not protocols or not _names(title).isdisjoint(protocols):
            _print_protocol(console, title, found)
    return 0


def _read(paths: Sequence[Path]) -> list[EvaluationReport]:
    """Return the reports that paths mean, which are of the same pictures."""
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} named: needs two reports at least; name runs that were evaluated, before any option")
    files = [_file(path) for path in paths]
    places = [file.resolve() for file in files]
    twice = next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; name every report once")
    found = [read_report(file) for file in files]
    for path, report in zip(paths, found, strict=True):
        other = ", ".join(words for key, words in PICTURES.items() if report.about.get(key) != found[0].about.get(key))
        if other:
            mend = "evaluate it with the same --data, --val and --limit"
            raise ValueError(f"{path}: was measured on other pictures than {paths[0]} ({other}); {mend}")
    return found


def _file(path: Path) -> Path:
    """Return the report that a path means."""
    if path.is_dir():
        of_network = path / "evaluations" / "evaluation.json"  # what lies in a run itself are its own short forms
        file = of_network if of_network.is_file() or RunFolder(path).settings.is_file() else path / "evaluation.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path}: holds no evaluation; `wherefrom evaluate` makes one, or name where it was written")
        return file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; name a run, or the folder that its evaluation was written to")
    if RunFolder(path.parent).settings.is_file():
        raise ValueError(f"{path}: holds the short forms that a run measures itself by; evaluate {path.parent}, and name that")
    return path


def _names(title: str) -> set[str]:
    """Return what a protocol may be called: knn@1, knn."""
    return {title, title.partition("@")[0]}


def _print_protocol(console: Console, title: str, reports: Sequence[EvaluationReport]) -> None:
    """Print a protocol's tables, one for those networks that compare with one another, and who is in none."""
    groups: dict[str, dict[int, Measured]] = {}  # by choices, and by pictures that a protocol has of its own
    without: dict[int, str] = {}
    for number, report in enumerate(reports, 1):
        measured = next((each for each in reversed(report.measured) if each.protocol == title), None)
        if measured is None or not measured.scores:
            without[number] = (
                f"not measured ({measured.not_measured})" if measured is not None and measured.not_measured else "not measured"
            )
        else:
            groups.setdefault(json.dumps([measured.choices, report.of[title]], sort_keys=True), {})[number] = measured
    for group in groups.values():
        if len(group) == 1:
            (number,) = group
            without[number] = "by choices or pictures of its own" if len(groups) > 1 else "alone"
            continue
        for table in _tables(title, group):
            print_table(console, table)
        if uneven := _of_uneven_chance(group):
            chances = ", ".join(f"#{number} {_written(_score(measured, uneven[0], CHANCE))}" for number, measured in group.items())
            others = f", and {len(uneven) - 1} more" if uneven[1:] else ""
            print_line(console, f"{title}: chance differs, so that none is best: {uneven[0]}, {chances}{others}")
    if without:
        why = {reason: " ".join(f"#{number}" for number in sorted(without) if without[number] == reason) for reason in without.values()}
        print_line(console, f"{title}: left out, {'; '.join(f'{numbers} {reason}' for reason, numbers in why.items())}")


def _tables(title: str, group: Networks) -> Iterator[Table]:
    """Yield a row for each thing measured and a column for each network, as many side by side as find a place."""
    rows = list(dict.fromkeys(score.row for measured in group.values() for score in measured.scores if score.features == ENCODER))
    columns = {f"#{number}": [_written(_score(measured, row, ENCODER)) for row in rows] for number, measured in group.items()}
    uneven = _of_uneven_chance(group)
    floors = [_written(None if row in uneven else _floor(group, row)) for row in rows]
    leaders = ["-" if row in uneven else _leaders(group, row) for row in rows]
    around = [(title, *rows), ("floor", *floors), ("best", *leaders)]
    number = max(len(cell) for cells in columns.values() for cell in cells) + AROUND
    at_once = max(2, (WIDTH - sum(max(map(len, cells)) + AROUND for cells in around) - 1) // number)
    for start in range(0, len(columns), at_once):
        shown = [(name, *cells) for name, cells in list(columns.items())[start : start + at_once]]
        yield tuple(zip(around[0], *shown, *around[1:], strict=True))


def _score(measured: Measured, row: str, features: str) -> Score | None:
    return next((score for score in measured.scores if (score.row, score.features) == (row, features)), None)


def _of_uneven_chance(group: Networks) -> list[str]:
    """Return the rows by which networks had tasks of their own: of tokens on another grid, of pictures of another size."""
    rows = dict.fromkeys(score.row for measured in group.values() for score in measured.scores if score.features == CHANCE)
    return [row for row in rows if len({_written(_score(measured, row, CHANCE)) for measured in group.values()}) > 1]


def _floor(group: Networks, row: str) -> Score | None:
    return _best([score for measured in group.values() for score in measured.scores if score.row == row and score.features != ENCODER])


def _leaders(group: Networks, row: str) -> str:
    """Return the networks that are best in a row, several where these read alike."""
    scores = {number: score for number, measured in group.items() if (score := _score(measured, row, ENCODER)) is not None}
    best = _written(_best(list(scores.values())))
    leaders = [f"#{number}" for number, score in scores.items() if best != "-" and _written(score) == best]
    return " ".join(leaders if len(leaders) <= TIED else [*leaders[:1], f"and {len(leaders) - 1} more"]) or "-"


def _best(scores: Sequence[Score]) -> Score | None:
    """Return the best of scores of one row, none where they are neither good nor bad."""
    if any(score.better == "neither" for score in scores):
        return None
    finite = [score for score in scores if math.isfinite(score.value)]
    return max(finite, key=lambda score: score.value if score.better == "higher" else -score.value, default=None)


def _written(score: Score | None) -> str:
    return written(None if score is None else score.value)
