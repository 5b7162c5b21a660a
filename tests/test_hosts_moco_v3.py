"""MoCo v3 against figures that its authors' code gave on the same inputs, float64; tests/data/hosts/moco_v3.json names the commit.

Compared against: those figures, and the nearest slips, which the same tolerances tell apart.
"""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from host_formulas import figures, gap, pair, parameter, picture, tensor, wave
from host_steps import TinyEncoder, assert_grads, batch_of, fill
from host_vit import tiny_vit
from torch import Tensor, nn

from wherefrom.train import Encoder, MoCoV3, MoCoV3Settings, ModelSettings, OptimSettings, Progress, Step
from wherefrom.train.encoder import sincos_positions
from wherefrom.train.objectives import moco_v3
from wherefrom.train.objectives.moco_v3 import contrast
from wherefrom.train.optimizer import gated_step, make_optimizer, set_rates
from wherefrom.train.schedule import cosine

pytestmark = pytest.mark.core

FIGURES = figures("moco_v3")
VIT = {"hidden": 20, "out": 8, "size_px": 16, "key_momentum": 0.9, "temperature": 0.2}
RESNET = {**VIT, "temperature": 1.0, "projector_layers": 2, "predictor_norm": False, "decay_all": False}


@pytest.mark.parametrize("case", ["t02", "t10"])
def test_loss_and_gradient_are_the_authors(case: str) -> None:
    figure = FIGURES["loss"][case]
    (q1, k1), (q2, k2) = ([tensor(each).requires_grad_() for each in pair((6, 10), seed)] for seed in (40, 50))
    one_way, _ = contrast(q1, k2, temperature=figure["temperature"])
    other_way, _ = contrast(q2, k1, temperature=figure["temperature"])
    assert gap(one_way, figure["loss_q1_k2"]) < 1e-12
    assert gap(other_way, figure["loss_q2_k1"]) < 1e-12
    (one_way + other_way).backward()
    assert q1.grad is not None and q2.grad is not None and k1.grad is None and k2.grad is None
    assert gap(q1.grad, figure["grad_q1"]) < 1e-12
    assert gap(q2.grad, figure["grad_q2"]) < 1e-12
    assert gap(contrast(q1, k1, temperature=figure["temperature"])[0], figure["loss_q1_k2"]) > 1e-3  # a view's own key


def test_the_mean_over_ranks_is_the_loss_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = FIGURES["two_ranks"]["rows"]
    z1, z2 = (tensor(each) for each in pair((8, 10), 140))
    for world, figure in ((1, one), (2, two)):
        weight = (torch.eye(10).double() + 0.1 * tensor(wave((10, 10), 5))).requires_grad_()
        losses = []
        for rank, rows in enumerate(torch.arange(8).chunk(world)):
            monkeypatch.setattr(moco_v3, "gathered", lambda keys: z2)
            monkeypatch.setattr(moco_v3, "own_rank", lambda rank=rank: rank)
            losses.append(contrast(z1[rows] @ weight, z2[rows], temperature=0.2)[0])
        mean = torch.stack(losses).mean()
        mean.backward()
        assert weight.grad is not None
        assert gap(losses[0], figure["loss_rank0"]) < 1e-10
        assert gap(mean, figure["loss_mean"]) < 1e-10
        assert gap(weight.grad.norm(), figure["ddp_grad"]) < 1e-10


def heads(settings: Mapping[str, Any], width: int) -> tuple[nn.Module, nn.Module]:
    """Return projector and predictor behind an encoder of a width."""
    objective = MoCoV3(MoCoV3Settings(**settings))
    objective.setup(TinyEncoder(width, norm=True))
    return objective.projector.double(), objective.predictor.double()


@pytest.mark.parametrize("which", ["vit_projector", "vit_predictor", "resnet_predictor"])
def test_heads_are_the_authors(which: str) -> None:
    figure, projects = FIGURES[f"head_{which}"], which.endswith("projector")
    projector, predictor = heads(VIT if which.startswith("vit") else RESNET, 16)
    head, author = (projector, "base_encoder.head.") if projects else (predictor, "predictor.")
    fill(head, lambda name: author + name)
    x = tensor(wave((6, 16 if projects else 8), 60 if projects else 62)).requires_grad_()
    out = head(x)
    (out * tensor(wave((6, 8), 61 if projects else 63))).sum().backward()
    assert gap(out, figure["out"]) < 1e-12
    assert x.grad is not None
    assert gap(x.grad, figure["grad_x"]) < 1e-9
    assert_grads(head, lambda name: name, figure["grads"])
    buffers = {name: gap(value, figure["buffers_after"][name]) for name, value in head.named_buffers() if "num_batches" not in name}
    assert buffers.keys() == figure["buffers_after"].keys()
    assert max(buffers.values()) < 1e-9


def test_the_authors_positions_are_ours_with_row_and_column_swapped() -> None:
    figure = FIGURES["pos_embed"]
    swapped = sincos_positions(4, 4, 16).transpose(0, 1).flatten(0, 1)
    assert gap(torch.cat([torch.zeros(1, 16), swapped]).double(), figure["table"]) < 1e-7
    ours = sincos_positions(4, 4, 16)
    assert gap(ours[1, 0].double(), figure["token_row0_col1"]) < 1e-6
    assert torch.equal(ours.roll(8, -1), ours.transpose(0, 1))  # another order of channels, which nothing in a ViT prefers


def test_a_vit_starts_as_the_authors() -> None:
    model = ModelSettings(name="vit_small_patch16_224", depth=1, heads=12, positions="sincos", frozen=("patch_embed",))
    encoder = Encoder(model)
    torch.manual_seed(0)
    MoCoV3(MoCoV3Settings(hidden=8)).setup(encoder)
    vit, bounds = encoder.model, FIGURES["init_bounds_vit_small"]
    block = vit.blocks[0]
    found = {"patch_embed": vit.patch_embed.proj, "qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1}
    for name, layer in found.items():
        assert layer.weight.abs().max().item() == pytest.approx(bounds[name], rel=1e-3), name
        assert layer.weight.std().item() == pytest.approx(bounds[name] / math.sqrt(3), rel=0.01), name
        assert not layer.bias.any()
    assert 0 < vit.cls_token.std().item() < 2e-6
    without = {name for name, weights in vit.named_parameters() if not weights.requires_grad}
    assert without == set(FIGURES["requires_grad_false_vit_small"])


def test_key_momentum_goes_as_the_authors() -> None:
    schedules = FIGURES["schedules"]
    updates = [round(epoch * 1252) for epoch in schedules["epochs"]]  # of 1252 an epoch, 300 epochs
    assert [cosine(at, updates=300 * 1252, start=0.99, end=1.0) for at in updates] == pytest.approx(schedules["momentum"], abs=1e-12)


def theirs_of(name: str, *, vit: bool) -> str:
    """Return how the authors call a parameter of the step."""
    head = "head" if vit else "fc"
    for ours, theirs in (
        ("objectives.moco_v3.key_encoder.", "momentum_encoder."),
        ("objectives.moco_v3.key_projector.", f"momentum_encoder.{head}."),
        ("objectives.moco_v3.projector.", f"base_encoder.{head}."),
        ("objectives.moco_v3.", ""),
        ("encoder.", "base_encoder."),
    ):
        if name.startswith(ours):
            return name.replace(ours, theirs, 1).replace("encoder.model.", "encoder.")
    raise KeyError(name)


def furthest(form: str, *, momenta_ahead: int = 1, **changes: Any) -> dict[str, float]:
    """Return how far losses, networks and statistics of BatchNorm of three updates are from the figures."""
    vit = form == "vit_adamw"
    figure, px = FIGURES["end_to_end"][form], 16 if vit else 4
    settings = MoCoV3Settings(**{**(VIT if vit else RESNET), "size_px": px, **changes})
    # learned positions, frozen, hold the authors' table
    encoder = tiny_vit(frozen=("pos_embed", "patch_embed")) if vit else TinyEncoder(12, norm=True)
    step = Step(encoder, [MoCoV3(settings)], seed=0).double()
    named = {theirs_of(name, vit=vit): own for name, own in step.named_parameters()}
    buffers = {theirs_of(name, vit=vit): own for name, own in step.named_buffers()}
    with torch.no_grad():
        for name, own in named.items():
            own.copy_(tensor(parameter(name.replace("momentum_", "base_"), tuple(own.shape))))
            if "pos_embed" in name:
                own.copy_(torch.cat([torch.zeros(1, 16), sincos_positions(4, 4, 16).transpose(0, 1).flatten(0, 1)])[None])
    rate = {"name": "adamw", "betas": (0.9, 0.999)} if vit else {"name": "ssl_lars"}
    optimizer = make_optimizer(step, OptimSettings(**rate, weight_decay=0.1 if vit else 0.01), step.parameter_rules())  # type: ignore[arg-type]
    gaps = {}
    for update in range(3):
        progress = Progress(update=update + momenta_ahead, updates=6, updates_per_epoch=2)
        views = [tensor(picture((6, 3, px, px), view, update))[:, None] for view in (0, 1)]
        output = step(batch_of(("moco_v3_1", views[0]), ("moco_v3_2", views[1])), progress)
        gaps[f"loss {update}"] = gap(output.loss, figure["losses"][update])
        snapshot = figure["snapshots"][f"after_update_{update}"]
        # the authors' slow network moves at the start of an update, ours after the one before
        gaps |= {f"{name} {update}": gap(named[name], theirs) for name, theirs in snapshot["teacher"].items()}
        gaps |= {f"{name} {update}": gap(buffers[name], theirs) for name, theirs in snapshot["bn_running_var"].items()}
        output.loss.backward()
        set_rates(optimizer, lr=figure["lr"][update], peak_lr=1.0, weight_decay=0.1 if vit else 0.01)
        gated_step(optimizer, torch.tensor(True))
        optimizer.zero_grad()
        gaps |= {f"{name} {update}": gap(named[name], theirs) for name, theirs in snapshot["online"].items()}
        step.after_step(progress, output.seen)
    return gaps


@pytest.mark.parametrize("form", ["vit_adamw", "resnet_lars"])
def test_queries_and_keys_go_as_the_authors(form: str) -> None:
    gaps = furthest(form)
    assert len(gaps) > 20
    assert {name: value for name, value in gaps.items() if not value < 1e-6} == {}


@pytest.mark.parametrize("form", ["vit_adamw", "resnet_lars"])
def test_the_nearest_slips_go_otherwise(form: str) -> None:
    slips: list[dict[str, Any]] = [
        {"momenta_ahead": 0},  # of the update that was, not of the one to come
        {"decay_all": form != "vit_adamw"},
        {"key_momentum": 0.91},
        {"temperature": 0.3},
    ]
    assert [slip for slip in slips if not max(furthest(form, **slip).values()) > 1e-5] == []


def test_all_that_learns_decays_and_frozen_parts_do_not_learn() -> None:
    encoder = tiny_vit(frozen=("pos_embed", "patch_embed"))
    step = Step(encoder, [MoCoV3(MoCoV3Settings(**VIT))], seed=0).double()
    names = set(step.parameter_rules())
    assert not any("patch_embed" in name or "pos_embed" in name or "key_" in name for name in names)
    assert all(rule.decays for rule in step.parameter_rules().values())


def rows_of(views: int, update: int) -> Tensor:
    return tensor(picture((views, 3, 16, 16), 0, update))[:, None]


def test_a_single_picture_is_refused_in_one_line() -> None:
    step = Step(tiny_vit(), [MoCoV3(MoCoV3Settings(**VIT))], seed=0).double()
    with pytest.raises(ValueError, match=r"^objective 'moco_v3' with a single picture at a time: .*; raise global_batch") as refusal:
        step(batch_of(("moco_v3_1", rows_of(1, 0)), ("moco_v3_2", rows_of(1, 1))), Progress(update=0, updates=1, updates_per_epoch=1))
    assert "\n" not in str(refusal.value)
