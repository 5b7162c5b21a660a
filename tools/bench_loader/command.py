"""`wherefrom bench loader`: our loader against the usual ones, as ratios of medians over interleaved fresh processes.

Here: cases, rounds, who is left out and why, JSON; a red check ends it before there is any speed.
Not here: what is compared (contenders.py, a process for each measurement), on which pictures (pictures.py), what is
printed of the numbers (report.py, plot.py).
The main figure is pictures per CPU-second of the whole process tree: it hardly moves when others use the machine, wall time does.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
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
from wherefrom.tools.bench_loader.checks import ViewsName, bench_recipe
from wherefrom.tools.bench_loader.contenders import DECODERS, ON_GPU, OURS, TITLES, ContenderName, LoaderJob, why_missing
from wherefrom.tools.bench_loader.peers import FFCV_MISSING
from wherefrom.tools.bench_loader.pictures import enlarged_shard, picture_facts
from wherefrom.tools.bench_loader.plot import draw_rates
from wherefrom.tools.bench_loader.report import COMPARED, LoaderCase, Mode, Rate, as_data, print_case, role
from wherefrom.tools.console import print_line
from wherefrom.tools.machine import last_line, machine

__all__ = ["bench_loader_command"]

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "pillow-simd", "simplejpeg", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("kornia", "spdl"),
)
STEADY_MIB, STEADY_FACTOR = 16.0, 1.03  # how far memory may grow from the third epoch to the tenth


class WrongDeliveryError(Exception):
    """A contender delivered something wrong."""


def bench_loader_command(
    data: str | None = None,
    rounds: int = 5,
    seconds: float = 6.0,
    modes: tuple[Mode, ...] = ("geometry",),
    views: tuple[ViewsName, ...] = ("crops",),
    megapixels: tuple[float, ...] = (0.0,),
    threads: tuple[int, ...] = (),
    contenders: tuple[ContenderName, ...] = get_args(ContenderName),
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
        views: crops, 2 x 224 + 8 x 96 px as everybody cuts them; or those of a method, which are measured against decoding alone.
        megapixels: sizes of the pictures; 0: as given, others: enlarged to that, which is kinder to decoders than photographs are.
        threads: numbers of threads of our loaders, and of worker processes of the others; default: one a core.
        contenders: whom to measure; who cannot run here is left out.
        batch: pictures a batch: small beside what a round delivers, since workers hand over whole batches.
        feed: pictures a second, for which the cores that they take are printed.
        out: folder for bench.json and bench.png.
        memory: instead of speed, watch our loader's memory over ten epochs.
        plant: check against boxes that lie elsewhere, to see that the check finds out.
    Raises: OSError or ValueError of one line for shards or values that do not fit.
    """
    threads = threads or (available_cores(),)
    _check_settings(rounds=rounds, seconds=seconds, threads=threads, megapixels=megapixels, batch=batch, feed=feed)
    console = Console()
    pattern = data or demo_shards().train
    index = ShardIndex.open(pattern, decode=True)  # what is wrong with the shards is reported here, and no contender pays for indexing
    runnable, left_out = _runnable(contenders)
    for line in [*_default_renderers(), *left_out]:
        print_line(console, line)
    cases = [
        LoaderCase(mode=mode, views=of_views, megapixels=size, threads=count)
        for mode, of_views, size in itertools.product(dict.fromkeys(modes), dict.fromkeys(views), dict.fromkeys(megapixels))
        for count in dict.fromkeys(threads)
    ]
    with tempfile.TemporaryDirectory(prefix="wherefrom-bench-") as scratch:
        shards = {size: str(enlarged_shard(index, size, Path(scratch))) if size else pattern for size in dict.fromkeys(megapixels)}
        pictures = {size: picture_facts(ShardIndex.open(path, decode=True), size) for size, path in shards.items()}
        general = LoaderJob(contender="torch", data=pattern, seconds=seconds, threads=threads[0], batch=batch, plant=plant)
        jobs = _jobs(general, cases, runnable, shards)
        try:
            if memory:
                return _watch_memory(console, next((job for job in jobs[cases[0]] if job.contender in OURS), general))
            rates_by_case = _measure(jobs, rounds, console)
        except WrongDeliveryError as problem:
            print_line(console, f"wrong, so no speed is told: {problem}")
            return 1
    result = {
        "command": ["wherefrom", "bench", "loader", *sys.argv[3:]],
        "machine": machine(PACKAGES),
        "views": {name: _told(name) for name in dict.fromkeys(views)},
        "settings": {"rounds": rounds, "seconds": seconds, "batch": batch, "feed": feed, "data": data},
        "left_out": left_out,
        "contenders": {name: {"title": TITLES[name], "role": role(name), "on_gpu": name in ON_GPU} for name in runnable},
        "cases": [as_data(case, pictures[case.megapixels], rates, feed) for case, rates in rates_by_case.items()],
    }
    _write(out, result)
    for case, rates in rates_by_case.items():
        print_case(console, case, rates, feed)
    print_line(console, f"every delivery was checked; all numbers: {out / 'bench.json'}, {out / 'bench.png'}")
    return 0


def _told(views: ViewsName) -> str:
    """Return what views there are, in words."""
    families = bench_recipe(False, views).families
    return " + ".join(f"{family.views} x {family.size_px[0]} px of {type(family.law).__name__}" for family in families)


def _check_settings(*, rounds: int, seconds: float, threads: Sequence[int], megapixels: Sequence[float], batch: int, feed: float) -> None:
    if rounds < 1 or not seconds > 0 or min(threads) < 1:
        raise ValueError(f"rounds={rounds}, seconds={seconds}, threads={threads}: needs rounds >= 1, seconds > 0 and threads >= 1")
    if not megapixels or not all(0 <= size <= 100 for size in megapixels):
        raise ValueError(f"megapixels={megapixels}: needs sizes from 0 (as given) to 100")
    if batch < 1 or not feed > 0:
        raise ValueError(f"batch={batch}, feed={feed}: needs batch >= 1 and feed > 0")


def _default_renderers() -> list[str]:
    """Return a line for each kind of device here: which renderer serves who asks for none, and why."""
    devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    choices = {device: choose_renderer("auto", device) for device in devices}
    return [f'renderer="auto" takes {name} on {device}: {why}' for device, (name, why) in choices.items()]


def _runnable(contenders: Sequence[ContenderName]) -> tuple[list[ContenderName], list[str]]:
    """Return the contenders that can run here, and a line for every reason why others cannot.

    Raises: ValueError if nobody is left.
    """
    missing = {name: why for name in dict.fromkeys(contenders) if (why := why_missing(name))}
    lines = [
        f"left out: {', '.join(name for name, reason in missing.items() if reason == why)}: {why}"
        for why in dict.fromkeys(missing.values())
    ]
    runnable = [name for name in dict.fromkeys(contenders) if name not in missing]
    if not runnable:
        raise ValueError(f"contenders: nobody to measure; {'; '.join(lines) or 'name some'}")
    return runnable, [*lines, *([FFCV_MISSING] if set(contenders) == set(get_args(ContenderName)) else [])]


def _jobs(
    general: LoaderJob, cases: Sequence[LoaderCase], names: Sequence[ContenderName], shards: Mapping[float, str]
) -> dict[LoaderCase, list[LoaderJob]]:
    """Return every case's job for each contender; shards: by the size of their pictures in megapixels, as cases name it."""
    jobs = {}
    for case in cases:
        photometrics = case.mode == "photometrics"
        of_case = replace(general, data=shards[case.megapixels], threads=case.threads, photometrics=photometrics, views=case.views)
        able = [name for name in names if case.views == "crops" or name in (*COMPARED, *DECODERS)]
        jobs[case] = [replace(of_case, contender=name) for name in able]
    return jobs


def _measure(jobs: Mapping[LoaderCase, Sequence[LoaderJob]], rounds: int, console: Console) -> dict[LoaderCase, dict[ContenderName, Rate]]:
    """Run every job of every case once a round, in turns, each in a fresh process."""
    runs: dict[LoaderCase, dict[ContenderName, list[dict[str, Any]]]] = {case: defaultdict(list) for case in jobs}
    for number, (case, of_case) in itertools.product(range(rounds), jobs.items()):
        for job in of_case:
            where = f" ({case.title})" if len(jobs) > 1 else ""
            print_line(console, f"round {number + 1} of {rounds}{where}: {TITLES[job.contender]}")
            runs[case][job.contender].append(_run(job))
    return {case: {name: _rate(of_name) for name, of_name in by_name.items()} for case, by_name in runs.items()}


def _rate(runs: Sequence[dict[str, Any]]) -> Rate:
    shares = [run["draw_share"] for run in runs if "draw_share" in run]
    return Rate(
        per_cpu_s=[run["pictures"] / max(run["cpu_s"], 1e-9) for run in runs],
        per_wall_s=[run["pictures"] / run["wall_s"] for run in runs],
        memory_mib=max(run["memory_mib"] for run in runs),
        draw_share=statistics.median(shares) if shares else None,
    )


def _run(job: LoaderJob) -> dict[str, Any]:
    """Check and measure one contender in a fresh process.

    Raises: WrongDeliveryError if a check is red, OSError if the process ended otherwise.
    """
    command = [sys.executable, "-m", "wherefrom.tools.bench_loader.contenders", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"contender {job.contender} ended with code {done.returncode}: {last_line(done.stderr)}")
    result = json.loads(done.stdout.splitlines()[-1])
    for check in result["checks"]:
        if not check["passed"]:
            raise WrongDeliveryError(f"{TITLES[job.contender]}: {check['name']}: {check['value']:.3g}, at most {check['limit']:g} is right")
    return result


def _watch_memory(console: Console, job: LoaderJob) -> int:
    """Print our loader's memory epoch by epoch; return 1 if it grows."""
    memory = _run(replace(job, memory=True))["memory_mib"]
    steady = max(memory[3:]) <= memory[2] * STEADY_FACTOR + STEADY_MIB
    numbers = " ".join(f"{value:.0f}" for value in memory)
    print_line(console, f"{TITLES[job.contender]}: memory after each of {len(memory)} epochs, MiB: {numbers}")
    print_line(
        console, "steady" if steady else f"grows by more than {STEADY_FACTOR - 1:.0%} and {STEADY_MIB:.0f} MiB after the third epoch"
    )
    return 0 if steady else 1


def _write(out: Path, result: Mapping[str, Any]) -> None:
    """Write bench.json and bench.png, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with write_aside(out / "bench.json") as aside:
        aside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    with write_aside(out / "bench.png") as aside:
        draw_rates(result, aside)
