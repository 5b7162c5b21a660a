"""SimCLR: tell which two views show the same picture, among all views of a batch.

Here: the settings, the loss, the objective.
Not here: its optimizer (wherefrom.train.lars), its schedule (the recipe's).
Source: arXiv 2002.05709, heads of three layers from 2006.10029; google-research/simclr 383d414, tf2.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.over_ranks import gathered, own_rank

COLOR = ColorLaw(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_prob=0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCLRSettings:
    """Every choice of SimCLR, as for ImageNet. Both views are drawn alike."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the finished, square view
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    color: ColorLaw | None = field(default_factory=lambda: COLOR)

    temperature: float = 0.1
    layers: int = 3  # of the projection head; 2 in the first version
    hidden: int | None = None  # None: the encoder's width
    out: int = 128
    init_std: float | None = 0.01  # of the head's weights at first; None: as torch has them, for optimizers that take no account of norms

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: needs a positive number")
        if self.layers < 1 or (self.hidden or 1) < 1 or self.out < 1:
            raise ValueError(f"layers={self.layers}, hidden={self.hidden}, out={self.out}: each needs at least 1")
        _ = self.family("simclr")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the two views that these settings ask the loader for."""
        law = Independent(area_frac=self.area_frac, aspect=self.aspect)
        return ViewFamily(name=name, views=2, size_px=(self.size_px, self.size_px), law=law, mirror="view", color=self.color, min_side_px=1)

    def objective(self, name: str) -> "SimCLR":
        """Return what is learned by these settings, under a name."""
        return SimCLR(self, name=name)


class SimCLR(Objective):
    """SimCLR as an objective: one term. Both views go through encoder and head as one batch, over which BatchNorm takes its statistics."""

    couples_samples = True

    def __init__(self, settings: SimCLRSettings, *, name: str = "simclr") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)

    def setup(self, encoder: Encoder) -> None:
        """Build the head, whose closing BatchNorm has no shift."""
        settings = self.settings
        hidden = settings.hidden or encoder.width
        self.head = mlp([encoder.width, *[hidden] * (settings.layers - 1), settings.out], closing="scale")
        for module in self.head:
            if isinstance(module, nn.Linear) and settings.init_std is not None:
                nn.init.normal_(module.weight, std=settings.init_std)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, and how often a view's nearest is the other one of its picture."""
        refuse_one(batch, self.name, "there are no others to tell it from")
        summary = encode(batch.family(self.name)).summary  # (B, 2, D)
        z = self.head(summary.flatten(0, 1)).unflatten(0, summary.shape[:2])
        loss, accuracy = nt_xent(z, temperature=self.settings.temperature)
        meters = {"contrast_accuracy": accuracy} | spread(summary)
        return Terms(losses={"contrast": loss}, meters=meters)


def nt_xent(z: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of finding a view's counterpart among all other views of all ranks, and how often it is the nearest.

    The mean over pictures of both directions' sum: twice the mean over views that other libraries take.
    Shapes: z (B, 2, D), of each rank -> scalars.
    Source: as the module's; z / sqrt(max(|z|^2, 1e-12)), and a view is not compared with itself.
    """
    with torch.autocast(z.device.type, enabled=False):
        own = F.normalize(full_precision(z), dim=-1, eps=1e-6).transpose(0, 1)  # (2, B, D)
        everyone = gathered(own.transpose(0, 1)).transpose(0, 1)  # (2, ranks * B, D)
        pictures, all_pictures = own.shape[1], everyone.shape[1]
        logits = own.flatten(0, 1) @ everyone.flatten(0, 1).mT / temperature  # (2 B, 2 ranks B)
        first = own_rank() * pictures + torch.arange(pictures, device=z.device)
        itself = torch.cat([first, first + all_pictures])
        counterpart = itself.roll(pictures)
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        accuracy = (logits.detach().argmax(1) == counterpart).float().mean()
        return 2 * F.cross_entropy(logits, counterpart), accuracy
