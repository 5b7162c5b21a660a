"""VICReg: let two views of a picture agree while every channel keeps its variance and no two of them say the same.

Here: the settings, the three terms, the objective.
Not here: its optimizer (wherefrom.train.lars), its schedule (the recipe's).
Source: arXiv 2105.04906; facebookresearch/vicreg 4e12602.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.objectives.view_pairs import FIRST_COLOR, SECOND_COLOR, view_pair
from wherefrom.train.over_ranks import gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class VICRegSettings:
    """Every choice of VICReg, as for ImageNet."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the finished, square views
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    color: ColorLaw | None = field(default_factory=lambda: FIRST_COLOR)  # of the first view
    second_color: ColorLaw | None = field(default_factory=lambda: SECOND_COLOR)

    hidden: int = 8192  # of the projector's two hidden layers
    out: int = 8192
    weight_invariance: float = 25.0  # of its term, within `weight`
    weight_variance: float = 25.0
    weight_covariance: float = 1.0

    def __post_init__(self) -> None:
        if min(self.hidden, self.out) < 1:
            raise ValueError(f"hidden={self.hidden}, out={self.out}: each needs at least 1")
        for name in ("weight_invariance", "weight_variance", "weight_covariance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: weights cannot be negative")
        _ = self.families("vicreg")  # they check their own numbers

    def families(self, name: str) -> tuple[ViewFamily, ViewFamily]:
        """Return the two views that these settings ask the loader for."""
        colors = (self.color, self.second_color)
        return view_pair(name, size_px=self.size_px, area_frac=self.area_frac, aspect=self.aspect, colors=colors)

    def objective(self, name: str) -> "VICReg":
        """Return what is learned by these settings, under a name."""
        return VICReg(self, name=name)


class VICReg(Objective):
    """VICReg as an objective: three terms. Each view passes by itself, so BatchNorm takes its statistics of one."""

    couples_samples = True

    def __init__(self, settings: VICRegSettings, *, name: str = "vicreg") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights = {term: getattr(settings, f"weight_{term}") for term in ("invariance", "variance", "covariance")}
        self.families = settings.families(name)

    def setup(self, encoder: Encoder) -> None:
        """Build the projector."""
        self.projector = mlp([encoder.width, self.settings.hidden, self.settings.hidden, self.settings.out], hidden_bias=True)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the terms."""
        refuse_one(batch, self.name, "it has no variance")
        summaries = [encode(batch.family(family.name)).summary[:, 0] for family in self.families]
        x, y = (self.projector(summary) for summary in summaries)
        return Terms(losses=vicreg_terms(x, y), meters=spread(summaries[0]))


def vicreg_terms(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return how far two views are apart, how much their channels lack in variance, and how much they covary, over all ranks.

    Variance is the mean of both views, covariance their sum; both are unbiased. Nothing is cut off from the gradient.
    Shapes: (B, D) each, of each rank -> scalars.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = full_precision(x), full_precision(y)
        invariance = F.mse_loss(x, y)
        everyone = [gathered(z) for z in (x, y)]
        lacking = [F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in everyone]
        covarying = [_covariance(z) for z in everyone]
    return {"invariance": invariance, "variance": (lacking[0] + lacking[1]) / 2, "covariance": covarying[0] + covarying[1]}


def _covariance(z: Tensor) -> Tensor:
    """Return the squares of covariances of different channels, summed over pairs, a channel."""
    centered = z - z.mean(0)
    covariance = centered.mT @ centered / (len(z) - 1)
    return covariance.square().fill_diagonal_(0).sum() / z.shape[1]
