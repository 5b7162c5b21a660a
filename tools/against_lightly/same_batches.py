"""Our methods and lightly's from equal weights on one stored stream of batches: do their losses agree?

Here: the settings, the stream, the losses of both sides, and of theirs with a planted difference.
Not here: their side (theirs.py, updates.py); runs with two loaders (own_loaders.py).
"""

import contextlib
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.tools.against_lightly.theirs import THEIRS, Method, Theirs
from wherefrom.tools.against_lightly.updates import TheirUpdates
from wherefrom.train.loop import accelerator_for
from wherefrom.train.meters import LOSS
from wherefrom.train.objective import Step, random_scope
from wherefrom.train.objectives import DINOSettings, SimCLRSettings
from wherefrom.train.objectives.mae import MAE, Mask
from wherefrom.train.recipes import recipe
from wherefrom.train.recipes.sizes import SMALL_VIT
from wherefrom.train.settings import RuntimeSettings, TrainSettings
from wherefrom.train.trainer import Trainer

LARGEST_DIFFERENCE = 1e-3  # of two losses, float32
UPDATES = 50
SLOW_RATE = 2e-4  # of SimCLR


@dataclass(frozen=True, kw_only=True, slots=True)
class SameBatches:
    """The losses of the same updates."""

    method: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    planted: tuple[float, ...]  # theirs, made another method by a little

    @property
    def difference(self) -> float:
        """The largest difference of two losses."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def planted_difference(self) -> float:
        """The same, of what is planted."""
        return max(abs(a - b) for a, b in zip(self.ours, self.planted, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether all losses agree, and those of what is planted do not."""
        return self.difference <= LARGEST_DIFFERENCE < self.planted_difference

    def described(self) -> str:
        """Return the differences in words."""
        return f"largest difference of {len(self.ours)} losses {self.difference:.1e}, of one planted {self.planted_difference:.1e}"


def common_settings(method: Method) -> TrainSettings:
    """Return our recipe of a method, of a small ViT, with what differs between two libraries by choice set alike.

    The loss of SimCLR is a mean over views, which is half of its authors'; positions of DINO's small views are antialiased.
    """
    settings = recipe(f"imagenette_{method}")
    learned = settings.objectives[method]
    if isinstance(learned, SimCLRSettings):
        learned = replace(learned, weight=0.5)
    model = settings.model if settings.model.is_vit else SMALL_VIT
    return replace(settings, model=model, objectives={method: learned}, runtime=RuntimeSettings(device="cpu", log_with="none"))


def settings_of_first_updates(method: Method) -> TrainSettings:
    """Return settings whose first 50 updates on imagenette's 4000 pictures see all of a method, and of DINO two epochs.

    SimCLR learns slowly, at a high temperature, from mean tokens. What lies within rounding of 0 before a ReLU may have a gradient on one
    side alone; by the recipe itself that grows a hundredfold in ten updates, in float32 against float64 of one library as well.
    """
    settings = common_settings(method)
    learned = settings.objectives[method]
    if isinstance(learned, SimCLRSettings):
        learned = replace(learned, temperature=0.5)
        model, optim = replace(settings.model, summary="mean"), replace(settings.optim, lr=SLOW_RATE)
        return replace(settings, objectives={method: learned}, model=model, optim=optim)
    if isinstance(learned, DINOSettings):  # in the first epoch the prototypes rest; in the second the temperature has risen
        learned = replace(learned, teacher_temperature=0.07, teacher_temperature_epochs=2)
        return replace(settings, objectives={method: learned}, global_batch=128)
    return settings


def same_batches(settings: TrainSettings, index: ShardIndex, *, updates: int = UPDATES, float64: bool = False) -> SameBatches:
    """Make the first updates of `settings` by our trainer, and by their modules on the same batches from the same weights."""
    ((method, learned),) = settings.objectives.items()
    precision = torch.float64 if float64 else torch.float32
    with contextlib.closing(Trainer(settings, index, accelerator_for(settings))) as trainer:
        batches = [_stored(batch, precision) for batch in itertools.islice(trainer.loader.forever(), updates)]
        make = THEIRS[method]
        with random_scope("weights follow"):
            sides: list[Theirs] = [make(settings.model, learned, planted=planted) for planted in (False, True)]
        for side in sides:
            side.take(trainer.step)
            side.to(precision)
        trainer.step.to(precision)
        masks = [mask_of(batch, trainer.step) for batch in batches]
        trainer.batches = iter(batches)
        ours = []
        for _ in batches:
            trainer.update()
            ours.append(trainer.window.take()[LOSS])
    counts = {"updates": trainer.updates, "updates_per_epoch": trainer.loader.updates_per_epoch}
    theirs, planted = (_losses(TheirUpdates(side, settings, **counts), batches, masks) for side in sides)
    return SameBatches(method=method, ours=tuple(ours), theirs=theirs, planted=planted)


def mask_of(batch: Batch, step: Step) -> Mask | None:
    """Return the masks that our MAE draws of a batch's single views; None of other methods."""
    objective = next(iter(step.objectives.values()))
    if not isinstance(objective, MAE):
        return None
    mask = objective.mask_of(batch.views[0].geometry)
    return Mask(keep=mask.keep[:, 0], restore=mask.restore[:, 0])


def views_of(batch: Batch) -> list[Tensor]:
    """Return the pixels of a batch as their transforms have them: (B, 3, H, W) a view."""
    return [pixels for views in batch.views for pixels in views.pixels.unbind(1)]


def _stored(batch: Batch, precision: torch.dtype) -> Batch:
    """Return a copy that holds no slot of the loader."""
    batch = copy.deepcopy(batch)
    return replace(batch, views=tuple(replace(views, pixels=views.pixels.to(precision)) for views in batch.views))


def _losses(updates: TheirUpdates, batches: Sequence[Batch], masks: Sequence[Mask | None]) -> tuple[float, ...]:
    return tuple(updates.update(views_of(batch), mask) for batch, mask in zip(batches, masks, strict=True))
