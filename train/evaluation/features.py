"""What protocols ask for: features of pictures by frozen networks, each computed once, by all ranks together.

Here: how whole pictures are shown, parts of features, the pictures and labels of both sides, floors beside the network.
Not here: what is made of them (one file a family of protocols), where networks come from (network.py), pictures (pictures.py).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.laws import Center
from wherefrom.pipeline.view_recipe import CropLaw, Mirror, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.dense_pictures import DepthPictures, MaskedPictures
from wherefrom.train.evaluation.labels import RAW_PX, draw_ids
from wherefrom.train.evaluation.network import Network, random_network
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, blocks
from wherefrom.train.ranks import Ranks

WHOLE = Center(resize_px=256, crop_px=224)  # whole pictures, as Resize(256) and CenterCrop(224) show them
ENCODER, RANDOM, RAW = "encoder", "random encoder", "raw pixels"  # columns of all tables
Side = Literal["train", "held_out"]
BLOCK = 64  # pictures that are encoded at once, whatever the number of ranks: so each feature is the same, bit for bit


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which numbers of a network's last layers make the feature of a whole picture, (D,) each, side by side."""

    token: Literal["summary", "class", "mean"] = "summary"  # what it says itself, the class token, the mean of its tokens
    layers: int = 1  # of the last blocks, the last one last
    and_mean: bool = False  # the last block's mean token behind them

    @property
    def name(self) -> str:
        """The part in words."""
        layers = "" if self.layers == 1 else f" of {self.layers} layers"
        return f"{self.token if self.token == 'summary' else f'{self.token} token'}{layers}{' and mean token' if self.and_mean else ''}"

    def of(self, layers: Sequence[Features]) -> Tensor | None:
        """Return the part of so many layers, views one by one, (n, layers * D) float32; None where there is no class token."""
        chosen = layers[len(layers) - self.layers :]
        numbers = []
        for features in chosen:
            if self.token == "class" and features.prefix is None:
                return None
            numbers.append(_flat(features.summary if self.token == "summary" else _token(features, self.token)))
        if self.and_mean:
            numbers.append(_flat(_token(chosen[-1], "mean")))
        return torch.cat(numbers, -1).float()


def _token(features: Features, token: str) -> Tensor:
    if token == "mean":
        return features.tokens.flatten(2, -2).mean(2)
    assert features.prefix is not None
    return features.prefix[:, :, 0]


def _flat(values: Tensor) -> Tensor:
    return values.flatten(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labeled:
    """Pictures of one side that have a label, as features of every network, by its column."""

    features: Mapping[str, Tensor]  # (N, D) float32 each
    labels: Tensor  # (N,) int64, from 0 on, the same for both sides
    ids: NDArray[np.int64]  # (N,)


class Evaluation:
    """A network under evaluation: its pictures, and what it and its floors make of them.

    Every rank calls the same in the same order, and gets the same.
    """

    def __init__(
        self,
        network: Network,
        train: PictureSource | None,
        held_out: PictureSource,
        *,
        masked: tuple[MaskedPictures, MaskedPictures] | None = None,
        depth: tuple[DepthPictures, DepthPictures] | None = None,
        picture_px: int | None = None,
        limit: int | None = None,
        ranks: Ranks | None = None,
        seed: int = 0,
        progress: ReportProgress | None = None,
    ) -> None:
        """masked, depth: pictures with masks of classes, and with depths, to learn from and held out; they may be those above, or others.

        picture_px: the side of whole pictures, by default that of the network; limit: at most so many pictures of either side.
        """
        self.network = network
        self.train, self.held_out = train, held_out
        self.masked, self.depth = masked, depth
        self.picture_px = picture_px or network.picture_px
        self.limit, self.seed = limit, seed
        self.ranks = ranks or Ranks(0, 1)
        self._progress = progress
        self._parts: dict[tuple[Side, Part], Labeled] = {}

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return next(self.network.encoder.parameters()).device

    @cached_property
    def networks(self) -> Mapping[str, Encoder]:
        """The network, and the same architecture with random weights, by their columns; both frozen."""
        return {ENCODER: self.network.encoder, RANDOM: random_network(self.network, self.seed)}

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is."""
        if self._progress is not None:
            self._progress(what, done, total)

    def ids(self, side: Side, limit: int | None = None) -> NDArray[np.int64]:
        """Return the pictures of a side, drawn by `draw_ids`, at most as many as all protocols take, and as this one does."""
        limits = [number for number in (limit, self.limit) if number is not None]
        return draw_ids(self.source(side), min(limits) if limits else None)

    def source(self, side: Side) -> PictureSource:
        """Return the pictures of a side.

        Raises: ValueError if there are none to learn from.
        """
        if side == "held_out":
            return self.held_out
        if self.train is None:
            raise ValueError("no training pictures: name some by --data")
        return self.train

    def recipe(self, *families: ViewFamily) -> ViewRecipe:
        """Return views of these families as the network wants them."""
        return ViewRecipe(families=families, mean=self.network.mean, std=self.network.std)

    def family(self, name: str = "whole", *, law: CropLaw = WHOLE, size_px: int | None = None, mirror: Mirror = "none") -> ViewFamily:
        """Return one square view a picture: by default the whole picture, as all protocols show it that say no other."""
        size = size_px or self.picture_px
        return ViewFamily(name=name, views=1, size_px=(size, size), law=law, mirror=mirror)

    def batches(
        self, side: Side, recipe: ViewRecipe, ids: NDArray[np.int64], *, epoch: int = 0, own: bool = False
    ) -> Iterator[tuple[int, Batch]]:
        """Yield the views of pictures in blocks of 64, each with its number; `own`: those of this rank alone."""
        for number, block in enumerate(blocks(ids, BLOCK)):
            if not own or number % self.ranks.count == self.ranks.rank:
                yield number, self.source(side).views(recipe, block, epoch=epoch).to(self.device)

    def labeled(self, side: Side, part: Part) -> Labeled:
        """Return a part of whole pictures that have a label, by every network that has it, and raw pixels at 32 px.

        Parts that were named to `prepare` are had by one pass over the pictures.
        """
        if (side, part) not in self._parts:
            self.prepare((part,))
        return self._parts[side, part]

    def prepare(self, parts: Sequence[Part]) -> None:
        """Encode the whole pictures of both sides, and keep these parts of what the networks say of them."""
        wanted = [part for part in dict.fromkeys(parts) if ("held_out", part) not in self._parts]
        if not wanted:
            return
        sides: tuple[Side, ...] = ("train", "held_out")
        encoded = {side: self._encoded(side, wanted) for side in sides}
        classes = torch.cat([labels for labels, _ in encoded.values()]).unique()
        classes = classes[classes >= 0]
        for side, (labels, features) in encoded.items():
            has_label = labels >= 0
            ordinals = torch.searchsorted(classes, labels[has_label])
            for part in wanted:
                of_part = {column: values[has_label] for (column, own), values in features.items() if own == part}
                self._parts[side, part] = Labeled(features=of_part, labels=ordinals, ids=self.ids(side)[has_label.cpu().numpy()])

    def _encoded(self, side: Side, parts: Sequence[Part]) -> tuple[Tensor, dict[tuple[str, Part], Tensor]]:
        """Return the labels of a side's pictures, (N,), -1 of none, and their features, (N, D), of all ranks."""
        ids = self.ids(side)
        recipe = self.recipe(self.family(), self.family("raw", law=Center(), size_px=RAW_PX))
        deepest = max(part.layers for part in parts)
        blocks_of: dict[tuple[str, Part], list[Tensor]] = {}
        labels: list[Tensor] = []
        what = f"features: {side.replace('_', ' ')}"
        for number, batch in self.batches(side, recipe, ids, own=True):
            for column, encoder in self.networks.items():
                with torch.no_grad():
                    layers = encoder.last_layers(batch.family("whole"), deepest)
                for part in parts:
                    values = part.of(layers)
                    if values is not None:
                        blocks_of.setdefault((column, part), []).append(values)
            for part in parts:
                blocks_of.setdefault((RAW, part), []).append(batch.family("raw").pixels[:, 0].float().flatten(1))
            labels.append(batch.label)
            self.progress(what, min(len(ids), (number + 1) * BLOCK), len(ids))
        return self.joined(labels, torch.int64), {key: self.joined(values, torch.float32) for key, values in blocks_of.items()}

    def joined(self, own: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the rows of all blocks in their order, a row a picture, of which each rank brings every so many-th block."""
        nothing = torch.zeros(0, dtype=dtype, device=self.device)
        of_ranks = [iter(rows.split(BLOCK)) for rows in self.ranks.rows(torch.cat(list(own)) if own else nothing)]
        return torch.cat([rows for blocks in itertools.zip_longest(*of_ranks) for rows in blocks if rows is not None and len(rows)])
