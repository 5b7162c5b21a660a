"""SimCLR against figures that its authors' code gave (tests/data/hosts/simclr.json): loss, head, three updates by LARS."""

import pytest
import torch
from host_formulas import figures, gap, pair, parameter, tensor, wave
from host_steps import TinyEncoder, assert_grads, assert_near, fill, pictures_of, updates_of
from torch import Tensor, nn

from wherefrom.train import OBJECTIVES, Objective, Progress, SimCLR, SimCLRSettings, Step
from wherefrom.train.lars import LARS
from wherefrom.train.objectives.heads import mlp
from wherefrom.train.objectives.simclr import nt_xent

pytestmark = pytest.mark.core

FIGURES = figures("simclr")
TINY = SimCLRSettings(size_px=4, out=8)


def author_name(name: str) -> str:
    """Return what the authors call a parameter of the head, whose layers are each a Linear, a BatchNorm and a ReLU; or of the encoder."""
    if name.startswith("encoder."):
        return name.replace("encoder.", "backbone.")
    place, kind = name.removeprefix("objectives.simclr.").removeprefix("head.").split(".")
    return f"projection_head.nl_{int(place) // 3}.{'dense' if int(place) % 3 == 0 else 'bn'}.{kind}"


@pytest.mark.parametrize("case", ["t01", "t05"])
def test_loss_and_gradient_are_the_authors(case: str) -> None:
    figure = FIGURES["loss"][case]
    z = torch.stack([tensor(view) for view in pair((6, 10), 180)], 1).requires_grad_()
    loss, accuracy = nt_xent(z, temperature=figure["temperature"])
    loss.backward()
    assert_near(loss, figure["loss"], "loss")
    assert_near(z.grad.transpose(0, 1).flatten(0, 1), figure["grad_hidden"], "gradient")
    assert 0 < accuracy <= 1
    # controls: the mean over views, and a view that is compared with itself
    assert gap(loss / 2, figure["loss"]) > 0.1
    unit = nn.functional.normalize(z.detach().transpose(0, 1).flatten(0, 1), dim=1)
    with_itself = 2 * nn.functional.cross_entropy(unit @ unit.T / figure["temperature"], torch.arange(12).roll(6))
    assert gap(with_itself, figure["loss"]) > 0.1


def test_the_head_is_the_authors() -> None:
    objective = SimCLR(TINY)
    Step(TinyEncoder(16, norm=False), [objective], seed=0).double().train()
    fill(objective, author_name)
    names = [author_name(name).removeprefix("projection_head.") for name, _ in objective.named_parameters()]
    assert sorted(names) == sorted(FIGURES["head"]["keys"])
    x = tensor(wave((12, 16), 190)).requires_grad_()
    out = objective.head(x)
    (out * tensor(wave((12, 8), 191))).sum().backward()
    assert_near(out, FIGURES["head"]["out"], "output")
    assert_near(x.grad, FIGURES["head"]["grad_x"], "gradient of the input")
    assert_grads(objective, author_name, {f"projection_head.{name}": grad for name, grad in FIGURES["head"]["grads"].items()})
    # control: a ReLU after the last layer, too
    assert gap(out.relu(), FIGURES["head"]["out"]) > 0.1


def test_three_updates_are_the_authors() -> None:
    figure = FIGURES["end_to_end"]
    runs = updates_of(
        SimCLR(TINY),
        TinyEncoder(16, norm=False),
        lambda step: fill(step, author_name),
        samples=6,
        rates=[0.3, 0.6, 0.5],
        optimizer="simclr_lars",
    )
    for update, (step, out) in enumerate(runs):
        assert_near(out.losses["simclr/contrast"], figure["losses"][update], f"loss {update}", 1e-7)
        if update == 0:
            assert_grads(step, author_name, figure["grads_update0"])
        ours = {author_name(name): values for name, values in step.named_parameters()}
        for name, theirs in figure["snapshots"][f"after_update_{update}"].items():
            assert_near(ours[name], theirs, f"{name} after update {update}", 1e-7)


def test_views_that_pass_one_after_the_other_are_another_method() -> None:
    objective = SimCLR(TINY)
    step = Step(TinyEncoder(16, norm=False), [objective], seed=0).double().train()
    fill(step, author_name)
    batch = pictures_of(objective, 6, 0)
    apart = [objective.head(step.encoder.encode(batch.views[0][:, view]).summary[:, 0]) for view in (0, 1)]
    assert gap(nt_xent(torch.stack(apart, 1), temperature=0.1)[0], FIGURES["end_to_end"]["losses"][0]) > 0.01


@pytest.mark.parametrize("case", ["constant_rate", "changing_rate"])
def test_lars_is_the_authors(case: str) -> None:
    figure = FIGURES["lars"][case]

    def after(*, rate_in_momentum: bool) -> list[dict[str, Tensor]]:
        shapes = {"layer.weight": (4, 5), "conv.weight": (3, 2, 2, 2), "layer.bias": (4,), "bn.weight": (4,)}
        weights = {name: nn.Parameter(tensor(parameter(name, shape))) for name, shape in shapes.items()}
        groups = [
            {"params": [p for p in weights.values() if (p.ndim > 1) == decays], "weight_decay": 0.01 * decays} for decays in (True, False)
        ]
        optimizer = LARS(groups, rate_in_momentum=rate_in_momentum)
        found = []
        for update, rate in enumerate(figure["lrs"]):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for number, (name, shape) in enumerate(shapes.items()):
                weights[name].grad = tensor(wave(shape, 70 + 5 * update + number, 0.1))
            optimizer.step()
            found.append({name: values.detach().clone() for name, values in weights.items()})
        return found

    for update, (ours, theirs) in enumerate(zip(after(rate_in_momentum=True), figure["after_steps"], strict=True)):
        for name in theirs:
            assert_near(ours[name], theirs[name], f"{name} after step {update}")
    # control: the other form differs as soon as the rate changes, and not before
    last = [gap(after(rate_in_momentum=False)[-1][name], theirs) for name, theirs in figure["after_steps"][-1].items()]
    assert (max(last) > 1e-3) == (case == "changing_rate")


def test_its_views_are_the_papers() -> None:
    (family,) = SimCLRSettings().objective("simclr").families
    color = family.color
    assert (family.views, family.size_px, family.mirror, family.law.area_frac) == (2, (224, 224), "view", (0.08, 1.0))
    assert color is not None
    assert (color.brightness, color.contrast, color.saturation, color.hue, color.jitter_prob) == (0.8, 0.8, 0.8, 0.2, 0.8)
    assert (color.gray_prob, color.blur_prob, color.solarize_prob) == (0.2, 0.5, 0.0)
    assert OBJECTIVES["simclr"] is SimCLRSettings


def test_a_single_picture_is_refused_before_the_first_update() -> None:
    objective: Objective = SimCLR(TINY)
    step = Step(TinyEncoder(16, norm=False), [objective], seed=0).double()
    with pytest.raises(ValueError, match=r"objective 'simclr' with a single picture at a time: .*; raise global_batch"):
        step(pictures_of(objective, 1, 0), Progress(update=0, updates=2, updates_per_epoch=1))
    for wrong in ({"temperature": 0.0}, {"out": 0}, {"layers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            SimCLRSettings(**wrong)
    with pytest.raises(ValueError, match=r"widths=\(3,\): needs at least an input and an output"):
        mlp([3])


def test_collapse_is_seen_in_features_and_embeddings() -> None:
    objective = SimCLR(TINY)
    step = Step(TinyEncoder(16, norm=False), [objective], seed=0).double().train()

    def meters() -> dict[str, float]:
        out = step(pictures_of(objective, 6, 0), Progress(update=0, updates=2, updates_per_epoch=1))
        return {name: float(value) for name, value in out.meters.items()}

    healthy = meters()
    assert healthy["simclr/feature_std"] > 0.3 and healthy["simclr/feature_rank"] > 2
    with torch.no_grad():  # features constant but for 1e-3 of noise
        step.encoder.conv1.weight.mul_(1e-3)
    step.encoder.conv1.register_forward_hook(lambda _, __, output: output + 1)
    assert meters()["simclr/feature_std"] < 0.02
