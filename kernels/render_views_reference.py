"""The view kernel's definition: one picture and its record in, finished views out, in float64 and as plainly as it can be said.

Here: dense weights along each axis, so that every output pixel is one sum that can be read off; slow, and meant to be.
Not here: decoding, drawing; the renderers that are held to this (wherefrom.pipeline.render).
Convention: as wherefrom.pipeline.geometry; the view's pixel i shows the source around box start + (i + 0.5) * scale.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import sides_of

Filter = Literal["plain", "centered"]

LEAST_VARIANCE = 1e-12  # square pixels; below it one tap has all the weight, and is the center

# What undoes each EXIF orientation, as (mirrored left-right, then quarter turns counter-clockwise).
# Source: CIPA DC-008 (EXIF 3.0), tag 0x0112.
UNDO_EXIF = {1: (False, 0), 2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1)}


def render_views_reference(
    picture: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    quarter_turns: Tensor,
    size_px: int | tuple[int, int],
    *,
    orientation: int = 1,
    matrix: Tensor | None = None,
    blur_sigma_px: Tensor | None = None,
    solarized: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    filter: Filter = "plain",
) -> Tensor:
    """Cut, resize, mirror, turn and color the views of one picture.

    The filter is a separable triangle, widened by the scale when shrinking, its taps at pixel centers. It reads on into the picture
    beyond the box; weight that falls outside the picture falls on the picture's edge pixel. "plain" takes the triangle as it is, its
    first moment up to 0.09 pixel off the sample's center when shrinking; "centered" tilts it until the moment is exact. Color:
    clip(matrix (r, g, b, 1), 0, 255), then blur, then solarize min(x, 255 - x), then (x / 255 - mean) / std.

    Shapes: picture (H, W, 3) as stored, boxes (V, 4) xyxy in the upright picture, flipped and quarter_turns (V,), size_px (height, width)
            of the finished view, or one number for a square; matrix (V, 3, 4), blur_sigma_px and solarized (V,), mean and std (3,)
            -> (V, 3, height, width) float64.
    Units:  levels 0..255 unless mean and std are given; blur_sigma_px in pixels of the finished view, 0 for none.
    Raises: ValueError if shapes do not fit, an option is unknown, or one of mean and std comes without the other.
    """
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"picture has shape {tuple(picture.shape)}, expected (H, W, 3)")
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, expected (V, 4)")
    if orientation not in UNDO_EXIF:
        raise ValueError(f"orientation={orientation}: EXIF knows 1 to 8")
    if (mean is None) != (std is None):
        raise ValueError("one of mean and std is None: give both, or neither for levels 0..255")
    if filter not in get_args(Filter):
        raise ValueError(f"filter={filter!r}: take one of {', '.join(get_args(Filter))}")

    size_px = sides_of("size_px", size_px, "sides of 1 or more, (height, width), or one for a square", whole=True)
    upright = reorient(picture.double().permute(2, 0, 1), *UNDO_EXIF[orientation])
    views = []
    for v in range(len(boxes)):
        x0, y0, x1, y1 = boxes[v].double().tolist()
        height, width = size_px if quarter_turns[v] % 2 == 0 else size_px[::-1]  # before the turn
        down = resize_weights(upright.shape[1], y0, y1, height, filter=filter)
        across = resize_weights(upright.shape[2], x0, x1, width, filter=filter)
        view = reorient(down.to(upright) @ upright @ across.to(upright).T, bool(flipped[v]), int(quarter_turns[v]))
        view = change_levels(view, *(None if each is None else each[v] for each in (matrix, blur_sigma_px, solarized)))
        if mean is not None and std is not None:
            view = (view / 255 - mean.to(view)[:, None, None]) / std.to(view)[:, None, None]
        views.append(view)
    return torch.stack(views) if views else upright.new_empty(0, 3, *size_px)


def change_levels(view: Tensor, matrix: Tensor | None, blur_sigma_px: Tensor | None, solarized: Tensor | None) -> Tensor:
    """Color, blur and solarize the levels of one view (3, h, w): matrix (3, 4), the others ()."""
    if matrix is not None:
        linear, offset = matrix.to(view)[:, :3], matrix.to(view)[:, 3]
        view = (torch.einsum("rc,chw->rhw", linear, view) + offset[:, None, None]).clamp(0, 255)
    if blur_sigma_px is not None and blur_sigma_px > 0:
        sigma = float(blur_sigma_px)
        view = blur_weights(view.shape[1], sigma).to(view) @ view @ blur_weights(view.shape[2], sigma).to(view).T
    if solarized is not None and solarized:
        view = torch.minimum(view, 255 - view)
    return view


def reorient(picture: Tensor, mirrored: bool, quarter_turns: int) -> Tensor:
    """Mirror (..., H, W) left-right if told to, then turn it counter-clockwise as seen."""
    return torch.rot90(picture.flip(-1) if mirrored else picture, quarter_turns, (-2, -1))


def resize_weights(pixels: int, start: float, stop: float, samples: int, *, filter: Filter = "plain") -> Tensor:
    """Return how much of every source pixel goes into every output sample, along one axis: (samples, pixels) float64, rows sum to 1.

    Centered weights are w (1 - a (d - m)), a = m / (v - m^2), with m and v the first two moments of w over the distances d.
    Units:  start and stop of the box in source pixels, fractions allowed.
    """
    scale = (stop - start) / samples
    reach = max(scale, 1.0)  # half the triangle's base
    center = start + (torch.arange(samples, dtype=torch.float64) + 0.5) * scale
    taps = torch.arange(math.floor(start - reach), math.ceil(stop + reach) + 1)
    distance = taps + 0.5 - center[:, None]
    weights = (1 - distance.abs() / reach).clamp(min=0)
    weights /= weights.sum(1, keepdim=True)
    if filter == "centered":
        moment = (weights * distance).sum(1, keepdim=True)
        variance = (weights * distance**2).sum(1, keepdim=True) - moment**2
        tilt = torch.where(variance > LEAST_VARIANCE, moment / variance, 0)
        weights *= 1 - tilt * (distance - moment)
    return torch.zeros(samples, pixels, dtype=torch.float64).index_add_(1, taps.clamp(0, pixels - 1), weights)


def blur_weights(pixels: int, sigma_px: float) -> Tensor:
    """Return a sampled Gaussian of radius ceil(3 sigma), reflected at the edge pixels' centers: (pixels, pixels), rows sum to 1."""
    radius = math.ceil(3 * sigma_px)
    offset = torch.arange(-radius, radius + 1)
    gaussian = torch.exp(-0.5 * (offset.double() / sigma_px) ** 2)
    gaussian /= gaussian.sum()
    period = max(2 * (pixels - 1), 1)
    position = (torch.arange(pixels)[:, None] + offset) % period
    mirrored = torch.minimum(position, period - position) if pixels > 1 else torch.zeros_like(position)
    return torch.zeros(pixels, pixels, dtype=torch.float64).scatter_add_(1, mirrored, gaussian.expand(pixels, -1))
