"""SimCLR, BYOL, Barlow Twins and VICReg on real encoders: what learns, in which precision, and what meters say."""

import math

import pytest
import torch
from host_formulas import picture, tensor
from host_steps import batch_of

from wherefrom.pipeline import Batch
from wherefrom.train import OBJECTIVES, Encoder, ModelSettings, Objective, OptimSettings, Progress, Step
from wherefrom.train.optimizer import make_optimizer

pytestmark = pytest.mark.core

MODELS = {
    "ViT": ModelSettings(view_size_px=32, patch_size_px=16, width=32, depth=1, heads=2, drop_path=0.1),
    "ResNet": ModelSettings(name="resnet10t"),
}
NARROW = {
    "simclr": {"hidden": 16, "out": 8},
    "byol": {"hidden": 16, "out": 8},
    "barlow": {"hidden": 16, "out": 8},
    "vicreg": {"hidden": 16, "out": 8},
}
FIRST = Progress(update=0, updates=10, updates_per_epoch=5)


def host(method: str) -> Objective:
    """Return a method with a narrow head, for views of 32 px."""
    objective: Objective = OBJECTIVES[method](size_px=32, **NARROW[method]).objective(method)
    return objective


def batch_for(objective: Objective, samples: int = 6) -> Batch:
    """Return pictures for every family of an objective."""
    return batch_of(
        *(
            (each.name, tensor(picture((samples, each.views, 3, 32, 32), number, 0)).float())
            for number, each in enumerate(objective.families)
        )
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", NARROW)
def test_everything_that_learns_is_reached_and_moves(method: str, model: str) -> None:
    objective = host(method)
    step = Step(Encoder(MODELS[model]), [objective], seed=0).train()
    batch = batch_for(objective)
    assert step.freeze_unreached(batch, FIRST) == ((), ())
    optimizer = make_optimizer(step, OptimSettings(name="ssl_lars", lr=0.1), step.parameter_rules())
    before = {name: values.detach().clone() for name, values in step.named_parameters()}
    assert any(".target" in name for name in before) == (method == "byol")
    for update in range(2):  # of a residual branch that starts at zero, the weights before it move at the second
        out = step(batch, Progress(update=update, updates=10, updates_per_epoch=5))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.after_step(FIRST, out.seen)
    still = [name for name, values in step.named_parameters() if torch.equal(values, before[name])]
    # a bias before a BatchNorm has no gradient but rounding
    assert [name for name in still if not name.endswith("bias")] == []


@pytest.mark.parametrize("method", NARROW)
def test_losses_under_autocast_are_near_those_in_full_precision(method: str) -> None:
    objective = host(method)
    step = Step(Encoder(MODELS["ViT"]), [objective], seed=0).train()
    batch = batch_for(objective)
    full = step(batch, FIRST).losses
    with torch.autocast("cpu", torch.bfloat16):
        half = step(batch, FIRST).losses
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(value.item(), rel=0.2, abs=0.02)


@pytest.mark.parametrize("method", NARROW)
def test_every_host_says_how_far_features_spread_and_couples_samples(method: str) -> None:
    objective = host(method)
    step = Step(Encoder(MODELS["ViT"]), [objective], seed=0).train()
    meters = step(batch_for(objective), FIRST).meters
    names = {f"{method}/feature_std", f"{method}/feature_rank"}
    assert names <= meters.keys() and all(math.isfinite(float(meters[name])) for name in names)
    assert objective.couples_samples and not objective.leaves_parameters_unused
