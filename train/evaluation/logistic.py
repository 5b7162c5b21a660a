"""Logistic regression on frozen features of whole pictures: on all training pictures, and on a few of each class.

Here: both protocols, and the regression, by L-BFGS in float64.
Not here: heads that learn from random crops (linear.py), ridge regression (labels.py).
Sources: DINOv2's eval/log_regression.py (dinov2 commit b8931f7) and MSN's logistic_eval.py (msn commit 5474d5f).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.train.evaluation.features import Evaluation, Part
from wherefrom.train.evaluation.protocols import Need, Score, labeled_sides
from wherefrom.train.objective import random_scope

PARTS = (Part(token="class"), Part(token="mean"))
LOGITS = 1 << 25  # that are computed at once, 256 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticRegression:
    """Whole pictures as Resize(256) and CenterCrop(224) show them (bilinear with antialias); features of unit length, with a bias.

    C, scikit-learn's, is the one that does best on a tenth of the training pictures, drawn from the seed, when fitted to the others; of
    equals, the smallest. The regression is then fitted to all of them.
    Fewer than in DINOv2's code: 12 values of C, not 45, and iterations, at most 200, not 1000: what lies between is noise here.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = PARTS
    c: tuple[float, ...] = tuple(10.0**power for power in range(-6, 6))
    iterations: int = 200

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 of every part."""
        for part in (part for part in self.parts if part.fits(evaluation.network.encoder)):
            train, held_out = labeled_sides(evaluation, part)
            with random_scope(evaluation.seed, "logistic"):
                tenth = (torch.randperm(len(train.labels)) < (len(train.labels) + 9) // 10).to(evaluation.device)
            classes = int(train.labels.max()) + 1
            for done, (column, features) in enumerate(train.features.items()):
                evaluation.progress(f"logistic: {part.name}", done, len(train.features))
                unit = F.normalize(features.double(), dim=-1)
                fits = regressions(unit[~tenth], train.labels[~tenth], self.c, classes=classes, iterations=self.iterations)
                right = [accuracy(weights, unit[tenth], train.labels[tenth]) for weights in fits]
                best = self.c[max(range(len(right)), key=right.__getitem__)]
                (weights,) = regressions(unit, train.labels, (best,), classes=classes, iterations=self.iterations)
                value = accuracy(weights, F.normalize(held_out.features[column].double(), dim=-1), held_out.labels)
                yield Score(row=part.name, features=column, value=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShot:
    """The same pictures and features, of few training pictures: as many of each class, drawn from the seed, several times.

    Of a share of the training pictures every class gets an equal part, rounded, and at least one; one that has fewer gives all it has.
    C is fixed, for there are no pictures to choose it by: as MSN's penalty of 0.00025 divided by the number of pictures has it.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = PARTS
    shares: tuple[float, ...] = (0.01, 0.1)
    draws: int = 5
    c: float = 4000.0
    iterations: int = 200

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield the mean of top-1 over the draws, of every share and part, and its standard deviation between them."""
        for part in (part for part in self.parts if part.fits(evaluation.network.encoder)):
            train, held_out = labeled_sides(evaluation, part)
            classes = int(train.labels.max()) + 1
            for share in self.shares:
                with random_scope(evaluation.seed, "few-shot", str(share)):
                    draws = [balanced_draw(train.labels, share) for _ in range(self.draws)]
                for column, features in train.features.items():
                    unit, held_out_unit = (F.normalize(each.double(), dim=-1) for each in (features, held_out.features[column]))
                    right = []
                    for done, rows in enumerate(draws):
                        evaluation.progress(f"few-shot: {share:.0%} {part.name}, {column}", done, len(draws))
                        fits = regressions(unit[rows], train.labels[rows], (self.c,), classes=classes, iterations=self.iterations)
                        right.append(accuracy(fits[0], held_out_unit, held_out.labels))
                    values = torch.tensor(right, dtype=torch.float64)
                    row = f"{share:.0%} ({len(draws[0])} pictures), {part.name}"
                    yield Score(row=row, features=column, value=float(values.mean()))
                    if self.draws > 1:
                        yield Score(row=f"{row}: deviation", features=column, value=float(values.std()), better="neither")


def balanced_draw(labels: Tensor, share: float) -> Tensor:
    """Return the rows of a share of pictures, equally many of each class, drawn by torch's generator of the processor.

    Shapes: labels (N,) int64 -> (n,) int64. Each class gives share N / classes, rounded, at least one, at most all it has.
    """
    labels_here = labels.cpu()
    classes = labels_here.unique()
    each = max(1, round(share * len(labels_here) / len(classes)))
    shuffled = torch.randperm(len(labels_here))
    rows = [shuffled[labels_here[shuffled] == label][:each] for label in classes]
    return torch.cat(rows).to(labels.device)


def regressions(
    features: Tensor, labels: Tensor, c: Sequence[float], *, classes: int, iterations: int, tolerance: float = 1e-4
) -> list[Tensor]:
    """Return the minimizers of c * sum of cross-entropies + |W|^2 / 2, one a penalty, as (D + 1, classes), the bias last, float64.

    As scikit-learn's LogisticRegression has it of three classes or more (of two as well, by softmax): the bias is not penalized.
    L-BFGS, ten corrections, strong Wolfe; it ends where no entry of the gradient, divided by c N, exceeds `tolerance`. Each c starts from
    the solution of the one before, the first from 0: name them in ascending order. Sums run over blocks of rows that LOGITS bounds.
    Shapes: features (N, D) float64, labels (N,) int64.
    """
    solutions: list[Tensor] = []
    rows = max(1, LOGITS // classes)
    weights = features.new_zeros(features.shape[1] + 1, classes)
    for strength in c:
        weights = weights.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=iterations,
            max_eval=2 * iterations,
            tolerance_grad=tolerance,
            tolerance_change=1e-15,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def loss(strength: float = strength, weights: Tensor = weights, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            penalty = weights[:-1].square().sum() / (2 * strength * len(labels))
            penalty.backward()
            value = penalty.detach()
            for some, truth in zip(features.split(rows), labels.split(rows), strict=True):
                of_some = F.cross_entropy(predicted(weights, some), truth) * (len(truth) / len(labels))
                of_some.backward()
                value = value + of_some.detach()
            return value

        optimizer.step(loss)
        weights = weights.detach()
        solutions.append(weights)
    return solutions


def predicted(weights: Tensor, features: Tensor) -> Tensor:
    """Return logits: weights (D + 1, C) with the bias last, features (N, D) -> (N, C)."""
    return features @ weights[:-1] + weights[-1]


def accuracy(weights: Tensor, features: Tensor, labels: Tensor) -> float:
    """Return how often the largest logit is that of the label."""
    told = [predicted(weights, some).argmax(-1) for some in features.split(max(1, LOGITS // weights.shape[1]))]
    return float((torch.cat(told) == labels).double().mean())
