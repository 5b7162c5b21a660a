"""`python -m wherefrom.tools.against_lightly`: its sub-commands, and what they print.

Here: the command line.
Not here: what is compared (same_batches.py, own_loaders.py), who judges (judge.py), what runs say together (report.py).
"""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import tyro
from rich.console import Console

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.against_lightly.judge import PROTOCOL, Scores, judge_pixels, judge_run
from wherefrom.tools.against_lightly.own_loaders import PACKAGES, OwnLoaderRun, Side, run_once
from wherefrom.tools.against_lightly.report import COMPARED, compared, draw_losses, read_runs, table
from wherefrom.tools.against_lightly.same_batches import LARGEST_DIFFERENCE, UPDATES, same_batches, settings_of_first_updates
from wherefrom.tools.against_lightly.theirs import METHODS, Method, refuse_without_lightly
from wherefrom.tools.console import print_line, print_table
from wherefrom.tools.machine import machine
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


def same_batches_command(
    data: str, /, *, only: tuple[Method, ...] = METHODS, updates: int = UPDATES, float64: bool = False, out: Path | None = None
) -> int:
    """Compare losses from equal weights on the same batches; return 1 if they differ, or if a planted difference goes unseen.

    Args:
        data: shards, or a folder of pictures.
        only: which methods.
        updates: how many.
        float64: compute in it, where rounding hides nothing.
        out: a file for all losses, JSON.
    """
    refuse_without_lightly()
    console, index = Console(), ShardIndex.open(data)
    results = []
    for method in only:
        result = same_batches(settings_of_first_updates(method), index, updates=updates, float64=float64)
        results.append(result)
        verdict = "agrees" if result.agrees else "DIFFERS" if result.difference > LARGEST_DIFFERENCE else "BLIND"
        print_line(console, f"{verdict} {method}: {result.described()}")
    if out is not None:
        whole = {
            "precision": "float64" if float64 else "float32",
            "machine": machine(PACKAGES),
            "limit": LARGEST_DIFFERENCE,
            "methods": [asdict(result) for result in results],
        }
        with write_aside(out) as aside:
            aside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.agrees for result in results) else 1


def own_loaders_command(
    data: tuple[str, ...],
    /,
    *,
    only: tuple[Method, ...] = METHODS,
    side: tuple[Side, ...] = get_args(Side),
    seed: tuple[int, ...] = (0, 1),
    updates: int | None = None,
    batch: int = 64,
    workers: int = 0,
    out: Path = Path("against-lightly"),
) -> int:
    """Make runs, each side with its own loader, one after the other; those whose file lies in `out` are not made again.

    Args:
        data: folders of pictures with a folder a class: the first is learned from, all together are what the encoders are judged by.
        only: which methods.
        side: whose.
        seed: of which seeds.
        updates: of a run; default: what a core makes in minutes.
        batch: pictures of an update.
        workers: processes of their loader, beside the one that trains.
        out: a folder for a file a run.
    """
    refuse_without_lightly()
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    for method, which, number in itertools.product(only, side, seed):
        plan = OwnLoaderRun(method=method, side=which, seed=number, data=data, updates=updates, batch=batch, workers=workers)
        if (out / f"{plan.name}.json").is_file():
            print_line(console, f"{plan.name}: is there")
            continue
        result = run_once(plan, out)
        scores = ", ".join(f"{name} {score:.3f}" for name, score in result["scores"].items())
        print_line(console, f"{plan.name}: loss {result['losses'][-1]:.3f}, {scores}; {result['seconds']:.0f} s")
    return 0


def report_command(runs: Path, /, *, out: Path | None = None) -> int:
    """Put the runs of own-loaders together; return 1 if the means of a method differ by more than 0.04.

    Args:
        runs: the folder of their files.
        out: a picture of their losses, PNG or SVG.
    """
    console = Console()
    if out is not None and out.suffix not in (".png", ".svg"):
        raise ValueError(f"out={out}: needs a name that ends with .png or .svg")
    held = read_runs(runs)
    comparisons = compared(held)
    print_table(console, table(comparisons))
    for each in comparisons:
        seeds = len(each.scores["ours"])
        print_line(console, f"{'agrees' if each.agrees else 'DIFFERS'} {each.method}: {COMPARED}, means of {seeds} seeds")
    judged, where = held[0]["judged"]["protocol"], held[0]["machine"]
    print_line(console, f"{judged}; {where['cpu']}; {', '.join(' '.join(each) for each in where['versions'].items())}")
    if out is not None:
        draw_losses(held, out)
        print_line(console, f"losses: {out}")
    return 0 if all(each.agrees for each in comparisons) else 1


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
    commands: dict[str, Callable[..., Any]] = {
        "judge": judge_command,
        "same-batches": same_batches_command,
        "own-loaders": own_loaders_command,
        "report": report_command,
    }
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m wherefrom.tools.against_lightly", args=arguments)
    except (ValueError, OSError) as problem:
        print(f"against_lightly: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
