"""Barlow Twins against figures that its authors' code gave (tests/data/hosts/barlow.json): loss, projector, three updates."""

import pytest
import torch
from host_formulas import figures, gap, pair, parameter, tensor, wave
from host_steps import TinyEncoder, assert_grads, assert_near, fill, pictures_of, updates_of
from torch import Tensor, nn

from wherefrom.train import OBJECTIVES, BarlowTwins, BarlowTwinsSettings, Progress, Step, recipe
from wherefrom.train.lars import LARS
from wherefrom.train.objectives.barlow import barlow_terms
from wherefrom.train.over_ranks import BatchNormOverRanks

pytestmark = pytest.mark.core

FIGURES = figures("barlow")
RATIO = 0.0048 / 0.2  # the authors' rates of biases and norms, and of weights
TINY = BarlowTwinsSettings(size_px=4, hidden=12, out=10, bias_lr_factor=RATIO)


def author_name(name: str) -> str:
    """Return what the authors call a parameter."""
    return name.removeprefix("objectives.barlow.").replace("encoder.", "backbone.")


def weighted(terms: dict[str, Tensor]) -> Tensor:
    return terms["invariance"] + 0.0051 * terms["redundancy"]


def test_loss_and_gradient_are_the_authors() -> None:
    figure, norm = FIGURES["loss"], BatchNormOverRanks(10, affine=False).double()
    z1, z2 = (tensor(view).requires_grad_() for view in pair((8, 10), 140))
    terms = barlow_terms(norm(z1), norm(z2))
    weighted(terms).backward()
    assert_near(terms["invariance"], figure["on_diagonal"], "invariance")
    assert_near(terms["redundancy"], figure["off_diagonal"], "redundancy")
    assert_near(weighted(terms), figure["loss"], "loss")
    assert_near(z1.grad, figure["grad_z1"], "gradient of z1")
    assert_near(z2.grad, figure["grad_z2"], "gradient of z2")
    assert_near(norm.running_mean, figure["bn_running_mean_after"], "running mean")
    assert_near(norm.running_var, figure["bn_running_var_after"], "running variance")
    # control: unbiased variance in the normalization
    unbiased = barlow_terms(*((z - z.mean(0)) / (z.var(0) + 1e-5).sqrt() for z in (z1, z2)))
    assert gap(weighted(unbiased), figure["loss"]) > 0.01


def test_the_projector_is_the_authors() -> None:
    objective = BarlowTwins(TINY)
    Step(TinyEncoder(16, norm=True), [objective], seed=0).double().train()
    fill(objective, author_name)
    x = tensor(wave((8, 16), 150)).requires_grad_()
    out = objective.projector(x)
    (out * tensor(wave((8, 10), 151))).sum().backward()
    assert_near(out, FIGURES["head"]["out"], "output")
    assert_near(x.grad, FIGURES["head"]["grad_x"], "gradient of the input")
    assert_grads(objective, author_name, FIGURES["head"]["grads"])
    assert {author_name(name) for name, _ in objective.named_parameters()} == set(FIGURES["head"]["grads"])


def test_three_updates_are_the_authors_and_at_one_rate_for_all_they_are_not() -> None:
    figure = FIGURES["end_to_end"]

    def apart(settings: BarlowTwinsSettings) -> float:
        found = []
        runs = updates_of(
            BarlowTwins(settings),
            TinyEncoder(16, norm=True),
            lambda step: fill(step, author_name),
            samples=8,
            rates=[of_weights for of_weights, _ in figure["lr_weights_biases"]],
            optimizer="ssl_lars",
        )
        for update, (step, out) in enumerate(runs):
            found.append(gap(out.loss, figure["losses"][update]))
            if update == 0:
                assert_grads(step, author_name, figure["grads_update0"])
            ours = {author_name(name): values for name, values in step.named_parameters()}
            found += [gap(ours[name], theirs) for name, theirs in figure["snapshots"][f"after_update_{update}"].items()]
        return max(found)

    assert apart(TINY) < 1e-8
    assert apart(BarlowTwinsSettings(size_px=4, hidden=12, out=10)) > 1e-2


def test_lars_of_two_rates_is_the_authors() -> None:
    shapes = {"layer.weight": (4, 5), "conv.weight": (3, 2, 2, 2), "layer.bias": (4,), "bn.weight": (4,)}
    weights = {name: nn.Parameter(tensor(parameter(name, shape))) for name, shape in shapes.items()}
    groups = [
        {"params": [p for p in weights.values() if (p.ndim > 1) == decays], "weight_decay": 0.01 * decays, "lr": 0.3 if decays else 0.0072}
        for decays in (True, False)
    ]
    optimizer = LARS(groups)
    for update, theirs in enumerate(FIGURES["lars"]["after_steps"]):
        for number, (name, shape) in enumerate(shapes.items()):
            weights[name].grad = tensor(wave(shape, 70 + 5 * update + number, 0.1))
        optimizer.step()
        for name in theirs:
            assert_near(weights[name], theirs[name], f"{name} after step {update}")


def test_the_recipe_is_the_published_run_for_a_gradient_that_is_sixteen_times_theirs() -> None:
    """LARS of the authors' gradient and settings, and of 16 times the gradient with the recipe's: the same steps."""
    settings = recipe("imagenet_barlow_r50")
    assert (settings.global_batch, settings.epochs, settings.optim.name) == (2048, 1000, "ssl_lars")
    assert settings.optim.lr == pytest.approx(0.2 * 2048 / 256) and settings.optim.final_lr == pytest.approx(settings.optim.lr / 1000)
    assert (settings.optim.warmup_frac, settings.optim.clip_norm) == (0.01, None)
    learned = settings.objectives["barlow"]
    assert learned == BarlowTwinsSettings(bias_lr_factor=learned.bias_lr_factor)

    def stepped(scale: float, lr_of_biases: float, weight_decay: float) -> list[Tensor]:
        weight, bias = (nn.Parameter(tensor(parameter("x", shape))) for shape in ((4, 5), (4,)))
        groups = [{"params": [weight], "lr": 1.6, "weight_decay": weight_decay}, {"params": [bias], "lr": lr_of_biases}]
        optimizer = LARS(groups)
        for update in range(3):
            weight.grad, bias.grad = (tensor(wave(each.shape, update, scale * 1e-3)) for each in (weight, bias))
            optimizer.step()
        return [weight.detach(), bias.detach()]

    theirs = stepped(1, 0.0048 * 2048 / 256, 1e-6)
    torch.testing.assert_close(stepped(16, settings.optim.lr * learned.bias_lr_factor, settings.optim.weight_decay), theirs)
    assert not torch.allclose(stepped(16, 0.0048 * 2048 / 256, 1e-6)[1], theirs[1])


def test_views_are_byols_and_numbers_the_papers() -> None:
    settings = BarlowTwinsSettings()
    first, second = settings.objective("barlow").families
    assert first.color is not None and second.color is not None
    assert [(color.blur_prob, color.solarize_prob) for color in (first.color, second.color)] == [(1.0, 0.0), (0.1, 0.2)]
    assert (settings.hidden, settings.out, settings.objective("barlow").weights["redundancy"]) == (8192, 8192, 0.0051)
    assert OBJECTIVES["barlow"] is BarlowTwinsSettings


def test_what_cannot_work_is_refused_in_one_line() -> None:
    objective = BarlowTwins(TINY)
    step = Step(TinyEncoder(16, norm=True), [objective], seed=0).double()
    with pytest.raises(ValueError, match=r"objective 'barlow' with a single picture at a time: .*; raise global_batch"):
        step(pictures_of(objective, 1, 0), Progress(update=0, updates=2, updates_per_epoch=1))
    for wrong in ({"bias_lr_factor": -1.0}, {"hidden": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            BarlowTwinsSettings(**wrong)


def test_the_loss_is_computed_in_full_precision_under_autocast() -> None:
    objective = BarlowTwins(TINY)
    step = Step(TinyEncoder(16, norm=True), [objective], seed=0).double().train()
    batch, progress = pictures_of(objective, 8, 0), Progress(update=0, updates=2, updates_per_epoch=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(value.dtype in (torch.float32, torch.float64) for value in step(batch, progress).losses.values())
