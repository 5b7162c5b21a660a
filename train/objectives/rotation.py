"""Rotation: tell by how many quarter turns a picture was turned, of all four turns of every picture.

Here: the settings, the turns, the objective.
Not here: views that the loader turns and records (`ViewFamily.turns`).
Source: RotNet, arXiv 1803.07728; a linear head on ResNets as VISSL has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, Mirror, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import QUARTER_TURNS, Encode, Objective, Panel, Progress, Terms
from wherefrom.train.objectives.collapse import spread

TURNS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationSettings:
    """Every choice of rotation, as for ImageNet but for the side of its views, which is of a plug-in's."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 96  # side of the finished, square view; 224 in the recipe for ImageNet
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    mirror: Mirror = "view"
    color: ColorLaw | None = None

    def __post_init__(self) -> None:
        check_literals(self)
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: cannot be negative")
        _ = self.family("rotation")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the one view, upright, that these settings ask the loader for."""
        return ViewFamily(
            name=name,
            views=1,
            size_px=(self.size_px, self.size_px),
            law=Independent(area_frac=self.area_frac, aspect=self.aspect),
            mirror=self.mirror,
            color=self.color,
            min_side_px=1,
        )

    def objective(self, name: str) -> "Rotation":
        """Return what is learned by these settings, under a name."""
        return Rotation(self, name=name)


class Rotation(Objective):
    """Rotation as an objective: one term, the cross-entropy of four turns. Chance is an accuracy of 1/4."""

    chance = 1 / TURNS

    def __init__(self, settings: RotationSettings, *, name: str = "rotation") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)

    def setup(self, encoder: Encoder) -> None:
        """Build the head, a linear layer."""
        self.head = nn.Linear(encoder.width, TURNS)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, how often the turn is told right, and how summaries spread."""
        turned = quarter_turned(batch.family(self.name).pixels[:, 0])
        summary = encode(turned).summary  # (B, 4, D)
        logits = self.head(summary).flatten(0, 1)
        turns = torch.arange(TURNS, device=logits.device).repeat(len(turned))
        accuracy = (logits.detach().argmax(-1) == turns).float().mean()
        return Terms(losses={"turn": F.cross_entropy(logits, turns)}, meters={"accuracy": accuracy} | spread(summary))

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return all four turns."""
        turned = quarter_turned(batch.family(self.name).pixels[:, 0])
        return [Panel(title=f"{self.name}: all four turns, as the network is given them", pictures=turned, labels=QUARTER_TURNS)]


def quarter_turned(pixels: Tensor) -> Tensor:
    """Return square pictures turned counter-clockwise by 0 to 3 quarters: pixels change places, and no value changes.

    Shapes: (B, C, S, S) -> (B, 4, C, S, S).
    """
    return torch.stack([pixels.rot90(turns, (-2, -1)) for turns in range(TURNS)], 1)
