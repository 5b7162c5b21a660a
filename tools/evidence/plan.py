"""Which runs the evidence is made of, in which order, and the settings of each.

Here: hosts, arms, seeds, lengths, what SP is set to; runs by name; whether a run's file is of these settings.
Not here: making a run (one_run.py), several of them side by side (side_by_side.py), what is measured (metrics.py).
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wherefrom.pipeline.laws import Disjoint
from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.tools.evidence.controls import HostOnSpatialViewsSettings, ShuffledSpatialSettings
from wherefrom.train.objective import ObjectiveSettings
from wherefrom.train.objectives import PARTSettings, SpatialSettings
from wherefrom.train.objectives.spatial import PAIRED
from wherefrom.train.plain_data import differences, to_plain
from wherefrom.train.recipes import recipe
from wherefrom.train.recipes.gtsa import SMALL_GTSA
from wherefrom.train.settings import EvaluationSettings, TrainSettings

HOSTS = {"simclr": "imagenette_simclr", "moco_v3": "imagenette_mocov3", "dino": "imagenette_dino", "mae": "imagenette_mae"}  # recipes
TITLES = {"simclr": "SimCLR", "moco_v3": "MoCo v3", "dino": "DINO", "mae": "MAE"}
SEEDS = (0, 1, 2)
OUTSIDE = 100  # the seed of all choices, which is none of the table

# with SP, whose updates take about twice as long, 20 CPU-minutes, and no more by `length`
UPDATES = {"simclr": 2400, "moco_v3": 2400, "dino": 450, "mae": 2400}

LAWS = {
    "pair": SpatialSettings(law=PAIRED, size_px=64, both_orders=True, color=None),
    "four": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16), aspect=(1.15**-0.5, 1.15**0.5)), views=4, size_px=48, color=None),
}
LAWS["colored"] = replace(LAWS["four"], color=ColorLaw())
CANDIDATES = {f"sp-{law}-{weight:g}": replace(sp, weight=weight) for law, sp in LAWS.items() for weight in (0.3, 1.0)}
# what `choose` found, by host: law and weight beside SimCLR; beside the others the weight of that law
CHOSEN = {"simclr": "sp-pair-1", "moco_v3": "sp-pair-0.3", "dino": "sp-pair-1", "mae": "sp-pair-0.3"}

# beside a host whose patches are 16 px wide: windows of 6 x 6 of them
PLUGINS: Mapping[str, ObjectiveSettings] = {
    "part": PARTSettings(size_px=96, patch_px=16, patches=36, area_frac=(0.3, 1.0)),
    "gtsa": replace(SMALL_GTSA, patch_from_epoch=3.0),
}
ARMS = ("alone", "sp", "equal-time", "shuffled", "views", "published")
FEW_ARMS = ARMS[:3]
TIMED = {"equal-time": "sp"} | {f"equal-time-{name}": name for name in PLUGINS}  # arms, by whose CPU-seconds the host alone is as long
ARM_TITLES = {
    "alone": "alone",
    "sp": "+ SP",
    "equal-time": "alone, equal time",
    "shuffled": "+ SP, shuffled",
    "views": "SP's views alone",
    "published": "+ SP as published",
    "part": "+ PART",
    "equal-time-part": "alone, time of PART",
    "gtsa": "+ GTSA",
    "equal-time-gtsa": "alone, time of GTSA",
}
NOT_CHANGES = ("data", "val", "seed", "updates", "evaluation", "runtime")  # of settings: told apart from them, or of no account
CURVE = 100  # points of a run's curves, about

Held = dict[str, Any]  # a run's file


def check_host(host: str) -> None:
    """Raise ValueError in one line if there is no such host."""
    if host not in HOSTS:
        raise ValueError(f"host {host!r}: there are {', '.join(HOSTS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run. `updates`: its length where that is not the table's.

    Raises: ValueError in one line if there is no such host or arm.
    """

    host: str
    arm: str
    seed: int
    updates: int | None = None

    def __post_init__(self) -> None:
        check_host(self.host)
        if self.arm not in ARM_TITLES and self.arm not in CANDIDATES:
            raise ValueError(f"arm {self.arm!r}: there are {', '.join((*ARM_TITLES, *CANDIDATES))}")

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.host}-{self.arm}-{self.seed}" + ("" if self.updates is None else f"-{self.updates}")

    @property
    def needs(self) -> tuple["PlannedRun", ...]:
        """The runs that tell how long this one is."""
        if self.updates is not None or self.arm not in TIMED:
            return ()
        return tuple(replace(self, arm=arm) for arm in ("alone", TIMED[self.arm]))

    def file(self, out: Path) -> Path:
        """Return where its results lie."""
        return out / f"{self.name}.json"

    def work(self, out: Path) -> Path:
        """Return the folder of what is there only as long as the run is made."""
        return out / "work" / self.name


def table() -> tuple[PlannedRun, ...]:
    """Return the runs in their order: after each block the table of what is there is whole, and smaller.

    A block is all arms of a host and a seed, both hosts before the next seed; then the hosts with few arms, then other plug-ins.
    """
    whole = [PlannedRun(host=host, arm=arm, seed=seed) for seed in SEEDS for host in ("simclr", "moco_v3") for arm in ARMS]
    few = [PlannedRun(host=host, arm=arm, seed=SEEDS[0]) for host in ("mae", "dino") for arm in FEW_ARMS]
    plugins = [PlannedRun(host="simclr", arm=arm, seed=SEEDS[0]) for name in PLUGINS for arm in (name, f"equal-time-{name}")]
    return (*whole, *few, *plugins)


def sweep(host: str, updates: int | None = None, law: str | None = None) -> tuple[PlannedRun, ...]:
    """Return the runs by which SP's weight is chosen, and its law if none is said: half as long as those of the table, of another seed.

    Raises: ValueError in one line if there is no such host or law.
    """
    check_host(host)
    if law is not None and law not in LAWS:
        raise ValueError(f"law {law!r}: there are {', '.join(LAWS)}")
    length = updates or UPDATES[host] // 2
    candidates = [name for name in CANDIDATES if law is None or name.startswith(f"sp-{law}-")]
    return tuple(PlannedRun(host=host, arm=arm, seed=OUTSIDE, updates=length) for arm in ("alone", *candidates))


def updates_of(unit: PlannedRun, out: Path) -> int:
    """Return the length of a run; of one that is as long as others take, by the CPU-seconds an update that these took.

    Raises: ValueError in one line if these are not there yet.
    """
    if unit.updates is not None:
        return unit.updates
    if not unit.needs:
        return UPDATES[unit.host]
    held = [read(needed, out) for needed in unit.needs]
    for needed, result in zip(unit.needs, held, strict=True):
        if result is None:
            raise ValueError(f"{unit.name} is as long as {needed.name} takes, which is not in {out}; make that first, or say --updates")
    alone, other = (result for result in held if result is not None)
    return equal_time_updates(alone, other)


def equal_time_updates(alone: Held, other: Held) -> int:
    """Return how many updates of the host alone take as many CPU-seconds as another run took."""
    return max(1, round(other["run"]["updates"] * other["cpu_s_an_update"] / alone["cpu_s_an_update"]))


def host_settings(host: str) -> TrainSettings:
    """Return the settings of a host by itself: its recipe, in bfloat16, which takes two thirds of the time where attention is not fused."""
    return replace(recipe(HOSTS[host]), precision="bfloat16")


def settings_of(unit: PlannedRun, *, data: str, updates: int) -> TrainSettings:
    """Return the settings of a run: the host's recipe, with what its arm adds; schedules are stretched over its updates."""
    base = host_settings(unit.host)
    log_every = max(1, updates // CURVE)
    runtime = replace(base.runtime, device="cpu", threads=1, log_with="none", log_every=log_every, keep=1)
    return replace(
        base,
        data=data,
        seed=unit.seed,
        updates=updates,
        objectives=_objectives(unit, base.objectives),
        evaluation=EvaluationSettings(every=0, knn_pictures=0),
        runtime=replace(runtime, checkpoint_every=log_every * 10),  # with a line of the log: CPU-seconds are counted from line to line
    )


def _objectives(unit: PlannedRun, alone: Mapping[str, ObjectiveSettings]) -> dict[str, ObjectiveSettings]:
    if unit.arm == "alone" or unit.arm in TIMED:
        return dict(alone)
    if unit.arm in PLUGINS:
        return {**alone, unit.arm: PLUGINS[unit.arm]}
    if unit.arm == "published":
        return {**alone, "spatial": SpatialSettings()}  # as `wherefrom train RECIPE --spatial` has it
    if unit.arm in CANDIDATES:
        return {**alone, "spatial": CANDIDATES[unit.arm]}
    chosen = CANDIDATES[CHOSEN[unit.host]]
    if unit.arm == "sp":
        return {**alone, "spatial": chosen}
    if unit.arm == "shuffled":
        fields = {name: getattr(chosen, name) for name in SpatialSettings.__dataclass_fields__}
        return {**alone, "spatial": ShuffledSpatialSettings(**fields)}
    ((name, host),) = alone.items()
    return {name: HostOnSpatialViewsSettings(host=host, views=chosen)}


def changes(settings: TrainSettings, host: str) -> dict[str, Any]:
    """Return what differs from the host's recipe and changes results: other settings by their dotted paths, other objectives as a whole."""
    here, there = (json.loads(json.dumps(to_plain(each))) for each in (settings, host_settings(host)))
    learned, alone = here.pop("objectives"), there.pop("objectives")
    others = {where: value for where, value, _ in differences(here, there) if where.partition(".")[0] not in NOT_CHANGES}
    return others | {f"objectives.{name}": plain for name, plain in learned.items() if plain != alone.get(name)}


def read(unit: PlannedRun, out: Path) -> Held | None:
    """Return a run's file; None where there is none.

    Raises: ValueError in one line if it is damaged, or of a run by other settings than this one's.
    """
    path = unit.file(out)
    if not path.is_file():
        return None
    held = read_file(path)
    length = held["run"]["updates"] if unit.needs else unit.updates or UPDATES[unit.host]
    settings = settings_of(unit, data="", updates=length)
    if held["settings"] != changes(settings, unit.host) or held["run"]["updates"] != length:
        raise ValueError(f"{path}: is a run by other settings, or of another length, than {unit.name} has now; move it away")
    return held


def read_file(path: Path) -> Held:
    """Return what a file holds.

    Raises: ValueError in one line if it is no run's.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: no JSON ({problem}); move it away") from None
    if not isinstance(held, dict) or not {"run", "settings", "metrics", "cpu_s_an_update"} <= held.keys():
        raise ValueError(f"{path}: is not of a run; move it away")
    return held


def expected_cpu_s(unit: PlannedRun, done: Mapping[PlannedRun, Held]) -> float | None:
    """Return how long a run will take by those that are done: of its arm, else of its host; None where there are none."""
    as_long = (unit.arm, TIMED.get(unit.arm))
    of_arm = [held["cpu_s"] for other, held in done.items() if other.host == unit.host and other.arm in as_long]
    of_host = [held["cpu_s"] for other, held in done.items() if other.host == unit.host]
    return statistics.mean(of_arm or of_host) if of_host else None
