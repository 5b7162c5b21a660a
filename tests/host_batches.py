"""Batches of views that no loader rendered, and the tiny networks, for which the figures in tests/data/hosts were computed. float64."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from host_formulas import parameter, tensor
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wherefrom.pipeline.views import Batch, Photometric, ViewGeometry, Views
from wherefrom.train import Encoder, ModelSettings


def batch_of(families: Mapping[str, Tensor]) -> Batch:
    """Return pixels (B, V, 3, H, W) by their families as a batch, each view of a whole picture."""
    views = tuple(_views(name, pixels) for name, pixels in families.items())
    record = views[0].geometry
    label = torch.full_like(record.sample, -1)
    return Batch(sample=record.sample, drawn_for=record.drawn_for, label=label, source_size=record.source_size, views=views)


def _views(family: str, pixels: Tensor) -> Views:
    b, v, _, height, width = pixels.shape
    every = torch.ones(b, v, dtype=torch.bool)
    geometry = ViewGeometry(
        boxes=torch.tensor([0.0, 0.0, width, height], dtype=torch.float32).expand(b, v, 4),
        flipped=~every,
        quarter_turns=torch.zeros(b, v, dtype=torch.int64),
        source_size=torch.tensor([height, width], dtype=torch.int32).expand(b, 2),
        stored_orientation=torch.ones(b, dtype=torch.uint8),
        sample=torch.arange(b),
        drawn_for=torch.arange(b),
        view=torch.arange(v),
        family=family,
        size_px=(height, width),
        seed=0,
        epoch=0,
    )
    one, nought = torch.ones(b, v, dtype=torch.float32), torch.zeros(b, v, dtype=torch.float32)
    photometric = Photometric(
        brightness=one, contrast=one, saturation=one, hue_rad=nought, gray=~every, blur_sigma_px=nought, solarized=~every
    )
    return Views(pixels=pixels, geometry=geometry, valid=every, photometric=photometric)


def tiny_vit(**changes: object) -> Encoder:
    """Return an encoder of 16 px views, patches of 4 px, width 16, two blocks of two heads, an MLP twice as wide."""
    encoder = Encoder(
        ModelSettings(name="vit_small_patch16_224", view_size_px=16, patch_size_px=4, width=16, depth=2, heads=2, **changes)  # type: ignore[arg-type]
    )
    encoder.model = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        dynamic_img_size=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return encoder.double()


def fill(module: nn.Module, theirs: Callable[[str], str]) -> None:
    """Give every parameter the weight that the authors' one has, by its name there."""
    with torch.no_grad():
        for name, own in module.named_parameters():
            own.copy_(tensor(parameter(theirs(name), tuple(own.shape))))
