"""Right answers about held-out pictures, against one picture at a time, and fresh heads against networks that tell all or nothing."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_runs import METHODS, VIT

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.tools.console import columns
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation import answers
from wherefrom.train.evaluation.answers import answers_right, evaluate_answers
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.report import evaluate_run
from wherefrom.train.objective import Progress, Step
from wherefrom.train.objectives.rotation import RotationSettings
from wherefrom.train.settings import EvaluationSettings

AT = Progress(update=3, updates=9, updates_per_epoch=4)
UPRIGHT = RotationSettings(size_px=24, area_frac=(0.9, 1.0), mirror="none")


@pytest.fixture
def pictures(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> ShardIndex:
    """80 pictures, all bright above, of which every fifth is too small for tiles."""
    rng = np.random.default_rng(3)
    samples = []
    for i in range(80):
        picture = rng.integers(0, 90, (10, 12, 3) if i % 5 == 0 else (64 + i % 7, 80, 3))
        picture[: len(picture) // 2] += 120
        samples.append((f"{i:04d}", {"jpg": jpeg_bytes(picture.astype(np.uint8))}))
    return ShardIndex.open(str(make_shard(tmp_path / "bright.tar", samples)))


@pytest.mark.core
@pytest.mark.parametrize("name", ["rotation", "context", "jigsaw", "colorization"])
def test_answers_are_counted_as_one_picture_at_a_time_gives_them(name: str, pictures: ShardIndex) -> None:
    """Two batches, of 64 and of 16 pictures, of which as many do not count as chance has it."""
    method = METHODS[name]
    step = Step(Encoder(method.model), [method.settings.objective(name)], seed=0)
    objective: Any = step.objectives[name].eval()
    assert objective.chance is not None
    right, loss = [], []
    with ShardPictures(pictures, renderer="torch", threads=1) as held_out, torch.no_grad():
        row = answers_right(step.encoder, objective, held_out, pictures=80, at=AT)
        for sample in range(80):
            batch = held_out.views(ViewRecipe(families=objective.families), np.array([sample]))
            terms = objective(batch, step.encoder.eval().encode, AT)
            if float(terms.meters.get("pictures_left_out", 0)) == 0:
                right.append(float(terms.meters["accuracy"]))
                loss.append(sum(map(float, terms.losses.values())))
    assert len(right) == (64 if name in ("context", "jigsaw") else 80)
    assert row.accuracy == pytest.approx(np.mean(right), abs=1e-5)
    assert row.loss == pytest.approx(np.mean(loss), rel=1e-5)
    assert row.loss != pytest.approx(
        np.mean(sorted(loss)[: len(loss) // 2]), rel=1e-5
    )  # control: of half the pictures it is another number


@pytest.mark.core
def test_a_fresh_head_is_right_as_often_as_its_network_tells(pictures: ShardIndex) -> None:
    """Pictures are bright above: a random network tells which way they are turned, one whose weights are 0 tells nothing."""
    step = Step(Encoder(replace(VIT, summary="mean")), [UPRIGHT.objective("rotation")], seed=0)
    with torch.no_grad():
        for parameter in step.encoder.parameters():
            parameter.zero_()
    before = copy.deepcopy(step.state_dict())
    objective: Any = step.objectives["rotation"]
    with ShardPictures(pictures, renderer="torch", threads=1) as source:
        report = evaluate_answers(step.encoder, objective, source, source, at=AT, pictures=80, train_pictures=80, head_steps=150)
    told = {row.name: row.accuracy for row in report.rows}
    assert list(told) == ["held-out pictures", "fresh head", "fresh head, random encoder", "chance"]
    assert told["chance"] == told["fresh head"] == told["held-out pictures"] == 0.25
    assert told["fresh head, random encoder"] > 0.8
    assert (report.pictures, report.left_out) == (80, 0.0)
    assert step.training and all(torch.equal(before[name], value) for name, value in step.state_dict().items())


@pytest.mark.core
def test_what_a_network_says_of_a_batch_is_computed_once(pictures: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads learn the same from features that are remembered as from features computed anew."""
    method = METHODS["jigsaw"]
    step = Step(Encoder(method.model), [method.settings.objective("jigsaw")], seed=0)
    objective: Any = step.objectives["jigsaw"]
    asked: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, views: Any, **options: Any) -> Any:
        asked.append(len(views if isinstance(views, torch.Tensor) else views.pixels))
        return encode(self, views, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    with ShardPictures(pictures, renderer="torch", threads=1) as source:
        options: Any = {"at": AT, "pictures": 80, "train_pictures": 80, "head_steps": 12}
        remembered = evaluate_answers(step.encoder, objective, source, source, **options)
        once = len(asked)
        monkeypatch.setattr(answers._Remembered, "encode_of", lambda self, _: self.encoder.encode)
        anew = evaluate_answers(step.encoder, objective, source, source, **options)
    assert once == 3 * 2 + 2 * 2  # held out by three heads, learned from by two, in two batches each
    assert len(asked) - once == 3 * 2 + 2 * 12
    assert remembered == anew


@pytest.mark.core
def test_a_run_tells_them_of_every_objective_that_states_a_chance(pictures: ShardIndex) -> None:
    settings = EvaluationSettings(pictures=80, head_pictures=64, head_steps=2, knn_pictures=0, short_pictures=16, short_knn_pictures=0)
    names = ("simclr", "rotation", "jigsaw")
    step = Step(Encoder(METHODS["rotation"].model), [METHODS[name].settings.objective(name) for name in names], seed=0)
    with ShardPictures(pictures, renderer="torch", threads=1) as source:
        short, full = (evaluate_run(step, source, source, settings, view_px=16, at=AT, full=full) for full in (False, True))
    assert list(short.curves) == ["rotation/accuracy", "jigsaw/accuracy"]
    assert full.curves == {}
    assert "simclr" not in full.report
    assert [(short.report["update"], full.report["update"])] == [(3, 3)]
    jigsaw: Any = full.report["jigsaw"]
    assert [row["name"] for row in jigsaw["rows"]] == ["held-out pictures", "fresh head", "fresh head, random encoder", "chance"]
    assert jigsaw["left_out"] == pytest.approx(16 / 80)
    lines = [line for table in full.tables for line in columns(table).splitlines()]
    assert max(map(len, lines)) <= 80
    assert any("20.0% of them left out" in line for line in lines)


@pytest.mark.core
def test_where_every_picture_is_too_small_there_is_no_number_and_the_run_goes_on(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    small = [(f"{i}", {"jpg": jpeg_bytes(np.full((8, 8, 3), 20 * i, np.uint8))}) for i in range(6)]
    method = METHODS["context"]
    step = Step(Encoder(method.model), [method.settings.objective("context")], seed=0)
    objective: Any = step.objectives["context"]
    with ShardPictures(ShardIndex.open(str(make_shard(tmp_path / "small.tar", small))), renderer="torch", threads=1) as source:
        report = evaluate_answers(step.encoder, objective, source, source, at=AT, pictures=6, train_pictures=6, head_steps=2)
    assert np.isnan(report.rows[0].accuracy)
    assert report.left_out == 1.0
    assert report.row("chance").accuracy == 1 / 8
