"""PART: predict where one patch of a window lies relative to another, of patches cut anywhere, by a network that is told no place.

Here: the settings, the objective; patches come from the loader as views of their own, and are laid side by side as a ViT's tokens.
Not here: how patches are drawn (Scattered, wherefrom.pipeline.laws), heads (pair_heads.py), how it is judged (train/evaluation/pairs.py).
Source: arXiv 2506.03682, after its text and a copy of its code; what differs is listed in docs/methods/part.md.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import CHANNELS, PairUnits, PositionUnit, Scale
from wherefrom.pipeline.crops import Snap
from wherefrom.pipeline.draws import named_seed
from wherefrom.pipeline.laws import Scattered
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.records import keyed_permutations
from wherefrom.pipeline.view_recipe import ColorLaw, Mirror, ViewFamily
from wherefrom.pipeline.views import Batch, ViewGeometry, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.pair_heads import AdditiveHead, CrossAttentionHead, LinearHead, Query
from wherefrom.train.objectives.pairs import Loss, enlarged, law_records, ordered_pairs, pair_terms, position_and_scale

JUDGED_PAIRS = 1024  # of two patches, at most, by which a run is judged: of 196 there are 38,220
STANDARDIZED_ON = 1024  # pictures, 16 patches of each: patches of a window are drawn alike


@dataclass(frozen=True, kw_only=True, slots=True)
class PARTSettings:
    """Every choice of PART; what is not named is as published for ImageNet, but for the head, which here learns all N^2 pairs.

    Raises: ValueError if patches do not fit their window.
    """

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the window, in which patches are `patch_px` wide
    patches: int = 196  # N
    patch_px: int = 16  # side of a finished patch: that of the encoder's
    sides_px: tuple[int, int] | None = None  # of patches as cut, in pixels of the window, then resized to patch_px; None: patch_px
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture, in a window
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    min_side_px: int = 16  # of a window
    snap: Snap = "none"  # "pixel": patches of whole pixels of the picture, which every renderer cuts
    mirror: Mirror = "picture"
    color: ColorLaw | None = field(default_factory=lambda: ColorLaw(saturation=0.4, hue=0.0, gray_prob=0.0))  # one a window

    head: Literal["additive", "linear", "cross_attention"] = "additive"
    query: Query = "patches"  # of cross-attention
    projections: bool = True  # of cross-attention: linear maps of query, keys and values, and of what is read
    keys_frac: float = 1.0  # of the patches that cross-attention reads, others in every window and update
    pairs: int | None = None  # sampled anew in every update, the same in all pictures; None: all N^2, a patch with itself too
    hidden: int | None = None  # of the additive head; None: the encoder's width
    position: PositionUnit = "reference"
    scale: Scale | None = None  # None: that of width and height where patches are cut in several sizes
    standardize: bool = True  # by the law's mean and standard deviation
    loss: Loss = "squared"  # summed over a term's channels
    smooth_l1_beta: float = 0.5
    weight_position: float = 1.0  # of its term, within `weight`
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        check_literals(self)
        if self.patches < 2:
            raise ValueError(f"patches={self.patches}: a pair needs 2")
        if self.pairs is not None and not 1 <= self.pairs <= self.patches**2:
            raise ValueError(f"pairs={self.pairs} of {self.patches} patches: needs 1 to {self.patches**2}, or none for all")
        if not 0 < self.keys_frac <= 1:
            raise ValueError(f"keys_frac={self.keys_frac}: needs 0 < keys_frac <= 1")
        if self.keys_frac < 1 and self.head != "cross_attention":
            raise ValueError(f"keys_frac={self.keys_frac} with head={self.head!r}: only cross_attention reads patches; leave it out")
        if min(self.weight, self.weight_position, self.weight_scale) < 0:
            weights = ", ".join(f"{name}={getattr(self, name)}" for name in ("weight", "weight_position", "weight_scale"))
            raise ValueError(f"{weights}: weights cannot be negative")
        _ = self.family("part")  # it and its law check their own numbers

    @property
    def law_name(self) -> str:
        """What R2 is named by: it does not compare across laws."""
        low, high = self.cut_sides_px
        return f"{self.patches} scattered patches, {low}{'' if low == high else f' to {high}'} of {self.size_px} px"

    @property
    def cut_sides_px(self) -> tuple[int, int]:
        """The resolved `sides_px`."""
        return self.sides_px or (self.patch_px, self.patch_px)

    @property
    def target_scale(self) -> Scale:
        """The resolved `scale`."""
        low, high = self.cut_sides_px
        return self.scale or ("none" if low == high else "log_sides")

    def family(self, name: str) -> ViewFamily:
        """Return the patches that these settings ask the loader for, each a view."""
        return ViewFamily(
            name=name,
            views=self.patches,
            size_px=(self.patch_px, self.patch_px),
            law=Scattered(area_frac=self.area_frac, aspect=self.aspect, window_px=self.size_px, sides_px=self.cut_sides_px),
            mirror=self.mirror,
            color=self.color,
            color_per="picture",
            snap=self.snap,
            min_side_px=self.min_side_px,
        )

    def objective(self, name: str) -> "PART":
        """Return what is learned by these settings, under a name."""
        return PART(self, name=name)


class PART(Objective):
    """PART as an objective: two terms, position and scale, of pairs of patches; where all are as large, the second is 0."""

    target_mean: Tensor
    target_std: Tensor
    channel_weights: Tensor
    pairs: Tensor

    def __init__(self, settings: PARTSettings, *, name: str = "part") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights = {"position": settings.weight_position, "scale": settings.weight_scale}
        self.families = (settings.family(name),)
        self.channels = CHANNELS[settings.target_scale]
        per_channel = [settings.weight_position] * 2 + [settings.weight_scale] * (len(self.channels) - 2)
        self.register_buffer("channel_weights", torch.tensor(per_channel), persistent=False)
        every = ordered_pairs(settings.patches)
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:JUDGED_PAIRS].sort().values
        self.register_buffer("pairs", every[chosen], persistent=False)  # that a run is judged by

    def setup(self, encoder: Encoder) -> None:
        """Build the head; its weights are drawn from torch's generator.

        Raises: ValueError if the encoder is no ViT, or its patches have another side.
        """
        side = self.settings.patch_px
        if encoder.patch_px != (side, side):
            theirs = f"patches of {encoder.settings.name!r} are {encoder.patch_px} px"
            raise ValueError(f"patch_px={side} of {self.name!r}: {theirs}; take theirs, or model.patch_size_px={side}")
        self.head = self.new_head(encoder.width)
        mean, std = self.standardization()
        self.register_buffer("target_mean", mean)
        self.register_buffer("target_std", std)

    def new_head(self, width: int) -> AdditiveHead | LinearHead | CrossAttentionHead:
        """Return a fresh head for features of `width`."""
        settings, channels = self.settings, len(self.channels)
        if settings.head == "additive":
            return AdditiveHead(width, settings.hidden or width, channels)
        if settings.head == "linear":
            return LinearHead(width, channels)
        return CrossAttentionHead(width, channels, query=settings.query, patches=settings.patches, projections=settings.projections)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        settings, views = self.settings, batch.family(self.name)
        features, record = self.features(views, encode), views.geometry
        pairs = self.learned_pairs(record, progress)
        if isinstance(self.head, AdditiveHead):
            return self._terms_without_pairs(self.head, features, views, pairs)
        every = pairs if pairs is not None else self._every_pair(record.boxes.device)
        targets, mask = self.targets(record, every), views.valid[:, :1].expand(-1, len(every))
        kept = None
        if settings.keys_frac < 1:
            number = max(1, round(settings.keys_frac * settings.patches))
            kept = keyed_permutations(record[:, :1], f"{self.name}/keys", settings.patches)[:, 0, :number]
        predicted = self.head(features, every, kept)[0] if isinstance(self.head, CrossAttentionHead) else self.head(features, every)[0]
        terms = pair_terms(predicted, targets, mask, self.channels, loss=settings.loss, beta=settings.smooth_l1_beta)
        return Terms(losses=terms.losses, meters={**terms.meters, **self._meters(features, views)})

    def features(self, views: Views, encode: Encode) -> Features:
        """Return what the network makes of every patch among the others of its window: summaries and tokens are the same, (B, N, D)."""
        side = self.settings.patch_px
        pixels = (views if views.geometry.size_px == (side, side) else enlarged(views, side)).pixels
        row = pixels.permute(0, 2, 3, 1, 4).flatten(-2).unsqueeze(1)  # (B, 1, 3, P, N P): places in it say nothing
        tokens = encode(row, positions=False).tokens[:, 0, 0]
        return Features(summary=tokens, tokens=tokens[:, :, None, None])

    def predict(self, features: Features, pairs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return standardized predictions (B, P, C) for `pairs` (P, 2), by default those that a run is judged by, and meters."""
        return self.head(features, self.pairs if pairs is None else pairs)

    def evaluation_family(self) -> ViewFamily:
        """Return the patches to judge by: the same boxes, neither colored nor mirrored."""
        return replace(self.families[0], color=None, mirror="none")

    def boxes(self, record: ViewGeometry) -> Tensor:
        """Return the boxes that pairs are made of, (B, N, 4): those of the patches."""
        return record.boxes

    def pair_mask(self, record: ViewGeometry, valid: Tensor) -> Tensor:
        """Return which pairs count, (B, P) bool: those of valid (B, N) patches."""
        return valid[:, self.pairs.to(valid.device)].all(-1)

    def targets(self, record: ViewGeometry, pairs: Tensor | None = None, *, standardized: bool = True) -> Tensor:
        """Return what is to be predicted, (B, P, C) float32, of the boxes as cut."""
        return pair_targets(
            record.boxes,
            self.pairs if pairs is None else pairs,
            units=self._units(standardized=standardized),
            flipped=record.flipped,
            picture_hw=record.source_size,
        )

    def standardization(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of every channel under the law, a patch with itself among the pairs, (C,) float32."""
        channels = len(self.channels)
        if not self.settings.standardize:
            return torch.zeros(channels), torch.ones(channels)
        patches = self.settings.patches
        some = replace(self.families[0], views=min(16, patches))
        targets = self.targets(law_records(some, pictures=STANDARDIZED_ON), ordered_pairs(some.views), standardized=False)
        drawn = targets.flatten(0, 1).double()
        others = 1 - 1 / patches  # the share of pairs of two; those of one are 0 in every channel but a ratio of sides, which is 1
        itself = torch.tensor([0.0, 0.0] + [float(self.settings.target_scale == "ratio")] * (channels - 2), dtype=torch.float64)
        mean = others * drawn.mean(0) + (1 - others) * itself
        square = others * drawn.square().mean(0) + (1 - others) * itself.square()
        return mean.float(), (square - mean.square()).sqrt().clamp(min=1e-6).float()

    def learned_pairs(self, record: ViewGeometry, progress: Progress) -> Tensor | None:
        """Return the pairs of this update, (P, 2) int64, alike on all ranks and in all micro-batches; None: all."""
        if self.settings.pairs is None:
            return None
        generator = torch.Generator().manual_seed(named_seed(record.seed, f"{self.name}/pairs/{progress.update}") >> 1)
        chosen = torch.randperm(self.settings.patches**2, generator=generator)[: self.settings.pairs]
        chosen = chosen.to(record.boxes.device)
        return torch.stack([chosen // self.settings.patches, chosen % self.settings.patches], -1)

    def _every_pair(self, device: torch.device) -> Tensor:
        each = torch.arange(self.settings.patches, device=device)
        return torch.cartesian_prod(each, each)

    def _units(self, *, standardized: bool = True) -> PairUnits:
        """Return the units of targets, standardized unless told not to."""
        mean, std = (self.target_mean, self.target_std) if standardized else (None, None)
        return PairUnits(position=self.settings.position, scale=self.settings.target_scale, mean=mean, std=std)

    def _terms_without_pairs(self, head: AdditiveHead, features: Features, views: Views, pairs: Tensor | None) -> Terms:
        """Return what `forward` does, by the kernel that never stores what it says of a pair."""
        settings, record = self.settings, views.geometry
        result = head.loss(
            features,
            record.boxes,
            pairs="all" if pairs is None else pairs,
            valid=views.valid,
            units=self._units(),
            flipped=record.flipped,
            picture_hw=record.source_size,
            loss=settings.loss,
            beta=settings.smooth_l1_beta,
            channel_weights=self.channel_weights,
        )
        meters = {f"r2_{name}": value for name, value in zip(self.channels, result.r2, strict=True)}
        return Terms(losses=position_and_scale(result, self.weights), meters=meters | self._meters(features, views))

    @staticmethod
    def _meters(features: Features, views: Views) -> dict[str, Tensor]:
        """Return which share of windows is too small, and how far patches' features spread."""
        return {"pictures_left_out": 1 - views.valid.float().mean(), **spread(features.summary)}
