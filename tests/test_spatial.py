"""SP against what must come out: targets from boxes by hand, heads against their formulas, and pictures whose answer is known.

Coordinate pictures show where each pixel lies (red: x, green: y), so a learner must reach R2 near 1; pictures of one color show
nothing, so it must stay at 0. Their views are computed from the record's map, not cut by a renderer.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.pipeline.geometry import map_points
from wherefrom.pipeline.laws import Disjoint, Paired
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, Views
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.objective import Progress, Step, random_scope
from wherefrom.train.objectives.pair_heads import AdditiveHead, AttendHead
from wherefrom.train.objectives.pairs import enlarged, law_records, ordered_pairs, r2
from wherefrom.train.objectives.spatial import SpatialPrediction, SpatialSettings

START = Progress(update=0, updates=1, updates_per_epoch=1)
MODEL = ModelSettings(view_size_px=48, patch_size_px=12, width=64, depth=3, heads=2)
PICTURE_PX = 160
SETTINGS = SpatialSettings(
    size_px=48,
    law=Paired(position_max=1.2, log_scale_max=math.log(1.5), side_frac=(0.25, 0.40)),
    both_orders=True,
    mirror="none",
    color=None,
    min_side_px=8,
    weight=1.0,
)


def batch_of(family: ViewFamily, ids: np.ndarray, *, epoch: int = 0, kind: str = "coordinates") -> Batch:
    """Return views of pictures `ids`: "coordinates", or "plain" color with noise on the views, or "leaky", brighter in wide boxes."""
    size = np.full((len(ids), 2), PICTURE_PX, np.int32)
    (record,) = draw_records(ViewRecipe(families=(family,)), seed=0, epoch=epoch, drawn_for=ids, source_size=size)
    geometry, (height, width) = record.geometry, family.size_px
    rng = np.random.default_rng([epoch, *ids])
    look = torch.tensor(np.random.default_rng(7).random((4096, 3))[ids], dtype=torch.float32)[:, None, :, None, None]
    shape = (len(ids), family.views, 1, height, width)
    if kind == "coordinates":
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        places = map_points(geometry.view_to_source, torch.stack([x, y], -1).flatten(0, 1)).float() / PICTURE_PX
        x, y = (place.reshape(shape) for place in places.unbind(-1))
        gain = 0.7 + 0.3 * look[:, :, :1]
        pixels = torch.cat([gain * x, gain * y, look[:, :, 1:2].expand(shape)], 2) * 4 - 2
    else:
        pixels = look.expand(*shape[:2], 3, height, width) * 4 - 2
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)) * 0.07
    if kind == "leaky":
        noise = noise + ((geometry.boxes[..., 2] - geometry.boxes[..., 0]) / 20)[..., None, None, None]
    views = Views(pixels=pixels + noise, geometry=geometry, valid=record.valid, photometric=Photometric.unchanged(len(ids), family.views))
    sample = torch.from_numpy(ids)
    return Batch(sample=sample, drawn_for=sample, label=torch.full((len(ids),), -1), source_size=geometry.source_size, views=(views,))


def trained(settings: SpatialSettings, *, steps: int, lr: float, batch: int, pictures: int, kind: str, fixed: bool = False) -> Step:
    """Train SP on pictures 0 to `pictures`; `fixed` shows the same boxes again and again."""
    with random_scope(0, "encoder"):
        encoder = Encoder(MODEL)
    step = Step(encoder, [SpatialPrediction(settings)], seed=0)
    optimizer = torch.optim.AdamW(step.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for update in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (update + 1) / 30, 4 * (1 - update / steps))
        ids = (np.arange(batch) + update * batch) % pictures
        out = step(
            batch_of(step.families[0], ids, epoch=0 if fixed else update * batch // pictures, kind=kind), replace(START, update=update)
        )
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 3.0)
        optimizer.step()
    return step.eval()


def r2_on(step: Step, *, ids: np.ndarray, kind: str, permuted: bool = False) -> Tensor:
    """Return R2 of every channel on pictures `ids`; `permuted` compares with the next picture's targets."""
    objective = only(step)
    views = batch_of(step.families[0], ids, kind=kind).views[0]
    with torch.no_grad():
        predicted, _ = objective.predict(step.encoder.encode(views))
    targets = objective.targets(views.geometry)
    return r2(predicted, targets.roll(1, 0) if permuted else targets, views.valid[:, objective.pairs].all(-1))


HELD_OUT = np.arange(3000, 3200)


def test_coordinate_pictures_are_learned_on_all_channels_and_only_in_their_own_pictures() -> None:
    step = trained(SETTINGS, steps=240, lr=2e-3, batch=32, pictures=1000, kind="coordinates")
    assert r2_on(step, ids=HELD_OUT, kind="coordinates").min() > 0.9
    assert r2_on(step, ids=HELD_OUT, kind="coordinates", permuted=True).max() <= 0


@pytest.mark.parametrize("steps", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_pictures_of_one_color_teach_nothing(steps: int) -> None:
    step = trained(SETTINGS, steps=steps, lr=2e-3, batch=32, pictures=1000, kind="plain")
    assert r2_on(step, ids=HELD_OUT, kind="plain").abs().max() < 0.05


def test_pictures_of_one_color_teach_size_where_brightness_tells_it() -> None:
    step = trained(SETTINGS, steps=100, lr=2e-3, batch=32, pictures=1000, kind="leaky")
    x, y, scale = r2_on(step, ids=HELD_OUT, kind="leaky").tolist()
    assert scale > 0.2
    assert max(abs(x), abs(y)) < 0.05


def test_eight_pictures_are_learned_by_heart() -> None:
    step = trained(SETTINGS, steps=150, lr=2e-3, batch=8, pictures=8, kind="coordinates", fixed=True)
    batch = batch_of(step.families[0], np.arange(8))
    targets = only(step).targets(batch.views[0].geometry).flatten(0, 1)
    floor = float(targets.var(0, unbiased=False).sum())
    with torch.no_grad():
        loss = float(step(batch, START).loss)
    assert loss < 0.01 * floor
    with torch.no_grad():
        others = float(step(batch_of(step.families[0], np.arange(8, 16)), START).loss)
    assert others > 0.05 * floor


def only(step: Step) -> SpatialPrediction:
    (objective,) = step.objectives.values()
    assert isinstance(objective, SpatialPrediction)
    return objective


def random_features(views: int, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(0)
    return Features(
        summary=torch.randn(3, views, width, generator=generator), tokens=torch.randn(3, views, 2, 3, width, generator=generator)
    )


def objective_of(settings: SpatialSettings, width: int = 8) -> SpatialPrediction:
    objective = SpatialPrediction(settings)
    torch.manual_seed(0)
    objective.setup(Encoder(replace(MODEL, width=width, heads=1, depth=1)))
    return objective


class FixedFeatures:
    """An `encode` that returns the same features, whatever the views."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def __call__(self, views: Views, **_: object) -> Features:
        return self.features


@pytest.mark.core
@pytest.mark.parametrize("projections", [False, True])
def test_the_attending_head_is_the_formula_pair_by_pair(projections: bool) -> None:
    features, head = random_features(4), AttendHead(8, 16, 3, temperature=None, projections=projections)
    predicted, meters = head(features, ordered_pairs(4))
    for row, (r, t) in enumerate(ordered_pairs(4).tolist()):
        for b in range(3):
            query = head.query(features.summary[b, r])
            looked_up = []
            for v in (r, t):
                tokens = features.tokens[b, v].flatten(0, 1)
                weights = torch.softmax(head.key(tokens) @ query / math.sqrt(8), 0)
                looked_up.append((weights.unsqueeze(1) * head.value(tokens)).sum(0))
            torch.testing.assert_close(predicted[b, row], head.mlp(torch.cat(looked_up)))
    assert 0 < float(meters["attention_entropy"]) < 1
    assert float(AttendHead(8, 16, 3, temperature=1e6, projections=False)(features, ordered_pairs(4))[1]["attention_entropy"]) > 0.999


@pytest.mark.core
def test_the_additive_head_is_the_two_layer_mlp_on_both_summaries() -> None:
    features, head, pairs = random_features(4), AdditiveHead(8, 16, 3), ordered_pairs(4)
    both = torch.cat([features.summary[:, pairs[:, 0]], features.summary[:, pairs[:, 1]]], -1)
    weight = torch.cat([head.of_reference.weight, head.of_target.weight], 1)
    expected = head.out(F.gelu(F.linear(both, weight, head.of_reference.bias)))
    torch.testing.assert_close(head(features, pairs)[0], expected)


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, [[0, 1]]),
        ({"both_orders": True}, [[0, 1], [1, 0]]),
        ({"law": Disjoint(), "views": 2}, [[0, 1], [1, 0]]),
        ({"law": Disjoint(), "views": 3}, [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]),
    ],
)
def test_which_pairs_count(changes: dict[str, Any], pairs: list[list[int]]) -> None:
    assert SpatialPrediction(SpatialSettings(**changes)).pairs.tolist() == pairs


@pytest.mark.core
def test_targets_are_those_of_the_boxes_as_cut() -> None:
    objective = objective_of(replace(SETTINGS, scale="log_sides", both_orders=False))
    record = batch_of(objective.families[0], np.arange(50)).views[0].geometry
    raw = objective.targets(record, standardized=False).numpy()[:, 0]
    reference, target = record.boxes.double().numpy().swapaxes(0, 1)
    size_r, size_t = (box[:, 2:] - box[:, :2] for box in (reference, target))
    offset = ((target[:, :2] + target[:, 2:]) - (reference[:, :2] + reference[:, 2:])) / 2
    np.testing.assert_allclose(raw, np.hstack([offset / size_r, np.log(size_t / size_r)]), atol=1e-6)
    back = objective.targets(record)[:, 0] * objective.target_std + objective.target_mean
    np.testing.assert_allclose(back.numpy(), raw, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        SpatialSettings(),
        replace(SETTINGS, both_orders=False, scale="log_sides"),
        SETTINGS,
        SpatialSettings(law=Disjoint(), mirror="none"),
        SpatialSettings(scale="ratio", position="mean"),
    ],
    ids=["closed form", "closed form, both sides", "both orders", "disjoint", "ratio"],
)
def test_standardized_targets_of_other_draws_have_mean_0_and_variance_1(settings: SpatialSettings) -> None:
    objective = objective_of(settings)
    others = law_records(objective.families[0], pictures=6000, seed=11)
    targets = objective.targets(others).double().flatten(0, 1)
    assert targets.mean(0).abs().max() < 0.05
    assert (targets.std(0) - 1).abs().max() < 0.05
    raw = objective.targets(others, standardized=False).double().flatten(0, 1)
    assert (raw.std(0) - 1).abs().max() > 0.1


def test_the_closed_form_is_the_laws_own() -> None:
    objective = objective_of(SpatialSettings())
    law = objective.families[0].law
    assert isinstance(law, Paired)
    assert objective.target_std.tolist() == pytest.approx([math.sqrt((1.5**2 + 0.5**2) / 3)] * 2 + [math.log(2) / math.sqrt(3)])
    assert objective.target_mean.tolist() == [0, 0, 0]
    assert objective_of(SpatialSettings(standardize=False)).target_std.tolist() == [1, 1, 1]


def test_a_mirrored_picture_negates_the_horizontal_target_alone() -> None:
    objective = objective_of(replace(SETTINGS, mirror="picture"))
    record = batch_of(replace(objective.families[0], mirror="none"), np.arange(20)).views[0].geometry
    upright, mirrored = (
        objective.targets(replace(record, flipped=flips), standardized=False) for flips in (record.flipped, ~record.flipped)
    )
    torch.testing.assert_close(mirrored, upright * torch.tensor([-1.0, 1, 1]))


def test_pairs_with_an_invalid_view_are_left_out_and_counted() -> None:
    objective = objective_of(SpatialSettings(law=Disjoint(), views=3, mirror="none", color=None, size_px=48, min_side_px=8))
    batch = batch_of(objective.families[0], np.arange(3))
    (views,) = batch.views
    features = random_features(3)
    valid = torch.ones(3, 3, dtype=torch.bool)
    valid[1, 2] = False
    masked = replace(batch, views=(replace(views, valid=valid),))
    spoilt = Features(summary=features.summary.clone(), tokens=features.tokens.clone())
    spoilt.summary[1, 2], spoilt.tokens[1, 2] = 9.0, 9.0
    losses = [objective(masked, FixedFeatures(each), START).losses for each in (features, spoilt)]
    assert all(torch.equal(losses[0][term], losses[1][term]) for term in ("position", "scale"))
    unmasked = [objective(batch, FixedFeatures(each), START).losses for each in (features, spoilt)]
    assert not torch.equal(unmasked[0]["position"], unmasked[1]["position"])
    assert float(objective(masked, FixedFeatures(features), START).meters["pairs_left_out"]) == pytest.approx(4 / 18)

    nothing = replace(batch, views=(replace(views, valid=torch.zeros(3, 3, dtype=torch.bool)),))
    assert [float(value.detach()) for value in objective(nothing, FixedFeatures(features), START).losses.values()] == [0, 0]


@pytest.mark.core
def test_losses_are_squared_errors_summed_over_channels_with_weights_of_a_tenth() -> None:
    objective = objective_of(SpatialSettings(size_px=48, mirror="none", color=None, min_side_px=8, scale="log_sides"))
    batch, features = batch_of(objective.families[0], np.arange(3)), random_features(2)
    error = (objective.predict(features)[0] - objective.targets(batch.views[0].geometry)).square().mean((0, 1))
    terms = objective(batch, FixedFeatures(features), START)
    torch.testing.assert_close(terms.losses["position"], error[:2].sum())
    torch.testing.assert_close(terms.losses["scale"], error[2:].sum())
    assert (objective.weight, objective.weights) == (0.1, {"position": 1.0, "scale": 1.0})
    assert set(terms.meters) == {"r2_x", "r2_y", "r2_width", "r2_height", "logit_max", "attention_entropy", "pairs_left_out"}
    objective.settings = replace(objective.settings, loss="smooth_l1", smooth_l1_beta=1e-6)
    targets = objective.targets(batch.views[0].geometry)
    absolute = (objective.predict(features)[0] - targets).abs().mean((0, 1))[:2].sum()
    torch.testing.assert_close(objective(batch, FixedFeatures(features), START).losses["position"], absolute, atol=1e-4, rtol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize("head", ["attend", "additive"])
@pytest.mark.parametrize(
    ("stop", "reference_learns", "target_learns"), [("none", True, True), ("reference", False, True), ("encoder", False, False)]
)
def test_where_the_gradient_stops(head: Any, stop: Any, reference_learns: bool, target_learns: bool) -> None:
    objective = objective_of(SpatialSettings(head=head, stop=stop))
    features = random_features(2)
    summary, tokens = (part.requires_grad_() for part in (features.summary, features.tokens))
    objective.predict(features)[0].square().sum().backward()

    def has_gradient(view: int) -> bool:
        return any(part.grad is not None and bool(part.grad[:, view].any()) for part in (summary, tokens))

    assert (has_gradient(0), has_gradient(1)) == (reference_learns, target_learns)
    assert all(bool(parameter.grad.any()) for parameter in objective.head.parameters() if parameter.grad is not None)


@pytest.mark.core
def test_attention_is_computed_in_float32_under_autocast() -> None:
    head, features = AttendHead(8, 16, 3, temperature=None, projections=False), random_features(2)
    huge = Features(summary=features.summary * 60, tokens=features.tokens * 60)
    with torch.autocast("cpu", torch.bfloat16):
        _, meters = head(huge, ordered_pairs(2))
    _, expected = head(huge, ordered_pairs(2))
    torch.testing.assert_close(meters, expected, rtol=1e-6, atol=0)


def test_equalized_views_are_rendered_small_and_shown_at_full_size() -> None:
    objective = objective_of(replace(SETTINGS, equalize_px=24))
    assert objective.families[0].size_px == (24, 24)
    batch, encoded = batch_of(objective.families[0], np.arange(3)), []

    def encode(views: Views, **_: object) -> Features:
        encoded.append(views)
        return random_features(2)

    objective(batch, encode, START)
    assert encoded[0].geometry.size_px == tuple(encoded[0].pixels.shape[-2:]) == (48, 48)
    spectrum = torch.fft.rfft2(enlarged(batch.views[0], 48).pixels).abs()
    assert spectrum[..., 24, :].mean() < 0.2 * spectrum[..., 6, :].mean()


@pytest.mark.core
def test_r2_leaves_out_what_does_not_count() -> None:
    targets, predicted = torch.randn(5, 4, 2), torch.randn(5, 4, 2)
    mask = torch.rand(5, 4) < 0.6
    prediction, target = predicted[mask].double(), targets[mask].double()
    expected = 1 - (prediction - target).square().mean(0) / target.var(0, unbiased=False)
    torch.testing.assert_close(r2(predicted, targets, mask).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.core
def test_messages_name_the_thing_and_the_mend() -> None:
    for changes in ({"mirror": "picture"}, {"mirror": "none", "turns": True}):
        with pytest.raises(ValueError, match=r"axes='source' with .* use axes='view'"):
            SpatialSettings(axes="source", **changes)  # type: ignore[arg-type]
    assert SpatialSettings(axes="source", mirror="none").axes == "source"
    with pytest.raises(ValueError, match="views=1: a pair needs 2"):
        SpatialSettings(law=Disjoint(), views=1)
    with pytest.raises(ValueError, match="views=6 of family 'spatial': the paired law draws 2; take views=2"):
        SpatialSettings(views=6)
    with pytest.raises(ValueError, match="equalize_px=200"):
        SpatialSettings(equalize_px=200)
