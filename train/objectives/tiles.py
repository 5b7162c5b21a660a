"""Tiles of a window, nine a picture, and what keeps a network from placing them by other signs than what they show.

Here: the family that jigsaw and context ask for, the order of tiles in mirrored pictures, the guards and what they do to pixels, the panel.
Not here: where tiles lie, their gap and their jitter (Tiles, wherefrom.pipeline.laws); what is learned (context.py, jigsaw.py).
Every number that a guard draws is keyed by the record: whoever has it replays the pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.laws import Tiles
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.records import keyed_uniform
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ColorLaw, ViewFamily
from wherefrom.pipeline.views import ViewGeometry, Views
from wherefrom.train.objective import Encode, Panel
from wherefrom.train.objectives.heads import full_precision

ROWS = 3  # and as many columns
TILES = ROWS**2

GRAY_PICTURES = ColorLaw(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, jitter_prob=0.0, gray_prob=0.66)
PICTURE_MIRROR = Literal["none", "picture"]  # not each tile by itself: they would not fit together


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGuards:
    """What is done to every tile by itself so that only what it shows tells its place; nothing by default.

    color: "drop" keeps one channel, drawn for each tile, and makes noise of the others, of a hundredth of its deviation; "projection" takes
    out the green-magenta axis, along which lenses disperse most.
    Source: color and resampling arXiv 1505.05192, shifts of channels arXiv 1603.09246, which has normalization too.
    """

    normalize: bool = False  # each tile's channels have mean 0 and deviation 1: neither brightness nor contrast tells neighbors
    color: Literal["none", "drop", "projection"] = "none"
    channel_shift_px: int = 0  # each channel is moved by up to so many pixels along either axis
    resample_prob: float = 0.0  # of a tile: it is made smaller, then as large as before
    resample_px: tuple[int, int] = (10, 32)  # its side in between

    def __post_init__(self) -> None:
        check_literals(self)
        if self.channel_shift_px < 0:
            raise ValueError(f"channel_shift_px={self.channel_shift_px}: cannot be negative")
        if not 0 <= self.resample_prob <= 1:
            raise ValueError(f"resample_prob={self.resample_prob}: a probability lies in [0, 1]")
        low, high = self.resample_px
        if not 1 <= low <= high:
            raise ValueError(f"resample_px={self.resample_px}: needs 1 <= low <= high")

    def check(self, size_px: int) -> None:
        """Raise ValueError if tiles of `size_px` are too small for them."""
        if self.channel_shift_px >= size_px:
            raise ValueError(f"channel_shift_px={self.channel_shift_px} of tiles of {size_px} px: needs less")
        if self.resample_prob > 0 and self.resample_px[1] > size_px:
            raise ValueError(f"resample_px={self.resample_px} of tiles of {size_px} px: none may be larger; lower it")


def tile_family(
    name: str,
    *,
    size_px: int,
    tiles: Tiles,
    mirror: PICTURE_MIRROR,
    color: ColorLaw | None,
    min_side_px: int,
) -> ViewFamily:
    """Return the nine tiles of a picture, whose color is changed alike.

    Raises: ValueError if the law cuts another number.
    """
    if (tiles.rows, tiles.cols) != (ROWS, ROWS):
        raise ValueError(f"tiles: rows={tiles.rows}, cols={tiles.cols}: {name} is of {ROWS} x {ROWS} tiles; leave both out")
    return ViewFamily(
        name=name,
        views=TILES,
        size_px=(size_px, size_px),
        law=tiles,
        mirror=mirror,
        color=color,
        color_per="picture",
        min_side_px=min_side_px,
    )


def placed_summaries(views: Views, encode: Encode, guards: TileGuards, name: str) -> Tensor:
    """Return what the network makes of the tile at each place of the window as it is shown, row by row: (B, 9, D).

    In a mirrored picture columns run the other way.
    """
    features = encode(views if guards == TileGuards() else guarded(views, guards, name))
    return in_places(features.summary, views.geometry)


def placed_pixels(views: Views, guards: TileGuards, name: str) -> Tensor:
    """Return the pixels of the tile at each place, (B, 9, 3, H, W), as `placed_summaries` gives them to the network."""
    return in_places(views.pixels if guards == TileGuards() else guarded(views, guards, name), views.geometry)


def in_places(of_views: Tensor, record: ViewGeometry) -> Tensor:
    """Return what belongs to a picture's nine views, (B, 9, ...), in the order of places of the window as it is shown."""
    order = torch.arange(TILES, device=of_views.device).view(ROWS, ROWS)
    order = torch.where(record.flipped[:, :1], order.flip(1).flatten(), order.flatten())  # (B, 9)
    return of_views.gather(1, order.view(*order.shape, *[1] * (of_views.ndim - 2)).expand_as(of_views))


def tile_panel(tiles: Tensor, views: Views, guards: TileGuards, name: str, *, labels: Sequence[str], captions: Sequence[str]) -> Panel:
    """Return nine tiles (9, 3, H, W) of one picture's views as a panel, with what else is to be known of them."""
    changed = {field.name: getattr(guards, field.name) for field in fields(guards) if getattr(guards, field.name) != field.default}
    notes = ["mirrored, and so is the order of columns"] * bool(views.geometry.flipped[0, 0])
    notes += ["guards: " + ", ".join(f"{field}={value}" for field, value in changed.items())] * bool(changed)
    notes += ["left out: the picture is too small for its tiles"] * (not views.valid.all())
    return Panel(
        title=f"{name}: tiles as the network is given them",
        pictures=tiles.unflatten(0, (ROWS, ROWS)),
        labels=labels,
        captions=[*captions, *notes],
    )


def guarded(views: Views, guards: TileGuards, name: str) -> Tensor:
    """Return the pixels of tiles as the guards leave them, (B, V, 3, H, W) float; those of `views` are normalized as by default.

    Draws are keyed by the record under names that begin with `name`.
    """
    with torch.autocast(views.pixels.device.type, enabled=False):
        record, pixels = views.geometry, full_precision(views.pixels)
        if guards.resample_prob > 0:
            pixels = _resampled(pixels, record, guards, name)
        if guards.channel_shift_px > 0:
            pixels = _channels_shifted(pixels, record, guards.channel_shift_px, name)
        if guards.color == "projection":
            pixels = _without_green_magenta(pixels)
        if guards.normalize:
            deviation, mean = torch.std_mean(pixels, dim=(-2, -1), keepdim=True, correction=0)
            pixels = (pixels - mean) / (deviation + 1e-3)  # of a constant tile nothing is made
        if guards.color == "drop":  # last, or noise would be normalized too
            pixels = _one_channel_kept(pixels, record, name)
        return pixels


def _resampled(pixels: Tensor, record: ViewGeometry, guards: TileGuards, name: str) -> Tensor:
    """Make a share of the tiles smaller, with antialias, and as large as before, bilinearly: rows and columns by one matrix a tile."""
    low, high = guards.resample_px
    chance, which = keyed_uniform(record, f"{name}/resample", (2,)).unbind(-1)  # (B, V)
    small = (which * (high - low + 1)).long()
    kept = torch.full_like(small, high - low + 1)  # the last matrix changes nothing
    number = torch.where(chance < guards.resample_prob, small, kept)
    # (B, V, 1, side, side) each
    rows, cols = (_resamplers(low, high, side, pixels.device, pixels.dtype)[number].unsqueeze(2) for side in pixels.shape[-2:])
    return rows @ pixels @ cols.mT


@cache
def _resamplers(low: int, high: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return what shrinks `side` pixels to `low` ... `high` and enlarges them again, then what leaves them: (n + 1, side, side)."""
    unit = torch.eye(side)[None]  # a row is what becomes of the pixel of its number

    def through(small: int) -> Tensor:
        down = F.interpolate(unit[:, None], size=(side, small), mode="bilinear", antialias=True)
        return F.interpolate(down, size=(side, side), mode="bilinear", align_corners=False)[0, 0].T

    return torch.stack([*(through(small) for small in range(low, high + 1)), unit[0]]).to(device, dtype)


def _channels_shifted(pixels: Tensor, record: ViewGeometry, most_px: int, name: str) -> Tensor:
    """Move every channel by itself, up to `most_px` along either axis; what comes in at an edge repeats it."""
    shift = (keyed_uniform(record, f"{name}/shift", (3, 2)) * (2 * most_px + 1)).long() - most_px  # (B, V, 3, 2), x and y
    height, width = pixels.shape[-2:]
    rows = (torch.arange(height, device=pixels.device) + shift[..., 1:]).clamp(0, height - 1)  # (B, V, 3, H)
    cols = (torch.arange(width, device=pixels.device) + shift[..., :1]).clamp(0, width - 1)
    moved = pixels.gather(-2, rows.unsqueeze(-1).expand_as(pixels))
    return moved.gather(-1, cols.unsqueeze(-2).expand_as(pixels))


def _one_channel_kept(pixels: Tensor, record: ViewGeometry, name: str) -> Tensor:
    """Keep one channel of each tile; make Gaussian noise of the others, of mean 0 and a hundredth of its deviation."""
    kept = (keyed_uniform(record, f"{name}/channel") * 3).long()[..., None, None, None]  # (B, V, 1, 1, 1)
    radius, angle = keyed_uniform(record, f"{name}/noise", (2, *pixels.shape[-2:])).split(1, 2)  # Box-Muller: two numbers give two
    noise = (-2 * radius.log()).sqrt() * torch.cat([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], 2)
    deviation = pixels.std((-2, -1), keepdim=True).gather(2, kept)
    first, second = (noise.to(pixels) * deviation / 100).split(1, 2)
    noise = torch.cat([first, second, torch.where(kept == 1, second, first)], 2)  # the two that are not kept differ
    channels = torch.arange(3, device=pixels.device)[:, None, None]
    return torch.where(channels == kept, pixels, noise)


def _without_green_magenta(pixels: Tensor) -> Tensor:
    """Project colors onto the plane across (-1, 2, -1) of red, green and blue: green and magenta become gray."""
    red, green, blue = (channel * std + mean for channel, mean, std in zip(pixels.unbind(2), IMAGENET_MEAN, IMAGENET_STD, strict=True))
    along = (2 * green - red - blue) / 6
    steps = torch.stack([along * axis / std for axis, std in zip((-1, 2, -1), IMAGENET_STD, strict=True)], 2)
    return pixels - steps
