"""Rotation, context prediction, jigsaw: against records, brute force on tiles that say where they lie, and what their papers state.

Tiles here are of one color, the place in the picture of their middle; a head that is told the task by hand, and nothing else, must then be
right about every one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_runs import METHODS, RESNET, host_of, method_run, updates_of
from torch import Tensor, nn

from wherefrom.pipeline import Batch, ColorLaw, Tiles, ViewRecipe, Views, draw_records, map_points, view_to_source
from wherefrom.train import (
    OBJECTIVES,
    ContextSettings,
    Encoder,
    Features,
    JigsawSettings,
    ModelSettings,
    Objective,
    Progress,
    RotationSettings,
    Step,
    TileGuards,
    recipe,
)
from wherefrom.train.objectives.context import NEIGHBORS
from wherefrom.train.objectives.jigsaw import LISTED, far_apart_permutations, listed_permutations
from wherefrom.train.objectives.rotation import quarter_turned
from wherefrom.train.objectives.tiles import placed_summaries

NOW = Progress(update=0, updates=2, updates_per_epoch=1)
CLASSICS = ("rotation", "context", "jigsaw", "colorization")


def batch_of(objective: Objective, pictures: int, *, size: tuple[int, int] = (96, 120), small: int = 0, seed: int = 0) -> Batch:
    """Return views that say by red and green where their middle lies, x and y in the picture; the last `small` pictures are 8 px wide."""
    sizes = np.array([size] * (pictures - small) + [(8, 8)] * small, np.int32)
    ids = np.arange(pictures)
    (record,) = draw_records(ViewRecipe(families=objective.families), seed=seed, epoch=0, drawn_for=ids, source_size=sizes)
    middle = (record.geometry.boxes[..., :2] + record.geometry.boxes[..., 2:]) / 2
    color = torch.cat([middle, torch.zeros_like(middle[..., :1])], -1)  # (B, V, 3)
    pixels = color[..., None, None].expand(*color.shape, *record.geometry.size_px)
    number = torch.arange(pictures)
    return Batch(
        sample=number, drawn_for=number, label=-torch.ones_like(number), source_size=torch.tensor(sizes), views=(Views.of(record, pixels),)
    )


def mean_colors(views: Views | Tensor, **_: Any) -> Features:
    """An encoder that tells the mean color of a view, and no more."""
    pixels = views if isinstance(views, Tensor) else views.pixels
    return Features(summary=pixels.mean((-2, -1)), tokens=pixels.movedim(2, -1))


class ByHand(nn.Module):
    """A layer that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features)


# Rotation


@pytest.mark.core
def test_quarter_turns_are_those_of_records_pixel_for_pixel() -> None:
    pixels = torch.rand(2, 3, 5, 5)
    turned = quarter_turned(pixels)
    centers = torch.cartesian_prod(torch.arange(5), torch.arange(5)).flip(-1) + 0.5  # (x, y), row by row
    for turns in range(4):
        box, number = torch.tensor([0.0, 0, 5, 5]), torch.tensor(turns)
        x, y = map_points(view_to_source(box, torch.tensor(False), number, (5, 5)), centers).floor().long().unbind(-1)
        assert torch.equal(turned[:, turns].flatten(-2), pixels[..., y, x])
        assert turns == 0 or not torch.equal(turned[:, -turns].flatten(-2), pixels[..., y, x]) or turns == 2  # control: the other way


@pytest.mark.core
def test_rotation_asks_for_the_turn_of_all_four_turns_of_every_picture() -> None:
    """Of pictures that are bright at the top a head by hand tells every turn; one that has turns the other way round is right in half."""
    objective = RotationSettings(size_px=8).objective("rotation")
    pixels = torch.zeros(3, 1, 3, 8, 8)
    pixels[..., :2, :] = 1
    batch = batch_of(objective, 3)
    batch = replace(batch, views=(replace(batch.views[0], pixels=pixels),))

    def told(order: list[int]) -> Any:
        def encode(views: Views | Tensor, **_: Any) -> Features:
            assert isinstance(views, Tensor) and views.shape == (3, 4, 3, 8, 8)
            sides = torch.stack([views[..., 0, 0, 4], views[..., 0, 4, 0], views[..., 0, 7, 4], views[..., 0, 4, 7]], -1)  # from the top on
            return Features(summary=10 * sides[..., order], tokens=sides)

        objective.head = nn.Identity()
        return objective(batch, encode, NOW)

    right = told([0, 1, 2, 3])  # counter-clockwise: the top comes to the left
    assert right.meters["accuracy"] == 1 and right.losses["turn"] < 0.01
    assert told([0, 3, 2, 1]).meters["accuracy"] == 0.5


# Tiles


@pytest.mark.core
@pytest.mark.parametrize("kind", [ContextSettings, JigsawSettings])
def test_places_are_those_of_the_picture_as_it_is_shown_mirrored_or_not(kind: Any) -> None:
    objective = kind(size_px=16, mirror="picture", min_side_px=4).objective("tiles")
    batch = batch_of(objective, 40)
    record = batch.views[0].geometry
    flipped = record.flipped[:, 0]
    assert 5 < flipped.sum() < 35 and torch.equal(record.flipped, flipped[:, None].expand(-1, 9))
    x, y, _ = placed_summaries(batch.views[0], mean_colors, TileGuards(), "tiles").unflatten(1, (3, 3)).unbind(-1)
    assert (y.diff(dim=1) > 0).all()
    rightwards = x.diff(dim=2) > 0
    assert rightwards[~flipped].all() and not rightwards[flipped].any()


@pytest.mark.core
def test_the_color_of_all_tiles_of_a_picture_changes_alike() -> None:
    drawn = batch_of(JigsawSettings(size_px=16).objective("jigsaw"), 60).views[0].photometric.gray
    assert torch.equal(drawn, drawn[:, :1].expand(-1, 9)) and 0.5 < drawn.float().mean() < 0.8


# Context


def directions(flipped: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A head that compares two places, (B, 8, 6); where `flipped` (B,), rightwards is leftwards."""

    def function(pairs: Tensor) -> Tensor:
        step = (pairs[..., 3:5] - pairs[..., :2]).sign()
        if flipped is not None:
            step[..., 0] = torch.where(flipped[:, None], -step[..., 0], step[..., 0])
        apart = (pairs[..., 3:5] - pairs[..., :2]).abs() > 8  # two tiles of one column differ by their jitter alone
        col, row = (step * apart + 1).long().unbind(-1)
        place = torch.tensor([NEIGHBORS.index(n) if n in NEIGHBORS else 0 for n in range(9)])[3 * row + col]
        return 20 * nn.functional.one_hot(place, 8).float()

    return function


@pytest.mark.core
def test_context_asks_for_the_direction_of_every_neighbor_of_the_middle() -> None:
    tiles = Tiles(area_frac=(0.9, 1.0), tile_px=80)  # jitter of two pixels or so
    objective = ContextSettings(size_px=8, tiles=tiles, mirror="picture").objective("context")
    batch = batch_of(objective, 30)
    objective.head = ByHand(directions(batch.views[0].geometry.flipped[:, 0]))
    terms = objective(batch, mean_colors, NOW)
    assert terms.meters["accuracy"] == 1 and terms.losses["direction"] < 1e-3 and terms.meters["pictures_left_out"] == 0
    objective.head = ByHand(directions(None))  # control: mirrors are not seen
    assert 0.3 < objective(batch, mean_colors, NOW).meters["accuracy"] < 0.9


# Jigsaw


@pytest.mark.core
def test_the_first_listed_permutations_are_those_that_the_function_finds() -> None:
    listed = listed_permutations()
    assert listed.shape == (LISTED, 9) and (np.sort(listed) == np.arange(9)).all() and len(np.unique(listed, axis=0)) == LISTED
    np.testing.assert_array_equal(far_apart_permutations(400), listed[:400])
    assert (listed[0] == np.arange(9)).all()


@pytest.mark.slow
def test_all_listed_permutations_are_those_that_the_function_finds() -> None:
    np.testing.assert_array_equal(far_apart_permutations(LISTED), listed_permutations())


@pytest.mark.core
def test_each_listed_permutation_is_as_far_as_can_be_from_those_before_it() -> None:
    """By brute force over all 9!, of some; and against permutations at random, of which some two are nearly alike."""
    listed, every = listed_permutations(), np.array(list(itertools.permutations(range(9))), np.uint8)
    for number in (1, 8, 9, 30):
        before = (every[:, None] != listed[None, :number]).sum(-1)  # (9!, number)
        ours = (listed[number] != listed[:number]).sum(-1)
        assert ours.min() == before.min(1).max()
        assert ours.sum() == before.sum(1)[before.min(1) == ours.min()].max()
    for count, least in ((9, 9), (72, 7), (100, 6), (1000, 5), (2000, 4)):
        assert closest(listed[:count]) == least
    assert closest(every[np.random.default_rng(0).permutation(len(every))[:1000]]) == 2


def closest(permutations: Any) -> int:
    apart = (permutations[:, None] != permutations[None]).sum(-1, dtype=np.int32)
    return int(apart[~np.eye(len(permutations), dtype=bool)].min())


def orders(permutations: Tensor, flipped: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A head that sees of nine laid tiles, (B, 27), where each comes from; where `flipped` (B,), from the other side."""

    def function(laid: Tensor) -> Tensor:
        x, y, _ = laid.unflatten(1, (9, 3)).unbind(-1)
        row, col = (place.argsort(1).argsort(1) // 3 for place in (y, x))
        if flipped is not None:
            col = torch.where(flipped[:, None], 2 - col, col)
        return 20 * (permutations == (3 * row + col)[:, None]).all(-1).float()

    return function


@pytest.mark.core
def test_jigsaw_asks_for_the_permutation_in_which_tiles_are_laid() -> None:
    tiles = Tiles(area_frac=(0.9, 1.0), tile_px=80)
    objective = JigsawSettings(size_px=8, tiles=tiles, permutations=50).objective("jigsaw")
    batch = batch_of(objective, 40)
    objective.each = nn.Identity()
    objective.head = ByHand(orders(objective.permutations, batch.views[0].geometry.flipped[:, 0]))
    terms = objective(batch, mean_colors, NOW)
    assert terms.meters["accuracy"] == 1 and terms.losses["permutation"] < 1e-3
    objective.head = ByHand(orders(objective.permutations, None))  # control: mirrors are not seen
    assert objective(batch, mean_colors, NOW).meters["accuracy"] < 0.8


@pytest.mark.core
def test_which_permutation_is_a_function_of_record_and_name_and_uniform() -> None:
    objective = JigsawSettings(size_px=8, permutations=20).objective("jigsaw")
    record = batch_of(objective, 4000).views[0].geometry
    chosen = objective.chosen(record)
    assert torch.equal(objective.chosen(record[100:110]), chosen[100:110])
    counts = chosen.bincount(minlength=20).float()
    assert ((counts - 200).abs() < 5 * math.sqrt(200)).all()
    others = [objective.chosen(replace(record, epoch=1)), objective.chosen(replace(record, seed=1))]
    others.append(JigsawSettings(size_px=8, permutations=20).objective("other").chosen(record))
    assert all(0.02 < (other == chosen).float().mean() < 0.08 for other in others)


# Both


@pytest.mark.core
@pytest.mark.parametrize("name", ["context", "jigsaw"])
def test_pictures_too_small_for_their_tiles_do_not_count(name: str) -> None:
    settings = METHODS[name].settings
    step = Step(Encoder(METHODS[name].model), [settings.objective(name)], seed=0)
    learned = step.objectives[name]
    whole, part = batch_of(learned, 4), batch_of(learned, 6, small=2)
    assert not part.views[0].valid[4:].any() and part.views[0].valid[:4].all()
    step.eval()
    ours, theirs = step(part, NOW), step(whole, NOW)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert ours.meters[f"{name}/pictures_left_out"].item() == pytest.approx(1 / 3)
    assert step(batch_of(learned, 2, small=2), NOW).loss == 0


@pytest.mark.core
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JigsawSettings(permutations=2001), "permutations=2001: needs 2 to 2000, as many as jigsaw_permutations.txt lists"),
        (lambda: JigsawSettings(permutations=400000), "permutations=400000: 9 tiles have 362880; take at most 2000, as many as are listed"),
        (lambda: JigsawSettings(permutations=1), "permutations=1: needs 2 to 2000"),
        (lambda: JigsawSettings(tiles=Tiles(rows=2)), "tiles: rows=2, cols=3: jigsaw is of 3 x 3 tiles; leave both out"),
        (lambda: ContextSettings(tiles=Tiles(cols=4, tile_px=32)), "tiles: rows=3, cols=4: context is of 3 x 3 tiles; leave both out"),
        (lambda: ContextSettings(mirror="view"), "mirror='view': take one of none, picture"),
        (lambda: ContextSettings(hidden=0), "hidden=0"),
        (
            lambda: JigsawSettings(size_px=16, guards=TileGuards(resample_prob=0.3)),
            r"resample_px=\(10, 32\) of tiles of 16 px: none may",
        ),
        (lambda: ContextSettings(size_px=8, guards=TileGuards(channel_shift_px=8)), "channel_shift_px=8 of tiles of 8 px: needs less"),
        (lambda: TileGuards(channel_shift_px=-1), "channel_shift_px=-1: cannot be negative"),
        (lambda: TileGuards(resample_prob=1.5), r"resample_prob=1.5: a probability lies in \[0, 1\]"),
        (lambda: TileGuards(resample_px=(9, 3)), r"resample_px=\(9, 3\): needs 1 <= low <= high"),
        (lambda: RotationSettings(weight=-1.0), "weight=-1.0: cannot be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.core
def test_a_run_whose_pictures_are_all_too_small_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    from wherefrom.train import Reporter, run

    settings = method_run("jigsaw", tiny_shards)
    settings = settings.with_objectives(jigsaw=replace(METHODS["jigsaw"].settings, min_side_px=90))  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"^jigsaw: not a picture of the last 8 pictures counts, all are too small .*; lower jigsaw"):
        run(settings, reporter=Reporter(), out=tmp_path / "run")


# All four


@pytest.mark.core
@pytest.mark.parametrize("name", CLASSICS)
def test_a_frozen_encoder_is_probed_by_the_loss(name: str) -> None:
    """Without gradient for the encoder the head alone learns: such a run is a probe."""
    method = METHODS[name]
    encoder = Encoder(method.model).requires_grad_(False)
    step = Step(encoder, [method.settings.objective(name)], seed=0)
    step(batch_of(step.objectives[name], 4), NOW).loss.backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.grad is not None for parameter in step.objectives[name].parameters())


@pytest.mark.core
@pytest.mark.parametrize("name", CLASSICS)
def test_beside_a_host_of_batch_norm_it_changes_nothing_but_the_gradient(name: str, tiny_shards: Path) -> None:
    alone = updates_of(method_run("simclr", tiny_shards, updates=2))

    def accompanied(weight: float) -> Any:
        settings = method_run("simclr", tiny_shards, updates=2)
        plugin: Any = replace(METHODS[name].settings, size_px=32, weight=weight)  # type: ignore[type-var]
        return updates_of(settings.with_objectives(**{name: plugin}))

    absent, beside = accompanied(0.0), accompanied(1.0)
    assert all(torch.equal(absent[1][key], held) for key, held in alone[1].items())
    assert beside[0][0]["term:simclr/contrast"] == alone[0][0]["term:simclr/contrast"]
    assert any(not torch.equal(beside[1][key], held) for key, held in alone[1].items())  # control: its gradient comes


@pytest.mark.core
@pytest.mark.parametrize("name", CLASSICS)
def test_it_is_learned_on_a_residual_network_too(name: str, tiny_shards: Path) -> None:
    settings = method_run(name, tiny_shards, updates=2)
    learned: Any = replace(METHODS[name].settings, size_px=32)  # type: ignore[type-var]
    rows, state = updates_of(replace(settings, model=RESNET, objectives={name: learned}))
    assert all(math.isfinite(row["loss"]) for row in rows) and any(key.startswith("encoder.") for key in state)


@pytest.mark.core
@pytest.mark.parametrize("name", CLASSICS)
@pytest.mark.parametrize("host", ["dino", "mae", "simclr", "byol"])
def test_by_its_defaults_it_fits_the_models_of_small_recipes(host: str, name: str) -> None:
    """`wherefrom train imagenette_dino --rotation`: the patches of each, 8, 12 and 16 px, divide its views."""
    encoder, objective = Encoder(recipe(f"imagenette_{host}").model), OBJECTIVES[name]().objective(name)
    objective.setup(encoder)
    with torch.no_grad():
        terms = objective(batch_of(objective, 2, size=(160, 160)), encoder.encode, NOW)
    assert all(value.isfinite() and value > 0 for value in terms.losses.values())


@pytest.mark.core
def test_recipes_are_the_published_ones() -> None:
    numbers = {
        name: (run.global_batch, run.epochs, run.optim.name, run.optim.lr, run.optim.weight_decay)
        for name in CLASSICS
        for run in [recipe(f"imagenet_{name}_r50")]
    }
    of_vissl = (256, 105, "sgd", 0.1, 1e-4)
    assert numbers == {"rotation": of_vissl, "context": (512, 70, "sgd", 0.2, 1e-4), "jigsaw": of_vissl, "colorization": of_vissl}
    for name, side in (("rotation", 224), ("context", 64), ("jigsaw", 64), ("colorization", 224)):
        assert recipe(f"imagenet_{name}_r50").objectives[name].size_px == side
    for name in ("context", "jigsaw"):
        settings: Any = recipe(f"imagenet_{name}_r50").objectives[name]
        assert (settings.tiles.window_px, settings.tiles.tile_px, settings.tiles.jitter_px) == (255, 64, None)
        assert settings.tiles.cell_px == (85, 85)  # a jitter of 21
        assert settings.color == ColorLaw(brightness=0, contrast=0, saturation=0, hue=0, jitter_prob=0, gray_prob=0.66)
    paper = ContextSettings(size_px=96, tiles=Tiles(window_px=398, tile_px=96, gap_px=34, jitter_px=14)).tiles
    assert paper.cell_px == (110, 110) and paper.jitter_px == 110 - 96 and 34 + paper.jitter_px == 48


@pytest.mark.core
@pytest.mark.parametrize("name", CLASSICS)
def test_there_are_recipes_on_scenes_on_photographs_and_beside_others(name: str) -> None:
    for run in (recipe(name), recipe(f"imagenette_{name}"), recipe(f"imagenet_{name}_r50")):
        assert [host_of(each) for each in run.objectives] == [name]
        Step(Encoder(ModelSettings(name="test_resnet")), run.make_objectives(), seed=0)
    assert recipe(name).data is None and not recipe(name).needs_data
    assert list(recipe("imagenette_simclr").with_objectives(**{name: OBJECTIVES[name]()}).objectives) == ["simclr", name]
