"""SP on the token map of one view: predict where one region of it lies relative to another, and how much larger it is.

Here: the settings, how regions are drawn, and the objective: one forward of the encoder gives hundreds of pairs.
Not here: pooling and targets (wherefrom.kernels), the head (pair_heads.py), how it is judged (train/evaluation/pairs.py).
Source: ours, after SP (arXiv 2605.09963); that the encoder works without its position table is PART's (arXiv 2506.03682).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import CHANNELS, PairUnits, PositionUnit, Scale
from wherefrom.kernels.roi_align import roi_align
from wherefrom.kernels.roi_align_pairs import roi_align_pairs
from wherefrom.pipeline.crops import SUBPIXELS
from wherefrom.pipeline.draws import Purpose, family_word, random_words_of_tensors
from wherefrom.pipeline.geometry import overlap_area
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, Mirror, ViewFamily
from wherefrom.pipeline.views import Batch, ViewGeometry, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.objective import Encode, Objective, Progress, Terms
from wherefrom.train.objectives.pair_heads import AdditiveHead
from wherefrom.train.objectives.pairs import Loss, law_records, ordered_pairs, pair_terms

STANDARDIZED_ON = 2048  # pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpatialSettings:
    """Every choice of dense SP. What solves the task without looking at the picture is off by default, and can be turned on to see it work.

    positions: with the position table every region of a view knows its absolute place, and the task is a subtraction. Without it a ViT
               sees a bag of patches and has to tell places by what they show; the table stays as it started, small and random. A
               convolutional network tells places by its padding, has no such choice, and must be told True: then R2 says little.
    sampling:  a mean over more tokens is smoother, and "adaptive" and "area" average more tokens in larger regions: size can be read from
               that alone. A fixed number a bin reads as many tokens whatever the size.
    pairs:     regions that overlap share tokens, and what they share tells how they lie; so only pairs that lie apart count. Bins of one
               region share tokens too where they are less than two tokens apart, which tells a little of its size: mind side_frac.
    In pictures of noise a small encoder reaches R2 .95 of position with the table and .11 of scale by "adaptive" or "area", but 0 as it is
    here; .07 of scale after 800 updates instead of 120 (tests/test_spatial_dense.py). Read the report's row of content-free pictures.

    Raises: ValueError if regions would not fit, or could never lie apart.
    """

    weight: float = 0.1  # of the whole objective, beside a host; alone it is best 1
    size_px: int = 224  # side of the finished, square view
    area_frac: tuple[float, float] = (0.3, 1.0)  # of the picture that the view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    min_side_px: int = 16
    mirror: Mirror = "picture"
    color: ColorLaw | None = field(default_factory=ColorLaw)

    regions: int = 24  # R a view; all R (R - 1) ordered pairs that count are learned
    side_frac: tuple[float, float] = (0.15, 0.4)  # square root of a region's area over the view's side, log-uniform; then placed uniformly
    region_aspect: tuple[float, float] = (1.0, 1.0)  # width / height, log-uniform
    pairs: Literal["apart", "all"] = "apart"
    bins: tuple[int, int] = (2, 2)  # rows and columns that a region is pooled to; the head sees them in order
    sampling: int | Literal["adaptive", "area"] = 1  # samples along each axis of a bin, as in `roi_align`
    positions: bool = False

    position: PositionUnit = "reference"  # "picture": in sides of the view
    scale: Scale = "log_area"
    standardize: bool = True  # by the law's mean and standard deviation, drawn
    hidden: int | None = None  # None: the encoder's width
    loss: Loss = "squared"  # summed over a term's channels
    smooth_l1_beta: float = 0.5
    weight_position: float = 1.0  # of its term, within `weight`
    weight_scale: float = 1.0

    def __post_init__(self) -> None:
        check_literals(self)
        if self.regions < 2:
            raise ValueError(f"regions={self.regions}: a pair needs 2")
        low, high = self.side_frac
        thin, wide = self.region_aspect
        if not 0 < low <= high or not 0 < thin <= wide:
            raise ValueError(f"side_frac={self.side_frac}, region_aspect={self.region_aspect}: each needs 0 < low <= high")
        stretch = math.sqrt(max(wide, 1 / thin))
        if high * stretch > 1:
            raise ValueError(f"side_frac={self.side_frac}: some regions would not fit; the upper bound must be at most {1 / stretch:.4f}")
        if self.pairs == "apart" and low / stretch > 0.5:
            raise ValueError(f"side_frac={self.side_frac}: such regions always overlap; lower it, or take pairs='all'")
        if min(self.bins) < 1 or (isinstance(self.sampling, int) and self.sampling < 1):
            raise ValueError(f"bins={self.bins}, sampling={self.sampling}: needs at least 1 bin a side and 1 sample")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: needs at least 1, or none")
        if min(self.weight, self.weight_position, self.weight_scale) < 0:
            weights = ", ".join(f"{name}={getattr(self, name)}" for name in ("weight", "weight_position", "weight_scale"))
            raise ValueError(f"{weights}: weights cannot be negative")
        _ = self.family("dense")  # it checks its own numbers

    @property
    def law_name(self) -> str:
        """What R2 is named by: it does not compare across laws."""
        return f"regions {self.pairs}, side {self.side_frac[0]:g} to {self.side_frac[1]:g} of a view"

    def family(self, name: str) -> ViewFamily:
        """Return the one view that these settings ask the loader for."""
        return ViewFamily(
            name=name,
            views=1,
            size_px=(self.size_px, self.size_px),
            law=Independent(area_frac=self.area_frac, aspect=self.aspect),
            mirror=self.mirror,
            color=self.color,
            min_side_px=self.min_side_px,
        )

    def objective(self, name: str) -> "DenseSpatialPrediction":
        """Return what is learned by these settings, under a name."""
        return DenseSpatialPrediction(self, name=name)

    def channels(self) -> tuple[str, ...]:
        """Return the names of what is predicted, in order."""
        return CHANNELS[self.scale]


class DenseSpatialPrediction(Objective):
    """SP between regions of one view as an objective: two terms, position and scale, of standardized targets."""

    target_mean: Tensor
    target_std: Tensor
    pairs: Tensor

    def __init__(self, settings: DenseSpatialSettings, *, name: str = "dense") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights = {"position": settings.weight_position, "scale": settings.weight_scale}
        self.families = (settings.family(name),)
        self.couples_samples = settings.pairs != "all"  # pictures have more pairs and less, and all pairs weigh alike
        self.channels = settings.channels()
        self.register_buffer("pairs", ordered_pairs(settings.regions), persistent=False)

    def setup(self, encoder: Encoder) -> None:
        """Build the head; its weights are drawn from torch's generator.

        Raises: ValueError if the encoder cannot leave its positions out.
        """
        if not self.settings.positions and not encoder.settings.is_vit:
            raise ValueError(
                f"positions=False of {self.name!r} with model {encoder.settings.name!r}: it tells places by its padding; "
                "take a ViT, or positions=True and mind the row of content-free pictures"
            )
        self.head = self.new_head(encoder.width)
        mean, std = self.standardization()
        self.register_buffer("target_mean", mean)
        self.register_buffer("target_std", std)

    def new_head(self, width: int) -> AdditiveHead:
        """Return a fresh head for an encoder's features of `width`."""
        return AdditiveHead(math.prod(self.settings.bins) * width, self.settings.hidden or width, len(self.channels))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the terms. What is said of a few hundred pairs is stored: `pair_loss` saves no time at that number."""
        settings, views = self.settings, batch.family(self.name)
        boxes = self.boxes(views.geometry)
        pooled, targets = roi_align_pairs(
            self._tokens(views, encode),
            boxes,
            pairs=self.pairs,
            units=self._units(),
            picture_hw=settings.size_px,
            **self._pooling(),
        )
        predicted, _ = self.predict(_regions(pooled))
        mask = self._counted(boxes, views.valid)
        terms = pair_terms(predicted, targets, mask, self.channels, loss=settings.loss, beta=settings.smooth_l1_beta)
        numbers = {"pairs_left_out": 1 - views.valid.float().mean(), "pairs_a_picture": mask.sum() / len(mask)}
        return Terms(losses=terms.losses, meters={**terms.meters, **numbers})

    def features(self, views: Views, encode: Encode) -> Features:
        """Return what the head sees of `views` (B, 1): the features of regions where other objectives have views."""
        return _regions(roi_align(self._tokens(views, encode), self.boxes(views.geometry), **self._pooling()))

    def predict(self, features: Features, pairs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return standardized predictions (B, P, C) for `pairs` (P, 2) of regions, by default all of two, and meters."""
        return self.head(features, self.pairs if pairs is None else pairs)

    def evaluation_family(self) -> ViewFamily:
        """Return the views to judge by: the same boxes, neither colored nor mirrored."""
        return replace(self.families[0], color=None, mirror="none")

    def boxes(self, record: ViewGeometry) -> Tensor:
        """Return the regions that belong to the one view of every picture, (B, R, 4), as `draw_regions`."""
        return draw_regions(
            record, regions=self.settings.regions, side_frac=self.settings.side_frac, region_aspect=self.settings.region_aspect
        )

    def pair_mask(self, record: ViewGeometry, valid: Tensor) -> Tensor:
        """Return which pairs count, (B, P) bool: those of a valid (B, 1) view, and, if so set, only regions that lie apart."""
        return self._counted(self.boxes(record), valid)

    def targets(self, record: ViewGeometry, pairs: Tensor | None = None, *, standardized: bool = True) -> Tensor:
        """Return what is to be predicted, (B, P, C) float32, as the view shows it: regions are drawn in its own, mirrored, pixels."""
        pairs = self.pairs if pairs is None else pairs
        return pair_targets(self.boxes(record), pairs, units=self._units(standardized=standardized), picture_hw=self.settings.size_px)

    def standardization(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of every channel over the pairs that count, (C,) float32, by the same draws always."""
        if not self.settings.standardize:
            return torch.zeros(len(self.channels)), torch.ones(len(self.channels))
        record = law_records(self.families[0], pictures=STANDARDIZED_ON)
        counted = self.pair_mask(record, torch.ones(len(record), 1, dtype=torch.bool))
        drawn = self.targets(record, self.pairs.cpu(), standardized=False)[counted].double()
        return drawn.mean(0).float(), drawn.std(0).clamp(min=1e-6).float()

    def _tokens(self, views: Views, encode: Encode) -> Tensor:
        """Return the token maps (B, h, w, D) of the one view of every picture."""
        return encode(views, positions=self.settings.positions).tokens[:, 0]

    def _pooling(self) -> dict[str, Any]:
        """Return how regions are pooled, as arguments."""
        settings = self.settings
        return {"frame_hw": settings.size_px, "out_hw": settings.bins, "sampling": settings.sampling}

    def _units(self, *, standardized: bool = True) -> PairUnits:
        """Return the units of targets, standardized unless told not to."""
        mean, std = (self.target_mean, self.target_std) if standardized else (None, None)
        return PairUnits(position=self.settings.position, scale=self.settings.scale, mean=mean, std=std)

    def _counted(self, boxes: Tensor, valid: Tensor) -> Tensor:
        reference, target = self.pairs.to(valid.device).unbind(-1)
        if self.settings.pairs == "all":
            return valid.expand(-1, len(reference))
        return valid & (overlap_area(boxes[:, reference], boxes[:, target]) == 0)


def draw_regions(record: ViewGeometry, *, regions: int, side_frac: tuple[float, float], region_aspect: tuple[float, float]) -> Tensor:
    """Draw the regions of the one view of every picture: sides log-uniform, then a place uniform over all that there are.

    A region is a function of the record's seed, epoch, sample, family and view, and of its own number: of nothing else in the batch.
    Shapes: record of views (B, 1) -> (B, R, 4) float32 xyxy, on the record's device.
    Units:  pixels of the finished view, on a grid of 1/1024.
    """
    words = random_words_of_tensors(
        record.seed,
        record.epoch,
        record.drawn_for[:, None],
        family_word(record.family),
        record.view,
        Purpose.REGION,
        torch.arange(regions, device=record.drawn_for.device),
    )  # (B, R, 4)
    u = (words[..., :2].double() + 0.5) / 2**32
    height, width = (side * SUBPIXELS for side in record.size_px)
    root_area = min(height, width) * _between(side_frac, u[..., 0])
    stretch = _between(region_aspect, u[..., 1]).sqrt()
    boxes = []
    for side, frame, word in ((root_area * stretch, width, words[..., 2]), (root_area / stretch, height, words[..., 3])):
        whole = side.round().clamp(1, frame).long()
        corner = word * (frame - whole + 1) >> 32
        boxes.append((corner, corner + whole))
    (x0, x1), (y0, y1) = boxes
    return (torch.stack([x0, y0, x1, y1], -1) / SUBPIXELS).float()


def _regions(pooled: Tensor) -> Features:
    """Return pooled regions (B, R, rows, cols, D) as features: bins as tokens and, side by side, as summary."""
    return Features(summary=pooled.flatten(2), tokens=pooled)


def _between(bounds: Sequence[float], u: Tensor) -> Tensor:
    """Return log-uniform numbers of uniform ones."""
    low, high = map(math.log, bounds)
    return (low + u * (high - low)).exp()
