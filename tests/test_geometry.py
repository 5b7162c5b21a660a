"""Maps between views and sources: against torch.rot90 and flip on index pictures, brute force on pixel grids, and affine_grid."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wherefrom.kernels.render_views_reference import UNDO_EXIF, reorient
from wherefrom.pipeline import geometry
from wherefrom.pipeline.decode import upright
from wherefrom.pipeline.views import Batch, Photometric, Record, ViewGeometry, Views

pytestmark = pytest.mark.core

ORIENTATIONS = list(product((False, True), range(4)))

sides = st.integers(1, 60)
orientations = st.sampled_from(ORIENTATIONS)


@st.composite
def boxes_px(draw: st.DrawFn) -> Tensor:
    """A box (4,) float32 of whole or 1/1024 pixels, at least one pixel wide and high, anywhere up to 2^14."""
    grain = draw(st.sampled_from([1, 1024]))
    x, y = draw(st.integers(-1000, 15000)), draw(st.integers(-1000, 15000))
    w, h = draw(st.integers(grain, 1300 * grain)), draw(st.integers(grain, 1300 * grain))
    return torch.tensor([x, y, x + w / grain, y + h / grain], dtype=torch.float64).float()


@st.composite
def maps_and_sizes(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int]]:
    """A map view -> source (2, 3) with the size of its view, (height, width)."""
    size_px = draw(sides), draw(sides)
    flipped, turns = draw(orientations)
    return geometry.view_to_source(draw(boxes_px()), torch.tensor(flipped), torch.tensor(turns), size_px), size_px


def record(boxes: Tensor, flipped: Tensor, turns: Tensor, size_px: tuple[int, int], source_size: tuple[int, int]) -> ViewGeometry:
    """A record of views (B, V) of pictures of one size."""
    b, v = boxes.shape[:2]
    return ViewGeometry(
        boxes=boxes.float(),
        flipped=flipped,
        quarter_turns=turns,
        source_size=torch.tensor(source_size, dtype=torch.int32).expand(b, 2),
        stored_orientation=torch.ones(b, dtype=torch.uint8),
        sample=torch.arange(b),
        drawn_for=torch.arange(b),
        view=torch.arange(v),
        family="f",
        size_px=size_px,
        seed=0,
        epoch=0,
    )


def all_orientations(box: Tensor, size_px: tuple[int, int], source_size: tuple[int, int]) -> ViewGeometry:
    """The eight views (1, 8) of one box, square views or not."""
    flipped, turns = (torch.tensor(column)[None] for column in zip(*ORIENTATIONS, strict=True))
    return record(box.expand(1, 8, 4), flipped, turns, size_px, source_size)


@pytest.mark.parametrize(("flipped", "turns"), ORIENTATIONS)
def test_map_names_the_pixel_that_flip_and_rot90_put_there(flipped: bool, turns: int) -> None:
    height, width = 7, 11
    source = torch.arange(height * width).view(height, width)
    x0, y0, x1, y1 = 2, 1, 9, 6
    view = source[y0:y1, x0:x1]
    view = torch.rot90(view.flip(-1) if flipped else view, turns, (-2, -1))
    to_source = geometry.view_to_source(torch.tensor([x0, y0, x1, y1]), torch.tensor(flipped), torch.tensor(turns), tuple(view.shape))
    rows, cols = torch.meshgrid(torch.arange(view.shape[0]), torch.arange(view.shape[1]), indexing="ij")
    points = geometry.map_points(to_source, torch.stack([cols, rows], -1).flatten(0, 1) + 0.5)
    assert torch.equal(points % 1, torch.full_like(points, 0.5))
    x, y = points.long().unbind(-1)
    assert torch.equal(source[y, x], view.flatten())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_undoes_every_exif_orientation(orientation: int) -> None:
    stored = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    expected = reorient(torch.from_numpy(stored).permute(2, 0, 1), *UNDO_EXIF[orientation]).permute(1, 2, 0)
    np.testing.assert_array_equal(upright(stored, orientation), expected.numpy())


@given(maps_and_sizes(), st.floats(-100, 100), st.floats(-100, 100))
def test_source_to_view_undoes_view_to_source(made: tuple[Tensor, tuple[int, int]], x: float, y: float) -> None:
    to_source, _ = made
    points = torch.tensor([[x, y]], dtype=torch.float64)
    back = geometry.map_points(geometry.invert(to_source), geometry.map_points(to_source, points))
    torch.testing.assert_close(back, points, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        geometry.compose(geometry.invert(to_source), to_source), torch.eye(2, 3, dtype=torch.float64), rtol=0, atol=1e-8
    )


@given(maps_and_sizes(), maps_and_sizes(), st.floats(-100, 100), st.floats(-100, 100))
def test_composed_map_is_one_map_after_the_other(
    a: tuple[Tensor, tuple[int, int]], b: tuple[Tensor, tuple[int, int]], x: float, y: float
) -> None:
    a_to_source, source_to_b = a[0], geometry.invert(b[0])
    points = torch.tensor([[x, y]], dtype=torch.float64)
    one = geometry.map_points(geometry.compose(source_to_b, a_to_source), points)
    two = geometry.map_points(source_to_b, geometry.map_points(a_to_source, points))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-6)


@given(boxes_px(), orientations, sides, sides)
def test_view_corners_map_to_box_corners_exactly(box: Tensor, orientation: tuple[bool, int], height: int, width: int) -> None:
    flipped, turns = orientation
    to_source = geometry.view_to_source(box, torch.tensor(flipped), torch.tensor(turns), (height, width))
    whole = torch.tensor([[0.0, 0.0, width, height]])
    torch.testing.assert_close(geometry.map_boxes(to_source, whole)[0], box.double(), rtol=0, atol=1e-9)


@given(boxes_px(), orientations, sides, sides)
def test_two_flips_are_identity(box: Tensor, orientation: tuple[bool, int], height: int, width: int) -> None:
    flipped, turns = orientation
    plain, mirrored = (geometry.view_to_source(box, torch.tensor(f), torch.tensor(turns), (height, width)) for f in (flipped, not flipped))
    # within the view, the mirror left-right is x -> width - x before the turn: after an odd turn it is y -> height - y
    mirror = torch.tensor([[1.0, 0, 0], [0, -1, height]] if turns % 2 else [[-1.0, 0, width], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(geometry.compose(plain, mirror), mirrored, rtol=0, atol=1e-9)
    torch.testing.assert_close(geometry.compose(geometry.compose(plain, mirror), mirror), plain, rtol=0, atol=1e-9)


@given(boxes_px(), orientations, sides, sides)
def test_four_turns_are_identity_and_one_turn_is_a_quarter(box: Tensor, orientation: tuple[bool, int], height: int, width: int) -> None:
    flipped, turns = torch.tensor(orientation[0]), orientation[1]
    once, twice = (geometry.view_to_source(box, flipped, torch.tensor(turns + k), (height, width)) for k in (1, 2))
    again = geometry.view_to_source(box, flipped, torch.tensor(turns + 4), (height, width))
    before = geometry.view_to_source(box, flipped, torch.tensor(turns), (width, height))
    assert torch.equal(again, geometry.view_to_source(box, flipped, torch.tensor(turns), (height, width)))
    # a point (x, y) of the view after one more turn was at (width - y, x) of the view before it, which is `width` wide
    quarter = torch.tensor([[0.0, -1, height], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(geometry.compose(before, quarter), once, rtol=0, atol=1e-9)
    half = torch.tensor([[-1.0, 0, width], [0, -1, height]], dtype=torch.float64)
    plain = geometry.view_to_source(box, flipped, torch.tensor(turns), (height, width))
    torch.testing.assert_close(geometry.compose(plain, half), twice, rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(st.data())
def test_box_seen_from_another_view_agrees_with_brute_force_on_its_pixels(data: st.DataObject) -> None:
    source_size = (40, 50)
    corners = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(4, 20), st.integers(4, 20))
    (ax, ay, aw, ah), (bx, by, bw, bh) = data.draw(corners), data.draw(corners)
    flipped, turns = data.draw(orientations)
    factor = data.draw(st.integers(1, 3))  # the view enlarges b by a whole factor, so its pixels lie inside one source pixel each
    size_px = (bw * factor, bh * factor) if turns % 2 else (bh * factor, bw * factor)
    a = record(torch.tensor([[[ax, ay, ax + aw, ay + ah]]]), torch.tensor([[True]]), torch.tensor([[1]]), (8, 8), source_size)
    b = record(torch.tensor([[[bx, by, bx + bw, by + bh]]]), torch.tensor([[flipped]]), torch.tensor([[turns]]), size_px, source_size)

    inside_a = torch.zeros(60, 60, dtype=torch.bool)
    inside_a[ay : ay + ah, ax : ax + aw] = True
    shown = inside_a[by : by + bh, bx : bx + bw].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    shown = torch.rot90(shown.flip(-1) if flipped else shown, turns, (-2, -1))  # what of a the finished view b shows
    x0, y0, x1, y1 = a.seen_from(b)[0, 0, 0].tolist()
    rows, cols = torch.arange(size_px[0])[:, None] + 0.5, torch.arange(size_px[1]) + 0.5
    assert torch.equal(shown, (rows > y0) & (rows < y1) & (cols > x0) & (cols < x1))

    union = inside_a.clone()
    union[by : by + bh, bx : bx + bw] = True
    shared = int(inside_a[by : by + bh, bx : bx + bw].sum())
    assert a.overlap_area(b).item() == shared
    assert a.iou(b).item() == pytest.approx(shared / int(union.sum()), abs=1e-12)
    fraction = geometry.visible_fraction(a.seen_from(b)[0, 0], size_px)
    assert fraction.item() == pytest.approx(shared / (aw * ah), abs=1e-9)


def drawn_record(generator: torch.Generator, views: int, size_px: tuple[int, int]) -> ViewGeometry:
    """A record (20, views) of boxes of whole pixels anywhere in a picture of 90 x 80, in all orientations."""
    shape = (20, views)
    x, y = torch.randint(0, 50, (2, *shape), generator=generator)
    w, h = torch.randint(1, 40, (2, *shape), generator=generator)
    flipped, turns = torch.rand(shape, generator=generator) < 0.5, torch.randint(0, 4, shape, generator=generator)
    return record(torch.stack([x, y, x + w, y + h], -1), flipped, turns, size_px, (80, 90))


def in_the_source(views: ViewGeometry, boxes: Tensor, bins: tuple[int, int]) -> Tensor:
    """Return where the centers of a grid of bins (rows, columns) over boxes (B, V, W, 4) of view pixels lie: (B, V, W, rows, cols, 2)."""
    rows, cols = ((torch.arange(n).double() + 0.5) / n for n in bins)
    x0, y0, x1, y1 = boxes[..., None, None].unbind(-3)
    x, y = torch.broadcast_tensors(x0 + (x1 - x0) * cols, y0 + (y1 - y0) * rows[:, None])
    points = torch.stack([x, y], -1).flatten(-3, -2)
    return geometry.map_points(views.view_to_source.unsqueeze(2), points).unflatten(-2, bins)


@pytest.mark.parametrize("seed", range(3))
def test_common_boxes_lie_where_both_views_do_and_one_turns_into_the_other(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = drawn_record(generator, 3, (24, 16)), drawn_record(generator, 4, (7, 9))
    common = one.common(other)
    shared = geometry.intersection(one.boxes[:, :, None], other.boxes[:, None])
    meets = (shared[..., :2] < shared[..., 2:]).all(-1)
    assert torch.equal(common.area > 0, meets) and 60 < meets.sum() < 200
    assert torch.equal(common.area, one.overlap_area(other))
    for views, boxes in ((one, common.boxes), (other, common.other_boxes.transpose(1, 2))):
        back = geometry.map_boxes(views.view_to_source, boxes)
        kept, expected = (meets, shared) if views is one else (meets.transpose(1, 2), shared.transpose(1, 2))
        torch.testing.assert_close(back[kept], expected[kept], rtol=0, atol=1e-9)

    bins = in_the_source(one, common.boxes, (5, 5))
    seen = in_the_source(other, common.other_boxes.transpose(1, 2), (5, 5)).transpose(1, 2)
    assert len({*zip(common.flipped[meets].tolist(), common.quarter_turns[meets].tolist(), strict=True)}) == 8
    for b, v, w in meets.nonzero().tolist():
        grid = bins[b, v, w].flip(1) if common.flipped[b, v, w] else bins[b, v, w]
        turned = [torch.rot90(grid, int(common.quarter_turns[b, v, w]) + extra) for extra in range(4)]
        torch.testing.assert_close(turned[0], seen[b, v, w], rtol=0, atol=1e-9)
        assert all(not torch.allclose(wrong, seen[b, v, w]) for wrong in turned[1:])  # control


def test_views_that_share_nothing_have_an_area_of_0_and_boxes_of_zeros() -> None:
    def one_view(box: list[float]) -> ViewGeometry:
        return record(torch.tensor([[box]]), torch.tensor([[True]]), torch.tensor([[3]]), (16, 16), (64, 64))

    left, apart, beside, corner = (one_view(box) for box in ([0, 0, 8, 8], [9, 0, 20, 8], [8, 0, 20, 8], [7, 7, 20, 20]))
    for other, area in ((apart, 0), (beside, 0), (corner, 1)):
        common = left.common(other)
        assert common.area.item() == area
        for boxes in (common.boxes, common.other_boxes):
            assert bool((boxes == 0).all()) == (area == 0) and bool(boxes.isfinite().all())


@pytest.mark.parametrize("place", range(4))
def test_what_depends_on_a_number_that_is_none_is_none(place: int) -> None:
    whole, broken = torch.tensor([2.0, 3, 9, 8]), torch.tensor([2.0, 3, 9, 8])
    broken[place] = torch.nan
    assert geometry.iou(whole, whole) == 1 and geometry.visible_fraction(whole, (20, 20)) == 1
    for number in (
        geometry.area(broken),
        geometry.overlap_area(broken, whole),
        geometry.iou(broken, whole),
        geometry.iou(whole, broken),
        geometry.iou(broken, broken),
        geometry.visible_fraction(broken, (20, 20)),
    ):
        assert number.isnan()


@pytest.mark.parametrize("name", ["flipped", "quarter_turns"])
def test_parts_of_mirrors_and_turns_are_refused(name: str) -> None:
    given = {"boxes": torch.tensor([0.0, 0, 4, 4]), "flipped": torch.tensor(True), "quarter_turns": torch.tensor(1), "size_px": (8, 8)}
    geometry.view_to_source(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^{name} is torch\.float32, expected "):
        geometry.view_to_source(**given | {name: torch.tensor(0.9)})  # type: ignore[arg-type]


def test_own_box_fills_the_view_in_every_orientation() -> None:
    views = all_orientations(torch.tensor([3.0, 5, 24, 17]), (6, 14), (30, 40))
    own = torch.diagonal(views.seen_from(views)[0], dim1=0, dim2=1).T
    torch.testing.assert_close(own, torch.tensor([0.0, 0, 14, 6], dtype=torch.float64).expand(8, 4), rtol=0, atol=1e-12)


def test_token_cells_tile_the_box_and_stay_in_reading_order_of_the_view() -> None:
    box, size_px, grid = torch.tensor([3.0, 5, 27, 17]), (6, 12), (2, 3)
    views = all_orientations(box, size_px, (30, 40))
    cells = views.token_boxes(grid)
    assert cells.shape == (1, 8, 6, 4)
    torch.testing.assert_close(geometry.area(cells).sum(-1), torch.full((1, 8), 24.0 * 12, dtype=torch.float64))
    for v, (flipped, turns) in enumerate(ORIENTATIONS):
        # an independent truth: number the cells of the box in the source, then mirror and turn the numbers
        rows, cols = (grid[1], grid[0]) if turns % 2 else grid
        numbers = torch.arange(rows * cols).view(rows, cols)
        seen = torch.rot90(numbers.flip(-1) if flipped else numbers, turns, (-2, -1)).flatten()
        row, col = seen // cols, seen % cols
        expected = torch.stack([3 + col * 24 / cols, 5 + row * 12 / rows, 3 + (col + 1) * 24 / cols, 5 + (row + 1) * 12 / rows], -1)
        torch.testing.assert_close(cells[0, v], expected.double(), rtol=0, atol=1e-12)


def test_tokens_seen_from_another_view_lie_where_the_pixels_are() -> None:
    whole = record(torch.tensor([[[0, 0, 40, 32]]]), torch.tensor([[False]]), torch.tensor([[0]]), (32, 40), (32, 40))
    part = all_orientations(torch.tensor([8.0, 8, 40, 32]), (24, 32), (32, 40))
    cells, fraction = whole.tokens_seen_from(part, (4, 5))
    assert cells.shape == (1, 1, 8, 20, 4) and fraction.shape == (1, 1, 8, 20)
    # the cells of 8 source pixels: the part shows all but the first row and the first column
    expected = torch.ones(4, 5, dtype=torch.float64)
    expected[0], expected[:, 0] = 0, 0
    torch.testing.assert_close(fraction[0, 0], expected.flatten().expand(8, 20), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("flipped", "turns"), ORIENTATIONS)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_theta_lets_grid_sample_cut_the_view(flipped: bool, turns: int, shift: float) -> None:
    """Enlarging by a whole number with grid_sample(nearest) must show exactly the pixels; the shifted box is the negative control."""
    source = torch.arange(20 * 30, dtype=torch.float64).view(1, 1, 20, 30)
    x0, y0, x1, y1 = 4, 3, 16, 11
    size_px = (24, 16) if turns % 2 else (16, 24)
    box = torch.tensor([[x0, y0, x1, y1]]) + shift
    to_source = geometry.view_to_source(box, torch.tensor([flipped]), torch.tensor([turns]), size_px)
    theta = geometry.grid_sample_theta(to_source, size_px, torch.tensor([[20, 30]], dtype=torch.int32))
    grid = torch.nn.functional.affine_grid(theta, [1, 1, *size_px], align_corners=False)
    cut = torch.nn.functional.grid_sample(source, grid, mode="nearest", align_corners=False)[0, 0]
    expected = source[0, 0, y0:y1, x0:x1].repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = torch.rot90(expected.flip(-1) if flipped else expected, turns, (-2, -1))
    assert torch.equal(cut, expected) == (shift == 0)


@given(boxes_px(), boxes_px())
def test_overlap_agrees_with_intervals(a: Tensor, b: Tensor) -> None:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.double().tolist(), b.double().tolist()
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    assert geometry.overlap_area(a, b).item() == pytest.approx(shared, rel=1e-12)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared
    assert geometry.iou(a, b).item() == pytest.approx(shared / union, rel=1e-12)


def test_empty_boxes_share_and_show_nothing() -> None:
    empty, box = torch.tensor([4.0, 4, 4, 4]), torch.tensor([0.0, 0, 8, 8])
    assert geometry.overlap_area(empty, box) == 0
    assert geometry.iou(empty, empty) == 0
    assert geometry.visible_fraction(empty, (8, 8)) == 0
    assert not geometry.invert(geometry.view_to_source(empty, torch.tensor(False), torch.tensor(0), (8, 8))).isfinite().all()


def test_float32_boxes_of_a_1024th_pixel_lose_nothing() -> None:
    corner = 2**14 - 2 + 1 / 1024
    box = torch.tensor([corner, 0.0, corner + 1, 1.0], dtype=torch.float64)
    assert torch.equal(box.float().double(), box)
    to_source = geometry.view_to_source(box.float(), torch.tensor(False), torch.tensor(0), (1, 1))
    assert to_source[0, 2] == corner


def _views(b: int = 4, v: int = 3) -> Views:
    corner = torch.arange(b * v).view(b, v, 1).repeat(1, 1, 2)
    geometry = record(torch.cat([corner, corner + 8], -1), torch.rand(b, v) < 0.5, torch.arange(b * v).view(b, v) % 4, (6, 5), (64, 64))
    return Views(
        pixels=torch.arange(b * v).view(b, v, 1, 1, 1).expand(b, v, 3, 6, 5).float(),
        geometry=geometry,
        valid=torch.ones(b, v, dtype=torch.bool),
        photometric=Photometric.unchanged(b, v),
    )


@pytest.mark.parametrize(
    ("index", "samples", "numbers"),
    [
        (1, [1], [0, 1, 2]),
        (-1, [3], [0, 1, 2]),
        (np.int64(2), [2], [0, 1, 2]),
        (torch.tensor(2), [2], [0, 1, 2]),
        (slice(1, 3), [1, 2], [0, 1, 2]),
        ([3, 0], [3, 0], [0, 1, 2]),
        ((slice(None), 2), [0, 1, 2, 3], [2]),
        ((slice(None), -1), [0, 1, 2, 3], [2]),
        ((torch.tensor([2, 0]), [1, 2]), [2, 0], [1, 2]),
        ((np.array([2, 0]), slice(0, 2)), [2, 0], [0, 1]),
        (torch.tensor([True, False, False, True]), [0, 3], [0, 1, 2]),
        ((slice(None), [True, False, True]), [0, 1, 2, 3], [0, 2]),
        ((slice(None), []), [0, 1, 2, 3], []),
    ],
)
def test_everything_is_indexed_together_and_axes_never_vanish(index: object, samples: list[int], numbers: list[int]) -> None:
    views = _views()
    part = views[index]
    expected = torch.tensor([[b * 3 + v for v in numbers] for b in samples]).view(len(samples), len(numbers)).long()
    assert torch.equal(part.pixels[:, :, 0, 0, 0].long(), expected)
    assert torch.equal(part.geometry.boxes[..., 0].long(), expected)
    assert part.geometry.sample.tolist() == samples and part.geometry.view.tolist() == numbers
    assert part.valid.shape == part.photometric.gray.shape == expected.shape


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, "sample 4 of 4; samples are numbered 0 to 3"),
        (-5, "sample -5 of 4; samples are numbered 0 to 3"),
        ((0, 3), "view 3 of 3; views are numbered 0 to 2"),
        ([0, 4], "sample 4 of 4; samples are numbered 0 to 3"),
        ((0, torch.tensor([1, -4])), "view -4 of 3; views are numbered 0 to 2"),
        ([True, False], "mask of 2 for 4 samples; give one value for each"),
        ((0, 0, 0), "index with 3 parts, views have two axes: samples and views"),
    ],
)
def test_index_out_of_range_is_named(index: object, message: str) -> None:
    with pytest.raises(IndexError, match=f"^{message}$"):
        _views()[index]


@pytest.mark.parametrize(
    ("index", "shown", "what"),
    [
        ("g", "'g'", "samples"),
        ((..., 0), "Ellipsis", "samples"),
        ((0, None), "None", "views"),
        (1.5, "1.5", "samples"),
        ((0, 2.0), "2.0", "views"),
        ((0, [0.0]), "[0.0]", "views"),
        (True, "True", "samples"),
        (torch.tensor(1.0), "tensor(1.)", "samples"),
        ([[0]], "[[0]]", "samples"),
        ({}, "{}", "samples"),
    ],
)
def test_what_is_no_index_is_refused_in_one_line(index: object, shown: str, what: str) -> None:
    views = _views()
    for thing in (views, views.geometry, views.photometric):
        message = f"^{re.escape(shown)} is no index of {what}; take a whole number, a slice, a row of numbers or a mask"
        with pytest.raises(IndexError, match=message) as refused:
            thing[index]
        assert "\n" not in str(refused.value)


def _batch() -> Batch:
    views = _views()
    each = {name: getattr(views.geometry, name) for name in ("sample", "drawn_for", "source_size")}
    return Batch(**each, label=torch.full((4,), -1), views=(views,))


def test_a_batch_is_indexed_by_samples_alone() -> None:
    with pytest.raises(IndexError, match=r"'f' is no index of samples; .*; batch\.family\(name\) finds views by their family$"):
        _batch()["f"]  # type: ignore[index]
    with pytest.raises(IndexError, match="index with 2 parts, a batch has one axis: samples; index the views of a family for both"):
        _batch()[0, 1]


def test_containers_show_shapes_and_no_numbers() -> None:
    batch = _batch()
    views = batch.family("f")
    assert repr(batch) == "Batch(4 samples, 'f' (4, 3, 3, 6, 5) float32, cpu)"
    assert repr(views) == "Views('f', pixels (4, 3, 3, 6, 5) float32, cpu)"
    assert repr(views.geometry) == "ViewGeometry('f', boxes (4, 3, 4) float32, size_px=(6, 5), seed=0, epoch=0, cpu)"
    assert repr(views.photometric) == "Photometric((4, 3), cpu)"
    assert repr(Record.of(views.geometry)) == f"Record({views.geometry!r})"
    assert repr(views.geometry.common(views.geometry)) == "CommonBoxes((4, 3, 3, 4) float64, cpu)"


def test_containers_check_one_another_and_name_what_does_not_fit() -> None:
    views = _views()
    with pytest.raises(ValueError, match=r"Views\.valid has shape \(4, 2\), expected \(4, 3\)"):
        Views(pixels=views.pixels, geometry=views.geometry, valid=views.valid[:, :2], photometric=views.photometric)
    with pytest.raises(ValueError, match=r"Views\.pixels has shape \(4, 3, 3, 5, 6\), expected \(4, 3, None, 6, 5\)"):
        Views(pixels=views.pixels.mT, geometry=views.geometry, valid=views.valid, photometric=views.photometric)
    with pytest.raises(ValueError, match=r"ViewGeometry\.boxes is torch\.float64, expected torch\.float32"):
        ViewGeometry(
            **{name: getattr(views.geometry, name) for name in ViewGeometry.__slots__ if name != "boxes"},
            boxes=views.geometry.boxes.double(),
        )


def test_batch_finds_families_by_name_and_slices_all_of_them() -> None:
    batch = _batch()
    part = batch[1:3]
    assert len(part) == 2 and part.family("f").geometry.sample.tolist() == [1, 2] and len(batch[-1]) == 1
    with pytest.raises(KeyError, match="family 'g': this batch holds"):
        batch.family("g")
