"""A linear layer on tokens: which class every pixel shows, and how far away it is.

Here: both protocols, training their layers, SigLoss, what depth errors are.
Not here: tokens and maps (dense.py), pictures (dense_pictures.py).
Source: segmentation as Leopart's linear_finetune.py, arXiv 2204.13101; depth as DINOv2's linear head, arXiv 2304.07193, eval/depth.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline.laws import Center
from wherefrom.train.evaluation.dense import (
    DenseBlock,
    confusion,
    dense_blocks,
    dense_ids,
    masked,
    mean_iou,
    of_all_ranks,
    with_depth,
)
from wherefrom.train.evaluation.dense_pictures import IGNORED
from wherefrom.train.evaluation.features import RAW, Evaluation, Part
from wherefrom.train.evaluation.hummingbird import enlarged, largest
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score
from wherefrom.train.objective import random_scope

SIG_EPS, SIG_MEAN = 0.001, 0.15  # of SigLoss: added to depths, and the weight of the squared mean
FLAT = 0.1  # added to every bin, so that no depth has no gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSegmentation:
    """Whole pictures, squashed to a square; the last layer's tokens, a 1 x 1 layer, logits enlarged bilinearly; cross-entropy, mIoU.

    SGD at 0.01, momentum 0.9, weight decay 1e-4, times 0.1 after 20 of 25 epochs, 60 pictures a step; masks are read at 100 px, there
    too mIoU is taken, over all pixels. Enlarging logits is enlarging tokens, as published: both are linear.
    Differs: tokens of every picture are taken once, so training pictures are neither cropped nor mirrored; at most 1000 of them, and the
    loss is taken at 48 px, for time; the last, smaller batch counts.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("masks",)
    parts: tuple[Part, ...] = ()
    pictures: int | None = 1000  # to learn from; None: all
    mask_px: int = 100
    loss_px: int = 48
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 60
    epochs: int = 25
    drop_after: int = 20  # epochs

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield mIoU, and how many pixels are right."""
        train, held_out = masked(evaluation)
        classes, view = len(train.classes), evaluation.family(law=Center())
        ids = dense_ids(evaluation, train, self.pictures)
        blocks = dense_blocks(evaluation, train, train.masks, ids, view, map_px=self.loss_px, what="linear segmentation: train")
        tokens, _, masks = _kept(evaluation, blocks)
        if not len(masks) or len(masks[masks != IGNORED].unique()) < 2:
            raise NotMeasuredError("the masks to learn from show fewer than two classes")
        heads = {}
        for column, of_column in tokens.items():
            with random_scope(evaluation.seed, "linear segmentation"):
                heads[column] = self.fit(of_column, masks, classes)
            evaluation.progress("linear segmentation: heads", len(heads), len(tokens))
        counts = {column: torch.zeros(classes, classes, dtype=torch.int64, device=masks.device) for column in heads}
        ids = dense_ids(evaluation, held_out, None)
        what = "linear segmentation: held out"
        for block in dense_blocks(evaluation, held_out, held_out.masks, ids, view, map_px=self.mask_px, what=what):
            for column, head in heads.items():
                with torch.no_grad():
                    predicted = largest(head(block.tokens[column]), self.mask_px)
                counts[column] += confusion(predicted, block.maps, classes)
        for column, own in counts.items():
            of_all = of_all_ranks(evaluation, own)
            yield Score(row="mIoU", features=column, value=mean_iou(of_all))
            yield Score(row="pixels right", features=column, value=float(of_all.diagonal().sum() / of_all.sum()))

    def fit(self, tokens: Tensor, masks: Tensor, classes: int) -> nn.Linear:
        """Return a layer trained on tokens (N, h, w, D) and masks (N, H, W), by draws of torch's generator."""
        head = nn.Linear(tokens.shape[-1], classes).to(tokens.device)
        optimizer = torch.optim.SGD(head.parameters(), lr=self.rate, momentum=self.momentum, weight_decay=self.weight_decay)
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (0.1 if epoch >= self.drop_after else 1)
            for rows in torch.randperm(len(tokens)).to(tokens.device).split(self.batch):
                optimizer.zero_grad()
                truth = masks[rows].long()
                if (truth != IGNORED).any():  # the mean over no pixels is no number
                    F.cross_entropy(enlarged(head(tokens[rows]), self.loss_px), truth, ignore_index=IGNORED).backward()
                optimizer.step()
        return head


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearDepth:
    """Whole pictures, squashed to a square; class token beside each of the last layer's tokens, a 1 x 1 layer to 256 bins of depth.

    Bins are spread evenly from 0.001 to the farthest depth of the pictures; their scores, enlarged bilinearly to 4 x 4 a token, at least 0
    and 0.1 more, are shares; the depth is their mean, enlarged bilinearly. SigLoss; AdamW, weight decay 1e-4, one cycle of the rate,
    16 pictures a step. RMSE, absolute relative error, the share within a factor 1.25 and the scale-invariant log error are taken for each
    picture, then meant. Differs: tokens are enlarged after the layer, which is the same; whole pictures once, at most 1000 of them, 10
    epochs at a rate of 0.003, not 38,400 steps at 0.0003; summary and tokens of a network without a class token. SigLoss alone, as
    DINOv3's config: DINOv2's repository (commit b8931f7) names no loss of its linear heads, and a second one, on gradients, of DPT heads.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("depth",)
    parts: tuple[Part, ...] = ()
    pictures: int | None = 1000  # to learn from; None: all
    depth_px: int = 96
    bins: int = 256
    nearest: float = 0.001
    upsample: int = 4
    rate: float = 0.003
    weight_decay: float = 1e-4
    batch: int = 16
    epochs: int = 10

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield what `depth_errors` says, as a mean over pictures."""
        train, held_out = with_depth(evaluation)
        view = evaluation.family(law=Center())
        ids = dense_ids(evaluation, train, self.pictures)
        blocks = dense_blocks(evaluation, train, train.depths, ids, view, map_px=self.depth_px, what="linear depth: train")
        tokens, summaries, depths = _kept(evaluation, blocks)
        known = (depths > 0) & (depths <= train.farthest)
        if not known.any():
            raise NotMeasuredError(f"no picture to learn from has a depth from 0 to {train.farthest}")
        heads = {}
        for column, of_column in tokens.items():
            with random_scope(evaluation.seed, "linear depth"):
                heads[column] = self.fit(of_column, summaries.get(column), depths * known, train.farthest)
            evaluation.progress("linear depth: heads", len(heads), len(tokens))
        errors: dict[str, list[Tensor]] = {column: [] for column in heads}
        ids = dense_ids(evaluation, held_out, None)
        what = "linear depth: held out"
        for block in dense_blocks(evaluation, held_out, held_out.depths, ids, view, map_px=self.depth_px, what=what):
            truth = block.maps * (block.maps <= train.farthest)
            for column, head in heads.items():
                with torch.no_grad():
                    scores = head(_with_summary(block.tokens[column], block.summaries.get(column)))
                    predicted = self.depth(scores, train.farthest)
                errors[column].append(depth_errors(predicted, truth))
        for column, own in errors.items():
            of_all = evaluation.joined(own)
            for (row, better), value in zip(DEPTH_ERRORS, of_all.nanmean(0).tolist(), strict=True):
                yield Score(row=row, features=column, value=value, better=better)

    def fit(self, tokens: Tensor, summaries: Tensor | None, depths: Tensor, farthest: float) -> nn.Linear:
        """Return a layer trained on tokens (N, h, w, D), beside each its picture's summary, by draws of torch's generator.

        Shapes: summaries (N, D), or None, depths (N, H, W), 0 where unknown.
        """
        head = nn.Linear(tokens.shape[-1] * (1 if summaries is None else 2), self.bins).to(tokens.device)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.rate, weight_decay=self.weight_decay)
        steps = self.epochs * math.ceil(len(tokens) / self.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps, cycle_momentum=False)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(tokens)).to(tokens.device).split(self.batch):
                optimizer.zero_grad()
                if (depths[rows] > 0).sum() > 1:  # one depth has no variance
                    of_rows = _with_summary(tokens[rows], None if summaries is None else summaries[rows])
                    sig_loss(self.depth(head(of_rows), farthest), depths[rows]).backward()
                optimizer.step()
                schedule.step()
        return head

    def depth(self, scores: Tensor, farthest: float) -> Tensor:
        """Return the depths that a layer's scores (n, h, w, bins) stand for, (n, depth_px, depth_px)."""
        finer = [self.upsample * side for side in scores.shape[1:3]]
        enlarged_scores = F.interpolate(scores.permute(0, 3, 1, 2), finer, mode="bilinear", align_corners=False)
        depth = mean_of_bins(enlarged_scores, torch.linspace(self.nearest, farthest, self.bins, device=scores.device))
        return F.interpolate(depth[:, None], (self.depth_px, self.depth_px), mode="bilinear", align_corners=False)[:, 0]


def mean_of_bins(scores: Tensor, bins: Tensor) -> Tensor:
    """Return the mean of bins by the shares max(score, 0) + 0.1: scores (n, bins, H, W), bins (bins,) -> (n, H, W).

    Source: DINOv2's decode_head.py, norm_strategy "linear", after AdaBins, arXiv 2011.14141.
    """
    shares = scores.relu() + FLAT
    return torch.einsum("nkhw,k->nhw", shares, bins) / shares.sum(1)


def sig_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return the root of the variance of the log error plus 0.15 times its squared mean, over all pixels with a truth above 0.

    Source: SigLoss of DINOv2's eval/depth, arXiv 2304.07193; the variance is the unbiased one, as there.
    """
    known = truth > 0
    error = (predicted[known] + SIG_EPS).log() - (truth[known] + SIG_EPS).log()
    return (error.var() + SIG_MEAN * error.mean().square()).sqrt()


DEPTH_ERRORS: tuple[tuple[str, Literal["higher", "lower"]], ...] = (
    ("RMSE", "lower"),
    ("relative error", "lower"),
    ("within 1.25", "higher"),
    ("scale-invariant log error", "lower"),
)


def depth_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return DEPTH_ERRORS of every picture, (n, 4) float64, over pixels with a truth above 0; no numbers where there is none.

    Shapes: predicted and truth (n, H, W). The scale-invariant error is the deviation of the log error, arXiv 1406.2283 with lambda 1:
    depths that are all wrong by one factor are right.
    """
    rows = []
    for own, depth in zip(predicted.double(), truth.double(), strict=True):
        own, depth = own[depth > 0], depth[depth > 0]
        ratio = own / depth
        root = (own - depth).square().mean().sqrt()
        within = (torch.maximum(ratio, 1 / ratio) < 1.25).double().mean()
        error = ratio.log()
        rows.append(torch.stack([root, (ratio - 1).abs().mean(), within, (error - error.mean()).square().mean().sqrt()]))
    return torch.stack(rows)


def _with_summary(tokens: Tensor, summaries: Tensor | None) -> Tensor:
    """Return tokens (n, h, w, D) with their picture's summary (n, D) beside each, (n, h, w, 2 D); raw pixels, without one, as they are."""
    return tokens if summaries is None else torch.cat([tokens, summaries[:, None, None].expand_as(tokens)], -1)


def _kept(evaluation: Evaluation, blocks: Iterator[DenseBlock]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return tokens and summaries of all ranks' pictures by column, (N, h, w, D) and (N, D) each, and their maps, (N, H, W)."""
    tokens: dict[str, list[Tensor]] = {column: [] for column in (*evaluation.networks, RAW)}
    summaries: dict[str, list[Tensor]] = {column: [] for column in evaluation.networks}
    maps: list[Tensor] = []
    for block in blocks:
        for kept, of_block in ((tokens, block.tokens), (summaries, block.summaries)):
            for column, own in kept.items():
                own.append(of_block[column])
        maps.append(block.maps)
    of_pictures, of_whole = ({column: evaluation.joined(own) for column, own in kept.items()} for kept in (tokens, summaries))
    return of_pictures, of_whole, evaluation.joined(maps)
