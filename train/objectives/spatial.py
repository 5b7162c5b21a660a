"""SP: predict where one view of a picture lies relative to another, and how much larger it is.

Here: the settings (every choice that the paper leaves open is a field), and the objective.
Not here: the heads (pair_heads.py), the targets (wherefrom.kernels.pair_targets), how it is judged (train/evaluation/pairs.py).
Source: re-implemented from secondary descriptions of arXiv 2605.09963; what they do not say is our choice.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import CHANNELS, Axes, PairUnits, PositionUnit, Scale
from wherefrom.pipeline.laws import Paired
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, CropLaw, Mirror, ViewFamily, check_law, law_name
from wherefrom.pipeline.views import Batch, ViewGeometry, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.pair_heads import AdditiveHead, AttendHead
from wherefrom.train.objectives.pairs import Loss, enlarged, law_records, ordered_pairs, pair_terms, position_and_scale

PAIRED = Paired(border_frac=0.02)  # frames and watermarks tell the place
HeadName = Literal["attend", "additive"]
Stop = Literal["none", "reference", "encoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpatialSettings:
    """Every choice of SP. A law that draws pairs cuts one a picture, the others `views` views, all ordered pairs of which count.

    Raises: ValueError if upright axes are asked for while views are mirrored or turned: the network cannot see which way is up.
    """

    weight: float = 0.1  # of the whole objective, as published for a plug-in beside a host; alone it is best 1
    law: CropLaw = PAIRED  # how views are cut
    views: int | None = None  # None: as many as the law draws, 6 if it draws any number
    size_px: int = 96  # side of the finished, square view
    both_orders: bool = False  # of a law that draws pairs: count each from both sides, as is always done of more views
    min_side_px: int = 16
    mirror: Mirror = "picture"
    turns: bool = False
    color: ColorLaw | None = field(default_factory=ColorLaw)
    equalize_px: int | None = None  # render at this side, then enlarge to size_px: both views lose the same detail

    position: PositionUnit = "reference"
    scale: Scale = "log_area"
    axes: Axes = "view"
    standardize: bool = True  # by the law's mean and standard deviation

    head: HeadName = "attend"
    hidden: int | None = None  # None: the encoder's width
    temperature: float | None = None  # of the attention; None: sqrt of the encoder's width
    projections: bool = False  # learn linear maps of query, keys and values
    loss: Loss = "squared"  # summed over a term's channels
    smooth_l1_beta: float = 0.5
    weight_position: float = 1.0  # of its term, within `weight`
    weight_scale: float = 1.0
    stop: Stop = "none"  # where no gradient goes: into the reference view, or into the encoder at all

    def __post_init__(self) -> None:
        check_law(self.law)
        check_literals(self)
        if self.axes == "source" and (self.mirror != "none" or self.turns):
            raise ValueError(
                f"axes='source' with mirror={self.mirror!r}, turns={self.turns}: no view shows which way is up; use axes='view'"
            )
        if self.equalize_px is not None and not 0 < self.equalize_px <= self.size_px:
            raise ValueError(f"equalize_px={self.equalize_px}: needs 1 to size_px={self.size_px}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: needs at least 1, or none")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: needs a positive number, or none")
        if min(self.weight, self.weight_position, self.weight_scale) < 0:
            weights = ", ".join(f"{name}={getattr(self, name)}" for name in ("weight", "weight_position", "weight_scale"))
            raise ValueError(f"{weights}: weights cannot be negative")
        views = self.family("spatial").views  # the law checks whether it can draw them
        if views < 2:
            raise ValueError(f"views={views}: a pair needs 2")

    @property
    def law_name(self) -> str:
        """What R2 is named by: it does not compare across laws."""
        return law_name(self.law)

    def family(self, name: str) -> ViewFamily:
        """Return the views that these settings ask the loader for."""
        side = self.equalize_px or self.size_px
        views = self.law.fixed_views or 6 if self.views is None else self.views
        return ViewFamily(
            name=name,
            views=views,
            size_px=(side, side),
            law=self.law,
            mirror=self.mirror,
            turns=self.turns,
            color=self.color,
            min_side_px=self.min_side_px,
        )

    def objective(self, name: str) -> "SpatialPrediction":
        """Return what is learned by these settings, under a name."""
        return SpatialPrediction(self, name=name)

    def channels(self) -> tuple[str, ...]:
        """Return the names of what is predicted, in order."""
        return CHANNELS[self.scale]


class SpatialPrediction(Objective):
    """SP as an objective: two terms, position and scale, of standardized targets."""

    target_mean: Tensor
    target_std: Tensor
    channel_weights: Tensor
    pairs: Tensor

    def __init__(self, settings: SpatialSettings, *, name: str = "spatial") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights = {"position": settings.weight_position, "scale": settings.weight_scale}
        self.families = (settings.family(name),)
        self.channels = settings.channels()
        per_channel = [settings.weight_position] * 2 + [settings.weight_scale] * (len(self.channels) - 2)
        self.register_buffer("channel_weights", torch.tensor(per_channel), persistent=False)
        one_way = settings.law.fixed_views == 2 and not settings.both_orders
        self.register_buffer("pairs", torch.tensor([[0, 1]]) if one_way else ordered_pairs(self.families[0].views), persistent=False)

    def setup(self, encoder: Encoder) -> None:
        """Build the head; its weights are drawn from torch's generator."""
        self.head = self.new_head(encoder.width)
        mean, std = self.standardization()
        self.register_buffer("target_mean", mean)
        self.register_buffer("target_std", std)

    def new_head(self, width: int) -> AttendHead | AdditiveHead:
        """Return a fresh head for features of `width`."""
        settings = self.settings
        hidden, channels = settings.hidden or width, len(self.channels)
        if settings.head == "additive":
            return AdditiveHead(width, hidden, channels)
        return AttendHead(width, hidden, channels, temperature=settings.temperature, projections=settings.projections)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        views = batch.family(self.name)
        features = self.features(views, encode)
        if isinstance(self.head, AdditiveHead):
            return self._terms_without_pairs(self.head, features, views)
        predicted, meters = self.predict(features)
        targets, mask = self.targets(views.geometry), self.pair_mask(views.geometry, views.valid)
        terms = pair_terms(predicted, targets, mask, self.channels, loss=self.settings.loss, beta=self.settings.smooth_l1_beta)
        return Terms(losses=terms.losses, meters={**meters, **terms.meters, "pairs_left_out": 1 - mask.float().mean()})

    def features(self, views: Views, encode: Encode) -> Features:
        """Return what the head sees of `views`; those that were rendered small are enlarged first."""
        side = self.settings.size_px
        return encode(views if views.geometry.size_px == (side, side) else enlarged(views, side))

    def predict(self, features: Features, pairs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return standardized predictions (B, P, C) for `pairs` (P, 2), by default those that are learned, and meters."""
        pairs = self.pairs if pairs is None else pairs
        return self.head(self._seen(features), pairs, stop_reference=self.settings.stop == "reference")

    def evaluation_family(self) -> ViewFamily:
        """Return the views to judge by: the same boxes, neither colored, mirrored nor turned."""
        return replace(self.families[0], color=None, mirror="none", turns=False)

    def boxes(self, record: ViewGeometry) -> Tensor:
        """Return the boxes that pairs are made of, (B, N, 4): those of the views."""
        return record.boxes

    def pair_mask(self, record: ViewGeometry, valid: Tensor) -> Tensor:
        """Return which pairs count, (B, P) bool: those of two valid (B, V) views."""
        return valid[:, self.pairs.to(valid.device)].all(-1)

    def targets(self, record: ViewGeometry, pairs: Tensor | None = None, *, standardized: bool = True) -> Tensor:
        """Return what is to be predicted, (B, P, C) float32, of the boxes as cut."""
        return pair_targets(
            record.boxes,
            self.pairs if pairs is None else pairs,
            units=self._units(standardized=standardized),
            flipped=record.flipped,
            quarter_turns=record.quarter_turns,
            picture_hw=record.source_size,
        )

    def standardization(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of every channel under the law, (C,) float32.

        In closed form where the law has one, else from 8192 pictures' draws on a square of 1024 pixels, always the same.
        """
        settings, channels = self.settings, len(self.channels)
        if not settings.standardize:
            return torch.zeros(channels), torch.ones(channels)
        as_moments_are = not settings.both_orders and settings.position == "reference" and settings.scale != "ratio"
        moments = settings.law.target_moments() if as_moments_are else None
        if moments is not None:
            mean = [0.0] * 2 + [moments.log_scale_mean] * (channels - 2)
            return torch.tensor(mean), torch.tensor([moments.position_std] * 2 + [moments.log_scale_std] * (channels - 2))
        record = law_records(self.families[0], pictures=8192)
        targets = self.targets(record, self.pairs.cpu(), standardized=False).flatten(0, 1).double()
        return targets.mean(0).float(), targets.std(0).clamp(min=1e-6).float()

    def _units(self, *, standardized: bool = True) -> PairUnits:
        """Return the units of targets, standardized unless told not to."""
        settings = self.settings
        mean, std = (self.target_mean, self.target_std) if standardized else (None, None)
        return PairUnits(position=settings.position, scale=settings.scale, axes=settings.axes, mean=mean, std=std)

    def _seen(self, features: Features) -> Features:
        return features.detach() if self.settings.stop == "encoder" else features

    def _terms_without_pairs(self, head: AdditiveHead, features: Features, views: Views) -> Terms:
        """Return what `forward` does, by the kernel that never stores what it says of a pair."""
        settings, record = self.settings, views.geometry
        result = head.loss(
            self._seen(features),
            record.boxes,
            stop_reference=settings.stop == "reference",
            pairs=self.pairs if len(self.pairs) == 1 else "others",
            valid=views.valid,
            units=self._units(),
            flipped=record.flipped,
            quarter_turns=record.quarter_turns,
            picture_hw=record.source_size,
            loss=settings.loss,
            beta=settings.smooth_l1_beta,
            channel_weights=self.channel_weights,
        )
        meters = {f"r2_{name}": value for name, value in zip(self.channels, result.r2, strict=True)}
        meters["pairs_left_out"] = 1 - result.counted.sum() / (len(record) * len(self.pairs))
        return Terms(losses=position_and_scale(result, self.weights), meters=meters)
