"""The `torch` renderer: threads decode, crop, resize and write straight into the batch. Runs everywhere, needs no compiler.

Here: record + bytes -> pixels with stock parts: simplejpeg, PyTorch's 8-bit antialiased interpolation.
Not here: drawing. The approved departure from the definition: whole-pixel boxes only, and the filter stops at the box.
"""

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from wherefrom.pipeline.colour import colour_matrix
from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.places import available_cores
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.render import Rendered
from wherefrom.pipeline.slots import SlotRing
from wherefrom.pipeline.views import Photometric, ViewGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One family's record as plain Python numbers: cheap to read from many threads."""

    boxes: list[list[list[int]]]  # [B][V] x0, y0, x1, y1
    flipped: list[list[bool]]
    quarter_turns: list[list[int]]
    size_px: tuple[int, int]
    matrix: Tensor | None  # (B, V, 3, 4) float32; None: no view changes colour
    plain: list[list[bool]]  # [B][V]: colour is left alone
    sigma_px: list[list[float]]
    solarised: list[list[bool]]


class Cutter:
    """Cuts, colours and normalises views of upright pictures in the caller's thread; holds nothing from one call to the next.

    Raises: ValueError if a family has snap="none": stock resizing cuts whole pixels.
    """

    def __init__(self, recipe: Recipe) -> None:
        for family in recipe.families:
            if family.snap != "pixel":
                raise ValueError(
                    f"family {family.name!r} has snap={family.snap!r}, the torch renderer cuts whole pixels; "
                    'use snap="pixel" or renderer="dali"'
                )
        self.recipe = recipe
        self.dtype: torch.dtype = getattr(torch, recipe.pixels)
        std = 255 * torch.tensor(recipe.std)
        self._scale = (1 / std).view(3, 1, 1)
        self._shift = (-255 * torch.tensor(recipe.mean) / std).view(3, 1, 1)

    def shapes(self, samples: int) -> list[tuple[int, ...]]:
        """Return the shape of every family's pixels, (B, V, 3, H, W)."""
        return [(samples, family.views, 3, *family.size_px) for family in self.recipe.families]

    def plans(self, records: Sequence[tuple[ViewGeometry, Photometric]]) -> list[Plan]:
        """Return a batch's records, one a family, as the plain numbers that `cut` reads."""
        return [_plan(geometry, photometric) for geometry, photometric in records]

    def cut(self, picture: Tensor, plans: Sequence[Plan], position: int, pixels: Sequence[Tensor]) -> None:
        """Write all views of the batch's picture number `position`, (H, W, 3) uint8, into pixels, one (B, V, 3, h, w) a family."""
        for plan, out in zip(plans, pixels, strict=True):
            self._cut_family(picture, plan, position, out[position])

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
        """Colour, normalise and cast one resized view (3, h, w) uint8 into its place."""
        levels = resized
        if plan.matrix is not None and not plan.plain[position][view]:
            levels = _recolour(resized, plan.matrix[position, view], plan.sigma_px[position][view], plan.solarised[position][view])
        if out.dtype == torch.uint8:
            out.copy_(levels.round_() if levels.is_floating_point() else levels)
        elif out.dtype == torch.float32:
            out.copy_(levels)
            out.mul_(self._scale).add_(self._shift)
        else:  # normalised in float32: half precision would round twice
            out.copy_(levels.float().mul_(self._scale).add_(self._shift))


class TorchRenderer:
    """Renders in `threads` threads (0: in the caller's); pixels land in a ring of reused slots.

    Raises: ValueError if a family has snap="none": this renderer cuts whole pixels.
    """

    name = "torch"

    def __init__(self, recipe: Recipe, *, device: str | torch.device = "cpu", threads: int | None = None, prefetch: int = 2) -> None:
        self.recipe = recipe
        self.cutter = Cutter(recipe)
        self.threads = available_cores() if threads is None else threads
        self.ring = SlotRing(prefetch + 3, pinned=torch.device(device).type == "cuda")
        self._local = threading.local()
        # In PyTorch this setting belongs to the thread: pictures are the parallelism here, not the insides of one resize.
        self._pool = ThreadPoolExecutor(self.threads, "wherefrom-render", torch.set_num_threads, (1,)) if self.threads else None
        if self._pool is not None:  # all threads start now, none amid the caller's own arithmetic
            barrier = threading.Barrier(self.threads)
            list(self._pool.map(lambda _: barrier.wait(), range(self.threads)))

    def close(self) -> None:
        """End the threads; twice is fine."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def render(self, encoded: Sequence[NDArray[np.uint8]], records: Sequence[tuple[ViewGeometry, Photometric]]) -> Rendered:
        """Render a batch into a slot; undecodable pictures come back in `failed`."""
        pixels = self.ring.take(self.cutter.shapes(len(encoded)), self.cutter.dtype)
        plans = self.cutter.plans(records)
        sizes, orientations = records[0][0].source_size.tolist(), records[0][0].stored_orientation.tolist()

        def one(position: int) -> tuple[str | None, float, float]:
            start = time.perf_counter()
            try:
                picture = self._decode(encoded[position], sizes[position], orientations[position])
            except DECODE_ERRORS as error:
                return f"{type(error).__name__}: {error}", time.perf_counter() - start, 0.0
            decoded = time.perf_counter()
            self.cutter.cut(torch.from_numpy(picture), plans, position, pixels)
            return None, decoded - start, time.perf_counter() - decoded

        results = list(self._pool.map(one, range(len(encoded))) if self._pool is not None else map(one, range(len(encoded))))
        return Rendered(
            pixels=tuple(pixels),
            failed={position: result[0] for position, result in enumerate(results) if result[0] is not None},
            decode_s=sum(result[1] for result in results),
            render_s=sum(result[2] for result in results),
        )

    def _decode(self, encoded: NDArray[np.uint8], size: list[int], orientation: int) -> NDArray[np.uint8]:
        """Decode into this thread's buffer, upright and contiguous."""
        needed = size[0] * size[1] * 3
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < needed:
            buffer = self._local.buffer = np.empty(needed, np.uint8)
        picture = decode_picture(encoded, orientation, buffer)
        if list(picture.shape[:2]) != size:
            raise ValueError(f"the header says {size[1]} x {size[0]} pixels, decoded are {picture.shape[1]} x {picture.shape[0]}")
        return np.ascontiguousarray(picture) if picture.flags.writeable else picture.copy()


def _plan(geometry: ViewGeometry, photometric: Photometric) -> Plan:
    sigma = photometric.blur_sigma_px
    factors = torch.stack([photometric.brightness, photometric.contrast, photometric.saturation], -1)
    changed = photometric.grey | photometric.solarised | (sigma > 0) | (photometric.hue_rad != 0) | (factors != 1).any(-1)
    return Plan(
        boxes=geometry.boxes.int().tolist(),
        flipped=geometry.flipped.tolist(),
        quarter_turns=geometry.quarter_turns.tolist(),
        size_px=geometry.size_px,
        matrix=colour_matrix(photometric).float() if changed.any() else None,
        plain=(~changed).tolist(),
        sigma_px=sigma.tolist(),
        solarised=photometric.solarised.tolist(),
    )


def _recolour(view: Tensor, matrix: Tensor, sigma_px: float, solarised: bool) -> Tensor:
    """Apply matrix (3, 4), clip, blur, solarise: (3, h, w) uint8 -> float32 levels."""
    planes = view.to(torch.float32, memory_format=torch.contiguous_format).view(3, -1)
    levels = torch.addmm(matrix[:, 3:], matrix[:, :3], planes).clamp_(0, 255).view(view.shape)
    if sigma_px > 0:
        levels = _blur(levels, sigma_px)
    return torch.minimum(levels, 255 - levels) if solarised else levels


def _blur(levels: Tensor, sigma_px: float) -> Tensor:
    """Blur (3, h, w) by a sampled Gaussian of radius ceil(3 sigma), the border mirrored about the edge pixel's centre."""
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
    """Lengthen an axis of (3, h, w) by `radius` at both ends, mirrored about the edge pixel's centre as often as it takes."""
    length = levels.shape[axis]
    if radius < length:
        return pad(levels[None], (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0), mode="reflect")[0]
    period = max(2 * (length - 1), 1)
    index = torch.arange(-radius, length + radius).remainder(period)
    return levels.index_select(axis, torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index))
