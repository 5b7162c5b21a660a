"""The evidence: its order, runs that are killed and go on, its two controls, and the report's arithmetic on planted numbers.

Runs are miniatures of evidence_runs.py. Quantiles of Student's distribution are compared with scipy's.
"""

import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_runs import LEARNED, SP, VIT, shrink, tiny_host
from torch import Tensor

from wherefrom.pipeline import ShardIndex, ViewRecipe
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.views import Batch
from wherefrom.tools.evidence import command, one_run, plan, report, side_by_side
from wherefrom.tools.evidence.command import main
from wherefrom.tools.evidence.controls import ON_VIEWS, HostOnSpatialViewsSettings, ShuffledSpatialSettings, of_another_picture
from wherefrom.tools.evidence.metrics import METRICS, Metric
from wherefrom.tools.evidence.one_run import make, parts_of
from wherefrom.tools.evidence.plan import (
    ARMS,
    FEW_ARMS,
    HOSTS,
    SEEDS,
    UPDATES,
    Held,
    PlannedRun,
    equal_time_updates,
    read,
    settings_of,
    table,
)
from wherefrom.tools.evidence.report import STUDENT, Difference, differences, markdown, read_runs, smallest_gain
from wherefrom.train import Encoder, Objective, ObjectiveSettings, Progress, Step
from wherefrom.train.objective import random_scope, united_families
from wherefrom.train.run_folder import RunFolder, read_metrics

AT = Progress(update=0, updates=4, updates_per_epoch=2)
ROOT = Path(__file__).resolve().parents[1]
TIMES = ("cpu_s", "cpu_s_an_update", "machine")


def blocks(units: Sequence[PlannedRun]) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return runs of equal host and seed that follow one another: host, seed, arms."""
    found: list[tuple[str, int, tuple[str, ...]]] = []
    for unit in units:
        if found and found[-1][:2] == (unit.host, unit.seed):
            found[-1] = (*found[-1][:2], (*found[-1][2], unit.arm))
        else:
            found.append((unit.host, unit.seed, (unit.arm,)))
    return found


def assert_each_comes_after_what_it_needs(units: Sequence[PlannedRun]) -> None:
    for number, unit in enumerate(units):
        assert set(unit.needs) <= set(units[:number]), unit.name


@pytest.mark.core
def test_after_every_block_the_table_is_whole() -> None:
    units = table()
    assert_each_comes_after_what_it_needs(units)
    with pytest.raises(AssertionError):
        assert_each_comes_after_what_it_needs(units[::-1])
    of_blocks = blocks(units)
    assert of_blocks[:2] == [("simclr", 0, ARMS), ("moco_v3", 0, ARMS)]
    assert {(host, seed) for host, seed, arms in of_blocks if arms == ARMS} == {(h, s) for h in ("simclr", "moco_v3") for s in SEEDS}
    assert of_blocks[6:8] == [("mae", 0, FEW_ARMS), ("dino", 0, FEW_ARMS)]
    assert of_blocks[8:] == [("simclr", 0, ("part", "equal-time-part", "gtsa", "equal-time-gtsa"))]
    assert len({unit.name for unit in units}) == len(units) == 46


@pytest.mark.core
def test_all_runs_of_the_table_have_settings() -> None:
    for unit in table():
        settings = settings_of(unit, data="somewhere", updates=1000)
        assert settings.seed == unit.seed and settings.updates == 1000
        objectives = settings.make_objectives()  # they check themselves
        assert ("spatial" in settings.objectives) == (unit.arm in ("sp", "shuffled", "published")), unit.name
        assert len(objectives) == (1 if unit.arm in ("alone", "views") or unit.arm.startswith("equal-time") else 2)
        assert (plan.changes(settings, unit.host) == {}) == (unit.arm == "alone" or unit.arm.startswith("equal-time"))


@pytest.mark.core
def test_the_chosen_law_and_its_shuffled_control_differ_in_nothing_but_the_objective() -> None:
    sp, shuffled = (settings_of(PlannedRun(host="simclr", arm=arm, seed=0), data="", updates=10) for arm in ("sp", "shuffled"))
    (plain,) = (each for name, each in sp.objectives.items() if name == "spatial")
    assert type(shuffled.objectives["spatial"]) is ShuffledSpatialSettings
    assert all(getattr(plain, name) == getattr(shuffled.objectives["spatial"], name) for name in type(SP).__dataclass_fields__)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


@pytest.fixture
def pictures(tiny_shards: Path) -> dict[str, str]:
    return {"data": str(tiny_shards / "train.tar"), "val": str(tiny_shards / "val.tar")}


class Killed(BaseException):
    """What no handler catches."""


def killed_at(update: int, patch: pytest.MonkeyPatch) -> None:
    """Let the next run end between the gradients of an update and its step."""
    plain = Step.before_update

    def before_update(self: Step, progress: Progress) -> None:
        if progress.update == update:
            raise Killed
        plain(self, progress)

    patch.setattr(Step, "before_update", before_update)


def judged_never(*_: Any, **__: Any) -> None:
    raise Killed


def without_times(held: Held) -> Held:
    return {name: value for name, value in held.items() if name not in TIMES}


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_a_killed_run_goes_on_and_tells_what_an_unkilled_one_tells(
    pictures: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan.UPDATES, "simclr", 12)  # a checkpoint after 10
    unit = PlannedRun(host="simclr", arm="sp", seed=0)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(11, patch)
        with pytest.raises(Killed):
            make(unit, tmp_path / "killed", **pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_run, "judge_all", judged_never)
        with pytest.raises(Killed):
            make(unit, tmp_path / "killed", **pictures)
    assert not unit.file(tmp_path / "killed").exists()
    make(unit, tmp_path / "killed", **pictures, keep=True)
    work = unit.work(tmp_path / "killed")
    assert [start["update"] for start in read_metrics(RunFolder(work / "run"), "start")] == [0, 10, 12]
    counted = one_run.CpuSeconds(work / "cpu.jsonl").lines()
    assert [line["to"] for line in counted] == list(range(1, 13)) and all(line["cpu_s"] > 0 for line in counted)

    whole = make(unit, tmp_path / "whole", **pictures)
    assert not unit.work(tmp_path / "whole").exists()
    written = json.loads(unit.file(tmp_path / "killed").read_text())
    assert without_times(written) == without_times(whole)
    other = make(replace(unit, seed=1), tmp_path / "whole", **pictures)  # control: what is compared tells runs apart
    for name in ("metrics", "curves", "gradients"):
        assert other[name] != whole[name]


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_a_run_tells_metrics_floors_gradients_and_no_path(
    pictures: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path), "--data", pictures["data"], "--val", pictures["val"]]
    assert main(["run", "--only", "simclr", "alone", "0", *words]) == 0
    assert "simclr-alone-0: done, 20 updates" in capsys.readouterr().out
    held = json.loads((tmp_path / "simclr-alone-0.json").read_text())
    assert held["run"]["data"] == [f"{Path(pictures['data']).parent.name}/{name}.tar" for name in ("train", "val")]
    assert str(tmp_path.parent) not in json.dumps(held) and held["settings"] == {}
    parts = {f"{part} {score}" for part in ("class token", "mean token", "grid") for score in ("knn", "ridge")}
    assert parts < held["metrics"].keys() and any(name.startswith("knn: ") for name in held["metrics"])
    assert parts < held["floors"]["random encoder"].keys() and "pixels knn" in held["floors"]["raw pixels"]
    assert held["not_measured"] == {}
    assert held["gradients"]["simclr"]["cosine"] == pytest.approx(1) and held["gradients"].keys() == {"simclr"}
    assert held["curves"]["update"] == list(range(1, 21)) and len(held["curves"]["simclr/contrast"]) == 20
    assert main(["run", "--only", "simclr", "alone", str(plan.OUTSIDE), *words]) == 0
    outside = json.loads((tmp_path / f"simclr-alone-{plan.OUTSIDE}.json").read_text())  # choices are made by all pictures alone
    assert parts == outside["metrics"].keys()


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_a_file_of_other_settings_is_not_taken_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = PlannedRun(host="simclr", arm="sp", seed=0)
    settings = settings_of(unit, data="", updates=20)
    unit.file(tmp_path).write_text(json.dumps(planted(unit, {}, updates=20) | {"settings": plan.changes(settings, "simclr")}))
    assert read(unit, tmp_path) is not None
    monkeypatch.setitem(plan.CANDIDATES, "sp-four-1", replace(SP, weight=0.5))
    with pytest.raises(ValueError, match="other settings") as problem:
        read(unit, tmp_path)
    assert "\n" not in str(problem.value)


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_equal_time_is_as_many_updates_as_the_seconds_allow(tmp_path: Path) -> None:
    unit = PlannedRun(host="simclr", arm="equal-time", seed=0)
    with pytest.raises(ValueError, match="simclr-alone-0"):
        plan.updates_of(unit, tmp_path)
    for needed, each in zip(unit.needs, (0.2, 0.5), strict=True):
        settings = settings_of(needed, data="", updates=20)
        held = planted(needed, {}, updates=20) | {"cpu_s_an_update": each, "settings": plan.changes(settings, "simclr")}
        needed.file(tmp_path).write_text(json.dumps(held))
    assert plan.updates_of(unit, tmp_path) == 50
    assert plan.updates_of(replace(unit, updates=7), tmp_path) == 7
    assert equal_time_updates({"cpu_s_an_update": 0.2}, {"run": {"updates": 2400}, "cpu_s_an_update": 0.2}) == 2400


def step_of(*learned: ObjectiveSettings, host: str = "simclr") -> Step:
    """Return a step of a host, whose name is its own, and of a plug-in called spatial."""
    names = (host, "spatial")
    objectives: list[Objective] = [each.objective(name) for each, name in zip(learned, names[: len(learned)], strict=True)]
    with random_scope("encoder"):
        encoder = Encoder(tiny_host(host).model)
    return Step(encoder, objectives, seed=0)


def batch_for(step: Step, shards: Path) -> Batch:
    recipe = ViewRecipe(families=united_families([each for each in step.objectives.children() if isinstance(each, Objective)]))
    loader = make_loader(ShardIndex.open(str(shards / "train.tar")), recipe, seed=0, global_batch=8, renderer="torch", threads=1)
    try:
        return loader.batch(range(8))
    finally:
        loader.close()


def gradient_of(step: Step, batch: Batch) -> Tensor:
    learns = [each for each in step.encoder.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(step(batch, AT).loss, learns, allow_unused=True)
    return torch.cat([(torch.zeros_like(own) if each is None else each).flatten() for each, own in zip(gradients, learns, strict=True)])


def with_other_boxes(batch: Batch, family: str) -> Batch:
    """Return the same pixels with the records of other pictures."""
    views = (replace(each, geometry=of_another_picture(each.geometry)) if each.geometry.family == family else each for each in batch.views)
    return replace(batch, views=tuple(views))


@pytest.mark.core
def test_shuffled_targets_are_another_pictures(tiny_shards: Path) -> None:
    fields = {name: getattr(SP, name) for name in type(SP).__dataclass_fields__}
    plain, shuffled = (step_of(LEARNED["simclr"], sp) for sp in (SP, ShuffledSpatialSettings(**fields)))
    batch = batch_for(plain, tiny_shards)
    views = batch.family("spatial")
    assert len(set(views.geometry.sample.tolist())) == 8 and bool(views.valid.all())
    objective: Any = plain.objectives["spatial"]
    predicted = objective.predict(plain.encoder.encode(views))[0]
    targets = objective.targets(views.geometry)
    errors = {name: (predicted - each)[..., :2].square().sum(-1).mean() for name, each in (("own", targets), ("other", targets.roll(1, 0)))}
    losses = {name: step(batch, AT).losses["spatial/position"] for name, step in (("own", plain), ("other", shuffled))}
    torch.testing.assert_close(losses, errors)
    assert abs(errors["own"] - errors["other"]) > 1e-3  # control: they differ
    assert not torch.isclose(targets, targets.roll(1, 0)).all(-1).any()  # of no pair is the other picture's target its own
    # the host is as it was
    assert torch.equal(plain(batch, AT).losses["simclr/contrast"], shuffled(batch, AT).losses["simclr/contrast"])


def host_on_views(host: str, **choices: float) -> HostOnSpatialViewsSettings:
    return HostOnSpatialViewsSettings(host=LEARNED[host], views=SP, **choices)


@pytest.mark.core
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_sees_the_views_is_not_told_where_they_lie(host: str, tiny_shards: Path) -> None:
    step = step_of(host_on_views(host), host=host)
    batch = batch_for(step, tiny_shards)
    gradient = gradient_of(step, batch)
    assert torch.equal(gradient, gradient_of(step, with_other_boxes(batch, f"{host}_spatial")))
    assert not any("spatial" in name for name, _ in step.named_parameters())
    # control: SP is
    sp = step_of(LEARNED[host], SP, host=host)
    told = batch_for(sp, tiny_shards)
    assert not torch.allclose(gradient_of(sp, told), gradient_of(sp, with_other_boxes(told, "spatial")))
    # the views are learned from: both parts have a gradient, and together they are the whole
    parts = {name: gradient_of(part, batch) for name, part in parts_of(step)}
    assert parts.keys() == {host, f"{host}{ON_VIEWS}"} and all(bool(each.any()) for each in parts.values())
    torch.testing.assert_close(sum(parts.values()), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("host", HOSTS)
def test_without_a_weight_on_the_views_a_host_is_alone(host: str, tiny_shards: Path) -> None:
    alone, beside = step_of(LEARNED[host], host=host), step_of(host_on_views(host, views_weight=0.0), host=host)
    batch = batch_for(beside, tiny_shards)
    ((term, loss),) = alone(batch, AT).losses.items()
    torch.testing.assert_close(beside(batch, AT).losses[term], loss, rtol=0, atol=0)
    torch.testing.assert_close(gradient_of(alone, batch), gradient_of(beside, batch), rtol=1e-5, atol=1e-7)
    seen = step_of(host_on_views(host), host=host)
    assert not torch.allclose(gradient_of(alone, batch), gradient_of(seen, batch), rtol=1e-2)  # control


@pytest.mark.core
def test_an_objective_without_a_way_to_see_them_is_refused() -> None:
    with pytest.raises(ValueError, match="SpatialPrediction has no way"):
        HostOnSpatialViewsSettings(host=SP, views=SP).objective("spatial")


@pytest.mark.core
def test_parts_are_told_apart_and_put_back(tiny_shards: Path) -> None:
    step = step_of(LEARNED["simclr"], replace(SP, weight=0.3))
    batch = batch_for(step, tiny_shards)
    whole = gradient_of(step, batch)
    parts = {name: gradient_of(part, batch) for name, part in parts_of(step)}
    assert parts.keys() == {"simclr", "spatial"}
    torch.testing.assert_close(sum(parts.values()), whole, rtol=1e-4, atol=1e-6)
    heavier = step_of(LEARNED["simclr"], replace(SP, weight=0.6))
    twice = {name: gradient_of(part, batch) for name, part in parts_of(heavier)}
    torch.testing.assert_close(twice["spatial"], 2 * parts["spatial"], rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient_of(step, batch), whole)  # weights are as before


def planted(unit: PlannedRun, metrics: dict[str, float], *, updates: int = 2400) -> Held:
    """Return a run's file with planted numbers."""
    return {
        "run": {"name": unit.name, "host": unit.host, "arm": unit.arm, "seed": unit.seed, "updates": updates},
        "settings": {},
        "metrics": metrics,
        "floors": {"random encoder": {"class token knn": 0.25}, "raw pixels": {"pixels knn": 0.375}} if unit.arm == "alone" else {},
        "not_measured": {"jigsaw": "no tiles", "pairs": "no tiles"},
        "gradients": {"simclr": {"norm": 2.0, "cosine": 1.0}, "spatial": {"norm": 0.5, "cosine": -0.1}},
        "cpu_s": 600.0,
        "cpu_s_an_update": 0.25,
    }


ALONE, WITH_SP, LONGER = (0.40, 0.42, 0.41), (0.43, 0.44, 0.45), (0.44, 0.44, 0.44)


def planted_runs(seeds: int = 3) -> dict[tuple[str, str, int], Held]:
    arms = {"alone": ALONE, "sp": WITH_SP, "equal-time": LONGER}
    return {
        ("simclr", arm, seed): planted(PlannedRun(host="simclr", arm=arm, seed=seed), {"class token knn": values[seed]})
        for arm, values in arms.items()
        for seed in range(seeds)
    }


KNN = METRICS[0]


@pytest.mark.core
def test_differences_are_of_the_same_seed() -> None:
    found = differences(planted_runs(), KNN, "simclr", "sp")
    assert found is not None and found.error is not None
    assert found.values == pytest.approx((0.03, 0.02, 0.04)) and found.mean == pytest.approx(0.03)
    assert found.error == pytest.approx(0.01 / math.sqrt(3))
    unpaired = math.sqrt((statistics.variance(ALONE) + statistics.variance(WITH_SP)) / 3)
    assert abs(found.error - unpaired) > 0.002  # control: not that of two means
    left = differences(planted_runs(), KNN, "simclr", "sp", to="equal-time")
    assert left is not None and left.mean == pytest.approx(0) and left.values == pytest.approx((-0.01, 0, 0.01))
    two = differences(planted_runs(2), KNN, "simclr", "sp")
    assert two is not None and two.error is None and two.mean == pytest.approx(0.025)
    without = planted_runs()
    del without["simclr", "alone", 2]
    only = differences(without, KNN, "simclr", "sp")
    assert only is not None and only.values == pytest.approx((0.03, 0.02))
    assert differences(planted_runs(), KNN, "simclr", "views") is None


@pytest.mark.core
def test_the_smallest_gain_is_that_of_students_distribution() -> None:
    from scipy.stats import nct, t

    for freedom, quantiles in STUDENT.items():
        assert quantiles == pytest.approx((t.ppf(0.975, freedom), t.ppf(0.8, freedom)), abs=1e-4)
    arms = [Difference.of((0.03, 0.02, 0.04)), Difference.of((0.04, 0.02, 0.03))]
    error = 0.01 / math.sqrt(3)
    gain = smallest_gain(arms)
    assert gain == pytest.approx((t.ppf(0.975, 2) + t.ppf(0.8, 2)) * error, rel=1e-3)
    # what it is for: a gain so large is found four times out of five, one half as large is not
    found = [1 - nct.cdf(t.ppf(0.975, 2), 2, share * gain / error) for share in (1.0, 0.5)]
    assert found[0] == pytest.approx(0.8, abs=0.06) and found[1] < 0.5
    twice = smallest_gain([Difference.of((0.06, 0.04, 0.08))])
    assert twice == pytest.approx(2 * (gain or 0))
    assert smallest_gain([Difference.of((0.03, 0.02))]) is None


@pytest.mark.core
def test_the_report_prints_what_was_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (host, arm, seed), held in planted_runs().items():
        PlannedRun(host=host, arm=arm, seed=seed).file(tmp_path).write_text(json.dumps(held))
    outside = PlannedRun(host="simclr", arm="sp", seed=plan.OUTSIDE)
    outside.file(tmp_path).write_text(json.dumps(planted(outside, {"class token knn": 0.99})))
    assert main(["report", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "### SimCLR, seeds 0, 1, 2" in text and "0.99" not in text
    assert "| metric | random encoder | raw pixels | alone | + SP | alone, equal time | + SP less equal time | smallest gain |" in text
    gain = smallest_gain([Difference.of((0.03, 0.02, 0.04)), Difference.of((0.04, 0.02, 0.03))])
    cells = "| class token, 20-NN | 0.250 | 0.375 | 0.410 | +0.030 ± 0.006 | +0.030 ± 0.006 | +0.000 ± 0.006 |"
    assert f"{cells} {gain:.3f} |" in text
    assert "| class token, ridge | - | - | - | - | - | - | - |" in text
    assert "| SimCLR | + SP | 3 | 2400 | 10.0 | 0.250 |" in text and "| SimCLR | + SP | spatial | 0.5 | -0.10 |" in text
    assert text.endswith("Not measured: jigsaw, pairs of SimCLR (no tiles).\n")
    assert markdown(read_runs(tmp_path)) == text
    assert main(["report", "--runs", str(tmp_path / "nothing")]) == 2
    assert "holds no runs" in capsys.readouterr().err


@pytest.mark.core
def test_a_metric_is_the_mean_of_what_its_pattern_fits() -> None:
    metric = Metric(title="curve", scores="occlusion: random *")
    assert metric.of({"occlusion: random 0.1": 0.4, "occlusion: random 0.5": 0.2, "occlusion: salient 0.1": 9.0}) == pytest.approx(0.3)
    assert metric.of({"occlusion: salient 0.1": 9.0}) is None


@pytest.mark.core
def test_the_best_candidate_is_the_one_with_the_largest_mean() -> None:
    names = [metric.scores for metric in report.CHOICE]
    scores = {"alone": (0.4, 0.3, 0.5), "sp-pair-1": (0.4, 0.4, 0.5), "sp-four-1": (0.5, 0.2, 0.5)}
    runs = [
        planted(PlannedRun(host="simclr", arm=arm, seed=plan.OUTSIDE), dict(zip(names, values, strict=True)))
        for arm, values in scores.items()
    ]
    gains = report.chosen_by(runs)
    assert [arm for arm, _ in gains] == ["sp-pair-1", "sp-four-1"]
    assert [gain for _, gain in gains] == pytest.approx([0.1 / 3, 0.0])
    with pytest.raises(ValueError, match="alone"):
        report.chosen_by(runs[1:])


class Child:
    """A process that ends at the third look, and leaves its file unless it fails."""

    alive: list[str]
    told: int | None = None

    def __init__(self, unit: PlannedRun, out: Path, *, fails: bool) -> None:
        self.unit, self.out, self.fails, self.looks, self.returncode = unit, out, fails, 0, 0
        Child.alive.append(unit.name)

    def send_signal(self, number: int) -> None:
        self.told = number

    def wait(self) -> int:
        assert self.told == signal.SIGTERM  # else it would never end
        Child.alive.remove(self.unit.name)
        return 0

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < 3:
            return None
        Child.alive.remove(self.unit.name)
        if self.fails:
            self.returncode = 2
            side_by_side.log_of(self.unit, self.out).write_text("Traceback\nwherefrom: no disk\n")
            return 2
        held = planted(self.unit, {}, updates=20)
        settings = settings_of(self.unit, data="", updates=20)
        self.unit.file(self.out).write_text(json.dumps(held | {"settings": plan.changes(settings, self.unit.host)}))
        return 0


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of runs that were started, beside how many were alive: no real process is."""
    names: list[str] = []
    Child.alive = []
    (tmp_path / "work").mkdir()

    def start(unit: PlannedRun, out: Path, options: Sequence[str]) -> Child:
        child = Child(unit, out, fails=unit.arm == "views")
        names.append(f"{unit.arm} {len(Child.alive)}")
        return child

    monkeypatch.setattr(side_by_side, "_start", start)
    monkeypatch.setattr(side_by_side, "POLL_S", 0.0)
    return names


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_runs_are_made_two_at_a_time_once_what_they_need_is_there(started: list[str], tmp_path: Path) -> None:
    units, lines = table()[:6], list[str]()
    missing = side_by_side.make_all(units, tmp_path, [], jobs=2, tell=lines.append)
    # equal-time waits for both, and what comes after it does not wait for it
    assert [each.split()[0] for each in started] == ["alone", "sp", "shuffled", "equal-time", "views", "published"] or [
        each.split()[0] for each in started
    ] == ["alone", "sp", "equal-time", "shuffled", "views", "published"]
    assert max(int(each.split()[1]) for each in started) == 2
    assert [unit.arm for unit in missing] == ["views"]
    assert "simclr-views-0: FAILED, exit code 2: wherefrom: no disk" in lines
    started.clear()
    assert side_by_side.make_all(units, tmp_path, [], jobs=1, tell=lines.append) and started == [
        "views 1"
    ]  # what is there is not made again


@pytest.mark.core
@pytest.mark.usefixtures("tiny")
def test_a_run_that_another_process_makes_counts_and_is_waited_for(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, other = table()[:2]
    looks = iter([True, True, True])

    def is_running(asked: PlannedRun, out: Path) -> bool:
        if asked != unit or next(looks, False):
            return asked == unit
        Child(unit, out, fails=False).looks = 5
        held = planted(unit, {}, updates=20)
        unit.file(out).write_text(json.dumps(held))
        Child.alive.remove(unit.name)
        return False

    monkeypatch.setattr(side_by_side, "is_running", is_running)
    assert side_by_side.make_all([unit, other], tmp_path, [], jobs=1, tell=lambda _: None) == []
    assert started == ["sp 1"]


@pytest.mark.core
@pytest.mark.usefixtures("tiny", "started")
def test_asked_to_stop_all_runs_are_asked_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before, lines = signal.getsignal(signal.SIGTERM), list[str]()
    with pytest.raises(side_by_side.StopAskedError, match="SIGTERM"):
        side_by_side.make_all(table()[:2], tmp_path, [], jobs=2, tell=lines.append)
    assert Child.alive == [] and sum("goes on when" in line for line in lines) == 2
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.core
def test_a_runs_process_is_told_which_run_and_uses_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []
    made: list[Any] = []
    monkeypatch.setattr(side_by_side.subprocess, "Popen", lambda words, env, **_: calls.append((words, env)))
    for unit in (table()[2], PlannedRun(host="mae", arm="sp-pair-0.3", seed=100, updates=9)):
        side_by_side._start(unit, tmp_path, ["--data", "a", "--val", "b", "--limit", "7", "--keep"])
        words, environment = calls.pop()
        assert words[:3] == [sys.executable, "-m", "wherefrom.tools.evidence"] and environment["OMP_NUM_THREADS"] == "1"
        monkeypatch.setattr(command, "make", lambda *given, **options: made.append((given, options)) or planted(given[0], {}))
        assert main(words[3:]) == 0
        assert made.pop() == ((unit, tmp_path), {"data": "a", "val": "b", "keep": True, "limit": 7})


def plant(unit: PlannedRun, out: Path, metrics: dict[str, float], *, cpu_s: float = 60.0) -> None:
    """Write a run's file that is taken for the run."""
    length = plan.updates_of(unit, out)
    settings = plan.changes(settings_of(unit, data="", updates=length), unit.host)
    unit.file(out).write_text(json.dumps(planted(unit, metrics, updates=length) | {"settings": settings, "cpu_s": cpu_s}))


@pytest.mark.core
@pytest.mark.parametrize(
    ("second_an_update", "gains", "found"),
    [(0.1, (0.30, 0.36, 0.365), "1200: doubling it gives +0.005"), (0.3, (0.30, 0.36), "1200: twice as many would take 12 CPU-minutes")],
)
def test_a_host_is_as_long_as_doubling_gives_a_point(
    second_an_update: float,
    gains: tuple[float, ...],
    found: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter(gains)

    def make_all(units: Sequence[PlannedRun], out: Path, options: Sequence[str], **_: Any) -> list[PlannedRun]:
        (unit,) = units
        assert unit.updates is not None and unit.seed == plan.OUTSIDE
        scores = {"class token knn": 0.1, "mean token knn": next(values)}  # the better one counts
        plant(unit, out, scores, cpu_s=unit.updates * second_an_update)
        return []

    monkeypatch.setattr(command, "make_all", make_all)
    assert main(["length", "simclr", "--data", "a", "--val", "b", "--out", str(tmp_path)]) == 0
    assert f'UPDATES["simclr"] = {found}' in capsys.readouterr().out
    assert next(values, None) is None


@pytest.mark.core
def test_what_is_chosen_is_printed_once_all_candidates_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_all(units: Sequence[PlannedRun], out: Path, *_: Any, **__: Any) -> list[PlannedRun]:
        assert {unit.seed for unit in units} == {plan.OUTSIDE} and len(units) == 1 + len(plan.CANDIDATES)
        for unit in units:
            plant(unit, out, {"class token knn": 0.5 if unit.arm == "sp-colored-0.3" else 0.4})
        return []

    monkeypatch.setattr(command, "make_all", make_all)
    assert main(["choose", "--data", "a", "--val", "b", "--out", str(tmp_path), "--updates", "40"]) == 0
    assert 'CHOSEN["simclr"] = "sp-colored-0.3"' in capsys.readouterr().out
    (tmp_path / "simclr-sp-pair-1-100-40.json").unlink()
    monkeypatch.setattr(command, "make_all", lambda units, *_, **__: units[:1])
    assert main(["choose", "--data", "a", "--val", "b", "--out", str(tmp_path), "--updates", "40"]) == 1
    assert "CHOSEN" not in capsys.readouterr().out


@pytest.mark.core
def test_of_a_law_only_the_weights_are_tried() -> None:
    assert [unit.arm for unit in plan.sweep("mae", law="pair")] == ["alone", "sp-pair-0.3", "sp-pair-1"]
    assert len(plan.sweep("mae")) == 1 + len(plan.CANDIDATES) == 7
    with pytest.raises(ValueError, match=r"^law 'triple': there are pair, four, colored$"):
        plan.sweep("mae", law="triple")


@pytest.mark.core
def test_misuse_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "a", "--val", "b", "--out", str(tmp_path)]
    for wrong, said in (
        (["run", "--only", "simclr", "sp!", "0", *words], "arm 'sp!'"),
        (["run", "--only", "byol", "sp", "0", *words], "host 'byol'"),
        (["run", "--updates", "3", *words], "without --only"),
        (["run", "--only", "simclr", "equal-time", "0", *words], "simclr-alone-0"),
        (["length", "byol", *words], "host 'byol'"),
        (["run", "--host", "mae", "byol", *words], "host 'byol'"),
        (["choose", "--host", "byol", *words], "host 'byol'"),
    ):
        assert main(wrong) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and said in line


@pytest.mark.core
def test_of_hosts_that_are_named_only_their_runs_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlannedRun] = []

    def make_all(units: Sequence[PlannedRun], *_: Any, **__: Any) -> list[PlannedRun]:
        asked.extend(units)
        return []

    monkeypatch.setattr(command, "make_all", make_all)
    words = ["run", "--data", "a", "--val", "b", "--out", str(tmp_path)]
    assert main([*words, "--host", "mae", "dino"]) == 0
    assert asked == [unit for unit in table() if unit.host in ("mae", "dino")] and len(asked) == 6
    assert main(words) == 0
    assert asked[6:] == list(table())


@pytest.mark.core
def test_the_plan_is_listed_with_what_runs_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = table()[0]
    unit.file(tmp_path).write_text(json.dumps(planted(unit, {}, updates=UPDATES["simclr"])))
    assert main(["plan", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done" in lines[1] and lines[1].split()[-1] == "10.0" and "about 10" in lines[2]
    assert lines[7].split()[-1] == "-"  # of MoCo v3 nothing is known yet
    assert lines[-1].startswith("1 of 46 done; left: about 3.5 CPU-hours, and 24 runs of which nothing is known yet")
    assert VIT.width == 16


@pytest.mark.core
def test_the_page_ends_with_what_the_runs_say_that_are_kept() -> None:
    kept = ROOT / "tools" / "results" / "evidence"
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page.partition("## Results\n\n")[2] == markdown(read_runs(kept))
    done = [unit for unit in table() if plan.read(unit, kept) is not None]  # of other settings than the plan's it raises
    assert len(done) == len(list(kept.glob("*.json"))) > 0


@pytest.mark.core
@pytest.mark.parametrize("host", plan.HOSTS)
def test_what_is_chosen_is_what_the_kept_runs_chose(host: str) -> None:
    kept = ROOT / "tools" / "results" / "evidence" / "choices"
    tried = plan.sweep(host, law=None if host == "simclr" else "pair")
    gains = report.chosen_by([held for unit in tried if (held := plan.read(unit, kept)) is not None])
    assert len(gains) == len(tried) - 1 and gains[0][0] == plan.CHOSEN[host]
