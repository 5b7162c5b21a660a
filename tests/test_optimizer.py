"""How parameters learn: groups against timm's own, rules in an update of a run, and a step that depends on a parameter's own gradient."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from wherefrom.pipeline import Disjoint, ShardIndex
from wherefrom.train import (
    Encoder,
    ModelSettings,
    OptimSettings,
    ParameterRule,
    RuntimeSettings,
    SpatialPrediction,
    SpatialSettings,
    Step,
    Trainer,
    TrainSettings,
)
from wherefrom.train.loop import accelerator_for
from wherefrom.train.optimizer import drop_resting, gated_step, make_optimizer, set_rates

pytestmark = pytest.mark.core

NAMES = ("adamw", "sgd", "lars", "lamb", "muon", "ssl_lars", "simclr_lars")
VIT = ModelSettings(name="vit_small_patch16_224", view_size_px=24, patch_size_px=12, width=32, depth=3, heads=2)


def named(optimizer: torch.optim.Optimizer, model: nn.Module, **wanted: Any) -> set[str]:
    """Return the names of the parameters in groups that have certain values."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if all(group[name] == value for name, value in wanted.items())]
    return {names[id(parameter)] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_parameters_step_depends_on_no_other_ones_gradient(name: str) -> None:
    def stepped(scale: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"host": nn.Linear(4, 4), "plugin": nn.Linear(4, 4)})
        optimizer = make_optimizer(model, OptimSettings(name=name, lr=0.1))
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 3.0)
            model["plugin"].weight.grad.mul_(scale)
            gated_step(optimizer, torch.tensor(True))
        return model["host"].weight.detach()

    assert torch.equal(stepped(1.0), stepped(1e4))


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_may_join_late(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"early": nn.Linear(4, 4), "late": nn.Linear(4, 4)})
    optimizer = make_optimizer(model, OptimSettings(name=name, lr=0.1))
    start = model["late"].weight.detach().clone()
    for update in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if update < 2:
            model["late"].zero_grad(set_to_none=True)
        gated_step(optimizer, torch.tensor(True))
        assert torch.equal(model["late"].weight, start) == (update < 2)


def test_layers_learn_by_timms_own_factors() -> None:
    step = Step(Encoder(VIT), [SpatialPrediction(SpatialSettings())], seed=0)
    optimizer = make_optimizer(step, OptimSettings(weight_decay=0.1), step.parameter_rules(layer_decay=0.65))
    vit = step.encoder.model
    theirs = timm.optim.param_groups_layer_decay(vit, 0.1, vit.no_weight_decay(), layer_decay=0.65)
    for group in theirs:
        expected = {f"encoder.model.{name}" for name, p in vit.named_parameters() if any(p is q for q in group["params"])}
        ours = named(optimizer, step, lr_scale=group["lr_scale"], weight_decay=group["weight_decay"])
        assert expected <= ours
        assert all(name.startswith("objectives.") for name in ours - expected)
    assert named(optimizer, step, lr_scale=1.0) >= {
        f"objectives.spatial.{name}" for name, _ in step.objectives["spatial"].named_parameters()
    }


class Ruled(SpatialPrediction):
    """SP with the rules of a test."""

    rule: Callable[[str, nn.Parameter], ParameterRule]

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        return self.rule(name, parameter)


@contextlib.contextmanager
def trainer_of(shards: Path, rule: Callable[[str, nn.Parameter], ParameterRule], **optim: Any) -> Iterator[Trainer]:
    """Yield a trainer of two epochs of five updates whose host has a rule."""
    spatial = SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4)
    settings = TrainSettings(
        recipe="demo",
        data=str(shards / "train.tar"),
        global_batch=8,
        epochs=2,
        model=dataclasses.replace(VIT, depth=1),
        objectives={"spatial": spatial},
        optim=OptimSettings(**{"lr": 1e-2, "warmup_frac": 0.5} | optim),
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1),
    )
    host = Ruled(spatial)
    host.rule = rule
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSettings, "make_objectives", lambda _: (host,))
        trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator_for(settings))
    with contextlib.closing(trainer):
        yield trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_rests_until_an_epoch_stays_as_it_started_and_learns_from_then_on(optimizer: str, tiny_shards: Path) -> None:
    def rule(name: str, parameter: nn.Parameter) -> ParameterRule:
        return ParameterRule(rest_epochs=0.6) if name.startswith(("head.mlp.2", "encoder.model.norm")) else ParameterRule()

    with trainer_of(tiny_shards, rule, name=optimizer) as trainer:
        head, norm = trainer.step.objectives["spatial"].head.mlp[2].weight, trainer.step.encoder.model.norm.weight
        start = (head.detach().clone(), norm.detach().clone())
        for update in range(5):
            trainer.update()
            moved = [not torch.equal(now, then) for now, then in zip((head, norm), start, strict=True)]
            assert moved == [update >= 3] * 2
            assert (head in trainer.optimizer.state) == (update >= 3)  # no moments of gradients that it did not follow
        assert trainer.frozen_parameters == trainer.unreached_parameters == ()


def test_rates_follow_rules_and_schedules(tiny_shards: Path) -> None:
    def rule(name: str, parameter: nn.Parameter) -> ParameterRule:
        if parameter.ndim <= 1:
            return ParameterRule(lr_factor=0.25)
        return ParameterRule(constant_lr=True, decays=False) if name == "head.mlp.0.weight" else ParameterRule()

    with trainer_of(tiny_shards, rule, weight_decay=0.04, final_weight_decay=0.4) as trainer:
        settings, step = trainer.settings, trainer.step
        trainer.update()
        for _ in range(3):
            rate, decay = settings.learning_rate(trainer.done, 10), settings.weight_decay(trainer.done, 10)
            assert 0 < rate < 0.8 * settings.optim.lr and 0.04 < decay < 0.4
            trainer.update()
            biases = named(trainer.optimizer, step, lr=0.25 * rate, weight_decay=0.0)
            assert biases == {name for name, parameter in step.named_parameters() if parameter.ndim <= 1}
            assert named(trainer.optimizer, step, lr=settings.optim.lr, weight_decay=0.0) == {"objectives.spatial.head.mlp.0.weight"}
            decayed = named(trainer.optimizer, step, lr=rate, weight_decay=decay)
            assert "encoder.model.blocks.0.attn.qkv.weight" in decayed
            assert "encoder.model.pos_embed" in named(trainer.optimizer, step, lr=rate, weight_decay=0.0)


def test_only_the_host_has_a_say_in_how_the_encoder_learns() -> None:
    asked: dict[str, list[str]] = {}

    def objective(name: str) -> Ruled:
        ruled = Ruled(SpatialSettings(), name=name)
        ruled.rule = lambda parameter, _: asked.setdefault(name, []).append(parameter) or ParameterRule()
        return ruled

    step = Step(Encoder(VIT), [objective("host"), objective("plugin")], seed=0)
    rules = step.parameter_rules()
    assert any(name.startswith("encoder.model.") for name in asked["host"])
    assert [name for name in asked["plugin"] if name.startswith("encoder.")] == []
    assert rules.keys() == dict(step.named_parameters()).keys()
    with pytest.raises(ValueError, match=r"lr_factor=-1\.0, rest_epochs=0\.0: neither may be negative"):
        ParameterRule(lr_factor=-1.0)
    for wrong, message in (({"layer_decay": 1.5}, "layer_decay=1.5: needs 0 <"), ({"final_weight_decay": -1.0}, "final_weight_decay=-1.0")):
        with pytest.raises(ValueError, match=message):
            OptimSettings(**wrong)


def test_an_optimizer_that_a_run_cannot_have_is_refused_in_one_line() -> None:
    for name, why in (("adahessian", "needs second derivatives"), ("kron", "draws random numbers that no"), ("bnbadamw", "needs a GPU")):
        with pytest.raises(ValueError, match=f"^optim.name='{name}': {why}.*; take another, such as adamw$"):
            make_optimizer(nn.Linear(2, 2), OptimSettings(name=name))


def test_rates_and_rests_of_a_bare_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, OptimSettings(), {"bias": ParameterRule(rest_epochs=1.5, lr_factor=2.0)})
    set_rates(optimizer, lr=0.1, peak_lr=0.3, weight_decay=0.2)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.0), (0.1, 0.2)]
    for epoch, rests in ((0.0, True), (1.4, True), (1.5, False)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        drop_resting(optimizer, epoch)
        assert (model.bias.grad is None, model.weight.grad is None) == (rests, False)
