"""How good an encoder and its head are by pair geometry: R2 on held-out pairs, and everything that it must be read beside.

Here: which views are cut for which row, and the report as plain data and as tables.
Not here: statistics and the controls that need no picture (pair_controls.py), labels (labels.py), when to evaluate (loop.py).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.labels import drawn_ids
from wherefrom.train.evaluation.pair_controls import (
    R2,
    PairObjective,
    control_heads,
    one_view_oracle,
    parts_of,
    r2_with_interval,
    structure_gates,
    train_heads,
)
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table, blocks, judged
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives import SpatialPrediction

PAIRS_PROTOCOL = "pairs-r2@2"
GATE_NAMES = {
    "identity_position": "a view with itself: position",
    "identity_scale": "a view with itself: ln scale",
    "symmetry": "a to b, back to a",
    "composition": "a to b to c, and a to c",
}
NOTES = (
    "R2: 1 is perfect, 0 as good as always saying the mean. At most 0: above it,",
    "something other than the pictures tells the place. Lower: the distance is what",
    "comparing two views tells, beyond where each lies by itself.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """R2 of one way to predict, by channel; `expected` says what a model that compares two views gives."""

    name: str
    r2: tuple[float, ...]
    low: tuple[float, ...] | None  # 95 % bootstrap over pictures; None: not a sample of pictures
    high: tuple[float, ...] | None
    expected: str  # 18 characters at most: tables fit 80 columns


@dataclass(frozen=True, kw_only=True, slots=True)
class PairReport:
    """How well pairs are predicted, under a named law, with everything that the number must be read beside."""

    protocol: str
    law: str
    channels: tuple[str, ...]
    pictures: int
    pairs: int  # that counted
    left_out: int  # pairs that do not count: with an invalid view, or regions that overlap
    loss: float  # weighted as in training, squared error
    constant_loss: float  # of the law's mean
    position_distance: float  # mean Euclidean error, in the targets' unit
    constant_position_distance: float
    rows: tuple[PairRow, ...]  # the model first
    gates: dict[str, float]  # how far predictions contradict one another, see `structure_gates`

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """Return what was looked at, R2, how to read it, errors and contradictions: rows of text within 80 columns."""
        first, *others = self.rows
        looked_at = ((f"{self.pictures} held-out pictures, {self.pairs} pairs, {self.left_out} left out",),)
        explained = [("R2", *self.channels, "expected"), (first.name, *map(r2_text, first.r2), first.expected)]
        if first.low is not None and first.high is not None:
            explained += [(f"  95 % interval, {side}", *map(r2_text, end), "") for side, end in (("from", first.low), ("to", first.high))]
        explained += [(row.name, *map(r2_text, row.r2), row.expected) for row in others]
        errors = (
            ("error", "model", "mean", "expected"),
            ("loss", f"{self.loss:.4f}", f"{self.constant_loss:.4f}", "model lower"),
            ("distance of positions", f"{self.position_distance:.3f}", f"{self.constant_position_distance:.3f}", "model lower"),
        )
        gates = [(GATE_NAMES[name], f"{value:.3f}", "near 0") for name, value in self.gates.items()]
        notes = tuple((note,) for note in NOTES)
        return looked_at, tuple(explained), notes, errors, (("contradictions", "error", "expected"), *gates)

    def row(self, name: str) -> PairRow:
        """Return one row by its name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Seen:
    """A set of pictures as the encoder saw it: features in half precision, what was to be predicted, and which pairs count."""

    features: Features
    wanted: Tensor  # (B, P, C) standardized
    counted: Tensor  # (B, P) bool


def r2_text(r2: float) -> str:
    """Return R2 in few characters, however bad it is."""
    return f"{r2:.3f}" if r2 > -9.9995 else f"{r2:.0f}"


def pair_r2(encoder: Encoder, objective: PairObjective, held_out: PictureSource, *, pictures: int) -> PairRow:
    """Return the R2 of the objective's own head on held-out pairs; the short form, for during a run.

    Raises: NoPairsError, as evaluate_pairs.
    """
    seen = _seen(encoder, objective, held_out, pictures)
    return _row("held-out pairs", _predicted(objective, seen.features), seen.wanted, seen.counted, "")


def evaluate_pairs(
    encoder: Encoder,
    objective: PairObjective,
    train: PictureSource,
    held_out: PictureSource,
    *,
    pictures: int = 500,
    train_pictures: int = 3000,
    head_steps: int = 400,
    equalize_px: int = 24,
    seed: int = 0,
    progress: ReportProgress | None = None,
) -> PairReport:
    """Judge the prediction of pairs by R2, beside every control.

    Heads of the controls are trained alike on frozen features of `train_pictures` training pictures, `head_steps` steps.
    Raises: NoPairsError if no pair counts, or there are fewer than 2 pictures.
    """

    def told(done: int) -> None:
        if progress is not None:
            progress("pair geometry", done, 6)

    pairs = objective.pairs
    seen = _seen(encoder, objective, held_out, pictures)
    predicted = _predicted(objective, seen.features)
    told(1)
    rows = [
        _row("held-out pairs", predicted, seen.wanted, seen.counted, "1 is perfect"),
        _row("targets of the next picture", predicted, seen.wanted.roll(1, 0), seen.counted & seen.counted.roll(1, 0), "at most 0"),
    ]

    across = _across(encoder, objective, held_out, pictures)
    rows.append(_row("pairs across pictures", across, seen.wanted, seen.counted, "lower"))
    told(2)
    taught = _seen(encoder, objective, train, train_pictures)
    told(3)
    heads = {name: head.to(pairs.device) for name, head in control_heads(objective, taught.features, seed=seed).items()}
    train_heads(list(heads.values()), taught.features, taught.wanted, taught.counted, pairs, steps=head_steps, seed=seed)
    told(4)
    for name, head in heads.items():
        with judged(head):
            said = torch.cat([head(part, pairs)[0].float() for part in parts_of(seen.features)])
        rows.append(_row(name, said, seen.wanted, seen.counted, "as held-out pairs" if name == "fresh full head" else "lower than fresh"))

    if isinstance(objective, SpatialPrediction):  # regions of one view are equally sharp as they are
        blurred = _seen(encoder, objective, held_out, pictures, equalize_px=equalize_px)
        said = _predicted(objective, blurred.features)
        rows.append(_row(f"sharpness equalized at {equalize_px} px", said, blurred.wanted, blurred.counted, "as held-out pairs"))
    told(5)
    empty = _seen(encoder, objective, held_out, pictures, content=False, seed=seed)
    rows.append(_row("content-free pictures", _predicted(objective, empty.features), empty.wanted, empty.counted, "at most 0"))
    for name, ceiling in one_view_oracle(objective).items():
        rows.append(PairRow(name=f"oracle: {name} box known", r2=ceiling, low=None, high=None, expected="ceiling of 1 view"))
    told(6)

    weights = torch.tensor(
        [objective.weights["position"]] * 2 + [objective.weights["scale"]] * (len(objective.channels) - 2), device=pairs.device
    )
    distance, constant_distance = (_position_distance(objective, said, seen) for said in (predicted, torch.zeros_like(predicted)))
    with judged(encoder, objective):
        gates = structure_gates(objective, seen.features)
    return PairReport(
        protocol=PAIRS_PROTOCOL,
        law=objective.settings.law,
        channels=objective.channels,
        pictures=len(seen.wanted),
        pairs=int(seen.counted.sum()),
        left_out=int((~seen.counted).sum()),
        loss=_mean((predicted - seen.wanted).square() @ weights, seen.counted),
        constant_loss=_mean(seen.wanted.square() @ weights, seen.counted),
        position_distance=distance,
        constant_position_distance=constant_distance,
        rows=tuple(rows),
        gates=gates,
    )


def _recipe(objective: PairObjective, side_px: int | None = None) -> ViewRecipe:
    """Return the recipe of the evaluation's views, of another side if given: by their name they have the very same boxes."""
    family = objective.evaluation_family()
    return ViewRecipe(families=(family if side_px is None else replace(family, size_px=(side_px, side_px)),))


def _seen(
    encoder: Encoder,
    objective: PairObjective,
    pictures: PictureSource,
    number: int,
    *,
    equalize_px: int | None = None,
    content: bool = True,
    seed: int = 0,
) -> _Seen:
    """Encode `number` pictures; without `content`, pictures of one color with noise on every view."""
    recipe = _recipe(objective, equalize_px)
    found: list[Features] = []
    wanted, counted = [], []
    with judged(encoder, objective):
        for ids in blocks(drawn_ids(pictures, number)):
            cut = pictures.views(recipe, ids) if content else pictures.plain_views(recipe, ids)
            views = cut.views[0] if content else _with_noise(cut.views[0], seed, int(ids[0]))
            features = objective.features(views, encoder.encode)
            found.append(Features(summary=features.summary.float(), tokens=features.tokens.half()))
            wanted.append(objective.targets(views.geometry))
            counted.append(objective.counted(views.geometry, views.valid))
    return _Seen(features=_joined(found, dim=0), wanted=torch.cat(wanted), counted=torch.cat(counted))


def _with_noise(views: Views, seed: int, first: int) -> Views:
    """Return the views with noise that is added after resizing: before it, its strength would tell the size of the box."""
    with random_scope(seed, "noise", first, device=views.pixels.device):
        return replace(views, pixels=views.pixels + 0.3 * torch.randn_like(views.pixels))


def _across(encoder: Encoder, objective: PairObjective, pictures: PictureSource, number: int) -> Tensor:
    """Predict pairs whose target view is cut from the next picture, by the same draws."""
    recipe = _recipe(objective)
    chosen = drawn_ids(pictures, number)
    said = []
    with judged(encoder, objective):
        for ids, next_ids in zip(blocks(chosen), blocks(np.roll(chosen, -1)), strict=True):
            own = objective.features(pictures.views(recipe, ids).views[0], encoder.encode)
            other = objective.features(pictures.views(recipe, next_ids, ids).views[0], encoder.encode)
            views = own.summary.shape[1]
            pairs = objective.pairs + torch.tensor([0, views], device=objective.pairs.device)
            said.append(objective.predict(_joined([own, other], dim=1), pairs)[0].float())
    return torch.cat(said)


def _joined(parts: list[Features], *, dim: int) -> Features:
    return Features(summary=torch.cat([part.summary for part in parts], dim), tokens=torch.cat([part.tokens for part in parts], dim))


def _predicted(objective: PairObjective, features: Features) -> Tensor:
    with judged(objective):
        return torch.cat([objective.predict(part)[0].float() for part in parts_of(features)])


def _row(name: str, predicted: Tensor, wanted: Tensor, counted: Tensor, expected: str) -> PairRow:
    found: R2 = r2_with_interval(predicted, wanted, counted)
    return PairRow(name=name, r2=found.value, low=found.low, high=found.high, expected=expected)


def _mean(values: Tensor, counted: Tensor) -> float:
    return float((values * counted).sum() / counted.sum())


def _position_distance(objective: PairObjective, predicted: Tensor, seen: _Seen) -> float:
    apart = (predicted - seen.wanted)[..., :2] * objective.target_std[:2]
    return _mean(apart.norm(dim=-1), seen.counted)
