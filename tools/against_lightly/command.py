"""`python -m wherefrom.tools.against_lightly`: its sub-commands, and what they print.

Here: the command line.
Not here: what is measured (judge.py).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.against_lightly.judge import PROTOCOL, Scores, judge_pixels, judge_run
from wherefrom.tools.console import print_line, print_table
from wherefrom.train.evaluation.pictures import ShardPictures


def judge_command(runs: tuple[Path, ...], /, *, data: tuple[str, ...], labels: str | None = None) -> int:
    """Judge what runs wrote by the labels of pictures, each picture by all the others.

    Args:
        runs: their folders; what lies in their folder `encoder` is judged.
        data: shards or folders of pictures, which are taken together.
        labels: what labels the pictures, as for `wherefrom index`.
    """
    console = Console()
    with ShardPictures(ShardIndex.open(data, labels=labels)) as pictures:
        rows = [("pixels, 8 x 8", judge_pixels(pictures))]
        for run in runs:
            rows += [(f"{run}: {name}", scores) for name, scores in judge_run(run, pictures).items()]
        print_table(console, score_table(rows))
        print_line(console, f"{len(pictures)} pictures; {PROTOCOL}")
    return 0


def score_table(rows: Sequence[tuple[str, Scores]]) -> list[list[str]]:
    """Return accuracies as rows of words, the heading first; of raw pixels, those of their own kind stand below the mean token."""
    names = ["class token knn", "class token ridge", "mean token knn", "mean token ridge"]
    table = [["features", *names]]
    for title, scores in rows:
        of_tokens = {name.replace("pixels", "mean token"): value for name, value in scores.items()}
        table.append([title, *(f"{of_tokens[name]:.3f}" if name in of_tokens else "-" for name in names)])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run a sub-command; return 0, 1 if something that was compared differs, 2 if it was misused."""
    commands = {"judge": judge_command}
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m wherefrom.tools.against_lightly", args=arguments)
    except (ValueError, OSError) as problem:
        print(f"against_lightly: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
