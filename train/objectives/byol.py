"""BYOL: predict what a slowly moving copy of the network says of another view of the picture.

Here: the settings, the loss, the objective.
Not here: its optimizer (wherefrom.train.lars), its schedule (the recipe's).
Source: arXiv 2006.07733; google-deepmind/deepmind-research f5de0ed, byol.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.objectives.teacher import follow
from wherefrom.train.objectives.view_pairs import FIRST_COLOR, SECOND_COLOR, view_pair
from wherefrom.train.schedule import cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class BYOLSettings:
    """Every choice of BYOL, as for ImageNet."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the finished, square views
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    color: ColorLaw | None = field(default_factory=lambda: FIRST_COLOR)  # of the first view
    second_color: ColorLaw | None = field(default_factory=lambda: SECOND_COLOR)

    hidden: int = 4096  # of projector and predictor
    out: int = 256
    momentum: float = 0.99  # of the target at first; it goes to 1 by a cosine
    target_start: Literal["drawn", "copied"] = "drawn"  # by itself, as the authors' code; from given weights always copied

    def __post_init__(self) -> None:
        check_literals(self)
        if min(self.hidden, self.out) < 1:
            raise ValueError(f"hidden={self.hidden}, out={self.out}: each needs at least 1")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum}: needs 0 <= momentum <= 1")
        _ = self.families("byol")  # they check their own numbers

    def families(self, name: str) -> tuple[ViewFamily, ViewFamily]:
        """Return the two views that these settings ask the loader for."""
        colors = (self.color, self.second_color)
        return view_pair(name, size_px=self.size_px, area_frac=self.area_frac, aspect=self.aspect, colors=colors)

    def objective(self, name: str) -> "BYOL":
        """Return what is learned by these settings, under a name."""
        return BYOL(self, name=name)


class BYOL(Objective):
    """BYOL as an objective: one term, the sum of both directions. Each view passes by itself, so BatchNorm takes its statistics of one.

    The target is in training mode, too: it normalizes by the batch, and its statistics are its own.
    """

    couples_samples = True

    def __init__(self, settings: BYOLSettings, *, name: str = "byol") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = settings.families(name)

    def setup(self, encoder: Encoder) -> None:
        """Build projector, predictor and target."""
        settings = self.settings
        widths = [settings.hidden, settings.out]
        self.projector = mlp([encoder.width, *widths], hidden_bias=True)
        self.predictor = mlp([settings.out, *widths], hidden_bias=True)
        if settings.target_start == "copied" or encoder.settings.weights is not None:
            self.target, self.target_projector = encoder.slow_copy(), copy.deepcopy(self.projector)
        else:
            self.target = Encoder(encoder.settings).slow_copy()
            self.target_projector = mlp([encoder.width, *widths], hidden_bias=True)
        self.target_projector.requires_grad_(False)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term."""
        refuse_one(batch, self.name, "BatchNorm has nothing to compare it with")
        views = [batch.family(family.name) for family in self.families]
        summaries = [encode(view).summary[:, 0] for view in views]
        projected = [self.projector(summary) for summary in summaries]
        predicted = [self.predictor(z) for z in projected]
        with torch.no_grad():
            targets = [self.target_projector(self.target.encode(view).summary[:, 0]) for view in views]
        loss = distance(predicted[0], targets[1]) + distance(predicted[1], targets[0])
        return Terms(losses={"distance": loss}, meters=spread(summaries[0]))

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        """Move the target."""
        momentum = cosine(progress.update, updates=progress.updates, start=self.settings.momentum, end=1.0)
        follow(self.target, encoder, momentum=momentum)
        follow(self.target_projector, self.projector, momentum=momentum)


def distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of unit vectors, 2 - 2 cos; no gradient goes into the target.

    Shapes: (B, D) each -> a scalar, from 0 to 4.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        unit, aim = (F.normalize(full_precision(z), dim=-1, eps=1e-6) for z in (predicted, target.detach()))
        return (unit - aim).square().sum(-1).mean()
