"""The tiny ViT that figures of DINO, MoCo v3 and MAE belong to."""

from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wherefrom.train import Encoder, ModelSettings


def tiny_vit(**changes: Any) -> Encoder:
    """Return an encoder of 16 px views, patches of 4 px, width 16, two blocks of two heads, an MLP twice as wide; float64."""
    encoder = Encoder(ModelSettings(name="vit_small_patch16_224", view_size_px=16, patch_size_px=4, width=16, depth=2, heads=2, **changes))
    frozen = {name: parameter.requires_grad for name, parameter in encoder.model.named_parameters()}
    norm = partial(nn.LayerNorm, eps=1e-6)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
    encoder.model = VisionTransformer(**sizes, dynamic_img_size=True, norm_layer=norm)
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(frozen[name])
    return encoder.double()
