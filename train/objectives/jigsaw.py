"""Jigsaw: tell in which of many orders the nine tiles of a picture are laid out.

Here: the settings, the orders and how they were found, the objective.
Not here: tiles and guards (tiles.py), how tiles are cut (Tiles, wherefrom.pipeline.laws).
Source: arXiv 1603.09246; the head, and numbers for ResNet-50, as VISSL's configs have them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wherefrom.pipeline.laws import Tiles
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.records import keyed_uniform
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch, ViewGeometry
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Panel, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.tiles import (
    GRAY_PICTURES,
    PICTURE_MIRROR,
    TILES,
    TileGuards,
    in_places,
    placed_pixels,
    placed_summaries,
    tile_family,
    tile_panel,
)
from wherefrom.train.over_ranks import mean_of_counted

FILE = Path(__file__).with_name("jigsaw_permutations.txt")
LISTED = 2000  # permutations in the file
ALL = math.factorial(TILES)


@dataclass(frozen=True, kw_only=True, slots=True)
class JigsawSettings:
    """Every choice of jigsaw; by default as VISSL has it for ResNet-50 and ImageNet, but for the side of a tile.

    Raises: ValueError in one line if there are not as many permutations, tiles do not fit their cells, or guards their tiles.
    """

    weight: float = 1.0  # of the whole objective
    size_px: int = 48  # side of a finished tile; 64 in the recipe for ImageNet
    tiles: Tiles = field(default_factory=Tiles)  # how they are cut; gap and jitter are guards against continuity
    permutations: int = LISTED  # the first of the file
    hidden: int = 1000  # numbers that the head is told of each tile
    mirror: PICTURE_MIRROR = "picture"
    color: ColorLaw | None = field(default_factory=lambda: GRAY_PICTURES)  # one a picture
    guards: TileGuards = field(default_factory=TileGuards)
    min_side_px: int = 16  # of a tile, in the picture

    def __post_init__(self) -> None:
        check_literals(self)
        if self.permutations > ALL:
            raise ValueError(f"permutations={self.permutations}: {TILES} tiles have {ALL}; take at most {LISTED}, as many as are listed")
        if not 2 <= self.permutations <= LISTED:
            raise ValueError(f"permutations={self.permutations}: needs 2 to {LISTED}, as many as {FILE.name} lists")
        if self.hidden < 1 or not self.weight >= 0:
            raise ValueError(f"hidden={self.hidden}, weight={self.weight}: needs at least 1, and no negative weight")
        self.guards.check(self.size_px)
        _ = self.family("jigsaw")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the nine tiles that these settings ask the loader for."""
        return tile_family(name, size_px=self.size_px, tiles=self.tiles, mirror=self.mirror, color=self.color, min_side_px=self.min_side_px)

    def objective(self, name: str) -> "Jigsaw":
        """Return what is learned by these settings, under a name."""
        return Jigsaw(self, name=name)


class Jigsaw(Objective):
    """Jigsaw as an objective: one term, the cross-entropy of the permutation. Chance is an accuracy of one over their number."""

    permutations: Tensor  # (P, 9) int64: permutations[p, k] is the place that the tile laid at k comes from

    def __init__(self, settings: JigsawSettings, *, name: str = "jigsaw") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)
        self.chance = 1 / settings.permutations
        listed = torch.from_numpy(listed_permutations()[: settings.permutations].astype(np.int64))
        self.register_buffer("permutations", listed, persistent=False)

    def setup(self, encoder: Encoder) -> None:
        """Build the head: the same layer for each tile, then one for all of them side by side."""
        settings = self.settings
        self.each = nn.Sequential(nn.Linear(encoder.width, settings.hidden), nn.ReLU())
        self.head = nn.Linear(TILES * settings.hidden, settings.permutations)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, how often the permutation is told right, and how summaries spread."""
        views = batch.family(self.name)
        summaries = placed_summaries(views, encode, self.settings.guards, self.name)  # (B, 9, D)
        chosen = self.chosen(views.geometry)
        order = self.permutations[chosen].unsqueeze(-1)
        logits = self.head(self.each(summaries.gather(1, order.expand_as(summaries))).flatten(1))
        counted = views.valid.all(1)
        loss = mean_of_counted(F.cross_entropy(logits, chosen, reduction="none"), counted)
        accuracy = mean_of_counted((logits.detach().argmax(-1) == chosen).float(), counted)
        meters = {"accuracy": accuracy, "pictures_left_out": 1 - counted.float().mean()} | spread(summaries)
        return Terms(losses={"permutation": loss}, meters=meters)

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return the nine tiles as they are laid out, each with the place that it comes from."""
        views = batch.family(self.name)
        chosen = int(self.chosen(views.geometry))
        places = self.permutations[chosen].cpu()
        tiles = placed_pixels(views, self.settings.guards, self.name)[0, places]
        cut = in_places(views.geometry.view[None], views.geometry)[0, places]
        captions = [f"permutation {chosen} of {len(self.permutations)}: places {' '.join(map(str, places.tolist()))}"]
        return [
            tile_panel(
                tiles,
                views,
                self.settings.guards,
                self.name,
                labels=[f"place {place}: view [{view}]" for place, view in zip(places.tolist(), cut.tolist(), strict=True)],
                captions=captions,
            )
        ]

    def chosen(self, record: ViewGeometry) -> Tensor:
        """Return the number of every picture's permutation, (B,) int64: a function of its record and of the objective's name."""
        return (keyed_uniform(record[:, :1], f"{self.name}/permutation")[:, 0] * len(self.permutations)).long()


def listed_permutations() -> NDArray[np.uint8]:
    """Return the permutations that the library lists, (2000, 9): `far_apart_permutations`, read from their file."""
    lines = FILE.read_text(encoding="ascii").split()
    return np.array([[int(tile) for tile in line] for line in lines], np.uint8)


def far_apart_permutations(count: int) -> NDArray[np.uint8]:
    """Return permutations of nine tiles, each as far as can be from those before it, (count, 9): the first is the order as it is.

    Far in Hamming distance, the number of places that differ: first by the least distance to any before it, then, among equals, by the
    mean distance, then the first in lexicographic order. So nothing is drawn.
    Source: ours; arXiv 1603.09246 goes by the mean distance alone, by which some are two tiles apart.
    """
    every = np.array(list(itertools.permutations(range(TILES))), np.uint8)
    places = np.ascontiguousarray(every.T)
    least, total = np.full(len(every), TILES, np.int64), np.zeros(len(every), np.int64)
    found = [0]
    while len(found) < count:
        distance = np.zeros(len(every), np.uint8)
        for place, tile in zip(places, every[found[-1]], strict=True):
            distance += place != tile
        np.minimum(least, distance, out=least)
        total += distance
        found.append(int(np.argmax(least * (TILES * count) + total)))
    return every[found]
