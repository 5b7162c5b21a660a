"""Crop laws: against torchvision's RandomResizedCrop, uniform distributions (scipy), brute force on boxes, and arithmetic bounds."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from wherefrom.kernels import PairUnits, pair_targets
from wherefrom.pipeline.crops import snap_boxes
from wherefrom.pipeline.draws import Keys
from wherefrom.pipeline.laws import Center, Disjoint, Grid, Independent, Inside, Overlapping, Paired, Scattered, Tiles, draw_pairs
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import CropLaw, Mirror, Snap, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record

pytestmark = pytest.mark.core

SIGNIFICANT = 0.01


def family(
    law: CropLaw, views: int = 1, name: str = "f", *, snap: Snap = "pixel", min_side_px: int = 1, mirror: Mirror = "none"
) -> ViewFamily:
    return ViewFamily(name=name, views=views, size_px=(32, 32), law=law, snap=snap, min_side_px=min_side_px, mirror=mirror)


def draw(families: ViewFamily | tuple[ViewFamily, ...], sizes: object, samples: object, seed: int = 0, epoch: int = 0) -> Record:
    """Draw the last of some families for samples (B,) whose pictures have sizes that broadcast to (B, 2), (height, width)."""
    ids = np.atleast_1d(np.asarray(samples, np.int64))
    every = families if isinstance(families, tuple) else (families,)
    return draw_records(
        ViewRecipe(families=every),
        seed=seed,
        epoch=epoch,
        drawn_for=ids,
        source_size=np.broadcast_to(np.asarray(sizes, np.int32), (len(ids), 2)).copy(),
    )[-1]


def boxes_of(drawn: Record) -> NDArray[np.float64]:
    return drawn.geometry.boxes.double().numpy()


def shared_area(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area shared by boxes (..., 4), said plainly."""
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    return np.where((width > 0) & (height > 0), width * height, 0)


def torchvision_boxes(count: int, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> NDArray[np.int64]:
    """Boxes (count, 4) as torchvision draws them, xyxy."""
    transforms = pytest.importorskip("torchvision.transforms")
    picture = torch.empty(1, *size)
    with torch.random.fork_rng():
        torch.manual_seed(20)
        found = np.array([transforms.RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(count)])
    top, left, height, width = found.T
    return np.stack([left, top, left + width, top + height], -1)


def log_aspect(boxes: NDArray) -> NDArray[np.float64]:
    return np.log((boxes[..., 2] - boxes[..., 0]) / (boxes[..., 3] - boxes[..., 1]))


def area(boxes: NDArray) -> NDArray[np.float64]:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@pytest.mark.parametrize(
    ("count", "size", "law"),
    [
        (100_000, (375, 500), Independent()),
        (10_000, (500, 333), Independent(area_frac=(0.05, 0.4))),
        (10_000, (120, 400), Independent(area_frac=(0.3, 1.0))),  # about half of the tries fit; the fallback is drawn too
    ],
)
def test_independent_boxes_follow_torchvisions_law(count: int, size: tuple[int, int], law: Independent) -> None:
    ours = boxes_of(draw(family(law, views=2), size, np.arange(count // 2))).reshape(-1, 4)
    theirs = torchvision_boxes(min(count, 30_000), size, law.area_frac, law.aspect)
    for of in (area, log_aspect, lambda boxes: boxes[..., 0], lambda boxes: boxes[..., 3]):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > SIGNIFICANT
    low, high = law.area_frac  # negative controls: bounds a little off
    for wrong, of in (
        (Independent(area_frac=(low * 1.3, high)), area),
        (Independent(area_frac=(low, high), aspect=(3 / 4, 1.3)), log_aspect),
    ):
        boxes = boxes_of(draw(family(wrong, views=2), size, np.arange(count // 2))).reshape(-1, 4)
        assert stats.ks_2samp(of(boxes), of(theirs)).pvalue < SIGNIFICANT


@pytest.mark.parametrize("snap", ["pixel", "none"])
def test_every_valid_offset_is_drawn_equally_often(snap: Snap) -> None:
    """A 7 x 7 box has 10 x 6 places in a picture of 16 x 12; in parts of a pixel the places are too many to count, not their range."""
    law = Independent(area_frac=(49 / 192, 49 / 192), aspect=(1, 1))
    boxes = boxes_of(draw(family(law, snap=snap), (12, 16), np.arange(12_000)))[:, 0]
    assert (boxes[:, 2:] - boxes[:, :2] == 7).all()
    if snap == "pixel":
        counts = np.histogram2d(boxes[:, 0], boxes[:, 1], bins=(np.arange(11), np.arange(7)))[0]
        assert counts.sum() == 12_000
        assert stats.chisquare(counts.ravel()).pvalue > SIGNIFICANT
        counts[-1] //= 2  # negative control: a last offset that is drawn half as often
        assert stats.chisquare(counts.ravel(), counts.sum() / 60 * np.ones(60)).pvalue < SIGNIFICANT
    else:
        assert stats.kstest(boxes[:, 0] / 9, "uniform").pvalue > SIGNIFICANT
        assert stats.kstest(boxes[:, 1] / 5, "uniform").pvalue > SIGNIFICANT
        assert boxes[:, 0].max() > 8.99 and boxes[:, 1].min() < 0.01


@pytest.mark.parametrize("tries", [1, 10])
@pytest.mark.parametrize("size", [(10, 400), (400, 10), (33, 200), (201, 64)])
def test_fallback_is_torchvisions(size: tuple[int, int], tries: int) -> None:
    """No try fits: nearly the whole area is asked for at an aspect far from the picture's."""
    law = Independent(area_frac=(0.9, 1.0), tries=tries)
    ours = boxes_of(draw(family(law), size, 0))[0, 0]
    np.testing.assert_array_equal(ours, torchvision_boxes(1, size, law.area_frac, law.aspect)[0])


def wished(law: Paired, count: int, size: tuple[int, int], seed: int = 1) -> tuple[NDArray[np.float64], ...]:
    """Position (n, 2), ln s (n,), the reference's side (n,) and the boxes (n, 2, 4) of pairs before snapping."""
    keys = Keys(seed=seed, epoch=0, drawn_for=np.arange(count), family=7)
    boxes = draw_pairs(law, keys, np.broadcast_to(np.array(size, np.float64), (count, 2)))
    reference, target = boxes[:, 0], boxes[:, 1]
    side = reference[:, 2] - reference[:, 0]
    np.testing.assert_allclose(side, reference[:, 3] - reference[:, 1])
    position = ((target[:, :2] + target[:, 2:]) - (reference[:, :2] + reference[:, 2:])) / 2 / side[:, None]
    return position, np.log(area(target)) / 2 - np.log(side), side, boxes


PAIRED_LAWS = [
    Paired(),
    Paired(position_max=2.0, position_min=0.0, log_scale_max=math.log(1.5), aspect_jitter=1.2, border_frac=0.05),
    Paired(position_max=1.0, position_min=0.75, side_frac=(0.2, 0.2)),
]


@pytest.mark.parametrize("law", PAIRED_LAWS)
@pytest.mark.parametrize("size", [(375, 500), (640, 320)])
def test_pairs_are_uniform_and_independent_of_the_references_side(law: Paired, size: tuple[int, int]) -> None:
    count = 100_000 if law is PAIRED_LAWS[0] else 20_000
    position, log_scale, side, _ = wished(law, count, size, seed=2)  # over 60 seeds these p-values are uniform themselves
    a, d = law.position_max, law.position_min
    edges = np.linspace(-a, a, 25)
    counts = np.histogram2d(*position.T, bins=(edges, edges))[0]
    middle = np.abs((edges[1:] + edges[:-1]) / 2)
    assert counts.sum() == count
    allowed = np.maximum.outer(middle, middle) > d
    assert counts[~allowed].sum() == 0
    assert stats.chisquare(counts[allowed]).pvalue > SIGNIFICANT
    assert position.std(0) == pytest.approx(law.position_std, rel=0.02)
    assert log_scale.std() == pytest.approx(law.log_scale_std, rel=0.02)
    low, high = (bound * min(size) for bound in law.side_bounds)
    assert stats.kstest(log_scale, "uniform", (-law.log_scale_max, 2 * law.log_scale_max)).pvalue > SIGNIFICANT
    if high == low:
        np.testing.assert_allclose(side, low)
        return
    assert stats.kstest(np.log(side), "uniform", (np.log(low), np.log(high) - np.log(low))).pvalue > SIGNIFICANT
    small = side < np.median(side)
    for channel in (*position.T, log_scale):
        assert stats.pearsonr(channel, side).pvalue > SIGNIFICANT
        assert stats.pearsonr(np.abs(channel), side).pvalue > SIGNIFICANT
        assert stats.ks_2samp(channel[small], channel[~small]).pvalue > SIGNIFICANT


def test_redrawing_what_does_not_fit_would_be_found() -> None:
    """Negative control: above w* the usual rejection of misfits makes the position depend on the reference's side."""
    generator = np.random.default_rng(0)
    position, side = generator.uniform(-1.5, 1.5, 50_000), generator.uniform(0.1, 0.6, 50_000)
    fits = (np.abs(position) + 1) * side <= generator.uniform(0, 1, 50_000)
    position, side = position[fits], side[fits]
    assert stats.pearsonr(np.abs(position), side).pvalue < SIGNIFICANT


@settings(max_examples=60)
@given(
    st.floats(0.01, 3),
    st.floats(0, 0.99),
    st.floats(0, 2),
    st.floats(1, 2),
    st.floats(0, 0.3),
    st.tuples(st.integers(20, 800), st.integers(20, 800)),
)
def test_every_pair_lies_within_the_border(
    position_max: float, inner: float, log_scale_max: float, jitter: float, border: float, size: tuple[int, int]
) -> None:
    law = Paired(
        position_max=position_max, position_min=inner * position_max, log_scale_max=log_scale_max, aspect_jitter=jitter, border_frac=border
    )
    law = dataclasses.replace(law, side_frac=(0.9 * law.largest_side_frac, law.largest_side_frac))
    boxes = wished(law, 300, size)[-1]
    free = border * min(size) - 1e-9
    assert boxes.min() >= free
    assert (boxes[..., 2:] <= np.array(size[::-1]) - free).all()


@pytest.mark.parametrize(
    ("settings_", "largest"),
    [
        ({}, 1 / 3),  # w* = 1/(a + s_max/2 + 1/2)
        ({"position_max": 1.0}, 0.4),
        ({"position_max": 2.0}, 1 / 3.5),
        ({"position_max": 1.2, "log_scale_max": math.log(1.5)}, 1 / 2.45),
        ({"border_frac": 0.1}, 0.8 / 3),
        ({"aspect_jitter": 1.5}, 1 / 3.5),
        ({"position_max": 0.2, "position_min": 0.0}, 0.5),  # the target outgrows the reference on both sides
    ],
)
def test_a_side_that_would_not_always_fit_is_refused_with_the_number(settings_: dict[str, float], largest: float) -> None:
    assert Paired(**settings_).largest_side_frac == pytest.approx(largest)
    Paired(**settings_, side_frac=(0.1, largest))
    with pytest.raises(ValueError, match=rf"side_frac=\(0\.1, .*must be at most {largest:.4f}"):
        Paired(**settings_, side_frac=(0.1, largest + 0.001))


def test_default_pairs_use_sides_from_a_tenth_to_a_third() -> None:
    assert Paired().side_bounds == (0.10, 0.33)
    assert Paired(position_max=3.0).side_bounds == (0.10, pytest.approx(1 / 4.5))


def test_cut_targets_are_those_of_the_cut_boxes_and_as_near_to_the_wished_as_rounding_allows() -> None:
    """Sides and corners move by half a pixel at most, so centers by 3/4; in a picture of 375 x 500, p by 0.050 and ln s by 0.034."""
    law, size, count = Paired(), (375, 500), 100_000
    position, log_scale, _, boxes = wished(law, count, size, seed=3)
    cut = snap_boxes(boxes, np.broadcast_to(np.array(size, np.float64), (count, 2)), "pixel")
    assert np.abs(cut - boxes).max() <= 1
    side_r, side_t = cut[:, 0, 2] - cut[:, 0, 0], cut[:, 1, 2] - cut[:, 1, 0]
    center = (cut[..., :2] + cut[..., 2:]) / 2
    cut_position = (center[:, 1] - center[:, 0]) / side_r[:, None]
    cut_scale = np.log(side_t / side_r)
    assert (np.abs(cut_position - position) <= (1.5 + 0.5 * np.abs(position)) / side_r[:, None] + 1e-9).all()
    assert (np.abs(cut_scale - log_scale) <= -np.log1p(-0.5 / side_r) - np.log1p(-0.5 / side_t) + 1e-9).all()
    assert np.abs(cut_position - position).max() == pytest.approx(0.050, abs=0.005)
    assert np.abs(cut_scale - log_scale).max() == pytest.approx(0.034, abs=0.005)

    found = pair_targets(torch.from_numpy(cut).float(), torch.tensor([[0, 1]]), units=PairUnits(axes="source"))[:, 0].double().numpy()
    np.testing.assert_allclose(found, np.concatenate([cut_position, cut_scale[:, None]], -1), atol=1e-6)
    assert np.abs(found[:, :2] - position).max() > 0.01  # the wished ones are others


def explained(of: NDArray[np.float64], *by: NDArray[np.float64], bins: int = 20) -> float:
    """R2 of the conditional mean over equal bins of one or two numbers."""
    place = np.zeros(len(of), np.int64)
    for number in by:
        place = place * bins + np.digitize(number, np.linspace(number.min(), number.max(), bins + 1)[1:-1])
    counts = np.maximum(np.bincount(place, minlength=bins ** len(by)), 1)
    mean = np.bincount(place, of, bins ** len(by)) / counts
    return 1 - ((of - mean[place]) ** 2).mean() / of.var()


def test_one_box_alone_reveals_as_much_of_the_targets_as_computed_elsewhere() -> None:
    """Method sheet 1.10, the default law in a square picture: R2 .24 and .19 of p_x, 0 and .56 of s."""
    position, log_scale, side, boxes = wished(Paired(), 200_000, (1, 1))
    center_r, center_t = (boxes[:, :, 0] + boxes[:, :, 2]).T / 2
    side_t = boxes[:, 1, 2] - boxes[:, 1, 0]
    assert explained(position[:, 0], center_r, side) == pytest.approx(0.24, abs=0.03)
    assert explained(position[:, 0], center_t, side_t) == pytest.approx(0.19, abs=0.03)
    assert explained(np.exp(log_scale), side) == pytest.approx(0, abs=0.01)
    assert explained(np.exp(log_scale), side_t) == pytest.approx(0.56, abs=0.03)


@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_accepted_disjoint_views_do_not_overlap_and_acceptance_is_counted(gap: float) -> None:
    law = Disjoint(min_gap_frac=gap)
    drawn = draw(family(law, views=6), (375, 500), np.arange(3000))
    boxes, accepted = boxes_of(drawn), drawn.accepted.numpy()
    grown = boxes + gap * 375 * np.array([-1, -1, 1, 1])
    for view in range(6):
        clear = np.array([shared_area(boxes[:, view], grown[:, other]) == 0 for other in range(view)]).all(0) | (view == 0)
        np.testing.assert_array_equal(accepted[:, view], clear)
    assert accepted[:, 0].all() and 0.05 < accepted[:, -1].mean() < 0.5
    every = drawn.accepted.all(-1).numpy()
    apart = np.maximum(
        boxes[every][:, :, None, :2] - boxes[every][:, None, :, 2:], boxes[every][:, None, :, :2] - boxes[every][:, :, None, 2:]
    )
    others = ~np.eye(6, dtype=bool)
    assert (apart.max(-1)[:, others] >= gap * 375 - 1e-9).all()
    assert drawn.valid.all()
    # negative control: without the law most sets overlap
    free = boxes_of(draw(family(Independent(area_frac=law.area_frac), views=6), (375, 500), np.arange(500)))
    overlapping = [any(shared_area(b[i], b[j]) > 0 for i in range(6) for j in range(i)) for b in free]
    assert np.mean(overlapping) > 0.9


def test_more_tries_never_overlap_more() -> None:
    """The least overlapping of the tries is taken: the first tries of a longer search are the same."""
    sizes, samples = (375, 500), np.arange(400)
    shared = []
    for tries in (1, 4, 16, 64):
        boxes = boxes_of(draw(family(Disjoint(area_frac=(0.3, 0.5), tries=tries), views=2), sizes, samples))
        shared.append(shared_area(boxes[:, 0], boxes[:, 1]))
    for fewer, more in itertools.pairwise(shared):
        assert (more <= fewer).all() and more.sum() < fewer.sum()


@pytest.mark.parametrize(("of", "bound"), [("anchor", 0.01), ("anchor", 0.05), ("f", 0.02)])
def test_valid_overlapping_views_share_the_asked_area_with_every_anchor(of: str, bound: float) -> None:
    anchors = family(Independent(area_frac=(0.1, 0.3)), views=2, name="anchor")
    mine = family(Overlapping(of=of, min_shared_frac=bound, tries=6), views=3)
    ids, size = np.arange(2000), (300, 420)
    drawn = draw((anchors, mine), size, ids)
    boxes = boxes_of(drawn)
    others = boxes_of(draw(anchors, size, ids)) if of == "anchor" else None
    held = np.empty((len(ids), 3), bool)
    for view in range(3):
        met = others if others is not None else boxes[:, :view]
        held[:, view] = np.array([shared_area(boxes[:, view], met[:, k]) >= bound * 300 * 420 for k in range(met.shape[1])]).all(0)
    np.testing.assert_array_equal(drawn.valid.numpy(), held | (np.arange(3) == 0 if of == "f" else False))
    assert not (drawn.accepted & ~drawn.valid).any()
    assert drawn.valid.float().mean() > 0.6 and drawn.accepted.float().mean() < 1


@pytest.mark.parametrize("snap", ["pixel", "none"])
def test_valid_inside_views_lie_inside_their_own_view(snap: Snap) -> None:
    outer = family(Independent(area_frac=(0.2, 0.5)), views=2, name="outer", snap=snap)
    inner = family(Inside(of="outer"), views=5)
    ids, size = np.arange(2000), (300, 420)
    drawn = draw((outer, inner), size, ids)
    around, boxes = boxes_of(draw(outer, size, ids))[:, np.arange(5) % 2], boxes_of(drawn)
    assert drawn.valid.all()
    assert (boxes[..., :2] >= around[..., :2]).all() and (boxes[..., 2:] <= around[..., 2:]).all()
    fraction = area(boxes) / area(around)
    assert stats.kstest(fraction.ravel(), "uniform", (0.1, 0.4)).pvalue > 1e-4  # sides are rounded to pixels
    assert not (boxes[:, :2, :2] >= around[:, 1:3, :2]).all()


def test_inside_a_small_view_is_invalid() -> None:
    outer = family(Grid(rows=1, cols=1, side_frac=0.25), name="outer")
    inner = family(Inside(of="outer", area_frac=(0.25, 0.25), aspect=(1, 1)), min_side_px=16)
    for side, valid in ((128, True), (124, False)):
        drawn = draw((outer, inner), (side, side), 0)
        assert drawn.valid.item() == valid
        assert (drawn.geometry.boxes[0, 0].tolist() == [0, 0, side, side]) != valid


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (224, 224), (1200, 301), (97, 131)])
def test_center_shows_what_resize_and_center_crop_show(size: tuple[int, int]) -> None:
    """The box is read off a picture of coordinates that went through torchvision's own two steps; half a pixel of either grid apart."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    view = transforms.CenterCrop(160)(transforms.Resize(184)(torch.stack([x, y]).double()))
    step = min(size) / 184
    inner = view[:, 40:-40, 40:-40]
    middle = inner.mean((1, 2))
    found = boxes_of(draw(family(Center(resize_px=184, crop_px=160), snap="none"), size, 0))[0, 0]
    np.testing.assert_allclose((found[:2] + found[2:]) / 2, middle, atol=step / 2 + 0.01)
    np.testing.assert_allclose(found[2:] - found[:2], 160 * step, atol=1 / 1024)
    spacing = (inner[0, 0, -1] - inner[0, 0, 0]) / 79, (inner[1, -1, 0] - inner[1, 0, 0]) / 79
    np.testing.assert_allclose(
        [160 * float(one) for one in spacing], found[2:] - found[:2], rtol=0.01
    )  # the long side is cut to whole pixels
    whole = boxes_of(draw(family(Center(resize_px=184, crop_px=160)), size, 0))[0, 0]
    assert np.abs(whole - found).max() <= 1


def test_center_without_numbers_is_the_whole_picture() -> None:
    drawn = draw(family(Center(), views=2, min_side_px=16), [(3, 5), (200, 100)], [0, 1])
    np.testing.assert_array_equal(boxes_of(drawn), [[[0, 0, 5, 3]] * 2, [[0, 0, 100, 200]] * 2])
    assert drawn.valid.all()


def test_grid_spreads_from_edge_to_edge_row_by_row() -> None:
    boxes = boxes_of(draw(family(Grid(rows=2, cols=3, side_frac=0.5), views=6), (100, 200), 0))[0]
    np.testing.assert_array_equal(boxes[:, 0], [0, 50, 100, 0, 50, 100])
    np.testing.assert_array_equal(boxes[:, 1], [0, 0, 0, 50, 50, 50])
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], [[100, 50]] * 6)
    np.testing.assert_array_equal(boxes_of(draw(family(Grid(rows=1, cols=1, side_frac=0.5)), (100, 200), 0))[0, 0], [50, 25, 150, 75])


def cell_edges(law: Tiles, window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cells of windows (B, 4) as boxes (B, rows * cols, 4), said plainly."""
    height, width = ((law.window_px - (n - 1) * law.gap_px) / n for n in (law.rows, law.cols))
    boxes = [
        [x0 := col * (width + law.gap_px), y0 := row * (height + law.gap_px), x0 + width, y0 + height]
        for row in range(law.rows)
        for col in range(law.cols)
    ]
    sides = window[:, 2:] - window[:, :2]
    return np.tile(window[:, :2], 2)[:, None] + np.array(boxes) / law.window_px * np.tile(sides, 2)[:, None]


@pytest.mark.parametrize("snap", ["pixel", "none"])
@pytest.mark.parametrize(
    "law", [Tiles(), Tiles(gap_px=12, tile_px=48, jitter_px=14, aspect=(1, 1)), Tiles(rows=2, cols=4, window_px=96, tile_px=20)]
)
def test_tiles_stay_in_the_cells_of_one_window_and_their_places_are_uniform_over_the_jitter(law: Tiles, snap: Snap) -> None:
    count, size = 4000, (375, 500)
    boxes = boxes_of(draw(family(law, law.fixed_views, snap=snap), size, np.arange(count)))
    like_it = Independent(area_frac=law.area_frac, aspect=law.aspect)
    window = boxes_of(draw(family(like_it, 1, snap=snap), size, np.arange(count)))[:, 0]
    cells, step = cell_edges(law, window), 1 if snap == "pixel" else 1 / 1024
    assert (boxes[..., :2] >= cells[..., :2] - 1e-6).all() and (boxes[..., 2:] <= cells[..., 2:] + 1e-6).all()
    shown = law.window_px / (window[:, None, 2:] - window[:, None, :2])  # window pixels a source pixel
    assert (np.abs((boxes[..., 2:] - boxes[..., :2]) * shown - law.tile_px) <= step * shown / 2 + 1e-6).all()
    off = ((boxes[..., 2:] + boxes[..., :2]) - (cells[..., 2:] + cells[..., :2])) / 2 * shown  # of the middle of its cell, window pixels
    room = np.array(law.cell_px)[::-1] - law.tile_px
    jitter = room if law.jitter_px is None else np.full(2, law.jitter_px)
    assert (np.abs(off) <= jitter / 2 + 1.5 * step * shown).all()
    if snap == "none":
        assert all(
            stats.kstest(off[..., axis].ravel(), "uniform", (-jitter[axis] / 2, jitter[axis])).pvalue > SIGNIFICANT for axis in (0, 1)
        )
    gaps = np.maximum(boxes[:, :, None, :2] - boxes[:, None, :, 2:], boxes[:, None, :, :2] - boxes[:, :, None, 2:]).max(-1)
    others = ~np.eye(law.fixed_views, dtype=bool)
    assert (gaps[:, others].min(1) >= law.gap_px / shown.max((1, 2)) - 1e-6).all()
    # control: by all the room there is, tiles of a law with less of it would leave their jitter
    wider = boxes_of(draw(family(dataclasses.replace(law, jitter_px=None), law.fixed_views, snap=snap), size, np.arange(count)))
    assert law.jitter_px is None or np.abs(wider - boxes).max() > 4


LAWS: dict[str, tuple[CropLaw, int]] = {
    "independent": (Independent(), 3),
    "paired": (Paired(), 2),
    "disjoint": (Disjoint(), 4),
    "overlapping": (Overlapping(of="f"), 3),
    "inside": (Inside(of="anchor"), 3),
    "scattered": (Scattered(sides_px=(16, 60)), 5),
    "center": (Center(), 1),
    "grid": (Grid(), 9),
    "tiles": (Tiles(), 9),
}


def of_law(name: str, *, snap: Snap = "pixel", min_side_px: int = 16) -> tuple[ViewFamily, ...]:
    law, views = LAWS[name]
    anchor = family(Independent(area_frac=(0.3, 1.0)), views=2, name="anchor", snap=snap, min_side_px=min_side_px)
    mine = family(law, views, snap=snap, min_side_px=min_side_px)
    return (anchor, mine) if name == "inside" else (mine,)


@settings(max_examples=60)
@given(
    st.sampled_from(list(LAWS)), st.sampled_from(["pixel", "none"]), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 16])
)
def test_boxes_lie_on_the_grid_within_the_picture_whatever_its_size(
    name: str, snap: Snap, height: int, width: int, min_side_px: int
) -> None:
    drawn = draw(of_law(name, snap=snap, min_side_px=min_side_px), (height, width), np.arange(20))
    boxes = boxes_of(drawn)
    cells = boxes * (1 if snap == "pixel" else 1024)
    assert (cells == np.rint(cells)).all()
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] <= [width, height]).all() and (boxes[..., 2:] > boxes[..., :2]).all()
    roomy = min(height, width) >= 64 and max(height, width) < 1.3 * min(height, width) and bool(drawn.valid.any())
    if snap == "none" and name not in ("center", "grid") and roomy:  # a view that fits nowhere shows the whole picture
        assert (boxes != np.rint(boxes)).any()  # else a law may have fallen back to whole pixels


@pytest.mark.parametrize("name", ["independent", "paired", "disjoint", "overlapping", "inside", "scattered", "tiles"])
def test_a_picture_too_small_gives_its_whole_frame_and_invalid_views(name: str) -> None:
    drawn = draw(of_law(name), [(15, 700), (480, 640), (1, 1)], [4, 5, 6])
    assert drawn.valid.all(-1).tolist() == [False, True, False] and not drawn.valid[[0, 2]].any()
    assert not drawn.accepted[[0, 2]].any()
    boxes = boxes_of(drawn)
    assert (boxes[0] == [0, 0, 700, 15]).all() and (boxes[2] == [0, 0, 1, 1]).all()
    alone = draw(of_law(name), (480, 640), 5)
    np.testing.assert_array_equal(boxes[1], boxes_of(alone)[0])  # small neighbors change nothing


@pytest.mark.parametrize("name", list(LAWS))
def test_a_record_does_not_depend_on_the_batch_it_is_drawn_in(name: str) -> None:
    generator = np.random.default_rng(0)
    ids, sizes = generator.permutation(10_000)[:40], generator.integers(10, 700, (40, 2))
    families = of_law(name)
    together = draw(families, sizes, ids, seed=5, epoch=2)
    for k in range(0, 40, 7):
        alone = draw(families, sizes[k], ids[k], seed=5, epoch=2)
        assert torch.equal(alone.geometry.boxes[0], together.geometry.boxes[k]) and torch.equal(alone.valid[0], together.valid[k])


@pytest.mark.parametrize("name", ["independent", "paired", "disjoint", "overlapping", "inside", "scattered", "tiles"])
def test_seed_epoch_sample_and_name_each_change_the_draw(name: str) -> None:
    families = of_law(name)
    first = boxes_of(draw(families, (480, 640), 3))
    renamed = tuple(dataclasses.replace(one, name="g") if one.name == "f" else one for one in families) if name != "overlapping" else None
    others = [draw(families, (480, 640), 3, seed=1), draw(families, (480, 640), 3, epoch=1), draw(families, (480, 640), 4)]
    others += [draw(renamed, (480, 640), 3)] if renamed else []
    for other in others:
        assert (boxes_of(other) != first).any(-1).all()
    np.testing.assert_array_equal(boxes_of(draw(families, (480, 640), 3)), first)


def test_other_families_and_another_size_change_no_draw() -> None:
    mine = dataclasses.replace(family(Independent(), 3, mirror="view"), turns=True)
    alone = draw(mine, (480, 640), np.arange(50))
    before = family(Disjoint(), 4, name="other", mirror="view")
    beside = draw((before, mine), (480, 640), np.arange(50))
    enlarged = draw(dataclasses.replace(mine, size_px=(96, 80)), (480, 640), np.arange(50))
    fewer = draw(dataclasses.replace(mine, views=2), (480, 640), np.arange(50))
    for name in ("boxes", "flipped", "quarter_turns"):
        assert torch.equal(getattr(alone.geometry, name), getattr(beside.geometry, name))
        assert torch.equal(getattr(alone.geometry, name), getattr(enlarged.geometry, name))
        assert torch.equal(getattr(alone.geometry, name)[:, :2], getattr(fewer.geometry, name))


def test_mirrors_follow_their_policy_and_turns_are_uniform() -> None:
    ids = np.arange(20_000)
    turned = dataclasses.replace(family(Center(), 2, mirror="view"), turns=True)
    geometry = draw(turned, (100, 100), ids).geometry
    flipped, turns = geometry.flipped.numpy(), geometry.quarter_turns.numpy()
    joint = np.bincount((flipped[:, 0] * 2 + flipped[:, 1]) * 16 + turns[:, 0] * 4 + turns[:, 1], minlength=64)
    assert stats.chisquare(joint).pvalue > SIGNIFICANT  # mirrors and turns of two views: all independent

    both = (family(Center(), 2, name="one", mirror="picture"), family(Center(), 3, mirror="picture"))
    one, two = (draw(both[: k + 1], (100, 100), ids).geometry.flipped.numpy() for k in range(2))
    assert (one == one[:, :1]).all() and (two == one[:, :1]).all()
    assert stats.binomtest(int(one[:, 0].sum()), len(ids)).pvalue > SIGNIFICANT
    assert not draw(family(Center()), (100, 100), ids).geometry.flipped.any()


def test_drawn_for_decides_the_draw_and_the_shown_picture_its_size() -> None:
    recipe = ViewRecipe(families=(family(Independent(area_frac=(0.2, 0.2))),))
    sizes = np.array([[300, 400], [600, 800]], np.int32)
    shown = draw_records(recipe, seed=0, epoch=0, drawn_for=np.array([8, 8]), sample=np.array([8, 9]), source_size=sizes)[0].geometry
    assert shown.sample.tolist() == [8, 9] and shown.drawn_for.tolist() == [8, 8]
    np.testing.assert_allclose(2 * shown.boxes[0, 0].numpy(), shown.boxes[1, 0].numpy(), atol=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Independent(area_frac=(0.5, 0.2)), r"area_frac=\(0\.5, 0\.2\): needs 0 < low <= high <= 1"),
        (lambda: Independent(tries=0), "tries=0: needs at least 1"),
        (lambda: Inside(of="a", tries=0), "tries=0: needs at least 1"),
        (lambda: Disjoint(min_gap_frac=-1), "min_gap_frac=-1"),
        (lambda: Overlapping(of="a", min_shared_frac=0), "0 < min_shared_frac <= 1"),
        (lambda: Paired(position_min=2.0), "needs 0 <= min < max"),
        (lambda: Center(resize_px=256), "give both, or neither"),
        (lambda: Grid(side_frac=1.5), "0 < side_frac <= 1"),
        (
            lambda: Tiles(tile_px=90),
            r"tile_px=90, gap_px=0: 3 x 3 cells of a window of 255 px have 85 px; take smaller tiles, or a smaller gap",
        ),
        (lambda: Tiles(gap_px=40), r"tile_px=64, gap_px=40: 3 x 3 cells of a window of 255 px have 58.3333 px; take smaller tiles"),
        (lambda: Tiles(gap_px=128), r"gap_px=128: leaves nothing of 3 x 3 cells of a window of 255 px; needs less than 127.5"),
        (lambda: Tiles(jitter_px=22), r"jitter_px=22: tiles of 64 px have 21 px of room in 3 x 3 cells of a window of 255 px"),
        (lambda: Tiles(rows=0), "rows=0, .*all else needs at least 1"),
        (lambda: family(Tiles(), views=4), "views=4 of family 'f': the tiles law draws 9; take views=9"),
        (lambda: family(Paired(), views=3), "views=3 of family 'f': the paired law draws 2; take views=2"),
        (lambda: family(Grid(), views=3), "views=3 of family 'f': the grid law draws 9; take views=9"),
        (lambda: family(Independent(), views=257), "needs 1 to 256"),
        (lambda: ViewRecipe(families=(family(Inside(of="f")),)), "family 'f' refers to 'f', which must come before it"),
        (lambda: ViewRecipe(families=(family(Overlapping(of="g")), family(Center(), name="g"))), "refers to 'g', which must come before"),
        (lambda: ViewRecipe(families=(family(Center()), family(Center()))), "each name once"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
