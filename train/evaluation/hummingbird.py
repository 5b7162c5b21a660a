"""Retrieval of patch labels: what the training patches most like a patch show tells what it shows. Nothing is learned.

Here: the protocol, which patches are kept in memory, how neighbors' labels become the patch's.
Not here: the search (knn.py), tokens and masks (dense.py).
Source: Hummingbird, arXiv 2306.01667, as open-hummingbird-eval 2.0.0 (commit 5e79da2) computes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.laws import Center, Independent
from wherefrom.train.evaluation.dense import (
    confusion,
    dense_blocks,
    dense_ids,
    masked,
    mean_iou,
    of_all_ranks,
    patch_labels,
)
from wherefrom.train.evaluation.dense_pictures import IGNORED, MaskedPictures
from wherefrom.train.evaluation.features import RAW, Evaluation, Part
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score
from wherefrom.train.objective import random_scope

QUERIES = 4096
ENLARGED = 4  # pictures whose numbers are enlarged at once: of 150 classes and 448 px, 0.5 GB
UNSHOWN = 1e6  # the score of patches that show nothing known: they come last


@dataclass(frozen=True, kw_only=True, slots=True)
class Hummingbird:
    """Whole held-out pictures, squashed to a square; the last layer's tokens; k 30 by cosine, softmax at 0.02 of the cosines.

    A memory holds equally many patches a training view, those first whose classes few patches of the view show, times a random number in
    [0, 1); each with the shares of its pixels' classes. Held-out labels are enlarged bilinearly to the picture's side, where mIoU is
    taken. Ignored pixels of training pictures count as background where there is one; else they vote for nothing.
    Differs: training views are cut from half of a picture at least, as published, but never from more than all of it, and their color is
    not jittered; labels are never matched to classes afterwards; classes that nothing shows and nobody names are left out of the mean;
    memories of 10 and 100 times 1024 patches, not of 100 to 10,000 times.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("masks",)
    parts: tuple[Part, ...] = ()
    k: int = 30
    temperature: float = 0.02
    memory: tuple[int, ...] = (10_240, 102_400)  # patches
    views: int = 1  # of every training picture
    area_frac: tuple[float, float] = (0.5, 1.0)  # of the picture's area
    pictures: int | None = None  # to learn from; None: all

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield mIoU of every memory; where it would hold more than all patches, of them all."""
        train, held_out = masked(evaluation)
        classes = len(train.classes)
        keys, labels = self._memory(evaluation, train)
        views = next(iter(keys.values())).shape[0]
        each = [max(1, size // views) for size in self.memory]
        nothing = torch.zeros(classes, classes, dtype=torch.int64, device=evaluation.device)
        counts = {(size, column): nothing.clone() for size in self.memory for column in keys}
        view = evaluation.family(law=Center())
        px = evaluation.picture_px
        ids = dense_ids(evaluation, held_out, None)
        for block in dense_blocks(evaluation, held_out, held_out.masks, ids, view, map_px=px, what="hummingbird: held out"):
            for size, number in zip(self.memory, each, strict=True):
                for column, tokens in block.tokens.items():
                    bank, of_bank = (kept[:, :number].flatten(0, 1)[:size] for kept in (keys[column], labels))
                    shares = retrieve(bank, of_bank, tokens.flatten(0, 2), k=self.k, temperature=self.temperature)
                    predicted = largest(shares.unflatten(0, tokens.shape[:3]), px)
                    counts[size, column] += confusion(predicted, block.maps, classes)
        for (size, column), own in counts.items():
            yield Score(row=f"mIoU, memory {size}", features=column, value=mean_iou(of_all_ranks(evaluation, own)))

    def _memory(self, evaluation: Evaluation, train: MaskedPictures) -> tuple[dict[str, Tensor], Tensor]:
        """Return the patches of every training view that the largest memory holds, those of smaller ones first, and their labels.

        Shapes: (views, K, D) by column, (views, K, classes).
        """
        ids = dense_ids(evaluation, train, self.pictures)
        if not len(ids):
            raise NotMeasuredError("there are no pictures with masks to learn from")
        each = max(1, max(self.memory) // (len(ids) * self.views))
        view = evaluation.family("memory", law=Independent(area_frac=self.area_frac))
        what = "hummingbird: memory"
        keys_of: dict[str, list[Tensor]] = {column: [] for column in (*evaluation.networks, RAW)}
        labels_of: list[Tensor] = []
        for epoch in range(self.views):
            keys: dict[str, list[Tensor]] = {column: [] for column in keys_of}
            labels: list[Tensor] = []
            for block in dense_blocks(evaluation, train, train.masks, ids, view, map_px=evaluation.picture_px, epoch=epoch, what=what):
                grid = next(iter(block.tokens.values())).shape[1:3]
                masks = block.maps
                if train.background is not None:
                    masks = masks.masked_fill(masks == IGNORED, train.background)
                shown = patch_labels(masks, (grid[0], grid[1]), len(train.classes)).flatten(1, 2)  # (n, N, C)
                with random_scope(evaluation.seed, "hummingbird", epoch, block.number):
                    noise = torch.rand(shown.shape[:2]).to(shown.device)
                rows = rare_patches(shown, noise, min(each, shown.shape[1]))
                labels.append(_taken(shown.float() / shown.sum(-1, keepdim=True).clamp(min=1), rows))
                for column, tokens in block.tokens.items():
                    keys[column].append(_taken(tokens.flatten(1, 2), rows))
            for column, own in keys.items():
                keys_of[column].append(evaluation.joined(own))
            labels_of.append(evaluation.joined(labels))
        return {column: torch.cat(parts) for column, parts in keys_of.items()}, torch.cat(labels_of)


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def rare_patches(shown: Tensor, noise: Tensor, number: int) -> Tensor:
    """Return which patches of a view to keep: those of the lowest scores, the lowest first.

    A patch's score is the sum, over the classes that it shows, of how many patches of the view show them, times its noise.
    Shapes: shown (n, N, classes) pixels of each class, noise (n, N) -> (n, number) int64.
    """
    shows = (shown > 0).float()
    score = (shows @ shows.sum(1)[..., None]).squeeze(-1) * noise
    return score.masked_fill(~shows.any(-1), UNSHOWN).topk(number, largest=False).indices


def retrieve(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Return the mean label of a query's k nearest neighbors by cosine, weighted by the softmax of cosine / temperature.

    Shapes: bank (M, D), labels (M, classes), queries (Q, D) -> (Q, classes).
    """
    shares = []
    for some in queries.split(QUERIES):  # for labels of all neighbors at once would take k times the memory
        similarity, nearest = neighbors(bank, some, k=k)
        shares.append(torch.einsum("qk,qkc->qc", (similarity / temperature).softmax(-1), labels[nearest]))
    return torch.cat(shares)


def enlarged(values: Tensor, px: int) -> Tensor:
    """Return numbers of tokens, bilinearly enlarged to px a side: (n, h, w, C) -> (n, C, px, px)."""
    return F.interpolate(values.permute(0, 3, 1, 2), (px, px), mode="bilinear", align_corners=False)


def largest(values: Tensor, px: int) -> Tensor:
    """Return which of its numbers is the largest where they are enlarged, a few pictures at a time: (n, h, w, C) -> (n, px, px) int64."""
    return torch.cat([enlarged(some, px).argmax(1) for some in values.split(ENLARGED)])
