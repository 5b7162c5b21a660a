"""Pictures made of formulas, and a tiny random ViT: what protocols are tried on without a file and without a decoder."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, Views
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation.features import Evaluation
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.protocols import PROTOCOLS, Score, measure
from wherefrom.train.objective import random_scope

SIZE = (160, 200)  # (height, width) of every picture
CLASSES = 4


class FormulaPictures:
    """Pictures whose class gives them a color, which every picture varies; red grows to the right, green downwards.

    permuted: labels that belong to other pictures; first: the number of the first class; small: so many pictures, the first, of small_px.
    """

    def __init__(
        self, number: int, *, permuted: bool = False, first: int = 0, classes: int = CLASSES, small: int = 0, small_px: int = 40
    ) -> None:
        self.number = number
        self.sizes = np.tile(np.array([SIZE], np.int32), (number, 1))
        self.sizes[:small] = small_px
        shown = np.arange(number) % classes + first
        self.shown = shown
        self.labels = np.random.default_rng(1).permutation(shown) if permuted else shown

    def __len__(self) -> int:
        return self.number

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        keys = sample if drawn_for is None else drawn_for
        size = self.sizes[sample]
        records = draw_records(recipe, seed=0, epoch=epoch, drawn_for=keys, source_size=size, sample=sample)
        colors = np.random.default_rng(0).normal(0, 1.5, (16, 3))[self.shown[sample]]
        colors = colors + np.random.default_rng(2).normal(0, 0.2, (self.number, 3))[sample]
        families = []
        for family, record in zip(recipe.families, records, strict=True):
            height, width = family.size_px
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            places = map_points(record.geometry.view_to_source, torch.stack([x, y], -1).flatten(0, 1)) / torch.from_numpy(
                size[:, None, None, ::-1].copy()
            )
            pixels = torch.from_numpy(colors).float()[:, None, :, None, None].repeat(1, family.views, 1, height, width)
            pixels[:, :, :2] += places.float().mT.unflatten(-1, (height, width))
            photometric = Photometric.unchanged(len(sample), family.views)
            families.append(Views(pixels=pixels, geometry=record.geometry, valid=record.valid, photometric=photometric))
        ids = torch.from_numpy(sample)
        label = torch.from_numpy(self.labels[sample])
        return Batch(sample=ids, drawn_for=torch.from_numpy(keys), label=label, source_size=torch.from_numpy(size), views=tuple(families))

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        raise NotImplementedError


@cache
def tiny_network() -> Network:
    """A random ViT of 4 x 4 tokens."""
    with random_scope("tiny"):
        settings = ModelSettings(name="vit_tiny_patch16_224", view_size_px=32, patch_size_px=8, width=32, depth=1, heads=2)
        encoder = Encoder(settings).requires_grad_(False).eval()
    return Network(encoder=encoder, name="tiny", picture_px=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def small_evaluation(
    train: int = 128, held_out: int = 70, *, permuted: bool = False, others: Mapping[str, FormulaPictures] | None = None, **options: Any
) -> Evaluation:
    """An evaluation of the tiny network on so many pictures."""
    opened = {name: lambda pictures=pictures: nullcontext(pictures) for name, pictures in (others or {}).items()}
    sides = (FormulaPictures(number, permuted=permuted, **options) for number in (train, held_out))
    return Evaluation(tiny_network(), *sides, others=opened)  # type: ignore[arg-type]


def scores_of(evaluation: Evaluation, name: str, **choices: Any) -> dict[tuple[str, str], float]:
    """What a protocol measures, by row and column."""
    (measured,) = measure(evaluation, {name: PROTOCOLS[name](**choices)})
    assert not measured.not_measured, measured.not_measured
    return values_of(measured.scores)


def values_of(scores: tuple[Score, ...]) -> dict[tuple[str, str], float]:
    """Scores by row and column, each of which there is once."""
    values = {(score.row, score.features): score.value for score in scores}
    assert len(values) == len(scores)
    return values
