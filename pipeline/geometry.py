"""Maps between view pixels and source pixels: the page of conventions.

Here: pure functions on coordinates, any device; maps are (..., 2, 3) float64 and carry column points (x, y, 1).
Not here: drawing boxes (crops.py), touching pixels (render/), pair targets (wherefrom.kernels.pair_targets).
A coordinate that is not a number is never looked for, for that would wait for the device: what depends on it comes out as nan.
Convention: x right, y down; pixel i covers [i, i + 1), its center is i + 0.5; boxes are half-open xyxy; sizes are (height, width).
A view is cropped, resized, mirrored left-right, then turned counter-clockwise: `torch.rot90(k, (-2, -1))`.
"""

import torch
from torch import Tensor

# Where a finished view's unit coordinates (u, v) lie in its box, for [quarter turns][mirrored]: rows (u', v') over columns (u, v, 1).
_UNIT_TO_BOX = torch.tensor(
    [
        [[[1, 0, 0], [0, 1, 0]], [[-1, 0, 1], [0, 1, 0]]],
        [[[0, -1, 1], [1, 0, 0]], [[0, 1, 0], [1, 0, 0]]],
        [[[-1, 0, 1], [0, -1, 1]], [[1, 0, 0], [0, -1, 1]]],
        [[[0, 1, 0], [-1, 0, 1]], [[0, -1, 1], [-1, 0, 1]]],
    ],
    dtype=torch.float64,
)


def view_to_source(boxes: Tensor, flipped: Tensor, quarter_turns: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Return the maps from finished views to the source.

    Shapes: boxes (..., 4) xyxy, flipped (...) bool, quarter_turns (...) integer -> (..., 2, 3) float64.
    Units:  view pixels in [0, width] x [0, height] -> source pixels.
    Raises: ValueError if mirrors or turns are parts of numbers.
    """
    for name, tensor in (("flipped", flipped), ("quarter_turns", quarter_turns)):
        if tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected {'torch.bool' if name == 'flipped' else 'an integer type'}")
    corners = boxes.double()
    unit = _UNIT_TO_BOX.to(boxes.device)[quarter_turns.long() % 4, flipped.long()]
    extent = (corners[..., 2:] - corners[..., :2]).unsqueeze(-1)  # (..., 2, 1)
    maps = unit * extent
    maps[..., 0] /= size_px[1]
    maps[..., 1] /= size_px[0]
    maps[..., 2] += corners[..., :2]
    return maps


def invert(maps: Tensor) -> Tensor:
    """Return the inverse maps, (..., 2, 3) float64; an empty box has none: its entries are not finite."""
    a, b, c, d = maps[..., 0, 0], maps[..., 0, 1], maps[..., 1, 0], maps[..., 1, 1]
    inverse = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)) / (a * d - b * c)[..., None, None]
    return torch.cat([inverse, -inverse @ maps[..., 2:]], -1)


def compose(b_to_c: Tensor, a_to_b: Tensor) -> Tensor:
    """Return a_to_c = b_to_c after a_to_b, (..., 2, 3) float64."""
    linear = b_to_c[..., :2] @ a_to_b
    return torch.cat([linear[..., :2], linear[..., 2:] + b_to_c[..., 2:]], -1)


def map_points(maps: Tensor, points: Tensor) -> Tensor:
    """Carry points through maps; nothing is clamped.

    Shapes: maps (..., 2, 3), points (..., N, 2) as (x, y) -> (..., N, 2) float64.
    """
    return points.double() @ maps[..., :2].mT + maps[..., 2].unsqueeze(-2)


def map_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Carry boxes through maps that keep axes parallel (every map here does); nothing is clamped.

    Shapes: maps (..., 2, 3), boxes (..., N, 4) xyxy -> (..., N, 4) float64, xyxy with x0 <= x1 and y0 <= y1.
    """
    first, second = map_points(maps, boxes[..., :2]), map_points(maps, boxes[..., 2:])
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def area(boxes: Tensor) -> Tensor:
    """Return the areas of boxes (..., 4) as (...) float64; inverted boxes have none."""
    sides = (boxes[..., 2:].double() - boxes[..., :2].double()).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return what two boxes (..., 4) share, as boxes (..., 4) float64; inverted (of no area) where they share nothing."""
    a, b = a.double(), b.double()
    return torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1)


def overlap_area(a: Tensor, b: Tensor) -> Tensor:
    """Return the area that boxes (..., 4) share, (...) float64."""
    return area(intersection(a, b))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of boxes (..., 4), (...) float64; 0 where both are empty."""
    shared = overlap_area(a, b)
    union = area(a) + area(b) - shared
    return torch.where(union == 0, torch.zeros_like(union), shared / union)


def visible_fraction(boxes: Tensor, frame_hw: tuple[int, int] | Tensor) -> Tensor:
    """Return which part of each box lies within [0, width] x [0, height].

    Shapes: boxes (..., 4), frame_hw (height, width) or a tensor that broadcasts to (..., 2) -> (...) float64; 0 for empty boxes.
    """
    hw = torch.as_tensor(frame_hw, dtype=torch.float64, device=boxes.device)
    frame = torch.stack([torch.zeros_like(hw[..., 0]), torch.zeros_like(hw[..., 0]), hw[..., 1], hw[..., 0]], -1)
    whole = area(boxes)
    return torch.where(whole == 0, torch.zeros_like(whole), overlap_area(boxes, frame) / whole)


def token_boxes(maps: Tensor, size_px: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return where every token cell of a view lies in the source.

    Shapes: maps view_to_source (..., 2, 3), size_px (height, width), grid (rows, cols) -> (..., N, 4) float64, n = row * cols + col.
    """
    y = torch.linspace(0, size_px[0], grid[0] + 1, dtype=torch.float64, device=maps.device)
    x = torch.linspace(0, size_px[1], grid[1] + 1, dtype=torch.float64, device=maps.device)
    x0, y0 = x[:-1].expand(grid), y[:-1, None].expand(grid)
    x1, y1 = x[1:].expand(grid), y[1:, None].expand(grid)
    return map_boxes(maps, torch.stack([x0, y0, x1, y1], -1).flatten(0, 1))


def grid_sample_theta(maps: Tensor, size_px: tuple[int, int], source_size: Tensor) -> Tensor:
    """Return theta for `torch.nn.functional.affine_grid(theta, size, align_corners=False)` that cuts the views from their sources.

    Shapes: maps view_to_source (..., 2, 3), size_px (height, width), source_size (..., 2) (height, width) -> (..., 2, 3) float64.
    """
    view_from_unit = maps.new_tensor([[size_px[1] / 2, 0, size_px[1] / 2], [0, size_px[0] / 2, size_px[0] / 2]])
    wh = source_size.to(maps).flip(-1)
    theta = compose(maps, view_from_unit) * (2 / wh).unsqueeze(-1)
    theta[..., 2] -= 1
    return theta
