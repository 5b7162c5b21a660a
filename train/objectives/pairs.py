"""What objectives on pairs of views share: targets from records, loss terms, R2.

Here: ordered pairs, their targets and their terms; what evaluation asks of an objective on pairs.
Not here: heads (pair_heads.py), the objectives (spatial.py, spatial_dense.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.kernels.pair_loss import PairLoss
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import ViewGeometry, Views
from wherefrom.train.encoder import Features
from wherefrom.train.objective import Encode, Terms
from wherefrom.train.over_ranks import share_of_counted

Loss = Literal["squared", "smooth_l1"]


class PairSettings(Protocol):
    """What evaluation reads of the settings of an objective on pairs."""

    @property
    def law_name(self) -> str:
        """The law by its name: R2 does not compare across laws."""

    @property
    def position(self) -> str:
        """The unit of positions, as `pair_targets` takes it."""

    @property
    def scale(self) -> str:
        """The unit of sizes, as `pair_targets` takes it."""

    @property
    def hidden(self) -> int | None:
        """Hidden units of the heads that serve as controls; None: as many as the encoder's width."""


class PairObjective(Protocol):
    """What evaluation asks of an objective, whoever wrote it, to report how well it predicts pairs of boxes.

    Shapes: B pictures, V boxes of each, P pairs, C channels: x, y, then none or one of scale, or two of width and height.
    The boxes are those of V views, or regions of a single view; R2 of several views is measured with equalized sharpness, too.
    """

    training: bool
    channels: tuple[str, ...]
    weights: Mapping[str, float]  # of the terms "position" and "scale", 1 where not named
    pairs: Tensor  # (P, 2) int64, (reference, target): those that are learned
    target_mean: Tensor  # (C,), as the next: standardized = (target - mean) / std
    target_std: Tensor

    @property
    def settings(self) -> PairSettings:
        """The choices that the report names, and the gates depend on."""

    def train(self, mode: bool = True) -> object:
        """Switch between training and evaluation mode, as any module."""

    def evaluation_family(self) -> ViewFamily:
        """Return the views to evaluate on: the same boxes, neither colored, mirrored nor turned."""

    def boxes(self, record: ViewGeometry) -> Tensor:
        """Return the boxes that pairs are made of, (B, V, 4)."""

    def pair_mask(self, record: ViewGeometry, valid: Tensor) -> Tensor:
        """Return which pairs count, (B, P) bool, where `valid` says which views do."""

    def targets(self, record: ViewGeometry, pairs: Tensor | None = None, *, standardized: bool = True) -> Tensor:
        """Return what is to be predicted of `pairs`, by default its own, (B, P, C) float32."""

    def features(self, views: Views, encode: Encode) -> Features:
        """Return what the head sees of every box, of views of any side."""

    def predict(self, features: Features, pairs: Tensor | None = None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return standardized predictions (B, P, C) and meters."""

    def new_head(self, width: int) -> nn.Module:
        """Return a fresh head, for (features of `width`, pairs) -> (predictions, meters)."""


def is_pair_objective(objective: object) -> TypeGuard[PairObjective]:
    """Return whether an objective has, once it is set up, all that evaluation asks of one on pairs."""
    # not isinstance with a runtime protocol: from Python 3.12 on it does not see a module's buffers
    return learns_pairs(objective) and all(hasattr(objective, name) for name in PairObjective.__annotations__)


def learns_pairs(objective: object) -> TypeGuard[PairObjective]:
    """Return whether an objective is one on pairs, set up or not: by its methods."""
    return all(hasattr(objective, name) for name in vars(PairObjective) if not name.startswith("_"))


def pair_terms(predicted: Tensor, targets: Tensor, mask: Tensor, channels: Sequence[str], *, loss: Loss, beta: float) -> Terms:
    """Return the terms, means over the pairs that count (0 where none does) summed over their channels, and R2 of every channel.

    The mean of the ranks' terms is that over all ranks' pairs.
    Shapes: predicted and targets (B, P, C), mask (B, P) bool, true for pairs that count; C channels.
    """
    predicted = predicted.float()
    error = (predicted - targets).square() if loss == "squared" else F.smooth_l1_loss(predicted, targets, reduction="none", beta=beta)
    channel_loss = (error * mask.unsqueeze(-1)).sum((0, 1)) / mask.sum().clamp(min=1) * share_of_counted(mask.sum())
    with torch.no_grad():
        meters = {f"r2_{name}": value for name, value in zip(channels, r2(predicted, targets, mask), strict=True)}
    return Terms(losses=_terms_of(channel_loss), meters=meters)


def position_and_scale(pair_loss: PairLoss, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the terms of a pair loss whose channels were weighted by `weights`.

    One pass gives one gradient, that of the weighted sum, and only that sum may be differentiated: each term carries the share of the
    gradient by which it comes out. The mean of the ranks' terms is that over all ranks' pairs.
    """
    values = _terms_of(pair_loss.channel_loss)
    gradient = (pair_loss.loss - pair_loss.loss.detach()) / (sum(weights[term] ** 2 for term in values) or 1)
    part = share_of_counted(pair_loss.counted.sum())
    return {term: (value + weights[term] * gradient) * part for term, value in values.items()}


def _terms_of(channel_loss: Tensor) -> dict[str, Tensor]:
    """Return the terms of losses by channel, (C,): there is one of scale where there are channels of it."""
    terms = {"position": channel_loss[:2].sum(), "scale": channel_loss[2:].sum()}
    return terms if len(channel_loss) > 2 else {"position": terms["position"]}


def ordered_pairs(views: int) -> Tensor:
    """Return all (reference, target) of different views, (V (V - 1), 2) int64."""
    each = torch.arange(views)
    pairs = torch.cartesian_prod(each, each)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def law_records(family: ViewFamily, *, pictures: int, seed: int = 0) -> ViewGeometry:
    """Return the records that a family's law gives for square pictures 0, 1, ...; pixels are not needed for what the law alone knows."""
    size = np.full((pictures, 2), 1024, np.int32)
    (record,) = draw_records(ViewRecipe(families=(family,)), seed=seed, epoch=0, drawn_for=np.arange(pictures), source_size=size)
    return record.geometry


def enlarged(views: Views, side_px: int) -> Views:
    """Return the same views with more, but no new, pixels: what was rendered small loses the same detail whatever its box."""
    small = views.pixels
    large = F.interpolate(small.flatten(0, 1).float(), size=(side_px, side_px), mode="bilinear", align_corners=False)
    geometry = replace(views.geometry, size_px=(side_px, side_px))
    return replace(views, pixels=large.to(small.dtype).unflatten(0, small.shape[:2]), geometry=geometry)


def r2(predicted: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - squared error / variance of the targets, over the pairs that count; not finite where the targets do not vary.

    Shapes: predicted and targets (B, P, C), mask (B, P) bool, true for pairs that count -> (C,).
    """
    weight = mask.to(targets.dtype).unsqueeze(-1)
    total = weight.sum((0, 1))
    mean = (targets * weight).sum((0, 1)) / total
    residual = ((predicted - targets).square() * weight).sum((0, 1))
    return 1 - residual / ((targets - mean).square() * weight).sum((0, 1))
