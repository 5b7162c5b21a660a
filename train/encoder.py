"""The network that is trained: a timm model behind one signature, views in, a summary and tokens out.

Here: ViTs with position tables resampled to any view size, and convolutional networks by their last feature map.
Not here: heads and losses (objectives/), when and how often a view is encoded (objective.py).
`Encoder.model` is the bare timm model: its weights load into `timm.create_model(**settings.timm_arguments())` as they are.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, cast

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_in_modules, model_entrypoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.views import Views

SummaryKind = Literal["auto", "class", "mean"]

ARCHITECTURE = ("view_size_px", "patch_size_px", "width", "depth", "heads", "tokens_from_block")  # settings that fit one model, not another


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which timm model, and what is changed of it; None leaves the model's own value. Weights start at random."""

    name: str = "vit_small_patch16_224"  # any plain ViT, or a convolutional network, of timm
    view_size_px: int | None = None  # side for which a ViT's position table is made; other view sizes resample it
    patch_size_px: int | None = None  # ViT only, as the next three
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    drop_path: float = 0.0
    summary: SummaryKind = "auto"  # the class token where there is one, else the mean
    tokens_from_block: int | None = None  # ViT only: take the tokens after this block (-2: the last but one), then the final LayerNorm

    def __post_init__(self) -> None:
        check_literals(self)
        if not timm.is_model(self.name):
            close = _near(self.name)
            raise ValueError(
                f"model {self.name!r}: timm {timm.__version__} has no such model" + (f"; it has {', '.join(close)}, ..." if close else "")
            )
        changes = [name for name in ARCHITECTURE if getattr(self, name) is not None]
        if changes and not self.is_vit:
            raise ValueError(f"{changes[0]}={getattr(self, changes[0])} of model {self.name!r}: only ViTs have it; leave it out")
        if self.summary == "class" and not (self.is_vit and _has_class_token(self.name)):
            raise ValueError(f"summary='class' of model {self.name!r}: it has no class token; use 'mean'")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: needs 0 <= drop_path < 1")

    @property
    def is_vit(self) -> bool:
        """Whether the model is one of timm's plain vision transformers, or registered with timm as one."""
        return _is_vit(self.name)

    def described(self) -> str:
        """Return the model's name, and what is changed of it."""
        changes = [f"{name} {getattr(self, name)}" for name in ARCHITECTURE if getattr(self, name) is not None]
        return self.name + (f" ({', '.join(changes)})" if changes else "")

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `timm.create_model` builds the model."""
        arguments: dict[str, Any] = {"model_name": self.name, "num_classes": 0, "drop_path_rate": self.drop_path}
        if self.is_vit:
            mean = self.summary == "mean" or not _has_class_token(self.name)
            # fc_norm=False keeps the final LayerNorm on the tokens, wherever they are pooled
            arguments |= {"dynamic_img_size": True, "fc_norm": False, "global_pool": "avg" if mean else "token"}
            changes = {"img_size": self.view_size_px, "patch_size": self.patch_size_px, "embed_dim": self.width, "depth": self.depth}
            arguments |= {name: value for name, value in (changes | {"num_heads": self.heads}).items() if value is not None}
        return arguments


@cache
def _is_vit(name: str) -> bool:
    if is_model_in_modules(name, ("vision_transformer", "deit")):
        return True
    if not timm.is_model(name) or model_entrypoint(name).__module__.startswith("timm."):
        return False
    with torch.device("meta"):  # somebody else's model: only its class tells
        return isinstance(timm.create_model(name), VisionTransformer)


def _near(name: str) -> list[str]:
    """Return up to four names of models that may have been meant: those that begin so, shortest first, else those that look alike."""
    begin_so = sorted(timm.list_models(f"{name}*"), key=lambda candidate: (len(candidate), candidate))
    return begin_so[:4] or get_close_matches(name, timm.list_models(), 4)


@cache
def _has_class_token(name: str) -> bool:
    with torch.device("meta"):
        return timm.create_model(name).cls_token is not None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Features:
    """What the encoder makes of the views of one family."""

    summary: Tensor  # (B, V, D)
    tokens: Tensor  # (B, V, h, w, D); (B, V, n, D) where only a subset was asked for

    def detach(self) -> "Features":
        """Return the same, cut off from the encoder's gradient."""
        return Features(summary=self.summary.detach(), tokens=self.tokens.detach())


class Encoder(nn.Module):
    """A timm model that turns views into a summary and tokens; its `width` is D.

    Raises: ValueError if the model's summary and tokens differ in width.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.model = cast(Any, timm.create_model(**settings.timm_arguments()))
        self.width = int(self.model.num_features)
        config = get_pretrained_cfg(settings.name)
        self.only_hw = tuple(config.input_size[1:]) if config and config.fixed_input_size and not settings.is_vit else None
        summary_width = getattr(self.model, "head_hidden_size", self.width)
        if summary_width != self.width:
            raise ValueError(f"model {settings.name!r} has tokens of width {self.width} and a summary of {summary_width}; take another")

    def forward(self, pixels: Tensor, *, keep: Tensor | None = None, positions: bool = True) -> tuple[Tensor, Tensor]:
        """Encode finished views; `keep` names the only tokens that are looked at, `positions=False` leaves the position table out.

        Shapes: pixels (n, 3, H, W), keep (n, k) int64, row * cols + col -> summary (n, D), tokens (n, h, w, D), or (n, k, D) with keep.
        Raises: ValueError if a ViT's patches do not divide the view, if the network takes views of another size alone or has no feature
        map, or if keep or positions=False meet a network without tokens of its own.
        """
        if self.only_hw is not None and self.only_hw != tuple(pixels.shape[-2:]):
            raise ValueError(
                f"views are {tuple(pixels.shape[-2:])} px, model {self.settings.name!r} takes {self.only_hw} alone; "
                "take such views, or a plain ViT or convolutional network"
            )
        if isinstance(self.model, VisionTransformer):
            return self._vit(self.model, pixels, keep, positions)
        if keep is not None or not positions:
            option = "keep" if keep is not None else "positions=False"
            raise ValueError(f"{option} with model {self.settings.name!r}: a convolutional network sees whole views; use a ViT")
        return self._feature_map(pixels)

    def encode(self, views: Views, *, keep: Tensor | None = None, positions: bool = True) -> Features:
        """Encode the views of one family, as one batch.

        Shapes: views (B, V), keep (B, V, k) int64 -> Features.
        """
        shape = views.pixels.shape[:2]
        summary, tokens = self(views.pixels.flatten(0, 1), keep=None if keep is None else keep.flatten(0, 1), positions=positions)
        return Features(summary=summary.unflatten(0, shape), tokens=tokens.unflatten(0, shape))

    def _feature_map(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self.model.forward_features(pixels)
        if feature_map.ndim != 4:
            raise ValueError(
                f"model {self.settings.name!r}: gives {tuple(feature_map.shape)}, no feature map; take a ViT or a convolutional network"
            )
        summary = self.model.forward_head(feature_map, pre_logits=True)
        # ConvNeXt keeps its final LayerNorm in the head, behind the pooling
        norm = getattr(getattr(self.model, "head", None), "norm", nn.Identity())
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return summary, norm(feature_map)
        return summary, norm(feature_map).permute(0, 2, 3, 1)

    def _vit(self, vit: VisionTransformer, pixels: Tensor, keep: Tensor | None, positions: bool) -> tuple[Tensor, Tensor]:
        patch = vit.patch_embed.patch_size
        if any(side % p for side, p in zip(pixels.shape[-2:], patch, strict=True)):
            raise ValueError(
                f"views are {tuple(pixels.shape[-2:])} px, patches {patch}: patches must divide a view, e.g. {patch[0] * 4} px"
            )
        cells = vit.patch_embed(pixels)  # (n, h, w, D)
        x = vit._pos_embed(cells) if positions else self._without_positions(vit, cells.flatten(1, 2))
        prefix = vit.num_prefix_tokens
        if keep is not None:
            subset = x[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :prefix], subset], 1)
        x = vit.norm_pre(x)
        tapped = x
        tap = range(len(vit.blocks))[-1 if self.settings.tokens_from_block is None else self.settings.tokens_from_block]
        for number, block in enumerate(vit.blocks):
            x = block(x)
            tapped = x if number == tap else tapped
        normed = vit.norm(x)
        tokens = (normed if tapped is x else vit.norm(tapped))[:, prefix:]
        return vit.pool(normed), tokens if keep is not None else tokens.unflatten(1, cells.shape[1:3])

    @staticmethod
    def _without_positions(vit: VisionTransformer, cells: Tensor) -> Tensor:
        prefix = [token.expand(len(cells), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        return torch.cat([*prefix, cells], 1)
