"""How far two renderings of the same records lie apart, and the rendering that both are held to.

Here: the float64 reference for whole batches, differences in levels, away from a view's borders and at them.
Not here: where pixels come from (prove.py), the reference itself (wherefrom.kernels.render_views_reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelErrors:
    """Absolute differences in levels of 255; NaN where there is no such pixel."""

    inside_mean: float
    inside_worst: float
    border_mean: float
    border_worst: float


def reference_levels(pictures: Sequence[NDArray[np.uint8]], record: Record) -> Tensor:
    """Render one family by the definition.

    Shapes: B pictures (H, W, 3) as stored, before their EXIF orientation is undone -> (B, V, 3, h, w) float64, levels 0..255.
    """
    geometry, photometric = record.geometry, record.photometric
    matrices = color_matrix(photometric)
    views = [
        render_views_reference(
            torch.tensor(picture),
            geometry.boxes[b],
            geometry.flipped[b],
            geometry.quarter_turns[b],
            geometry.size_px,
            orientation=int(geometry.stored_orientation[b]),
            matrix=matrices[b],
            blur_sigma_px=photometric.blur_sigma_px[b],
            solarized=photometric.solarized[b],
        )
        for b, picture in enumerate(pictures)
    ]
    return torch.stack(views)


def levels(pixels: Tensor, recipe: ViewRecipe) -> Tensor:
    """Return a recipe's pixels (..., 3, h, w) as levels 0..255: float64, on the CPU, not normalized."""
    values = pixels.cpu().double()
    if recipe.pixels == "uint8":
        return values
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (recipe.mean, recipe.std))
    return (values * std + mean) * 255


def away_from_borders(record: Record) -> Tensor:
    """Return which pixels lie two supports of the resize, and the radius of the blur, inside their view: (B, V, 1, h, w) bool."""
    geometry, photometric = record.geometry, record.photometric
    height, width = geometry.size_px
    odd = geometry.quarter_turns % 2 == 1
    across = torch.stack([torch.where(odd, height, width), torch.where(odd, width, height)], -1)  # view pixels along source x and y
    scale = (geometry.boxes[..., 2:] - geometry.boxes[..., :2]) / across
    margin = (2 * scale.clamp(min=1) / scale).ceil() + (3 * photometric.blur_sigma_px).ceil()[..., None]
    margin_x = torch.where(odd, margin[..., 1], margin[..., 0])[..., None]
    margin_y = torch.where(odd, margin[..., 0], margin[..., 1])[..., None]
    x, y = torch.arange(width), torch.arange(height)
    columns = (x >= margin_x) & (x < width - margin_x)
    rows = (y >= margin_y) & (y < height - margin_y)
    return (rows[..., :, None] & columns[..., None, :]).unsqueeze(2)


def level_errors(a: Tensor, b: Tensor, inside: Tensor) -> LevelErrors:
    """Compare two renderings in levels.

    Shapes: a and b (B, V, 3, h, w), inside (B, V, 1, h, w) bool.
    """
    error, inside = (a.double() - b.double()).abs(), inside.expand_as(a)

    def mean_and_worst(part: Tensor) -> tuple[float, float]:
        return (float(part.mean()), float(part.max())) if part.numel() else (float("nan"), float("nan"))

    inside_mean, inside_worst = mean_and_worst(error[inside])
    border_mean, border_worst = mean_and_worst(error[~inside])
    return LevelErrors(inside_mean=inside_mean, inside_worst=inside_worst, border_mean=border_mean, border_worst=border_worst)
