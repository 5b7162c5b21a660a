"""Protocols of space: each against features that hold what it asks for, features that hold nothing, and truths of other origin.

Truths: NumPy's least squares, arrays that are cut, mirrored and turned by NumPy, and RASA's own code (tests/data/evaluation/rasa.json).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_evaluation import SIZE, FormulaPictures, scores_of, small_evaluation, tiny_network
from torch import Tensor, nn

from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.laws import Disjoint
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import ViewGeometry, Views
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.evaluation.correspondence import cells_apart, nearest_tokens, same_cells, second_crops
from wherefrom.train.evaluation.features import CHANCE, ENCODER, RANDOM, RAW, raw_tokens
from wherefrom.train.evaluation.jigsaw import LAWS, answers, laid_out, train_head
from wherefrom.train.evaluation.labels import ridge_probe
from wherefrom.train.evaluation.linear_maps import linear_classifier, r2_of_map, ridge, scores, sums_of_products
from wherefrom.train.evaluation.pair_geometry import FrozenPairs, pair_examples, pair_scores
from wherefrom.train.evaluation.positions import cell_positions, orthonormal, projected, removed_positions
from wherefrom.train.evaluation.protocols import PROTOCOLS, measure
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives.jigsaw import listed_permutations
from wherefrom.train.objectives.spatial import PAIRED, SpatialPrediction, SpatialSettings

FIGURES = Path(__file__).parent / "data" / "evaluation"
SHORT: dict[str, dict[str, Any]] = {  # choices that make protocols short
    "pairs": {"laws": (PAIRED,), "steps": 2, "pictures": 70, "held_out_pictures": 66},
    "jigsaw": {"steps": 3, "permutations": 20, "pictures": 70, "held_out_pictures": 66},
    "positions": {"rounds": (0, 2)},
    "correspondence": {"pictures": 66},
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.core
def test_linear_maps_from_sums_are_those_of_the_rows(generator: torch.Generator) -> None:
    features = torch.randn(300, 6, generator=generator, dtype=torch.float64) + 2
    targets = features @ torch.randn(6, 2, generator=generator, dtype=torch.float64) + torch.randn(300, 2, generator=generator)
    weights = ridge(sums_of_products(features, targets), 2, 0.0)
    rows = np.concatenate([features.numpy(), np.ones((300, 1))], 1)
    expected = np.linalg.lstsq(rows, targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9, atol=1e-9)
    others, their_targets = features[:50] + 0.3, targets[:50]
    error = ((their_targets - scores(others, weights)) ** 2).sum(0)
    spread = ((their_targets - their_targets.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(r2_of_map(sums_of_products(others, their_targets), weights), 1 - error / spread)
    penalized = ridge(sums_of_products(features, targets), 2, 0.1)
    centered = features - features.mean(0)
    variance = centered.square().mean()
    by_hand = torch.linalg.solve(
        centered.mT @ centered / 300 + 0.1 * variance * torch.eye(6), centered.mT @ (targets - targets.mean(0)) / 300
    )
    torch.testing.assert_close(penalized[:-1], by_hand)


def test_the_linear_classifier_tells_what_the_ridge_probe_tells(generator: torch.Generator) -> None:
    features = torch.randn(200, 12, generator=generator)
    labels = (features[:, :3] + 0.3 * torch.randn(200, 3, generator=generator)).argmax(-1)
    features = (features - features.mean(0)) / features.std(0)  # the probe standardizes; a mean variance of about 1 for both
    weights = linear_classifier(features[:150], labels[:150], classes=3)
    told, expected = scores(features[150:], weights).argmax(-1), ridge_probe(features[:150], labels[:150], features[150:], classes=3)
    assert (told != expected).sum() <= 1


def _tokens_with_positions(generator: torch.Generator, permuted: bool) -> tuple[Tensor, Tensor]:
    """Tokens of 60 pictures, 5 x 4 each, that hold their position among noise, and positions, of other cells where permuted."""
    where = cell_positions((5, 4)).expand(60, -1, -1)
    tokens = torch.randn(60, 20, 8, generator=generator, dtype=torch.float64)
    tokens = tokens + 3 * where @ torch.randn(2, 8, generator=generator, dtype=torch.float64)
    if permuted:
        where = torch.stack([one[torch.randperm(20, generator=generator)] for one in where])
    return tokens.flatten(0, 1), where.flatten(0, 1)


@pytest.mark.core
@pytest.mark.parametrize("permuted", [False, True])
def test_positions_are_read_where_tokens_hold_them(generator: torch.Generator, permuted: bool) -> None:
    tokens, where = _tokens_with_positions(generator, permuted)
    train, held_out = (sums_of_products(tokens[half], where[half]) for half in (slice(0, 600), slice(600, 1200)))
    r2 = r2_of_map(held_out, ridge(train, 2, 1e-4))
    assert bool((r2 < 0.05).all()) if permuted else bool((r2 > 0.5).all())


def test_what_is_removed_is_no_longer_read(generator: torch.Generator) -> None:
    tokens, where = _tokens_with_positions(generator, permuted=False)
    sums = sums_of_products(tokens, where)
    removals = removed_positions(sums, rounds=3, penalty=1.0)
    r2 = [r2_of_map(projected(sums, without), ridge(projected(sums, without), 2, 1e-6)).mean() for without in removals]
    assert r2[0] > 0.5 and r2[1] < 0.5 * r2[0] and r2[3] < 0.02
    for rounds, without in enumerate(removals):
        torch.testing.assert_close(without @ without, without)  # a projection
        assert round(float(without.trace())) == 8 - 2 * rounds
    torch.testing.assert_close(projected(sums, removals[1]), sums_of_products(tokens @ removals[1], where))


def test_directions_are_taken_out_as_rasa_takes_them_out() -> None:
    figures = json.loads((FIGURES / "rasa.json").read_text())
    tokens = torch.sin(1.7 * torch.arange(30, dtype=torch.float64) + 0.3).view(2, 3, 5)
    directions = orthonormal(torch.cos(0.9 * torch.arange(10, dtype=torch.float64)).view(2, 5).mT)
    without = tokens - tokens @ directions @ directions.mT
    torch.testing.assert_close(without, torch.tensor(figures["without_positions"], dtype=torch.float64))


def _record(boxes: list[tuple[int, int, int, int]], *, flipped: list[bool], turns: list[int], side: int) -> ViewGeometry:
    (drawn,) = draw_records(
        ViewRecipe(families=(ViewFamily(name="any", views=1, size_px=(side, side)),)),
        seed=0,
        epoch=0,
        drawn_for=np.arange(len(boxes)),
        source_size=np.full((len(boxes), 2), 64, np.int32),
    )
    places = torch.tensor(boxes, dtype=torch.float32)[:, None]
    return replace(drawn.geometry, boxes=places, flipped=torch.tensor(flipped)[:, None], quarter_turns=torch.tensor(turns)[:, None])


@pytest.mark.core
def test_cells_that_show_the_same_place_are_those_of_cut_arrays() -> None:
    """Views of 24 px cut out of an array of coordinates, without resizing; cells of 6 px. The two crops are whole cells apart."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 6, (2, 40, 2)) * 6
    flips, turns = rng.integers(0, 2, (2, 40)).astype(bool), rng.integers(0, 4, (2, 40))
    source = np.stack(np.meshgrid(np.arange(64), np.arange(64), indexing="xy"), -1)  # (y, x) -> (x, y)
    records, middles = [], []
    for corner, flip, turn in zip(corners, flips, turns, strict=True):
        boxes = [(int(x), int(y), int(x) + 24, int(y) + 24) for x, y in corner]
        records.append(_record(boxes, flipped=flip.tolist(), turns=turn.tolist(), side=24))
        cut = [source[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
        shown = [np.rot90(view[:, ::-1] if f else view, t) for view, f, t in zip(cut, flip, turn, strict=True)]
        middles.append(np.stack(shown).reshape(40, 4, 6, 4, 6, 2).mean((2, 4)).reshape(40, 16, 2))
    same = (middles[0][:, :, None] == middles[1][:, None]).all(-1)  # (40, 16, 16)
    expected = np.where(same.any(-1), same.argmax(-1), -1)
    found = same_cells(*records, grid=(4, 4)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert (expected >= 0).sum() > 100 and (expected < 0).sum() > 100


@pytest.mark.core
def test_mirrored_and_turned_crops_show_what_their_records_say() -> None:
    """Red and green of a formula's picture tell the place, up to the picture's color: what is left of them is the same all over."""
    family = ViewFamily(name="any", views=1, size_px=(16, 16))
    views = FormulaPictures(4).views(ViewRecipe(families=(family,)), np.arange(4)).views[0]
    middles = torch.stack(torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="xy"), -1).flatten(0, 1)
    seconds = second_crops(views)
    for second in seconds.values():
        places = map_points(second.geometry.view_to_source, middles) / torch.tensor(SIZE[::-1])
        color = second.pixels[:, :, :2].flatten(-2) - places.mT
        assert float(color.std(-1).max()) < 1e-4
    assert not torch.equal(seconds["mirrored"].pixels, views.pixels) and not torch.equal(seconds["turned"].pixels, views.pixels)


def test_cells_are_apart_by_the_longer_way() -> None:
    assert cells_apart(torch.tensor([0, 5, 7, 11]), torch.tensor([11, 5, 4, 2]), (3, 4)).tolist() == [3, 0, 3, 2]


def test_nearest_tokens_are_so_by_cosine(generator: torch.Generator) -> None:
    tokens, others = (torch.randn(2, count, 5, generator=generator) for count in (3, 4))
    cosine = torch.cosine_similarity(tokens[:, :, None], others[:, None], dim=-1)
    assert torch.equal(nearest_tokens(tokens, 7 * others), cosine.argmax(-1))


class ReadingPlaces(nn.Module):
    """An encoder whose tokens say where in the picture each cell's middle lies, or nothing at all."""

    def __init__(self, *, blind: bool) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(4) if blind else None

    def encode(self, views: Views) -> Features:
        boxes = views.geometry.token_boxes((4, 4))
        middles = (boxes[..., :2] + boxes[..., 2:]) / 2 / 30
        frequencies = torch.randn(2, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        angles = middles @ frequencies
        tokens = torch.cat([angles.sin(), angles.cos()], -1)
        if self.noise is not None:
            tokens = torch.randn(tokens.shape, generator=self.noise)
        return Features(summary=tokens.mean(2), tokens=tokens.unflatten(2, (4, 4)))


def test_tokens_that_know_their_place_correspond_and_others_do_so_by_chance() -> None:
    evaluation = small_evaluation()
    evaluation.__dict__["networks"] = {ENCODER: ReadingPlaces(blind=False), RANDOM: ReadingPlaces(blind=True)}
    values = scores_of(evaluation, "correspondence")
    for kind in ("cropped", "mirrored", "turned"):
        assert values[f"{kind}: the right cell", ENCODER] > 0.75  # its cells are not those of the second view: middles lie between two
        assert values[f"{kind}: at most 1 off", ENCODER] > 0.99
        for row in (f"{kind}: the right cell", f"{kind}: at most 1 off"):
            assert abs(values[row, RANDOM] - values[row, CHANCE]) < 0.06
    assert values["cropped: the right cell", CHANCE] == pytest.approx(1 / 16)


@pytest.mark.core
def test_raw_tokens_are_the_pixels_of_their_cells(generator: torch.Generator) -> None:
    pixels = torch.randn(2, 1, 3, 24, 16, generator=generator)
    tokens = raw_tokens(pixels, (3, 2))
    cell = pixels[1, 0, :, 8:16, 8:16].unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
    assert tokens.shape == (2, 1, 3, 2, 48)
    torch.testing.assert_close(tokens[1, 0, 1, 1], cell.flatten())


@pytest.mark.core
def test_smaller_views_are_of_whole_patches() -> None:
    evaluation = small_evaluation()
    assert [evaluation.view_px(frac) for frac in (1.0, 0.5, 1 / 3, 0.01)] == [32, 16, 8, 8]
    assert evaluation.grid() == (4, 4)


def test_tiles_without_gaps_touch_and_fill_the_middle() -> None:
    size = np.array([[90, 150], [210, 120]], np.int32)
    families = [ViewFamily(name=name.replace(" ", "-"), views=9, size_px=(24, 24), law=law) for name, law in LAWS.items()]
    records = draw_records(ViewRecipe(families=tuple(families)), seed=0, epoch=0, drawn_for=np.arange(2), source_size=size)
    touching, apart = (record.geometry.boxes for record in records)
    assert touching[0].view(3, 3, 4)[:, :, 0].tolist() == [[30, 60, 90]] * 3
    assert touching[1].view(3, 3, 4)[:, :, 3].T.tolist() == [[85, 125, 165]] * 3
    assert torch.equal((touching[..., 2:] - touching[..., :2]), torch.tensor([30.0, 40.0])[:, None, None].expand(2, 9, 2))
    assert bool(((apart[..., 2:] - apart[..., :2]) < touching[..., 2:] - touching[..., :2]).all())
    assert bool((apart[..., :2] >= touching[..., :2]).all() and (apart[..., 2:] <= touching[..., 2:]).all())


@pytest.mark.core
def test_pictures_laid_out_in_an_order_and_back_are_as_they_were(generator: torch.Generator) -> None:
    picture = torch.randn(2, 1, 3, 12, 12, generator=generator)
    tiles = torch.stack([picture[:, 0, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(3) for c in range(3)], 1)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    assert torch.equal(laid_out(tiles, torch.arange(9).expand(2, -1)), picture)
    shuffled = laid_out(tiles, order)
    assert torch.equal(shuffled[1, 0, :, 4:8, 8:12], tiles[1, order[1, 5]])
    assert torch.equal(laid_out(tiles, order.gather(1, order.argsort(1))), picture)


@pytest.mark.core
@pytest.mark.parametrize("permuted", [False, True])
def test_orders_are_told_where_tiles_show_their_place(generator: torch.Generator, permuted: bool) -> None:
    listed = torch.from_numpy(listed_permutations()[:40].astype(np.int64))
    tiles = torch.eye(9).repeat(240, 1, 1) + 0.2 * torch.randn(240, 9, 9, generator=generator)
    if permuted:
        tiles = torch.stack([one[torch.randperm(9, generator=generator)] for one in tiles])
    head = train_head(tiles[:160], listed, hidden=24, steps=150, batch=64, seed=0, lr=5e-3)
    drawn = torch.randint(40, (80,), generator=generator)
    told = answers(head, tiles[160:], listed[drawn])
    right, cells = (told == drawn).double().mean(), (listed[told] == listed[drawn]).double().mean()
    if permuted:
        assert right < 0.12 and cells < 0.22
    else:
        assert right > 0.9 and cells > 0.9


@pytest.mark.core
def test_pictures_that_are_too_small_for_tiles_are_left_out_of_the_jigsaw() -> None:
    """Of 70 and 66 pictures, 20 are too small: what is measured is the same whatever they show."""
    short = SHORT["jigsaw"] | {"pictures": 90, "held_out_pictures": 90}
    small = small_evaluation(90, 86, small=20, small_px=40)
    values = scores_of(small, "jigsaw", **short)
    assert values["gaps: training, too small, left out", ENCODER] == 20 / 90
    assert values["gaps: held-out, too small, left out", ENCODER] == 20 / 86
    changed = small_evaluation(90, 86, small=20, small_px=30)
    assert scores_of(changed, "jigsaw", **short) == values
    assert not any("left out" in row for row, _ in scores_of(small_evaluation(90, 86), "jigsaw", **short))


def test_a_law_whose_tiles_no_picture_has_room_for_is_not_measured_and_the_other_is() -> None:
    """Tiles of 16 px: a ninth of 48, and 64 of 255 px of 64."""
    (measured,) = measure(small_evaluation(70, 66, small=70, small_px=56), {"jigsaw": PROTOCOLS["jigsaw"](**SHORT["jigsaw"])})
    assert measured.notes == ("gaps: no training picture is large enough for its tiles",)
    assert {score.row.partition(":")[0] for score in measured.scores} == {"no gaps"}
    (measured,) = measure(small_evaluation(70, 66, small=70, small_px=40), {"jigsaw": PROTOCOLS["jigsaw"](**SHORT["jigsaw"])})
    assert "no gaps: no training picture is large enough" in measured.not_measured and not measured.failed


def test_a_network_of_one_size_sees_what_is_laid_out_at_that_size() -> None:
    evaluation = small_evaluation(70, 66)
    with random_scope("convolutional"):
        encoder = Encoder(ModelSettings(name="resnet10t")).requires_grad_(False).eval()
    encoder.only_hw = (32, 32)
    evaluation.network = replace(tiny_network(), encoder=encoder)
    evaluation.__dict__["networks"] = {ENCODER: encoder}
    assert evaluation.view_px(1 / 3) == 32
    values = scores_of(evaluation, "jigsaw", **SHORT["jigsaw"])
    assert values["no gaps: original, k 20", ENCODER] > 0.9


def test_a_law_that_pictures_are_too_small_for_leaves_the_other() -> None:
    short = SHORT["pairs"] | {"laws": (PAIRED, Disjoint())}
    (measured,) = measure(small_evaluation(70, 66, small=70, small_px=100), {"pairs": PROTOCOLS["pairs"](**short)})
    assert measured.notes == ("paired law: 70 training pictures, no pair that counts; are they too small for the law?",)
    assert {score.row.partition(":")[0] for score in measured.scores} == {"disjoint"}
    assert not any(np.isnan(score.value) for score in measured.scores)


def test_where_no_picture_beside_one_that_counts_does_so_other_rows_are_measured(generator: torch.Generator) -> None:
    objective = SpatialSettings(law=PAIRED, size_px=32, mirror="none", color=None, hidden=8).objective("pairs")
    objective.setup(_OfWidth(8))  # type: ignore[arg-type]
    train, held_out = (_pairs_of_boxes(objective, first, 20, generator) for first in (0, 20))
    held_out.mask[1::2] = False
    rows = {row: better for row, _, better in pair_scores(objective, train, held_out, ENCODER, steps=2, seed=0)}
    assert "R2 x" in rows and "R2 x, next picture's" not in rows
    assert {row for row, better in rows.items() if better == "higher"} == {"R2 x", "R2 y", "R2 scale"}  # controls are no merit


@pytest.mark.parametrize("permuted", [False, True])
def test_pairs_are_told_where_features_hold_their_boxes(generator: torch.Generator, permuted: bool) -> None:
    objective = SpatialSettings(law=PAIRED, size_px=32, mirror="none", color=None, position="picture", hidden=64).objective("pairs")
    torch.manual_seed(0)
    objective.setup(_OfWidth(8))  # type: ignore[arg-type]
    pairs = [_pairs_of_boxes(objective, first, 200, generator) for first in (0, 200)]
    if permuted:
        pairs[0] = replace(pairs[0], targets=pairs[0].targets.roll(1, 0))
    values = {row: value for row, value, _ in pair_scores(objective, *pairs, ENCODER, steps=200, seed=0)}
    if permuted:
        assert max(values[f"R2 {channel}"] for channel in objective.channels) < 0.1
    else:
        assert values["R2 x"] > 0.7 and values["R2 y"] > 0.7 and values["R2 x, next picture's"] < 0
        assert max(values["R2 x, reference only"], values["R2 x, target only"]) < values["R2 x"] - 0.1


@pytest.mark.core
def test_examples_are_the_pairs_that_are_told_best_and_worst(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told is what is so, moved by a hundredth of the reference's sides more each picture, and as much larger."""
    objective = SpatialSettings(law=PAIRED, size_px=32, mirror="none", color=None).objective("pairs")
    objective.setup(_OfWidth(8))  # type: ignore[arg-type]
    pairs = _pairs_of_boxes(objective, 0, 40, generator)
    pairs.mask[39] = False
    wrong = torch.arange(40.0)[:, None, None].expand(-1, 1, 3) / 100
    monkeypatch.setattr(objective, "predict", lambda _: (pairs.targets + wrong / objective.target_std, {}))
    examples = list(pair_examples(objective, pairs, ENCODER))
    assert [(each.rank, each.sample) for each in examples] == [("best", i) for i in range(4)] + [("worst", i) for i in (38, 37, 36, 35)]
    assert examples[0].told == pytest.approx(examples[0].target, abs=0.02)
    worst = examples[4]
    reference, target, told = (np.array(box) for box in (worst.reference, worst.target, worst.told))
    moved = (told[:2] + told[2:] - target[:2] - target[2:]) / 2
    assert moved == pytest.approx(0.38 * (reference[2:] - reference[:2]), abs=0.05)
    assert told[2:] - told[:2] == pytest.approx(np.exp(0.38) * (target[2:] - target[:2]), abs=0.05)
    assert worst.target == pytest.approx(pairs.boxes[38, 1].tolist(), abs=0.01)
    assert worst.reference != worst.target


class _OfWidth:
    def __init__(self, width: int) -> None:
        self.width = width


def _pairs_of_boxes(objective: SpatialPrediction, first: int, number: int, generator: torch.Generator) -> FrozenPairs:
    """Pairs whose summaries and single tokens are the numbers of their boxes, standardized, and noise."""
    (record,) = draw_records(
        ViewRecipe(families=(objective.evaluation_family(),)),
        seed=0,
        epoch=0,
        drawn_for=np.arange(first, first + number),
        source_size=np.full((number, 2), 1024, np.int32),
    )
    boxes = record.geometry.boxes
    numbers = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 1024 - 1, 6 * (boxes[..., 2:] - boxes[..., :2]) / 1024 - 1.5], -1)
    seen = 6 * torch.cat([numbers, 0.1 * torch.randn(numbers.shape, generator=generator)], -1)  # large: heads learn in few steps
    return FrozenPairs(
        features={ENCODER: Features(summary=seen, tokens=seen[:, :, None, None].half())},
        targets=objective.targets(record.geometry),
        mask=objective.pair_mask(record.geometry, record.valid),
        boxes=boxes,
        samples=torch.arange(first, first + number),
    )


@pytest.mark.core
@pytest.mark.parametrize("name", list(SHORT))
def test_measured_twice_numbers_are_the_same(name: str) -> None:
    first, second = (scores_of(small_evaluation(), name, **SHORT[name]) for _ in range(2))
    assert first == second
    assert {column for _, column in first} >= {ENCODER, RANDOM, RAW}


def test_sorted_pictures_are_recognized_by_their_labels_alone() -> None:
    """With labels of other pictures recognition falls to chance, 0.25."""
    rows: Mapping[bool, dict[tuple[str, str], float]] = {
        permuted: scores_of(small_evaluation(permuted=permuted), "jigsaw", steps=2, permutations=20, pictures=128)
        for permuted in (False, True)
    }
    for kind in ("original", "shuffled", "re-assembled"):
        assert rows[False][f"no gaps: {kind}, k 20", ENCODER] > 0.8
        assert rows[True][f"no gaps: {kind}, k 20", ENCODER] < 0.5


def test_pictures_without_labels_are_puzzled_over_all_the_same() -> None:
    evaluation = small_evaluation(70, 66)
    for pictures in (evaluation.train, evaluation.held_out):
        assert isinstance(pictures, FormulaPictures)
        pictures.labels = np.full(len(pictures), -1)
    rows = {row for row, _ in scores_of(evaluation, "jigsaw", **SHORT["jigsaw"])}
    assert rows == {f"{name}: {what}" for name in LAWS for what in ("permutation", "cells")}
