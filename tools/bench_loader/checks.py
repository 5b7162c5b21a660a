"""What every contender of the loader's benchmark has to deliver, and whether it did.

Here: the views, their records, the distance of delivered pixels to the float64 reference, the planted error that must be found.
Not here: the contenders (contenders.py has ours and decoding alone, peers.py everybody else's).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.proof.level_errors import away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record, ViewGeometry
from wherefrom.train.objectives import MAESettings, PARTSettings, SpatialSettings

ViewsName = Literal["crops", "spatial", "part", "mae"]

COLOR = ColorLaw(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, solarize_prob=0.2)
FAMILIES = ((2, 224, (0.4, 1.0)), (8, 96, (0.05, 0.4)))  # of "crops": views, side in pixels, fraction of the area
ASPECT = (3 / 4, 4 / 3)
CHECKED_PICTURES = 4
PLANTED_PX = 6.0  # how far the boxes of a planted error lie elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryCheck:
    """A number that must not exceed its limit; NaN does."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


class LoaderContender(Protocol):
    """Anything that delivers batches."""

    def check(self, plant: bool) -> list[DeliveryCheck]:
        """Compare what is delivered with what it should be."""
        ...

    def batches(self) -> Iterator[int]:
        """Deliver without end; yield how many pictures each batch has."""
        ...


def bench_recipe(photometrics: bool, views: ViewsName = "crops") -> ViewRecipe:
    """Return the views that are cut from every picture: random crops, which everybody knows, or those of a method at its own settings."""
    match views:
        case "crops":
            families = [
                ViewFamily(name=f"side-{side}", views=number, size_px=(side, side), law=Independent(area_frac=area), mirror="view")
                for number, side, area in FAMILIES
            ]
        case "spatial":
            families = [SpatialSettings().family("spatial")]
        case "part":
            families = [PARTSettings().family("part")]
        case "mae":
            families = list(MAESettings().objective("mae").families)
    return ViewRecipe(families=tuple(replace(family, color=COLOR if photometrics else None) for family in families))


def draw_bench_records(recipe: ViewRecipe, index: ShardIndex, ids: NDArray[np.int64], epoch: int = 0) -> tuple[Record, ...]:
    """Draw the records of a batch, one a family, as the loader does with seed 0."""
    size, stored = index.source_size[ids], index.orientation[ids]
    return draw_records(recipe, seed=0, epoch=epoch, drawn_for=ids, source_size=size, stored_orientation=stored)


def ids_to_check(index: ShardIndex) -> NDArray[np.int64]:
    """Return a few valid pictures that lie upright in their files: the usual loaders leave EXIF turns alone."""
    fine = np.flatnonzero(index.valid & (index.orientation == 1))
    if not len(fine):
        raise ValueError(f"{index.paths[0]}: no picture that is valid and upright, nothing to check against; take other --data")
    return fine[np.unique(np.linspace(0, len(fine) - 1, CHECKED_PICTURES).astype(int))]


def bilinear_levels(picture: Tensor, geometry: ViewGeometry) -> Tensor:
    """Return what the views of one picture show, (V, 3, h, w), if nothing is filtered before it is sampled: bilinear of four pixels."""
    height, width = geometry.size_px
    rows, cols = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = map_points(geometry.view_to_source[0], torch.stack([cols, rows], -1).view(-1, 2).double()) - 0.5  # (V, h * w, 2)
    last = torch.tensor([picture.shape[1] - 1, picture.shape[0] - 1])
    low = points.floor()
    near, far = low.long().clamp(min=0).minimum(last), (low.long() + 1).clamp(min=0).minimum(last)
    x, y = (points - low).unsqueeze(-2).unbind(-1)  # (V, h * w, 1): how far to the right, how far down

    def row(y: Tensor) -> Tensor:
        return picture[y, near[..., 0]].double() * (1 - x) + picture[y, far[..., 0]].double() * x

    views = row(near[..., 1]) * (1 - y) + row(far[..., 1]) * y  # (V, h * w, 3)
    return views.transpose(1, 2).unflatten(-1, (height, width))


def endless_ids(index: ShardIndex, batch: int) -> Iterator[list[int]]:
    """Yield the valid pictures in batches, again and again."""
    valid = np.flatnonzero(index.valid)
    for start in itertools.count(0, batch):
        yield valid[np.arange(start, start + batch) % len(valid)].tolist()


def mean_level_error(pixels: Tensor, picture: NDArray[np.uint8], record: Record, *, antialias: bool = True) -> float:
    """Return how far views lie from what they should show, in 255 levels, mean over pixels two filter supports inside the view.

    Shapes: pixels (V, 3, h, w) normalized float, picture (H, W, 3), record of that one picture (1, V).
    antialias: whether views should show the float64 reference, or else `bilinear_levels`.
    """
    expected = reference_levels([picture], record) if antialias else bilinear_levels(torch.tensor(picture), record.geometry)[None]
    return level_errors(levels(pixels[None], bench_recipe(False)), expected, away_from_borders(record)).inside_mean


def move_boxes(record: Record) -> Record:
    """Return a record whose boxes lie elsewhere, inside their pictures still: an error for the check to find."""
    boxes = record.geometry.boxes
    wh = record.geometry.source_size.flip(-1)[:, None]  # (B, 1, 2)
    shift = torch.where(boxes[..., 2:] + PLANTED_PX <= wh, PLANTED_PX, -PLANTED_PX)
    return replace(record, geometry=replace(record.geometry, boxes=boxes + torch.cat([shift, shift], -1)))


def worst_level_error(
    index: ShardIndex, records: Sequence[Record], pixels: Callable[[int, int], Tensor], plant: bool, *, antialias: bool = True
) -> float:
    """Return the worst picture's `mean_level_error`; pixels(family, b) gives (V, 3, h, w)."""
    errors = []
    with ShardReader(index) as reader:
        for family, record in enumerate(records):
            for b, sample in enumerate(record.geometry.sample.tolist()):
                claim = move_boxes(record[b]) if plant else record[b]
                errors.append(mean_level_error(pixels(family, b), decode_picture(reader.read(sample)), claim, antialias=antialias))
    return max(errors)
