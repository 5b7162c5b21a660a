"""VICReg against figures that its authors' code gave (tests/data/hosts/vicreg.json): terms, projector, three updates by LARS."""

import pytest
import torch
from host_formulas import figures, gap, pair, parameter, tensor, wave
from host_steps import TinyEncoder, assert_grads, assert_near, fill, pictures_of, updates_of
from torch import Tensor, nn

from wherefrom.train import OBJECTIVES, Progress, Step, VICReg, VICRegSettings, recipe
from wherefrom.train.lars import LARS
from wherefrom.train.objectives.vicreg import vicreg_terms

pytestmark = pytest.mark.core

FIGURES = figures("vicreg")
TINY = VICRegSettings(size_px=4, hidden=12, out=10)


def author_name(name: str) -> str:
    """Return what the authors call a parameter."""
    return name.removeprefix("objectives.vicreg.").replace("encoder.", "backbone.")


def weighted(terms: dict[str, Tensor]) -> Tensor:
    return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]


@pytest.mark.parametrize("case", ["loss", "loss_wide"])
def test_terms_and_gradient_are_the_authors(case: str) -> None:
    figure, factor = FIGURES[case], 3 if case == "loss_wide" else 1
    a, b = pair((8, 10), 160)
    x, y = (tensor(factor * view).requires_grad_() for view in (0.9 * a, b))
    terms = vicreg_terms(x, y)
    weighted(terms).backward()
    assert_near(weighted(terms), figure["loss"], "loss")
    for name in terms.keys() & figure.keys():
        assert_near(terms[name], figure[name], name)
    assert_near(x.grad, figure["grad_x"], "gradient of x")
    if case == "loss":
        assert_near(y.grad, figure["grad_y"], "gradient of y")
        # controls: biased variance, covariance as a mean of both views
        biased = sum(nn.functional.relu(1 - (z.var(0, correction=0) + 1e-4).sqrt()).mean() / 2 for z in (x, y))
        assert gap(biased, figure["variance"]) > 0.01 and gap(terms["covariance"] / 2, figure["covariance"]) > 0.1


def test_the_projector_is_the_authors() -> None:
    objective = VICReg(TINY)
    Step(TinyEncoder(16, norm=True), [objective], seed=0).double().train()
    fill(objective, author_name)
    x = tensor(wave((8, 16), 150)).requires_grad_()
    out = objective.projector(x)
    (out * tensor(wave((8, 10), 151))).sum().backward()
    assert_near(out, FIGURES["head"]["out"], "output")
    assert_near(x.grad, FIGURES["head"]["grad_x"], "gradient of the input")
    assert_grads(objective, author_name, FIGURES["head"]["grads"])
    assert {author_name(name) for name, _ in objective.named_parameters()} == set(FIGURES["head"]["grads"])


def test_three_updates_are_the_authors() -> None:
    figure = FIGURES["end_to_end"]
    runs = updates_of(
        VICReg(TINY), TinyEncoder(16, norm=True), lambda step: fill(step, author_name), samples=8, rates=figure["lr"], optimizer="ssl_lars"
    )
    for update, (step, out) in enumerate(runs):
        assert_near(out.loss, figure["losses"][update], f"loss {update}")
        if update == 0:
            assert_grads(step, author_name, figure["grads_update0"])
        ours = {author_name(name): values for name, values in step.named_parameters()}
        for name, theirs in figure["snapshots"][f"after_update_{update}"].items():
            assert_near(ours[name], theirs, f"{name} after update {update}", 1e-8)


def test_lars_is_the_authors() -> None:
    shapes = {"layer.weight": (4, 5), "conv.weight": (3, 2, 2, 2), "layer.bias": (4,), "bn.weight": (4,)}
    weights = {name: nn.Parameter(tensor(parameter(name, shape))) for name, shape in shapes.items()}
    groups = [
        {"params": [p for p in weights.values() if (p.ndim > 1) == decays], "weight_decay": 0.01 * decays} for decays in (True, False)
    ]
    optimizer = LARS(groups, lr=0.3)
    for update, theirs in enumerate(FIGURES["lars"]["after_steps"]):
        for number, (name, shape) in enumerate(shapes.items()):
            weights[name].grad = tensor(wave(shape, 70 + 5 * update + number, 0.1))
        optimizer.step()
        for name in theirs:
            assert_near(weights[name], theirs[name], f"{name} after step {update}")


def test_the_recipe_is_the_authors_command() -> None:
    settings = recipe("imagenet_vicreg_r50")
    assert (settings.global_batch, settings.epochs, settings.optim.name) == (512, 100, "ssl_lars")
    assert settings.optim.lr == pytest.approx(0.3 * 512 / 256) and settings.optim.final_lr == pytest.approx(settings.optim.lr / 1000)
    assert (settings.optim.weight_decay, settings.optim.warmup_frac, settings.optim.clip_norm) == (1e-6, 0.1, None)
    assert settings.objectives == {"vicreg": VICRegSettings()}


def test_views_are_byols_and_numbers_the_papers() -> None:
    settings = VICRegSettings()
    first, second = settings.objective("vicreg").families
    assert first.color is not None and second.color is not None
    assert [(color.blur_prob, color.solarize_prob) for color in (first.color, second.color)] == [(1.0, 0.0), (0.1, 0.2)]
    assert (settings.hidden, settings.out, settings.objective("vicreg").weights["covariance"]) == (8192, 8192, 1.0)
    assert OBJECTIVES["vicreg"] is VICRegSettings


def test_what_cannot_work_is_refused_in_one_line() -> None:
    objective = VICReg(TINY)
    step = Step(TinyEncoder(16, norm=True), [objective], seed=0).double()
    with pytest.raises(ValueError, match=r"objective 'vicreg' with a single picture at a time: .*; raise global_batch"):
        step(pictures_of(objective, 1, 0), Progress(update=0, updates=2, updates_per_epoch=1))
    for wrong in ({"weight_variance": -1.0}, {"out": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            VICRegSettings(**wrong)


def test_collapse_to_a_point_shows() -> None:
    objective = VICReg(TINY)
    step = Step(TinyEncoder(16, norm=True), [objective], seed=0).double().train()
    with torch.no_grad():
        step.encoder.bn1.weight.fill_(1e-3)
        step.encoder.bn1.bias.fill_(1.0)
    out = step(pictures_of(objective, 8, 0), Progress(update=0, updates=2, updates_per_epoch=1))
    assert out.meters["vicreg/feature_std"] < 0.01
