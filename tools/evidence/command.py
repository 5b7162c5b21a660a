"""`python -m wherefrom.tools.evidence`: its sub-commands, and what they print.

Here: the command line.
Not here: which runs there are (plan.py), one of them (one_run.py), several (side_by_side.py), what they say together (report.py).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from wherefrom.pipeline.files import write_aside
from wherefrom.tools.console import print_line, print_table
from wherefrom.tools.evidence.metrics import CHOICE
from wherefrom.tools.evidence.one_run import StoppedError, is_running, make
from wherefrom.tools.evidence.plan import HOSTS, OUTSIDE, UPDATES, PlannedRun, check_host, expected_cpu_s, read, sweep, table
from wherefrom.tools.evidence.report import chosen_by, markdown, read_runs, state_rows, value_of
from wherefrom.tools.evidence.side_by_side import StopAskedError, log_of, make_all, told

OUT = Path("evidence")
LONGEST_S = 10 * 60.0  # of CPU, of the host alone: with SP a run takes about twice as long
ENOUGH = 0.01  # of k-NN, that doubling has to give

Hosts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST [HOST ...]")]
Only = Annotated[tuple[str, str, int] | None, tyro.conf.arg(metavar="HOST ARM SEED")]


def plan_command(*, out: Path = OUT) -> int:
    """List the runs in their order: which are done, which are being made, how long each takes by those that are done.

    Args:
        out: the folder of their files.
    """
    console = Console()
    done = {unit: held for unit in table() if (held := read(unit, out)) is not None}
    states = {unit: "done" if unit in done else "running" if is_running(unit, out) else "left" for unit in table()}
    seconds = {unit: done[unit]["cpu_s"] if unit in done else expected_cpu_s(unit, done) for unit in table()}
    minutes = {unit: None if took is None else took / 60 for unit, took in seconds.items()}
    print_table(console, state_rows(states, minutes))
    left = [minutes[unit] for unit in table() if unit not in done]
    known = [took for took in left if took is not None]
    unknown = f", and {len(left) - len(known)} runs of which nothing is known yet" if len(known) < len(left) else ""
    print_line(console, f"{len(done)} of {len(states)} done; left: about {sum(known) / 60:.1f} CPU-hours{unknown}, evaluation beside it")
    return 0


def run_command(
    *,
    data: str,
    val: str,
    out: Path = OUT,
    jobs: int = 2,
    host: Hosts = tuple(HOSTS),
    only: Only = None,
    updates: int | None = None,
    limit: int | None = None,
    keep: bool = False,
) -> int:
    """Make the runs of the plan that are not there, in its order; return 0, 1 if some failed, 128 + n if signal n stopped them.

    Args:
        data: pictures to learn from, as for `wherefrom train`.
        val: held-out pictures; both together are what encoders are judged by.
        out: a folder for a file a run.
        jobs: runs side by side, each a process of one thread.
        host: those of these hosts alone.
        only: make this run alone, in this process.
        updates: of that run, where it is not as long as in the plan.
        limit: pictures of either side that protocols take; default: all.
        keep: leave checkpoints and encoders under OUT/work.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    if only is not None:
        of_host, arm, seed = only
        held = make(PlannedRun(host=of_host, arm=arm, seed=seed, updates=updates), out, data=data, val=val, keep=keep, limit=limit)
        print_line(console, told(held))
        return 0
    if updates is not None:
        raise ValueError(f"updates={updates} without --only: the plan says how long its runs are")
    for each in host:
        check_host(each)
    units = [unit for unit in table() if unit.host in host]
    return _make_all(console, units, out, _options(data, val, keep=keep, limit=limit), jobs)


def choose_command(
    *,
    data: str,
    val: str,
    out: Path = OUT,
    jobs: int = 2,
    host: Hosts = ("simclr",),
    law: str | None = None,
    updates: int | None = None,
    limit: int | None = None,
) -> int:
    """Try laws and weights of SP at a seed that the table has not; print them, the best first. What wins is written into plan.py.

    They are compared by the mean of 20-NN of class token, mean token and grid.

    Args:
        data: as of run; so the next three.
        val: held-out pictures.
        out: a folder for a file a run.
        jobs: runs side by side.
        host: beside which hosts.
        law: try weights of this one alone.
        updates: of a run; default: half of the plan's.
        limit: pictures of either side that protocols take; default: all.
    """
    console = Console()
    units = {each: sweep(each, updates, law) for each in host}
    out.mkdir(parents=True, exist_ok=True)
    code = _make_all(console, [unit for each in units.values() for unit in each], out, _options(data, val, limit=limit), jobs)
    for each, runs in units.items():
        held = [result for unit in runs if (result := read(unit, out)) is not None]
        gains = chosen_by(held)
        rows = [[arm, f"{gain:+.4f}"] for arm, gain in gains]
        print_table(console, [["candidate", "gain"], *rows], title=f"{each}, seed {OUTSIDE}: mean of {', '.join(m.title for m in CHOICE)}")
        if len(held) == len(runs):
            print_line(console, f'CHOSEN["{each}"] = "{gains[0][0]}"')
    return code


def length_command(
    host: str,
    /,
    *,
    data: str,
    val: str,
    out: Path = OUT,
    first: int | None = None,
    limit: int | None = None,
) -> int:
    """Double a host's updates until doubling gives less than a point of 20-NN, or a run would take more than 10 CPU-minutes.

    20-NN: of the class or the mean token, whichever is better.

    Args:
        host: which.
        data: as of run; so the next two.
        val: held-out pictures.
        out: a folder for a file a run.
        first: updates to begin with; default: a quarter of the plan's.
        limit: pictures of either side that protocols take; default: all.
    """
    console = Console()
    check_host(host)
    out.mkdir(parents=True, exist_ok=True)
    updates, before, why = first or UPDATES[host] // 4, None, ""
    rows = [["updates", "20-NN", "CPU-minutes"]]
    while True:
        unit = PlannedRun(host=host, arm="alone", seed=OUTSIDE, updates=updates)
        code = _make_all(console, [unit], out, _options(data, val, limit=limit), 1)
        held = read(unit, out)
        if code or held is None:
            return code
        best = max(value for metric in CHOICE[:2] if (value := value_of(metric, held)) is not None)
        rows.append([str(updates), f"{best:.3f}", f"{held['cpu_s'] / 60:.1f}"])
        if before is not None and best - before < ENOUGH:
            updates, why = updates // 2, f"doubling it gives {best - before:+.3f}"
        elif 2 * held["cpu_s"] > LONGEST_S:
            why = f"twice as many would take {2 * held['cpu_s'] / 60:.0f} CPU-minutes"
        if why:
            break
        updates, before = 2 * updates, best
    print_table(console, rows)
    print_line(console, f'UPDATES["{host}"] = {updates}: {why}')
    return 0


def report_command(*, runs: Path = OUT, out: Path | None = None) -> int:
    """Print what the runs that are there say together, as tables in Markdown.

    Args:
        runs: the folder of their files.
        out: a file for it.
    """
    text = markdown(read_runs(runs))
    if out is None:
        print(text, end="")
        return 0
    with write_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return 0


def _make_all(console: Console, units: Sequence[PlannedRun], out: Path, options: Sequence[str], jobs: int) -> int:
    """Make runs; return 0, 1 if some are missing."""
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: needs at least 1")
    missing = make_all(units, out, options, jobs=jobs, tell=lambda line: print_line(console, line))
    if missing:
        print_line(
            console,
            f"missing: {', '.join(unit.name for unit in missing)}; see the logs in {log_of(missing[0], out).parent}, and start again",
        )
    return 1 if missing else 0


def _options(data: str, val: str, *, keep: bool = False, limit: int | None = None) -> list[str]:
    return ["--data", data, "--val", val, *(["--keep"] if keep else []), *(["--limit", str(limit)] if limit is not None else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run a sub-command; return 0, 1 if runs are missing, 2 if it was misused, 128 + n if signal n stopped it."""
    commands: dict[str, Callable[..., Any]] = {
        "plan": plan_command,
        "run": run_command,
        "choose": choose_command,
        "length": length_command,
        "report": report_command,
    }
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    try:
        return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m wherefrom.tools.evidence", args=arguments, config=markers)
    except (ValueError, OSError, FloatingPointError) as problem:
        print(f"evidence: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except (StoppedError, StopAskedError) as stopped:
        print(f"evidence: stopped by signal {stopped.number}; start it again to go on", file=sys.stderr)
        return 128 + stopped.number
