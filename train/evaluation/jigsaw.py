"""Jigsaw puzzles on frozen features: in which of 1000 orders the nine tiles of a picture lie, and what is recognized once they are sorted.

Here: the protocol, the head and how it is trained, pictures laid out of tiles.
Not here: jigsaw as something to learn, and its permutations (train/objectives/jigsaw.py), how tiles are cut (Tiles, pipeline/laws.py).
Source: SP's second task, arXiv 2605.09963, of which secondary descriptions say 3 x 3 tiles, 1000 permutations, and recognition of original,
shuffled and re-assembled pictures; all else is our choice. Tiles, permutations and head as in arXiv 1603.09246 and VISSL.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wherefrom.pipeline.laws import Tiles
from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.features import CHANCE, ENCODER, RAW, SUMMARY, Evaluation, Part, last_layers
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.labels import vote
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score, check_part
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives.jigsaw import listed_permutations
from wherefrom.train.objectives.tiles import ROWS, TILES

RAW_TILE_PX = 12
# the centered square, as large as the picture allows, shown as 255 x 255 px
WHOLE_SQUARE = Tiles(area_frac=(1.0, 1.0), aspect=(1.0, 1.0), window_px=255, tile_px=85, jitter_px=0)
LAWS = {"no gaps": WHOLE_SQUARE, "gaps": replace(WHOLE_SQUARE, tile_px=64, jitter_px=None)}  # of 0 to 42 px, drawn for each tile


@dataclass(frozen=True, kw_only=True, slots=True)
class JigsawPuzzles:
    """The largest square in the middle of a picture, cut into 3 x 3 tiles: touching, or of 64 px anywhere in cells of 85.

    Each tile is encoded by itself, at a third of the side of whole pictures that patches divide. A head as VISSL's, a layer for each tile
    and one for all, is trained on frozen features of training pictures, in new orders at every step: AdamW at 1e-3, cosine to 0, weight
    decay 0.05, features standardized. Without gaps seams alone tell neighbors, to raw pixels too.
    Then held-out pictures are encoded as a whole: laid out as they were, in the order that was drawn, and as the head would sort them;
    k-NN among training pictures that are laid out as they were; shrunk to the side of whole pictures for a network of one size alone.
    Pictures that are too small for a law's tiles are left out under it, and their share is said.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("training pictures",)
    part: Part = SUMMARY
    permutations: int = 1000  # the first that are listed
    hidden: int = 128  # of each tile; VISSL: 1000
    steps: int = 300
    batch: int = 128
    pictures: int = 1000  # of training, at most
    held_out_pictures: int = 500
    k: int = 20
    temperature: float = 0.07

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part that it measures."""
        return (self.part,)

    def measure(self, evaluation: Evaluation) -> Iterator[Score | NotMeasuredError]:
        """Yield accuracy of the permutation and of single cells, and of recognition where there are labels, with and without gaps."""
        check_part(evaluation, self.part)
        listed = torch.from_numpy(listed_permutations()[: self.permutations].astype(np.int64)).to(evaluation.device)
        all_ids, all_labels = zip(*(self._labeled(evaluation, side) for side in ("train", "held_out")), strict=True)
        with random_scope(evaluation.seed, "jigsaw", "drawn"):
            drawn_for_all = torch.randint(len(listed), (len(all_ids[1]),)).to(evaluation.device)
        for name, law in LAWS.items():
            size = evaluation.view_px(1 / ROWS)
            family = ViewFamily(name="tiles", views=TILES, size_px=(size, size), law=law)
            sides = [self._tiles(evaluation, side, family, of) for side, of in zip(("train", "held_out"), all_ids, strict=True)]
            large = [valid for _, valid in sides]
            if not all(bool(valid.any()) for valid in large):
                yield NotMeasuredError(
                    f"{name}: no {'training' if not large[0].any() else 'held-out'} picture is large enough for its tiles"
                )
                continue
            train, held_out = ({column: values[valid] for column, values in tiles.items()} for tiles, valid in sides)
            ids = tuple(of[valid.cpu().numpy()] for of, valid in zip(all_ids, large, strict=True))
            labels = tuple(of[valid] if len(of) else of for of, valid in zip(all_labels, large, strict=True))
            drawn = drawn_for_all[large[1]]
            for side, valid in zip(("training", "held-out"), large, strict=True):
                if not bool(valid.all()):
                    share = float((~valid).double().mean())
                    yield Score(row=f"{name}: {side}, too small, left out", features=ENCODER, value=share, better="neither")
            told = {}
            for column, tiles in train.items():
                head = train_head(
                    tiles, listed, hidden=self.hidden, steps=self.steps, batch=self.batch, seed=evaluation.seed, name=f"{name}, {column}"
                )
                told[column] = answers(head, held_out[column], listed[drawn])
                right = float((told[column] == drawn).double().mean())
                yield Score(row=f"{name}: permutation", features=column, value=right)
                cells = float((listed[told[column]] == listed[drawn]).double().mean())
                yield Score(row=f"{name}: cells", features=column, value=cells)
            yield Score(row=f"{name}: permutation", features=CHANCE, value=1 / len(listed))
            yield Score(row=f"{name}: cells", features=CHANCE, value=float((listed[:, None] == listed[drawn]).double().mean()))
            if len(labels[0]) and len(labels[1]):
                yield from self._recognized(evaluation, name, family, ids, labels, listed[drawn], {c: listed[t] for c, t in told.items()})

    def _labeled(self, evaluation: Evaluation, side: str) -> tuple[NDArray[np.int64], Tensor]:
        """Return pictures of a side and their labels; where there are no labels, any pictures, and none."""
        number = self.pictures if side == "train" else self.held_out_pictures
        labeled = evaluation.labeled("train" if side == "train" else "held_out", self.part)
        ids = labeled.ids if len(labeled.ids) else evaluation.ids(side)
        return ids[:number], labeled.labels[:number]

    def _tiles(self, evaluation: Evaluation, side: str, family: ViewFamily, ids: NDArray[np.int64]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of every tile, row by row as the picture has them, (N, 9, D), by column, and whose tiles are valid, (N,)."""
        large: list[Tensor] = []
        of_blocks: dict[str, list[Tensor]] = {column: [] for column in (*evaluation.networks, RAW)}
        for number, batch in evaluation.batches(side, evaluation.recipe(family), ids, own=True):
            views = batch.views[0]
            for column, encoder in evaluation.networks.items():
                with torch.no_grad():
                    values = self.part.of(last_layers(encoder, views, self.part.layers))
                of_blocks[column].append(values.unflatten(0, views.valid.shape))
            small = F.adaptive_avg_pool2d(views.pixels.float().flatten(0, 1), RAW_TILE_PX)
            large.append(views.valid.all(1).byte())
            of_blocks[RAW].append(small.flatten(1).unflatten(0, views.valid.shape))
            evaluation.progress(f"tiles: {side.replace('_', ' ')}", min(len(ids), (number + 1) * 64), len(ids))
        return {column: evaluation.joined(blocks) for column, blocks in of_blocks.items()}, evaluation.joined(large).bool()

    def _recognized(
        self,
        evaluation: Evaluation,
        name: str,
        family: ViewFamily,
        ids: tuple[NDArray[np.int64], ...],
        labels: tuple[Tensor, ...],
        shuffled: Tensor,
        sorted_by: dict[str, Tensor],
    ) -> Iterator[Score]:
        """Yield k-NN of pictures laid out as they were, shuffled by permutations (M, 9), and sorted as if they were by others (M, 9)."""
        plain = torch.arange(TILES, device=evaluation.device)
        for column, encoder in evaluation.networks.items():
            bank = self._laid_out(evaluation, "train", family, ids[0], encoder, plain.expand(len(ids[0]), -1))
            orders = {
                "original": plain.expand_as(shuffled),
                "shuffled": shuffled,
                "re-assembled": shuffled.gather(1, sorted_by[column].argsort(1)),
            }
            for kind, order in orders.items():
                queries = self._laid_out(evaluation, "held_out", family, ids[1], encoder, order)
                similarity, nearest = neighbors(bank, queries, k=self.k)
                accuracy = (vote(similarity, labels[0][nearest], temperature=self.temperature) == labels[1]).double().mean()
                yield Score(row=f"{name}: {kind}, k {self.k}", features=column, value=float(accuracy))

    def _laid_out(
        self, evaluation: Evaluation, side: str, family: ViewFamily, ids: NDArray[np.int64], encoder: Encoder, order: Tensor
    ) -> Tensor:
        """Return the features of pictures laid out of their tiles, (N, D): the tile at place k is number order[:, k], (N, 9)."""
        features = []
        for number, batch in evaluation.batches(side, evaluation.recipe(family), ids, own=True):
            pixels = laid_out(batch.views[0].pixels, order[number * 64 : (number + 1) * 64])
            if encoder.only_hw is not None:
                pixels = F.interpolate(pixels[:, 0], encoder.only_hw, mode="bilinear", antialias=True).unsqueeze(1)
            with torch.no_grad():
                values = self.part.of(last_layers(encoder, pixels, self.part.layers))
            features.append(values)
            evaluation.progress(f"laid out: {side.replace('_', ' ')}", min(len(ids), (number + 1) * 64), len(ids))
        return evaluation.joined(features)


class PermutationHead(nn.Module):
    """The number of the order in which nine tiles lie: the same layer for each, then one for all of them side by side."""

    mean: Tensor
    std: Tensor

    def __init__(self, tiles: Tensor, *, hidden: int, permutations: int) -> None:
        """tiles: those that are learned from, (N, 9, D), by whose mean and deviation all are standardized."""
        super().__init__()
        self.register_buffer("mean", tiles.mean((0, 1)))
        self.register_buffer("std", tiles.flatten(0, 1).std(0).clamp(min=1e-6))
        self.each = nn.Sequential(nn.Linear(tiles.shape[-1], hidden), nn.ReLU())
        self.all = nn.Linear(TILES * hidden, permutations)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return a score of every order: tiles (B, 9, D) as they lie -> (B, permutations)."""
        return self.all(self.each((tiles - self.mean) / self.std).flatten(1))


def train_head(
    tiles: Tensor, permutations: Tensor, *, hidden: int, steps: int, batch: int, seed: int, name: str = "", lr: float = 1e-3
) -> PermutationHead:
    """Return a head trained to tell orders, of which each picture has a new one at every step.

    Shapes: tiles (N, 9, D) row by row, permutations (P, 9) int64, of which [p, k] is the tile that lies at place k.
    """
    with random_scope(seed, "jigsaw", "head", name):
        head = PermutationHead(tiles, hidden=hidden, permutations=len(permutations)).to(tiles.device)
        rows = torch.randint(len(tiles), (steps, batch)).to(tiles.device)
        drawn = torch.randint(len(permutations), (steps, batch)).to(tiles.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.05)
    for step, (row, order) in enumerate(zip(rows, drawn, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        loss = F.cross_entropy(head(_placed(tiles[row], permutations[order])), order)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)


def answers(head: PermutationHead, tiles: Tensor, orders: Tensor) -> Tensor:
    """Return which permutation a head tells of every picture, (N,) int64: tiles (N, 9, D) row by row, laid out by orders (N, 9)."""
    blocks = zip(tiles.split(256), orders.split(256), strict=True)
    return torch.cat([head(_placed(some, order)).argmax(-1) for some, order in blocks])


def _placed(tiles: Tensor, order: Tensor) -> Tensor:
    return tiles.gather(1, order.unsqueeze(-1).expand_as(tiles))


def laid_out(tiles: Tensor, order: Tensor) -> Tensor:
    """Return pictures of nine tiles, 3 x 3, as single views: tiles (B, 9, C, h, w), order (B, 9) -> (B, 1, C, 3 h, 3 w)."""
    placed = tiles.gather(1, order.view(*order.shape, 1, 1, 1).expand_as(tiles)).unflatten(1, (ROWS, ROWS))
    return placed.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).unsqueeze(1)
