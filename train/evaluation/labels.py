"""How good an encoder is by labels: neighbors and a linear probe, each beside what needs no learning.

Here: which pictures evaluations draw, protocols by name and version, the report as plain data and as tables.
Not here: where pictures come from (pictures.py), pair geometry (pairs.py), when to evaluate (loop.py). Nothing here changes a weight.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.laws import Center, Grid
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.network import random_network
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table, encoded, evaluation_mode
from wherefrom.train.objective import random_scope
from wherefrom.train.ranks import Ranks

GRID = Grid(rows=3, cols=3, side_frac=0.4)
RAW_PX = 32
NEIGHBORS, TEMPERATURE = 20, 0.07
KNN_PROTOCOL = "knn20-cosine-t0.07-grid3x3w0.4-mean-tokens@2"
PROBE_PROTOCOL = "ridge-grid3x3w0.4-mean-tokens@2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What is asked of which part of the features."""

    name: str  # for curves and tables
    part: str
    probe: bool  # a linear one; else neighbors vote


PROTOCOLS = {  # by name and version; those of local views first
    KNN_PROTOCOL: Protocol(name="k-NN", part="grid", probe=False),
    PROBE_PROTOCOL: Protocol(name="linear probe", part="grid", probe=True),
    "knn20-cosine-t0.07-center0.875-class-token@1": Protocol(name="class token: k-NN", part="class token", probe=False),
    "ridge-center0.875-class-token@1": Protocol(name="class token: linear probe", part="class token", probe=True),
    "knn20-cosine-t0.07-center0.875-mean-token@1": Protocol(name="mean token: k-NN", part="mean token", probe=False),
    "ridge-center0.875-mean-token@1": Protocol(name="mean token: linear probe", part="mean token", probe=True),
}
DRAW_SEED = int.from_bytes(b"evaluate")  # a number that no run takes for its own order
RIDGE = tuple(10.0**power for power in range(-4, 3))  # times the number of samples


def draw_ids(pictures: PictureSource, number: int | None) -> NDArray[np.int64]:
    """Return the ids of `number` pictures, the first of a permutation that only the size of the set decides; None: of all.

    So every run on the same data is evaluated on the same pictures, and fewer are the first of more. Never a stride: classes come sorted
    in some sets and in turn in others, where a stride meets a part of them.
    """
    total = len(pictures)
    number = total if number is None else min(number, total)
    return Order(samples=total, global_batch=1, seed=DRAW_SEED).ids(0, np.arange(number))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
    """Accuracy of one kind of features by one protocol."""

    protocol: str
    features: str
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelReport:
    """Accuracies by labels, by protocol: the encoder, and two floors beside it."""

    train: int
    held_out: int
    classes: int  # different labels among them all
    missing: int  # of them: shown by held-out pictures, by no training picture
    ceiling: float  # the accuracy that missing classes leave possible
    scores: tuple[LabelScore, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """Return how many pictures there were, the accuracies with their heading first, and notes: rows of text within 80 columns."""
        names = tuple(dict.fromkeys(score.features for score in self.scores))
        protocols = tuple(dict.fromkeys(score.protocol for score in self.scores))
        scores = {(score.protocol, score.features): f"{score.accuracy:.3f}" for score in self.scores}
        rows = [(PROTOCOLS[protocol].name, *(scores.get((protocol, name), "-") for name in names)) for protocol in protocols]
        notes = [(f"{PROTOCOLS[protocol].name}: {protocol}",) for protocol in protocols]
        if self.missing:
            notes.append((f"classes without a training picture here: {self.missing}; at most {self.ceiling:.3f} can be right",))
        numbers = f"labels: {self.train} training, {self.held_out} held-out pictures, {self.classes} classes"
        return ((numbers,),), (("accuracy", *names), *rows), tuple(notes)

    def accuracy(self, protocol: str, features: str = "encoder") -> float:
        """Return one score."""
        return next(score.accuracy for score in self.scores if (score.protocol, score.features) == (protocol, features))


def evaluate_labels(
    encoder: Encoder,
    train: PictureSource,
    held_out: PictureSource,
    *,
    view_px: int,
    picture_px: int | None = None,
    limit: int | None = None,
    held_out_limit: int | None = None,
    probe: bool = True,
    seed: int = 0,
    progress: ReportProgress | None = None,
    ranks: Ranks | None = None,
) -> LabelReport | None:
    """Evaluate features by labels; None where the pictures have none.

    Features are the mean tokens of 3 x 3 local views (0.4 of each side, `view_px`), side by side; and of whole pictures, cut to the center
    as Resize(256) and CenterCrop(224) do, at `picture_px` (None: not of these), the class token, where there is one, and the mean token.
    Beside the encoder stand raw pixels, of the whole picture at 32 px, and a random encoder of the same architecture.
    limits: how many pictures, drawn by `draw_ids`; without `probe`, k-NN alone. ranks: all of them call, and share the pictures.
    """
    encoders = {"encoder": encoder, "random encoder": random_network(encoder, seed)}
    sides, ranks = (view_px, picture_px), ranks or Ranks(0, 1)
    held_out_set = _encode_labeled(encoders, held_out, sides, held_out_limit, "features for labels: held out", progress, ranks)
    if not len(held_out_set.labels):
        return None
    train_set = _encode_labeled(encoders, train, sides, limit, "features for labels: train", progress, ranks)
    if not len(train_set.labels):
        return None
    parts = {part for part, _ in train_set.features}
    protocols = [name for name, protocol in PROTOCOLS.items() if protocol.part in parts and (probe or not protocol.probe)]
    return _label_report(train_set, held_out_set, protocols)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _LabeledFeatures:
    """Pictures that have a label, as every kind of features."""

    features: dict[tuple[str, str], Tensor]  # (N, D) each, by the part of a protocol and what made it
    labels: Tensor  # (N,) int64


def _encode_labeled(
    encoders: Mapping[str, Encoder],
    pictures: PictureSource,
    sides_px: tuple[int, int | None],
    limit: int | None,
    what: str,
    progress: ReportProgress | None,
    ranks: Ranks,
) -> _LabeledFeatures:
    """Encode the pictures, as local views and as whole ones of these sides, and leave out those without a label."""
    view_px, picture_px = sides_px
    families = [
        ViewFamily(name="grid", views=GRID.rows * GRID.cols, size_px=(view_px, view_px), law=GRID),
        ViewFamily(name="whole", views=1, size_px=(RAW_PX, RAW_PX), law=Center()),
    ]
    if picture_px is not None:
        families.append(ViewFamily(name="center", views=1, size_px=(picture_px, picture_px), law=Center(resize_px=256, crop_px=224)))
    recipe = ViewRecipe(families=tuple(families))
    all_ids = draw_ids(pictures, limit)
    done = itertools.count(1)

    def encode(ids: NDArray[np.int64]) -> dict[tuple[str, str] | None, Tensor]:
        batch = pictures.views(recipe, ids)
        found: dict[tuple[str, str] | None, Tensor] = {None: batch.label}
        for name, encoder in encoders.items():
            found |= {(part, name): value for part, value in _parts(encoder, batch, whole=picture_px is not None).items()}
        found["grid", "raw pixels"] = batch.family("whole").pixels.float().flatten(1)
        if progress is not None:
            progress(what, min(next(done) * len(ids) * ranks.count, len(all_ids)), len(all_ids))
        return found

    with evaluation_mode(*encoders.values()):
        features = encoded(all_ids, encode, ranks)
    labels = features.pop(None)
    return _LabeledFeatures(
        features={key: values[labels >= 0] for key, values in features.items() if key is not None}, labels=labels[labels >= 0]
    )


def _parts(encoder: Encoder, batch: Batch, *, whole: bool) -> dict[str, Tensor]:
    """Return what protocols take of a batch, (B, D) each, by part."""
    parts = {"grid": encoder.encode(batch.family("grid")).tokens.float().flatten(2, -2).mean(2).flatten(1)}
    if whole:
        features = encoder.encode(batch.family("center"))
        if encoder.has_class_token:
            assert features.prefix is not None
            parts["class token"] = features.prefix[:, 0, 0].float()
        parts["mean token"] = features.tokens[:, 0].float().flatten(1, -2).mean(1)
    return parts


def _label_report(train: _LabeledFeatures, held_out: _LabeledFeatures, protocols: Sequence[str]) -> LabelReport:
    """Return the accuracy of every kind of features by every protocol."""
    classes, ordinals = torch.cat([train.labels, held_out.labels]).unique(return_inverse=True)  # labels need not be 0, 1, 2, ...
    train_labels, held_out_labels = ordinals.split([len(train.labels), len(held_out.labels)])
    answerable = torch.isin(held_out_labels, train_labels)
    scores = []
    for protocol in protocols:
        predict = ridge_probe if PROTOCOLS[protocol].probe else nearest_neighbors
        for (part, name), features in train.features.items():
            if part == PROTOCOLS[protocol].part:
                predicted = predict(features, train_labels, held_out.features[part, name], classes=len(classes))
                scores.append(LabelScore(protocol=protocol, features=name, accuracy=float((predicted == held_out_labels).double().mean())))
    return LabelReport(
        train=len(train_labels),
        held_out=len(held_out_labels),
        classes=len(classes),
        missing=len(held_out_labels[~answerable].unique()),
        ceiling=float(answerable.double().mean()),
        scores=tuple(scores),
    )


def nearest_neighbors(
    train: Tensor, train_labels: Tensor, held_out: Tensor, *, classes: int, k: int = NEIGHBORS, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the label that the k most similar training features vote for, each with weight exp(cosine / temperature).

    Shapes: train (N, D), train_labels (N,) int64, held_out (M, D) -> (M,) int64.
    Source: DINO's protocol, arXiv 2104.14294; features as they are, not centered.
    """
    bank = F.normalize(train, dim=-1)
    blocks = F.normalize(held_out, dim=-1).split(1024)
    return torch.cat([_voted(block @ bank.mT, train_labels, classes=classes, k=k, temperature=temperature) for block in blocks])


def leave_one_out(features: Tensor, labels: Tensor, *, classes: int, k: int = NEIGHBORS, temperature: float = TEMPERATURE) -> Tensor:
    """Return the label that the k most similar other pictures vote for, as `nearest_neighbors` does: of a set that has no other beside it.

    Shapes: features (N, D), labels (N,) int64 -> (N,) int64.
    """
    bank = F.normalize(features, dim=-1)
    predicted = []
    for rows in torch.arange(len(bank), device=bank.device).split(1024):
        similarity = bank[rows] @ bank.mT
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # no picture votes for itself: its weight is 0 even if it is among the k
        predicted.append(_voted(similarity, labels, classes=classes, k=k, temperature=temperature))
    return torch.cat(predicted)


def _voted(similarity: Tensor, labels: Tensor, *, classes: int, k: int, temperature: float) -> Tensor:
    """Return the labels with the most weight among the k most similar: similarity (M, N), labels (N,) -> (M,)."""
    most, nearest = similarity.topk(min(k, similarity.shape[1]), dim=-1)
    return vote(most, labels[nearest], classes=classes, temperature=temperature)


def vote(similarity: Tensor, labels: Tensor, *, temperature: float, classes: int | None = None) -> Tensor:
    """Return the label that gets the most weight, exp(cosine / temperature) a neighbor; of equals, the lowest.

    Shapes: similarity and labels (M, k) -> (M,) int64. classes: more than any label, by default one more than the highest.
    """
    weight = (similarity / temperature).exp()
    votes = weight.new_zeros(len(labels), int(labels.max()) + 1 if classes is None else classes)
    return votes.scatter_add_(1, labels, weight).argmax(-1)


def ridge_probe(train: Tensor, train_labels: Tensor, held_out: Tensor, *, classes: int) -> Tensor:
    """Return the labels that a linear map predicts: one-vs-rest ridge regression on standardized features, in closed form, float64.

    The penalty is the one of RIDGE that does best on a fifth of the training pictures when fitted to the others.
    Shapes: train (N, D), train_labels (N,) int64, held_out (M, D) -> (M,) int64.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    train, held_out = (train.double() - mean) / std, (held_out.double() - mean) / std
    targets = F.one_hot(train_labels, classes).double()
    with random_scope("ridge"):  # drawn: classes may come in turn, so that every fifth picture is of the same
        fifth = (torch.randperm(len(train)) % 5 == 0).to(train.device)
    candidates = ridge_weights(train[~fifth], targets[~fifth], RIDGE)
    correct = [(_affine(train[fifth], weights).argmax(-1) == train_labels[fifth]).sum() for weights in candidates]
    best = RIDGE[int(torch.stack(correct).argmax())]
    return _affine(held_out, ridge_weights(train, targets, (best,))[0]).argmax(-1)


def ridge_weights(features: Tensor, targets: Tensor, penalties: tuple[float, ...]) -> list[Tensor]:
    """Return the minimizers of |x W + c - y|^2 / N + penalty |W|^2, one a penalty, as (D + 1, C) with c last.

    Shapes: features (N, D), targets (N, C), float64.
    """
    mean, target_mean = features.mean(0), targets.mean(0)
    centered = features - mean
    dual = len(features) < features.shape[1]  # (X'X + p)^-1 X'y = X'(XX' + p)^-1 y: the smaller matrix is taken apart
    values, vectors = torch.linalg.eigh((centered @ centered.mT if dual else centered.mT @ centered) / len(features))
    right_side = (targets - target_mean if dual else centered.mT @ (targets - target_mean)) / len(features)
    solutions = (vectors @ (vectors.mT @ right_side / (values.clamp(min=0) + penalty).unsqueeze(-1)) for penalty in penalties)
    maps = (centered.mT @ solution if dual else solution for solution in solutions)
    return [torch.cat([weights, (target_mean - mean @ weights).unsqueeze(0)]) for weights in maps]


def _affine(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:-1] + weights[-1]
