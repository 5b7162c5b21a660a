"""What protocols ask for: features of pictures by frozen networks, each computed once, by all ranks together.

Here: how whole pictures are shown, parts of features, the pictures and labels of both sides, floors beside the network.
Not here: what is made of them (one file a family of protocols), where networks come from (network.py), pictures (pictures.py).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.laws import Center, Independent
from wherefrom.pipeline.view_recipe import CropLaw, Mirror, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.dense_pictures import DepthPictures, MaskedPictures
from wherefrom.train.evaluation.labels import RAW_PX, draw_ids
from wherefrom.train.evaluation.network import Network, random_network
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, blocks, encoded
from wherefrom.train.ranks import Ranks

WHOLE = Center(resize_px=256, crop_px=224)  # whole pictures, as Resize(256) and CenterCrop(224) show them
ENCODER, RANDOM, RAW = "encoder", "random encoder", "raw pixels"  # columns of all tables
CHANCE = "chance"  # the column of what no features are needed for, where there is one
LABELS = "labels"
Split = Literal["train", "held_out"]
OpenPictures = Callable[[], AbstractContextManager[PictureSource]]
CORRUPTED = "imagenet-c"  # of pictures from elsewhere, behind which stand corruption and severity: "imagenet-c/snow/3"
VARIANTS = ("imagenet-r", "imagenet-a", "imagenet-sketch")
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

    def fits(self, encoder: Encoder) -> bool:
        """Whether a network has the part: so many layers, and a class token where it is asked for."""
        return self.layers <= encoder.layers and (self.token != "class" or encoder.has_class_token)

    def of(self, layers: Sequence[Features]) -> Tensor:
        """Return the part of a network's last layers, which are as many or more, (n, layers * D) float32, views one by one."""
        chosen = layers[len(layers) - self.layers :]
        numbers = [_token(features, self.token) for features in chosen] + [_token(chosen[-1], "mean")] * self.and_mean
        return torch.cat([each.flatten(0, 1) for each in numbers], -1).float()


SUMMARY = Part()  # what a network says itself, of its last block


def last_layers(encoder: Encoder, views: Views | Tensor, number: int) -> tuple[Features, ...]:
    """Return what the last blocks of a network make of views, as `Encoder.last_layers`, with the tokens of the last as `encode` has them.

    These are of another block where `tokens_from_block` says so.
    """
    block = encoder.settings.tokens_from_block
    behind = 1 if block is None else encoder.layers - range(encoder.layers)[block]
    layers = encoder.last_layers(views, max(number, behind))
    return (*layers[len(layers) - number : -1], replace(layers[-1], tokens=layers[-behind].tokens))


def _token(features: Features, token: str) -> Tensor:
    if token == "summary":
        return features.summary
    if token == "mean":
        return features.tokens.flatten(2, -2).mean(2)
    assert features.prefix is not None, "the network has no class token"
    return features.prefix[:, :, 0]


def raw_tokens(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return views as tokens of their own pixels, 4 x 4 of each color in a cell: pixels (B, V, 3, H, W) -> (B, V, rows, cols, 48)."""
    return pixels_of_cells(pixels.float().flatten(0, 1), grid, (4, 4)).unflatten(0, pixels.shape[:2])


def pixels_of_cells(pixels: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return what every cell of a grid (rows, cols) shows, averaged to `size`: (n, 3, H, W) -> (n, rows, cols, 3 * height * width)."""
    (rows, cols), (height, width) = grid, size
    even = F.adaptive_avg_pool2d(pixels, (rows * height, cols * width))
    cells = even.unflatten(3, (cols, width)).unflatten(2, (rows, height))  # (n, 3, rows, height, cols, width)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)


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
        others: Mapping[str, OpenPictures] | None = None,
    ) -> None:
        """picture_px: the side of whole pictures, by default that of the network; limit: at most so many pictures of either side.

        masked, depth: pictures with masks of classes, and with depths, to learn from and held out; they may be those above, or others.
        others: pictures from elsewhere by their names, as `other_pictures` finds them: each is opened when its turn comes.
        Raises: ValueError if picture_px or limit is below 1.
        """
        self.network = network
        self.train, self.held_out = train, held_out
        self.masked, self.depth = masked, depth
        self.picture_px = network.px(picture_px)
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}: take at least 1 picture of either side, or leave it out for all")
        self.limit, self.seed = limit, seed
        self.ranks = ranks or Ranks(0, 1)
        self.others = others or {}
        self._progress = progress
        self._parts: dict[tuple[Split, Part], Labeled] = {}
        self._crops: dict[tuple[Part, int], Mapping[str, Tensor]] = {}
        self._classes = torch.zeros(0, dtype=torch.int64)  # the labels that either side has, as its pictures have them
        self._opened: dict[str, PictureSource] = {}

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return next(self.network.encoder.parameters()).device

    @cached_property
    def networks(self) -> Mapping[str, Encoder]:
        """The network, and the same architecture with random weights, by their columns; both frozen."""
        return {ENCODER: self.network.encoder, RANDOM: random_network(self.network.encoder, self.seed)}

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is."""
        if self._progress is not None:
            self._progress(what, done, total)

    def view_px(self, frac: float) -> int:
        """Return the side of smaller views, about `frac` of whole pictures: patches divide it. A network of one size alone gets that."""
        encoder = self.network.encoder
        if encoder.only_hw is not None:
            return int(encoder.only_hw[0])
        step = encoder.patch_px[0] if encoder.settings.is_vit else 32
        return max(1, round(frac * self.picture_px / step)) * step

    def grid(self) -> tuple[int, int]:
        """Return rows and columns of the tokens that the network makes of a whole picture."""
        with torch.no_grad():
            whole = torch.zeros(1, 1, 3, self.picture_px, self.picture_px, device=self.device)
            _, _, rows, cols, _ = self.network.encoder.encode(whole).tokens.shape
        return rows, cols

    def ids(self, side: str, limit: int | None = None) -> NDArray[np.int64]:
        """Return the pictures of a side, drawn by `draw_ids`, at most as many as all protocols take, and as this one does."""
        limits = [number for number in (limit, self.limit) if number is not None]
        return draw_ids(self.source(side), min(limits) if limits else None)

    def source(self, side: str) -> PictureSource:
        """Return the pictures of a side.

        Raises: ValueError if there are none to learn from.
        """
        if side in self._opened:
            return self._opened[side]
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
        self, side: str, recipe: ViewRecipe, ids: NDArray[np.int64], *, epoch: int = 0, own: bool = False
    ) -> Iterator[tuple[int, Batch]]:
        """Yield the views of pictures in blocks of 64, each with its number; `own`: those of this rank alone."""
        for number, block in enumerate(blocks(ids, BLOCK)):
            if not own or number % self.ranks.count == self.ranks.rank:
                yield number, self.source(side).views(recipe, block, epoch=epoch).to(self.device)

    def labeled(self, side: Split, part: Part) -> Labeled:
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
        sides: tuple[Split, ...] = ("train", "held_out")
        views = self.recipe(self.family(), self.family("raw", law=Center(), size_px=RAW_PX))
        encoded = {side: self._encoded(side, self.ids(side), wanted, views) for side in sides}
        classes = torch.cat([labels for labels, _ in encoded.values()]).unique()
        self._classes = classes[classes >= 0]
        for side, (labels, features) in encoded.items():
            has_label = labels >= 0
            ordinals = torch.searchsorted(self._classes, labels[has_label])
            for part in wanted:
                of_part = {column: values[has_label] for column, values in features[part].items()}
                self._parts[side, part] = Labeled(features=of_part, labels=ordinals, ids=self.ids(side)[has_label.cpu().numpy()])

    def labeled_elsewhere(self, name: str, part: Part, *, law: CropLaw = WHOLE) -> Labeled:
        """Return a part of the pictures that `others` have under a name, as `labeled` does; labels that neither side has are -1.

        Nothing is kept: whoever asks twice has them encoded twice.
        """
        self.labeled("train", part)  # by whose labels they are numbered
        with self.others[name]() as pictures:
            self._opened[name] = pictures
            try:
                ids = self.ids(name)
                views = self.recipe(self.family(law=law), self.family("raw", law=Center(), size_px=RAW_PX))
                labels, features = self._encoded(name, ids, (part,), views)
            finally:
                del self._opened[name]
        has_label = labels >= 0
        ordinals = torch.where(torch.isin(labels, self._classes), torch.searchsorted(self._classes, labels), -1)[has_label]
        of_part = {column: values[has_label] for column, values in features[part].items()}
        return Labeled(features=of_part, labels=ordinals, ids=ids[has_label.cpu().numpy()])

    def crops(self, part: Part, epoch: int) -> Mapping[str, Tensor]:
        """Return a part of random crops of the training pictures that have a label, in the order of `labeled`, by every network.

        RandomResizedCrop's law, at the side of whole pictures, mirrored in half of the cases: other views each epoch. Raw pixels are
        crops of their own, at 32 px. All is kept for whoever asks for the same, (N, D) float32 an epoch and column: of ImageNet and a
        ViT-S some 35 GB an epoch; `limit` takes fewer pictures.
        """
        if (part, epoch) not in self._crops:
            ids = self.labeled("train", part).ids
            sides_px = {"whole": None, "raw": RAW_PX}
            cut = [self.family(name, law=Independent(), size_px=px, mirror="view") for name, px in sides_px.items()]
            views = self.recipe(*(replace(family, min_side_px=1) for family in cut))
            _, features = self._encoded("train", ids, [part], views, epoch=epoch)
            self._crops[part, epoch] = features[part]
        return self._crops[part, epoch]

    def _encoded(
        self, side: str, ids: NDArray[np.int64], parts: Sequence[Part], views: ViewRecipe, *, epoch: int | None = None
    ) -> tuple[Tensor, dict[Part, dict[str, Tensor]]]:
        """Return the labels of pictures, (N,), -1 of none, and parts of them by column, (N, D), of all ranks.

        views: the families "whole", for the networks, and "raw", as it is.
        """
        wanted = [(column, part) for column, encoder in self.networks.items() for part in parts if part.fits(encoder)]
        deepest = max((part.layers for _, part in wanted), default=1)
        what = f"features: {side.replace('_', ' ')}" if epoch is None else f"features: crops, epoch {epoch}"
        done = itertools.count(1)

        def encode(block: NDArray[np.int64]) -> dict[tuple[str, Part | None], Tensor]:
            batch = self.source(side).views(views, block, epoch=epoch or 0).to(self.device)
            with torch.no_grad():
                layers = {column: last_layers(encoder, batch.family("whole"), deepest) for column, encoder in self.networks.items()}
            self.progress(what, min(len(ids), next(done) * self.ranks.count * BLOCK), len(ids))
            features: dict[tuple[str, Part | None], Tensor] = {(column, part): part.of(layers[column]) for column, part in wanted}
            return features | {(LABELS, None): batch.label, (RAW, None): batch.family("raw").pixels[:, 0].float().flatten(1)}

        found = {key: values.to(self.device) for key, values in encoded(ids, encode, self.ranks, batch=BLOCK).items()}
        pixels = found[RAW, None]
        features = {part: {column: found[column, own] for column, own in wanted if own == part} | {RAW: pixels} for part in parts}
        return found[LABELS, None], features

    def joined(self, own: Sequence[Tensor]) -> Tensor:
        """Return the rows of all blocks in their order, of which each rank has those that `batches` gives it as its own."""
        return self.ranks.in_turn(own).to(self.device)
