"""The encoder's signature: shapes for every kind of model and view size, subsets of tokens, and timm's own forward as the truth."""

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from wherefrom.train.encoder import Encoder, ModelSettings

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
    summary, tokens = encoder(torch.randn(2, 3, *hw))
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
    summary, tokens = encoder(pixels)
    same_summary, same_tokens = encoder(pixels, keep=everything)
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
    summary, tokens = encoder(torch.randn(2, 3, 96, 96))
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


def test_messages_name_the_thing_and_the_mend() -> None:
    with pytest.raises(ValueError, match=r"views are \(50, 48\) px.*must divide"):
        small_vit()(torch.zeros(1, 3, 50, 48))
    for options in ({"keep": torch.zeros(1, 2, dtype=torch.long)}, {"positions": False}):
        with pytest.raises(ValueError, match="whole views; use a ViT"):
            Encoder(ModelSettings(name="resnet10t"))(torch.zeros(1, 3, 64, 64), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only ViTs have it"):
        ModelSettings(name="resnet10t", width=64)
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
        summary, tokens = Encoder(ModelSettings(name="swin_tiny_patch4_window7_224"))(torch.zeros(1, 3, 224, 224))
        assert (summary.shape, tokens.shape) == ((1, 768), (1, 7, 7, 768))
    with pytest.raises(ValueError, match="no class token; use 'mean'"):
        ModelSettings(name="vit_base_patch16_siglip_224", summary="class")
