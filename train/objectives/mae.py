"""MAE: tell the pixels of the patches that a ViT does not see from the few that it sees.

Here: the settings, the mask of a view, patches as targets, the decoder, the objective, and how the method's weights start.
Not here: fixed positions (encoder.py), the numbers that masks are drawn from (pipeline/records.py), schedules (settings).
Source: arXiv 2111.06377, written from its description; masks, targets, loss and weights after updates equal figures that the authors'
code gave (tests/test_hosts_mae.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.records import keyed_uniform
from wherefrom.pipeline.view_recipe import ColorLaw, Mirror, ViewFamily
from wherefrom.pipeline.views import Batch, ViewGeometry
from wherefrom.train.encoder import Encoder, sincos_positions
from wherefrom.train.objective import Encode, Objective, ParameterRule, Progress, Terms
from wherefrom.train.objectives.collapse import spread

CHANNELS = 3  # of pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class MAESettings:
    """Every choice of MAE. Its encoder is a ViT whose positions are fixed: `positions="sincos"` of the model, which recipes set.

    start: how the encoder's weights start. "mae": as the authors' do, if the run starts from none; MAE is the first objective then.
           "model": as the model has them; a plug-in beside another host changes no encoder.

    Raises: ValueError if the mask ratio leaves all patches or none, or the decoder's width fits neither its heads nor its positions.
    """

    size_px: int = 224  # side of the finished, square view; patches divide it
    area_frac: tuple[float, float] = (0.2, 1.0)  # of the picture that the view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    mirror: Mirror = "view"
    color: ColorLaw | None = None

    mask_ratio: float = 0.75  # of the patches, which the encoder does not see; what is left over is cut off to whole patches
    normalize_patches: bool = True  # each patch that is to be told has mean 0 and variance 1
    decoder_width: int = 512
    decoder_depth: int = 8  # blocks
    decoder_heads: int = 16
    decoder_mlp_ratio: float = 4.0
    start: Literal["mae", "model"] = "mae"
    weight: float = 1.0  # of the whole objective

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: needs 0 < mask_ratio < 1, e.g. 0.75")
        if min(self.decoder_width, self.decoder_depth, self.decoder_heads) < 1 or not self.decoder_mlp_ratio > 0:
            raise ValueError(
                f"decoder_width={self.decoder_width}, decoder_depth={self.decoder_depth}, decoder_heads={self.decoder_heads}, "
                f"decoder_mlp_ratio={self.decoder_mlp_ratio}: need at least 1, and a positive ratio"
            )
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(f"decoder_width={self.decoder_width}: needs a multiple of 4 and of decoder_heads={self.decoder_heads}")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: cannot be negative")
        _ = self.family("mae")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the one view that these settings ask the loader for."""
        return ViewFamily(
            name=name,
            views=1,
            size_px=(self.size_px, self.size_px),
            law=Independent(area_frac=self.area_frac, aspect=self.aspect),
            mirror=self.mirror,
            color=self.color,
            min_side_px=1,
        )

    def objective(self, name: str) -> "MAE":
        """Return what is learned by these settings, under a name."""
        return MAE(self, name=name)

    def kept_patches(self, patches: int) -> int:
        """Return how many of so many patches the encoder sees.

        Raises: ValueError if these are none, or all of them.
        """
        kept = int(patches * (1 - self.mask_ratio))  # cut off, as in the authors' code: 100 patches at 0.8 keep 19
        if not 0 < kept < patches:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} of {patches} patches keeps {kept}: some must be kept and some masked; "
                "change it, or take smaller patches"
            )
        return kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mask:
    """Which patches of a view the encoder sees, and how all are put back into their places; leading axes (...) are views."""

    keep: Tensor  # (..., k) int64, numbers row * cols + col of those seen, in the order in which they are seen
    restore: Tensor  # (..., N) int64: where each patch stands among those seen, in their order, then those masked

    @property
    def masked(self) -> Tensor:
        """Which patches are not seen, (..., N) bool."""
        return self.restore >= self.keep.shape[-1]

    @staticmethod
    def of(noise: Tensor, kept: int) -> "Mask":
        """Return the mask that keeps the patches of the `kept` smallest numbers; noise (..., N), uniform."""
        order = noise.argsort(dim=-1, stable=True)
        return Mask(keep=order[..., :kept], restore=order.argsort(dim=-1))


class MAE(Objective):
    """MAE as an objective: one term, the mean squared error of the masked patches. Masks belong to records: no rank changes them."""

    positions: Tensor

    def __init__(self, settings: MAESettings, *, name: str = "mae") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)

    def setup(self, encoder: Encoder) -> None:
        """Build the decoder, and start its weights, and the encoder's if so set, as the method has them.

        Raises: ValueError if the encoder has no patches, these do not divide the views, or the mask would leave all or none.
        """
        settings, size = self.settings, self.settings.size_px
        if not encoder.settings.is_vit:
            raise ValueError(f"objective {self.name!r} with model {encoder.settings.name!r}: patches are masked; take a ViT")
        self.patch_px = encoder.patch_px
        if any(size % side for side in self.patch_px):
            raise ValueError(
                f"objective {self.name!r}: views of {size} px are not divided by patches of {self.patch_px} px; "
                f"take e.g. {self.name}.size_px={max(1, size // self.patch_px[0]) * self.patch_px[0]}"
            )
        rows, cols = (size // side for side in self.patch_px)
        self.kept = settings.kept_patches(rows * cols)
        width = settings.decoder_width
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, settings.decoder_heads, settings.decoder_mlp_ratio, qkv_bias=True) for _ in range(settings.decoder_depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)  # as timm's blocks have it
        self.predict = nn.Linear(width, self.patch_px[0] * self.patch_px[1] * CHANNELS)
        self.register_buffer("positions", sincos_positions(rows, cols, width).flatten(0, 1), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        _start_linear_layers(self)
        if settings.start == "mae" and encoder.settings.weights is None:
            _start_encoder(encoder)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, what the decoder tells of masked patches, against their pixels; and how summaries of the others spread."""
        views = batch.family(self.name)
        mask = self.mask_of(views.geometry)
        seen = encode(views, keep=mask.keep)
        prefix = [] if seen.prefix is None else [seen.prefix.flatten(0, 1)]
        predicted = self.decode(torch.cat([*prefix, seen.tokens.flatten(0, 1)], 1), mask.restore.flatten(0, 1))
        targets = self.targets(views.pixels.flatten(0, 1))
        losses = {"pixels": reconstruction_loss(predicted, targets, mask.masked.flatten(0, 1))}
        return Terms(losses=losses, meters=spread(seen.summary))

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Return how a parameter learns: the class token decays as matrices and the mask token do, fixed positions do not learn."""
        return ParameterRule(decays=True if name == "encoder.model.cls_token" else None)

    def mask_of(self, record: ViewGeometry) -> Mask:
        """Return the masks of views (B, V): functions of the record, and of the objective's name."""
        return Mask.of(keyed_uniform(record, f"{self.name}/mask", (len(self.positions),)), self.kept)

    def decode(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Return every patch as told from some.

        Shapes: tokens (n, p + k, D), the encoder's prefix first, restore (n, N) as of `Mask` -> (n, N, patch pixels * 3).
        """
        embedded = self.embed(tokens)
        prefix, seen = embedded.split([tokens.shape[1] - self.kept, self.kept], 1)
        width, masked = embedded.shape[-1], restore.shape[1] - self.kept
        told = torch.cat([seen, self.mask_token.to(seen.dtype).expand(len(seen), masked, width)], 1)
        placed = told.gather(1, restore.unsqueeze(-1).expand(-1, -1, width)) + self.positions
        decoded = self.norm(self.blocks(torch.cat([prefix, placed], 1)))
        return self.predict(decoded[:, prefix.shape[1] :])

    def targets(self, pixels: Tensor) -> Tensor:
        """Return what is to be told of views (n, 3, H, W), as the encoder sees them: (n, N, patch pixels * 3) float32."""
        patches = patches_of(pixels.float() if pixels.dtype != torch.float64 else pixels, self.patch_px)
        return normalized(patches) if self.settings.normalize_patches else patches


def patches_of(pixels: Tensor, patch_px: tuple[int, int]) -> Tensor:
    """Return a view as patches, row by row; within one, pixels row by row, and of each its channels.

    Shapes: pixels (n, C, H, W) -> (n, N, patch height * width * C).
    """
    height, width = patch_px
    cells = pixels.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # (n, C, rows, height, cols, width)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalized(patches: Tensor) -> Tensor:
    """Return patches (..., pixels) less their mean, over their standard deviation: unbiased, of variance + 1e-6; constant ones are 0."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(predicted: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Return the mean over all masked patches of the batch of a patch's mean squared error; under autocast, too, in the targets' precision.

    Shapes: predicted and targets (n, N, pixels), masked (n, N) bool -> ().
    """
    error = (predicted.to(targets.dtype) - targets).square().mean(-1)
    return (error * masked).sum() / masked.sum()


def _start_linear_layers(module: nn.Module) -> None:
    """Start every linear layer as the authors do: Xavier uniform, queries, keys and values as one matrix; biases of 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _start_encoder(encoder: Encoder) -> None:
    """Start a ViT's weights as the authors do; of the patch embedding the matrix alone, its bias stays as a convolution's starts."""
    vit = encoder.model
    _start_linear_layers(vit)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
