"""MAE against figures that the authors' code gave for inputs by formula, tests/data/hosts/mae.json; masks, bad input.

Every tolerance has beside it the nearest slip, which must fail it. float64; where float32 position tables enter, 1e-7 is left of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_formulas import figures, gap, noise, parameter, picture, tensor, wave
from test_plugin import at, batch_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wherefrom.pipeline import Batch
from wherefrom.train import MAE, Encoder, MAESettings, ModelSettings, OptimSettings, Step
from wherefrom.train.encoder import sincos_positions
from wherefrom.train.objectives.mae import Mask, normalized, patches_of, reconstruction_loss
from wherefrom.train.optimizer import make_optimizer, set_rates

pytestmark = pytest.mark.core

FIGURES = figures("mae")
VIT = ModelSettings(view_size_px=16, patch_size_px=4, width=16, depth=2, heads=2, positions="sincos")
TINY = MAESettings(size_px=16, decoder_width=12, decoder_depth=1, decoder_heads=3, decoder_mlp_ratio=2)
PICTURES = tensor(picture((4, 3, 16, 16), 0, 0))


def of_theirs(name: str) -> str:
    """Return our name of the authors' parameter."""
    for theirs, ours in (("decoder_embed", "embed"), ("decoder_blocks", "blocks"), ("decoder_norm", "norm"), ("decoder_pred", "predict")):
        if name.startswith(theirs):
            return f"objectives.mae.{ours}{name.removeprefix(theirs)}"
    return f"objectives.mae.{name}" if name == "mask_token" else f"encoder.model.{name}"


def by_theirs(step: Step) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by the authors' names."""
    ours = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    groups = FIGURES["adamw_groups"]
    theirs = {name: ours.pop(of_theirs(name)) for name in groups["no_decay"] + groups["decay"]}
    assert ours == {}
    return theirs


def authors_step(settings: MAESettings = TINY) -> Step:
    """Return the method in float64 with the weights of the figures; their ViT's hidden layers are twice as wide, not four times."""
    encoder = Encoder(VIT)
    encoder.model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=0, dynamic_img_size=True
    )
    encoder.model.pos_embed.requires_grad_(False)
    step = Step(encoder, [settings.objective("mae")], seed=0).double()
    with torch.no_grad():
        for name, own in by_theirs(step).items():
            own.copy_(tensor(parameter(name, own.shape)))
    return step


def batch_with(pixels: Tensor) -> Batch:
    """Return a batch of one view a picture, of these pixels (B, 3, H, W)."""
    two = batch_of("mae")
    (views,) = two.views
    record = dataclasses.replace(views[:, :1].geometry, size_px=tuple(pixels.shape[-2:]))
    return dataclasses.replace(two, views=(dataclasses.replace(views[:, :1], pixels=pixels[:, None], geometry=record),))


# Parts


def test_patches_are_told_pixel_by_pixel_with_the_channels_of_each() -> None:
    patches, theirs = patches_of(PICTURES, (4, 4)), FIGURES["patchify"]
    assert gap(patches, theirs["patches"]) < 1e-12
    torch.testing.assert_close(patches[0, 5], tensor(theirs["patch_0_5"]), rtol=0, atol=1e-12)
    channels_first = PICTURES.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assert gap(channels_first, theirs["patches"]) > 1e-2
    high = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)  # patches that are higher than wide: row by row
    torch.testing.assert_close(patches_of(high, (4, 3))[1, 5], high[1, :, 4:8, 3:6].permute(1, 2, 0).flatten())


def test_targets_are_normalized_by_the_unbiased_variance_and_constant_ones_are_0() -> None:
    patches, theirs = patches_of(PICTURES, (4, 4)), FIGURES["normalized_target"]
    assert gap(normalized(patches), theirs["target"]) < 1e-12
    torch.testing.assert_close(normalized(patches)[0, 5], tensor(theirs["patch_0_5"]), rtol=0, atol=1e-12)
    assert normalized(torch.full((1, 48), 0.3)).abs().max() == FIGURES["constant_patch_target"] == 0
    biased = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    assert gap(biased, theirs["target"]) > 1e-3


def masked_of_figures(*, uneven: bool = False) -> Tensor:
    masked = torch.arange(64).view(4, 16) * 7 % 16 >= 4
    if uneven:
        masked[0] = torch.arange(16) == 3
    return masked


@pytest.mark.parametrize("case", ["norm_pix", "raw", "norm_pix_uneven_mask"])
def test_loss_and_gradient_are_the_authors(case: str) -> None:
    theirs = FIGURES["loss"][case]
    predicted = tensor(wave((4, 16, 48), 110)).requires_grad_()
    patches = patches_of(PICTURES, (4, 4))
    targets = patches if case == "raw" else normalized(patches)
    masked = masked_of_figures(uneven="uneven" in case)
    loss = reconstruction_loss(predicted, targets, masked)
    loss.backward()
    assert gap(loss, theirs["loss"]) < 1e-12
    assert gap(predicted.grad, theirs["grad_pred"]) < 1e-12
    error = (predicted - targets).square().mean(-1)
    every_patch, by_sample = error.mean(), ((error * masked).sum(-1) / masked.sum(-1)).mean()
    assert gap(every_patch, theirs["loss"]) > 1e-4
    assert "uneven" not in case or gap(by_sample, theirs["loss"]) > 1e-4


def test_under_autocast_the_difference_is_taken_in_float32() -> None:
    predicted, targets, masked = torch.full((1, 4, 8), 1.0), torch.full((1, 4, 8), 1.003), torch.ones(1, 4, dtype=torch.bool)
    assert reconstruction_loss(predicted.bfloat16(), targets, masked) == reconstruction_loss(predicted, targets, masked)
    assert (predicted.bfloat16() - targets.bfloat16()).abs().max() == 0  # which bfloat16 does not see


@pytest.mark.parametrize(("case", "shape", "seed", "ratio"), [("ratio75", (3, 16), 120, 0.75), ("ratio60", (3, 9), 121, 0.6)])
def test_masks_of_given_noise_are_the_authors(case: str, shape: tuple[int, int], seed: int, ratio: float) -> None:
    theirs = FIGURES["masking"][case]
    mask = Mask.of(tensor(noise(shape, seed)), MAESettings(mask_ratio=ratio).kept_patches(shape[1]))
    assert mask.keep.tolist() == theirs["ids_keep"]
    assert mask.restore.tolist() == theirs["ids_restore"]
    assert mask.masked.long().tolist() == theirs["mask"]
    assert Mask.of(-tensor(noise(shape, seed)), mask.keep.shape[1]).keep.tolist() != theirs["ids_keep"]


def test_what_is_left_over_of_a_patch_is_masked_as_in_the_authors_arithmetic() -> None:
    counts = FIGURES["len_keep"]
    for patches, ratio, kept in counts["rows"]:
        settings = MAESettings(mask_ratio=ratio)
        if kept:
            assert settings.kept_patches(patches) == kept
        else:
            with pytest.raises(ValueError, match=rf"mask_ratio={ratio} of {patches} patches keeps 0: some must be kept and some masked;"):
                settings.kept_patches(patches)
    assert MAESettings().kept_patches(196) == counts["L196_ratio75"]
    assert any(round(patches * (1 - ratio)) != kept for patches, ratio, kept in counts["rows"])


def test_fixed_positions_are_the_authors_columns_first() -> None:
    theirs = FIGURES["pos_embed"]
    table = sincos_positions(4, 4, 16)
    with_class = torch.cat([torch.zeros(1, 16), table.flatten(0, 1)])
    assert gap(with_class.double(), theirs["table"]) < 1e-7
    for row, col in ((0, 1), (1, 0), (2, 3)):
        torch.testing.assert_close(table[row, col].double(), tensor(theirs[f"token_row{row}_col{col}"]), rtol=0, atol=1e-7)
    large = torch.cat([torch.zeros(1, 768), sincos_positions(14, 14, 768).flatten(0, 1)])
    assert gap(large.double(), FIGURES["pos_embed_768_14"]) < 1e-7
    rows_first = torch.cat([torch.zeros(1, 16), table.transpose(0, 1).flatten(0, 1)])
    assert gap(rows_first.double(), theirs["table"]) > 1e-2


# The method


def three_updates(step: Step, lr: list[float], mask_of: Callable[[int, MAE], Mask]) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Make the figures' updates; return the losses, and the gradients of the first with the weights after each, by the authors' names."""
    host, named = step.objectives["mae"], by_theirs(step)
    assert isinstance(host, MAE)
    optim = OptimSettings(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    optimizer = make_optimizer(step, optim, step.parameter_rules())
    losses, kept = [], []
    for update, rate in enumerate(lr):
        host.mask_of = lambda record, update=update: mask_of(update, host)  # type: ignore[method-assign]
        out = step(batch_with(tensor(picture((4, 3, 16, 16), 0, update))), at(update))
        optimizer.zero_grad()
        out.loss.backward()
        if update == 0:
            kept.append({name: own.grad.clone() for name, own in named.items() if own.grad is not None})
        set_rates(optimizer, lr=rate, peak_lr=optim.lr, weight_decay=optim.weight_decay)
        optimizer.step()
        losses.append(float(out.loss.detach()))
        kept.append({name: own.detach().clone() for name, own in named.items()})
    return losses, kept


def mask_of_figures(update: int, host: MAE) -> Mask:
    return Mask.of(tensor(noise((4, 16), 130 + update))[:, None], host.kept)


@pytest.mark.parametrize("case", ["norm_pix", "raw"])
def test_losses_gradients_and_weights_of_three_updates_are_the_authors(case: str) -> None:
    theirs = FIGURES["end_to_end"][case]
    settings = dataclasses.replace(TINY, normalize_patches=case == "norm_pix")
    losses, (gradients, *weights) = three_updates(authors_step(settings), theirs["lr"], mask_of_figures)
    assert gap(losses, theirs["losses"]) < 1e-7
    for name, figure in theirs.get("grads_update0", {}).items():
        assert gap(gradients[name], figure) < 1e-6, name
    for after, snapshot in zip(weights, theirs.get("snapshots", {}).values(), strict=False):
        for name, figure in snapshot.items():
            assert gap(after[name], figure) < 1e-5, name


def slip_unshuffled(step: Step) -> None:
    """Put what is told back in the order in which it was seen."""
    plain = step.objectives["mae"].decode
    step.objectives["mae"].decode = lambda tokens, restore: plain(tokens, torch.arange(16).expand_as(restore))  # type: ignore[assignment]


def slip_positions(step: Step) -> None:
    step.objectives["mae"].positions = step.objectives["mae"].positions.roll(1, 0)


def slip_mask_token(step: Step) -> None:
    nn.init.zeros_(step.objectives["mae"].mask_token)


def slip_epsilon(step: Step) -> None:
    step.objectives["mae"].norm.eps = 1e-5


@pytest.mark.parametrize("slip", [slip_unshuffled, slip_positions, slip_mask_token, slip_epsilon])
def test_the_nearest_slips_are_seen_in_the_first_losses(slip: Callable[[Step], None]) -> None:
    theirs, step = FIGURES["end_to_end"]["norm_pix"], authors_step()
    slip(step)
    assert gap(three_updates(step, theirs["lr"][:1], mask_of_figures)[0], theirs["losses"][:1]) > 1e-7


def test_tokens_decay_as_matrices_do_and_positions_do_not_learn() -> None:
    step = authors_step()
    optimizer = make_optimizer(step, OptimSettings(weight_decay=0.05), step.parameter_rules())
    decay = {id(own): group["weight_decay"] for group in optimizer.param_groups for own in group["params"]}
    groups = FIGURES["adamw_groups"]
    for names, value in zip((groups["no_decay"], groups["decay"]), groups["wd"], strict=True):
        assert {decay[id(by_theirs(step)[name])] for name in names} == {value}
    assert not any(name.endswith("pos_embed") and own.requires_grad for name, own in step.named_parameters())
    plain = make_optimizer(step, OptimSettings(weight_decay=0.05))  # without the objective's rule the class token would not
    (of_token,) = (group for group in plain.param_groups if any(own is step.encoder.model.cls_token for own in group["params"]))
    assert of_token["weight_decay"] == 0


def test_weights_start_as_the_authors() -> None:
    settings = ModelSettings(name="vit_tiny_patch16_224", view_size_px=64, depth=1, positions="sincos")
    host = MAESettings(size_px=64, decoder_width=128, decoder_depth=1).objective("mae")
    torch.manual_seed(0)
    step = Step(Encoder(settings), [host], seed=0)
    named = dict(step.named_parameters())
    for name, (std, largest) in FIGURES["init"].items():
        own = named[of_theirs(name)]
        loose = 0.2 if "token" in name else 0.01
        assert float(own.detach().std()) == pytest.approx(std, rel=loose), name
        assert "token" in name or float(own.detach().abs().max()) == pytest.approx(largest, rel=0.01), name
    bounds = FIGURES["init_bounds"]
    assert named["encoder.model.blocks.0.attn.qkv.weight"].abs().max() <= bounds["qkv"]
    assert 0.9 / 768**0.5 < named["encoder.model.patch_embed.proj.bias"].abs().max() <= 1 / 768**0.5
    assert all(not own.any() for name, own in named.items() if name.endswith(("qkv.bias", "fc1.bias", "embed.bias", "predict.bias")))

    as_the_model = Step(Encoder(settings), [dataclasses.replace(host.settings, start="model").objective("mae")], seed=0)
    started = as_the_model.encoder.model.blocks[0].attn.qkv.weight
    assert float(started.detach().std()) != pytest.approx(FIGURES["init"]["blocks.0.attn.qkv.weight"][0], rel=0.1)


# Masks by records


def record_of(samples: int, *, epoch: int = 0) -> Any:
    (views,) = batch_of("mae").views
    record = views[[0] * samples, :1].geometry
    ids = torch.arange(samples)
    return dataclasses.replace(record, sample=ids, drawn_for=ids, epoch=epoch)


def set_up(**changes: Any) -> MAE:
    settings = dataclasses.replace(TINY, **changes)
    host = settings.objective("mae")
    host.setup(Encoder(VIT))
    return host


def test_masks_have_the_authors_statistics() -> None:
    theirs = FIGURES["mask_statistics"]
    masked = set_up().mask_of(record_of(theirs["samples"])).masked[:, 0]  # (4000, 16)
    assert (masked.sum(-1).min(), masked.sum(-1).max()) == tuple(theirs["masked_a_sample"])
    four_sigma = 4 * (0.75 * 0.25 / theirs["samples"]) ** 0.5
    assert (masked.float().mean(0) - theirs["ratio"]).abs().max() < four_sigma
    both = masked[:, :, None] & masked[:, None, :]
    pairs = both.float().mean(0)[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - theirs["expected_pair"]).abs().max() < 4.5 * (0.55 * 0.45 / theirs["samples"]) ** 0.5
    # control: patches masked each by itself, whose pairs are not rarer than chance
    alone = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)) < 0.75
    pair = (alone[:, :, None] & alone[:, None, :]).float().mean(0)[~torch.eye(16, dtype=torch.bool)].mean()
    assert abs(float(pair) - theirs["expected_pair"]) > 2 * abs(float(pairs.mean()) - theirs["expected_pair"]) + 5e-3


def test_a_mask_belongs_to_its_record_and_to_the_objectives_name() -> None:
    host, record = set_up(), record_of(6)
    whole = host.mask_of(record).keep
    assert torch.equal(torch.cat([host.mask_of(record[part]).keep for part in ([0, 1, 2], [3], [4, 5])]), whole)
    torch.manual_seed(1)
    assert torch.equal(host.mask_of(record).keep, whole)
    others = [host.mask_of(record_of(6, epoch=1)).keep, host.mask_of(record_of(7)[1:]).keep]
    host.name = "other"
    assert all(not torch.equal(other, whole) for other in (*others, host.mask_of(record).keep))


def test_only_masked_patches_are_learned_from_and_only_kept_ones_are_seen() -> None:
    step, pixels = authors_step(), PICTURES.clone()
    masked = step.objectives["mae"].mask_of(batch_with(pixels).views[0].geometry).masked[:, 0]  # (4, 16)
    features = []
    step.encoder.register_forward_hook(lambda *of: features.append(of[2][1]))
    with torch.no_grad():
        first = step(batch_with(pixels), at(0)).loss
        where = masked[0].long().argmax()  # another picture in a masked patch of the first sample
        row, col = divmod(int(where), 4)
        pixels[0, :, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4] = tensor(wave((3, 4, 4), 5))
        second = step(batch_with(pixels), at(0)).loss
    assert torch.equal(features[0], features[1])
    assert first != second


def test_a_vit_without_class_token_is_learned_from_its_patches_alone() -> None:
    bare = ModelSettings(name="vit_base_patch16_siglip_gap_224", view_size_px=16, patch_size_px=4, width=16, depth=1, heads=2)
    step = Step(Encoder(bare), [TINY.objective("mae")], seed=0)
    assert step.encoder.model.cls_token is None
    loss = step(batch_with(PICTURES.float()), at(0)).loss
    loss.backward()
    assert 0.5 < float(loss.detach()) < 5 and step.encoder.model.patch_embed.proj.weight.grad.any()


# Bad input


def test_bad_input_is_told_in_one_line_before_the_first_update() -> None:
    for ratio in (0, 1, -0.1):
        with pytest.raises(ValueError, match=rf"^mask_ratio={ratio}: needs 0 < mask_ratio < 1, e.g. 0.75$"):
            MAESettings(mask_ratio=ratio)
    for ratio, kept in ((0.95, 0), (1e-17, 16)):
        with pytest.raises(
            ValueError, match=rf"mask_ratio={ratio} of 16 patches keeps {kept}: some must be kept and some masked; change it"
        ):
            set_up(mask_ratio=ratio)
    resnet = Encoder(ModelSettings(name="resnet10t"))
    with pytest.raises(ValueError, match=r"^objective 'mae' with model 'resnet10t': patches are masked; take a ViT$"):
        TINY.objective("mae").setup(resnet)
    with pytest.raises(ValueError, match=r"^objective 'mae': views of 18 px are not divided by patches of \(4, 4\) px; take .*size_px=16$"):
        set_up(size_px=18)
    with pytest.raises(ValueError, match=r"^decoder_width=10: needs a multiple of 4 and of decoder_heads=5$"):
        MAESettings(decoder_width=10, decoder_heads=5)
    with pytest.raises(ValueError, match=r"decoder_depth=0.*: need at least 1"):
        MAESettings(decoder_depth=0)


def test_beside_another_host_it_starts_no_encoder_or_is_refused() -> None:
    host = dataclasses.replace(TINY, start="model")
    Step(Encoder(VIT), [host.objective("first"), host.objective("mae")], seed=0)
    with pytest.raises(
        ValueError, match=r"objective 'mae' changes the encoder's model\.\S+ in its setup: only the first objective, the host"
    ):
        Step(Encoder(VIT), [host.objective("first"), TINY.objective("mae")], seed=0)
