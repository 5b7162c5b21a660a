"""How good an encoder and its head are by pair geometry: R2 on held-out pairs, and everything that it must be read beside.

Here: which views are cut for which row, and the report as plain data and as a table.
Not here: statistics and the controls that need no picture (pair_controls.py), labels (evaluate.py), when to evaluate (loop.py).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.views import Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluate import Pictures, Progress, Table, blocks, drawn_ids, judged
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives import SpatialPrediction
from wherefrom.train.pair_controls import (
    R2,
    PairObjective,
    control_heads,
    one_view_oracle,
    parts_of,
    r2_with_interval,
    structure_gates,
    train_heads,
)

PAIRS_PROTOCOL = "pairs-r2@2"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """R2 of one way to predict, by channel; `honest` says what a model that compares two views gives."""

    name: str
    r2: tuple[float, ...]
    low: tuple[float, ...] | None  # 95 % bootstrap over pictures; None: not a sample of pictures
    high: tuple[float, ...] | None
    honest: str


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
    gates: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """Return rows of text, the heading first."""
        rows = [(f"R2, law {self.law}, {self.pictures} pictures, {self.pairs} pairs", *self.channels, "honest")]
        for row in self.rows:
            cells = [f"{value:.3f}" for value in row.r2]
            if row.low is not None and row.high is not None:
                cells = [f"{cell} [{low:.3f}, {high:.3f}]" for cell, low, high in zip(cells, row.low, row.high, strict=True)]
            rows.append((row.name, *cells, row.honest))
        blank = ("",) * (len(self.channels) - 1)
        rows.append(("loss, of the constant", f"{self.loss:.4f}, {self.constant_loss:.4f}", *blank, "below"))
        distances = f"{self.position_distance:.3f}, {self.constant_position_distance:.3f}"
        rows.append(("position error, of the constant", distances, *blank, "below"))
        rows += [(f"gate: {name.replace('_', ' ')}", f"{value:.3f}", *blank, "near 0") for name, value in self.gates.items()]
        return tuple(rows)

    def row(self, name: str) -> PairRow:
        """Return one row by its name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Seen:
    """A set of pictures as the encoder saw it: features in half precision, what was to be predicted, and which pairs count."""

    features: Features
    wanted: Tensor  # (B, P, C) standardised
    counted: Tensor  # (B, P) bool


def pair_r2(encoder: Encoder, objective: PairObjective, held_out: Pictures, *, pictures: int) -> PairRow:
    """Return the R2 of the objective's own head on held-out pairs; the short form, for during a run."""
    seen = _seen(encoder, objective, held_out, pictures)
    return _row("held-out pairs", _predicted(objective, seen.features), seen.wanted, seen.counted, "")


def evaluate_pairs(
    encoder: Encoder,
    objective: PairObjective,
    train: Pictures,
    held_out: Pictures,
    *,
    pictures: int = 500,
    train_pictures: int = 3000,
    head_steps: int = 400,
    equalise_px: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> PairReport:
    """Judge the prediction of pairs by R2, beside every control.

    Heads of the controls are trained alike on frozen features of `train_pictures` training pictures, `head_steps` steps.
    Raises: ValueError if no pair counts, or there are fewer than 2 pictures.
    """

    def told(done: int) -> None:
        if progress is not None:
            progress("pair geometry", done, 6)

    pairs = objective.pairs
    seen = _seen(encoder, objective, held_out, pictures)
    predicted = _predicted(objective, seen.features)
    told(1)
    rows = [
        _row("held-out pairs", predicted, seen.wanted, seen.counted, "high"),
        _row("targets of the next picture", predicted, seen.wanted.roll(1, 0), seen.counted & seen.counted.roll(1, 0), "<= 0"),
    ]

    across = _across(encoder, objective, held_out, pictures)
    rows.append(_row("pairs across pictures", across, seen.wanted, seen.counted, "below held-out pairs"))
    told(2)
    taught = _seen(encoder, objective, train, train_pictures)
    told(3)
    heads = {name: head.to(pairs.device) for name, head in control_heads(objective, taught.features, seed=seed).items()}
    train_heads(list(heads.values()), taught.features, taught.wanted, taught.counted, pairs, steps=head_steps, seed=seed)
    told(4)
    for name, head in heads.items():
        with judged(head):
            said = torch.cat([head(part, pairs)[0].float() for part in parts_of(seen.features)])
        rows.append(
            _row(name, said, seen.wanted, seen.counted, "for comparison" if name == "fresh full head" else "below the fresh full head")
        )

    if isinstance(objective, SpatialPrediction):  # regions of one view are equally sharp as they are
        blurred = _seen(encoder, objective, held_out, pictures, equalise_px=equalise_px)
        said = _predicted(objective, blurred.features)
        rows.append(_row(f"sharpness equalised at {equalise_px} px", said, blurred.wanted, blurred.counted, "as held-out"))
    told(5)
    empty = _seen(encoder, objective, held_out, pictures, content=False, seed=seed)
    rows.append(_row("content-free pictures", _predicted(objective, empty.features), empty.wanted, empty.counted, "<= 0"))
    for name, ceiling in one_view_oracle(objective).items():
        rows.append(PairRow(name=f"oracle: {name} box known", r2=ceiling, low=None, high=None, honest="ceiling of one view"))
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


def _recipe(objective: PairObjective, side_px: int | None = None) -> Recipe:
    """Return the recipe of the evaluation's views, of another side if given: by their name they have the very same boxes."""
    family = objective.evaluation_family()
    return Recipe(families=(family if side_px is None else replace(family, size_px=(side_px, side_px)),))


def _seen(
    encoder: Encoder,
    objective: PairObjective,
    pictures: Pictures,
    number: int,
    *,
    equalise_px: int | None = None,
    content: bool = True,
    seed: int = 0,
) -> _Seen:
    """Encode `number` pictures; without `content`, pictures of one colour with noise on every view."""
    recipe = _recipe(objective, equalise_px)
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


def _across(encoder: Encoder, objective: PairObjective, pictures: Pictures, number: int) -> Tensor:
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


def _row(name: str, predicted: Tensor, wanted: Tensor, counted: Tensor, honest: str) -> PairRow:
    found: R2 = r2_with_interval(predicted, wanted, counted)
    return PairRow(name=name, r2=found.value, low=found.low, high=found.high, honest=honest)


def _mean(values: Tensor, counted: Tensor) -> float:
    return float((values * counted).sum() / counted.sum())


def _position_distance(objective: PairObjective, predicted: Tensor, seen: _Seen) -> float:
    apart = (predicted - seen.wanted)[..., :2] * objective.target_std[:2]
    return _mean(apart.norm(dim=-1), seen.counted)
