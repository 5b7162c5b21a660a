"""Colorization: CIELAB against published values, bins and targets against brute force, weights and prior against arithmetic."""

import math
from typing import Any

import pytest
import torch
from host_runs import METHODS, VIT
from host_steps import batch_of
from torch import Tensor

from wherefrom.pipeline import Batch, ColorLaw
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.train import Colorization, ColorizationSettings, Encoder, Features, Progress, Step
from wherefrom.train.objectives.colorization import gray_and_hues, soft_targets
from wherefrom.train.objectives.lab import BIN, color_bins, gray_from_lightness, lab_from_rgb, rgb_from_lab

pytestmark = pytest.mark.core

# sRGB in hexadecimal -> CIELAB under D65, as published by B. Lindbloom's calculator and scikit-image
PUBLISHED = {
    "000000": (0.0, 0.0, 0.0),
    "ffffff": (100.0, 0.0, 0.0),
    "ff0000": (53.2408, 80.0925, 67.2032),
    "00ff00": (87.7347, -86.1827, 83.1793),
    "0000ff": (32.2970, 79.1875, -107.8602),
    "ffff00": (97.1393, -21.5537, 94.4780),
    "00ffff": (91.1132, -48.0875, -14.1312),
    "ff00ff": (60.3242, 98.2343, -60.8249),
    "808080": (53.5850, 0.0, 0.0),
    "010101": (0.2742, 0.0, 0.0),
}


def colors(*names: str) -> Tensor:
    """Return colors by their hexadecimal names, (n, 3, 1, 1) float64 in [0, 1]."""
    return torch.tensor([[int(name[at : at + 2], 16) / 255 for at in (0, 2, 4)] for name in names], dtype=torch.float64)[..., None, None]


def cube(step: int) -> Tensor:
    """Return all colors whose levels are multiples of `step`, (n, 3, 1, 1) float64."""
    levels = torch.arange(0, 256, step, dtype=torch.float64) / 255
    return torch.cartesian_prod(levels, levels, levels)[..., None, None]


def test_lab_is_the_published_one() -> None:
    ours = lab_from_rgb(colors(*PUBLISHED))[..., 0, 0]
    assert (ours - torch.tensor(list(PUBLISHED.values()), dtype=torch.float64)).abs().max() < 0.02
    assert (lab_from_rgb(colors("ff0000").float())[0, :, 0, 0] - torch.tensor(PUBLISHED["ff0000"])).abs().max() < 0.02
    swapped = lab_from_rgb(colors("ff0000").flip(1))[0, :, 0, 0]  # control: blue, green, red
    assert (swapped - torch.tensor(PUBLISHED["ff0000"])).abs().max() > 10


def test_colors_come_back_from_lab() -> None:
    rgb = cube(9)
    lab = lab_from_rgb(rgb)
    assert (rgb_from_lab(lab) - rgb).abs().max() < 1e-5
    assert (rgb_from_lab(lab * torch.tensor([1, 1, -1])[:, None, None]) - rgb).abs().max() > 0.1  # control: yellow for blue


def test_gray_is_as_light_as_the_color_and_has_no_hue() -> None:
    lab = lab_from_rgb(cube(15))
    gray = lab_from_rgb(gray_from_lightness(lab[:, :1]).expand(-1, 3, -1, -1))
    assert (gray[:, 0] - lab[:, 0]).abs().max() < 1e-3 and gray[:, 1:].abs().max() < 1e-3
    level = torch.linspace(0, 1, 256, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 1, 1)
    assert (gray_from_lightness(lab_from_rgb(level)[:, :1]) - level[:, :1]).abs().max() < 1e-5


def test_bins_are_the_papers_and_every_color_has_one() -> None:
    bins = color_bins()
    assert len(bins) == len({tuple(each) for each in bins.tolist()}) == 313 and (bins % BIN == 0).all()
    hues = lab_from_rgb(cube(5))[:, 1:, 0, 0].float()
    assert ((hues[:, None] - bins).abs().amax(-1).amin(1) <= BIN / 2).all()
    # nor does any bin lie far from the colors that there are
    assert (bins[:, None] - hues[::7]).abs().amax(-1).amin(1).max() < 1.5 * BIN
    assert bins[0].tolist() == [-90, 50] and bins[-1].tolist() == [100, 0]


def test_targets_lie_on_the_five_nearest_bins_by_a_gaussian() -> None:
    bins = color_bins().double()
    hues = torch.tensor([[3.0, -4.0], [60.0, 60.0], [-85.0, 83.0], [0.0, 0.0]], dtype=torch.float64)
    targets, nearest = soft_targets(hues, bins)
    for hue, target, best in zip(hues, targets, nearest, strict=True):
        distance = [math.dist(hue.tolist(), each) for each in bins.tolist()]
        five = sorted(range(313), key=distance.__getitem__)[:5]
        weights = {number: math.exp(-(distance[number] ** 2) / 50) for number in five}
        assert set(target.nonzero()[:, 0].tolist()) <= set(five) or len(set(distance)) < 313  # of equal ones either will do
        assert sorted(target[target > 0].tolist()) == pytest.approx(sorted(weight / sum(weights.values()) for weight in weights.values()))
        assert distance[best] == min(distance)
    assert targets.sum(-1) == pytest.approx(torch.ones(4, dtype=torch.float64))


def test_rare_colors_weigh_more_and_the_mean_weight_is_1() -> None:
    objective = ColorizationSettings(size_px=8).objective("colorization")
    assert objective.weights_of_bins() == pytest.approx(torch.ones(313), rel=0.2)  # uniform at first, but for the gamut's edge
    gray = int(objective.bins.square().sum(1).argmin())
    objective.prior.zero_()[gray] = 1
    weights, smoothed = objective.weights_of_bins(), objective.smoothing @ objective.prior
    assert smoothed.sum().item() == pytest.approx(1, abs=1e-5) and (weights * smoothed).sum().item() == pytest.approx(1, abs=1e-5)
    assert weights.argmin() == gray and weights.max() / weights[gray] == pytest.approx(1 + float(smoothed[gray]) * 313, rel=1e-4)
    alike = ColorizationSettings(size_px=8, uniform_share=1.0).objective("colorization")
    alike.prior.copy_(objective.prior)
    assert alike.weights_of_bins() == pytest.approx(torch.ones(313), rel=1e-5)


def normalized(rgb: Tensor) -> Tensor:
    """Return colors (..., 3, H, W) as views hold them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (rgb.float() - mean) / std


def colored(objective: Colorization, rgb: Tensor) -> Batch:
    """Return a batch whose views are pictures (B, 3, H, W)."""
    return batch_of((objective.name, normalized(rgb)[:, None]))


def test_the_network_sees_lightness_alone_and_is_asked_for_the_color_of_each_cell() -> None:
    objective = ColorizationSettings(size_px=24).objective("colorization")
    step = Step(Encoder(VIT), [objective], seed=0)
    halves = torch.zeros(2, 3, 24, 24)
    halves[0] = colors("c83232")[0].float()
    halves[1, :, :, :12], halves[1, :, :, 12:] = colors("c83232")[0].float(), colors("3232c8")[0].float()
    seen: list[Tensor] = []

    def encode(views: Any, **_: Any) -> Features:
        seen.append(views)
        return step.encoder.encode(views)

    terms = objective(colored(objective, halves), encode, Progress(update=0, updates=2, updates_per_epoch=1))
    (gray,) = seen
    levels = gray * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    assert gray.shape == (2, 1, 3, 24, 24) and (levels - levels[:, :, :1]).abs().max() < 1e-5
    red, blue = (soft_targets(lab_from_rgb(colors(name))[:, 1:, 0, 0].float(), objective.bins)[1] for name in ("c83232", "3232c8"))
    shares = terms.seen["shares"]
    assert shares[red].item() == pytest.approx(0.75) and shares[blue].item() == pytest.approx(0.25) and terms.meters["commonest"] == 0.75
    assert 0.8 < terms.losses["color"] / math.log(313) < 1.2


def test_what_is_gray_tells_no_hue() -> None:
    """Two pictures of one lightness and other hues are one input."""
    rgb = torch.cat([colors("c83232"), colors("3232c8")]).float().expand(-1, 3, 8, 8)
    lightness = lab_from_rgb(rgb)[:, :1]
    gray, hues = gray_and_hues(normalized(rgb))
    again, none = gray_and_hues(normalized(gray_from_lightness(lightness).expand(-1, 3, -1, -1)))
    assert (gray - again).abs().max() < 1e-4 and none.abs().max() < 0.01 and hues.abs().min() > 10


def test_the_prior_is_the_mean_of_what_was_seen_then_follows_it_and_is_saved() -> None:
    objective = ColorizationSettings(size_px=8, prior_momentum=0.9).objective("colorization")
    shares = torch.rand(200, 313).softmax(-1)

    def follow(updates: range) -> None:
        for update in updates:
            objective.after_step(
                Encoder.__new__(Encoder), Progress(update=update, updates=200, updates_per_epoch=9), {"shares": shares[update]}
            )

    follow(range(10))
    torch.testing.assert_close(objective.prior, shares[:10].mean(0))
    before = objective.prior.clone()
    follow(range(10, 11))
    torch.testing.assert_close(objective.prior, 0.9 * before + 0.1 * shares[10])
    assert "prior" in objective.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color": ColorLaw()}, r"color: gray_prob=0.2, solarize_prob=0.0: colors are to be told; set both to 0"),
        ({"color": ColorLaw(gray_prob=0.0, solarize_prob=0.1)}, r"color: gray_prob=0.0, solarize_prob=0.1: colors"),
        ({"uniform_share": 0.0}, "uniform_share=0.0, prior_momentum=0.99: needs 0 < share <= 1"),
        ({"prior_momentum": 1.0}, "uniform_share=0.5, prior_momentum=1.0: needs 0 < share <= 1 and 0 <= momentum < 1"),
        ({"weight": -0.5}, "weight=-0.5: cannot be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        ColorizationSettings(**changes)
    assert "\n" not in str(refused.value)
    assert ColorizationSettings(color=ColorLaw(gray_prob=0.0)).family("c").color is not None


def test_a_color_that_lightness_gives_away_is_learned() -> None:
    """Light pictures are yellow and dark ones blue: told within seconds, where the commonest color is told half the time."""
    method = METHODS["colorization"]
    step = Step(Encoder(method.model), [method.settings.objective("colorization")], seed=0).train()
    optimizer = torch.optim.AdamW(step.parameters(), lr=3e-3)
    light = torch.arange(8) % 2
    rgb = torch.where(light[:, None, None, None] == 1, colors("e0d060")[0], colors("202080")[0]).expand(-1, 3, 24, 24)
    for update in range(25):
        out = step(colored(step.objectives["colorization"], rgb), Progress(update=update, updates=25, updates_per_epoch=5))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step.after_step(Progress(update=update, updates=25, updates_per_epoch=5), out.seen)
    assert out.meters["colorization/accuracy"] == 1 and out.meters["colorization/commonest"] == 0.5
