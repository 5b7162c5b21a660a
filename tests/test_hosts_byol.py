"""BYOL against figures that its authors' code gave (tests/data/hosts/byol.json): loss, three updates by LARS, the target after each."""

import pytest
import torch
from host_formulas import figures, gap, pair, parameter, tensor
from host_steps import TinyEncoder, assert_grads, assert_near, fill, pictures_of, updates_of
from torch import Tensor

from wherefrom.train import BYOL, OBJECTIVES, BYOLSettings, Encoder, ModelSettings, Progress, Step, recipe
from wherefrom.train.objectives.byol import distance

pytestmark = pytest.mark.core

FIGURES = figures("byol")
TINY = BYOLSettings(size_px=4, hidden=20, out=8, momentum=0.9, target_start="copied")


def author_name(name: str) -> str:
    """Return what the figures call a parameter of the online network."""
    return name.removeprefix("objectives.byol.")


def of_target(step: Step) -> dict[str, Tensor]:
    """Return the target's parameters by the figures' names."""
    objective = step.objectives["byol"]
    parts = {"encoder": objective.target, "projector": objective.target_projector}
    return {f"{part}.{name}": values for part, module in parts.items() for name, values in module.named_parameters()}


def as_in_the_figures(step: Step) -> None:
    fill(step, author_name, skip=["objectives.byol.target"])
    with torch.no_grad():
        for name, values in of_target(step).items():
            own = parameter(name, tuple(values.shape))
            values.copy_(tensor(own + 0.1 * parameter(f"target.{name}", tuple(values.shape)) if values.ndim > 1 else own))


def test_loss_and_gradient_are_the_authors() -> None:
    figure = FIGURES["loss"]
    (p1, k1), (p2, k2) = ([tensor(view).requires_grad_() for view in pair((6, 10), seed)] for seed in (200, 210))
    first, second = distance(p1, k2), distance(p2, k1)
    (first + second).backward()
    assert_near(first, figure["p1_k2"], "distance of p1 and k2")
    assert_near(first + second, figure["loss"], "loss")
    assert_near(p1.grad, figure["grad_p1"], "gradient of p1")
    assert_near(p2.grad, figure["grad_p2"], "gradient of p2")
    assert k1.grad is None and k2.grad is None
    # controls: the same view on both sides, and the mean of both directions
    assert gap(distance(p1, k1) + distance(p2, k2), figure["loss"]) > 0.1 and gap((first + second) / 2, figure["loss"]) > 0.1


def test_three_updates_are_the_authors_and_so_is_the_target_after_each() -> None:
    figure = FIGURES["end_to_end"]
    lag = []
    runs = updates_of(
        BYOL(TINY), TinyEncoder(12, norm=True), as_in_the_figures, samples=6, rates=figure["lr"], optimizer="ssl_lars", first=1
    )
    for update, (step, out) in enumerate(runs):
        snapshot = figure["snapshots"][f"after_update_{update}"]
        assert_near(out.losses["byol/distance"], figure["losses"][update], f"loss {update}")
        if update == 0:
            assert_grads(step, author_name, figure["grads_update0"])
        online = {author_name(name): values for name, values in step.named_parameters()}
        for name, theirs in snapshot["online"].items():
            assert_near(online[name], theirs, f"{name} after update {update}", 1e-7)
        moved = {name: theirs for name, theirs in snapshot["target"].items() if not name.startswith("predictor.")}  # theirs has one, unused
        for name, theirs in moved.items():
            assert_near(of_target(step)[name], theirs, f"target's {name} after update {update}", 1e-7)
            # control: the momentum of the update before or after
            lag.append(gap(of_target(step)[name] + 0.01 * (online[name] - of_target(step)[name]), theirs))
    assert max(lag) > 1e-4


def test_the_target_is_drawn_by_itself_unless_it_is_a_copy_or_weights_are_given() -> None:
    def differs(start: str) -> bool:
        encoder = Encoder(ModelSettings(name="resnet10t"))
        objective = BYOL(BYOLSettings(size_px=32, hidden=8, out=4, target_start=start))
        Step(encoder, [objective], seed=0)
        parameters = zip(objective.target.parameters(), encoder.parameters(), strict=True)
        heads = zip(objective.target_projector.parameters(), objective.projector.parameters(), strict=True)
        assert not any(values.requires_grad for values, _ in (*parameters, *heads))
        return not torch.equal(objective.target.model.conv1[0].weight, encoder.model.conv1[0].weight)

    assert differs("drawn") and not differs("copied")


def test_statistics_of_the_target_are_its_own() -> None:
    objective = BYOL(TINY)
    step = Step(TinyEncoder(12, norm=True), [objective], seed=0).double().train()
    as_in_the_figures(step)
    step(pictures_of(objective, 6, 0), Progress(update=0, updates=6, updates_per_epoch=2))
    online, target = (network.bn1.running_mean for network in (step.encoder, objective.target))
    assert online.any() and target.any() and not torch.allclose(online, target)


def test_the_recipe_is_the_shortest_preset() -> None:
    settings, preset = recipe("imagenet_byol_r50"), FIGURES["config"]["40"]
    assert (settings.global_batch, settings.epochs, settings.optim.name) == (4096, 40, "ssl_lars")
    assert settings.optim.lr == pytest.approx(preset["lr"] * 4096 / 256)
    assert (settings.optim.weight_decay, settings.optim.warmup_frac, settings.optim.clip_norm) == (preset["weight_decay"], 10 / 40, None)
    assert settings.objectives == {"byol": BYOLSettings(momentum=preset["ema"])}


def test_views_and_numbers_are_the_papers() -> None:
    settings = BYOLSettings()
    first, second = settings.objective("byol").families
    assert (first.name, second.name) == ("byol_1", "byol_2")
    for family, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        color = family.color
        assert (family.views, family.size_px, family.mirror, family.law.area_frac) == (1, (224, 224), "view", (0.08, 1.0))
        assert color is not None
        assert (color.brightness, color.contrast, color.saturation, color.hue, color.jitter_prob) == (0.4, 0.4, 0.2, 0.1, 0.8)
        assert (color.gray_prob, color.blur_prob, color.solarize_prob) == (0.2, blur, solarize)
    assert (settings.hidden, settings.out, settings.momentum) == (4096, 256, FIGURES["config"]["100"]["ema"])
    assert OBJECTIVES["byol"] is BYOLSettings


def test_what_cannot_work_is_refused_in_one_line() -> None:
    objective = BYOL(TINY)
    step = Step(TinyEncoder(12, norm=True), [objective], seed=0).double()
    with pytest.raises(ValueError, match=r"objective 'byol' with a single picture at a time: .*; raise global_batch"):
        step(pictures_of(objective, 1, 0), Progress(update=0, updates=2, updates_per_epoch=1))
    for wrong, message in (({"momentum": 1.5}, "momentum=1.5: needs 0 <="), ({"hidden": 0}, "hidden=0"), ({"target_start": "x"}, "'x'")):
        with pytest.raises(ValueError, match=message):
            BYOLSettings(**wrong)
