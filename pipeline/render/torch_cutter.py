"""The `torch` renderer: crop, resize and write straight into the batch with stock parts. Runs everywhere, needs no compiler.

Here: a decoded picture and its record -> pixels by PyTorch's 8-bit antialiased interpolation. Threads and decoding: threads.py.
Not here: drawing. The approved departure from the definition: whole-pixel boxes only, and the filter stops at the box.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.decode import upright
from wherefrom.pipeline.render.threads import ThreadedRenderer
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Record, ViewGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One family's record as plain Python numbers, cheap to read from many threads, and where its views go."""

    orientations: list[int]  # [B], of the stored picture
    boxes: list[list[list[int]]]  # [B][V] x0, y0, x1, y1
    flipped: list[list[bool]]
    quarter_turns: list[list[int]]
    size_px: tuple[int, int]
    matrix: Tensor | None  # (B, V, 3, 4) float32; None: no view changes color
    plain: list[list[bool]]  # [B][V]: color is left alone
    sigma_px: list[list[float]]
    solarized: list[list[bool]]
    pixels: Tensor  # (B, V, 3, h, w)


class TorchCutter:
    """Cuts views with PyTorch; holds nothing from one call to the next.

    Raises: ValueError if a family has snap="none": stock resizing cuts whole pixels.
    """

    name = "torch"

    def __init__(self, recipe: ViewRecipe) -> None:
        for family in recipe.families:
            if family.snap != "pixel":
                raise ValueError(
                    f"family {family.name!r} has snap={family.snap!r}, the torch renderer cuts whole pixels; "
                    'use snap="pixel" or renderer="native" or "dali"'
                )
        self.recipe = recipe
        std = 255 * torch.tensor(recipe.std)
        self._scale = (1 / std).view(3, 1, 1)
        self._shift = (-255 * torch.tensor(recipe.mean) / std).view(3, 1, 1)

    def plan(self, records: Sequence[Record], pixels: Sequence[Tensor]) -> list[Plan]:
        """Return a batch's records, one a family, as the plain numbers that `cut` reads."""
        return [_plan(record, out) for record, out in zip(records, pixels, strict=True)]

    def cut(self, plan: list[Plan], position: int, stored: NDArray[np.uint8]) -> None:
        """Write all views of the batch's picture number `position`, (H, W, 3) as stored."""
        picture = torch.from_numpy(np.ascontiguousarray(upright(stored, plan[0].orientations[position])))
        for family in plan:
            self._cut_family(picture, family, position, family.pixels[position])

    def _cut_family(self, picture: Tensor, plan: Plan, position: int, out: Tensor) -> None:
        """Render all views of one family from an upright (H, W, 3) uint8 picture into out (V, 3, h, w)."""
        height, width = plan.size_px
        for view, (x0, y0, x1, y1) in enumerate(plan.boxes[position]):
            turns = plan.quarter_turns[position][view]
            crop = picture[y0:y1, x0:x1].permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
            size = (width, height) if turns % 2 else (height, width)
            resized = interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)[0]
            if plan.flipped[position][view]:
                resized = resized.flip(-1)
            if turns:
                resized = torch.rot90(resized, turns, (-2, -1))
            self._store(resized, plan, position, view, out[view])

    def _store(self, resized: Tensor, plan: Plan, position: int, view: int, out: Tensor) -> None:
        """Color, normalize and cast one resized view (3, h, w) uint8 into its place."""
        levels = resized
        if plan.matrix is not None and not plan.plain[position][view]:
            levels = _recolor(resized, plan.matrix[position, view], plan.sigma_px[position][view], plan.solarized[position][view])
        if out.dtype == torch.uint8:
            out.copy_(levels.round_() if levels.is_floating_point() else levels)
        elif out.dtype == torch.float32:
            out.copy_(levels)
            out.mul_(self._scale).add_(self._shift)
        else:  # normalized in float32: half precision would round twice
            out.copy_(levels.float().mul_(self._scale).add_(self._shift))


class TorchRenderer(ThreadedRenderer):
    """`ThreadedRenderer` that cuts with PyTorch.

    Raises: ValueError if a family has snap="none": this renderer cuts whole pixels.
    """

    def __init__(self, recipe: ViewRecipe, *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2) -> None:
        super().__init__(TorchCutter(recipe), device=device, threads=threads, prefetch=prefetch)


def _plan(record: Record, pixels: Tensor) -> Plan:
    geometry, photometric = record.geometry, record.photometric
    changed = photometric.changed
    return Plan(
        orientations=geometry.stored_orientation.tolist(),
        boxes=_whole_boxes(geometry).tolist(),
        flipped=geometry.flipped.tolist(),
        quarter_turns=geometry.quarter_turns.tolist(),
        size_px=geometry.size_px,
        matrix=color_matrix(photometric).float() if changed.any() else None,
        plain=(~changed).tolist(),
        sigma_px=photometric.blur_sigma_px.tolist(),
        solarized=photometric.solarized.tolist(),
        pixels=pixels,
    )


def _whole_boxes(geometry: ViewGeometry) -> Tensor:
    """Return the boxes (B, V, 4) as int32.

    Raises: ValueError for one that is not of whole pixels, is empty or leaves its picture: slicing would cut another.
    """
    boxes, frame = geometry.boxes.int(), geometry.source_size.flip(-1)[:, None]
    start, stop = boxes[..., :2], boxes[..., 2:]
    fits = (boxes == geometry.boxes).all(-1) & ((start >= 0) & (start < stop) & (stop <= frame)).all(-1)  # nan equals nothing
    if not fits.all():
        b, v = (~fits).nonzero()[0].tolist()
        raise ValueError(
            f"box {geometry.boxes[b, v].tolist()} of family {geometry.family!r}, sample {geometry.sample[b]}, view {v}: the torch renderer "
            f"cuts whole pixels within a picture, here (height, width) {tuple(geometry.source_size[b].tolist())}; "
            'mend the record, or for parts of pixels use renderer="native"'
        )
    return boxes


def _recolor(view: Tensor, matrix: Tensor, sigma_px: float, solarized: bool) -> Tensor:
    """Apply matrix (3, 4), clip, blur, solarize: (3, h, w) uint8 -> float32 levels."""
    planes = view.to(torch.float32, memory_format=torch.contiguous_format).view(3, -1)
    levels = torch.addmm(matrix[:, 3:], matrix[:, :3], planes).clamp_(0, 255).view(view.shape)
    if sigma_px > 0:
        levels = _blur(levels, sigma_px)
    return torch.minimum(levels, 255 - levels) if solarized else levels


def _blur(levels: Tensor, sigma_px: float) -> Tensor:
    """Blur (3, h, w) by a sampled Gaussian of radius ceil(3 sigma), the border mirrored about the edge pixel's center."""
    radius = math.ceil(3 * sigma_px)
    gaussian = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma_px) ** 2)
    taps = (gaussian / gaussian.sum()).tolist()
    for axis in (-2, -1):
        padded, length = _mirrored_border(levels, axis, radius), levels.shape[axis]
        levels = padded.narrow(axis, radius, length) * taps[radius]
        for k in (*range(radius), *range(radius + 1, 2 * radius + 1)):
            levels.add_(padded.narrow(axis, k, length), alpha=taps[k])  # three times as fast as conv2d at these sizes
    return levels


def _mirrored_border(levels: Tensor, axis: int, radius: int) -> Tensor:
    """Lengthen an axis of (3, h, w) by `radius` at both ends, mirrored about the edge pixel's center as often as it takes."""
    length = levels.shape[axis]
    if radius < length:
        return pad(levels[None], (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0), mode="reflect")[0]
    period = max(2 * (length - 1), 1)
    index = torch.arange(-radius, length + radius).remainder(period)
    return levels.index_select(axis, torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index))
