"""A host's whole update in float64, as its authors' figures have it: a tiny encoder, batches by formula, our step and optimizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from host_formulas import gap, parameter, picture, tensor
from torch import Tensor, nn

from wherefrom.pipeline import Batch, Photometric, ViewGeometry, Views
from wherefrom.train import Encoder, ModelSettings, Objective, OptimSettings, Progress, Step, StepOutput
from wherefrom.train.optimizer import make_optimizer, set_rates

SIDE = 4  # pixels


class TinyEncoder(Encoder):
    """Linear, BatchNorm or none, ReLU on the pixels of a view of 4 px."""

    def __init__(self, width: int, *, norm: bool) -> None:
        nn.Module.__init__(self)
        self.settings = ModelSettings(name="resnet10t")
        self.width = width
        self.conv1 = nn.Linear(3 * SIDE**2, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, pixels: Tensor, *, keep: Tensor | None = None, positions: bool = True) -> tuple[Tensor, Tensor, None]:
        summary = self.bn1(self.conv1(pixels.flatten(1))).relu()
        return summary, summary[:, None, None], None


def batch_of(*families: tuple[str, Tensor]) -> Batch:
    """Return views of 4 px by their families, pixels (B, V, 3, 4, 4) each; their records say nothing."""
    samples = len(families[0][1])
    sample, hw = torch.arange(samples), torch.full((samples, 2), 64, dtype=torch.int32)
    views = []
    for name, pixels in families:
        count = pixels.shape[1]
        record = ViewGeometry(
            boxes=torch.tensor([0.0, 0, 32, 32]).expand(samples, count, 4),
            flipped=torch.zeros(samples, count, dtype=torch.bool),
            quarter_turns=torch.zeros(samples, count, dtype=torch.long),
            source_size=hw,
            stored_orientation=torch.ones(samples, dtype=torch.uint8),
            sample=sample,
            drawn_for=sample,
            view=torch.arange(count),
            family=name,
            size_px=tuple(pixels.shape[-2:]),
            seed=0,
            epoch=0,
        )
        valid = torch.ones(samples, count, dtype=torch.bool)
        views.append(Views(pixels=pixels, geometry=record, valid=valid, photometric=Photometric.unchanged(samples, count)))
    return Batch(sample=sample, drawn_for=sample, label=torch.full((samples,), -1), source_size=hw, views=tuple(views))


def pictures_of(objective: Objective, samples: int, update: int) -> Batch:
    """Return the figures' views 0 and 1 of an update, of one family or of two."""
    both = [tensor(picture((samples, 3, SIDE, SIDE), view, update)) for view in (0, 1)]
    names = [family.name for family in objective.families]
    return batch_of((names[0], torch.stack(both, 1))) if len(names) == 1 else batch_of(*zip(names, (v[:, None] for v in both), strict=True))


def assert_near(ours: Tensor, theirs: Any, what: str, within: float = 1e-9) -> None:
    """Raise AssertionError unless an array is what is stored of the authors'."""
    found = gap(ours, theirs)
    assert found <= within, f"{what} is {found:.2g} off"


def fill(module: nn.Module, author_name: Callable[[str], str], skip: Sequence[str] = ()) -> None:
    """Give every parameter the value that the figures have for its name at the authors'."""
    with torch.no_grad():
        for name, values in module.named_parameters():
            if not name.startswith(tuple(skip)):
                values.copy_(tensor(parameter(author_name(name), tuple(values.shape))))


def assert_grads(module: nn.Module, author_name: Callable[[str], str], figures: Mapping[str, Any]) -> None:
    """Raise AssertionError unless gradients are the authors', where they have them; a bias before a BatchNorm has none but rounding."""
    ours = {author_name(name): values.grad for name, values in module.named_parameters()}
    for name, theirs in figures.items():
        gradient = ours[name]
        assert gradient is not None
        if gradient.norm() > 1e-12:
            assert_near(gradient, theirs, f"gradient of {name}")


def updates_of(
    objective: Objective,
    encoder: Encoder,
    prepare: Callable[[Step], None],
    *,
    samples: int,
    rates: Sequence[float],
    optimizer: str,
    first: int = 0,
    of: int = 6,
) -> Iterator[tuple[Step, StepOutput]]:
    """Yield the step and what it said after every update; progress counts from `first`, of `of`."""
    step = Step(encoder, [objective], seed=0).double().train()
    prepare(step)
    follow = make_optimizer(step, OptimSettings(name=optimizer, weight_decay=0.01), step.parameter_rules())
    for update, rate in enumerate(rates):
        progress = Progress(update=first + update, updates=of, updates_per_epoch=2)
        out = step(pictures_of(objective, samples, update), progress)
        follow.zero_grad()
        out.loss.backward()
        step.before_update(progress)
        set_rates(follow, lr=rate, peak_lr=rate, weight_decay=0.01)
        follow.step()
        step.after_step(progress, out.seen)
        yield step, out
