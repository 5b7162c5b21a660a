"""How recognition holds when patches are taken out of pictures: at random, the salient ones first, or the others first.

Here: the protocol, which patches are dropped, what a network sees of the others.
Not here: pictures that somebody else corrupted (corruptions.py).
Source: PatchDrop of "Intriguing Properties of Vision Transformers", arXiv 2105.10497: 10 to 90 % of the patches, in whole patches rounded
down. There dropped patches are black and the salient ones are those that a DINO ViT-S attends to; here a ViT does not get them at all, and
salience is the network's own, see `salience`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.views import Views
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.features import BLOCK, ENCODER, RAW, SUMMARY, Evaluation, Labeled, Part
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.labels import RAW_PX, vote
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score, check_part
from wherefrom.train.objective import random_scope

ORDERS = ("random", "salient first", "non-salient first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Occlusion:
    """Whole pictures (Resize(256), CenterCrop(224)): k-NN of what is left of held-out ones among whole training pictures.

    All columns miss the same patches; those are salient that the encoder's own summary is most like. A convolutional network sees the
    cells of its feature map black, and so do raw pixels, of 32 px.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    part: Part = SUMMARY
    percent: tuple[int, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90)  # of the patches, dropped
    pictures: int = 500  # held out, at most
    k: int = 20
    temperature: float = 0.07

    @property
    def parts(self) -> tuple[Part, ...]:
        """The part that it measures."""
        return (self.part,)

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 with nothing dropped, and of every order with every share of patches dropped, then the mean of these."""
        check_part(evaluation, self.part)
        train, held_out = (evaluation.labeled(side, self.part) for side in ("train", "held_out"))
        if not len(train.labels) or not len(held_out.labels):
            raise NotMeasuredError("the pictures have no labels")
        banks = {column: train.features[column] for column in evaluation.networks} | {RAW: self._raw_bank(evaluation, train)}
        told = self._answers(evaluation, held_out, banks, train.labels)
        labels = held_out.labels[: self.pictures]
        right = {key: float((answers == labels).double().mean()) for key, answers in told.items()}
        for column in banks:
            yield Score(row="nothing dropped", features=column, value=right["random", 0, column])
        for order in ORDERS:
            for percent in self.percent:
                for column in banks:
                    yield Score(row=f"{order}, {percent} %", features=column, value=right[order, percent, column])
            for column in banks:
                mean = math.fsum(right[order, percent, column] for percent in self.percent) / len(self.percent)
                yield Score(row=f"{order}, mean", features=column, value=mean)

    def _raw_bank(self, evaluation: Evaluation, train: Labeled) -> Tensor:
        """Return the pixels of training pictures as the network sees them whole, (N, 3 * 32 * 32)."""
        recipe = evaluation.recipe(evaluation.family())
        batches = evaluation.batches("train", recipe, train.ids, own=True)
        return evaluation.joined([_raw(batch.family("whole").pixels[:, 0]) for _, batch in batches])

    def _answers(
        self, evaluation: Evaluation, held_out: Labeled, banks: dict[str, Tensor], labels: Tensor
    ) -> dict[tuple[str, int, str], Tensor]:
        """Return the label told of every held-out picture, (M,), by order, percent and column."""
        ids = held_out.ids[: self.pictures]
        orders = dict.fromkeys([("random", 0), *((order, percent) for order in ORDERS for percent in self.percent)])
        told: dict[tuple[str, int, str], list[Tensor]] = {(*which, column): [] for which in orders for column in banks}
        recipe = evaluation.recipe(evaluation.family())
        for number, batch in evaluation.batches("held_out", recipe, ids, own=True):
            views = batch.family("whole")
            with torch.no_grad():
                whole = evaluation.networks[ENCODER].encode(views)
            grid = (whole.tokens.shape[2], whole.tokens.shape[3])
            first = _first_dropped(salience(whole.tokens[:, 0].flatten(1, 2), whole.summary[:, 0]), evaluation.seed, number)
            for order, percent in orders:
                kept = first[order][:, grid[0] * grid[1] * percent // 100 :].sort(dim=1).values
                for column, queries in self._features(evaluation, views, kept, grid).items():
                    similarity, nearest = neighbors(banks[column], queries, k=self.k)
                    told[order, percent, column].append(vote(similarity, labels[nearest], temperature=self.temperature))
            evaluation.progress("occlusion", min(len(ids), (number + 1) * BLOCK), len(ids))
        return {key: evaluation.joined(answers) for key, answers in told.items()}

    def _features(self, evaluation: Evaluation, views: Views, kept: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Return what is made of the patches that are kept (B, k), (B, D) each, by column."""
        black = [-mean / std for mean, std in zip(evaluation.network.mean, evaluation.network.std, strict=True)]
        pixels = blackened(views.pixels, kept, grid, black)
        features = {column: self._of(encoder, views, kept, pixels) for column, encoder in evaluation.networks.items()}
        return features | {RAW: _raw(pixels[:, 0])}

    def _of(self, encoder: Encoder, views: Views, kept: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            features = encoder.encode(views, keep=kept.unsqueeze(1)) if encoder.settings.is_vit else encoder.encode(pixels)
        values = self.part.of([features])
        return values


def _first_dropped(salience: Tensor, seed: int, block: int) -> dict[str, Tensor]:
    """Return the patches of each picture in the order in which they are dropped, (B, N) int64, by the name of the order."""
    with random_scope(seed, "occlusion", block):
        drawn = torch.rand(salience.shape).argsort(dim=1).to(salience.device)
    salient = salience.argsort(dim=1, descending=True, stable=True)
    return dict(zip(ORDERS, (drawn, salient, salient.flip(1)), strict=True))


def salience(tokens: Tensor, summary: Tensor) -> Tensor:
    """Return the cosine of each token of a picture to what the network says of the whole: no gradient, and no attention, is asked for.

    Shapes: tokens (B, N, D), summary (B, D) -> (B, N).
    """
    return (F.normalize(tokens.float(), dim=-1) @ F.normalize(summary.float(), dim=-1).unsqueeze(-1))[..., 0]


def blackened(pixels: Tensor, kept: Tensor, grid: tuple[int, int], black: list[float]) -> Tensor:
    """Return views black but for the cells that are kept.

    Shapes: pixels (B, 1, 3, H, W), kept (B, k) int64, row * cols + col of grid (rows, cols), black: its value in each channel.
    """
    seen = torch.zeros(len(kept), grid[0] * grid[1], device=pixels.device).scatter_(1, kept, 1.0)
    cells = F.interpolate(seen.view(len(kept), 1, *grid), size=pixels.shape[-2:], mode="nearest").bool().unsqueeze(1)
    return torch.where(cells, pixels, torch.tensor(black, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1))


def _raw(pixels: Tensor) -> Tensor:
    """Return views as raw pixels: (B, 3, H, W) -> (B, 3 * 32 * 32)."""
    return F.adaptive_avg_pool2d(pixels.float(), RAW_PX).flatten(1)
