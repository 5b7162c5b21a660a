"""`wherefrom bench kernels`: every kernel and path against eager PyTorch, torch.compile and torchvision, checked against float64 first.

Here: which cases run, ratios of medians, tables and JSON; a red check ends it before any speed is told.
Not here: what is compared (cases.py, problems.py), checking and timing (measuring.py, a fresh process each), the plot.
Without a GPU the Triton kernels' speed is not told: what their machine code costs stands in (ahead_of_time.py).
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.system import available_cores
from wherefrom.tools.bench_kernels.cases import CASES, Kernel, KernelCase
from wherefrom.tools.bench_kernels.measuring import GRAPH, KernelPlan
from wherefrom.tools.bench_kernels.plot import draw_speeds
from wherefrom.tools.bench_kernels.problems import COMPILE_MODE
from wherefrom.tools.console import print_line
from wherefrom.tools.machine import machine

__all__ = ["bench_kernels_command"]

QUICK_SECONDS = 0.3
PACKAGES = ("torch", "torchvision", "triton", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRatio:
    """A ratio of medians, the quartiles of the ratios of single rounds, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


class WrongResultError(Exception):
    """A contender computed something wrong."""


def bench_kernels_command(
    kernels: tuple[Kernel, ...] = get_args(Kernel),
    quick: bool = False,
    seconds: float = 10.0,
    threads: int | None = None,
    cpu: bool = False,
    no_compile: bool = False,
    out: Path = Path("bench-kernels"),
    plant: bool = False,
) -> int:
    """Measure the kernels against the usual ways; the exit code is 1 if a result is wrong, 2 if a floor of speed or memory is missed.

    Args:
        kernels: which.
        quick: one small case of each for a moment, without torch.compile and the figures of machine code; floors are told, not held.
        seconds: of timing a case, everyone in turns.
        threads: of PyTorch on the CPU; default: one a core.
        cpu: measure on the CPU even if there is a CUDA GPU.
        no_compile: leave torch.compile out, which needs seconds to minutes a case to build.
        out: folder for bench.json and bench.png.
        plant: hand our kernels boxes that lie elsewhere, to see that the check finds out.
    Raises: OSError or ValueError of one line for values that do not fit or a case that ended otherwise.
    """
    if not seconds > 0 or (threads is not None and threads < 1) or not kernels:
        raise ValueError(f"seconds={seconds}, threads={threads}, kernels={kernels}: needs seconds > 0, threads >= 1 and a kernel")
    console = Console()
    cuda = torch.cuda.is_available() and not cpu
    can_compile = cuda or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    if not (can_compile or quick or no_compile):
        print_line(console, "left out: torch.compile, there is no C++ compiler here")
    settings = {
        "seconds": QUICK_SECONDS if quick else seconds,
        "threads": threads or available_cores(),
        "compiled": can_compile and not (quick or no_compile),
        "plant": plant,
    }
    results = []
    try:
        for case in _select_cases(console, kernels, cuda=cuda, quick=quick):
            print_line(console, f"measuring {case.name}")
            results.append(_measure_case(case, settings))
    except WrongResultError as error:
        print_line(console, f"wrong, so no speed is told: {error}")
        return 1
    bench: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": machine(PACKAGES),
        "settings": settings | {"cuda": cuda, "compile_mode": COMPILE_MODE},
        "timing": "CUDA events around one call, L2 flushed before it" if cuda else "wall clock, caches as the others leave them",
        "cases": results,
        "ahead_of_time": [] if quick or cuda else _ahead_of_time(console, kernels),
    }
    _write_files(bench, out)
    _print_tables(console, bench)
    print_line(console, f"every result was checked; all numbers: {out / 'bench.json'}, {out / 'bench.png'}")
    missed = [words for result in results for words in missed_floors(result)]
    for words in missed:
        print_line(console, f"missed a floor: {words}")
    return 2 if missed and not quick else 0


def _select_cases(console: Console, kernels: Sequence[Kernel], *, cuda: bool, quick: bool) -> list[KernelCase]:
    """Return the cases to measure; say which kernel is left out."""
    cases = [case for case in CASES if case.kernel in kernels and case.cuda == cuda and (case.quick or not quick)]
    if not cuda and "render_views" in kernels and (missing := native_missing()):
        print_line(console, f"left out: render_views, {missing}")
        return [case for case in cases if case.kernel != "render_views"]
    return cases


def _write_files(bench: Mapping[str, Any], out: Path) -> None:
    """Write bench.json, whole or not at all, and bench.png."""
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(out / "bench.json") as aside:
        aside.write_text(json.dumps(bench, indent=1), encoding="utf-8")
    draw_speeds(bench, out / "bench.png")


def _print_tables(console: Console, bench: Mapping[str, Any]) -> None:
    """Print a table a case, and one of machine code."""
    for result in bench["cases"]:
        console.print(_table(result))
    print_line(
        console, "medians of rounds taken in turns; error: of the largest value; copy: share of copy bandwidth; (quartiles) [floors]"
    )
    if bench["ahead_of_time"]:
        console.print(_machine_code_table(bench["ahead_of_time"]))


def _measure_case(case: KernelCase, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check and measure a case in a fresh process, with half the samples as often as it takes to fit into a GPU's memory.

    Raises: WrongResultError if a check is red, OSError if the process ended otherwise.
    """
    batch = case.batch
    while True:
        plan = KernelPlan(case=case.name, batch=batch, **settings)
        done = _run_fresh("wherefrom.tools.bench_kernels.measuring", json.dumps(asdict(plan)))
        if done.returncode:
            raise OSError(f"{case.name} ended with code {done.returncode}: {_last_words(done)}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if not result.get("out_of_memory"):
            break
        if batch == 1:
            raise OSError(f"{case.name} does not fit into the GPU's memory, not even a single sample")
        batch //= 2
    for check in result["checks"]:
        if not check["passed"]:
            words = f"{check['contender']}, {check['result']}: {check['error']:.3g} from float64, at most {check['limit']:.3g} is right"
            raise WrongResultError(f"{case.name}: {words}")
    return {"name": case.name, "kernel": case.kernel} | summary(result) | {
        "speed_floors": dict(case.speed_floors),
        "memory_floors": dict(case.memory_floors),
        "copy_floor": case.copy_floor,
    }  # fmt: skip


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a measured case comes to: everyone's numbers together, and ratios to everyone else of each path of ours."""
    contenders = {}
    for name, seconds in result["seconds"].items():
        errors = [each["error"] / each["largest"] for each in result["checks"] if each["contender"] == name and each["largest"]]
        median_s = statistics.median(seconds)
        contenders[name] = {
            "ours": name in result["ours"],
            "seconds": seconds,
            "median_s": median_s,
            "relative_error": max(errors, default=None),
            "peak_bytes": result["memory"].get(name),
            "copy_share": result["bytes_moved"] / median_s / result["copy_bytes_per_s"],
            "issue_share": result["operations"] / median_s / result["issued_per_s"] if result["issued_per_s"] else None,
        }
    rest = {name: value for name, value in result.items() if name not in ("seconds", "memory", "ours")}
    compared = {
        "speed_ratios": {name: asdict(ratio) for name, ratio in ratios(result["seconds"], result["ours"]).items()},
        "memory_ratios": memory_ratios(result["memory"], result["ours"]),
    }
    return rest | {"contenders": contenders} | compared


def missed_floors(case: Mapping[str, Any]) -> list[str]:
    """Say which floors our first path does not reach; who was not measured has none."""
    mine = next(name for name, contender in case["contenders"].items() if contender["ours"])
    missed = []
    for kind, floors, more in (("speed_ratios", "speed_floors", "times as fast"), ("memory_ratios", "memory_floors", "times as small")):
        for other, floor in case[floors].items():
            ratio = case[kind].get(f"{mine} / {other}")
            times = ratio["median"] if isinstance(ratio, Mapping) else ratio
            if times is not None and times < floor:
                missed.append(f"{case['name']}: {mine} is {times:.2f} {more} as {other}, has to be {floor:g}")
    copy_share, floor = case["contenders"][mine]["copy_share"], case["copy_floor"]
    if floor is not None and copy_share < floor:
        missed.append(f"{case['name']}: {mine} reaches {copy_share:.0%} of copy bandwidth, has to be {floor:.0%}")
    return missed


def ratios(seconds: Mapping[str, Sequence[float]], ours: Sequence[str]) -> dict[str, KernelRatio]:
    """Return how many times as fast each of our paths is as everyone else timed in the same manner: "torch / eager" -> 2.1."""
    return {
        f"{mine} / {other}": _ratio(seconds[other], seconds[mine])
        for mine in ours
        for other in seconds
        if other not in ours and _manner(mine) == _manner(other)
    }


def memory_ratios(memory: Mapping[str, Mapping[str, int | None]], ours: Sequence[str]) -> dict[str, float]:
    """Return how many times smaller each of our paths' peak is than everyone else's: of tensors where both are counted, else allocated."""
    by_pair = {}
    for mine in (name for name in ours if name in memory):
        for other in (name for name in memory if name not in ours):
            counter = "tensors" if memory[mine]["tensors"] and memory[other]["tensors"] else "allocator"
            own, theirs = memory[mine][counter], memory[other][counter]
            if own and theirs:
                by_pair[f"{mine} / {other}"] = theirs / own
    return by_pair


def _ratio(one: Sequence[float], other: Sequence[float]) -> KernelRatio:
    by_round = [theirs / mine for theirs, mine in zip(one, other, strict=True)]
    low, _, high = statistics.quantiles(by_round, n=4, method="inclusive") if len(by_round) > 1 else by_round * 3
    return KernelRatio(median=statistics.median(one) / statistics.median(other), low=low, high=high, rounds=len(by_round))


def _ahead_of_time(console: Console, kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Return the figures of the Triton kernels' machine code, kernel by kernel."""
    figures = []
    for kernel in dict.fromkeys(kernel.removesuffix("_pairs") for kernel in kernels):  # roi_align_pairs is a launch of roi_align's
        done = _run_fresh("wherefrom.tools.bench_kernels.ahead_of_time", kernel)
        if done.returncode:
            print_line(console, f"no figures of {kernel}'s machine code: {_last_words(done)}")
        figures += [json.loads(line) for line in done.stdout.splitlines()]
    return figures


def _run_fresh(module: str, argument: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own, in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", module, argument], env=environment, capture_output=True, text=True, check=False)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["nothing said"])[-1]


def _table(case: Mapping[str, Any]) -> Table:
    """Tell times, errors and memory of everyone, and how many times as fast and small our first path is."""
    rounds = len(next(iter(case["contenders"].values()))["seconds"])
    fits = "" if f" B{case['batch']} " in case["name"] else f", B{case['batch']} of it fits"
    issue = ["issue"] if case["issued_per_s"] else []
    columns = ("", "ms", "error", "MiB", "copy", *issue, "ours: x as fast", "x less")
    table = Table(title=f"{case['name']}{fits}, {rounds} rounds", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    for name, contender in case["contenders"].items():
        table.add_row(*_row(case, name, contender))
    return table


def _row(case: Mapping[str, Any], name: str, contender: Mapping[str, Any]) -> list[str]:
    speed, smaller = (
        next((ratio for pair, ratio in case[kind].items() if pair.endswith(f" / {name}")), None)
        for kind in ("speed_ratios", "memory_ratios")
    )
    speed_floor, memory_floor = (f" \\[{case[kind][name]:g}]" if name in case[kind] else "" for kind in ("speed_floors", "memory_floors"))
    copy_floor = f" \\[{case['copy_floor']:.0%}]" if case["copy_floor"] and contender["ours"] else ""
    error, peak, issue = contender["relative_error"], contender["peak_bytes"], contender["issue_share"]
    return [
        _title(name, contender),
        f"{contender['median_s'] * 1e3:.3g}",
        "" if error is None else f"{error:.0e}",
        "" if peak is None else f"{(peak['tensors'] or peak['allocator']) / 2**20:.1f}",
        f"{contender['copy_share']:.1%}{copy_floor}",
        *([] if issue is None else [f"{issue:.0%}"]),
        f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f}){speed_floor}" if speed else "",
        f"{smaller:.1f}{memory_floor}" if smaller else "",
    ]


def _title(name: str, contender: Mapping[str, Any]) -> str:
    name = name.replace("compile", f"compile, {COMPILE_MODE} mode")
    return f"ours, {name}" if contender["ours"] else name


def _machine_code_table(figures: Sequence[Mapping[str, Any]]) -> Table:
    """Tell what every launch costs on GPUs that are not here: a row a launch, a column an architecture."""
    title = "no GPU here; stand-in: Triton compiled ahead of time\nregisters, KiB shared, instructions a step; spills and atomics by name"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    architectures = list(dict.fromkeys(each["architecture"] for each in figures))
    for column in ("", *(f"sm_{architecture}" for architecture in architectures)):
        table.add_column(column, no_wrap=bool(column))
    cells: dict[str, dict[int, str]] = {}
    for each in figures:
        step = "" if each["per_step"] is None else f", {each['per_step']:.1f}"
        named = "".join(f"\n{each[kind]} {kind}" for kind in ("spills", "atomics") if each[kind])
        cell = f"{each['registers']}, {each['shared_bytes'] / 1024:.0f}{step}{named}"
        cells.setdefault(each["launch"], {})[each["architecture"]] = cell
    for launch, by_architecture in cells.items():
        table.add_row(launch, *(by_architecture.get(architecture, "") for architecture in architectures))
    return table


def _manner(name: str) -> str:
    return GRAPH if name.endswith(GRAPH) else ""
