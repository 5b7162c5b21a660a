"""Pictures whose color tells their class, a small network for them, and the protocols by labels at a size that takes a moment.

A module of its own, which processes that are ranks can import.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, Views
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation.features import Evaluation
from wherefrom.train.evaluation.knn import NearestNeighbors
from wherefrom.train.evaluation.linear import LinearDINO, LinearDINOv2, LinearMAE, LinearMoCoV3
from wherefrom.train.evaluation.logistic import FewShot, LogisticRegression
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.protocols import EvaluationProtocol, Measured, measure
from wherefrom.train.objective import random_scope
from wherefrom.train.ranks import Ranks

CLASSES, SIDE_PX = 4, 40
VIT = ModelSettings(view_size_px=12, patch_size_px=6, width=16, depth=2, heads=2)
RESNET = ModelSettings(name="test_resnet")
PROTOCOLS: Mapping[str, EvaluationProtocol] = {
    "knn": NearestNeighbors(k=(5, 20)),
    "logistic": LogisticRegression(c=(1.0, 100.0), iterations=20),
    "few-shot": FewShot(shares=(0.1,), draws=2, iterations=20),
    "linear-dino": LinearDINO(lr=0.1, epochs=2, least_updates=30, views=2),
    "linear-mocov3": LinearMoCoV3(epochs=2, least_updates=30, views=2),
    "linear-mae": LinearMAE(lr=10.0, least_updates=0, views=2),
    "linear-dinov2": LinearDINOv2(epochs=2, least_updates=30, views=2),
}


class ClassColors:
    """Pictures of one color each, that of their class and some of their own, with noise that each view draws anew."""

    def __init__(self, number: int, *, classes: int = CLASSES, permuted: bool = False) -> None:
        self.number = number
        self.label = np.arange(number) % classes if classes else np.full(number, -1)
        colors = np.random.default_rng(1).uniform(-1.5, 1.5, (max(1, classes), 3))[self.label % max(1, classes)]
        self.color = colors + np.random.default_rng(2).normal(0, 0.2, (number, 3))
        if permuted:
            self.label = np.random.default_rng(3).permutation(self.label)
        self.asked: list[tuple[int, int]] = []  # epochs, and how many pictures

    def __len__(self) -> int:
        return self.number

    def views(self, recipe: ViewRecipe, sample: NDArray[np.int64], drawn_for: NDArray[np.int64] | None = None, epoch: int = 0) -> Batch:
        self.asked.append((epoch, len(sample)))
        keys = sample if drawn_for is None else drawn_for
        size = np.full((len(sample), 2), SIDE_PX, np.int32)
        records = draw_records(recipe, seed=0, epoch=epoch, drawn_for=keys, source_size=size, sample=sample)
        color = torch.tensor(self.color[sample], dtype=torch.float32)[:, None, :, None, None]
        views = [
            Views(
                pixels=color + 0.1 * noise_of(record.geometry.boxes, family.size_px),
                geometry=record.geometry,
                valid=record.valid,
                photometric=Photometric.unchanged(len(sample), family.views),
            )
            for family, record in zip(recipe.families, records, strict=True)
        ]
        label = torch.tensor(self.label[sample])
        ids = torch.tensor(sample)
        return Batch(sample=ids, drawn_for=torch.tensor(keys), label=label, source_size=torch.tensor(size), views=tuple(views))

    def one_color_views(self, recipe: ViewRecipe, sample: NDArray[np.int64]) -> Batch:
        raise NotImplementedError


def noise_of(boxes: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Return numbers that follow from where views lie: boxes (B, V, 4) -> (B, V, 3, H, W)."""
    phase = (boxes.double() * torch.tensor([1.3, 2.9, 0.7, 3.1], dtype=torch.float64)).sum(-1)
    pattern = torch.arange(3 * size_px[0] * size_px[1], dtype=torch.float64).reshape(3, *size_px)
    return (phase[..., None, None, None] + 1.7 * pattern).sin().float()


def network(settings: ModelSettings = VIT) -> Network:
    with random_scope("the network of these tests"):
        encoder = Encoder(settings).requires_grad_(False).eval()
    return Network(encoder=encoder, name="random", picture_px=32 if settings is RESNET else 12, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def evaluation(train: ClassColors, held_out: ClassColors, settings: ModelSettings = VIT, **options: Any) -> Evaluation:
    return Evaluation(network(settings), train, held_out, **options)


def measured(of: Evaluation, *names: str) -> dict[str, Measured]:
    """Return what protocols found, all or some, without the seconds that it took."""
    protocols = {name: protocol for name, protocol in PROTOCOLS.items() if not names or name in names}
    return dict(zip(protocols, (replace(each, seconds=0.0) for each in measure(of, protocols)), strict=True))


def scores(of: Evaluation, *names: str) -> dict[str, float]:
    """Return all numbers by protocol, row and column."""
    return {f"{name}: {score.row}, {score.features}": score.value for name, found in measured(of, *names).items() for score in found.scores}


def be_an_evaluating_rank(threads: int, folder: Path, rank: int, port: str) -> None:
    """Be one of two ranks that evaluate, and write down what this one found, and how many pictures it looked at."""
    torch.set_num_threads(threads)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=4))
    train, held_out = ClassColors(150), ClassColors(60)
    found = scores(evaluation(train, held_out, ranks=Ranks(rank, 2)))
    looked = sum(number for _, number in train.asked + held_out.asked)
    (folder / f"rank.{rank}").write_text(json.dumps({"scores": found, "looked": looked}))
    torch.distributed.destroy_process_group()
