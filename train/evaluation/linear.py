"""Linear heads that learn from random crops of pictures on a frozen network, as DINO, MoCo v3, MAE and DINOv2 train theirs.

Here: the four protocols, the parts of the tokens that heads see, how heads learn.
Not here: crops and their features (features.py), logistic regression on whole pictures (logistic.py).
Common to all four: crops by RandomResizedCrop's law (area 0.08 to 1, aspect 3/4 to 4/3), mirrored in half of the cases; held-out pictures
as Resize(256) and CenterCrop(224) show them; both bilinear with antialias. Heads start from normal weights of 0.01 and biases of 0; they
learn by momentum 0.9 without weight decay, in float32, at rates that are those of a batch of 256, scaled to the batch, and end at 0.
Two things differ from what is published. Crops are drawn anew for `views` epochs alone, encoded once for all four, and passed in turn.
And of sets smaller than ImageNet the batch is at most the set, and there are `least_updates`, even if they take more than `epochs` passes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.features import RAW, SUMMARY, Evaluation, Part
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score, labeled_sides
from wherefrom.train.lars import LARS
from wherefrom.train.objective import random_scope

LAST = 4  # blocks whose class tokens heads may see
TOKENS = Part(token="class", layers=LAST, and_mean=True)
Kind = Literal["class", "mean", "class and mean", "classes", "classes and mean"]  # "classes": of the last four blocks
Pass = Sequence[tuple[Tensor, Tensor]]  # batches of features and labels


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDINO:
    """As DINO's eval_linear.py (dino commit 7c446df): SGD, rate 0.001, batch 1024, 100 epochs, the rate's cosine by epochs.

    Published of ViT-S: the class tokens of the last 4 blocks side by side; of ViT-B: the last class token and the mean token. Both stand
    here; of a network without class token, what it says itself.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = (TOKENS, SUMMARY)
    lr: float = 0.001
    batch: int = 1024
    epochs: int = 100
    least_updates: int = 2000
    views: int = 3

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 of both kinds of features."""
        training = HeadTraining(lr=(self.lr,), batch=self.batch, epochs=self.epochs, least_updates=self.least_updates)
        yield from _one_head_each(evaluation, training, ("classes", "class and mean"), views=self.views)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMoCoV3:
    """As MoCo v3's main_lincls.py (moco-v3 commit c349e6e): SGD, rate 3 for ViTs, 0.1 for others, batch 1024, 90 epochs, cosine by epochs.

    Published: the class token of a ViT, what a ResNet says itself. The mean token stands beside it.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = (TOKENS, SUMMARY)
    lr_vit: float = 3.0
    lr_other: float = 0.1
    batch: int = 1024
    epochs: int = 90
    least_updates: int = 1000
    views: int = 3

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 of both kinds of features."""
        lr = self.lr_vit if evaluation.network.encoder.settings.is_vit else self.lr_other
        training = HeadTraining(lr=(lr,), batch=self.batch, epochs=self.epochs, least_updates=self.least_updates)
        yield from _one_head_each(evaluation, training, ("class", "mean"), views=self.views)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMAE:
    """As MAE's main_linprobe.py (mae commit efb2a80): BatchNorm without affine before the head, LARS, rate 0.1, batch 16384, 90 epochs.

    The rate rises for 10 of the epochs, then follows the cosine, by updates. Published: the class token; the mean token stands beside it,
    behind the final LayerNorm (theirs has one of its own there). Their crops are cut to a picture's edges, ours drawn again, as torchvision
    does; theirs are bicubic.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = (TOKENS, SUMMARY)
    lr: float = 0.1
    batch: int = 16_384
    epochs: int = 90
    warmup_epochs: int = 10
    least_updates: int = 500
    views: int = 3

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 of both kinds of features."""
        training = HeadTraining(
            optimizer="lars",
            lr=(self.lr,),
            batch=self.batch,
            epochs=self.epochs,
            warmup_frac=self.warmup_epochs / self.epochs,
            least_updates=self.least_updates,
            by="update",
            whole_batches=True,
            normalize=True,
        )
        yield from _one_head_each(evaluation, training, ("class", "mean"), views=self.views)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDINOv2:
    """As DINOv2's eval/linear.py (dinov2 commit b8931f7): 13 rates by the last 1 or 4 blocks by with or without the mean token.

    All heads learn in one pass over the pictures: SGD, batch 1024, 10 epochs, the rate's cosine by updates. **The best head on the held-out
    pictures is reported**, as published: of many heads on few pictures that flatters, all columns alike. Published crops are bicubic.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = (TOKENS,)
    lr: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    batch: int = 1024
    epochs: int = 10
    least_updates: int = 500
    views: int = 3

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield the best top-1 of all heads, then of those of each kind of features."""
        if not evaluation.network.encoder.has_class_token:
            raise NotMeasuredError("the network has no class token")
        training = HeadTraining(
            lr=self.lr, batch=self.batch, epochs=self.epochs, least_updates=self.least_updates, by="update", whole_batches=True
        )
        kinds: tuple[Kind, ...] = ("class", "class and mean", "classes", "classes and mean")
        best: dict[str, float] = {}
        each = []
        for row, column, accuracies in _accuracies(evaluation, training, kinds, views=self.views):
            value = float(accuracies.max())
            best[column] = max(value, best.get(column, 0.0))
            each.append(Score(row=f"best rate, {row}", features=column, value=value))
        heads = len(kinds) * len(self.lr)
        yield from (Score(row=f"best of {heads} on these pictures", features=column, value=value) for column, value in best.items())
        yield from each


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTraining:
    """How linear heads on the same features learn."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    lr: tuple[float, ...]  # of each head, at a batch of 256; LARS: of one
    batch: int
    epochs: int
    least_updates: int = 0
    warmup_frac: float = 0.0  # of all updates
    by: Literal["epoch", "update"] = "epoch"  # when the rate changes
    whole_batches: bool = False  # whether the last pictures of a pass that fill no batch are left out
    normalize: bool = False  # by the batch, without affine, before the heads

    def passes(self, pictures: int) -> int:
        """Return how often heads see every picture."""
        batch = min(self.batch, pictures)
        updates = pictures // batch if self.whole_batches else math.ceil(pictures / batch)
        return max(self.epochs, math.ceil(self.least_updates / updates))

    def factor(self, done: float) -> float:
        """Return the part of the rate that is in force where so much of the training is done, 0 to 1."""
        if done < self.warmup_frac:
            return done / self.warmup_frac
        return (1 + math.cos(math.pi * (done - self.warmup_frac) / (1 - self.warmup_frac))) / 2


class LinearHeads(nn.Module):
    """Linear classifiers side by side, on the same features: (n, D) -> logits (n, heads, classes)."""

    def __init__(self, width: int, classes: int, *, heads: int = 1, normalize: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if normalize else nn.Identity()
        self.linear = nn.Linear(width, heads * classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.heads = heads

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.linear(self.norm(features)).unflatten(-1, (self.heads, -1))
        return logits


def train_heads(heads: LinearHeads, training: HeadTraining, passes: Iterable[Pass], *, number: int) -> Tensor:
    """Train heads on so many passes over pictures; return their mean cross-entropies before each update, (updates, heads).

    Raises: AssertionError if LARS is to train more than one head: what it divides by is the norm of all of them.
    """
    assert training.optimizer == "sgd" or heads.heads == 1
    rates = torch.tensor(training.lr, dtype=torch.float64)
    # a head's rate stands before its loss, relative to the highest: SGD takes the same steps, and one product computes all heads
    relative = (rates / rates.max()).to(heads.linear.weight)
    optimizer: torch.optim.Optimizer
    optimizer = LARS(heads.parameters()) if training.optimizer == "lars" else torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    heads.train()
    losses = []
    for seen, batches in enumerate(passes):
        batch = len(batches[0][1])
        for step, (features, labels) in enumerate(batches):
            done = (seen + (step / len(batches) if training.by == "update" else 0)) / number
            for group in optimizer.param_groups:
                group["lr"] = float(rates.max()) * batch / 256 * training.factor(done)
            each = F.cross_entropy(heads(features).movedim(1, -1), labels[:, None].expand(-1, heads.heads), reduction="none").mean(0)
            optimizer.zero_grad()
            (each * relative).sum().backward()
            optimizer.step()
            losses.append(each.detach())
    heads.eval()
    return torch.stack(losses)


def _passes(views: Sequence[Tensor], labels: Tensor, training: HeadTraining, number: int) -> Iterator[Pass]:
    """Yield so many passes over pictures in random order, of which each shows another of the views, (N, D) each, in turn."""
    batch = min(training.batch, len(labels))
    for seen in range(number):
        order = torch.randperm(len(labels)).to(labels.device)
        order = order[: len(order) // batch * batch] if training.whole_batches else order
        yield [(views[seen % len(views)][rows], labels[rows]) for rows in order.split(batch)]


def tokens_of(encoder: Encoder, kinds: Sequence[Kind]) -> tuple[Part, dict[str, slice]]:
    """Return the part of whole pictures that holds all that heads of a network may see, and by name which of its numbers a kind is."""
    if not encoder.has_class_token:
        return SUMMARY, {SUMMARY.name: slice(None)}
    layers, width = min(LAST, encoder.layers), encoder.width
    end = layers * width  # class tokens first, the mean token behind them
    known: Mapping[Kind, tuple[str, slice]] = {
        "class": ("class token", slice(end - width, end)),
        "mean": ("mean token", slice(end, None)),
        "class and mean": ("class token and mean token", slice(end - width, None)),
        "classes": (f"class token of {layers} layers", slice(end)),
        "classes and mean": (f"class token of {layers} layers and mean token", slice(None)),
    }
    return Part(token="class", layers=layers, and_mean=True), dict(known[kind] for kind in kinds)


def _one_head_each(evaluation: Evaluation, training: HeadTraining, kinds: Sequence[Kind], *, views: int) -> Iterator[Score]:
    for row, column, accuracies in _accuracies(evaluation, training, kinds, views=views):
        yield Score(row=row, features=column, value=float(accuracies[0]))


def _accuracies(evaluation: Evaluation, training: HeadTraining, kinds: Sequence[Kind], *, views: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the name of a kind of features, the column, and top-1 of its heads on the held-out pictures, (heads,)."""
    part, slices = tokens_of(evaluation.network.encoder, kinds)
    train, held_out = labeled_sides(evaluation, part)
    crops = [evaluation.crops(part, epoch) for epoch in range(views)]
    number, classes = training.passes(len(train.labels)), int(train.labels.max()) + 1
    for column in crops[0]:
        parts = {"": slice(None)} if column == RAW else slices  # pixels have no tokens: they are one part, which stands beside all
        for done, (name, chosen) in enumerate(parts.items()):
            evaluation.progress(f"linear heads: {column}", done, len(parts))
            with random_scope(evaluation.seed, "linear heads"):
                shown = [features[column][:, chosen].contiguous() for features in crops]
                heads = LinearHeads(shown[0].shape[1], classes, heads=len(training.lr), normalize=training.normalize).to(evaluation.device)
                train_heads(heads, training, _passes(shown, train.labels, training, number), number=number)
            with torch.no_grad():
                told = heads(held_out.features[column][:, chosen]).argmax(-1)
            accuracies = (told == held_out.labels[:, None]).double().mean(0)
            yield from ((row, column, accuracies) for row in ([name] if name else slices))
