"""What the loader's benchmark prints: ratios and their aims, what a rate is worth, tables; nothing is measured here.

Here: the cases, their rates, ratios of medians, `print_case`. Not here: measuring (command.py), the plot (plot.py).
CPU contenders are compared by pictures per CPU-second, those on a GPU by the clock.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console

from wherefrom.tools.bench_loader.checks import ViewsName
from wherefrom.tools.bench_loader.contenders import DECODERS, ON_GPU, OURS, TITLES, ContenderName
from wherefrom.tools.bench_loader.pictures import PictureFacts
from wherefrom.tools.console import print_line, print_table

Mode = Literal["geometry", "photometrics"]
Unit = Literal["per_cpu_s", "per_wall_s"]

COMPARED: tuple[ContenderName, ...] = (*OURS, "dataset")  # with everybody else
WORTH: tuple[ContenderName, ...] = (*OURS, "pil")  # of whom it is printed how many cores they take
Size = Literal["small", "large"]
AIMS: dict[tuple[ViewsName, Mode, Size], dict[str, float]] = {  # least ratios on photographs; "decode": the fastest decoder of the whole
    ("crops", "geometry", "small"): {
        "native / pil": 6.5,
        "native / tv2": 4.2,
        "native / decode": 0.7,
        "torch / pil": 3.0,
        "torch / tv2": 2.0,
        "torch / decode": 0.35,
        "dali / pil": 1.4,
        "dataset / tv2": 3.8,
    },
    ("crops", "photometrics", "small"): {"native / pil": 8.0},
    ("crops", "geometry", "large"): {"native / decode": 0.6},
    ("spatial", "geometry", "small"): {"native / decode": 1.5},
    ("part", "geometry", "small"): {"native / decode": 0.9},
    ("mae", "geometry", "small"): {"native / decode": 0.95},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderCase:
    """What is the same for all contenders."""

    mode: Mode
    views: ViewsName
    megapixels: float  # to which pictures are enlarged; 0: they are as given
    threads: int

    @property
    def size(self) -> Size:
        return "large" if self.megapixels else "small"

    @property
    def title(self) -> str:
        pictures = f"pictures of {self.megapixels:g} MP" if self.megapixels else "pictures as given"
        return f"{self.views}, {self.mode}, {pictures}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Pictures a second, one number a round."""

    per_cpu_s: list[float]
    per_wall_s: list[float]
    memory_mib: float  # of the process tree, the largest of the rounds
    draw_share: float | None = None  # of a batch's CPU time; of our loaders alone


@dataclass(frozen=True, kw_only=True, slots=True)
class RateRatio:
    """A ratio of medians, with the least and the largest ratio of a single round, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


Rates = Mapping[ContenderName, Rate]


def ratios(rates: Rates) -> dict[str, dict[Unit, RateRatio]]:
    """Return what is ours over everyone else: "native / pil" -> {"per_cpu_s": ..., "per_wall_s": ...}."""
    pairs = [(ours, other) for ours in rates if ours in COMPARED for other in rates if ours != other]
    return {
        f"{ours} / {other}": {
            "per_cpu_s": _ratio(rates[ours].per_cpu_s, rates[other].per_cpu_s),
            "per_wall_s": _ratio(rates[ours].per_wall_s, rates[other].per_wall_s),
        }
        for ours, other in pairs
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> RateRatio:
    by_round = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    return RateRatio(median=statistics.median(one) / statistics.median(other), low=min(by_round), high=max(by_round), rounds=len(by_round))


def cores_for(feed: float, rate: Rate) -> float:
    """Return how many cores like these it takes to make `feed` pictures a second."""
    return feed / statistics.median(rate.per_cpu_s)


def as_data(case: LoaderCase, pictures: PictureFacts, rates: Rates, feed: float) -> dict[str, Any]:
    """Return a case and its rates as plain data for JSON."""
    return {
        **asdict(case),
        "title": case.title,
        "pictures": asdict(pictures),
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "ratios": {name: {unit: asdict(ratio) for unit, ratio in by.items()} for name, by in ratios(rates).items()},
        "worth": {name: round(cores_for(feed, rate), 2) for name, rate in rates.items() if name in WORTH},
    }


def role(name: ContenderName) -> Literal["ours", "peer", "ceiling"]:
    """Return what a contender is in a comparison."""
    return "ours" if name in COMPARED else "ceiling" if name in DECODERS else "peer"


def print_case(console: Console, case: LoaderCase, rates: Rates, feed: float) -> None:
    """Print what was measured in one case: rates, ratios, aims, and what the rates are worth."""
    medians = [("", "pictures per CPU-s", "per s", "MiB", "draws")]
    for name, rate in rates.items():
        numbers = (statistics.median(rate.per_cpu_s), statistics.median(rate.per_wall_s), rate.memory_mib)
        share = "" if rate.draw_share is None else f"{rate.draw_share:.1%}"
        per_cpu_s, per_s, memory = (f"{number:.0f}" for number in numbers)
        medians.append((f"{name}: {TITLES[name]}", per_cpu_s, per_s, memory, share))
    print_table(console, medians, title=f"{case.title}: medians")
    _print_ratios(console, rates, "per_cpu_s", "per CPU-second")
    _print_ratios(console, rates, "per_wall_s", "per second, on the GPU")
    for line in [*_aims(case, rates), *_worth(rates, feed)]:
        print_line(console, line)


def _print_ratios(console: Console, rates: Rates, unit: Unit, unit_words: str) -> None:
    """Print ours, a column each, over everyone, a row each: without a GPU by CPU time, with one by the clock."""
    by_clock = unit == "per_wall_s"
    ours = [name for name in rates if name in COMPARED and (name in ON_GPU) == by_clock]
    others = [name for name in rates if by_clock or name not in ON_GPU]
    if not ours or len(others) < 2:
        return
    of_pairs = ratios(rates)
    rows = [(other, *("" if other == name else str(of_pairs[f"{name} / {other}"][unit]) for name in ours)) for other in others]
    title = f"pictures {unit_words}, over those of the row: ratios of medians (least-largest of a round)"
    print_table(console, [("", *ours), *rows], title)


def _aims(case: LoaderCase, rates: Rates) -> list[str]:
    """Return a line for every aim whose contenders were measured; what decodes fastest stands for "decode"."""
    decoders = [name for name in rates if name in DECODERS]
    ceiling = max(decoders, key=lambda name: statistics.median(rates[name].per_cpu_s), default=None)
    lines = []
    for pair, aim in AIMS.get((case.views, case.mode, case.size), {}).items():
        ours, other = pair.split(" / ")
        ratio = ratios(rates).get(f"{ours} / {ceiling if other == 'decode' else other}")
        if ratio is not None:
            reached = "reached" if ratio["per_cpu_s"].median >= aim else "MISSED"
            lines.append(f"{ours} / {ceiling if other == 'decode' else other}: {ratio['per_cpu_s']}, aim {aim:g}: {reached}")
    return lines


def _worth(rates: Rates, feed: float) -> list[str]:
    """Return a line that says how many cores feed so many pictures a second."""
    cores = [f"{cores_for(feed, rate):.1f} with {name}" for name, rate in rates.items() if name in WORTH]
    return [f"worth: {feed:g} pictures/s take so many cores like these: {', '.join(cores)}"] if cores else []
