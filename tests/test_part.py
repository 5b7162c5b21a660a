"""PART against what must come out: patches uniform over their window, targets read off the pixels, losses over pairs that are stored.

Coordinate patches show where they were cut, so a learner can tell all pairs; a batch of them is overfitted, or not, by each head.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from wherefrom.pipeline.laws import Independent, Scattered
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Record, Views
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.objective import Progress, Step, random_scope
from wherefrom.train.objectives import PART, PARTSettings
from wherefrom.train.objectives.pairs import pair_terms

START = Progress(update=0, updates=1, updates_per_epoch=1)
PICTURE = (240, 320)  # (height, width)
SMALL = PARTSettings(size_px=48, patch_px=6, patches=16, mirror="none", color=None)
MODEL = ModelSettings(view_size_px=24, patch_size_px=6, width=32, depth=2, heads=2)


def records_of(family: ViewFamily, ids: Sequence[int] | np.ndarray, *, seed: int = 0, epoch: int = 0) -> Record:
    size = np.array(PICTURE, np.int32) // np.where(np.array(ids) % 3 == 2, 2, 1)[:, None].astype(np.int32)  # every third is half as large
    (record,) = draw_records(ViewRecipe(families=(family,)), seed=seed, epoch=epoch, drawn_for=np.array(ids), source_size=size)
    return record


def batch_of(settings: PARTSettings, ids: Sequence[int], *, epoch: int = 0) -> Batch:
    """Return patches of one color each: red says where its center lies across the picture, green down it, blue how wide it is."""
    record = records_of(settings.family("part"), ids, epoch=epoch)
    boxes = record.geometry.boxes
    sides = torch.tensor(PICTURE[::-1])
    shown = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2 / sides, (boxes[..., 2:] - boxes[..., :2])[..., :1] / sides[0]], -1)
    side = settings.patch_px
    pixels = shown[..., None, None].expand(*shown.shape, side, side).contiguous()
    views = Views(pixels=pixels, geometry=record.geometry, photometric=record.photometric, valid=record.valid)
    geometry = record.geometry
    return Batch(
        sample=geometry.sample,
        drawn_for=geometry.drawn_for,
        label=torch.full((len(ids),), -1),
        source_size=geometry.source_size,
        views=(views,),
    )


def set_up(settings: PARTSettings, model: ModelSettings = MODEL) -> tuple[Encoder, PART]:
    with random_scope("weights"):
        encoder, part = Encoder(model), settings.objective("part")
        part.setup(encoder)
    return encoder, part


@pytest.mark.core
def test_patches_are_uniform_over_their_window_and_as_the_window_is_shown() -> None:
    law = Scattered(area_frac=(0.2, 0.6), window_px=100, sides_px=(10, 30))
    family = ViewFamily(name="part", views=40, size_px=8, law=law, snap="none")
    ids = np.arange(500)
    boxes = records_of(family, ids).geometry.boxes.double().numpy()
    like_a_window = ViewFamily(name="part", views=1, size_px=8, law=Independent(area_frac=(0.2, 0.6)), snap="none")
    window = records_of(like_a_window, ids).geometry.boxes.double().numpy()
    frame = window[..., 2:] - window[..., :2]
    sides_px = (boxes[..., 2:] - boxes[..., :2]) / frame * 100
    whole = np.rint(sides_px)
    assert np.abs(sides_px - whole).max() < 0.01 and whole.min() == 10 and whole.max() == 30
    assert (boxes[..., :2] >= window[..., :2]).all() and (boxes[..., 2:] <= window[..., 2:]).all()
    place = (boxes[..., :2] - window[..., :2]) / (frame - (boxes[..., 2:] - boxes[..., :2]))
    for axis in (0, 1):
        assert stats.kstest(place[..., axis].ravel(), "uniform").pvalue > 1e-3
        assert stats.chisquare(np.bincount(whole[..., axis].astype(int).ravel())[10:]).pvalue > 1e-3
    assert abs(np.corrcoef(place[..., 0].ravel(), place[..., 1].ravel())[0, 1]) < 0.02
    assert stats.kstest(place[..., 0].ravel() ** 1.1, "uniform").pvalue < 1e-3  # control: a little nearer to the left


@pytest.mark.core
def test_color_and_mirror_are_drawn_once_a_window_where_so_told() -> None:
    family = replace(SMALL, mirror="picture", color=ColorLaw(blur_prob=0.5)).family("part")
    record = records_of(family, range(40))
    for name in ("brightness", "hue_rad", "gray", "blur_sigma_px"):
        each = getattr(record.photometric, name)
        assert torch.equal(each, each[:, :1].expand_as(each)) and len(each[:, 0].unique()) > 1, name
    assert torch.equal(record.geometry.flipped, record.geometry.flipped[:, :1].expand(-1, 16)) and record.geometry.flipped.any()
    apart = records_of(replace(family, color_per="view"), range(40)).photometric.brightness
    assert torch.equal(apart[:, 0], record.photometric.brightness[:, 0]) and (apart[:, 1:] != apart[:, :1]).any()


def test_a_family_whose_views_are_colored_apart_has_the_fingerprint_that_it_had() -> None:
    plain = ViewRecipe(families=(ViewFamily(name="local", views=2, size_px=8, color=ColorLaw()),))
    assert plain.fingerprint == "9f010ee486d6523ca53f4b0be3f398cc"
    together = replace(plain, families=(replace(plain.families[0], color_per="picture"),))
    assert together.fingerprint != plain.fingerprint


@pytest.mark.core
@pytest.mark.parametrize("sides_px", [None, (4, 12)])
def test_targets_are_what_the_tokens_show(sides_px: tuple[int, int] | None) -> None:
    settings = replace(SMALL, sides_px=sides_px, standardize=False)
    _, part = set_up(settings)
    batch = batch_of(settings, range(5))

    def encode(row: Any, *, keep: Tensor | None = None, positions: bool = True) -> Features:
        assert not positions
        cells = row.unfold(-1, 6, 6).mean((-1, -3))[:, :, :, None]  # (B, 1, 3, 1, N)
        tokens = cells.permute(0, 1, 3, 4, 2)
        return Features(summary=tokens.mean((2, 3)), tokens=tokens)

    views = batch.views[0]
    features = part.features(views, encode)
    center = features.summary[..., :2].double() * torch.tensor(PICTURE[::-1])
    boxes = views.geometry.boxes.double()
    side = boxes[..., 2:] - boxes[..., :2]
    targets = part.targets(views.geometry)
    for pair, (r, t) in enumerate(part.pairs.tolist()):
        expected = (center[:, t] - center[:, r]) / side[:, r]
        assert (targets[:, pair, :2] - expected).abs().max() < 1e-3
        if sides_px is not None:
            assert (targets[:, pair, 2:] - (side[:, t] / side[:, r]).log()).abs().max() < 1e-3
    assert (targets[:, 0, :2] - expected).abs().max() > 0.1  # control: of another pair
    assert targets.shape[-1] == (2 if sides_px is None else 4)


@pytest.mark.core
def test_the_network_is_told_no_place() -> None:
    encoder, part = set_up(SMALL)
    views = batch_of(SMALL, range(3)).views[0]
    views = replace(views, pixels=views.pixels + torch.randn(views.pixels.shape, generator=torch.Generator().manual_seed(0)))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, shuffled = (part.features(each, encoder.encode).summary for each in (views, views[:, order]))
        told = part.features(views[:, order], lambda row, **_: encoder.encode(row)).summary
    torch.testing.assert_close(shuffled, plain[:, order], rtol=1e-4, atol=1e-5)
    assert (told - plain[:, order]).abs().max() > 1e-3  # control: with the position table


@pytest.mark.parametrize("pairs", [None, 60])
@pytest.mark.parametrize("sides_px", [None, (4, 12)])
def test_the_loss_of_pairs_that_are_never_stored_is_that_of_stored_ones(pairs: int | None, sides_px: tuple[int, int] | None) -> None:
    settings = replace(SMALL, pairs=pairs, sides_px=sides_px, min_side_px=60, weight_scale=0.5)  # some windows are too small
    encoder, part = set_up(settings)
    batch = batch_of(settings, range(12))
    valid = batch.views[0].valid
    assert valid.any() and not valid.all() and torch.equal(valid, valid[:, :1].expand_as(valid))
    terms = part(batch, encoder.encode, START)
    features, record = part.features(batch.views[0], encoder.encode), batch.views[0].geometry
    chosen = torch.cartesian_prod(torch.arange(16), torch.arange(16)) if pairs is None else part.learned_pairs(record, START)
    stored = pair_terms(
        part.predict(features, chosen)[0],
        part.targets(record, chosen),
        valid[:, :1].expand(-1, len(chosen)),
        part.channels,
        loss="squared",
        beta=0.5,
    )
    assert terms.losses.keys() == stored.losses.keys() == ({"position"} if sides_px is None else {"position", "scale"})
    gradients = []
    for losses in (terms.losses, stored.losses):
        total = sum((part.weights[name] * loss for name, loss in losses.items()), torch.zeros(()))
        gradients.append(torch.autograd.grad(total, list(part.head.parameters())))
        for name, loss in losses.items():
            torch.testing.assert_close(loss, stored.losses[name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_sampled_pairs_are_others_in_every_update_each_once_and_a_patch_meets_itself() -> None:
    _, part = set_up(replace(SMALL, pairs=100))
    record = records_of(part.families[0], range(2)).geometry
    drawn = [part.learned_pairs(record, replace(START, update=update)) for update in (0, 0, 1)]
    assert all(pairs is not None for pairs in drawn)
    numbers = [[16 * r + t for r, t in pairs.tolist()] for pairs in drawn if pairs is not None]
    assert numbers[0] == numbers[1] != numbers[2]
    assert len(set(numbers[0])) == 100 and any(number % 17 == 0 for number in numbers[0])
    other = records_of(part.families[0], range(7, 9)).geometry  # another rank or micro-batch
    assert torch.equal(drawn[0], part.learned_pairs(other, START))  # type: ignore[arg-type]
    assert not torch.equal(drawn[0], part.learned_pairs(replace(record, seed=1), START))  # type: ignore[arg-type]


@pytest.mark.core
@pytest.mark.parametrize("sides_px", [None, (4, 12)])
def test_targets_are_standardized_by_the_law(sides_px: tuple[int, int] | None) -> None:
    settings = replace(SMALL, sides_px=sides_px)
    _, part = set_up(settings)
    record = records_of(part.families[0], range(400)).geometry
    every = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    targets = part.targets(record, every).double().flatten(0, 1)
    assert targets.mean(0).abs().max() < 0.05 and (targets.std(0) - 1).abs().max() < 0.05
    if sides_px is None:  # positions uniform over 48 - 6 px, in patches of 6 px; a sixteenth of the pairs are 0
        expected = (48 - 6) / 6 / math.sqrt(6) * math.sqrt(1 - 1 / 16)
        assert part.target_std.tolist() == pytest.approx([expected] * 2, rel=0.01)
        assert part.target_std.tolist() != pytest.approx([expected / math.sqrt(1 - 1 / 16)] * 2, rel=0.01)  # control


HEADS: dict[str, dict[str, Any]] = {
    "additive": {},
    "linear": {"head": "linear"},
    "cross-attention": {"head": "cross_attention"},
    "cross-attention, plain": {"head": "cross_attention", "projections": False},
    "query of positions": {"head": "cross_attention", "query": "positions"},
}


def overfitted(changes: dict[str, Any], *, steps: int) -> float:
    """Return the loss of one batch over that of the mean, after so many updates on it."""
    settings = replace(SMALL, patches=9, **changes)
    batch = batch_of(settings, range(8))
    noise = 0.1 * torch.randn(batch.views[0].pixels.shape, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, views=(replace(batch.views[0], pixels=4 * (batch.views[0].pixels - 0.5) + noise),))
    with random_scope("overfit"):
        step = Step(Encoder(replace(MODEL, width=64)), [settings.objective("part")], seed=0)
        optimizer = torch.optim.AdamW(step.parameters(), lr=2e-3, weight_decay=0.0)
        losses = []
        for update in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (update + 1) / 20) * (1 + math.cos(math.pi * update / steps)) / 2
            loss = step(batch, Progress(update=update, updates=steps, updates_per_epoch=steps)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    part = step.objectives["part"]
    targets = part.targets(batch.views[0].geometry, torch.cartesian_prod(torch.arange(9), torch.arange(9)))
    floor = float((targets - targets.mean((0, 1))).square().mean((0, 1)).sum())
    return losses[-1] / floor


@pytest.mark.slow
@pytest.mark.parametrize("head", ["additive", "cross-attention", "cross-attention, plain"])
def test_one_batch_is_overfitted(head: str) -> None:
    assert overfitted(HEADS[head], steps=600) < 0.02


@pytest.mark.slow
def test_a_query_that_says_nothing_of_the_patches_is_far_from_overfitting_one_batch() -> None:
    assert overfitted(HEADS["query of positions"], steps=600) > 0.1  # 0.33 was seen: it learns eight windows by heart, slowly


def test_a_head_that_sees_the_patches_learns_a_batch_and_one_that_does_not_cannot() -> None:
    assert overfitted(HEADS["additive"], steps=80) < 0.5
    assert overfitted(HEADS["query of positions"], steps=80) > 0.8


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_from_the_pairs_that_count_alone(head: str) -> None:
    settings = replace(SMALL, min_side_px=60, keys_frac=0.5 if "attention" in head else 1.0, **HEADS[head])
    encoder, part = set_up(settings)
    batch = batch_of(settings, range(12))
    broken = batch.views[0].pixels.clone()
    broken[~batch.views[0].valid] = 7.0
    batches = [replace(batch, views=(replace(batch.views[0], pixels=pixels),)) for pixels in (batch.views[0].pixels, broken)]
    losses = [part(each, encoder.encode, START).losses["position"] for each in batches]
    assert torch.isfinite(losses[0]) and torch.equal(losses[0], losses[1])


def test_cross_attention_reads_other_patches_in_every_window_where_so_told() -> None:
    settings = replace(SMALL, head="cross_attention", keys_frac=0.25)
    encoder, part = set_up(settings)
    read: list[Tensor] = []
    part.head.register_forward_pre_hook(lambda module, arguments: read.append(arguments[2]))
    for epoch in (0, 0, 1):
        part(batch_of(settings, range(6), epoch=epoch), encoder.encode, START)
    assert read[0].shape == (6, 4) and torch.equal(read[0], read[1]) and not torch.equal(read[0], read[2])
    assert all(len(set(row)) == 4 for row in read[0].tolist()) and len({tuple(row) for row in read[0].tolist()}) > 1


@pytest.mark.core
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PARTSettings(size_px=12, patch_px=16), "sides_px=(16, 16) in a window of 12 px: needs 1 <= low <= high <= 12"),
        (lambda: PARTSettings(sides_px=(20, 8)), "sides_px=(20, 8) in a window of 224 px: needs 1 <= low <= high <= 224"),
        (lambda: PARTSettings(patches=1), "patches=1: a pair needs 2"),
        (lambda: PARTSettings(patches=300), "views=300 of family 'part': needs 1 to 256"),
        (lambda: PARTSettings(patches=10, pairs=101), "pairs=101 of 10 patches: needs 1 to 100, or none for all"),
        (lambda: PARTSettings(keys_frac=0.5), "keys_frac=0.5 with head='additive': only cross_attention reads patches; leave it out"),
        (lambda: PARTSettings(head="cross_attention", keys_frac=0.0), "keys_frac=0.0: needs 0 < keys_frac <= 1"),
        (lambda: PARTSettings(weight=-1.0), "weight=-1.0, weight_position=1.0, weight_scale=1.0: weights cannot be negative"),
        (
            lambda: set_up(replace(SMALL, patch_px=8)),
            "patch_px=8 of 'part': patches of 'vit_small_patch16_224' are (6, 6) px; take theirs, or model.patch_size_px=8",
        ),
        (lambda: set_up(SMALL, ModelSettings(name="test_resnet")), "model 'test_resnet' has no patches; take a ViT"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()
