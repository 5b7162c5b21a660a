"""Barlow Twins: let every channel say the same of two views of a picture, and no two channels the same.

Here: the settings, the two terms, the objective.
Not here: its optimizer (wherefrom.train.lars), its schedule (the recipe's).
Source: arXiv 2103.03230; facebookresearch/barlowtwins 8e8d284, whose gradient over W ranks is 1/W of the loss's: it sums the correlation
over ranks without gradient, then DDP takes means. Ours is the loss's own, so that 1 and 2 ranks agree. LARS hides the factor for weights,
but not beside weight decay, and not for what it leaves unscaled, biases and norms: see `bias_lr_factor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, ParameterRule, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.objectives.view_pairs import FIRST_COLOR, SECOND_COLOR, view_pair
from wherefrom.train.over_ranks import BatchNormOverRanks, mean_over_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class BarlowTwinsSettings:
    """Every choice of Barlow Twins, as for ImageNet."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the finished, square views
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    color: ColorLaw | None = field(default_factory=lambda: FIRST_COLOR)  # of the first view
    second_color: ColorLaw | None = field(default_factory=lambda: SECOND_COLOR)

    hidden: int = 8192  # of the projector's two hidden layers
    out: int = 8192
    weight_redundancy: float = 0.0051  # of its term beside invariance
    bias_lr_factor: float = (
        1.0  # of the learning rate, for biases and norms; the authors' is 0.0048 / 0.2, of a gradient that is 1/W of ours
    )

    def __post_init__(self) -> None:
        if min(self.hidden, self.out) < 1:
            raise ValueError(f"hidden={self.hidden}, out={self.out}: each needs at least 1")
        if min(self.weight_redundancy, self.bias_lr_factor) < 0:
            raise ValueError(f"weight_redundancy={self.weight_redundancy}, bias_lr_factor={self.bias_lr_factor}: neither may be negative")
        _ = self.families("barlow")  # they check their own numbers

    def families(self, name: str) -> tuple[ViewFamily, ViewFamily]:
        """Return the two views that these settings ask the loader for."""
        colors = (self.color, self.second_color)
        return view_pair(name, size_px=self.size_px, area_frac=self.area_frac, aspect=self.aspect, colors=colors)

    def objective(self, name: str) -> "BarlowTwins":
        """Return what is learned by these settings, under a name."""
        return BarlowTwins(self, name=name)


class BarlowTwins(Objective):
    """Barlow Twins as an objective: two terms. Each view passes by itself, so BatchNorm takes its statistics of one."""

    couples_samples = True

    def __init__(self, settings: BarlowTwinsSettings, *, name: str = "barlow") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights: Mapping[str, float] = {"redundancy": settings.weight_redundancy}
        self.families = settings.families(name)

    def setup(self, encoder: Encoder) -> None:
        """Build the projector, and the BatchNorm without scale and shift that both views share."""
        self.projector = mlp([encoder.width, self.settings.hidden, self.settings.hidden, self.settings.out])
        self.norm = BatchNormOverRanks(self.settings.out, affine=False)

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Return how a parameter learns: biases and norms at a rate of their own."""
        return ParameterRule(lr_factor=self.settings.bias_lr_factor) if parameter.ndim <= 1 else ParameterRule()

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the terms."""
        refuse_one(batch, self.name, "nothing correlates")
        summaries = [encode(batch.family(family.name)).summary[:, 0] for family in self.families]
        first, second = (self.projector(summary) for summary in summaries)
        with torch.autocast(first.device.type, enabled=False):
            losses = barlow_terms(self.norm(full_precision(first)), self.norm(full_precision(second)))
        return Terms(losses=losses, meters=spread(summaries[0]))


def barlow_terms(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Return how far the correlation of both views, over all ranks, is from 1 in each channel, and from 0 between two: sums of squares.

    Shapes: (B, D) each, of each rank, normalized over all ranks' samples -> scalars.
    """
    correlation = mean_over_ranks(first.mT @ second / len(first))
    return {
        "invariance": (correlation.diagonal() - 1).square().sum(),
        "redundancy": correlation.square().fill_diagonal_(0).sum(),
    }
