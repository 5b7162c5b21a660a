"""What dense protocols share: tokens of views beside what the views show, and how often classes are right.

Here: encoding pictures that have maps, patches of raw pixels, confusion of classes, mean IoU.
Not here: the pictures and their maps (dense_pictures.py), the protocols (hummingbird.py, dense_linear.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.dense_pictures import IGNORED, DepthPictures, MaskedPictures, cut
from wherefrom.train.evaluation.features import BLOCK, RAW, Evaluation, pixels_of_cells
from wherefrom.train.evaluation.labels import draw_ids
from wherefrom.train.evaluation.pictures import PictureSource, blocks
from wherefrom.train.evaluation.protocols import NotMeasuredError

RAW_PATCH_PX = 8  # the side to which larger patches are averaged: more numbers say no more of them


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseBlock:
    """Up to 64 pictures: their tokens by every network and as raw pixels, by column, and what their views show."""

    number: int
    tokens: dict[str, Tensor]  # (n, h, w, D) float32 each
    summaries: dict[str, Tensor]  # (n, D), the class token, or what stands for it; none of raw pixels
    maps: Tensor  # (n, H, W)


def masked(evaluation: Evaluation) -> tuple[MaskedPictures, MaskedPictures]:
    """Return the pictures with masks, to learn from and held out.

    Raises: NotMeasuredError if there are none, or their classes differ.
    """
    if evaluation.masked is None:
        raise NotMeasuredError("the pictures have no masks")
    train, held_out = evaluation.masked
    if tuple(train.classes) != tuple(held_out.classes):
        raise NotMeasuredError(f"masks of {len(train.classes)} classes to learn from and {len(held_out.classes)} held out, of other names")
    return train, held_out


def with_depth(evaluation: Evaluation) -> tuple[DepthPictures, DepthPictures]:
    """Return the pictures with depths, to learn from and held out.

    Raises: NotMeasuredError if there are none.
    """
    if evaluation.depth is None:
        raise NotMeasuredError("the pictures have no depths")
    return evaluation.depth


def dense_ids(evaluation: Evaluation, pictures: PictureSource, limit: int | None) -> NDArray[np.int64]:
    """Return which pictures are taken, drawn by `draw_ids`: at most as many as this protocol takes, and as all do."""
    limits = [number for number in (limit, evaluation.limit) if number is not None]
    return draw_ids(pictures, min(limits) if limits else None)


def dense_blocks(
    evaluation: Evaluation,
    pictures: PictureSource,
    maps: Callable[[NDArray[np.int64]], list[NDArray[Any]]],
    ids: NDArray[np.int64],
    view: ViewFamily,
    *,
    map_px: int,
    epoch: int = 0,
    what: str,
) -> Iterator[DenseBlock]:
    """Yield this rank's blocks of pictures, each encoded by all networks, with maps of map_px a side cut as the views are."""
    recipe = evaluation.recipe(view)
    for number, block in enumerate(blocks(ids, BLOCK)):
        if number % evaluation.ranks.count != evaluation.ranks.rank:
            continue
        views = pictures.views(recipe, block, epoch=epoch).to(evaluation.device).family(view.name)
        shown = cut(maps(block), views.geometry, (map_px, map_px))[:, 0].to(evaluation.device)
        tokens, summaries = {}, {}
        for column, encoder in evaluation.networks.items():
            with torch.no_grad():
                features = encoder.encode(views)
            tokens[column] = features.tokens[:, 0].float()
            summaries[column] = _summary(encoder, features)
        grid = next(iter(tokens.values())).shape[1:3]
        tokens[RAW] = raw_patches(views.pixels[:, 0].float(), (grid[0], grid[1]))
        evaluation.progress(what, min(len(ids), (number + 1) * BLOCK), len(ids))
        yield DenseBlock(number=number, tokens=tokens, summaries=summaries, maps=shown)


def _summary(encoder: Encoder, features: Features) -> Tensor:
    """Return the class token of single views, (n, D); of a network without one, which may have registers, what it says itself."""
    chosen = features.prefix[:, :, 0] if encoder.has_class_token and features.prefix is not None else features.summary
    return chosen[:, 0].float()


def raw_patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixels of every cell of a grid, averaged to RAW_PATCH_PX a side where they are more.

    Shapes: pixels (n, 3, H, W), grid (h, w) -> (n, h, w, 3 * side * side).
    """
    height, width = (min(RAW_PATCH_PX, -(-side // cells)) for side, cells in zip(pixels.shape[-2:], grid, strict=True))
    return pixels_of_cells(pixels, grid, (height, width))


def patch_labels(masks: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """Return how many pixels of each class every cell of a grid shows; those that are ignored count nowhere.

    Shapes: masks (n, H, W), grid (h, w) -> (n, h, w, classes) int64.
    """
    n, height, width = masks.shape
    row, col = ((torch.arange(side, device=masks.device) + 0.5) * cells // side for side, cells in zip((height, width), grid, strict=True))
    cell = (row.long()[:, None] * grid[1] + col.long()).expand(n, -1, -1)
    cell = cell + torch.arange(n, device=masks.device)[:, None, None] * (grid[0] * grid[1])
    known = masks != IGNORED
    counts = torch.bincount((cell * classes + masks.long())[known], minlength=n * grid[0] * grid[1] * classes)
    return counts.reshape(n, *grid, classes)


def confusion(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Return how many pixels of each class are taken for each, (classes, classes) int64, rows by the truth; ignored ones count nowhere."""
    known = masks != IGNORED
    return torch.bincount(masks[known].long() * classes + predicted[known].long(), minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Return the mean over classes of intersection over union, from `confusion`; classes that nothing shows and nobody names are left out.

    Source: mIoU as PASCAL VOC counts it, over all pixels of all pictures together.
    """
    right = counts.diagonal().double()
    union = (counts.sum(0) + counts.sum(1)).double() - right
    return float((right / union)[union > 0].mean())


def of_all_ranks(evaluation: Evaluation, counts: Tensor) -> Tensor:
    """Return the sum of whole numbers that every rank counted."""
    return evaluation.joined([counts[None]]).sum(0)
