"""The network that is trained: a timm model behind one signature, views in, a summary and tokens out.

Here: ViTs with position tables for any view size, learned or fixed, and convolutional networks by their last feature map.
Not here: heads and losses (objectives/), when and how often a view is encoded (objective.py), weights to start from (pretrained.py).
`Encoder.model` is the bare timm model: its weights load into `timm.create_model(**settings.timm_arguments())` as they are.
"""

import copy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import get_pretrained_cfg, group_parameters, is_model_in_modules, model_entrypoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.views import Views

SummaryKind = Literal["auto", "class", "mean"]
Positions = Literal["learned", "sincos", "none"]
Resampling = Literal["antialiased", "plain"]

ARCHITECTURE = ("view_size_px", "patch_size_px", "width", "depth", "heads", "tokens_from_block")  # settings that fit one model, not another


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which timm model, and what is changed of it; None leaves the model's own value. Weights start at random, unless `weights` says."""

    name: str = "vit_small_patch16_224"  # any plain ViT, or a convolutional network, of timm
    view_size_px: int | None = None  # side for which a ViT's position table is made; other view sizes resample it
    patch_size_px: int | None = None  # ViT only, as the next three
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    drop_path: float = 0.0
    summary: SummaryKind = "auto"  # the class token where there is one, else the mean
    tokens_from_block: int | None = None  # ViT only: take the tokens after this block (-2: the last but one), then the final LayerNorm
    positions: Positions = "learned"  # of a ViT; "sincos": fixed sines and cosines of row and column, the same at any view size
    resampling: Resampling = "antialiased"  # of learned positions at other view sizes: as timm does; "plain": as DINO did
    frozen: tuple[str, ...] = ()  # parts of the timm model that stay as they start, such as patch_embed
    weights: str | None = None  # to start from: a run's folder, an exported encoder's, or "timm" for those of the model's name

    def __post_init__(self) -> None:
        check_literals(self)
        if not timm.is_model(self.name):
            close = _near(self.name)
            raise ValueError(
                f"model {self.name!r}: timm {timm.__version__} has no such model" + (f"; it has {', '.join(close)}, ..." if close else "")
            )
        for name in ("view_size_px", "patch_size_px", "width", "depth", "heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 1")
        changes = [name for name in ARCHITECTURE if getattr(self, name) is not None]
        if changes and not self.is_vit:
            raise ValueError(f"{changes[0]}={getattr(self, changes[0])} of model {self.name!r}: only ViTs have it; leave it out")
        if self.positions != "learned" and not self.is_vit:
            raise ValueError(f"positions={self.positions!r} of model {self.name!r}: only ViTs have positions; leave it out")
        if self.resampling != "antialiased" and not (self.is_vit and self.positions == "learned"):
            raise ValueError(f"resampling={self.resampling!r} of model {self.name!r}: only a ViT's learned positions have it; leave it out")
        if self.summary == "class" and not (self.is_vit and _has_class_token(self.name)):
            raise ValueError(f"summary='class' of model {self.name!r}: it has no class token; use 'mean'")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: needs 0 <= drop_path < 1")

    @property
    def is_vit(self) -> bool:
        """Whether the model is one of timm's plain vision transformers, or registered with timm as one."""
        return _is_vit(self.name)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the samples of a micro-batch see one another in the model."""
        return _has_batch_norm(self.name)

    def described(self) -> str:
        """Return the model's name, and what is changed of it."""
        changes = [f"{name} {getattr(self, name)}" for name in ARCHITECTURE if getattr(self, name) is not None]
        changes += [f"positions {self.positions}"] if self.positions != "learned" else []
        changes += [f"resampling {self.resampling}"] if self.resampling != "antialiased" else []
        changes += [f"{part} frozen" for part in self.frozen]
        changes += [f"weights of {self.weights}"] if self.weights is not None else []
        return self.name + (f" ({', '.join(changes)})" if changes else "")

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `timm.create_model` builds the model."""
        arguments: dict[str, Any] = {"model_name": self.name, "num_classes": 0}
        if self.drop_path or _takes_drop_path(self.name):
            arguments["drop_path_rate"] = self.drop_path
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


def _outlined(name: str, **options: Any) -> Any:
    """Return a model of timm to look at, without numbers where it can be built so."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except NotImplementedError:  # older timm computes the widths of a few models, such as regnetz_005, by torch
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, **options)


@cache
def _has_class_token(name: str) -> bool:
    return _outlined(name).cls_token is not None


@cache
def _takes_drop_path(name: str) -> bool:
    try:
        _outlined(name, drop_path_rate=0.0)
    except TypeError:
        return False
    return True


@cache
def _has_batch_norm(name: str) -> bool:
    return any(isinstance(module, _BatchNorm) for module in _outlined(name).modules())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Features:
    """What the encoder makes of the views of one family."""

    summary: Tensor  # (B, V, D)
    tokens: Tensor  # (B, V, h, w, D); (B, V, n, D) where only a subset was asked for
    prefix: Tensor | None = None  # (B, V, p, D): what a ViT has before its patches, the class token first; None: nothing

    def detach(self) -> "Features":
        """Return the same, cut off from the encoder's gradient."""
        prefix = None if self.prefix is None else self.prefix.detach()
        return Features(summary=self.summary.detach(), tokens=self.tokens.detach(), prefix=prefix)


class Encoder(nn.Module):
    """A timm model that turns views into a summary and tokens; its `width` is D.

    Raises: ValueError if timm cannot build the model so, its summary and tokens differ in width, it has a distillation token, or the
    settings name a part or a block that it has not.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        try:
            self.model = cast(Any, timm.create_model(**settings.timm_arguments()))
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as problem:
            why = " ".join(str(problem).split()) or type(problem).__name__
            raise ValueError(f"model {settings.described()}: timm cannot build it so ({why}); change what is set of it") from None
        self.width = int(self.model.num_features)
        config = get_pretrained_cfg(settings.name)
        self.only_hw = tuple(config.input_size[1:]) if config and config.fixed_input_size and not settings.is_vit else None
        summary_width = getattr(self.model, "head_hidden_size", self.width)
        if summary_width != self.width:
            raise ValueError(f"model {settings.name!r} has tokens of width {self.width} and a summary of {summary_width}; take another")
        if isinstance(self.model, VisionTransformer):
            self._refuse_vit()
        if settings.positions != "learned":
            self._fix_positions()
        for part in settings.frozen:
            self._freeze(part)

    @property
    def patch_px(self) -> tuple[int, int]:
        """(height, width) of a ViT's patches.

        Raises: ValueError if the model has none.
        """
        if not isinstance(self.model, VisionTransformer):
            raise ValueError(f"model {self.settings.name!r} has no patches; take a ViT")
        height, width = self.model.patch_embed.patch_size
        return int(height), int(width)

    @property
    def has_class_token(self) -> bool:
        """Whether the first token of `Features.prefix` is a class token."""
        return isinstance(self.model, VisionTransformer) and self.model.cls_token is not None

    @property
    def layers(self) -> int:
        """How many layers `last_layers` can give: the blocks of a ViT, one of a convolutional network."""
        return len(self.model.blocks) if isinstance(self.model, VisionTransformer) else 1

    def layer_factors(self, decay: float) -> dict[str, float]:
        """Return, by the timm model's parameters, `decay` to the power of how many layers lie behind: 1 in the last one.

        Source: layer-wise learning rates as BEiT has them, arXiv 2106.08254, by timm's own layers.
        """
        layers = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        last = max(layers.values())
        return {name: decay ** (last - layer) for name, layer in layers.items()}

    def slow_copy(self) -> "Encoder":
        """Return a teacher: the same weights, without gradient, drop-path and dropout. A run that compiles its encoder compiles it too."""
        slow = copy.deepcopy(self).requires_grad_(False)
        slow.settings = replace(self.settings, drop_path=0.0)
        for module in slow.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        return slow

    def forward(self, pixels: Tensor, *, keep: Tensor | None = None, positions: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encode finished views; `keep` names the only tokens that are looked at, `positions=False` leaves the position table out.

        Shapes: pixels (n, 3, H, W), keep (n, k) int64, row * cols + col -> summary (n, D), tokens (n, h, w, D), or (n, k, D) with keep,
                prefix (n, p, D), or None where there is none.
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

    def encode(self, views: Views | Tensor, *, keep: Tensor | None = None, positions: bool = True) -> Features:
        """Encode the views of one family, or pixels that have no record, as one batch.

        Shapes: views (B, V), or pixels (B, V, 3, H, W), keep (B, V, k) int64 -> Features.
        Raises: ValueError as `forward`, and if pixels lack an axis.
        """
        pixels = views if isinstance(views, Tensor) else views.pixels
        if pixels.ndim != 5:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (B, V, 3, H, W); add the view axis with pixels[:, None]")
        shape = pixels.shape[:2]
        summary, tokens, prefix = self(pixels.flatten(0, 1), keep=None if keep is None else keep.flatten(0, 1), positions=positions)
        prefix = None if prefix is None else prefix.unflatten(0, shape)
        return Features(summary=summary.unflatten(0, shape), tokens=tokens.unflatten(0, shape), prefix=prefix)

    def last_layers(self, views: Views | Tensor, number: int) -> tuple[Features, ...]:
        """Return what the last `number` blocks of a ViT make of views, each behind the final LayerNorm, the last block last.

        Shapes: as `encode`. Of a convolutional network there is one layer, its last feature map.
        Raises: ValueError as `encode`, and if the network has fewer.
        """
        pixels = views if isinstance(views, Tensor) else views.pixels
        vit, shape = self.model, pixels.shape[:2]
        if not 1 <= number <= self.layers:
            raise ValueError(f"the last {number} layers of model {self.settings.name!r}: it has {self.layers}; take 1 to {self.layers}")
        if not isinstance(vit, VisionTransformer):
            return (self.encode(views),)
        x, grid = self._embedded(vit, pixels.flatten(0, 1), None, positions=True)
        layers = []
        for block in vit.blocks:
            x = block(x)
            layers.append(x)
        outputs = []
        for normed in map(vit.norm, layers[-number:]):
            prefix, tokens = normed.split([vit.num_prefix_tokens, normed.shape[1] - vit.num_prefix_tokens], 1)
            tokens, summary = tokens.unflatten(1, grid).unflatten(0, shape), vit.pool(normed).unflatten(0, shape)
            outputs.append(Features(summary=summary, tokens=tokens, prefix=prefix.unflatten(0, shape) if vit.num_prefix_tokens else None))
        return tuple(outputs)

    def _refuse_vit(self) -> None:
        """Raise ValueError if a ViT is one that `forward` does not compute."""
        settings, blocks = self.settings, len(self.model.blocks)
        if getattr(self.model, "dist_token", None) is not None:
            raise ValueError(f"model {settings.name!r} has a distillation token, which nothing here learns; take one without")
        if min(self.model.patch_embed.grid_size or (1,)) < 1:
            raise ValueError(f"view_size_px={settings.view_size_px} of model {settings.name!r}: smaller than a patch of {self.patch_px} px")
        if settings.tokens_from_block is not None and not -blocks <= settings.tokens_from_block < blocks:
            raise ValueError(
                f"tokens_from_block={settings.tokens_from_block} of model {settings.name!r}: needs {-blocks} to {blocks - 1}, "
                f"for it has {blocks} blocks"
            )

    def _fix_positions(self) -> None:
        """Write the fixed position table into a ViT, where timm looks for it in the exported weights too."""
        table = self.model.pos_embed
        if table is None:
            raise ValueError(f"positions={self.settings.positions!r} of model {self.settings.name!r}: it has no position table")
        table.requires_grad_(False).zero_()
        if self.settings.positions == "sincos":
            rows, cols = self.model.patch_embed.grid_size
            table[0, table.shape[1] - rows * cols :] = sincos_positions(rows, cols, self.width).flatten(0, 1)

    def _freeze(self, part: str) -> None:
        """Take a part of the timm model, a module or a parameter, out of training."""
        named = dict(self.model.named_parameters())
        parameters = [parameter for name, parameter in named.items() if name == part or name.startswith(f"{part}.")]
        if not parameters:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in named))
            raise ValueError(f"frozen={self.settings.frozen}: model {self.settings.name!r} has no {part!r}; it has {parts}")
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _feature_map(self, pixels: Tensor) -> tuple[Tensor, Tensor, None]:
        feature_map = self.model.forward_features(pixels)
        if feature_map.ndim != 4:
            raise ValueError(
                f"model {self.settings.name!r}: gives {tuple(feature_map.shape)}, no feature map; take a ViT or a convolutional network"
            )
        summary = self.model.forward_head(feature_map, pre_logits=True)
        # ConvNeXt keeps its final LayerNorm in the head, behind the pooling
        norm = getattr(getattr(self.model, "head", None), "norm", nn.Identity())
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return summary, norm(feature_map), None
        return summary, norm(feature_map).permute(0, 2, 3, 1), None

    def _embedded(self, vit: VisionTransformer, pixels: Tensor, keep: Tensor | None, positions: bool) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens that the first block sees, those before the patches first, (n, p + h w, D), and the grid (h, w) of a view.

        Raises: ValueError if patches do not divide the view.
        """
        patch = vit.patch_embed.patch_size
        if any(side % p for side, p in zip(pixels.shape[-2:], patch, strict=True)):
            raise ValueError(
                f"views are {tuple(pixels.shape[-2:])} px, patches {patch}: patches must divide a view, "
                f"e.g. {max(1, pixels.shape[-2] // patch[0]) * patch[0]} px"
            )
        cells = vit.patch_embed(pixels)  # (n, h, w, D)
        x = self._with_positions(vit, cells) if positions else self._without_positions(vit, cells)
        prefix = vit.num_prefix_tokens
        if keep is not None:
            subset = x[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :prefix], subset], 1)
        return vit.norm_pre(x), (cells.shape[1], cells.shape[2])

    def _vit(self, vit: VisionTransformer, pixels: Tensor, keep: Tensor | None, positions: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        x, cells = self._embedded(vit, pixels, keep, positions)
        prefix = vit.num_prefix_tokens
        tapped = x
        tap = range(len(vit.blocks))[-1 if self.settings.tokens_from_block is None else self.settings.tokens_from_block]
        for number, block in enumerate(vit.blocks):
            x = block(x)
            tapped = x if number == tap else tapped
        normed = vit.norm(x)
        tokens = (normed if tapped is x else vit.norm(tapped))[:, prefix:]
        grid = tokens if keep is not None else tokens.unflatten(1, cells)
        return vit.pool(normed), grid, normed[:, :prefix] if prefix else None

    def _with_positions(self, vit: VisionTransformer, cells: Tensor) -> Tensor:
        """Return the tokens that the first block sees: cells (n, h, w, D) -> (n, p + h w, D)."""
        if self.settings.positions == "learned":
            grid = tuple(vit.patch_embed.grid_size)
            plain = self.settings.resampling == "plain" and tuple(cells.shape[1:3]) != grid
            return self._with_plain_positions(vit, cells) if plain else vit._pos_embed(cells)
        if self.settings.positions == "sincos":
            cells = cells + sincos_positions(*cells.shape[1:], device=cells.device)
        return self._without_positions(vit, cells)

    def _with_plain_positions(self, vit: VisionTransformer, cells: Tensor) -> Tensor:
        """Return what `_with_positions` does of a grid other than the table's, by bicubic interpolation without antialiasing.

        Source: DINO's authors' code, commit 7c446df: a tenth of a cell is added to the grid, and sets the distance of the samples.
        """
        (rows, cols), table = vit.patch_embed.grid_size, vit.pos_embed
        assert table is not None
        before = table.shape[1] - rows * cols  # rows of class and register tokens
        factors = ((cells.shape[1] + 0.1) / rows, (cells.shape[2] + 0.1) / cols)
        of_patches = table[:, before:].unflatten(1, (rows, cols)).permute(0, 3, 1, 2)
        resampled = F.interpolate(of_patches, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1)
        x = self._without_positions(vit, cells + resampled)
        return torch.cat([x[:, :before] + table[:, :before], x[:, before:]], 1)

    @staticmethod
    def _without_positions(vit: VisionTransformer, cells: Tensor) -> Tensor:
        prefix = [token.expand(len(cells), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        return torch.cat([*prefix, cells.flatten(1, 2)], 1)


def sincos_positions(rows: int, cols: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return fixed positions of a grid of tokens: sines and cosines of the column in one half of the channels, of the row in the other.

    Shapes: -> (rows, cols, width) float32. The first quarter holds sin(col / 10000^(i / (width / 4))), the second its cosine.
    Raises: ValueError if the width cannot be cut into four.
    Source: as MAE has them (arXiv 2111.06377); those of MoCo v3 (arXiv 2104.02057) are the same with row and column swapped.
    """
    if width % 4:
        raise ValueError(f"width={width} with positions='sincos': needs a multiple of 4")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    of_row, of_col = (torch.arange(n, dtype=torch.float64, device=device)[:, None] * frequency for n in (rows, cols))
    of_row, of_col = (torch.cat([angle.sin(), angle.cos()], -1).float() for angle in (of_row, of_col))
    return torch.cat([of_col.expand(rows, -1, -1), of_row[:, None].expand(-1, cols, -1)], -1)
