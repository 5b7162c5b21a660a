"""How good an encoder and its head are by pair geometry: R2 on held-out pairs, and everything that it must be read beside.

Here: which views are cut for which row, and the report as plain data and as tables.
Not here: statistics and the controls that need no picture (pair_controls.py), labels (labels.py), when to evaluate (loop.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.labels import draw_ids
from wherefrom.train.evaluation.pair_controls import (
    control_heads,
    one_view_oracle,
    parts_of,
    r2_with_interval,
    structure_gates,
    train_heads,
)
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table, encoded, evaluation_mode
from wherefrom.train.objective import random_scope
from wherefrom.train.objectives.pairs import PairObjective
from wherefrom.train.ranks import Ranks

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
        """Return how many pictures and pairs there were, R2, how to read it, errors and contradictions: rows of text within 80 columns."""
        first, *others = self.rows
        numbers = ((f"{self.pictures} held-out pictures, {self.pairs} pairs, {self.left_out} left out",),)
        r2_rows = [("R2", *self.channels, "expected"), (first.name, *map(r2_text, first.r2), first.expected)]
        if first.low is not None and first.high is not None:
            r2_rows += [(f"  95 % interval, {side}", *map(r2_text, end), "") for side, end in (("from", first.low), ("to", first.high))]
        r2_rows += [(row.name, *map(r2_text, row.r2), row.expected) for row in others]
        errors = (
            ("error", "model", "mean", "expected"),
            ("loss", f"{self.loss:.4f}", f"{self.constant_loss:.4f}", "model lower"),
            ("distance of positions", f"{self.position_distance:.3f}", f"{self.constant_position_distance:.3f}", "model lower"),
        )
        gates = [(GATE_NAMES[name], f"{value:.3f}", "near 0") for name, value in self.gates.items()]
        notes = tuple((note,) for note in NOTES)
        return numbers, tuple(r2_rows), notes, errors, (("contradictions", "error", "expected"), *gates)

    def row(self, name: str) -> PairRow:
        """Return one row by its name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pairs:
    """Pairs of a set of pictures: features of their views in half precision, what is to be predicted, and which pairs count."""

    features: Features
    targets: Tensor  # (B, P, C) standardized
    mask: Tensor  # (B, P) bool: those that count


def r2_text(r2: float) -> str:
    """Return R2 in few characters, however bad it is."""
    return f"{r2:.3f}" if r2 > -9.9995 else f"{r2:.0f}"


def pair_r2(encoder: Encoder, objective: PairObjective, held_out: PictureSource, *, pictures: int, ranks: Ranks | None = None) -> PairRow:
    """Return the R2 of the objective's own head on held-out pairs; the short form, for during a run.

    Raises: NoPairsError, as evaluate_pairs.
    """
    pairs = _encode_pairs(encoder, objective, held_out, pictures, ranks)
    return _row("held-out pairs", _predict(objective, pairs.features), pairs, "")


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
    ranks: Ranks | None = None,
) -> PairReport:
    """Evaluate the prediction of pairs by R2, beside every control.

    Heads of the controls are trained alike on frozen features of `train_pictures` training pictures, `head_steps` steps. ranks: all of them
    call, and share the pictures.
    Raises: NoPairsError if no pair counts, or there are fewer than 2 pictures.
    """

    def report_progress(done: int) -> None:
        if progress is not None:
            progress("pair geometry", done, 6)

    pairs = _encode_pairs(encoder, objective, held_out, pictures, ranks)
    predicted = _predict(objective, pairs.features)
    report_progress(1)
    next_pairs = replace(pairs, targets=pairs.targets.roll(1, 0), mask=pairs.mask & pairs.mask.roll(1, 0))
    rows = [_row("held-out pairs", predicted, pairs, "1 is perfect")]
    if bool(next_pairs.mask.any()):  # else no picture beside one that counts does so
        rows.append(_row("targets of the next picture", predicted, next_pairs, "at most 0"))
    rows.append(_row("pairs across pictures", _predict_across_pictures(encoder, objective, held_out, pictures, ranks), pairs, "lower"))
    report_progress(2)
    train_pairs = _encode_pairs(encoder, objective, train, train_pictures, ranks)
    report_progress(3)
    heads = _trained_control_heads(objective, train_pairs, steps=head_steps, seed=seed)
    report_progress(4)
    rows += _control_head_rows(heads, objective, pairs)
    if objective.evaluation_family().views > 1:  # regions of one view are equally sharp as they are
        equalize_px = min(equalize_px, objective.evaluation_family().size_px[0] // 2)
        equalized = _encode_pairs(encoder, objective, held_out, pictures, ranks, equalize_px=equalize_px)
        name = f"sharpness equalized at {equalize_px} px"
        rows.append(_row(name, _predict(objective, equalized.features), equalized, "as held-out pairs"))
    report_progress(5)
    content_free = _encode_pairs(encoder, objective, held_out, pictures, ranks, content=False, seed=seed)
    rows.append(_row("content-free pictures", _predict(objective, content_free.features), content_free, "at most 0"))
    for name, ceiling in one_view_oracle(objective).items():
        rows.append(PairRow(name=f"oracle: {name} box known", r2=ceiling, low=None, high=None, expected="ceiling of 1 view"))
    report_progress(6)
    with evaluation_mode(encoder, objective):
        gates = structure_gates(objective, pairs.features)
    return _report(objective, predicted, pairs, rows=tuple(rows), gates=gates)


def _report(
    objective: PairObjective, predicted: Tensor, pairs: _Pairs, *, rows: tuple[PairRow, ...], gates: dict[str, float]
) -> PairReport:
    """Put rows and gates beside the loss and the distance of positions, of the predictions and of the law's mean."""
    weight = {term: objective.weights.get(term, 1.0) for term in ("position", "scale")}
    channel_weights = [weight["position"]] * 2 + [weight["scale"]] * (len(objective.channels) - 2)
    weights = torch.tensor(channel_weights, device=pairs.targets.device)
    return PairReport(
        protocol=PAIRS_PROTOCOL,
        law=objective.settings.law_name,
        channels=objective.channels,
        pictures=len(pairs.targets),
        pairs=int(pairs.mask.sum()),
        left_out=int((~pairs.mask).sum()),
        loss=_mean((predicted - pairs.targets).square() @ weights, pairs.mask),
        constant_loss=_mean(pairs.targets.square() @ weights, pairs.mask),
        position_distance=_position_distance(objective, predicted, pairs),
        constant_position_distance=_position_distance(objective, torch.zeros_like(predicted), pairs),
        rows=rows,
        gates=gates,
    )


def _recipe(objective: PairObjective, side_px: int | None = None) -> ViewRecipe:
    """Return the recipe of the evaluation's views, of another side if given: by their name they have the very same boxes."""
    family = objective.evaluation_family()
    return ViewRecipe(families=(family if side_px is None else replace(family, size_px=(side_px, side_px)),))


def _encode_pairs(
    encoder: Encoder,
    objective: PairObjective,
    pictures: PictureSource,
    number: int,
    ranks: Ranks | None,
    *,
    equalize_px: int | None = None,
    content: bool = True,
    seed: int = 0,
) -> _Pairs:
    """Encode `number` pictures; without `content`, pictures of one color with noise on every view."""
    recipe = _recipe(objective, equalize_px)

    def encode(ids: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = pictures.views(recipe, ids) if content else pictures.one_color_views(recipe, ids)
        views = batch.views[0] if content else _with_noise(batch.views[0], seed, int(ids[0]))
        features = objective.features(views, encoder.encode)
        return {
            "summary": features.summary.float(),
            "tokens": features.tokens.half(),
            "targets": objective.targets(views.geometry),
            "mask": objective.pair_mask(views.geometry, views.valid),
        }

    with evaluation_mode(encoder, objective):
        found = encoded(draw_ids(pictures, number), encode, ranks)
    device = objective.pairs.device
    summary, tokens, targets, mask = (found[name].to(device) for name in ("summary", "tokens", "targets", "mask"))
    return _Pairs(features=Features(summary=summary, tokens=tokens), targets=targets, mask=mask)


def _with_noise(views: Views, seed: int, first: int) -> Views:
    """Return the views with noise that is added after resizing: before it, its strength would tell the size of the box."""
    with random_scope(seed, "noise", first, device=views.pixels.device):
        return replace(views, pixels=views.pixels + 0.3 * torch.randn_like(views.pixels))


def _predict_across_pictures(
    encoder: Encoder, objective: PairObjective, pictures: PictureSource, number: int, ranks: Ranks | None
) -> Tensor:
    """Predict pairs whose target view is cut from the next picture, by the same draws."""
    recipe = _recipe(objective)
    all_ids = draw_ids(pictures, number)
    next_of = dict(zip(all_ids.tolist(), np.roll(all_ids, -1).tolist(), strict=True))

    def predict(ids: NDArray[np.int64]) -> dict[str, Tensor]:
        next_ids = np.array([next_of[sample] for sample in ids.tolist()])
        own = objective.features(pictures.views(recipe, ids).views[0], encoder.encode)
        other = objective.features(pictures.views(recipe, next_ids, ids).views[0], encoder.encode)
        pairs = objective.pairs + torch.tensor([0, own.summary.shape[1]], device=objective.pairs.device)
        return {"predicted": objective.predict(_beside(own, other), pairs)[0].float()}

    with evaluation_mode(encoder, objective):
        return encoded(all_ids, predict, ranks)["predicted"].to(objective.pairs.device)


def _trained_control_heads(objective: PairObjective, pairs: _Pairs, *, steps: int, seed: int) -> dict[str, nn.Module]:
    """Return the control heads, trained on frozen features of pairs, by their row's name."""
    heads = control_heads(objective, pairs.features, seed=seed)
    heads = {name: head.to(objective.pairs.device) for name, head in heads.items()}
    train_heads(list(heads.values()), pairs.features, pairs.targets, pairs.mask, objective.pairs, steps=steps, seed=seed)
    return heads


def _control_head_rows(heads: Mapping[str, nn.Module], objective: PairObjective, pairs: _Pairs) -> list[PairRow]:
    """Return the rows of control heads on held-out pairs."""
    rows = []
    for name, head in heads.items():
        with evaluation_mode(head):
            predicted = torch.cat([head(part, objective.pairs)[0].float() for part in parts_of(pairs.features)])
        rows.append(_row(name, predicted, pairs, "as held-out pairs" if name == "fresh full head" else "lower than fresh"))
    return rows


def _beside(one: Features, other: Features) -> Features:
    """Return the views of both, those of `one` first."""
    return Features(summary=torch.cat([one.summary, other.summary], 1), tokens=torch.cat([one.tokens, other.tokens], 1))


def _predict(objective: PairObjective, features: Features) -> Tensor:
    with evaluation_mode(objective):
        return torch.cat([objective.predict(part)[0].float() for part in parts_of(features)])


def _row(name: str, predicted: Tensor, pairs: _Pairs, expected: str) -> PairRow:
    r2 = r2_with_interval(predicted, pairs.targets, pairs.mask)
    return PairRow(name=name, r2=r2.value, low=r2.low, high=r2.high, expected=expected)


def _mean(values: Tensor, mask: Tensor) -> float:
    return float((values * mask).sum() / mask.sum())


def _position_distance(objective: PairObjective, predicted: Tensor, pairs: _Pairs) -> float:
    error = (predicted - pairs.targets)[..., :2] * objective.target_std[:2]
    return _mean(error.norm(dim=-1), pairs.mask)
