"""Linear maps in closed form, from sums of products alone: as many features as there are, in the memory of D x D numbers.

Here: the sums, ridge regression from them, its R2 on other sums, a linear classifier.
Not here: what is predicted (positions.py, other_pictures.py).
Convention: sums are (D + C + 1)^2 float64, of rows [x, y, 1]: features, targets, and a one for what a map adds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.train.evaluation.labels import RIDGE
from wherefrom.train.objective import random_scope

ROWS = 4096  # that are multiplied at once


def sums_of_products(features: Tensor, targets: Tensor) -> Tensor:
    """Return the sums over rows of [x, y, 1]' [x, y, 1]: features (N, D), targets (N, C) -> (D + C + 1, D + C + 1) float64."""
    total = features.new_zeros(features.shape[1] + targets.shape[1] + 1, dtype=torch.float64).diag()
    for x, y in zip(features.split(ROWS), targets.split(ROWS), strict=True):
        rows = torch.cat([x.double(), y.double(), x.new_ones(len(x), 1, dtype=torch.float64)], 1)
        total += rows.mT @ rows
    return total


def ridge(sums: Tensor, targets: int, penalty: float) -> Tensor:
    """Return the minimizer of |x W + c - y|^2 / N + penalty v |W|^2, (D + 1, C) with c last; v is the mean variance of a feature.

    targets: C. Features that do not vary at all get a map of 0.
    """
    width, number = len(sums) - targets - 1, sums[-1, -1]
    mean = sums[-1] / number
    covariance = sums / number - mean.outer(mean)
    of_features = covariance[:width, :width]
    variance = of_features.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.linalg.solve(of_features + penalty * variance * torch.eye(width).to(sums), covariance[:width, width:-1])
    return torch.cat([weights, (mean[width:-1] - mean[:width] @ weights).unsqueeze(0)])


def r2_of_map(sums: Tensor, weights: Tensor) -> Tensor:
    """Return 1 - squared error / variance of every target, (C,), of a map (D + 1, C) on the rows that the sums are of."""
    targets = weights.shape[1]
    error = torch.cat([-weights[:-1], torch.eye(targets).to(weights), -weights[-1:]])  # rows @ error = y - x W - c
    of_targets = slice(len(sums) - targets - 1, -1)
    spread = sums.diagonal()[of_targets] - sums[-1, of_targets].square() / sums[-1, -1]
    return 1 - (error * (sums @ error)).sum(0) / spread


def linear_classifier(features: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Return the map from features to a score of every class, (D + 1, classes) float64 with what is added last.

    Source: one-vs-rest ridge regression, as `ridge_probe`, but that no feature is divided by its deviation; the penalty is the one of
    RIDGE that does best on a fifth of the pictures when fitted to the others.
    Shapes: features (N, D), labels (N,) int64.
    """
    targets = F.one_hot(labels, classes)
    with random_scope("ridge"):
        fifth = (torch.randperm(len(features)) % 5 == 0).to(features.device)
    rest, held_back = (sums_of_products(features[which], targets[which]) for which in (~fifth, fifth))
    candidates = [ridge(rest, classes, penalty) for penalty in RIDGE]
    correct = [(scores(features[fifth], weights).argmax(-1) == labels[fifth]).sum() for weights in candidates]
    return ridge(rest + held_back, classes, RIDGE[int(torch.stack(correct).argmax())])


def scores(features: Tensor, weights: Tensor) -> Tensor:
    """Return what a map makes of features: (N, D) and (D + 1, C) -> (N, C) float64."""
    return features.double() @ weights[:-1] + weights[-1]
