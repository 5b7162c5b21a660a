"""Evaluation against plain NumPy, and every control with a case in which it fires.

The encoder of the controls is a stub that reads where a view lies from its pixels, of pictures drawn for the test: red shows x, green y.
So what a control must say follows from how the pictures are made, without any training.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.laws import Center, Disjoint, Independent, Paired
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, ViewGeometry, Views
from wherefrom.tools.console import columns
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.evaluation import pair_controls
from wherefrom.train.evaluation.labels import (
    KNN_PROTOCOL,
    PROBE_PROTOCOL,
    PROTOCOLS,
    RIDGE,
    LabelReport,
    LabelScore,
    draw_ids,
    evaluate_labels,
    nearest_neighbors,
    ridge_probe,
    ridge_weights,
)
from wherefrom.train.evaluation.pair_controls import (
    NoPairsError,
    control_heads,
    one_view_oracle,
    r2_with_interval,
    structure_gates,
    train_heads,
)
from wherefrom.train.evaluation.pairs import PairReport, evaluate_pairs, pair_r2
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.report import check_held_out, evaluate_run, pictures_in_both
from wherefrom.train.objective import Encode, Objective, Progress, Step, Terms, random_scope
from wherefrom.train.objectives.pair_heads import AdditiveHead
from wherefrom.train.objectives.pairs import is_pair_objective, ordered_pairs
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings
from wherefrom.train.settings import EvaluationSettings

SIDE_PX, VIEW_PX = 200, 32
DISJOINT = SpatialSettings(
    law=Disjoint(area_frac=(0.04, 0.12), aspect=(0.8, 1.25)), views=4, size_px=VIEW_PX, mirror="none", color=None, scale="log_sides"
)


class PlaceColors:
    """Pictures whose color tells the place, computed from the record: red = x, green = y, shifted by a picture's own `offset`."""

    def __init__(self, number: int, *, offset: float = 0.0, sharpness: bool = False, leak: bool = False, blind: bool = False) -> None:
        self.number, self.offset, self.sharpness, self.leak, self.blind = number, offset, sharpness, leak, blind

    def __len__(self) -> int:
        return self.number

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        (family,) = recipe.families
        size = np.full((len(sample), 2), SIDE_PX, np.int32)
        keys = sample if drawn_for is None else drawn_for
        (record,) = draw_records(recipe, seed=0, epoch=epoch, drawn_for=keys, source_size=size, sample=sample)
        geometry, (height, width) = record.geometry, family.size_px
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        places = map_points(geometry.view_to_source, torch.stack([x, y], -1).flatten(0, 1)).float() / SIDE_PX
        red, green = (place.reshape(len(sample), family.views, height, width) for place in places.unbind(-1))
        shift = torch.tensor(np.random.default_rng(3).uniform(-1, 1, (self.number, 2))[sample], dtype=torch.float32)[..., None, None, None]
        pixels = torch.stack([red + self.offset * shift[:, 0], green + self.offset * shift[:, 1], torch.zeros_like(red)], 2)
        if self.blind:
            pixels = torch.zeros_like(pixels)
        if self.sharpness:
            # the finest detail of the finished view, as strong as the box is wide
            stripes = torch.where(torch.arange(width) % 2 == 0, 0.5, -0.5)
            extent = (geometry.boxes[..., 2] - geometry.boxes[..., 0]) / SIDE_PX
            pixels[:, :, 2] = extent[..., None, None] * stripes
        sizes = torch.from_numpy(size)
        ids = torch.from_numpy(sample)
        views = Views(pixels=pixels, geometry=geometry, valid=record.valid, photometric=Photometric.unchanged(len(ids), family.views))
        return Batch(sample=ids, drawn_for=torch.from_numpy(keys), label=ids % 3, source_size=sizes, views=(views,))

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        batch = self.views(recipe, sample)
        views = batch.views[0]
        return batch if self.leak else replace(batch, views=(replace(views, pixels=torch.zeros_like(views.pixels)),))


class Reading(nn.Module):
    """An encoder without weights: center and sides of a view's box, read from its colors, or the width from its stripes."""

    width = 4

    def __init__(self, *, sharpness: bool = False) -> None:
        super().__init__()
        self.sharpness = sharpness

    def encode(self, views: Views) -> Features:
        x, y, stripes = views.pixels.unbind(2)
        wide = stripes.diff(dim=-1).abs().mean((-2, -1)) if self.sharpness else _extent(x.mean(-2))
        read = torch.stack([x.mean((-2, -1)), y.mean((-2, -1)), wide, _extent(y.mean(-1))], -1)
        return Features(summary=read, tokens=read[:, :, None, None])


def _extent(ramp: Tensor) -> Tensor:
    number = ramp.shape[-1]
    return (ramp[..., number // 2 :].mean(-1) - ramp[..., : number // 2].mean(-1)) * 2


class Comparing(nn.Module):
    """The formula of the targets, on what `Reading` read; one_view=True takes the target to lie in the picture's middle."""

    def __init__(self, objective: SpatialPrediction, *, one_view: bool = False) -> None:
        super().__init__()
        self.objective, self.one_view = (objective,), one_view

    def forward(self, features: Features, pairs: Tensor, **_: object) -> tuple[Tensor, dict[str, Tensor]]:
        reference, target = (features.summary[:, side] for side in pairs.unbind(-1))
        if self.one_view:
            target = torch.tensor([0.5, 0.5, 0.25, 0.25]).expand_as(target)
        small = 0.15  # no box is narrower
        position = (target[..., :2] - reference[..., :2]) / reference[..., 2:].clamp(min=small)
        scale = (target[..., 2:].clamp(min=small) / reference[..., 2:].clamp(min=small)).log()
        (objective,) = self.objective
        return (torch.cat([position, scale], -1) - objective.target_mean) / objective.target_std, {}


def objective_with(head: Callable[[SpatialPrediction], nn.Module] = Comparing, settings: SpatialSettings = DISJOINT) -> SpatialPrediction:
    objective = SpatialPrediction(settings)
    objective.setup(Reading())  # type: ignore[arg-type]
    objective.head = head(objective)  # type: ignore[assignment]
    return objective


def report(
    held_out: PlaceColors, *, encoder: Reading | None = None, head: Callable[[SpatialPrediction], nn.Module] = Comparing, **options: Any
) -> PairReport:
    settings: dict[str, Any] = {"pictures": 150, "train_pictures": 100, "head_steps": 5, "equalize_px": 8} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_controls, "ORACLE_PAIRS", 2000)  # it has a test of its own
        return evaluate_pairs(encoder or Reading(), objective_with(head), PlaceColors(100), held_out, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def honest() -> PairReport:
    """Pictures that each have an offset of their own: only a comparison of two views tells anything."""
    return report(PlaceColors(150, offset=3.0))


@pytest.fixture(scope="module")
def absolute() -> PairReport:
    """Pictures in which every place has its color: each view tells where it lies by itself."""
    return report(PlaceColors(150))


def test_a_reader_of_places_reaches_r2_of_1_and_beats_the_constant(honest: PairReport) -> None:
    assert min(honest.row("held-out pairs").r2) > 0.99
    assert honest.loss < 0.01 * honest.constant_loss
    assert honest.position_distance < 0.1 * honest.constant_position_distance
    assert honest.law == "disjoint"
    assert (honest.pictures, honest.pairs + honest.left_out) == (150, 150 * 12)
    blind = report(PlaceColors(150, blind=True))
    assert max(blind.row("held-out pairs").r2) < 0.01
    assert blind.loss > 0.95 * blind.constant_loss


def test_targets_of_another_picture_destroy_what_was_predicted(honest: PairReport) -> None:
    assert max(honest.row("targets of the next picture").r2) < 0


def test_pairs_across_pictures_tell_absolute_places_from_comparison(honest: PairReport, absolute: PairReport) -> None:
    assert min(absolute.row("pairs across pictures").r2[:2]) > 0.99
    assert max(honest.row("pairs across pictures").r2[:2]) < 0


def test_one_view_is_not_enough_for_a_head_that_ignores_the_other() -> None:
    ignoring = report(PlaceColors(150), head=lambda objective: Comparing(objective, one_view=True))
    held_out, across = ignoring.row("held-out pairs"), ignoring.row("pairs across pictures")
    assert 0.2 < min(held_out.r2[:2]) <= max(held_out.r2[:2]) < 0.8
    assert held_out.r2 == across.r2


def test_equalized_sharpness_unmasks_a_reader_of_sharpness(honest: PairReport) -> None:
    name = "sharpness equalized at 8 px"
    assert min(honest.row(name).r2) > 0.97
    sharp = report(PlaceColors(150, sharpness=True), encoder=Reading(sharpness=True))
    assert sharp.row("held-out pairs").r2[2] > 0.99
    assert sharp.row(name).r2[0] < 0.5


def test_content_free_pictures_give_nothing_unless_the_pipeline_leaks(honest: PairReport) -> None:
    assert max(honest.row("content-free pictures").r2) < 0.02
    leaking = report(PlaceColors(150, leak=True))
    assert min(leaking.row("content-free pictures").r2[:2]) > 0.2


def test_gates_are_0_for_the_formula_and_not_for_a_head_that_looks_at_one_view(honest: PairReport) -> None:
    assert set(honest.gates) == {"identity_position", "identity_scale", "symmetry", "composition"}
    assert max(honest.gates.values()) < 0.02
    objective = objective_with(lambda objective: Comparing(objective, one_view=True))
    features = Reading().encode(PlaceColors(20).views(ViewRecipe(families=objective.families), np.arange(20)).views[0])
    assert min(structure_gates(objective, features).values()) > 0.1


@pytest.mark.parametrize("position", ["reference", "picture", "mean"])
def test_gates_follow_the_unit_of_position(position: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(DISJOINT, position=position)
    objective = objective_with(settings=settings)
    record = PlaceColors(20).views(ViewRecipe(families=objective.families), np.arange(20)).views[0].geometry
    each = torch.arange(4)
    right = objective.targets(record, torch.cartesian_prod(each, each))
    monkeypatch.setattr(objective, "predict", lambda *_: (right, {}))
    features = Features(summary=torch.zeros(20, 4, 4), tokens=torch.zeros(20, 4, 1, 1, 4))
    assert max(structure_gates(objective, features).values()) < 1e-5


def test_control_heads_reach_what_their_view_of_the_pair_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(600, 4, 4, generator=generator)
    features = Features(summary=code, tokens=code[:, :, None, None])
    pairs = ordered_pairs(4)
    reference, target = (code[:, side] for side in pairs.unbind(-1))
    worlds = {
        "reference-only head": reference[..., :2].tanh(),
        "target-only head": target[..., :2].tanh(),
        "additive head f(r) + g(t)": reference[..., :2].tanh() - target[..., 1:3].tanh(),
        "fresh full head": torch.stack([reference[..., 0] * target[..., 0], reference[..., 1] * target[..., 1]], -1),
    }
    is_train = (torch.arange(600) < 500).unsqueeze(1).expand(600, 12)
    r2 = {}
    for world, targets in worlds.items():
        targets = torch.cat([targets, targets], -1)
        heads = control_heads(objective_with(settings=replace(DISJOINT, hidden=256)), features, seed=0)
        train_heads(list(heads.values()), features, targets, is_train, pairs, steps=200)
        with torch.no_grad():
            r2[world] = {name: min(r2_with_interval(head(features, pairs)[0], targets, ~is_train).value) for name, head in heads.items()}
    alone, other, added, full = worlds
    assert r2[alone][alone] > 0.9 > 0.1 > r2[alone][other]
    assert r2[other][other] > 0.9 > 0.1 > r2[other][alone]
    assert r2[added][added] > 0.8 > 0.6 > max(r2[added][alone], r2[added][other])
    assert max(r2[full][name] for name in (alone, other, added)) < 0.05
    assert r2[full][full] > 0.3


def test_r2_is_one_minus_error_over_variance_of_the_pairs_that_count() -> None:
    rng = np.random.default_rng(0)
    targets, predicted = rng.normal(2, 1, (20, 6, 3)), rng.normal(2, 1, (20, 6, 3))
    mask = rng.random((20, 6)) < 0.7
    r2 = r2_with_interval(*(torch.from_numpy(array) for array in (predicted, targets, mask)))
    for channel in range(3):
        prediction, target = predicted[..., channel][mask], targets[..., channel][mask]
        assert r2.value[channel] == pytest.approx(1 - ((prediction - target) ** 2).mean() / target.var(), abs=1e-12)
        assert r2.low[channel] < r2.value[channel] < r2.high[channel]


def test_the_interval_is_as_wide_as_fresh_pictures_make_it_spread() -> None:
    rng = np.random.default_rng(1)

    def draw() -> tuple[Tensor, Tensor]:
        targets = rng.normal(size=(150, 10, 1))
        error = rng.normal(size=(150, 1, 1)) + 0.1 * rng.normal(size=(150, 10, 1))  # nearly one error a picture
        return torch.from_numpy(targets + 0.5 * error), torch.from_numpy(targets)

    everything = torch.ones(150, 10, dtype=torch.bool)
    intervals = [r2_with_interval(*draw(), everything) for _ in range(60)]
    expected_width = 2 * 1.96 * float(np.std([each.value[0] for each in intervals]))
    width = float(np.mean([each.high[0] - each.low[0] for each in intervals]))
    assert 0.75 < width / expected_width < 1.35
    as_if_pairs_were_pictures = r2_with_interval(*(part.flatten(0, 1).unsqueeze(1) for part in draw()), everything.flatten().unsqueeze(1))
    assert as_if_pairs_were_pictures.high[0] - as_if_pairs_were_pictures.low[0] < 0.6 * expected_width


@pytest.mark.parametrize(
    ("settings", "reference", "target"),
    [
        (SpatialSettings(law=Paired(side_frac=(0.10, 0.33))), (0.24, 0.24, 0.0), (0.19, 0.19, 0.56)),
        (SpatialSettings(law=Independent(area_frac=(0.05, 0.25)), views=2), (0.53, 0.53, None), (0.44, 0.44, None)),
    ],
    ids=["paired", "independent"],
)
def test_the_oracle_of_one_view_gives_the_known_ceilings(
    settings: SpatialSettings, reference: tuple[float | None, ...], target: tuple[float | None, ...]
) -> None:
    """The numbers are those of 400,000 draws of a sampler written apart from ours."""
    objective = SpatialPrediction(settings)
    ceilings = one_view_oracle(objective)
    for name, values in (("reference", reference), ("target", target)):
        for value, expected in zip(ceilings[name], values, strict=True):
            assert expected is None or value == pytest.approx(expected, abs=0.03)


def test_neighbors_vote_as_brute_force_says() -> None:
    rng = np.random.default_rng(2)
    train, held_out = rng.normal(size=(60, 5)), rng.normal(size=(1500, 5))
    labels = rng.integers(0, 4, 60)
    predicted = nearest_neighbors(*(torch.from_numpy(array) for array in (train, labels, held_out)), classes=4, k=7, temperature=0.1)
    cosine = (held_out / np.linalg.norm(held_out, axis=1, keepdims=True)) @ (train / np.linalg.norm(train, axis=1, keepdims=True)).T
    for row, label in zip(cosine, predicted.tolist(), strict=True):
        nearest = np.argsort(-row)[:7]
        votes = np.bincount(labels[nearest], np.exp(row[nearest] / 0.1), 4)
        assert label == votes.argmax()
    unweighted = [np.bincount(labels[np.argsort(-row)[:7]], minlength=4).argmax() for row in cosine]
    assert unweighted != predicted.tolist()


@pytest.mark.core
def test_ridge_solves_its_normal_equations() -> None:
    rng = np.random.default_rng(4)
    features, targets = rng.normal(1, 2, (50, 6)), rng.normal(size=(50, 3))
    for penalty, weights in zip((0.0, 0.3), ridge_weights(torch.from_numpy(features), torch.from_numpy(targets), (0.0, 0.3)), strict=True):
        design = np.hstack([features, np.ones((50, 1))])
        shrunk = np.diag([penalty * 50] * 6 + [0])
        np.testing.assert_allclose(weights.numpy(), np.linalg.solve(design.T @ design + shrunk, design.T @ targets), atol=1e-10)


@pytest.mark.core
def test_the_probe_learns_what_is_linear_and_not_what_is_noise() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 400)
    informative = np.eye(3)[labels] + 0.3 * rng.normal(size=(400, 3))
    features = torch.from_numpy(np.hstack([informative, rng.normal(size=(400, 30))]))
    predicted = ridge_probe(features[:300], torch.from_numpy(labels[:300]), features[300:], classes=3)
    assert (predicted.numpy() == labels[300:]).mean() > 0.85
    predicted = ridge_probe(features[:300, 3:], torch.from_numpy(labels[:300]), features[300:, 3:], classes=3)
    assert (predicted.numpy() == labels[300:]).mean() < 0.5


def test_the_probe_finds_its_penalty_where_classes_come_in_turn() -> None:
    rng = np.random.default_rng(8)
    labels = np.arange(300) % 5
    features = torch.from_numpy(np.eye(5)[labels] @ rng.normal(size=(5, 200)) + 4 * rng.normal(size=(300, 200)))
    predicted = ridge_probe(features[:200], torch.from_numpy(labels[:200]), features[200:], classes=5)
    assert (predicted.numpy() == labels[200:]).mean() > 0.85
    smallest = ridge_weights(features[:200], torch.eye(5, dtype=torch.float64)[labels[:200]], RIDGE[:1])[0]
    assert ((features[200:] @ smallest[:-1] + smallest[-1]).argmax(-1).numpy() == labels[200:]).mean() < 0.6


MODEL = ModelSettings(view_size_px=16, patch_size_px=8, width=16, depth=1, heads=1)


@pytest.fixture
def shards(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> Callable[..., ShardIndex]:
    """Two kinds of pictures: bright above, or bright below; labels come in turn, by default one that says which."""

    def make(*, labels: Sequence[int] | None = (0, 1), number: int = 24) -> ShardIndex:
        rng = np.random.default_rng(6)
        samples = []
        for i in range(number):
            picture = rng.integers(0, 90, (64 + i, 80, 3))
            picture[: len(picture) // 2] += 120
            picture = (picture if i % 2 == 0 else picture[::-1]).astype(np.uint8)
            members = {"jpg": jpeg_bytes(picture)} | ({"cls": str(labels[i % len(labels)]).encode()} if labels else {})
            samples.append((f"{i:04d}", members))
        return ShardIndex.open(str(make_shard(tmp_path / f"{labels}.tar", samples)))

    return make


@pytest.mark.core
def test_labels_are_evaluated_beside_pixels_and_chance(shards: Callable[..., ShardIndex]) -> None:
    with random_scope(1, "encoder"):
        encoder = Encoder(MODEL)
    progress_calls = []
    with ShardPictures(shards(), renderer="torch", threads=1) as pictures:
        result = evaluate_labels(
            encoder, pictures, pictures, view_px=16, limit=18, progress=lambda *progress: progress_calls.append(progress)
        )
    assert result is not None
    assert (result.train, result.held_out, result.classes) == (18, 24, 2)
    assert result.accuracy(PROBE_PROTOCOL, "raw pixels") == 1
    assert {(score.protocol, score.features) for score in result.scores} == {
        (protocol, features) for protocol in (KNN_PROTOCOL, PROBE_PROTOCOL) for features in ("encoder", "random encoder", "raw pixels")
    }
    assert (result.missing, result.ceiling) == (0, 1)
    assert result.tables()[1][0][1:] == ("encoder", "random encoder", "raw pixels")
    assert not any("without a training picture" in row[0] for row in result.tables()[2])
    assert progress_calls[-1] == ("features for labels: train", 18, 18)
    assert encoder.training


@pytest.mark.core
@pytest.mark.parametrize("model", [MODEL, ModelSettings(name="resnet10t")], ids=["ViT", "ResNet"])
def test_whole_pictures_are_judged_by_class_token_and_mean_token_beside_the_old_figures(
    model: ModelSettings, shards: Callable[..., ShardIndex]
) -> None:
    with random_scope(1, "encoder"):
        encoder = Encoder(model)
    with ShardPictures(shards(labels=(0, 1, 2)), renderer="torch", threads=1) as pictures:
        before = evaluate_labels(encoder, pictures, pictures, view_px=32, limit=18)
        result = evaluate_labels(encoder, pictures, pictures, view_px=32, picture_px=48, limit=18)
        center = ViewFamily(name="c", views=1, size_px=(48, 48), law=Center(resize_px=256, crop_px=224))
        train, held_out = (pictures.views(ViewRecipe(families=(center,)), draw_ids(pictures, number)) for number in (18, None))
    assert before is not None and result is not None
    assert result.scores[: len(before.scores)] == before.scores
    parts = ("class-token", "mean-token") if model is MODEL else ("mean-token",)
    protocols = [f"{reader}-center0.875-{part}@1" for part in parts for reader in ("knn20-cosine-t0.07", "ridge")]
    added = [(score.protocol, score.features) for score in result.scores[len(before.scores) :]]
    assert added == [(protocol, name) for protocol in protocols for name in ("encoder", "random encoder")]
    assert [row[-1] for row in result.tables()[1][3:]] == ["-"] * len(protocols)  # no raw pixels
    with torch.no_grad():
        tokens = [encoder.eval().model.forward_features(batch.views[0].pixels[:, 0]) for batch in (train, held_out)]
    means = [each[:, 1:].mean(1) if model is MODEL else each.mean((2, 3)) for each in tokens]
    told = nearest_neighbors(means[0], train.label, means[1], classes=3)
    assert result.accuracy(protocols[-2]) == float((told == held_out.label).double().mean())
    if model is MODEL:
        told = ridge_probe(tokens[0][:, 0], train.label, tokens[1][:, 0], classes=3)
        assert result.accuracy(protocols[1]) == float((told == held_out.label).double().mean())


@pytest.mark.parametrize("classes", [2, 10, 16, 100])
@pytest.mark.parametrize("in_turn", [True, False], ids=["in turn", "sorted"])
def test_a_part_of_the_pictures_shows_every_class_however_labels_lie(classes: int, in_turn: bool) -> None:
    for total, number in ((3000, 500), (1024, 512), (500, 250)):
        labels = np.arange(total) % classes if in_turn else np.arange(total) * classes // total

        def unevenness(ids: NDArray[np.int64], labels: NDArray[np.int64] = labels) -> float:
            """How far the classes' counts are from even, against what drawing pictures by lot gives: 1 on average."""
            counts, even = np.bincount(labels[ids], minlength=classes), len(ids) / classes
            return float(((counts - even) ** 2).sum() / (even * (classes - 1) * (1 - len(ids) / len(labels))))

        # sums of about `classes` squares: 1 in 10,000 lots exceeds 1 + 4 deviations of the broadest, that of 2 classes
        assert unevenness(draw_ids(PlaceColors(total), number)) < 1 + 4 * (2 / (classes - 1)) ** 0.5 + 10 / classes
        if in_turn and classes == 10:
            assert unevenness(np.arange(number) * total // number) > 9  # control: a stride


def test_evaluations_look_at_the_same_pictures_whatever_the_run() -> None:
    everything = draw_ids(PlaceColors(1000), None)
    assert sorted(everything) == list(range(1000))
    for number in (0, 1, 200, 1000, 5000):
        assert draw_ids(PlaceColors(1000), number).tolist() == everything[:number].tolist()
    # not those that a run of some seed learns from first
    first_of_a_run = Order(samples=1000, global_batch=1, seed=0).ids(0, np.arange(200))
    assert len(set(first_of_a_run) & set(everything[:200].tolist())) < 80


def test_classes_are_counted_and_those_that_cannot_be_told_are_named(shards: Callable[..., ShardIndex]) -> None:
    with ShardPictures(shards(labels=(3, 5)), renderer="torch", threads=1) as pictures:
        result = evaluate_labels(Encoder(MODEL), pictures, pictures, view_px=16)
    assert result is not None
    assert (result.classes, result.missing, result.ceiling) == (2, 0, 1)
    assert result.accuracy(PROBE_PROTOCOL, "raw pixels") == 1

    options = {"renderer": "torch", "threads": 1}
    with ShardPictures(shards(labels=(700, 5)), **options) as train, ShardPictures(shards(labels=(5, 3, 9)), **options) as held_out:
        result = evaluate_labels(Encoder(MODEL), train, held_out, view_px=16)
    assert result is not None
    assert (result.classes, result.missing, result.ceiling) == (4, 2, pytest.approx(1 / 3))
    assert max(score.accuracy for score in result.scores) <= result.ceiling
    assert ("classes without a training picture here: 2; at most 0.333 can be right",) in result.tables()[2]


def test_a_labels_number_changes_no_accuracy(shards: Callable[..., ShardIndex]) -> None:
    scores = []
    with random_scope(2, "encoder"):
        encoder = Encoder(MODEL)
    for labels in ((0, 1, 2), (9, 4, 70)):
        with ShardPictures(shards(labels=labels), renderer="torch", threads=1) as pictures:
            result = evaluate_labels(encoder, pictures, pictures, view_px=16, limit=12)
            assert result is not None
            scores.append([score.accuracy for score in result.scores if score.protocol == KNN_PROTOCOL])
    assert scores[0] == scores[1]


@pytest.mark.core
def test_tables_fit_80_columns_in_plain_words(honest: PairReport) -> None:
    assert len(honest.channels) == 4  # as many as there can be
    row = replace(honest.rows[0], r2=(-123.4, -0.8584, float("nan"), 0.99), low=(-1234.5,) * 4, high=(0.5,) * 4)
    rows = (row, *(replace(other, r2=row.r2) for other in honest.rows[1:]))
    worst = replace(honest, pictures=50000, pairs=27600000, left_out=1200000, loss=12345.678, rows=rows)
    scores = [LabelScore(protocol=protocol, features=name, accuracy=0.5) for protocol in PROTOCOLS for name in NAMES]
    labels = LabelReport(train=1281167, held_out=50000, classes=1000, missing=999, ceiling=0.1, scores=tuple(scores))
    lines = [text for table in (*worst.tables(), *labels.tables()) for text in columns(table).splitlines()]
    assert max(map(len, lines)) <= 80
    assert "targets of the next picture   -123  -0.858    nan   0.990  at most 0" in lines
    assert f"{'k-NN':<25}    0.500           0.500       0.500" in lines
    text = " ".join(lines)
    assert not any(word in text for word in ("honest", "gate", "<="))
    assert {other.expected for other in honest.rows} == EXPLAINED


@pytest.mark.core
def test_tables_explain_what_they_expect_and_name_contradictions_in_words(honest: PairReport) -> None:
    rows = [row for table in honest.tables() for row in table]
    sentences = " ".join(row[0] for row in rows if len(row) == 1).lower()
    names = {row[0] for row in rows if len(row) > 1}
    compared = {"lower than fresh", "as held-out pairs", "ceiling of 1 view"}  # with another row, or by the row's own name
    assert {expected for expected in EXPLAINED if expected not in sentences} == compared
    assert {"fresh full head", "held-out pairs"} <= names
    assert len(honest.gates) == 4
    assert not names & set(honest.gates)


NAMES = ("encoder", "random encoder", "raw pixels")
EXPLAINED = {"1 is perfect", "at most 0", "lower", "lower than fresh", "as held-out pairs", "ceiling of 1 view"}


def test_pictures_that_are_too_small_for_any_pair_are_no_r2(shards: Callable[..., ShardIndex]) -> None:
    encoder, objective = Encoder(MODEL), SpatialPrediction(replace(DISJOINT, size_px=16, min_side_px=60))
    objective.setup(encoder)
    with ShardPictures(shards(number=4), renderer="torch", threads=1) as pictures, pytest.raises(NoPairsError, match="4 pictures, 0 pairs"):
        pair_r2(encoder, objective, pictures, pictures=4)


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link", "copy"])
def test_held_out_shards_that_are_learned_from_are_refused_by_name(
    how: str, tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    picture = jpeg_bytes(np.zeros((20, 20, 3), np.uint8))
    shards = [make_shard(tmp_path / f"{number}.tar", [(f"{number}", {"jpg": picture, "cls": b"0"})]) for number in range(3)]
    empty = [make_shard(tmp_path / f"{name}.tar", []) for name in ("empty", "empty too")]
    assert len({path.stat().st_size for path in shards}) == 1
    train = ShardIndex.open([*shards[:2], empty[0]])
    check_held_out(train, ShardIndex.open([shards[2], empty[1]]))
    again = {"itself": shards[1]}.get(how, tmp_path / "again.tar")
    make: dict[str, Callable[[Path, Path], object]] = {"symbolic link": os.symlink, "hard link": os.link, "copy": shutil.copyfile}
    make.get(how, lambda *_: None)(shards[1], again)
    with pytest.raises(ValueError, match=r"val: \S+\.tar (is a training shard too|holds the same bytes as the training shard )") as refused:
        check_held_out(train, ShardIndex.open([shards[2], again]))
    assert str(again) in str(refused.value)
    assert str(shards[1]) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.core
def test_held_out_pictures_that_are_learned_from_are_counted_by_their_bytes(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    rng = np.random.default_rng(1)
    pictures = [jpeg_bytes(rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)) for _ in range(9)]
    almost = pictures[8][:-3] + bytes([pictures[8][-3] ^ 1]) + pictures[8][-2:]  # as long, as large, another
    named = {"train": [*pictures[:4], pictures[8]], "val": [pictures[2], *pictures[4:8], pictures[0], almost]}
    train, held_out = (
        ShardIndex.open(str(make_shard(tmp_path / f"{name}.tar", [(f"{name}{i}", {"jpg": data}) for i, data in enumerate(of_name)])))
        for name, of_name in named.items()
    )
    assert pictures_in_both(train, held_out) == 2
    assert pictures_in_both(held_out, train) == 2
    assert pictures_in_both(train, held_out, rows=(np.array([4, 2]), np.array([5, 3, 0]))) == 1  # of these the third of train alone
    assert pictures_in_both(train, train, rows=(np.array([0, 1]), np.array([1, 2]))) == 1


class OffsetsOfSomebodyElse(Objective):
    """An objective on pairs that shares nothing with ours: how far apart two views lie, and how much larger one is."""

    name = "offsets"
    families = (replace(DISJOINT, min_side_px=8).family("offsets"),)
    channels = ("x", "y", "scale")
    settings = SimpleNamespace(law_name="their own", position="picture", scale="log_area", hidden=None)

    def setup(self, encoder: Encoder) -> None:
        self.head = self.new_head(encoder.width)
        self.register_buffer("pairs", ordered_pairs(4))
        self.register_buffer("target_mean", torch.zeros(3))
        self.register_buffer("target_std", torch.tensor([30.0, 30.0, 1.0]))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        return Terms(losses={"position": self.predict(encode(batch.family(self.name)))[0].square().mean()})

    def new_head(self, width: int) -> nn.Module:
        return AdditiveHead(width, 8, 3)

    def evaluation_family(self) -> ViewFamily:
        return self.families[0]

    def boxes(self, record: ViewGeometry) -> Tensor:
        return record.boxes

    def pair_mask(self, record: ViewGeometry, valid: Tensor) -> Tensor:
        return valid[:, self.pairs.cpu()].all(-1)

    def targets(self, record: ViewGeometry, pairs: Tensor | None = None, *, standardized: bool = True) -> Tensor:
        reference, target = (record.boxes[:, side] for side in (self.pairs if pairs is None else pairs).unbind(-1))
        areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True) for boxes in (reference, target)]
        targets = torch.cat([(target - reference)[..., :2], (areas[1] / areas[0]).log() / 2], -1)
        return targets / self.target_std if standardized else targets

    def features(self, views: Views, encode: Encode) -> Features:
        return encode(views)

    def predict(self, features: Features, pairs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.head(features, self.pairs if pairs is None else pairs)


@pytest.mark.core
def test_an_objective_on_pairs_of_somebody_else_is_evaluated_with_every_control(shards: Callable[..., ShardIndex]) -> None:
    settings = EvaluationSettings(pictures=10, head_pictures=10, head_steps=2, knn_pictures=0, short_pictures=8, short_knn_pictures=0)
    objective, host = OffsetsOfSomebodyElse(), SpatialPrediction(replace(DISJOINT, min_side_px=8))
    assert not is_pair_objective(objective)  # its buffers are not there yet
    step = Step(Encoder(replace(MODEL, view_size_px=VIEW_PX)), [host, objective], seed=0)
    assert is_pair_objective(objective)
    assert not is_pair_objective(Objective())
    with ShardPictures(shards(), renderer="torch", threads=1) as pictures, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_controls, "ORACLE_PAIRS", 2000)
        start = Progress(update=0, updates=1, updates_per_epoch=1)
        short, full = (evaluate_run(step, pictures, pictures, settings, view_px=16, at=start, full=full) for full in (False, True))
    assert [name for name in short.curves if name.startswith("offsets/")] == ["offsets/r2_x", "offsets/r2_y", "offsets/r2_scale"]
    ours, theirs = full.report["spatial"], full.report["offsets"]
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert theirs["law"] == "their own"
    assert [row["name"] for row in theirs["rows"]] == [row["name"] for row in ours["rows"]]
    assert theirs["constant_loss"] > 0


def test_without_labels_there_is_no_score(shards: Callable[..., ShardIndex]) -> None:
    with ShardPictures(shards(labels=None, number=4), renderer="torch", threads=1) as pictures:
        assert evaluate_labels(Encoder(MODEL), pictures, pictures, view_px=16) is None


@pytest.mark.core
def test_pairs_of_real_shards_are_evaluated_from_end_to_end(shards: Callable[..., ShardIndex]) -> None:
    encoder, objective = Encoder(MODEL), SpatialPrediction(replace(DISJOINT, size_px=16, min_side_px=8, mirror="picture"))
    objective.setup(encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with ShardPictures(shards(), renderer="torch", threads=1) as pictures:
        full = evaluate_pairs(encoder, objective, pictures, pictures, pictures=20, train_pictures=20, head_steps=3, equalize_px=8)
        short = pair_r2(encoder, objective, pictures, pictures=20)
    assert short.r2 == full.row("held-out pairs").r2
    names = [row.name for row in full.rows]
    assert len(set(names)) == len(names) == 11
    assert full.as_dict()["rows"][0]["name"] == "held-out pairs"
    explained = full.tables()[1]
    assert {len(row) for row in explained} == {2 + len(full.channels)}
    assert [row[0] for row in explained if not row[0].startswith("  95 %")] == ["R2", *names]
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_pairs_are_evaluated_where_no_picture_beside_one_that_counts_does_so(shards: Callable[..., ShardIndex]) -> None:
    encoder, objective = Encoder(MODEL), SpatialPrediction(replace(DISJOINT, size_px=16, min_side_px=8))
    objective.setup(encoder)
    every = objective.pair_mask
    objective.pair_mask = lambda record, valid: every(record, valid) & (torch.arange(len(valid)) % 2 == 0)[:, None]  # type: ignore[method-assign]
    with ShardPictures(shards(), renderer="torch", threads=1) as pictures, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_controls, "ORACLE_PAIRS", 2000)
        report = evaluate_pairs(encoder, objective, pictures, pictures, pictures=20, train_pictures=20, head_steps=1)
    names = [row.name for row in report.rows]
    assert names[0] == "held-out pairs" and "targets of the next picture" not in names


@pytest.mark.core
def test_views_of_one_color_have_the_records_of_the_real_ones_and_one_color_each(shards: Callable[..., ShardIndex]) -> None:
    recipe = ViewRecipe(families=(DISJOINT.family("spatial"),))
    with ShardPictures(shards(), renderer="torch", threads=1) as pictures:
        real, one_color = pictures.views(recipe, np.arange(6)), pictures.one_color_views(recipe, np.arange(6))
    assert torch.equal(real.views[0].geometry.boxes, one_color.views[0].geometry.boxes)
    std = [float(batch.views[0].pixels.std((1, 3, 4)).max()) for batch in (one_color, real)]
    assert std[0] < 0.02 < 0.3 < std[1]
    assert len(one_color.views[0].pixels.mean((1, 3, 4)).unique(dim=0)) == 6
