"""What the runs say together, as tables in Markdown: metrics by arms, differences of the same seed, what could have been told from none.

Here: everything that is read from the files of runs. It says how the numbers come about, and nothing about what they mean.
Not here: making runs (one_run.py), which metrics there are (metrics.py).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wherefrom.tools.evidence.metrics import CHOICE, METRICS, Metric
from wherefrom.tools.evidence.plan import ARM_TITLES, ARMS, HOSTS, OUTSIDE, PLUGINS, TIMED, TITLES, Held, PlannedRun, read_file, table

SEEDS_FOR_ERRORS = 3  # fewer tell no standard error
# quantiles of Student's distribution at .975 and .8, by degrees of freedom
STUDENT = {2: (4.3027, 1.0607), 3: (3.1824, 0.9785), 4: (2.7764, 0.9410), 5: (2.5706, 0.9195), 6: (2.4469, 0.9057), 7: (2.3646, 0.8960)}
STUDENT |= {8: (2.3060, 0.8889), 9: (2.2622, 0.8834)}
NOTES = (
    "`alone`: means over seeds. Other columns: the difference to `alone`, of the same seeds; with three seeds or more its mean, and after",
    "± the standard error of that. Equal time: the host alone for as many CPU-seconds as `+ SP` (or PART, GTSA) took; the last but one",
    "column is what is left of `+ SP` against it. Smallest gain: what a two-sided test of paired differences at 5 % would find four times",
    "out of five, (t(.975) + t(.8)) times their standard error, which is pooled over the arms; t has as many degrees of freedom as there",
    "are seeds but one. A difference below it may be there and was not to be found. Metrics marked ↓ are better when lower. A run again:",
    "`python -m wherefrom.tools.evidence run --only HOST ARM SEED --data TRAIN --val VAL`, of equal time with `--updates`.",
)

Runs = Mapping[tuple[str, str, int], Held]  # by host, arm, seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A mean of paired differences, and its standard error, None of fewer than three."""

    mean: float
    error: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> "Difference":
        """Return what differences of the same seeds come to."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) >= SEEDS_FOR_ERRORS else None
        return Difference(mean=statistics.fmean(values), error=error, values=tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def read_runs(folder: Path) -> dict[tuple[str, str, int], Held]:
    """Return the table's runs whose files lie in a folder; those of other lengths, or of the seed of choices, are left out.

    Raises: ValueError in one line if there are none, or a file is of something else.
    """
    runs = {}
    for unit in table():
        path = unit.file(folder)
        if path.is_file():
            runs[unit.host, unit.arm, unit.seed] = read_file(path)
    if not runs:
        raise ValueError(f"{folder}: holds no runs of the table; make some with run --out {folder}")
    return runs


def value_of(metric: Metric, held: Held) -> float | None:
    """Return a metric of a run; None where it was not measured."""
    return metric.of(_measured(held["metrics"]))


def differences(runs: Runs, metric: Metric, host: str, arm: str, *, to: str = "alone") -> Difference | None:
    """Return how much more an arm has than another one, by the seeds that both have; None where there are none."""
    values = []
    for seed in _seeds(runs, host):
        pair = [value_of(metric, runs[host, which, seed]) if (host, which, seed) in runs else None for which in (arm, to)]
        if pair[0] is not None and pair[1] is not None:
            values.append(pair[0] - pair[1])
    return Difference.of(values) if values else None


def smallest_gain(found: Sequence[Difference]) -> float | None:
    """Return the smallest gain that paired differences of these arms would have been told from none by; None of fewer than three seeds."""
    arms = [each for each in found if len(each.values) >= SEEDS_FOR_ERRORS]
    if not arms:
        return None
    seeds = min(len(each.values) for each in arms)
    variance = statistics.fmean(statistics.variance(each.values) for each in arms)
    return sum(STUDENT[min(seeds - 1, max(STUDENT))]) * math.sqrt(variance / seeds)


def markdown(runs: Runs) -> str:
    """Return all tables: of each host, then what was spent, then gradients."""
    parts = ["\n".join(NOTES)]
    for host in HOSTS:
        seeds = _seeds(runs, host)
        if seeds:
            arms = [arm for arm in ARMS if any((host, arm, seed) in runs for seed in seeds)]
            parts += [f"### {TITLES[host]}{_of_seeds(seeds)}", _table(_host_rows(runs, host, arms))]
    beside = [arm for name in PLUGINS for arm in (name, f"equal-time-{name}") if ("simclr", arm, 0) in runs]
    if beside:
        only_first = {key: held for key, held in runs.items() if key[0] == "simclr" and key[2] == 0}
        parts += [f"### PART and GTSA beside SimCLR{_of_seeds([0])}", _table(_host_rows(only_first, "simclr", ["alone", *beside]))]
    parts += ["### What was spent", _table(_cost_rows(runs)), "### Gradients into the encoder, at the end", _table(_gradient_rows(runs))]
    missing = _not_measured(runs)
    return "\n\n".join(parts + ([f"Not measured: {'; '.join(missing)}."] if missing else [])) + "\n"


def chosen_by(runs: Sequence[Held]) -> list[tuple[str, float]]:
    """Return the candidates of a sweep, the best first, with what they have more than the host alone: the mean of 20-NN of class token,
    mean token and grid.

    Raises: ValueError if the host alone is not among them.
    """
    values = {held["run"]["arm"]: [value_of(metric, held) for metric in CHOICE] for held in runs}
    scores = {arm: statistics.fmean(value for value in of_arm if value is not None) for arm, of_arm in values.items()}
    if "alone" not in scores:
        raise ValueError("the host alone is not there yet, which candidates are compared with")
    gains = [(arm, score - scores["alone"]) for arm, score in scores.items() if arm != "alone"]
    return sorted(gains, key=lambda gain: -gain[1])


def _host_rows(runs: Runs, host: str, arms: Sequence[str]) -> list[list[str]]:
    against_time = "sp" in arms and "equal-time" in arms
    floors: dict[str, dict[str, float | None]] = runs.get((host, "alone", _seeds(runs, host)[0]), {}).get("floors", {})
    columns = [column for column, scores in floors.items() if scores]
    heading = ["metric", *columns, *(ARM_TITLES[arm] for arm in arms)]
    rows = [heading + (["+ SP less equal time"] if against_time else []) + ["smallest gain"]]
    for metric in METRICS:
        found = [differences(runs, metric, host, arm) for arm in arms if arm != "alone"]
        alone = [value_of(metric, runs[host, "alone", seed]) for seed in _seeds(runs, host) if (host, "alone", seed) in runs]
        known = [value for value in alone if value is not None]
        cells = [metric.title + (" ↓" if metric.better == "lower" else "")]
        cells += [_number(_floor(metric, _measured(floors[column]))) for column in columns]
        cells += [_number(statistics.fmean(known) if known else None)] if "alone" in arms else []
        cells += ["-" if each is None else str(each) for each in found]
        if against_time:
            left = differences(runs, metric, host, "sp", to="equal-time")
            cells.append("-" if left is None else str(left))
        cells.append(_number(smallest_gain([each for each in found if each is not None])))
        rows.append(cells)
    return rows


def _cost_rows(runs: Runs) -> list[list[str]]:
    rows = [["host", "arm", "seeds", "updates", "CPU-minutes a run", "CPU-seconds an update"]]
    for host, arm in dict.fromkeys((unit.host, unit.arm) for unit in table()):
        held = [runs[host, arm, seed] for seed in _seeds(runs, host) if (host, arm, seed) in runs]
        if held:
            minutes, each = (statistics.fmean(float(one[name]) for one in held) for name in ("cpu_s", "cpu_s_an_update"))
            updates = sorted({one["run"]["updates"] for one in held})
            length = str(updates[0]) if len(updates) == 1 else f"{updates[0]} to {updates[-1]}"
            rows.append([TITLES[host], ARM_TITLES[arm], str(len(held)), length, f"{minutes / 60:.1f}", f"{each:.3f}"])
    return rows


def _gradient_rows(runs: Runs) -> list[list[str]]:
    rows = [["host", "arm", "of", "norm", "cosine to the host's"]]
    for host, arm in dict.fromkeys((unit.host, unit.arm) for unit in table() if unit.arm not in TIMED):
        held = [runs[host, arm, seed]["gradients"] for seed in _seeds(runs, host) if (host, arm, seed) in runs]
        for part in held[0] if held else ():
            norm, cosine = (statistics.fmean(float(one[part][name]) for one in held) for name in ("norm", "cosine"))
            rows.append([TITLES[host], ARM_TITLES[arm], part, f"{norm:.3g}", f"{cosine:+.2f}"])
    return rows


def _not_measured(runs: Runs) -> list[str]:
    """Return what was not measured of which hosts, by the reason."""
    names: dict[str, dict[str, None]] = {}
    hosts: dict[str, dict[str, None]] = {}
    for (host, _, _), held in runs.items():
        for name, why in held.get("not_measured", {}).items():
            names.setdefault(why, {})[name] = None
            hosts.setdefault(why, {})[TITLES[host]] = None
    return [f"{', '.join(names[why])} of {', '.join(hosts[why])} ({why})" for why in names]


def _floor(metric: Metric, scores: Mapping[str, float]) -> float | None:
    """Return a metric of a floor; raw pixels have no tokens and no grid, and stand beside all of them."""
    value = metric.of(scores)
    return scores.get(f"pixels {metric.scores.split()[-1]}") if value is None else value


def _seeds(runs: Runs, host: str) -> list[int]:
    return sorted({seed for which, _, seed in runs if which == host and seed != OUTSIDE})


def _of_seeds(seeds: Sequence[int]) -> str:
    return f", seed {seeds[0]}" if len(seeds) == 1 else f", seeds {', '.join(map(str, seeds))}"


def _measured(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if value is not None}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    heading, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([heading, "| --- " * len(rows[0]) + "|", *lines])


def state_rows(states: Mapping[PlannedRun, str], minutes: Mapping[PlannedRun, float | None]) -> list[list[str]]:
    """Return the plan as rows of words, the heading first: what each run is, where it stands, how many CPU-minutes it takes."""
    rows = [["number", "host", "arm", "seed", "state", "CPU-minutes"]]
    for number, (unit, state) in enumerate(states.items(), 1):
        took = minutes[unit]
        cells = [str(number), unit.host, unit.arm, str(unit.seed), state]
        rows.append([*cells, "-" if took is None else f"{took:.1f}" if state == "done" else f"about {took:.0f}"])
    return rows
