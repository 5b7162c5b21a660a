"""An objective of another package, which tells how bright a view is, and a recipe that learns it from views on a ring."""

from dataclasses import dataclass, field

from foreign_law import Ring
from torch import nn

from wherefrom.pipeline import Batch, CropLaw, ViewFamily
from wherefrom.train import Encode, Encoder, ModelSettings, Objective, Progress, Terms, TrainSettings


@dataclass(frozen=True, kw_only=True)
class BrightnessSettings:
    """How many views tell how bright they are, of what size, cut where."""

    weight: float = 1.0
    views: int = 2
    size_px: int = 24
    law: CropLaw = field(default_factory=Ring)

    def objective(self, name: str) -> "Brightness":
        """Return what is learned."""
        return Brightness(self, name)


class Brightness(Objective):
    """Tell the mean of a view's pixels."""

    def __init__(self, settings: BrightnessSettings, name: str) -> None:
        super().__init__()
        self.name = name
        self.families = (ViewFamily(name=name, views=settings.views, size_px=(settings.size_px,) * 2, law=settings.law, min_side_px=4),)

    def setup(self, encoder: Encoder) -> None:
        """Build the head."""
        self.head = nn.Linear(encoder.width, 1)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the squared error over all views."""
        views = batch.family(self.name)
        brightness = views.pixels.mean((-3, -2, -1))  # (B, V)
        return Terms(losses={"squared": (self.head(encode(views).summary)[..., 0] - brightness).square().mean()})


def rings() -> TrainSettings:
    """Return a run of a tiny ViT that learns nothing else."""
    model = ModelSettings(name="vit_small_patch16_224", view_size_px=24, patch_size_px=12, width=32, depth=1, heads=2)
    return TrainSettings(recipe="rings", global_batch=8, updates=2, model=model, objectives={"brightness": BrightnessSettings()})
