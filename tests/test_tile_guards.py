"""Guards against shortcuts: what each does to pixels, by brute force; and, one by one, that a shortcut planted in noise works without it
and not with it.

Pictures of noise have nothing to tell but what is planted: continuity across edges, a grid of fixed phase, exposure, a lens's fringes, fine
lines. A tiny network learns context prediction from them in seconds, where chance is 1/8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline import Batch, Tiles, ViewGeometry, ViewRecipe, Views, draw_records
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.train import ContextSettings, Features, Progress, TileGuards
from wherefrom.train.objectives.tiles import guarded

NOW = Progress(update=0, updates=2, updates_per_epoch=1)
CHANCE = 1 / 8
TILE = 12


def tiles_of(pictures: Tensor, settings: ContextSettings, *, first: int = 0) -> Batch:
    """Cut the tiles of pictures (B, 3, W, W), each a window as it is: no pixel is resampled. Draws are those of pictures `first` and on."""
    side, ids = pictures.shape[-1], np.arange(first, first + len(pictures))
    recipe = ViewRecipe(families=(settings.family("context"),))
    size = np.full((len(pictures), 2), side, np.int32)
    (record,) = draw_records(recipe, seed=0, epoch=0, drawn_for=ids, source_size=size)
    boxes = record.geometry.boxes.long()
    assert record.valid.all() and (boxes[..., 2:] - boxes[..., :2] == settings.size_px).all()
    offset = torch.arange(settings.size_px)
    rows = (boxes[..., 1, None] + offset)[:, :, None, :, None]
    cols = (boxes[..., 0, None] + offset)[:, :, None, None, :]
    picture, channel = torch.arange(len(pictures))[:, None, None, None, None], torch.arange(3)[:, None, None]
    views = Views.of(record, pictures[picture, channel, rows, cols])
    sample = torch.from_numpy(ids)
    return Batch(sample=sample, drawn_for=sample, label=-torch.ones_like(sample), source_size=torch.tensor(size), views=(views,))


def settings_of(tiles: Tiles, guards: TileGuards | None = None) -> ContextSettings:
    whole = replace(tiles, area_frac=(1.0, 1.0), aspect=(1.0, 1.0))
    return ContextSettings(size_px=tiles.tile_px, tiles=whole, hidden=64, color=None, guards=guards or TileGuards(), min_side_px=1)


# What each does to pixels

FREE = Tiles(window_px=72, tile_px=TILE)


def noise_tiles(guards: TileGuards, pictures: int = 40, *, first: int = 0) -> tuple[Tensor, Tensor, ViewGeometry]:
    """Return tiles of noise (B, 9, 3, 12, 12) as they are and as guards leave them, and their record."""
    views = tiles_of(torch.randn(pictures, 3, 72, 72, generator=torch.Generator().manual_seed(0)), settings_of(FREE), first=first).views[0]
    return views.pixels, guarded(views, guards, "context"), views.geometry


@pytest.mark.core
@pytest.mark.parametrize(
    "guards",
    [
        TileGuards(color="drop"),
        TileGuards(channel_shift_px=3),
        TileGuards(resample_prob=0.5, resample_px=(4, 8)),
        TileGuards(normalize=True, color="projection", channel_shift_px=1, resample_prob=0.3, resample_px=(3, 9)),
    ],
)
def test_what_a_guard_does_follows_from_the_record_alone(guards: TileGuards) -> None:
    pixels, changed, record = noise_tiles(guards)
    assert not torch.equal(changed, pixels) and changed.dtype == torch.float32
    batch = tiles_of(torch.randn(40, 3, 72, 72, generator=torch.Generator().manual_seed(0)), settings_of(FREE))
    alone = guarded(batch[[7]].views[0], guards, "context")  # in another batch, at another place
    torch.testing.assert_close(alone[0], changed[7], atol=1e-6, rtol=1e-6)
    again = replace(batch.views[0], geometry=replace(record, epoch=1))
    assert not torch.equal(guarded(again, guards, "context"), changed) and not torch.equal(guarded(batch.views[0], guards, "x"), changed)


@pytest.mark.core
def test_normalized_tiles_have_mean_0_and_deviation_1_and_constant_ones_are_0() -> None:
    _, changed, _ = noise_tiles(TileGuards(normalize=True))
    deviation, mean = torch.std_mean(changed, dim=(-2, -1), correction=0)
    assert mean.abs().max() < 1e-5 and (deviation - 1).abs().max() < 0.01
    flat = tiles_of(torch.full((1, 3, 72, 72), 0.3), settings_of(FREE)).views[0]
    assert guarded(flat, TileGuards(normalize=True), "context").abs().max() < 1e-3


@pytest.mark.core
def test_each_channel_is_shifted_by_itself_by_whole_pixels_and_every_shift_occurs() -> None:
    pixels, changed, _ = noise_tiles(TileGuards(channel_shift_px=2))
    found = torch.full((*pixels.shape[:3], 2), 9)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            rows, cols = ((torch.arange(TILE) + by).clamp(0, TILE - 1) for by in (dy, dx))
            found[(changed == pixels[..., rows, :][..., cols]).flatten(-2).all(-1)] = torch.tensor([dx, dy])
    assert (found != 9).all()
    counts = ((found[..., 0] + 2) * 5 + found[..., 1] + 2).flatten().bincount(minlength=25)
    assert counts.min() > 15  # of 1080, 43 each
    assert (found[:, :, 0] != found[:, :, 1]).any(-1).float().mean() > 0.9  # channels apart


@pytest.mark.core
def test_of_dropped_colors_one_is_kept_and_the_others_are_faint_noise() -> None:
    pixels, changed, _ = noise_tiles(TileGuards(color="drop"))
    kept = (changed == pixels).flatten(-2).all(-1)
    assert (kept.sum(-1) == 1).all() and kept.float().mean((0, 1)).min() > 0.25
    others = changed[~kept].unflatten(0, (-1, 2))  # (n, 2, 12, 12)
    assert (others.std((-2, -1)) / pixels[kept].std((-2, -1))[:, None] - 0.01).abs().max() < 0.004
    assert others.mean().abs() < 1e-4 and (others / 0.01).pow(4).mean() == pytest.approx(3, rel=0.1)  # of a Gaussian
    first, second = others.flatten(-2).unbind(1)
    assert (F.cosine_similarity(first, second)).abs().mean() < 0.1  # not the same noise twice
    _, beside, _ = noise_tiles(TileGuards(color="drop", normalize=True))
    assert sorted(beside[0, 0].std((-2, -1)).tolist()) == pytest.approx([0.01, 0.01, 1.0], rel=0.2)  # as faint where tiles are normalized


@pytest.mark.core
def test_a_projected_color_is_the_papers() -> None:
    pixels, changed, _ = noise_tiles(TileGuards(color="projection"))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    before, after = (each.double() * std + mean for each in (pixels, changed))
    axis = torch.tensor([-1.0, 2, -1], dtype=torch.float64)[:, None, None]
    assert (after * axis).sum(2).abs().max() < 1e-5  # neither green nor magenta
    torch.testing.assert_close(after, before - axis * (before * axis).sum(2, keepdim=True) / 6, atol=1e-5, rtol=1e-5)


@pytest.mark.core
def test_a_share_of_tiles_is_made_smaller_and_enlarged_again() -> None:
    guards = TileGuards(resample_prob=0.4, resample_px=(4, 8))
    pixels, changed, _ = noise_tiles(guards)
    found = torch.zeros(pixels.shape[:2], dtype=torch.long)
    flat, ours = pixels.flatten(0, 1), changed.flatten(0, 1)
    for side in range(4, 9):
        small = F.interpolate(flat, size=(side, side), mode="bilinear", antialias=True)
        large = F.interpolate(small, size=(TILE, TILE), mode="bilinear")
        found.view(-1)[(ours - large).abs().amax((1, 2, 3)) < 1e-5] = side
    same = (ours == flat).flatten(1).all(1).view_as(found)
    assert ((found > 0) ^ same).all() and (found > 0).float().mean() == pytest.approx(0.4, abs=0.08)
    assert (found[found > 0].bincount(minlength=9)[4:] > 12).all()  # of 144, 29 each


# That shortcuts work without them, and not with them


class Flat(nn.Module):
    """Two layers of all pixels of a tile: what tells edges and phases."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, tiles: Tensor) -> Tensor:
        return self.layers(tiles)


class Local(nn.Module):
    """A convolution and its mean: what tells neighboring pixels and channels apart, wherever they are."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 5)

    def forward(self, tiles: Tensor) -> Tensor:
        return self.conv(tiles).relu().mean((-2, -1))


def accuracy(paint: Callable[[Tensor], Tensor], settings: ContextSettings, network: Any, *, steps: int) -> float:
    """Return how often the direction is told right of fresh pictures, after so many steps on 32 others each.

    paint: noise (B, 3, W, W), of equal channels, to pictures.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        side, tile = settings.tiles.window_px, settings.size_px
        body, objective = network(tile), settings.objective("context")
        width = body(torch.zeros(1, 3, tile, tile)).shape[-1]
        objective.setup(SimpleNamespace(width=width))  # type: ignore[arg-type]

        def encode(views: Views | Tensor, **_: Any) -> Features:
            pixels = views if isinstance(views, Tensor) else views.pixels
            summary = body(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
            return Features(summary=summary, tokens=summary)

        def terms_of(step: int) -> Any:
            noise = torch.randn(32, 1, side, side).expand(-1, 3, -1, -1)
            return objective(tiles_of(paint(noise), settings, first=32 * step), encode, NOW)

        learned = [*body.parameters(), *objective.parameters()]
        optimizer = torch.optim.Adam(learned, lr=3e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for step in range(steps):
            optimizer.zero_grad()
            terms_of(step).losses["direction"].backward()
            optimizer.step()
            rates.step()
        with torch.no_grad():
            return float(torch.stack([terms_of(steps + number).meters["accuracy"] for number in range(20)]).mean())


def cells(side: int) -> tuple[Tensor, Tensor]:
    """Return row and column, -1 to 1, of the cell that each pixel of a window lies in: (W, W) each."""
    number = torch.arange(side) * 3 // side - 1
    return number[:, None].expand(side, side), number.expand(side, side)


def smooth(noise: Tensor) -> Tensor:
    """Noise blurred over 8 pixels: pixels further apart have nothing to do with one another."""
    width = 8
    wide = F.pad(noise, (width - 1, 0, width - 1, 0), mode="circular")
    return F.avg_pool2d(wide, width, stride=1) * width


def with_a_grid(noise: Tensor) -> Tensor:
    """Noise on a grid of period 5 that has one phase in all pictures, as blocks of compression have."""
    wave = (2 * math.pi / 5 * torch.arange(noise.shape[-1])).cos()
    return noise + 0.6 * (wave + wave[:, None])


def exposed_by_place(noise: Tensor) -> Tensor:
    """Noise whose brightness and contrast belong to the cell."""
    row, col = cells(noise.shape[-1])
    return noise * (1 + 0.3 * row) + 0.3 * col


def dispersed(noise: Tensor) -> Tensor:
    """Noise whose red is a pixel further out than its green, and whose blue is a pixel further in: by a lens."""
    row, col = cells(noise.shape[-1])
    channels = []
    for channel, out in ((0, 1), (1, 0), (2, -1)):
        shifted = torch.zeros_like(noise[:, 0])
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                here = (row == down) & (col == right)
                shifted = torch.where(here, noise[:, channel].roll((out * down, out * right), (-2, -1)), shifted)
        channels.append(shifted)
    return torch.stack(channels, 1)


def fringed(noise: Tensor) -> Tensor:
    """Gray noise with green and magenta fringes: to first order, what a lens does that shifts green outwards and magenta inwards."""
    row, col = cells(noise.shape[-1])
    gray = noise[:, :1]
    slope_y, slope_x = (gray.roll(1, axis) - gray.roll(-1, axis) for axis in (-2, -1))
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    axis = torch.tensor([-1.0, 2, -1])[:, None, None]
    return (gray + 0.3 * axis * (row * slope_y + col * slope_x)) * 0.2 / std  # levels have these colors, not what is normalized


def lined(noise: Tensor) -> Tensor:
    """Noise with lines a pixel wide, light and dark by turns from either, that are stronger to the right and to the bottom."""
    row, col = cells(noise.shape[-1])
    line = 1 - 2 * (torch.arange(noise.shape[-1]) % 2)
    return noise + noise[..., :1, :1].sign() * 0.3 * ((col + 1) * line + (row + 1) * line[:, None])


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """A cue, a network that can read it, tiles and guards without and with what takes it away."""

    paint: Callable[[Tensor], Tensor]
    network: Any
    without: Tiles
    steps: int
    at_least: float
    guarded: Tiles | None = None
    guards: TileGuards = field(default_factory=TileGuards)


CLOSE, APART = Tiles(window_px=24, tile_px=8, jitter_px=0), Tiles(window_px=40, tile_px=8, gap_px=8, jitter_px=0)
FIXED, MOVED = Tiles(window_px=54, tile_px=TILE, jitter_px=0), Tiles(window_px=54, tile_px=TILE, jitter_px=4)

SHORTCUTS = {
    "continuity, gap": Shortcut(paint=smooth, network=Flat, without=CLOSE, guarded=APART, steps=800, at_least=0.3),
    "grid, jitter": Shortcut(paint=with_a_grid, network=Flat, without=FIXED, guarded=MOVED, steps=60, at_least=0.5),
    "exposure, normalize": Shortcut(
        paint=exposed_by_place, network=Local, without=MOVED, guards=TileGuards(normalize=True), steps=150, at_least=0.4
    ),
    "dispersion, drop": Shortcut(paint=dispersed, network=Local, without=MOVED, guards=TileGuards(color="drop"), steps=150, at_least=0.4),
    "dispersion, channel shift": Shortcut(
        paint=dispersed, network=Local, without=MOVED, guards=TileGuards(channel_shift_px=6), steps=150, at_least=0.4
    ),
    "fringes, projection": Shortcut(
        paint=fringed, network=Local, without=MOVED, guards=TileGuards(color="projection"), steps=150, at_least=0.4
    ),
    "lines, resample": Shortcut(
        paint=lined, network=Local, without=MOVED, guards=TileGuards(resample_prob=1.0, resample_px=(6, 6)), steps=150, at_least=0.4
    ),
}

QUICK = "grid, jitter"


@pytest.mark.core
def test_every_shortcut_is_judged_by_a_guard_of_its_own() -> None:
    assert {name.partition(", ")[2] for name in SHORTCUTS} == {
        "gap",
        "jitter",
        "normalize",
        "drop",
        "channel shift",
        "projection",
        "resample",
    }


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in SHORTCUTS])
def test_a_planted_shortcut_works_without_its_guard_and_is_chance_with_it(name: str) -> None:
    """Of 5120 fresh pairs, 8 a picture that go together: at chance the accuracy is 0.125 to within 0.02, where nothing is learned."""
    shortcut = SHORTCUTS[name]

    def reached(tiles: Tiles, guards: TileGuards) -> float:
        return accuracy(shortcut.paint, settings_of(tiles, guards), shortcut.network, steps=shortcut.steps)

    assert reached(shortcut.without, TileGuards()) > shortcut.at_least
    assert abs(reached(shortcut.guarded or shortcut.without, shortcut.guards) - CHANCE) < 0.02
