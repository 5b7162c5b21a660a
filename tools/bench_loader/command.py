"""`wherefrom bench loader`: our loader against the usual ones, as ratios of medians over interleaved fresh processes.

Here: cases, rounds, who is left out and why, JSON; a red check ends it before any speed is told.
Not here: what is compared (contenders.py, a process for each measurement), on which pictures (pictures.py), what is
told of the numbers (report.py, plot.py).
The main figure is pictures per CPU-second of the whole process tree: it hardly moves when others use the machine, wall time does.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.render.choose import choose_renderer
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.system import available_cores
from wherefrom.tools.bench_loader.checks import FAMILIES
from wherefrom.tools.bench_loader.contenders import ON_GPU, OURS, TITLES, Name, Plan, why_missing
from wherefrom.tools.bench_loader.peers import FFCV_MISSING
from wherefrom.tools.bench_loader.pictures import described, enlarged_shard
from wherefrom.tools.bench_loader.plot import draw_rates
from wherefrom.tools.bench_loader.report import Case, Mode, Rate, as_data, print_case, role
from wherefrom.tools.machine import machine

__all__ = ["bench_loader_command"]

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "pillow-simd", "simplejpeg", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("kornia", "spdl"),
)
STEADY_MIB, STEADY_FACTOR = 16.0, 1.03  # how far memory may grow from the third epoch to the tenth
WIDTH = 132  # of tables that nobody watches


class CheckFailedError(Exception):
    """A contender delivered something wrong."""


def bench_loader_command(
    data: str | None = None,
    rounds: int = 5,
    seconds: float = 6.0,
    modes: tuple[Mode, ...] = ("geometry",),
    megapixels: tuple[float, ...] = (0.0,),
    threads: tuple[int, ...] = (),
    contenders: tuple[Name, ...] = get_args(Name),
    batch: int = 32,
    feed: float = 2000.0,
    out: Path = Path("bench-loader"),
    memory: bool = False,
    plant: bool = False,
) -> int:
    """Measure our loader against the usual ones; the exit code is 1 if something that was delivered is wrong.

    Args:
        data: shards; default: the demo's pictures, rendered once. Numbers for photographs need photographs.
        rounds: how often each contender is measured, in turns.
        seconds: of one measurement.
        modes: geometry alone, or all photometrics too, as near as each library goes: brightness, contrast, saturation, hue, gray,
            blur and solarize.
        megapixels: sizes of the pictures; 0: as given, others: enlarged to that, which is kinder to decoders than photographs are.
        threads: numbers of threads of our loaders, and of worker processes of the others; default: one a core.
        contenders: whom to measure; who cannot run here is left out.
        batch: pictures a batch: small beside what a round delivers, since workers hand over whole batches.
        feed: pictures a second, for which the cores that they take are told.
        out: folder for bench.json and bench.png.
        memory: instead of speed, watch our loader's memory over ten epochs.
        plant: check against boxes that lie elsewhere, to see that the check finds out.
    Raises: OSError or ValueError of one line for shards or values that do not fit.
    """
    threads = threads or (available_cores(),)
    _check_settings(rounds=rounds, seconds=seconds, threads=threads, megapixels=megapixels, batch=batch, feed=feed)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    pattern = data or demo_shards().train
    index = ShardIndex.open(pattern)  # what is wrong with the shards is said here, and no contender pays for indexing
    present, left_out = _present(contenders)
    for line in [*_served_by(), *left_out]:
        console.print(line, markup=False)
    cases = [
        Case(mode=mode, megapixels=size, threads=count)
        for mode, size, count in itertools.product(dict.fromkeys(modes), dict.fromkeys(megapixels), dict.fromkeys(threads))
    ]
    with tempfile.TemporaryDirectory(prefix="wherefrom-bench-") as scratch:
        shards = {size: str(enlarged_shard(index, size, Path(scratch))) if size else pattern for size in dict.fromkeys(megapixels)}
        pictures = {size: described(ShardIndex.open(path), size) for size, path in shards.items()}

        def plan(case: Case, name: Name) -> Plan:
            shown, colored = shards[case.megapixels], case.mode == "photometrics"
            return Plan(contender=name, data=shown, seconds=seconds, threads=case.threads, batch=batch, photometrics=colored, plant=plant)

        try:
            if memory:
                ours: Name = next((name for name in present if name in OURS), "torch")
                return _watch_memory(console, replace(plan(cases[0], ours), memory=True))
            measured = _measured({case: [plan(case, name) for name in present] for case in cases}, rounds, console)
        except CheckFailedError as problem:
            console.print(f"wrong, so no speed is told: {problem}", markup=False)
            return 1
    result = {
        "command": ["wherefrom", "bench", "loader", *sys.argv[3:]],
        "machine": machine(PACKAGES),
        "views": [f"{views} x {side} px of area {low} to {high}" for views, side, (low, high) in FAMILIES],
        "settings": {"rounds": rounds, "seconds": seconds, "batch": batch, "feed": feed, "data": data},
        "left_out": left_out,
        "contenders": {name: {"title": TITLES[name], "role": role(name), "on_gpu": name in ON_GPU} for name in present},
        "cases": [as_data(case, pictures[case.megapixels], rates, feed) for case, rates in measured.items()],
    }
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(out / "bench.json") as aside:
        aside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    with write_aside(out / "bench.png") as aside:
        draw_rates(result, aside)
    for case, rates in measured.items():
        print_case(console, case, rates, feed)
    console.print(f"every delivery was checked; all numbers: {out / 'bench.json'}, {out / 'bench.png'}", markup=False)
    return 0


def _check_settings(*, rounds: int, seconds: float, threads: Sequence[int], megapixels: Sequence[float], batch: int, feed: float) -> None:
    if rounds < 1 or not seconds > 0 or min(threads) < 1:
        raise ValueError(f"rounds={rounds}, seconds={seconds}, threads={threads}: needs rounds >= 1, seconds > 0 and threads >= 1")
    if not megapixels or not all(0 <= size <= 100 for size in megapixels):
        raise ValueError(f"megapixels={megapixels}: needs sizes from 0 (as given) to 100")
    if batch < 1 or not feed > 0:
        raise ValueError(f"batch={batch}, feed={feed}: needs batch >= 1 and feed > 0")


def _served_by() -> list[str]:
    """Return a line for each kind of device here: which renderer serves who asks for none, and why."""
    places = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    chosen = {place: choose_renderer("auto", place) for place in places}
    return [f'renderer="auto" takes {name} on {place}: {why}' for place, (name, why) in chosen.items()]


def _present(contenders: Sequence[Name]) -> tuple[list[Name], list[str]]:
    """Return the contenders that can run here, and a line for every reason why others cannot.

    Raises: ValueError if nobody is left.
    """
    missing = {name: why for name in dict.fromkeys(contenders) if (why := why_missing(name))}
    lines = [
        f"left out: {', '.join(name for name, reason in missing.items() if reason == why)}: {why}"
        for why in dict.fromkeys(missing.values())
    ]
    present = [name for name in dict.fromkeys(contenders) if name not in missing]
    if not present:
        raise ValueError(f"contenders: nobody to measure; {'; '.join(lines) or 'name some'}")
    return present, [*lines, *([FFCV_MISSING] if set(contenders) == set(get_args(Name)) else [])]


def _measured(plans: Mapping[Case, Sequence[Plan]], rounds: int, console: Console) -> dict[Case, dict[Name, Rate]]:
    """Run every plan of every case once a round, in turns, each in a fresh process."""
    results: dict[Case, dict[Name, list[dict[str, Any]]]] = {case: {plan.contender: [] for plan in of} for case, of in plans.items()}
    for number in range(rounds):
        for case, of in plans.items():
            for plan in of:
                where = f" ({case.title})" if len(plans) > 1 else ""
                console.print(f"round {number + 1} of {rounds}{where}: {TITLES[plan.contender]}", markup=False)
                results[case][plan.contender].append(_run(plan))
    unseen = {run["held_unseen"] for of in results.values() for runs in of.values() for run in runs if "held_unseen" in run}
    for reason in sorted(unseen):
        console.print(reason, markup=False)
    return {case: {name: _rate(runs) for name, runs in of.items()} for case, of in results.items()}


def _rate(runs: Sequence[dict[str, Any]]) -> Rate:
    shares = [run["draw_share"] for run in runs if "draw_share" in run]
    held = [run["held_frac"] for run in runs if "held_frac" in run]
    return Rate(
        per_cpu_s=[run["pictures"] / max(run["cpu_s"], 1e-9) for run in runs],
        per_wall_s=[run["pictures"] / run["wall_s"] for run in runs],
        memory_mib=max(run["memory_mib"] for run in runs),
        draw_share=statistics.median(shares) if shares else None,
        held_frac=min(held, default=None),  # not the median: whatever else runs on a machine only adds to it
    )


def _run(plan: Plan) -> dict[str, Any]:
    """Check and measure one contender in a fresh process.

    Raises: CheckFailedError if a check is red, OSError if the process ended otherwise.
    """
    command = [sys.executable, "-m", "wherefrom.tools.bench_loader.contenders", json.dumps(asdict(plan))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise OSError(f"contender {plan.contender} ended with code {done.returncode}: {said}")
    result = json.loads(done.stdout.splitlines()[-1])
    for check in result["checks"]:
        if not check["passed"]:
            raise CheckFailedError(f"{TITLES[plan.contender]}: {check['name']}: {check['value']:.3g}, at most {check['limit']:g} is right")
    return result


def _watch_memory(console: Console, plan: Plan) -> int:
    """Tell our loader's memory epoch by epoch; return 1 if it grows."""
    memory = _run(plan)["memory_mib"]
    steady = max(memory[3:]) <= memory[2] * STEADY_FACTOR + STEADY_MIB
    told = " ".join(f"{value:.0f}" for value in memory)
    console.print(f"{TITLES[plan.contender]}: memory after each of {len(memory)} epochs, MiB: {told}", markup=False)
    console.print("steady" if steady else f"grows by more than {STEADY_FACTOR - 1:.0%} and {STEADY_MIB:.0f} MiB after the third epoch")
    return 0 if steady else 1
