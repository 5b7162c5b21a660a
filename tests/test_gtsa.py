"""GTSA against figures that its author's code gave on the same inputs, float64 (tests/data/hosts/gtsa.json names the commit), and its
geometry against coordinates: where what student and teacher pool comes from, fed as tokens.

Compared against: those figures, brute force on records, and the nearest slips, which the same tolerances tell apart.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_formulas import figures, gap, picture, tensor, wave
from host_runs import METHODS, VIT, Rows, method_run, trainer_of, updates_of
from host_steps import assert_near, batch_of, fill
from torch import Tensor

from wherefrom.pipeline import Batch, Overlapping, ViewRecipe, Views, draw_records
from wherefrom.train import GTSA, Encoder, GTSASettings, ModelSettings, OptimSettings, Progress, Step, recipe
from wherefrom.train.objectives.gtsa import MapHead, ViewPairs, view_pairs
from wherefrom.train.optimizer import clip_gradients, gated_step, make_optimizer, set_rates

FIGURES = figures("gtsa")
CROPS, ANGLES = torch.tensor(FIGURES["boxes"]["crops"]).float(), torch.tensor(FIGURES["boxes"]["angles"])


def views_of(name: str, pixels: Tensor, numbers: Sequence[int], *, turned: int = 0) -> Views:
    """Return views of the figures' boxes and turns, pixels (3, V, 3, px, px); `turned`: by so many quarters more than they are."""
    views = batch_of((name, pixels)).views[0]
    turns = (ANGLES[:, list(numbers)] // 90 + turned) % 4
    record = replace(views.geometry, boxes=CROPS[:, list(numbers)], quarter_turns=turns)
    return replace(views, geometry=record)


def channels_last(array: Any) -> Tensor:
    """Return maps (2 * B, D, h, w), view after view, as (B, 2, h, w, D)."""
    return tensor(array).unflatten(0, (2, -1)).transpose(0, 1).movedim(2, -1)


# Against the author's figures


@pytest.mark.core
def test_common_boxes_are_the_authors() -> None:
    large, small = (views_of(name, torch.zeros(3, 2, 3, px, px), at) for name, px, at in (("g", 48, (0, 1)), ("l", 24, (2, 3))))
    teachers, students = tensor(FIGURES["boxes"]["gc"]), tensor(FIGURES["boxes"]["all"])  # (B, G, V, 4), (B, V, G, 4)
    for views, at in ((large, slice(0, 2)), (small, slice(2, 4))):
        common = large.geometry.common(views.geometry)
        assert torch.equal(common.boxes, teachers[:, :, at])
        assert torch.equal(common.other_boxes, students[:, at].transpose(1, 2))


def pairs_of_figures(student: Sequence[Tensor], *, turned: int = 0) -> list[ViewPairs]:
    """Return the pairs of the figures' maps; `turned`: the student's local views taken for turned once more."""
    teacher = channels_last(wave((6, 5, 12, 12), 1))
    large = views_of("g", torch.zeros(3, 2, 3, 48, 48), (0, 1))
    small = views_of("l", torch.zeros(3, 2, 3, 24, 24), (2, 3), turned=turned)
    return [
        *(
            view_pairs(large[:, one], teacher[:, [one]], large[:, other], student[0][:, [other]], bins=8, min_cells=0)
            for one, other in ((0, 1), (1, 0))
        ),
        view_pairs(large, teacher, small, student[1], bins=4, min_cells=0),
    ]


def as_student() -> tuple[Tensor, Tensor]:
    return channels_last(wave((6, 5, 12, 12), 2)).requires_grad_(), channels_last(wave((6, 5, 6, 6), 3)).requires_grad_()


@pytest.mark.core
@pytest.mark.parametrize("term", ["region", "patch"])
def test_loss_and_gradient_of_both_dense_terms_are_the_authors(term: str) -> None:
    figure = FIGURES["loss"]

    def loss_of(student: Sequence[Tensor], *, matched_frac: float = 0.5, **slip: Any) -> Tensor:
        groups = pairs_of_figures(student, **slip)
        similarity = [m.region_similarity() if term == "region" else m.patch_similarity(matched_frac) for m in groups]
        return -torch.cat([each.flatten(1) for each in similarity], 1).mean()

    student = as_student()
    loss = loss_of(student)
    loss.backward()
    assert gap(loss, figure[term]) < 1e-12
    for own, theirs in zip(student, figure[f"{term}_grads"], strict=True):
        assert own.grad is not None
        assert gap(own.grad.movedim(-1, 2).transpose(0, 1).flatten(0, 1), theirs) < 1e-10
    slip: dict[str, Any] = {"turned": 1} if term == "region" else {"matched_frac": 1.0}
    assert gap(loss_of(as_student(), **slip), figure[term]) > 1e-2


def theirs_of(name: str) -> str:
    """Return how the author calls a parameter of the encoder, the projector, the predictor, or the head of turns."""
    part, _, rest = name.partition(".")
    rest = re.sub(r"^convs\.(\d+)\.", r"blocks.\1.0.", rest)
    rest = re.sub(r"^out\.", "proj.", rest)
    parts = {"model": "base_encoder", "rotation": "rot_predictor"}
    return f"{parts.get(part, f'base_{part}')}.{rest}"


@pytest.mark.core
@pytest.mark.parametrize("case", ["projector_of_8", "projector_of_6", "predictor"])
def test_heads_are_the_authors(case: str) -> None:
    figure = FIGURES["heads"][case]
    width = 10 if case == "predictor" else int(case[-1])
    head = MapHead(
        width, 10 if case == "predictor" else 8, 10, layers=1 if case == "predictor" else 2, residual=case != "predictor"
    ).double()
    own = {theirs_of(f"x.{name}").removeprefix("base_x."): p for name, p in head.named_parameters()}
    assert {name: p.numel() for name, p in own.items()} == {name: math.prod(shape) for name, shape in figure["shapes"].items()}
    fill(head, lambda name: theirs_of(f"x.{name}").removeprefix("base_x."))
    x = tensor(wave((2, 10, 4, 4) if case == "predictor" else (2, 16, width), 11))
    maps = (x.movedim(1, -1) if case == "predictor" else x.unflatten(1, (4, 4)))[:, None].requires_grad_()
    out = head(maps)[:, 0].movedim(-1, 1)
    assert gap(out, figure["out"]) < 1e-12
    (out * tensor(wave(tuple(out.shape), 12))).sum().backward()
    assert maps.grad is not None
    gradient = maps.grad[:, 0]
    assert gap(gradient.movedim(-1, 1) if case == "predictor" else gradient.flatten(1, 2), figure["grad_x"]) < 1e-10
    for name, theirs in figure["grads"].items():
        assert own[name].grad is not None
        assert_near(own[name].grad, shaped_as_ours(theirs, own[name]), name, within=1e-10)


def shaped_as_ours(theirs: Any, own: Tensor) -> Any:
    """Return figures of a 1 x 1 convolution's weight, (out, in, 1, 1), as those of a linear layer's."""
    if isinstance(theirs, list):
        return np.reshape(theirs, tuple(own.shape)).tolist()
    return theirs


@pytest.mark.core
def test_heads_start_as_the_authors() -> None:
    head, figure = MapHead(384, 384, 768, layers=2, residual=True), FIGURES["heads"]["starts"]
    layers = [*head.convs, head.out]
    assert [layer.weight.std().item() for layer in layers] == pytest.approx(figure["std"], rel=0.02)  # type: ignore[union-attr, operator]
    assert [layer.bias.abs().max().item() for layer in layers] == figure["bias"]  # type: ignore[union-attr, operator]


def runs_of(**slips: Any) -> Iterator[tuple[int, Step, GTSA, Mapping[str, Tensor]]]:
    """Make the six updates, three epochs of two, as a trainer makes them, with the author's weights at first; yield after each."""
    figure = FIGURES["end_to_end"]
    momentum = slips.pop("teacher_momentum", 0.9)
    settings = GTSASettings(
        size_px=48,
        local_px=24,
        local_views=2,
        region_bins=slips.pop("region_bins", 8),
        hidden=16,
        out=12,
        rotation_hidden=(24, 24, 12),
        teacher_momentum=momentum,
        **{"patch_from_epoch": 1.0, **slips},
    )
    encoder = Encoder(
        ModelSettings(name="vit_small_patch16_224", view_size_px=48, patch_size_px=4, width=16, depth=2, heads=2, resampling="plain")
    )
    fill(encoder.double(), theirs_of)
    gtsa = GTSA(settings)
    step = Step(encoder, [gtsa], seed=0).double().train()
    for part in ("projector", "predictor", "rotation"):
        fill(getattr(gtsa, part), lambda name, part=part: theirs_of(f"{part}.{name}"))
    gtsa.teacher_projector.load_state_dict(gtsa.projector.state_dict())
    optimizer = make_optimizer(step, OptimSettings(betas=(0.9, 0.999)), step.parameter_rules())
    for update in range(6):
        progress = Progress(update=update, updates=6, updates_per_epoch=2)
        pixels = [tensor(picture((3, 3, px, px), v, update)) for v, px in enumerate((48, 48, 24, 24))]
        large, small = (
            views_of(n, torch.stack(p, 1), at) for n, p, at in (("gtsa", pixels[:2], (0, 1)), ("gtsa_local", pixels[2:], (2, 3)))
        )
        batch = replace(batch_of(("gtsa", large.pixels)), views=(large, small))
        output = step(batch, progress)
        output.loss.backward()
        clip_gradients(step.clip_groups(), 0.3, each=True)
        gradients = {name: p.grad for name, p in named_as_theirs(step, gtsa).items() if p.grad is not None}
        set_rates(optimizer, lr=figure["lr"][update], peak_lr=1.0, weight_decay=figure["weight_decay"][update])
        gated_step(optimizer, torch.tensor(True))
        found = {name: gradient.clone() for name, gradient in gradients.items()}
        optimizer.zero_grad()
        yield update, step, gtsa, dict(output.losses) | found  # their teacher follows before the next update, so it is looked at before
        step.after_step(progress, output.seen)


def named_as_theirs(step: Step, gtsa: GTSA) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {theirs_of(name): p for name, p in step.encoder.named_parameters()}
    for part in ("projector", "predictor", "rotation"):
        named |= {theirs_of(f"{part}.{name}"): p for name, p in getattr(gtsa, part).named_parameters()}
    named |= {theirs_of(name).replace("base_", "momentum_"): p for name, p in gtsa.teacher.named_parameters()}
    return named | {
        theirs_of(f"projector.{name}").replace("base_", "momentum_"): p for name, p in gtsa.teacher_projector.named_parameters()
    }


def furthest_from_figures(**slips: Any) -> float:
    """Return how far losses, clipped gradients, students and teachers of a run are from the figures."""
    figure, gaps = FIGURES["end_to_end"], []
    for update, step, gtsa, found in runs_of(**slips):
        for term, theirs in zip(("region", "patch", "rotation"), figure["losses"][update], strict=True):
            if f"gtsa/{term}" in found:
                gaps.append(gap(found[f"gtsa/{term}"], theirs))
        gaps += [gap(found[name], theirs) for name, theirs in figure["grads_clipped"].get(f"update_{update}", {}).items()]
        own = named_as_theirs(step, gtsa)
        gaps += [gap(own[name], theirs) for name, theirs in figure["snapshots"].get(f"after_update_{update}", {}).items()]
    return max(gaps)


@pytest.mark.core
def test_student_and_teacher_go_as_the_authors() -> None:
    assert furthest_from_figures() < 1e-12


@pytest.mark.parametrize("slip", [{"patch_from_epoch": 0.0}, {"teacher_momentum": 0.99}, {"weight_rotation": 1.0}, {"region_bins": 7}])
def test_the_nearest_slips_go_otherwise(slip: dict[str, Any]) -> None:
    assert furthest_from_figures(**slip) > 1e-3


# Geometry


def drawn_views(settings: GTSASettings, *, mirrored: bool, pictures: int = 300) -> tuple[Views, Views]:
    """Return the global and local views of pictures of many shapes as their laws draw them, without pixels; mirrored by half, if so set."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 640, (pictures, 2)).astype(np.int32)
    families = tuple(replace(family, mirror="view" if mirrored else "none") for family in settings.families("gtsa"))
    records = draw_records(ViewRecipe(families=families), seed=0, epoch=0, drawn_for=np.arange(pictures), source_size=sizes)
    large, small = (Views.of(record, torch.zeros(()).expand(*record.valid.shape, 3, *record.geometry.size_px)) for record in records)
    return large, small


def places(views: Views, patch_px: int) -> Tensor:
    """Return where in the source the center of every token cell lies, (B, V, h, w, 2) float32: maps of coordinates."""
    cells = views.geometry.size_px[0] // patch_px
    boxes = views.geometry.token_boxes((cells, cells))
    return ((boxes[..., :2] + boxes[..., 2:]) / 2).unflatten(2, (cells, cells)).float()


def apart_in_cells(group: ViewPairs, students: Views, patch_px: int) -> Tensor:
    """Return how far apart what both pool comes from, in cells of the student's map: (n, bins, bins) of the n pairs that count."""
    to_view = students.geometry.source_to_view[:, None, :, :, :2]  # (B, 1, W, 2, 2)
    teacher, student = group.pooled()
    apart = torch.einsum("bgwxy,bgwijy->bgwijx", to_view.expand(*group.counted.shape, 2, 2), (teacher - student).double())
    return apart.norm(dim=-1)[group.counted] / patch_px


@pytest.mark.core
@pytest.mark.parametrize("mirrored", [False, True])
def test_student_and_teacher_pool_the_same_places_for_all_turns(mirrored: bool) -> None:
    large, small = drawn_views(GTSASettings(), mirrored=mirrored)
    a, b = slice(0, 1), slice(1, 2)
    for teachers, students, bins in ((large[:, a], large[:, b], 10), (large[:, b], large[:, a], 10), (large, small, 4)):
        group = view_pairs(teachers, places(teachers, 16), students, places(students, 16), bins=bins, min_cells=0)
        apart = apart_in_cells(group, students, 16)
        turns, flips = (each[group.counted] for each in (group.common.quarter_turns, group.common.flipped))
        for flipped in {False, mirrored}:
            for turn in range(4):
                chosen = (turns == turn) & (flips == flipped)
                assert apart[chosen].quantile(0.95) < 0.2
        assert apart[:, 1:-1, 1:-1].quantile(0.95) < 1e-4  # what lies between is where maps end, and tokens are held
        for more in (1, 2, 3):
            wrong = replace(group, common=replace(group.common, quarter_turns=(group.common.quarter_turns + more) % 4))
            assert apart_in_cells(wrong, students, 16).quantile(0.95) > 5 * 0.2
        if mirrored:
            unmirrored = replace(group, common=replace(group.common, flipped=torch.zeros_like(group.common.flipped)))
            assert apart_in_cells(unmirrored, students, 16).quantile(0.95) > 5 * 0.2


@pytest.mark.core
def test_all_views_meet_and_are_turned_and_none_is_mirrored() -> None:
    large, small = drawn_views(GTSASettings(), mirrored=False)
    picture_area = large.geometry.source_size.prod(-1).double()
    shared = large.geometry.overlap_area(large.geometry)[:, 0, 1] / picture_area
    of_local = (large.geometry.overlap_area(small.geometry) / picture_area[:, None, None]).amin(1)
    assert bool((shared >= 0.02)[large.valid.all(1)].all()) and bool(large.valid.all())
    assert bool((of_local >= 0.01)[small.valid].all()) and bool(small.valid.all())
    assert 0.01 <= of_local[small.valid].min() < 0.012  # the bound is reached
    for views in (large, small):
        shares = torch.bincount(views.geometry.quarter_turns.flatten(), minlength=4) / views.valid.numel()
        assert bool((shares - 0.25).abs().max() < 0.08) and not views.geometry.flipped.any()


@pytest.mark.core
def test_a_bound_in_cells_leaves_narrow_pairs_out() -> None:
    large, small = drawn_views(GTSASettings(), mirrored=False)
    teacher, student = torch.zeros(300, 2, 14, 14, 1), torch.zeros(300, 8, 6, 6, 1)
    common = large.geometry.common(small.geometry)
    sides = [boxes[..., 2:] - boxes[..., :2] for boxes in (common.boxes * 14 / 224, common.other_boxes * 6 / 96)]
    narrowest = torch.stack(sides).amin((0, -1))
    for bound, share in ((0.0, 1.0), (1.5, 0.96), (4.0, 0.74)):
        counted = view_pairs(large, teacher, small, student, bins=4, min_cells=bound).counted
        clear = (narrowest - bound).abs() > 1e-9  # not on the bound but for rounding
        assert torch.equal(counted[clear], (narrowest > bound)[clear])
        assert counted.float().mean() == pytest.approx(share, abs=0.01)


# Which pairs count, and when


def small_step(**changes: Any) -> tuple[Step, Batch]:
    """Return a step of GTSA at the size of the gates, and a batch of four pictures as its laws draw them, their pixels noise."""
    settings = replace(METHODS["gtsa"].settings, **changes)  # type: ignore[type-var]
    torch.manual_seed(0)
    step = Step(Encoder(replace(VIT, drop_path=0.0)), [settings.objective("gtsa")], seed=0).train()
    drawn_for, size = np.arange(4), np.full((4, 2), (90, 120), np.int32)
    records = draw_records(ViewRecipe(families=step.families), seed=0, epoch=0, drawn_for=drawn_for, source_size=size)
    views = tuple(Views.of(record, torch.randn(*record.valid.shape, 3, *record.geometry.size_px)) for record in records)
    return step, replace(batch_of(("gtsa", views[0].pixels)), views=views)


def at(epoch: float) -> Progress:
    return Progress(update=round(10 * epoch), updates=1000, updates_per_epoch=10)


def with_valid(batch: Batch, large: Tensor | bool, small: Tensor | bool) -> Batch:
    """Return a batch with these views valid, (B, V) or all alike."""
    views = (
        replace(v, valid=torch.as_tensor(valid).expand_as(v.valid).clone()) for v, valid in zip(batch.views, (large, small), strict=True)
    )
    return replace(batch, views=tuple(views))


@pytest.mark.core
def test_patches_are_matched_from_their_epoch_on_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[float] = []
    match = ViewPairs.patch_similarity
    monkeypatch.setattr(ViewPairs, "patch_similarity", lambda self, share: computed.append(share) or match(self, share))
    step, batch = small_step(patch_from_epoch=2.0)
    for epoch, terms in ((0.0, 2), (1.9, 2), (2.0, 3), (9.0, 3)):
        computed.clear()
        losses = step(batch, at(epoch)).losses
        assert len(losses) == terms and ("gtsa/patch" in losses) == (terms == 3) == bool(computed)
    assert GTSASettings().patch_from_epoch == FIGURES["recipe"]["warmup_epochs"] + 1


@pytest.mark.core
def test_terms_without_weight_are_not_computed_and_have_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ViewPairs, "patch_similarity", None)
    step, batch = small_step(weight_patch=0.0, weight_rotation=0.0)
    out = step(batch, at(20))
    assert set(out.losses) == {"gtsa/region"} and not any("rotation" in name for name, _ in step.named_parameters())


@pytest.mark.core
@pytest.mark.parametrize("bound", [False, True])
def test_a_batch_in_which_no_pair_counts_has_losses_and_gradients_of_0(bound: bool) -> None:
    """By a bound that no pair keeps, or by views that are all invalid."""
    step, batch = small_step(**({"min_cells": 100.0} if bound else {}))
    out = step(batch if bound else with_valid(batch, False, False), at(0))
    assert out.losses["gtsa/region"] == out.losses["gtsa/patch"] == 0
    assert bool(out.losses["gtsa/rotation"] == 0) == (not bound)  # the turns of valid views count, whatever they share
    assert out.meters["gtsa/pairs_left_out"] == 1
    assert all(value.isfinite() for value in (out.loss, *out.meters.values()))
    out.loss.backward()
    for name, p in step.named_parameters():
        if p.grad is not None:
            assert bool(p.grad.isfinite().all())
            if not bound or name.startswith(("objectives.gtsa.projector", "objectives.gtsa.predictor")):
                assert not p.grad.any(), name
    assert small_step()[0](batch, at(0)).losses["gtsa/region"] != 0  # control


@pytest.mark.core
def test_pairs_that_do_not_count_are_left_out_of_the_mean_and_counted() -> None:
    step, batch = small_step()
    whole = step(batch, at(0))
    large, small = (torch.ones_like(views.valid) for views in batch.views)
    large[2:], small[2:] = False, False
    small[0, 1] = False
    half = step(with_valid(batch, large, small), at(0))
    pairs = 2 + 2 * 2
    assert half.meters["gtsa/pairs_left_out"].item() == pytest.approx(1 - (2 * pairs - 2) / (4 * pairs))
    large[1], small[1] = False, False
    large[0] = True
    two = step(with_valid(batch, large, small)[:1], at(0))  # one picture, of which a local view does not count
    alone = step(with_valid(batch, large, small), at(0))
    for term in ("gtsa/region", "gtsa/patch", "gtsa/rotation"):
        assert alone.losses[term] == pytest.approx(two.losses[term].item(), rel=1e-5)
        assert alone.losses[term] != pytest.approx(whole.losses[term].item(), rel=1e-3)


@pytest.mark.core
def test_the_teacher_is_a_slow_copy_without_gradient_that_follows() -> None:
    step, batch = small_step(teacher_momentum=0.9)
    gtsa = step.objectives["gtsa"]
    assert isinstance(gtsa, GTSA)
    pairs = ((gtsa.teacher, step.encoder), (gtsa.teacher_projector, gtsa.projector))
    start = [[p.clone() for p in slow.parameters()] for slow, _ in pairs]
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=1.0)
    step(batch, at(0)).loss.backward()
    optimizer.step()
    for (slow, fast), before in zip(pairs, start, strict=True):
        assert all(torch.equal(p, own) and p.grad is None for p, own in zip(slow.parameters(), before, strict=True))
        assert any(not torch.equal(p, own) for p, own in zip(fast.parameters(), before, strict=True))
    step.after_step(Progress(update=0, updates=10**6, updates_per_epoch=10))
    for (slow, fast), before in zip(pairs, start, strict=True):
        for p, own, leader in zip(slow.parameters(), before, fast.parameters(), strict=True):
            torch.testing.assert_close(p, 0.9 * own + 0.1 * leader, rtol=1e-5, atol=1e-6)
    assert step.exported() is step.encoder


# Beside a host


def test_beside_a_host_it_learns_and_changes_nothing_of_it(tiny_shards: Path) -> None:
    """On a ResNet, in whose BatchNorm plug-ins would show."""
    small = replace(METHODS["gtsa"].settings, size_px=32, local_px=32)  # type: ignore[type-var]

    def run_beside(plugin: Any) -> tuple[Rows, dict[str, Tensor]]:
        settings = method_run("simclr", tiny_shards, updates=3)
        return updates_of(settings if plugin is None else settings.with_objectives(gtsa=plugin))

    alone, absent, learned = (run_beside(plugin) for plugin in (None, replace(small, weight=0.0), small))
    assert all(torch.equal(absent[1][name], value) for name, value in alone[1].items())
    assert {"term:gtsa/region", "term:gtsa/rotation"} <= set(learned[0][0])
    assert any(not torch.equal(learned[1][name], value) for name, value in alone[1].items())


# Settings

WRONG: dict[str, dict[str, Any]] = {
    "local_views=-1: needs at least 0": {"local_views": -1},
    "size_px=0: needs at least 1": {"size_px": 0},
    "region_bins=0: needs at least 1": {"region_bins": 0},
    "min_cells=-0.5: needs at least 0": {"min_cells": -0.5},
    "matched_frac=0.0: needs 0 < matched_frac <= 1": {"matched_frac": 0.0},
    "rotation_hidden=(8, 0, 8): each needs at least 1": {"rotation_hidden": (8, 0, 8)},
    "weight_region=0.0: needs a positive number; the other two terms are beside it": {"weight_region": 0.0},
    "weight_patch=-1.0: needs at least 0": {"weight_patch": -1.0},
    "teacher_momentum=1.1: needs 0 to 1": {"teacher_momentum": 1.1},
    "local_area_frac=(0.5, 0.4): needs 0 < low <= high <= 1": {"local_area_frac": (0.5, 0.4)},
    "min_shared_frac=0.4: views of these areas share at most 0.3; needs 0 to that": {"min_shared_frac": 0.4},
}


@pytest.mark.core
@pytest.mark.parametrize("message", WRONG)
def test_settings_that_cannot_be_are_refused_in_one_line(message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        GTSASettings(**WRONG[message])


@pytest.mark.parametrize("changes", [{"size_px": 26}, {"local_px": 13}])
def test_views_that_patches_do_not_divide_are_refused_before_the_first_update(changes: dict[str, int], tiny_shards: Path) -> None:
    settings = method_run("gtsa", tiny_shards)
    changed: Any = replace(settings.objectives["gtsa"], **changes)  # type: ignore[type-var]
    with (
        pytest.raises(ValueError, match=r"^views are \(\d+, \d+\) px, patches \(6, 6\): patches must divide a view"),
        trainer_of(settings.with_objectives(gtsa=changed)),
    ):
        pass


def test_a_picture_in_which_no_view_fits_has_invalid_views() -> None:
    settings = GTSASettings(local_views=1)
    records = draw_records(
        ViewRecipe(families=settings.families("gtsa")),
        seed=0,
        epoch=0,
        drawn_for=np.arange(2),
        source_size=np.array([[4, 640], [300, 300]], np.int32),
    )
    assert [record.valid.all(1).tolist() for record in records] == [[False, True], [False, True]]


@pytest.mark.core
def test_recipe_is_the_authors_run() -> None:
    settings, figure = recipe("coco_gtsa_vits16"), FIGURES["recipe"]
    gtsa, optim = settings.objectives["gtsa"], settings.optim
    assert isinstance(gtsa, GTSASettings)
    assert (settings.epochs, settings.global_batch, optim.lr) == (figure["epochs"], figure["batch"], figure["blr"] * figure["batch"] / 256)
    assert optim.warmup_frac * settings.epochs == pytest.approx(figure["warmup_epochs"])
    assert [optim.weight_decay, optim.final_weight_decay] == figure["weight_decay"]
    assert (optim.final_lr, optim.clip_norm, optim.clip_by) == (figure["min_lr"], figure["clip_per_parameter"], "parameter")
    assert settings.model.drop_path == figure["drop_path_student"]
    assert [gtsa.teacher_momentum, gtsa.final_teacher_momentum] == figure["ema"]
    assert [gtsa.region_bins, gtsa.local_region_bins] == figure["roi_out_size"]
    assert [round(gtsa.matched_frac * (side // 16) ** 2) for side in (gtsa.size_px, gtsa.local_px)] == figure["num_matches"]
    assert [gtsa.weight_region, gtsa.weight_patch, gtsa.weight_rotation] == figure["coefs"]
    assert (gtsa.hidden, gtsa.out, list(gtsa.rotation_hidden)) == (figure["projector_dim"], figure["out_dim"], figure["rotation"])
    for family, view, shared in zip(gtsa.families("gtsa"), figure["views"], figure["min_intersection"], strict=True):
        law, color = family.law, family.color
        assert isinstance(law, Overlapping) and color is not None
        assert (family.views, family.size_px[0], list(law.area_frac)) == (view["count"], view["px"], view["scale"])
        assert (law.min_shared_frac, family.mirror, family.turns) == (shared, "none", True)
        assert [color.brightness, color.contrast, color.saturation, color.hue] == figure["jitter"]
        assert (color.jitter_prob, color.gray_prob, color.blur_prob) == (figure["jitter_p"], figure["gray_p"], figure["blur_p"])
        assert list(color.blur_sigma_px) == figure["blur_sigma"]
