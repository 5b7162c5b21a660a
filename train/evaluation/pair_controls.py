"""What a number of pair geometry is worth: statistics of R2, and the controls that need no picture.

Here: R2 with its bootstrap, heads trained on frozen features, the one-view oracle, structure gates; plain tensors and features.
Not here: which views are cut for them, and the report (pairs.py). Where pairs are of regions of one view, read "region" for "view".
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wherefrom.train.encoder import Features
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives.pairs import PairObjective, law_records, ordered_pairs

BOOTSTRAPS = 1000
ORACLE_PAIRS = 200_000
ORACLE_BINS = 20
MOST_VIEWS = 24  # of a picture, the first, among all pairs and triples of which contradictions are looked for


class NoPairsError(ValueError):
    """There is nothing to compute an R2 of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class R2:
    """R2 of every channel, with the 95 % interval that pictures drawn anew would give."""

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def r2_with_interval(predicted: Tensor, targets: Tensor, mask: Tensor, *, seed: int = 0) -> R2:
    """Return R2 = 1 - squared error / variance of the targets, and its percentile bootstrap over whole pictures.

    Shapes: predicted and targets (B, P, C), mask (B, P) bool: the pairs of pictures that count.
    Raises: NoPairsError if no pair counts, or fewer than 2 pictures.
    """
    if len(targets) < 2 or not bool(mask.any()):
        raise NoPairsError(
            f"{len(targets)} pictures, {int(mask.sum())} pairs that count: R2 needs 2 and 1; are the pictures too small for the law?"
        )
    weight = mask.double().unsqueeze(-1)
    error = ((predicted.double() - targets.double()).square() * weight).sum(1)
    first, second = ((targets.double() ** power * weight).sum(1) for power in (1, 2))
    sums = torch.stack([error, first, second, weight.sum(1).expand_as(error)]).cpu()  # (4, B, C)
    with random_scope(seed, "bootstrap"):
        rows = torch.randint(len(targets), (BOOTSTRAPS, len(targets)))
    times = torch.zeros(BOOTSTRAPS, len(targets), dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
    low, high = _r2_of_sums(torch.einsum("rb,sbc->src", times, sums)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    value = _r2_of_sums(sums.sum(1))
    return R2(value=tuple(value.tolist()), low=tuple(low.tolist()), high=tuple(high.tolist()))


def _r2_of_sums(sums: Tensor) -> Tensor:
    """Return R2 of sums over pairs (error, target, its square, 1): pictures are weighed without their pairs; float32 would cancel."""
    error, first, second, number = sums
    return 1 - error / (second - first.square() / number)


class OneView(nn.Module):
    """A two-layer MLP that sees one view of the pair only, `side` 0: the reference, 1: the target."""

    def __init__(self, width: int, hidden: int, channels: int, *, side: int) -> None:
        super().__init__()
        self.side = side
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, features: Features, pairs: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Predict pairs (P, 2) -> (B, P, C), from [summary; mean token]."""
        views = torch.cat([features.summary, features.tokens.flatten(2, -2).mean(2)], -1)
        return self.mlp(views)[:, pairs[:, self.side]], {}


class Separate(nn.Module):
    """f(z_r) + g(z_t): both views, but each by itself; what it reaches needs no comparison of the two."""

    def __init__(self, width: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.of_reference = OneView(width, hidden, channels, side=0)
        self.of_target = OneView(width, hidden, channels, side=1)

    def forward(self, features: Features, pairs: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Predict pairs (P, 2) -> (B, P, C)."""
        return self.of_reference(features, pairs)[0] + self.of_target(features, pairs)[0], {}


def control_heads(objective: PairObjective, features: Features, *, seed: int) -> dict[str, nn.Module]:
    """Return the heads that are trained alike on such frozen features, by their row's name in the report."""
    width = features.tokens.shape[-1]
    hidden, channels = objective.settings.hidden or width, len(objective.channels)
    width_of_view = features.summary.shape[-1] + width
    with random_scope(seed, "control heads"):
        return {
            "reference-only head": OneView(width_of_view, hidden, channels, side=0),
            "target-only head": OneView(width_of_view, hidden, channels, side=1),
            "additive head f(r) + g(t)": Separate(width_of_view, hidden, channels),
            "fresh full head": objective.new_head(width),
        }


def train_heads(
    heads: Sequence[nn.Module],
    features: Features,
    targets: Tensor,
    mask: Tensor,
    pairs: Tensor,
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
) -> None:
    """Train heads on the same frozen features, with the same batches in the same order: AdamW at 1e-3, cosine to 0, squared error.

    Shapes: features of B pictures, targets (B, P, C), mask (B, P) bool, pairs (P, 2).
    """
    optimizer = torch.optim.AdamW([p for head in heads for p in head.parameters()], lr=1e-3, weight_decay=0.05)
    with random_scope(seed, "control batches"):
        rows = torch.cat([torch.randperm(len(targets)) for _ in range(1 + steps * batch // len(targets))])[: steps * batch]
    for step, row in enumerate(rows.to(targets.device).chunk(steps)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        batch_features = Features(summary=features.summary[row].float(), tokens=features.tokens[row].float())
        weight = mask[row].unsqueeze(-1)
        errors = [((head(batch_features, pairs)[0].float() - targets[row]).square() * weight).sum() for head in heads]
        optimizer.zero_grad(set_to_none=True)
        (torch.stack(errors).sum() / weight.sum().clamp(min=1)).backward()
        optimizer.step()


def one_view_oracle(objective: PairObjective) -> dict[str, tuple[float, ...]]:
    """Return the R2 of the best predictor that knows one view's absolute box, and nothing else: a ceiling on what one view can give.

    Binned conditional means over boxes that the law draws on square pictures: an axis of p by center and side, scale by both sides.
    """
    family = objective.evaluation_family()
    pairs = objective.pairs.cpu()
    record = law_records(family, pictures=math.ceil(ORACLE_PAIRS / len(pairs)))
    boxes, mask = objective.boxes(record), objective.pair_mask(record, torch.ones(record.boxes.shape[:2], dtype=torch.bool))
    targets = objective.targets(record, pairs, standardized=False)[mask]
    center = (boxes[..., :2] + boxes[..., 2:]).double() / 2
    side = (boxes[..., 2:] - boxes[..., :2]).double()
    ceilings = {}
    for number, name in enumerate(("reference", "target")):
        bins = [_bins(value[:, pairs[:, number], axis][mask]) for value in (center, side) for axis in (0, 1)]
        x, y, width, height = bins
        conditions = [(x, width), (y, height)] + [(width, height)] * (targets.shape[-1] - 2)
        ceilings[name] = tuple(_explained(targets[:, c].double(), a * ORACLE_BINS + b) for c, (a, b) in enumerate(conditions))
    return ceilings


def _bins(values: Tensor) -> Tensor:
    """Return which of ORACLE_BINS equally full bins each value falls into."""
    ranked = values.sort().values
    edges = ranked[(torch.arange(1, ORACLE_BINS) * len(values)) // ORACLE_BINS]
    return torch.bucketize(values, edges, right=True)


def _explained(targets: Tensor, bins: Tensor) -> float:
    """Return the share of variance that lies between bins."""
    total = torch.zeros(ORACLE_BINS**2, dtype=torch.float64).index_add_(0, bins, targets)
    number = torch.bincount(bins, minlength=ORACLE_BINS**2)
    means = total / number.clamp(min=1)
    return float(1 - (targets - means[bins]).square().mean() / targets.var(unbiased=False))


def structure_gates(objective: PairObjective, features: Features) -> dict[str, float]:
    """Return how far predictions are from hanging together; all are 0 for a right head, and for some wrong ones.

    identity_position, identity_scale: root mean square for a view paired with itself, in the targets' units (scale in nats).
    symmetry: sqrt(sum |p_ij + p_ji s_ij|^2 / sum |p_ij|^2).
    composition: sqrt(sum |p_ij + s_ij p_jk - p_ik|^2 / sum |p_ik|^2) over triples; only for three views or more.
    Source: after RoPART's gates, with the terms of scale; p in units other than the reference has s = 1.
    """
    settings, views = objective.settings, min(MOST_VIEWS, features.summary.shape[1])
    each = torch.arange(views, device=features.summary.device)
    every = torch.cartesian_prod(each, each)
    predicted = torch.cat([objective.predict(part, every)[0].float() for part in parts_of(features)])
    channels = (predicted * objective.target_std + objective.target_mean).unflatten(1, (views, views))  # (B, V, V, C)
    position, log_scale = channels[..., :2], channels[..., 2:]
    if settings.scale == "ratio":
        log_scale = log_scale.clamp(min=1e-3).log()
    scaled = log_scale.shape[-1] > 0  # else all views are as large
    unit = log_scale.exp() if scaled and settings.position == "reference" else torch.ones_like(position[..., :1])

    gates = {"identity_position": float(position[:, each, each].square().sum(-1).mean().sqrt())}
    if scaled:
        gates["identity_scale"] = float(log_scale[:, each, each].square().mean().sqrt())
    i, j = ordered_pairs(views).to(each.device).unbind(-1)
    gates["symmetry"] = _relative(position[:, i, j] + position[:, j, i] * unit[:, i, j], position[:, i, j])
    if views > 2 and settings.position != "mean":
        triples = torch.cartesian_prod(each, each, each)
        i, j, k = triples[(triples[:, 0] != triples[:, 1]) & (triples[:, 1] != triples[:, 2]) & (triples[:, 0] != triples[:, 2])].unbind(-1)
        gates["composition"] = _relative(position[:, i, j] + unit[:, i, j] * position[:, j, k] - position[:, i, k], position[:, i, k])
    return gates


def parts_of(features: Features) -> Iterator[Features]:
    """Yield features, in single precision, of 64 pictures at a time: all pairs of all at once may not fit the memory."""
    for summary, tokens in zip(features.summary.split(64), features.tokens.split(64), strict=True):
        yield Features(summary=summary.float(), tokens=tokens.float())


def _relative(rest: Tensor, whole: Tensor) -> float:
    return float((rest.square().sum() / whole.square().sum()).sqrt())
