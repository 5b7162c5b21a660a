"""What objectives on pairs of views share: targets from records, loss terms, R2.

Here: ordered pairs, their targets and their terms; what evaluation asks of an objective on pairs.
Not here: heads (pair_heads.py), the objectives (spatial.py, spatial_dense.py).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.kernels.pair_loss import PairLoss
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import ViewGeometry
from wherefrom.train.objective import Terms

Loss = Literal["squared", "smooth_l1"]


def pair_terms(predicted: Tensor, wanted: Tensor, counted: Tensor, channels: Sequence[str], *, loss: Loss, beta: float) -> Terms:
    """Return both terms, means over the pairs that count (0 where none does) summed over their channels, and R2 of every channel.

    Shapes: predicted and wanted (B, P, C), counted (B, P) bool, C channels.
    """
    said = predicted.float()
    error = (said - wanted).square() if loss == "squared" else F.smooth_l1_loss(said, wanted, reduction="none", beta=beta)
    each = (error * counted.unsqueeze(-1)).sum((0, 1)) / counted.sum().clamp(min=1)
    with torch.no_grad():
        meters = {f"r2_{name}": value for name, value in zip(channels, r2(said, wanted, counted), strict=True)}
    return Terms(losses={"position": each[:2].sum(), "scale": each[2:].sum()}, meters=meters)


def position_and_scale(found: PairLoss, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return both terms of a pair loss whose channels were weighted by `weights`.

    One pass gives one gradient, that of the weighted sum, and only that sum may be differentiated: each term carries the share of the
    gradient by which it comes out.
    """
    values = {"position": found.channel_loss[:2].sum(), "scale": found.channel_loss[2:].sum()}
    gradient = (found.loss - found.loss.detach()) / (sum(weights[term] ** 2 for term in values) or 1)
    return {term: value + weights[term] * gradient for term, value in values.items()}


def ordered_pairs(views: int) -> Tensor:
    """Return all (reference, target) of different views, (V (V - 1), 2) int64."""
    each = torch.arange(views)
    pairs = torch.cartesian_prod(each, each)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def drawn_records(family: ViewFamily, *, pictures: int, side_px: int = 1024, seed: int = 0) -> ViewGeometry:
    """Return the records that a family's law gives for square pictures 0, 1, ...; pixels are not needed for what the law alone knows."""
    size = np.full((pictures, 2), side_px, np.int32)
    (drawn,) = draw_records(ViewRecipe(families=(family,)), seed=seed, epoch=0, drawn_for=np.arange(pictures), source_size=size)
    return drawn.geometry


def r2(predicted: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Return 1 - squared error / variance of the targets, over the pairs that count; not finite where the targets do not vary.

    Shapes: predicted and wanted (B, P, C), counted (B, P) bool -> (C,).
    """
    weight = counted.to(wanted.dtype).unsqueeze(-1)
    total = weight.sum((0, 1))
    mean = (wanted * weight).sum((0, 1)) / total
    residual = ((predicted - wanted).square() * weight).sum((0, 1))
    return 1 - residual / ((wanted - mean).square() * weight).sum((0, 1))
