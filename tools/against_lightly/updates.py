"""Updates of lightly's methods by our optimizer, schedules and clipping: the same ones that our runs go by.

Here: one update. Not here: the methods (theirs.py); ours, which `Trainer` makes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wherefrom.tools.against_lightly.theirs import Theirs
from wherefrom.train.objective import Progress
from wherefrom.train.objectives.mae import Mask
from wherefrom.train.optimizer import clip_gradients, gated_step, make_optimizer, set_rates
from wherefrom.train.settings import TrainSettings


class TheirUpdates:
    """A method of theirs under way; `done` of `updates` updates are completed."""

    def __init__(self, theirs: Theirs, settings: TrainSettings, *, updates: int, updates_per_epoch: int) -> None:
        self.theirs = theirs
        self.settings = settings
        self.updates, self.updates_per_epoch = updates, updates_per_epoch
        self.done = 0
        self._optimizer = make_optimizer(theirs, settings.optim, theirs.rules)
        self._learn = {"all": [parameter for parameter in theirs.parameters() if parameter.requires_grad]}

    def update(self, views: Sequence[Tensor], mask: Mask | None = None) -> float:
        """Make an update; return the loss before it."""
        progress = Progress(update=self.done, updates=self.updates, updates_per_epoch=self.updates_per_epoch)
        optim = self.settings.optim
        loss = self.theirs.loss(views, progress, mask)
        loss.backward()
        self.theirs.before_update(progress)
        clip_gradients(self._learn, optim.clip_norm, each=optim.clip_by == "parameter")
        rate, decay = (get(self.done, self.updates) for get in (self.settings.learning_rate, self.settings.weight_decay))
        set_rates(self._optimizer, lr=rate, peak_lr=optim.lr, weight_decay=decay)
        gated_step(self._optimizer, torch.ones((), dtype=torch.bool))
        self._optimizer.zero_grad()
        self.theirs.after_update(progress)
        self.done += 1
        return float(loss.detach())
