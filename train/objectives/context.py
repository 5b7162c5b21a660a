"""Context prediction: tell where one tile of a picture lies relative to another, in one of eight directions.

Here: the settings, the objective.
Not here: tiles and guards (tiles.py), how tiles are cut (Tiles, wherefrom.pipeline.laws).
Source: arXiv 1505.05192; numbers for ResNet-50 as mmselfsup's config has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from wherefrom.pipeline.laws import Tiles
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Panel, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import mlp
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

CENTER = TILES // 2
NEIGHBORS = [place for place in range(TILES) if place != CENTER]  # row by row, as directions are numbered


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextSettings:
    """Every choice of context prediction; by default as mmselfsup has it for ResNet-50 and ImageNet, but for the side of a tile.

    The paper's own tiles, of 96 px 48 px apart and moved by up to 7: size_px=96,
    tiles=Tiles(window_px=398, tile_px=96, gap_px=34, jitter_px=14).

    Raises: ValueError in one line if tiles do not fit their cells, or guards their tiles.
    """

    weight: float = 1.0  # of the whole objective
    size_px: int = 48  # side of a finished tile; 64 in the recipe for ImageNet
    tiles: Tiles = field(default_factory=Tiles)  # how they are cut; gap and jitter are guards against continuity
    hidden: int = 4096  # of the head
    mirror: PICTURE_MIRROR = "none"
    color: ColorLaw | None = field(default_factory=lambda: GRAY_PICTURES)  # one a picture
    guards: TileGuards = field(default_factory=TileGuards)
    min_side_px: int = 16  # of a tile, in the picture

    def __post_init__(self) -> None:
        check_literals(self)
        if self.hidden < 1 or not self.weight >= 0:
            raise ValueError(f"hidden={self.hidden}, weight={self.weight}: needs at least 1, and no negative weight")
        self.guards.check(self.size_px)
        _ = self.family("context")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the nine tiles that these settings ask the loader for."""
        return tile_family(name, size_px=self.size_px, tiles=self.tiles, mirror=self.mirror, color=self.color, min_side_px=self.min_side_px)

    def objective(self, name: str) -> "Context":
        """Return what is learned by these settings, under a name."""
        return Context(self, name=name)


class Context(Objective):
    """Context prediction as an objective: one term, the cross-entropy of eight directions. Chance is an accuracy of 1/8.

    The middle tile is compared with all its neighbors: eight pairs a picture, for as many encoded tiles as four and a half.
    """

    chance = 1 / len(NEIGHBORS)

    def __init__(self, settings: ContextSettings, *, name: str = "context") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)

    def setup(self, encoder: Encoder) -> None:
        """Build the head: two tiles' summaries side by side, a hidden layer, eight directions."""
        widths = [2 * encoder.width, self.settings.hidden, len(NEIGHBORS)]
        self.head = mlp(widths, norm=False, hidden_bias=True, out_bias=True)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, how often the direction is told right, and how summaries spread."""
        views = batch.family(self.name)
        summaries = placed_summaries(views, encode, self.settings.guards, self.name)  # (B, 9, D)
        neighbors = torch.cat([summaries[:, :CENTER], summaries[:, CENTER + 1 :]], 1)
        pairs = torch.cat([summaries[:, CENTER, None].expand_as(neighbors), neighbors], -1)  # (B, 8, 2 D)
        logits = self.head(pairs).flatten(0, 1)
        direction = torch.arange(len(NEIGHBORS), device=logits.device).repeat(len(pairs))
        counted = views.valid.all(1).repeat_interleave(len(NEIGHBORS))
        loss = mean_of_counted(F.cross_entropy(logits, direction, reduction="none"), counted)
        accuracy = mean_of_counted((logits.detach().argmax(-1) == direction).float(), counted)
        meters = {"accuracy": accuracy, "pictures_left_out": 1 - counted.float().mean()} | spread(summaries)
        return Terms(losses={"direction": loss}, meters=meters)

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return the middle tile among its eight neighbors, each with the number of its direction."""
        views = batch.family(self.name)
        cut = in_places(views.geometry.view[None], views.geometry)[0].tolist()
        words = [f"direction {NEIGHBORS.index(place)}" if place != CENTER else "middle" for place in range(TILES)]
        return [
            tile_panel(
                placed_pixels(views, self.settings.guards, self.name)[0],
                views,
                self.settings.guards,
                self.name,
                labels=[f"{word}: view [{view}]" for word, view in zip(words, cut, strict=True)],
                captions=["the middle tile is compared with each of the others"],
            )
        ]
