"""`wherefrom bench loader`: our loader against the usual ones, as ratios of medians over interleaved fresh processes.

Here: rounds, ratios, the table, JSON and plot; a red check ends it before any speed is told.
Not here: what is compared and how it is checked and timed (bench_contenders.py, a process for each measurement).
The main figure is pictures per CPU-second of the whole process tree: it hardly moves when others use the machine, wall time does.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from wherefrom.pipeline.places import available_cores
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.tools.bench_checks import FAMILIES
from wherefrom.tools.bench_contenders import BATCH, Name, Plan
from wherefrom.train.demo_data import demo_shards

__all__ = ["bench_loader_command"]

TITLES: dict[Name, str] = {
    "torch": "wherefrom, torch renderer",
    "dali": "wherefrom, DALI renderer on the CPU",
    "pil": "DataLoader, Pillow and torchvision v1",
    "tv2": "DataLoader, torchvision v2 on tensors",
    "decode_dali": "decoding alone, DALI",
    "decode_threads": "decoding alone, simplejpeg in threads",
}
OURS: tuple[Name, ...] = ("torch", "dali")
DECODERS: tuple[Name, ...] = ("decode_dali", "decode_threads")
NEEDS_DALI: tuple[Name, ...] = ("dali", "decode_dali")
AIMS = {
    "torch / pil": 3.0,
    "torch / tv2": 2.0,
    "torch / ": 0.35,
    "dali / pil": 1.4,
}  # ours, on photographs without colour; "torch / " decoders
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
STEADY_MIB, STEADY_FACTOR = 16.0, 1.03  # how far memory may grow from the third epoch to the tenth


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Pictures a second, one number a round."""

    per_cpu_s: list[float]
    per_wall_s: list[float]
    memory_mib: float  # of the process tree, the largest of the rounds
    draw_share: float | None  # of a batch's CPU time; of our loaders alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A ratio of medians, with the least and the largest ratio of a single round, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


class CheckFailedError(Exception):
    """A contender delivered something wrong."""


def bench_loader_command(
    data: str | None = None,
    rounds: int = 5,
    seconds: float = 6.0,
    photometrics: bool = False,
    threads: int | None = None,
    contenders: tuple[Name, ...] = get_args(Name),
    out: Path = Path("bench-loader"),
    memory: bool = False,
    plant: bool = False,
) -> int:
    """Measure our loader against the usual ones; the exit code is 1 if something that was delivered is wrong.

    Args:
        data: shards; default: the demo's pictures, rendered once. Numbers for photographs need photographs.
        rounds: how often each contender is measured, in turns.
        seconds: of one measurement.
        photometrics: change brightness, contrast, saturation, hue, grey, blur and solarise as well, as near as each library goes.
        threads: of our loaders, and worker processes of the others; default: one a core.
        contenders: whom to measure.
        out: folder for bench.json and bench.png.
        memory: instead of speed, watch our loader's memory over ten epochs.
        plant: check against boxes that lie elsewhere, to see that the check finds out.
    Raises: OSError or ValueError of one line for shards or values that do not fit.
    """
    if rounds < 1 or not seconds > 0 or (threads is not None and threads < 1):
        raise ValueError(f"rounds={rounds}, seconds={seconds}, threads={threads}: needs rounds >= 1, seconds > 0 and threads >= 1")
    console = Console()
    pattern = data or demo_shards().train
    ShardIndex.open(pattern)  # what is wrong with the shards is said here, and no contender pays for indexing
    threads = threads or available_cores()

    def plan(name: Name) -> Plan:
        return Plan(contender=name, data=pattern, seconds=seconds, threads=threads, photometrics=photometrics, plant=plant, memory=memory)

    try:
        if memory:
            return _watch_memory(console, plan("torch"))
        rates = _measured([plan(name) for name in _present(console, contenders)], rounds, console)
    except CheckFailedError as problem:
        console.print(f"wrong, so no speed is told: {problem}", markup=False)
        return 1
    result = {
        "command": ["wherefrom", "bench", "loader", *sys.argv[3:]],
        "machine": machine(),
        "views": [f"{views} x {side} px of area {low} to {high}" for views, side, (low, high) in FAMILIES],
        "settings": {"rounds": rounds, "seconds": seconds, "batch": BATCH, "threads": threads, "photometrics": photometrics, "data": data},
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "ratios": {name: {unit: asdict(ratio) for unit, ratio in by.items()} for name, by in ratios(rates).items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(out / "bench.json", lambda aside: aside.write_text(json.dumps(result, indent=1), encoding="utf-8"))
    _write_whole(out / "bench.png", lambda aside: _plot(aside, rates, result))
    _print(console, rates, aims=not photometrics)
    console.print(f"every delivery was checked; all numbers: {out / 'bench.json'}, {out / 'bench.png'}", markup=False)
    return 0


def _present(console: Console, contenders: Sequence[Name]) -> list[Name]:
    """Return the contenders that can run here; say who cannot."""
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    missing = [name for name in contenders if name in NEEDS_DALI and not has_dali]
    if missing:
        console.print(f"left out, DALI is not installed: {', '.join(missing)}")
    return [name for name in dict.fromkeys(contenders) if name not in missing]


def _measured(plans: Sequence[Plan], rounds: int, console: Console) -> dict[Name, Rate]:
    """Run every plan once a round, in turns, each in a fresh process."""
    results: dict[Name, list[dict[str, Any]]] = {plan.contender: [] for plan in plans}
    for number in range(rounds):
        for plan in plans:
            console.print(f"round {number + 1} of {rounds}: {TITLES[plan.contender]}")
            results[plan.contender].append(_run(plan))
    return {name: _rate(runs) for name, runs in results.items()}


def _rate(runs: Sequence[dict[str, Any]]) -> Rate:
    shares = [run["draw_share"] for run in runs if "draw_share" in run]
    return Rate(
        per_cpu_s=[run["pictures"] / max(run["cpu_s"], 1e-9) for run in runs],
        per_wall_s=[run["pictures"] / run["wall_s"] for run in runs],
        memory_mib=max(run["memory_mib"] for run in runs),
        draw_share=statistics.median(shares) if shares else None,
    )


def _run(plan: Plan) -> dict[str, Any]:
    """Check and measure one contender in a fresh process.

    Raises: CheckFailedError if a check is red, OSError if the process ended otherwise.
    """
    command = [sys.executable, "-m", "wherefrom.tools.bench_contenders", json.dumps(asdict(plan))]
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
    console.print(f"memory after each of {len(memory)} epochs, MiB: {' '.join(f'{value:.0f}' for value in memory)}")
    console.print("steady" if steady else f"grows by more than {STEADY_FACTOR - 1:.0%} and {STEADY_MIB:.0f} MiB after the third epoch")
    return 0 if steady else 1


def ratios(rates: dict[Name, Rate]) -> dict[str, dict[str, Ratio]]:
    """Return our loaders over everyone else: "torch / pil" -> {"per_cpu_s": ..., "per_wall_s": ...}."""
    pairs = [(ours, other) for ours in rates if ours in OURS for other in rates if ours != other]
    return {
        f"{ours} / {other}": {unit: _ratio(getattr(rates[ours], unit), getattr(rates[other], unit)) for unit in ("per_cpu_s", "per_wall_s")}
        for ours, other in pairs
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> Ratio:
    by_round = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    return Ratio(median=statistics.median(one) / statistics.median(other), low=min(by_round), high=max(by_round), rounds=len(by_round))


def machine() -> dict[str, Any]:
    """Return what numbers depend on: processor, cores, memory, versions."""
    models = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    total_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": available_cores(),
        "memory_gib": round(total_kib / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _print(console: Console, rates: dict[Name, Rate], *, aims: bool) -> None:
    """Print rates, then ratios; of the two decoders the faster one is the ceiling."""
    measured = Table("", "pictures per CPU-s", "per s", "MiB", "draws", title="medians")
    for name, rate in rates.items():
        share = f"{rate.draw_share:.1%}" if rate.draw_share is not None else ""
        numbers = (statistics.median(rate.per_cpu_s), statistics.median(rate.per_wall_s), rate.memory_mib)
        measured.add_row(f"{name}: {TITLES[name]}", *(f"{number:.0f}" for number in numbers), share)
    console.print(measured)

    decoders = sorted((name for name in rates if name in DECODERS), key=lambda name: statistics.median(rates[name].per_cpu_s))
    compared = Table("", "per CPU-second", "per second", "aim", title="ratios of medians (least and largest ratio of a round)")
    for pair, by_unit in ratios(rates).items():
        if not any(pair.endswith(slower) for slower in decoders[:-1]):
            cells = [f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in by_unit.values()]
            aim = AIMS.get(pair.partition("decode")[0]) if aims else None
            compared.add_row(pair, *cells, f"{aim:g}" if aim else "")
    if compared.rows:
        console.print(compared)


def _plot(path: Path, rates: dict[Name, Rate], result: dict[str, Any]) -> None:
    """Draw pictures per CPU-second and per second as ratios to the Pillow DataLoader, or to the first contender."""
    from matplotlib.figure import Figure

    base = rates.get("pil") or next(iter(rates.values()))
    base_name = next(name for name, rate in rates.items() if rate is base)
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for offset, unit, title, colour in ((-0.19, "per_cpu_s", "per CPU-second", "#1f77b4"), (0.19, "per_wall_s", "per second", "#b0c4de")):
        for place, rate in enumerate(rates.values()):
            ratio = _ratio(getattr(rate, unit), getattr(base, unit))
            low, high = min(ratio.low, ratio.median), max(ratio.high, ratio.median)
            spread = [[ratio.median - low], [high - ratio.median]]
            axes.barh(place + offset, ratio.median, 0.36, color=colour, xerr=spread, error_kw={"capsize": 2, "lw": 0.8}, label=title)
            axes.text(high, place + offset, f"  {ratio.median:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rates)), [TITLES[name] for name in rates])
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"pictures, as a ratio to {TITLES[base_name]};\nmedians of {len(base.per_cpu_s)} rounds, least and largest round", fontsize=9
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend([handles[0], handles[len(rates)]], [labels[0], labels[len(rates)]], fontsize=8, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    where, settings = result["machine"], result["settings"]
    photometrics = ", all photometrics" if settings["photometrics"] else ""
    axes.set_title(f"{' + '.join(result['views'])}{photometrics}\n{where['cpu']}, {where['cores']} cores", fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written aside, then rename it: it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.writing")
    write(aside)
    os.replace(aside, path)
