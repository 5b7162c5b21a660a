"""Pair geometry on any frozen encoder: a fresh head of SP's, whatever the encoder was trained by, beside what R2 must be read beside.

Here: the protocol, under named laws.
Not here: how a run's own head is judged (pairs.py), the controls and their training (pair_controls.py), heads (objectives/pair_heads.py).
Source: SP's first task, arXiv 2605.09963, of which secondary descriptions say that position and scale are regressed and L2 is reported;
the head is SP's own, and all else our choice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.laws import Disjoint
from wherefrom.pipeline.view_recipe import CropLaw, law_name
from wherefrom.pipeline.views import Views
from wherefrom.train.encoder import Features
from wherefrom.train.evaluation.features import BLOCK, CHANCE, ENCODER, RAW, Evaluation, Part
from wherefrom.train.evaluation.pair_controls import NoPairsError, control_heads, parts_of, r2_with_interval, structure_gates, train_heads
from wherefrom.train.evaluation.pairs import GATE_NAMES
from wherefrom.train.evaluation.pictures import evaluation_mode
from wherefrom.train.evaluation.protocols import Better, Box, Need, NotMeasuredError, PairExample, Score
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives.spatial import PAIRED, SpatialPrediction, SpatialSettings

HEADS = {  # of `control_heads`, and how rows call them
    "fresh full head": "",
    "reference-only head": ", reference only",
    "target-only head": ", target only",
    "additive head f(r) + g(t)": ", additive",
}
RAW_VIEW_PX = 8
EXAMPLES = 4  # of the best and of the worst pairs, under each law


@dataclass(frozen=True, kw_only=True, slots=True)
class PairGeometry:
    """Views of half the side of whole pictures, neither mirrored, turned nor colored: under `paired` two a picture, `disjoint` four.

    Targets: position in sides of the reference, and the logarithm of scale, standardized by the law. Heads: SP's, one for each view by
    itself, their sum; all of them on the same frozen features, AdamW at 1e-3, cosine to 0, 400 steps of 64 pictures, squared error. R2 of
    two laws do not compare. L2 is the mean distance, of positions in sides of the reference, of scale in nats; chance says the law's mean.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("training pictures",)
    parts: tuple[Part, ...] = ()
    laws: tuple[CropLaw, ...] = field(default_factory=lambda: (PAIRED, Disjoint()))
    views: int = 4  # of a law that draws any number
    pictures: int = 2000  # of training, at most
    held_out_pictures: int = 500
    steps: int = 400

    def measure(self, evaluation: Evaluation) -> Iterator[Score | PairExample | NotMeasuredError]:
        """Yield R2 of every channel by every head, L2, and contradictions, by law and column; pairs told best and worst by the encoder."""
        for law in self.laws:
            try:
                yield from list(self._of_law(evaluation, law))
            except NoPairsError as problem:
                yield NotMeasuredError(f"{law_name(law)} law: {problem}")

    def _of_law(self, evaluation: Evaluation, law: CropLaw) -> Iterator[Score | PairExample]:
        """Yield what is measured under a law.

        Raises: NoPairsError if there are no pairs to learn from, or none held out.
        """
        name, objective = law_name(law), self._objective(evaluation, law)
        train, held_out = (self._pairs(evaluation, objective, side) for side in ("train", "held_out"))
        if not bool(train.mask.any()):
            raise NoPairsError(f"{len(train.mask)} training pictures, no pair that counts; are they too small for the law?")
        for row, value in _distances(objective, torch.zeros_like(held_out.targets), held_out).items():
            yield Score(row=f"{name}: {row}", features=CHANCE, value=value, better="lower")
        for number, column in enumerate(held_out.features):
            evaluation.progress(f"heads: {name}", number, len(held_out.features))
            for row, value, better in pair_scores(objective, train, held_out, column, steps=self.steps, seed=evaluation.seed):
                yield Score(row=f"{name}: {row}", features=column, value=value, better=better)
            if column == ENCODER:
                yield from pair_examples(objective, held_out, column)

    def _objective(self, evaluation: Evaluation, law: CropLaw) -> SpatialPrediction:
        """Return SP as it would be learned under a law, of which only targets and head are used."""
        views = law.fixed_views or self.views
        settings = SpatialSettings(law=law, views=views, size_px=evaluation.view_px(0.5), mirror="none", color=None)
        objective = settings.objective("pairs")
        with random_scope(evaluation.seed, "pairs"):
            objective.setup(evaluation.network.encoder)
        return objective.to(evaluation.device)

    def _pairs(self, evaluation: Evaluation, objective: SpatialPrediction, side: str) -> "FrozenPairs":
        """Return the pairs of a side's pictures, as frozen features of every column."""
        ids = evaluation.ids(side, self.pictures if side == "train" else self.held_out_pictures)
        recipe = evaluation.recipe(objective.evaluation_family())
        columns = (*evaluation.networks, RAW)
        summaries: dict[str, list[Tensor]] = {column: [] for column in columns}
        tokens: dict[str, list[Tensor]] = {column: [] for column in columns}
        targets, masks, boxes, samples = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for number, batch in evaluation.batches(side, recipe, ids, own=True):
            views = batch.views[0]
            with torch.no_grad():
                features = {column: encoder.encode(views) for column, encoder in evaluation.networks.items()}
            for column, values in (features | {RAW: _raw(views)}).items():
                summaries[column].append(values.summary.float())
                tokens[column].append(values.tokens.half())
            targets.append(objective.targets(views.geometry))
            masks.append(objective.pair_mask(views.geometry, views.valid).byte())
            boxes.append(views.geometry.boxes)
            samples.append(batch.sample)
            evaluation.progress(f"pairs: {side.replace('_', ' ')}", min(len(ids), (number + 1) * BLOCK), len(ids))
        return FrozenPairs(
            features={
                column: Features(summary=evaluation.joined(summaries[column]), tokens=evaluation.joined(tokens[column]))
                for column in columns
            },
            targets=evaluation.joined(targets),
            mask=evaluation.joined(masks).bool(),
            boxes=evaluation.joined(boxes),
            samples=evaluation.joined(samples),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FrozenPairs:
    """Pairs of views of B pictures."""

    features: Mapping[str, Features]  # of all views, (B, V), tokens in half precision, by column
    targets: Tensor  # (B, P, C) standardized
    mask: Tensor  # (B, P) bool: those that count
    boxes: Tensor  # (B, V, 4) xyxy, source pixels
    samples: Tensor  # (B,) int64


def pair_scores(
    objective: SpatialPrediction, train: FrozenPairs, held_out: FrozenPairs, column: str, *, steps: int, seed: int
) -> list[tuple[str, float, Better]]:
    """Return what fresh heads on the features of a column say of held-out pairs: rows with their values, and which way they are good.

    Raises: NoPairsError if no held-out pair counts, or there are fewer than 2 pictures.
    """
    device, features = objective.pairs.device, held_out.features[column]
    heads = {name: head.to(device) for name, head in control_heads(objective, train.features[column], seed=seed).items()}
    train_heads(list(heads.values()), train.features[column], train.targets, train.mask, objective.pairs, steps=steps, seed=seed)
    objective.head = heads["fresh full head"]  # type: ignore[assignment]
    rows: list[tuple[str, float, Better]] = []
    with evaluation_mode(objective, *heads.values()):
        parts = list(parts_of(features))
        predicted = {name: torch.cat([head(part, objective.pairs)[0].float() for part in parts]) for name, head in heads.items()}
        for name, words in HEADS.items():
            r2 = r2_with_interval(predicted[name], held_out.targets, held_out.mask).value
            better: Better = "higher" if name == "fresh full head" else "neither"
            rows += [(f"R2 {channel}{words}", value, better) for channel, value in zip(objective.channels, r2, strict=True)]
        own = predicted["fresh full head"]
        both = held_out.mask & held_out.mask.roll(1, 0)
        if bool(both.any()):  # else no picture beside one that counts does so
            r2 = r2_with_interval(own, held_out.targets.roll(1, 0), both).value
            rows += [(f"R2 {channel}, next picture's", value, "neither") for channel, value in zip(objective.channels, r2, strict=True)]
        rows += [(row, value, "lower") for row, value in _distances(objective, own, held_out).items()]
        gates = structure_gates(objective, features)
    return rows + [(GATE_NAMES[name], value, "lower") for name, value in gates.items()]


def pair_examples(objective: SpatialPrediction, pairs: FrozenPairs, column: str) -> Iterator[PairExample]:
    """Yield the pairs that the objective's head tells best, the best first, and worst, the worst first, at most one of a picture each.

    Best is the least mean squared error of standardized targets.
    """
    with evaluation_mode(objective):
        predicted = torch.cat([objective.predict(part)[0].float() for part in parts_of(pairs.features[column])])
    error = (predicted - pairs.targets).square().mean(-1)  # (B, P)
    told = told_boxes(objective, pairs.boxes, predicted - pairs.targets)
    ranks: tuple[tuple[Literal["best", "worst"], float], ...] = (("best", 1.0), ("worst", -1.0))
    for rank, sign in ranks:
        of_picture, pair = (sign * error).masked_fill(~pairs.mask, torch.inf).min(1)
        for row in of_picture.argsort(stable=True)[:EXAMPLES].tolist():
            if torch.isinf(of_picture[row]):
                continue
            reference, target = objective.pairs[pair[row]].tolist()
            boxes = (pairs.boxes[row, reference], pairs.boxes[row, target], told[row, pair[row]])
            first, second, third = (_box(box) for box in boxes)
            sample = int(pairs.samples[row])
            yield PairExample(law=law_name(objective.settings.law), rank=rank, sample=sample, reference=first, target=second, told=third)


def told_boxes(objective: SpatialPrediction, boxes: Tensor, error: Tensor) -> Tensor:
    """Return where targets lie by predictions that err so, (B, P, 4) xyxy, source pixels: by position, and by scale of both sides.

    Shapes: boxes (B, V, 4), error (B, P, C) of standardized targets: position in sides of the reference, scale as "log_area".
    """
    error = error * objective.target_std
    reference, target = (boxes[:, side] for side in objective.pairs.unbind(-1))  # (B, P, 4)
    center = (target[..., :2] + target[..., 2:]) / 2 + error[..., :2] * (reference[..., 2:] - reference[..., :2])
    half = (target[..., 2:] - target[..., :2]) / 2 * error[..., 2:].exp()
    return torch.cat([center - half, center + half], -1)


def _box(box: Tensor) -> Box:
    x0, y0, x1, y1 = (round(float(number), 2) for number in box)
    return x0, y0, x1, y1


def _distances(objective: SpatialPrediction, predicted: Tensor, pairs: FrozenPairs) -> dict[str, float]:
    """Return the mean distance of position and of the logarithm of scale, over the pairs that count."""
    error = (predicted - pairs.targets) * objective.target_std
    parts = {"L2 of position": error[..., :2].norm(dim=-1), "L2 of ln scale": error[..., 2:].norm(dim=-1)}
    return {name: float((values * pairs.mask).sum() / pairs.mask.sum()) for name, values in parts.items()}


def _raw(views: Views) -> Features:
    """Return views as their own pixels, 8 x 8, one token each."""
    pixels = F.adaptive_avg_pool2d(views.pixels.float().flatten(0, 1), RAW_VIEW_PX).flatten(1).unflatten(0, views.valid.shape)
    return Features(summary=pixels, tokens=pixels[:, :, None, None])
