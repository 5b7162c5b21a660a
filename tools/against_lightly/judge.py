"""How good encoders are by the labels of one set of pictures, each picture judged by all the others.

Here: the protocol, the features of whole pictures, what a run wrote and how it started.
Not here: neighbors and ridge regression (train/evaluation/labels.py); training (own_loaders.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wherefrom.pipeline.laws import Center
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.labels import leave_one_out, ridge_probe
from wherefrom.train.evaluation.pictures import PictureSource, blocks, evaluation_mode
from wherefrom.train.objective import Step, random_scope
from wherefrom.train.pretrained import load_weights
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import TrainSettings, read_settings

PROTOCOL = "loo-knn20-cosine-t0.07 / ridge-5fold, center0.875 @1"
RAW_PX = 8
FOLDS = 5

Scores = dict[str, float]  # accuracies, by the part of the features and how they were asked: "class token knn"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JudgedFeatures:
    """Pictures that have a label, as features."""

    parts: Mapping[str, Tensor]  # (N, D) float32 each, by name
    labels: Tensor  # (N,) int64, from 0

    def scores(self) -> Scores:
        """Return the accuracies of every part, by neighbors and by ridge regression."""
        classes = int(self.labels.max()) + 1
        asked = {"knn": leave_one_out, "ridge": ridge_of_the_others}
        return {
            f"{part} {name}": float((predict(features, self.labels, classes=classes) == self.labels).double().mean())
            for part, features in self.parts.items()
            for name, predict in asked.items()
        }


def judge(encoder: Encoder, pictures: PictureSource, *, picture_px: int) -> Scores:
    """Return how many of the pictures get their label from the others, by class token (where there is one) and mean token.

    Pictures are cut to the center as Resize(256) and CenterCrop(224) do, at `picture_px`.
    Raises: ValueError if less than two pictures have a label.
    """

    def parts(batch: Batch) -> dict[str, Tensor]:
        features = encoder.encode(batch.family("center"))
        mean = {"mean token": features.tokens[:, 0].float().flatten(1, -2).mean(1)}
        if not encoder.has_class_token:
            return mean
        assert features.prefix is not None
        return {"class token": features.prefix[:, 0, 0].float()} | mean

    with evaluation_mode(encoder):
        return featured(pictures, (center(picture_px),), parts).scores()


def judge_pixels(pictures: PictureSource) -> Scores:
    """Return the same of the pictures themselves, 8 x 8 pixels large.

    Raises: as `judge`.
    """
    return featured(pictures, (center(RAW_PX),), lambda batch: {"pixels": batch.family("center").pixels.float().flatten(1)}).scores()


def center(picture_px: int, *, name: str = "center") -> ViewFamily:
    """Return whole pictures, as Resize(256) and CenterCrop(224) show them, at `picture_px`."""
    return ViewFamily(name=name, views=1, size_px=(picture_px, picture_px), law=Center(resize_px=256, crop_px=224))


def featured(pictures: PictureSource, families: tuple[ViewFamily, ...], parts: Callable[[Batch], Mapping[str, Tensor]]) -> JudgedFeatures:
    """Return the features that `parts` makes of these views of all pictures that have a label.

    Raises: ValueError if these are less than two.
    """
    recipe = ViewRecipe(families=families)
    features: dict[str, list[Tensor]] = {}
    labels = []
    for ids in blocks(np.arange(len(pictures)), 128):
        batch = pictures.views(recipe, ids)
        for part, value in parts(batch).items():
            features.setdefault(part, []).append(value.cpu())
        labels.append(batch.label.cpu())
    label = torch.cat(labels)
    has_label = label >= 0
    if int(has_label.sum()) < 2:
        raise ValueError(f"data: {int(has_label.sum())} of {len(label)} pictures have a label, two at least are needed; name others")
    _, ordinals = label[has_label].unique(return_inverse=True)
    return JudgedFeatures(parts={part: torch.cat(values)[has_label] for part, values in features.items()}, labels=ordinals)


def ridge_of_the_others(features: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Return the labels that ridge regression predicts of each fifth of the pictures, fitted to the other four.

    Shapes: features (N, D), labels (N,) int64 -> (N,) int64.
    """
    with random_scope("folds"):
        fold = torch.randperm(len(features)) % FOLDS
    predicted = torch.empty_like(labels)
    for number in range(FOLDS):
        held_out = fold == number
        predicted[held_out] = ridge_probe(features[~held_out], labels[~held_out], features[held_out], classes=classes)
    return predicted


def judge_run(run: Path, pictures: PictureSource) -> dict[str, Scores]:
    """Return the scores of what a run wrote, and of the random encoder that it started as.

    Raises: ValueError or OSError in one line if the folder holds no run that has come to its end; as `judge`.
    """
    settings = settings_of(run)
    with random_scope("weights follow"):
        trained = Encoder(replace(settings.model, weights=None, drop_path=0.0))
    load_weights(trained, str(run))
    encoders = {"encoder": trained, "random encoder": random_encoder(settings)}
    return {name: judge(encoder, pictures, picture_px=settings.label_picture_px) for name, encoder in encoders.items()}


def settings_of(run: Path) -> TrainSettings:
    """Return the settings that lie in a run's folder.

    Raises: OSError or ValueError in one line, if there are none.
    """
    return read_settings(RunFolder(run).settings, TrainSettings(recipe="the file's"))


def random_encoder(settings: TrainSettings) -> Encoder:
    """Return the encoder as a run by these settings starts, if not from weights: the host may have a say in it."""
    settings = replace(settings, model=replace(settings.model, weights=None))
    with random_scope(settings.seed, "encoder"):
        encoder = Encoder(settings.model)
    return Step(encoder, settings.make_objectives(), seed=settings.seed).encoder
