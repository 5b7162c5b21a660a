"""What every contender of the loader's benchmark has to deliver, and how it is told whether it did.

Here: the views, their records, the distance of delivered pixels to the float64 reference, the planted error that must be found.
Not here: the contenders (contenders.py has ours and decoding alone, peers.py everybody else's).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ColorLaw, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, ViewGeometry

COLOR = ColorLaw(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, solarize_prob=0.2)
FAMILIES = ((2, 224, (0.4, 1.0)), (8, 96, (0.05, 0.4)))  # views, side in pixels, fraction of the area
ASPECT = (3 / 4, 4 / 3)
CHECKED_PICTURES = 4
PLANTED_PX = 6.0  # how far the boxes of a planted error lie elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A number that must not exceed its limit; NaN does."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


class Contender(Protocol):
    """Anything that delivers batches."""

    def check(self, plant: bool) -> list[Check]:
        """Compare what is delivered with what it should be."""
        ...

    def batches(self) -> Iterator[int]:
        """Deliver without end; yield how many pictures each batch has."""
        ...


def bench_recipe(photometrics: bool) -> ViewRecipe:
    """Return the views that are cut from every picture."""
    color = COLOR if photometrics else None
    families = (
        ViewFamily(name=f"side-{side}", views=views, size_px=(side, side), law=Independent(area_frac=area), mirror="view", color=color)
        for views, side, area in FAMILIES
    )
    return ViewRecipe(families=tuple(families))


def drawn(recipe: ViewRecipe, index: ShardIndex, ids: NDArray[np.int64], epoch: int = 0) -> list[tuple[ViewGeometry, Photometric]]:
    """Draw the records of a batch, one a family, as the loader does with seed 0."""
    size, stored = index.source_size[ids], index.orientation[ids]
    records = draw_records(recipe, seed=0, epoch=epoch, drawn_for=ids, source_size=size, stored_orientation=stored)
    return [(record.geometry, record.photometric) for record in records]


def checked_ids(index: ShardIndex) -> NDArray[np.int64]:
    """Return a few sound pictures that lie upright in their files: the usual loaders leave EXIF turns alone."""
    fine = np.flatnonzero(index.sound & (index.orientation == 1))
    if not len(fine):
        raise ValueError(f"{index.paths[0]}: no picture that is sound and upright, nothing to check against; take other --data")
    return fine[np.unique(np.linspace(0, len(fine) - 1, CHECKED_PICTURES).astype(int))]


def filtered(picture: Tensor, record: ViewGeometry, photometric: Photometric) -> Tensor:
    """Return what views should show, (V, 3, h, w) levels: the float64 definition."""
    return render_views_reference(
        picture,
        record.boxes[0],
        record.flipped[0],
        record.quarter_turns[0],
        record.size_px,
        matrix=color_matrix(photometric)[0],
        blur_sigma_px=photometric.blur_sigma_px[0],
        solarized=photometric.solarized[0],
    )


def unfiltered(picture: Tensor, record: ViewGeometry, photometric: Photometric) -> Tensor:
    """Return what views show, (V, 3, h, w) levels, where nothing is filtered before it is sampled: bilinear between four pixels."""
    height, width = record.size_px
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = map_points(record.view_to_source[0], torch.stack([cols, rows], -1).view(-1, 2).double()) - 0.5  # (V, h * w, 2)
    last = torch.tensor([picture.shape[1] - 1, picture.shape[0] - 1])
    low = points.floor()
    near, far = low.long().clamp(min=0).minimum(last), (low.long() + 1).clamp(min=0).minimum(last)
    x, y = (points - low).unsqueeze(-2).unbind(-1)  # (V, h * w, 1): how far to the right, how far down

    def row(y: Tensor) -> Tensor:
        return picture[y, near[..., 0]].double() * (1 - x) + picture[y, far[..., 0]].double() * x

    shown = row(near[..., 1]) * (1 - y) + row(far[..., 1]) * y  # (V, h * w, 3)
    return shown.transpose(1, 2).unflatten(-1, (height, width))


def endless_ids(index: ShardIndex, batch: int) -> Iterator[list[int]]:
    """Yield the sound pictures in batches, again and again."""
    sound = np.flatnonzero(index.sound)
    for start in itertools.count(0, batch):
        yield sound[np.arange(start, start + batch) % len(sound)].tolist()


def levels_off(pixels: Tensor, picture: Tensor, record: ViewGeometry, photometric: Photometric, *, antialias: bool = True) -> float:
    """Return how far views lie from what they should show, in 255 levels, mean over pixels two filter supports inside the view.

    Shapes: pixels (V, 3, h, w) normalized float, picture (H, W, 3), record and photometric of that one picture (1, V).
    antialias: whether what they should show is `filtered` or `unfiltered`.
    """
    boxes = record.boxes[0]
    truth = (filtered if antialias else unfiltered)(picture, record, photometric)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    off = ((pixels.double() * std + mean) * 255 - truth).abs()
    source_px = (boxes[:, 2:] - boxes[:, :2]) / record.size_px[0]  # of one view pixel
    margins = (2 / source_px.clamp(max=1)).amax(-1).ceil() + (3 * photometric.blur_sigma_px[0]).ceil()
    inner = [view[:, m:-m, m:-m] for view, m in zip(off, margins.int().tolist(), strict=True)]
    return float(torch.cat([view.flatten() for view in inner]).mean())


def moved(record: ViewGeometry) -> ViewGeometry:
    """Return a record whose boxes lie elsewhere, inside their pictures still: an error for the check to find."""
    wh = record.source_size.flip(-1)[:, None]  # (B, 1, 2)
    shift = torch.where(record.boxes[..., 2:] + PLANTED_PX <= wh, PLANTED_PX, -PLANTED_PX)
    return replace(record, boxes=record.boxes + torch.cat([shift, shift], -1))


def views_off(
    index: ShardIndex,
    records: Sequence[tuple[ViewGeometry, Photometric]],
    pixels: Callable[[int, int], Tensor],
    plant: bool,
    *,
    antialias: bool = True,
) -> float:
    """Return the worst picture's `levels_off`; pixels(family, b) gives (V, 3, h, w)."""
    worst = []
    with ShardReader(index) as reader:
        for family, (record, photometric) in enumerate(records):
            for b, sample in enumerate(record.sample.tolist()):
                picture = torch.from_numpy(decode_picture(reader.read(sample)).copy())
                told = moved(record[b]) if plant else record[b]
                worst.append(levels_off(pixels(family, b), picture, told, photometric[b], antialias=antialias))
    return max(worst)
