"""The encoder's signature: shapes for every kind of model and view size, subsets of tokens, and timm's own forward as the truth."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from wherefrom.train.encoder import Encoder, ModelSettings, sincos_positions

pytestmark = pytest.mark.core

SMALL_VIT = {"patch_size_px": 12, "view_size_px": 48, "width": 32, "depth": 2, "heads": 2}


def small_vit(**changes: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelSettings(**(SMALL_VIT | changes))).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "hw", "grid"),
    [
        (ModelSettings(**SMALL_VIT), (48, 48), (4, 4)),
        (ModelSettings(**SMALL_VIT), (36, 84), (3, 7)),
        (ModelSettings(name="resnet10t"), (63, 97), (2, 4)),
        (ModelSettings(name="convnext_atto"), (65, 96), (2, 3)),
    ],
)
def test_any_view_size_gives_a_summary_and_a_grid_of_tokens(settings: ModelSettings, hw: tuple[int, int], grid: tuple[int, int]) -> None:
    encoder = Encoder(settings)
    summary, tokens, _ = encoder(torch.randn(2, 3, *hw))
    assert summary.shape == (2, encoder.width)
    assert tokens.shape == (2, *grid, encoder.width)


@pytest.mark.parametrize(
    "settings",
    [
        ModelSettings(**SMALL_VIT),
        ModelSettings(**SMALL_VIT, summary="mean"),
        ModelSettings(name="vit_base_patch16_siglip_224", **SMALL_VIT),
        ModelSettings(name="resnet10t"),
        ModelSettings(name="convnext_atto"),
    ],
)
def test_the_summary_is_what_timm_gives_for_the_same_weights(settings: ModelSettings) -> None:
    encoder = Encoder(settings).eval()
    twin = timm.create_model(**settings.timm_arguments()).eval()
    twin.load_state_dict(encoder.model.state_dict())
    pixels = torch.randn(2, 3, 72, 48)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels)[0], twin(pixels))


def test_keeping_all_tokens_changes_nothing_and_a_subset_hides_the_rest() -> None:
    encoder, pixels = small_vit(), torch.randn(2, 3, 48, 48)
    everything = torch.arange(16).expand(2, 16)
    summary, tokens, _ = encoder(pixels)
    same_summary, same_tokens, _ = encoder(pixels, keep=everything)
    torch.testing.assert_close((same_summary, same_tokens), (summary, tokens.flatten(1, 2)))

    subset = torch.tensor([[0, 5, 9], [15, 2, 7]])
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, subset, False).view(2, 1, 4, 4)
    noise = torch.randn(2, 3, 48, 48) * hidden.repeat_interleave(12, 2).repeat_interleave(12, 3)
    torch.testing.assert_close(encoder(pixels + noise, keep=subset), encoder(pixels, keep=subset))
    assert not torch.allclose(encoder(pixels + noise)[0], summary, atol=1e-3)


def test_without_positions_tokens_follow_their_patches_wherever_these_stand() -> None:
    encoder, pixels = small_vit(), torch.randn(1, 3, 48, 48)
    swapped = pixels.roll(12, dims=-1)

    def moved_by(positions: bool) -> float:
        with torch.no_grad():
            before, after = (encoder(p, positions=positions)[1] for p in (pixels, swapped))
        return float((before.roll(1, dims=2) - after).abs().max())

    assert moved_by(positions=False) < 1e-5
    assert moved_by(positions=True) > 1e-2


def test_tokens_of_an_earlier_block_leave_the_summary_alone() -> None:
    last, earlier, pixels = small_vit(), small_vit(tokens_from_block=-2), torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(earlier(pixels)[0], last(pixels)[0])
    assert not torch.allclose(earlier(pixels)[1], last(pixels)[1], atol=1e-2)


@pytest.mark.parametrize("settings", [ModelSettings(**SMALL_VIT), ModelSettings(name="resnet10t"), ModelSettings(name="convnext_atto")])
def test_gradient_of_summary_and_tokens_reaches_every_parameter(settings: ModelSettings) -> None:
    encoder = Encoder(settings)
    summary, tokens, _ = encoder(torch.randn(2, 3, 96, 96))
    (summary.square().sum() + tokens.square().sum()).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_a_vit_that_somebody_else_registered_takes_any_view_size_too() -> None:
    @timm.models.register_model
    def vit_of_somebody_else(pretrained: bool = False, **arguments: Any) -> VisionTransformer:
        small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        return timm.models.build_model_with_cfg(VisionTransformer, "vit_of_somebody_else", pretrained, **(small | arguments))

    settings = ModelSettings(name="vit_of_somebody_else", view_size_px=48)
    assert settings.is_vit
    assert Encoder(settings)(torch.zeros(1, 3, 48, 32))[1].shape == (1, 3, 2, 32)


def test_fixed_positions_are_those_of_mae_and_with_rows_first_those_of_moco_v3() -> None:
    """Figures of get_2d_sincos_pos_embed(16, 3) of facebookresearch/mae a9f5c70, row 1, column 2; moco-v3 1c6b717 swaps the halves."""
    column = [0.909297, 0.198669, 0.019999, 0.002000, -0.416147, 0.980067, 0.999800, 0.999998]
    row = [0.841471, 0.099833, 0.010000, 0.001000, 0.540302, 0.995004, 0.999950, 1.000000]
    table = sincos_positions(3, 3, 16)
    torch.testing.assert_close(table[1, 2], torch.tensor(column + row), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[2, 1], torch.tensor(row + column), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="width=18 with positions='sincos': needs a multiple of 4"):
        sincos_positions(3, 3, 18)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224"])
def test_a_table_that_is_fixed_is_what_timm_adds_too_and_never_learns(name: str) -> None:
    """With a class token that has a place in the table, with one that has none, and without one."""
    encoder = Encoder(ModelSettings(name=name, positions="sincos", **SMALL_VIT)).eval()
    table = encoder.model.pos_embed
    prefix = table.shape[1] - 16
    assert not table.requires_grad and not table[:, :prefix].any()
    assert torch.equal(table[0, prefix:], sincos_positions(4, 4, 32).flatten(0, 1))
    twin = timm.create_model(**encoder.settings.timm_arguments()).eval()
    twin.load_state_dict(encoder.model.state_dict())
    pixels = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(encoder(pixels)[0], twin(pixels))
    # other sizes: the same place has the same numbers, where a resampled table would stretch them
    seen = encoder._with_positions(encoder.model, torch.zeros(1, 6, 5, 32))[0, -30:]
    assert torch.equal(seen, sincos_positions(6, 5, 32).flatten(0, 1))


def test_without_a_table_a_view_is_a_bag_of_patches() -> None:
    encoder, pixels = small_vit(positions="none"), torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(encoder(pixels), encoder(pixels, positions=False))
    assert not encoder.model.pos_embed.any() and not encoder.model.pos_embed.requires_grad


def test_frozen_parts_stay_as_they_start_and_all_others_learn() -> None:
    encoder = small_vit(frozen=("patch_embed", "blocks.0.norm1.weight"))
    frozen = {name for name, parameter in encoder.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.norm1.weight"}
    assert torch.equal(encoder.model.patch_embed.proj.weight, small_vit().model.patch_embed.proj.weight)


def test_the_class_token_is_there_whatever_the_summary_and_registers_behind_it() -> None:
    pixels = torch.randn(2, 3, 3, 48, 48)
    for summary in ("class", "mean"):
        encoder = small_vit(summary=summary)
        features = encoder.encode(pixels)
        assert features.prefix is not None and features.prefix.shape == (2, 3, 1, 32) and encoder.has_class_token
        assert torch.equal(features.prefix[:, :, 0], features.summary) is (summary == "class")
    registers = Encoder(ModelSettings(name="vit_small_patch14_reg4_dinov2", **SMALL_VIT)).encode(pixels)
    assert registers.prefix is not None and torch.equal(registers.prefix[:, :, 0], registers.summary) and registers.prefix.shape[2] == 5
    for name in ("vit_base_patch16_siglip_224", "resnet10t"):
        encoder = Encoder(ModelSettings(name=name, **(SMALL_VIT if "vit" in name else {})))
        assert encoder.encode(pixels).prefix is None and not encoder.has_class_token
    kept = small_vit().encode(pixels, keep=torch.zeros(2, 3, 5, dtype=torch.long))
    assert kept.prefix is not None and kept.tokens.shape == (2, 3, 5, 32)
    assert not kept.detach().prefix.requires_grad


def test_pixels_without_a_record_are_encoded_as_views_are() -> None:
    encoder, pixels = small_vit(), torch.randn(2, 3, 3, 48, 48)
    features = encoder.encode(pixels)
    torch.testing.assert_close(features.summary, encoder(pixels.flatten(0, 1))[0].unflatten(0, (2, 3)))
    assert features.tokens.shape == (2, 3, 4, 4, 32)
    with pytest.raises(ValueError, match=r"pixels have shape \(2, 3, 48, 48\), expected \(B, V, 3, H, W\); add the view axis"):
        encoder.encode(pixels[:, 0])


def test_patches_have_a_size_and_convolutional_networks_have_none() -> None:
    assert small_vit().patch_px == (12, 12)
    with pytest.raises(ValueError, match="model 'resnet10t' has no patches; take a ViT"):
        _ = Encoder(ModelSettings(name="resnet10t")).patch_px


def test_messages_name_the_thing_and_the_mend() -> None:
    with pytest.raises(ValueError, match=r"views are \(50, 48\) px.*must divide"):
        small_vit()(torch.zeros(1, 3, 50, 48))
    for options in ({"keep": torch.zeros(1, 2, dtype=torch.long)}, {"positions": False}):
        with pytest.raises(ValueError, match="whole views; use a ViT"):
            Encoder(ModelSettings(name="resnet10t"))(torch.zeros(1, 3, 64, 64), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only ViTs have it"):
        ModelSettings(name="resnet10t", width=64)
    for changes, message in (
        ({"depth": 0}, "depth=0: needs at least 1"),
        ({"width": 0}, "width=0: needs at least 1"),
        ({"patch_size_px": 0}, "patch_size_px=0: needs at least 1"),
        ({"heads": 5}, r"model vit_small_patch16_224 \(.*heads 5\): timm cannot build it so \(.*\); change what is set of it"),
        ({"view_size_px": 5}, r"view_size_px=5 of model .*: smaller than a patch of \(12, 12\) px"),
        ({"tokens_from_block": 99}, "tokens_from_block=99 of model .*: needs -2 to 1, for it has 2 blocks"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "has a distillation token, which nothing here learns; take one without"),
    ):
        small = {"view_size_px": 48, "patch_size_px": 12, "width": 32, "depth": 2, "heads": 2}
        with pytest.raises(ValueError, match=f"^{message}|^model .* {message}"):
            Encoder(ModelSettings(**(small | changes)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such model"):
        ModelSettings(name="vit_enormous")
    with pytest.raises(ValueError, match=r"it has vit_base_.*, vit_base_patch16_224, "):
        ModelSettings(name="vit_base")
    with pytest.raises(ValueError, match="it has vit_small_patch16_224, "):
        ModelSettings(name="vit_smal_patch16_224")
    with torch.device("meta"):
        for name, size, message in (
            (
                "swin_tiny_patch4_window7_224",
                48,
                r"views are \(48, 48\) px, model 'swin_tiny.* takes \(224, 224\) alone; take such",
            ),
            ("mixer_s32_224", 224, r"'mixer_s32_224': gives \(1, 49, 512\), no feature map; take"),
        ):
            with pytest.raises(ValueError, match=message):
                Encoder(ModelSettings(name=name))(torch.zeros(1, 3, size, size))
        summary, tokens, _ = Encoder(ModelSettings(name="swin_tiny_patch4_window7_224"))(torch.zeros(1, 3, 224, 224))
        assert (summary.shape, tokens.shape) == ((1, 768), (1, 7, 7, 768))
    with pytest.raises(ValueError, match="no class token; use 'mean'"):
        ModelSettings(name="vit_base_patch16_siglip_224", summary="class")
    with pytest.raises(
        ValueError, match=r"frozen=\('patch',\): model 'vit_small_patch16_224' has no 'patch'; it has cls_token, pos_embed, "
    ):
        small_vit(frozen=("patch",))
    with pytest.raises(ValueError, match="positions='sincos' of model 'resnet10t': only ViTs have positions; leave it out"):
        ModelSettings(name="resnet10t", positions="sincos")
